"""Prompts as tokens and places in what was generated, by a tokenizer with a word a token."""

from types import SimpleNamespace

import pytest

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


def test_bos_stands_once():
    tokenizer = Tokenizer()
    assert prompts.tokenize(tokenizer, "Result| =") == prompts.tokenize(tokenizer, "<bos>|Result| =") == [0, 1, 2]
    tokenizer.bos_token_id = None
    assert prompts.tokenize(tokenizer, "Result| =") == [1, 2]
    assert prompts.find_special_ids(tokenizer) == [0, 10]


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
