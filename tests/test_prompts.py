"""Prompts as tokens and places in what was generated: by a tokenizer with a word a token, and by real ones."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tokenizers
import transformers
from conftest import ROOT, options

import common
from experiment import prompts

WORDS = ["<bos>", "Result", " =", " [", "[", " Os", "lo", " ]]", "]", "\n", "<end>"]


class Tokenizer:
    bos_token_id, all_special_ids = 0, [0]
    added_tokens_decoder = {10: SimpleNamespace(special=True), 9: SimpleNamespace(special=False)}

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [WORDS.index(word) for word in text.split("|")]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(WORDS[i] for i in ids if not (skip_special_tokens and i in (0, 10)))


def ids_of(text):
    return [WORDS.index(word) for word in text.split("|")]


def test_special_ids():
    assert prompts.find_special_ids(Tokenizer()) == [0, 10]


@pytest.fixture(scope="module")
def demo_tokenizer():
    """As Gemma's: BOS before each text, bytes for what the vocabulary lacks."""
    return common.load_tokenizer(options())


@pytest.fixture(scope="module")
def smollm_like():
    """As SmolLM2's: byte by byte, with a BOS that it does not put before a text; its end token has a bracket in it."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["Result = [[ label ]]"] * 5, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|im_start|>", eos_token="[EOS]")


@pytest.fixture(scope="module")
def gemma_like(tmp_path_factory):
    """Gemma's own class, whose configuration asks for BOS, on the demo's vocabulary."""
    folder = tmp_path_factory.mktemp("gemma")
    shutil.copy(ROOT / "demo" / "model" / "config.json", folder)
    shutil.copy(ROOT / "demo" / "model" / "tokenizer.json", folder)
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<bos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer).__name__ == "GemmaTokenizer"
    return tokenizer


@pytest.mark.parametrize("name", ["demo_tokenizer", "gemma_like"])
def test_bos_stands_once(name, request):
    """Gemma's prompts begin with it, whether or not the template does."""
    tokenizer = request.getfixturevalue(name)
    text = "<start_of_turn>user\nAnswer the following question"
    rest = tokenizer.encode(text, add_special_tokens=False)
    assert rest[0] == tokenizer.convert_tokens_to_ids("<start_of_turn>") != tokenizer.bos_token_id
    assert prompts.tokenize(tokenizer, text) == [tokenizer.bos_token_id, *rest]
    assert prompts.tokenize(tokenizer, "<bos>" + text) == [tokenizer.bos_token_id, *rest]


def test_bos_where_the_tokenizer_adds_none(smollm_like):
    """It stands where the template has it, and nowhere else."""
    bos, rest = smollm_like.bos_token_id, smollm_like.encode("Question: where?", add_special_tokens=False)
    assert prompts.tokenize(smollm_like, "Question: where?") == rest and bos not in rest
    assert prompts.tokenize(smollm_like, "<|im_start|>Question: where?") == [bos, *rest]
    without = transformers.PreTrainedTokenizerFast(tokenizer_object=smollm_like.backend_tokenizer)
    assert without.bos_token_id is None and prompts.tokenize(without, "Question: where?") == rest


@pytest.mark.parametrize("answer", ["Oslo", "Straße", "Beyoncé", "北京", "🦜", "東京 🦜 é"])
@pytest.mark.parametrize("name", ["demo_tokenizer", "smollm_like"])
def test_characters_of_several_tokens(name, answer, request):
    """All tokens of an answer are inside, the bytes of its last character too, and none beside it."""
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(f"Result = [[ {answer} ]]", add_special_tokens=False)
    ids.append(tokenizer.eos_token_id)
    inside = prompts.find_answer(tokenizer, ids)
    assert inside == list(range(inside[0], inside[-1] + 1))
    assert tokenizer.decode([ids[place] for place in inside]).strip() == answer
    assert tokenizer.decode(ids[: inside[0]]).strip() == "Result = [["
    assert tokenizer.decode(ids[inside[-1] + 1 : -1]).strip() == "]]"


def test_an_end_token_is_no_bracket(smollm_like):
    eos = smollm_like.eos_token_id
    ids = smollm_like.encode("Result = [[ Oslo ]]", add_special_tokens=False)
    bracket = prompts.find_bracket(smollm_like, ids)
    assert bracket is not None and prompts.find_bracket(smollm_like, [*ids, eos]) == bracket
    assert prompts.find_bracket(smollm_like, [*smollm_like.encode("Oslo"), eos]) is None
    assert prompts.find_answer(smollm_like, [*smollm_like.encode("Oslo"), eos]) == []


def test_a_template_with_a_byte_order_mark(demo_tokenizer, tmp_path):
    (tmp_path / "template.txt").write_text("{context} {question}", encoding="utf-8-sig")
    assert common.choose_template(str(tmp_path / "template.txt"), demo_tokenizer) == "{context} {question}"


def test_only_the_two_fields_are_filled_in():
    found = prompts.build_prompt("{context}|{question}|{other}", "a {question} {}", "b {context}")
    assert found == "a {question} {}|b {context}|{other}"


@pytest.mark.parametrize(
    ("text", "bracket", "answer"),
    [
        ("Result| =| [|[| Os|lo| ]]|<end>", 3, [4, 5]),
        ("Result| =| [| Os|lo|]|<end>", 2, [3, 4]),
        ("Result| =| Os|lo|<end>", None, []),
        (" [|[| ]]", 1, []),  # nothing stands inside
        (" [| Os|]| [|lo|]", 3, [1]),  # ranked before the last bracket; the answer is in the first ones
        (" [| Os|\n|lo|]", 0, []),  # not on one line
    ],
)
def test_places(text, bracket, answer):
    """The last token with a [ in it, of [ [ the second; and the tokens inside the first brackets."""
    tokenizer, ids = Tokenizer(), ids_of(text)
    assert prompts.find_bracket(tokenizer, ids) == bracket
    assert prompts.find_answer(tokenizer, ids) == answer
