"""The project against the naive oracle, in float32 on the bundled model and SAE: answers, masks, rankings."""

import dataclasses
import math

import conftest
import oracle
import pytest
import scipy.stats
import torch
from conftest import load, options
from torch.utils._python_dispatch import TorchDispatchMode

import common
from experiment import prompts
from experiment.intervention import generate, layout, modules, plan, ranked_lists, rankings, splice
from experiment.intervention.ablations import Ablation
from experiment.intervention.layout import Layout
from experiment.intervention.plan import plan_batches
from experiment.intervention.ranked_lists import RankedLists
from experiment.intervention.rows import pick_log_probs
from experiment.intervention.sequences import Sequences
from experiment.masks import count_to_reach
from experiment.records.lists import find_latents_to_mask
from experiment.records.schema import RankedLatents
from experiment.report.estimates import shared_percent
from experiment.scores import score_answer

COUNT = 36


@pytest.fixture(scope="module")
def asked(demo, demo_questions):
    """The first questions: prompt ids, and the oracle's answer and ranking of each."""
    model, tokenizer = demo
    bridge, sae, found = model.model, model.splice.sae, []
    for question in demo_questions[:COUNT]:
        prompt = oracle.encode_prompt(tokenizer, question.context, question.question)
        generated = oracle.generate(bridge, sae, tokenizer, prompt)
        ranking = oracle.rank_latents(bridge, sae, tokenizer, prompt, generated)
        found.append({"question": question, "prompt": prompt, "generated": generated, "ranking": ranking})
    return found


@pytest.fixture(scope="module")
def ranked(asked):
    return [case for case in asked if case["ranking"]]


@pytest.fixture(scope="module")
def masked(demo, ranked):
    """What the oracle answers with each question's TopK and BottomK masked, and with an odd mix that changes much."""
    model, tokenizer = demo
    lists = {name: [case["ranking"][name] for case in ranked] for name in ("topk", "bottomk")}
    lists["many"] = [case["ranking"]["active"][:10] for case in ranked]
    texts = {
        name: [
            oracle.generate(model.model, model.splice.sae, tokenizer, case["prompt"], latents)
            for case, latents in zip(ranked, of_all)
        ]
        for name, of_all in lists.items()
    }
    return lists, texts


@pytest.fixture(scope="module")
def sequences(demo, ranked):
    """The sequences that are ranked, as round 1 makes them."""
    model, tokenizer = demo
    found = answer_all(model, ranked)
    assert [one.tokens for one in found[0]] == [case["generated"] for case in ranked]
    return make_sequences(tokenizer, ranked, *found)


def answer_all(model, cases, most=50, guess=()):
    return conftest.answer(model, [case["prompt"] for case in cases], contexts_of(cases), most, guess)


def make_sequences(tokenizer, cases, found, read):
    """The Sequences of all these cases, as round 1 makes them."""
    generated = [one.tokens for one in found]
    return Sequences(
        ids=[case["question"].id for case in cases],
        prompts=[case["prompt"] for case in cases],
        generated=generated,
        brackets=[prompts.find_bracket(tokenizer, tokens) for tokens in generated],
        answer_positions=[prompts.find_answer(tokenizer, tokens) for tokens in generated],
        rows=list(range(len(cases))),
        read=read,
        special_ids=prompts.find_special_ids(tokenizer),
    )


def pick(sequences, *numbers):
    """The Sequences of some of them."""
    lists = {
        name: [getattr(sequences, name)[n] for n in numbers]
        for name in ("ids", "prompts", "generated", "brackets", "answer_positions", "rows")
    }
    return dataclasses.replace(sequences, **lists)


def contexts_of(cases):
    return [case["question"].context for case in cases]


def in_batches(cases, size):
    return [cases[start : start + size] for start in range(0, len(cases), size)]


def assert_same_latents(ours, oracles, scores):
    """The same list, but that latents whose scores differ by rounding alone (1e-5 relative) may have changed places."""
    assert len(ours) == len(oracles)
    for mine, theirs in zip(ours, oracles):
        assert mine == theirs or scores[mine] == pytest.approx(scores[theirs], rel=1e-5)


def test_prompts_are_the_papers(demo, asked):
    _, tokenizer = demo
    template = common.choose_template("auto", tokenizer)
    for case in asked:
        text = prompts.build_prompt(template, case["question"].context, case["question"].question)
        assert prompts.tokenize(tokenizer, text) == case["prompt"]
        assert case["prompt"].count(tokenizer.bos_token_id) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Round 1


@pytest.mark.parametrize(
    ("size", "share", "guess"),
    [
        (1, True, "Result = [["),
        (7, True, "Result = [["),
        (60, True, ""),
        (60, True, "Result = [["),
        (60, True, "Result = [[ no such thing"),
        (7, False, "Result is"),
        (60, False, "No"),
    ],
)
def test_answers_and_rankings(demo, asked, size, share, guess, monkeypatch):
    """In batches that split the questions differently, what prompts share run once or not, what answers begin with
    guessed right, in part, or wrong."""
    model, tokenizer = demo
    monkeypatch.setattr(generate, "PASS_ON_CPU", 0 if share else 10**9)
    guess = tokenizer(guess, add_special_tokens=False)["input_ids"]
    exact = ranked = 0
    for batch in in_batches(asked, size):
        found, read = answer_all(model, batch, 50, guess)
        assert [one.tokens for one in found] == [case["generated"] for case in batch]
        rows = [n for n, case in enumerate(batch) if case["ranking"]]
        cuts = [prompts.find_bracket(tokenizer, one.tokens) for one in found]
        assert [n for n, cut in enumerate(cuts) if cut is not None] == rows
        if not rows:
            continue
        sequences = pick(make_sequences(tokenizer, batch, found, read), *rows)
        scores_of_all = rank(model, "baseline", sequences)
        for n, active, scores in zip(rows, sequences.active, scores_of_all):
            theirs = batch[n]["ranking"]
            ours = dict(zip(("topk", "bottomk"), rankings.top_and_bottom(scores, len(active) // 2)))
            ranked += 1
            assert active == theirs["active"]
            for name in ("topk", "bottomk"):
                assert len(ours[name]) == len(active) // 2 > 0
                assert_same_latents(ours[name], theirs[name], theirs["scores"])
            exact += ours["topk"] == theirs["topk"] and ours["bottomk"] == theirs["bottomk"]
    assert ranked >= 30 and exact >= 0.95 * ranked


@pytest.mark.parametrize("guessed", [0, 2, 3, 5])  # of the first answer's tokens
def test_log_probs_of_the_unmasked_answer(demo, asked, guessed):
    """Of each generated token, against a whole forward pass a question."""
    model, _ = demo
    found, _ = answer_all(model, asked[:9], guess=asked[0]["generated"][:guessed])
    for case, one in zip(asked, found):
        expected = log_probs_by_hand(model, case["prompt"], case["generated"], [])
        assert one.log_probs == pytest.approx(expected, abs=2e-4)


def test_log_probs_of_half_precision_logits_are_single():
    torch.manual_seed(0)
    logits = (8 * torch.randn(300, 50)).bfloat16()
    tokens = torch.randint(50, (300,))
    expected = logits.double().log_softmax(-1)[torch.arange(300), tokens].tolist()
    assert pick_log_probs(logits, tokens).tolist() == pytest.approx(expected, rel=1e-5)


def log_probs_by_hand(model, prompt, generated, masked):
    def replace(residual, hook):
        acts = model.splice.sae.encode(residual).clone()
        acts[:, :, masked] = 0
        return model.splice.sae.decode(acts).to(residual.dtype)

    with torch.no_grad(), model.model.hooks(fwd_hooks=[(model.hook_name, replace)]):
        logits = model.model(torch.tensor([prompt + generated]))[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1)[torch.arange(len(generated)), generated].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def answer_masked(model, cases, drafts, lists, size, max_new_tokens=50):
    """All the masked answers at once for several lists: {name: Answers}, in batches."""
    found = {name: [] for name in lists}
    for start in range(0, len(cases), size):
        part, end = cases[start : start + size], start + size
        masks = [of_all[start:end] for of_all in lists.values()]
        prompts = [case["prompt"] for case in part]
        drafts_of_part = drafts[start:end]
        given = conftest.answer_masked(model, prompts, contexts_of(part), drafts_of_part, masks, max_new_tokens)
        for name, answers_found in zip(lists, given):
            found[name] += answers_found
    return found


@pytest.mark.parametrize("size", [1, 7, 60])
@pytest.mark.parametrize("draft", ["unmasked", "none", "wrong at first", "longer", "cut", "masked"])
def test_masked_answers(demo, ranked, masked, size, draft):
    """Whatever the draft, and for several masks on one batch. Positions at which an answer can first differ from its
    draft: the first token, inside, the last; a draft that is longer, that ends earlier, and that is the answer."""
    if size == 1 and draft not in ("unmasked", "none"):
        pytest.skip("one question at a time takes long")
    model, _ = demo
    lists, expected = masked
    drafts = {
        "unmasked": [case["generated"] for case in ranked],
        "none": [[] for _ in ranked],
        "wrong at first": [[ids[-1], *ids[1:]] for ids in expected["topk"]],
        "longer": [[*ids[:-1], 7, 7, ids[-1]] for ids in expected["topk"]],
        "cut": [ids[: 1 + n % len(ids)] for n, ids in enumerate(expected["many"])],
        "masked": expected["topk"],
    }[draft]
    if draft == "unmasked":
        changed = {name: sum(a != b for a, b in zip(drafts, texts)) for name, texts in expected.items()}
        assert changed["topk"] >= 3 and changed["many"] >= 10  # masking has to change something for this to be a test
    found = answer_masked(model, ranked, drafts, lists, size)
    for name, texts in expected.items():
        assert [answer.tokens for answer in found[name]] == texts


@pytest.mark.parametrize("most", [1, 4, 6])
def test_answers_cut_at_the_longest(demo, ranked, masked, most):
    model, _ = demo
    lists, expected = masked
    drafts = [case["generated"][:most] for case in ranked]
    for guess in ([], ranked[0]["generated"][:5]):
        assert [one.tokens for one in answer_all(model, ranked, most, guess)[0]] == drafts
    found = answer_masked(model, ranked, drafts, lists, 60, most)
    for name, texts in expected.items():
        assert [answer.tokens for answer in found[name]] == [ids[:most] for ids in texts]


def test_nothing_masked_changes_nothing(demo, ranked):
    """K = 0: the masked way with empty lists."""
    model, _ = demo
    drafts = [case["generated"] for case in ranked]
    found = answer_masked(model, ranked, drafts, {"zero": [[] for _ in ranked]}, 60)["zero"]
    unmasked, _ = answer_all(model, ranked)
    assert [answer.tokens for answer in found] == drafts
    for answer, theirs in zip(found, unmasked):
        assert answer.log_probs == pytest.approx(theirs.log_probs, abs=2e-4)


def test_log_probs_of_the_unmasked_answer_under_a_mask(demo, ranked):
    model, _ = demo
    cases = ranked[:12]
    lists = [case["ranking"]["topk"] for case in cases]
    found = answer_masked(model, cases, [case["generated"] for case in cases], {"topk": lists}, 12)["topk"]
    for case, answer, latents in zip(cases, found, lists):
        expected = log_probs_by_hand(model, case["prompt"], case["generated"], latents)
        assert answer.log_probs == pytest.approx(expected, abs=2e-4)


def test_the_window_is_not_long_enough(demo, ranked, masked, monkeypatch):
    """Nothing is shared then: the same answers."""
    model, _ = demo
    lists, expected = masked
    monkeypatch.setattr(model, "window", 100)
    found = answer_masked(model, ranked, [case["generated"] for case in ranked], lists, 30)
    assert {name: [answer.tokens for answer in texts] for name, texts in found.items()} == expected


def test_dense_way_and_small_chunks(demo, ranked, masked, monkeypatch):
    """SAEs whose latents are not sparse are encoded and decoded whole, in chunks that end within a prompt."""
    model, _ = demo
    lists, expected = masked
    dense = splice.Splice(model.splice.sae)
    dense.chunk, dense.bias = 17, None
    monkeypatch.setattr(model, "splice", dense)
    found = answer_masked(model, ranked[:20], [c["generated"] for c in ranked[:20]], {"topk": lists["topk"]}, 20)
    assert [answer.tokens for answer in found["topk"]] == expected["topk"][:20]
    assert [one.tokens for one in answer_all(model, ranked[:9])[0]] == [case["generated"] for case in ranked[:9]]


def test_a_mask_goes_to_the_device_all_at_once(demo):
    """However many rows it has; empty lists, and all of them empty."""
    splice_, means = demo[0].splice, torch.rand(512)
    operators = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            operators[-1] += 1
            return function(*arguments, **(named or {}))

    for lists in ([[1, 5], [7]], [[511], [], [0, 3, 4]] * 20, [[], []]):
        for set_to in (None, means):
            operators.append(0)
            with Count():
                mask = splice_.mask(Ablation(lists), set_to)
            assert [row.nonzero().flatten().tolist() for row in mask.masked] == lists
            assert mask.means is set_to
            if set_to is not None:
                expected = torch.stack([means[ids] @ splice_.sae.W_dec[ids] for ids in lists])
                torch.testing.assert_close(mask.written, expected)
    assert len({*operators[::2]}) == len({*operators[1::2]}) == 1


def test_drafts_are_compared_all_at_once(demo, ranked, monkeypatch):
    """What the model says of a batch comes from the device in one piece, and so do the log probabilities."""
    model, _ = demo
    downloads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: downloads.append(len(tensor)) or tolist(tensor))
    for count in (3, len(ranked)):
        del downloads[:]
        cases = ranked[:count]
        answer_masked(model, cases, [case["generated"] for case in cases], {"zero": [[]] * count}, count)
        assert downloads == [sum(len(case["generated"]) for case in cases)] * 2


def test_splice_is_encode_and_decode(demo):
    """Entries against the SAE's own functions: on positions with none, few and all latents active."""
    sae = demo[0].splice.sae
    torch.manual_seed(0)
    residual = torch.cat([torch.zeros(2, 128), torch.randn(40, 128), 50 * torch.randn(3, 128)])
    stands = torch.arange(45) % 5 != 0
    rows, lists = torch.arange(45) // 9, [[1, 5], [], list(range(0, 512, 2)), [511], [0]]
    for chunk in (7, 1024):
        for error_term in ("drop", "keep"):
            ours = splice.Splice(sae, error_term)
            ours.chunk = chunk
            latents = ours.encode(residual, stands)
            found = ours.reconstruct(latents, rows, ours.mask(Ablation(lists)))
            acts = sae.encode(residual)
            zeroed = acts.clone()
            for position in range(45):
                zeroed[position, lists[rows[position]]] = 0
            expected = sae.decode(zeroed)
            if error_term == "keep":
                expected = residual - (sae.decode(acts) - expected)
            torch.testing.assert_close(found, torch.where(stands[:, None], expected, residual), rtol=1e-4, atol=1e-3)
            assert latents.counts.sum() == (acts[stands] != 0).sum()


def test_rows_that_have_ended_leave_the_batch(demo, asked, monkeypatch):
    """Once half of them have: a long answer does not keep the whole batch."""
    model, _ = demo
    widths, run = [], model._run

    def count(ids, *arguments, **named):
        widths.append(len(ids) if ids.shape[1] == 1 else 0)
        return run(ids, *arguments, **named)

    monkeypatch.setattr(model, "_run", count)
    answer_all(model, asked)
    lengths = [len(case["generated"]) for case in asked]
    going = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    steps = [width for width in widths if width]
    assert len(steps) == len(going)
    assert all(wanted <= width < 2 * wanted or width == wanted for wanted, width in zip(going, steps))


def test_what_answers_begin_with_takes_no_steps(demo, asked, monkeypatch):
    """The format's beginning is what the demo's answers begin with, token for token, and is run in one pass."""
    model, tokenizer = demo
    guess = tokenizer(common.ANSWER_BEGINS, add_special_tokens=False)["input_ids"]
    assert sum(case["generated"][: len(guess)] == guess for case in asked) >= 0.9 * len(asked) and len(guess) > 2
    passes_run, run = [], model._run
    monkeypatch.setattr(model, "_run", lambda *given, **named: passes_run.append(1) or run(*given, **named))
    counts = []
    for beginning in ([], guess):
        del passes_run[:]
        answer_all(model, asked[:9], guess=beginning)
        counts.append(len(passes_run))
    assert counts[0] - counts[1] == len(guess)


def test_a_draft_ends_at_its_first_end_token(demo, asked):
    """Whatever stands behind it, as in a file that was edited."""
    model, _ = demo
    cases = [case for case in asked[:9] if case["generated"][-1] in model.end_ids]
    drafts = [[*case["generated"], *case["generated"]] for case in cases]
    prompts = [case["prompt"] for case in cases]
    nothing = [[] for _ in cases]
    (found,) = conftest.answer_masked(model, prompts, contexts_of(cases), drafts, [nothing], 50)
    assert [one.tokens for one in found] == [case["generated"] for case in cases] and len(cases) > 5
    assert [len(one.log_probs) for one in found] == [len(case["generated"]) for case in cases]


def test_padding_is_not_encoded(demo, asked, monkeypatch):
    model, _ = demo
    monkeypatch.setattr(generate, "PASS_ON_CPU", 10**9)  # nothing is shared
    prompts = [case["prompt"] for case in asked[:9]]
    _, read = conftest.answer(model, prompts, range(9), 1)
    encoded, padded = int(read.latents.spliced.sum()), len(read.latents.spliced)
    assert encoded == sum(map(len, prompts)) < padded and not read.latents.counts[~read.latents.spliced].any()


def test_hook_points_set_aside_change_nothing(demo, asked):
    """While the SAE is spliced in, TransformerLens' other wrappers are off: the same logits, and all back later."""
    model, _ = demo
    ids = torch.tensor([asked[0]["prompt"]])
    before = str(model.lm)
    with torch.no_grad():
        expected = model.lm(ids).logits
        with modules.hooked(model.model, model.hook_name, lambda residual: residual) as lm:
            found = lm(ids).logits
    assert torch.equal(found, expected) and str(model.lm) == before


def test_layers_are_back_after_every_pass(demo, asked):
    model, _ = demo
    before = list(model.lm.get_decoder().layers)
    with pytest.raises(RuntimeError), model.ready():
        model.forward_from(torch.zeros(1, 2, 3), torch.tensor([[1, 2]]), torch.ones(1, 2))
    assert list(model.lm.get_decoder().layers) == before


# ---------------------------------------------------------------------------------------------------------------------
# Padding in half precision


def load_with_low_scores(dtype):
    """The demo's model with every attention score of a layer below the SAE and of one above it lower by 25 or so.

    A constant in the queries' and the keys' slowest rotary dimension, which hardly turns over 500 positions, is
    a constant in their product; what is attended to stays about what it was.
    """
    model, _ = load("--dtype", dtype)
    head_dim = model.lm.config.head_dim
    layers = model.lm.get_decoder().layers
    for number in (0, 2):
        attention = layers[number].original_component.self_attn
        for projection, constant in ((attention.q_proj, 12), (attention.k_proj, -12)):
            bias = torch.zeros(projection.out_features, dtype=projection.weight.dtype)
            bias[head_dim // 2 - 1 :: head_dim] = constant
            projection.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


@pytest.fixture(scope="module")
def low_scores(asked, demo):
    """The model with low scores in float16, and of each question what it gives in float32, alone and without padding:
    the Answer, the Answer with TopK masked, and GradSAE's scores."""
    _, tokenizer = demo
    whole, expected = load_with_low_scores("float32"), []
    for case in asked[:12]:
        found, read = answer_all(whole, [case])
        lists = {"topk": [case["ranking"]["topk"]]}
        masked = answer_masked(whole, [case], [found[0].tokens], lists, 1)["topk"]
        scores = rank(whole, "gradsae", make_sequences(tokenizer, [case], found, read))
        expected.append((found[0], masked[0], scores[0]))
    return load_with_low_scores("float16"), expected


PADDED = {
    "prefixes": {},
    "whole rows, for the window is short": {"window": 40},
    "whole rows, for the SAE is not at a boundary": {"boundary": None, "at_boundary": False},
}


@pytest.mark.parametrize("way", PADDED)
def test_padding_poisons_no_row_in_float16(way, low_scores, asked, demo, monkeypatch):
    """To the score of what a position may not see -65504 is added: to one below -16 that gives -inf, and NaN where a
    position may see nothing."""
    (half, expected), (_, tokenizer), cases = low_scores, demo, asked[:12]
    for name, value in PADDED[way].items():
        monkeypatch.setattr(half, name, value)
    found, read = answer_all(half, cases)
    lists = {"topk": [case["ranking"]["topk"] for case in cases]}
    masked = answer_masked(half, cases, [one.tokens for one in found], lists, 12)["topk"]
    scores = rank(half, "gradsae", make_sequences(tokenizer, cases, found, read))
    assert len({len(case["prompt"]) for case in cases}) > 3
    same = 0
    for ours, theirs in zip(zip(found, masked, scores), expected):
        for one, other in zip(ours[:2], theirs[:2]):
            if one.tokens == other.tokens:
                same += 1
                assert one.log_probs == pytest.approx(other.log_probs, abs=0.1)
        if ours[0].tokens == theirs[0].tokens:
            assert torch.cosine_similarity(ours[2], theirs[2], dim=0) > 0.98
    assert same >= 22


# ---------------------------------------------------------------------------------------------------------------------
# What prompts share


@pytest.mark.parametrize(
    ("prompts", "contexts"),
    [
        ([[1, 2, 3, 4], [1, 2, 5, 6], [9, 2, 3]], "aab"),
        ([[1, 2, 3, 4], [7, 2, 5, 6], [9, 2, 3]], "aaa"),  # no BOS, the question first: nothing in common
        ([[1, 2], [1, 2, 3, 4], [1, 2, 3]], "aaa"),  # each other's prefix
        ([[1, 2, 3], [1, 2, 3]], "aa"),
        ([[5, 6, 7, 8, 9], [5, 6, 7, 8, 9]], "ab"),  # a context each
        ([[1, 2, 3, 4, 5, 6], [1, 9], [4, 4, 4, 4, 4, 4, 4, 1], [4, 4, 4, 4, 4, 4, 4, 2]], "aabb"),
    ],
)
def test_prefixes_are_prefixes(demo, prompts, contexts, monkeypatch):
    """One token at least of every prompt is left, the rests are no wider than the prompts were; and none is wrong."""
    everyone = [None] * len(prompts)
    for groupings in ([everyone], [contexts], [everyone, contexts]):
        levels = layout.find_shared(prompts, [len(prompt) - 1 for prompt in prompts], groupings)
        laid_out = Layout(prompts, 0, "cpu", levels)
        assert len(laid_out.levels) == len(groupings) + 1
        for row, prompt in enumerate(prompts):
            assert laid_out.ids[row][laid_out.attention[row].bool()].tolist() == prompt
            assert laid_out.levels[-1].attention[row].equal(laid_out.attention[row])
            assert laid_out.levels[-1].ids[row, -1] == prompt[-1]
        run = torch.cat([level.ids.flatten() for level in laid_out.levels])
        assert run[laid_out.places].equal(laid_out.ids)
    monkeypatch.setattr(generate, "PASS_ON_CPU", 0)
    model, _ = demo
    alone = [conftest.answer(model, [prompt], "x", 4)[0][0].tokens for prompt in prompts]
    assert [one.tokens for one in conftest.answer(model, prompts, contexts, 4)[0]] == alone


def test_a_prompt_of_one_token(demo):
    model, _ = demo
    found, _ = conftest.answer(model, [[5], [5, 6]], "aa", 3)
    assert [one.tokens for one in found] == [conftest.answer(model, [p], "a", 3)[0][0].tokens for p in ([5], [5, 6])]


def test_batches_hold_every_question_once_within_the_budget():
    lengths = [5, 90, 7, 7, 300, 12, 41, 90, 3]
    batches = plan_batches(lengths, 100, range(9))
    assert sorted(index for batch in batches for index in batch) == list(range(9))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 100
    assert batches == [[4], [1], [7], [6, 5], [2, 3, 0, 8]]
    assert plan_batches([5, 9, 5, 9], 20, "abab") == [[1, 3], [0, 2]]


# ---------------------------------------------------------------------------------------------------------------------
# Rankings


def rank(model, name, sequences, seed=42):
    return rankings.RANKINGS[name](model, sequences, seed)


@pytest.mark.parametrize("size", [1, 24])
def test_gradient_scores(demo, sequences, size):
    """Padded batches, the graph begun at the reconstruction, against plain autograd through everything."""
    model, _ = demo
    for name in ("gradsae", "gradsae-answer"):
        for numbers in in_batches(range(24), size):
            for n, row in zip(numbers, rank(model, name, pick(sequences, *numbers))):
                end = sequences.brackets[n] if name == "gradsae" else sequences.answer_positions[n][0]
                ids, token = sequences.prompts[n] + sequences.generated[n][:end], sequences.generated[n][end]
                theirs, _ = oracle.gradient_scores(model.model, model.splice.sae, ids, token)
                assert (theirs > 0).sum() > 50
                # Of a score that is a sum with terms of both sizes, the smallest carry the largest ones' rounding.
                torch.testing.assert_close(row, theirs, rtol=1e-5, atol=1e-5 * float(theirs.max()))


def test_gradients_in_parts_of_a_size(demo, sequences, monkeypatch):
    """As many rows at once as there is room for, and the same scores. The SAE is put in its place once."""
    model, _ = demo
    some = pick(sequences, *range(20))
    expected = rank(model, "gradsae", some)
    width = max(len(prompt) + end for prompt, end in zip(some.prompts, some.brackets))
    token_bytes = plan.graph_bytes_per_token(model.lm.config, torch.float32, 2, width)
    parts = []

    def find(model, tokens, *arguments):
        parts.append(len(tokens))
        return gradients(model, tokens, *arguments)

    def enter():
        entered.append(1)
        return ready()

    gradients, ready, entered = rankings.gradients, model.ready, []
    monkeypatch.setattr(rankings, "gradients", find)
    monkeypatch.setattr(model, "ready", enter)
    for rows, sizes in ((20, [20]), (8.9, [8, 8, 4]), (0.1, [1] * 20), (None, [2] * 10)):
        del parts[:], entered[:]
        monkeypatch.setattr(model, "gradient_room", rows and rows * width * token_bytes)
        found = rank(model, "gradsae", some)
        assert parts == sizes and len(entered) == 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_gradient_scores_of_a_dense_sae(demo, sequences, monkeypatch):
    model, _ = demo
    expected = rank(model, "gradsae", pick(sequences, *range(6)))
    monkeypatch.setattr(model.splice, "bias", None)
    monkeypatch.setattr(model.splice, "chunk", 17)
    for row, theirs in zip(rank(model, "gradsae", pick(sequences, *range(6))), expected):
        torch.testing.assert_close(row, theirs, rtol=1e-5, atol=1e-5 * float(theirs.max()))


def test_gradient_scores_against_finite_differences(demo, sequences):
    """The probability when a latent's activation moves a little at one position, in double precision."""
    model, _ = demo
    # Where the model is least sure: Transformers computes norms and softmax in single precision all the same.
    prompts, generated, brackets = sequences.prompts, sequences.generated, sequences.brackets
    n = min(range(8), key=lambda n: log_probs_by_hand(model, prompts[n], generated[n], [])[brackets[n]])
    ids, token = prompts[n] + generated[n][: brackets[n]], generated[n][brackets[n]]
    double, _ = load()
    double.lm.double()
    sae = double.splice.sae.double()
    sae.dtype = torch.float64
    double.splice = splice.Splice(sae)
    _, read = conftest.answer(double, [prompts[n]], "x", 50)
    scores = rank(double, "gradsae", dataclasses.replace(pick(sequences, n), rows=[0], read=read))[0]

    def probabilities(latent, step):
        """P when the latent is scaled by 1 + step at one position: a row for each position."""

        def replace(residual):
            acts = sae.encode(residual)  # [row, pos, d_sae], row by row the same
            rows = torch.arange(len(ids))
            acts[rows, rows, latent] *= 1 + step
            return sae.decode(acts)

        with torch.no_grad(), modules.hooked(double.model, double.hook_name, replace) as lm:
            return lm(torch.tensor([ids] * len(ids)), logits_to_keep=1).logits[:, -1].softmax(-1)[:, token]

    for latent in scores.topk(2).indices.tolist():
        slopes = (probabilities(latent, 0.01) - probabilities(latent, -0.01)) / 0.02  # dP/dH * H at each position
        assert scores[latent].item() == pytest.approx(slopes.relu().mean().item(), rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rankings_in_half_precision(demo, sequences, dtype):
    model, _ = demo
    half, _ = load("--dtype", dtype)
    sequences = pick(sequences, *range(20))
    found, read = conftest.answer(half, sequences.prompts, range(len(sequences.ids)), 50)
    same = [n for n, one in enumerate(found) if one.tokens == sequences.generated[n]]
    assert len(same) >= 0.95 * len(found)
    exact = pick(sequences, *same)
    ours = dataclasses.replace(exact, read=read)
    for name in ("baseline", "gradsae", "gradsae-answer"):
        lists = zip(rank(half, name, ours), rank(model, name, exact))
        shared = [shared_percent(*(rankings.top_and_bottom(scores, 6)[0] for scores in pair)) for pair in lists]
        assert sum(shared) / len(shared) >= 85


def test_random_scores(demo, sequences):
    """Of all latents that are active at a token that is not special, and of no other."""
    model, _ = demo
    drawn = []
    of_seeds = [rank(model, "random", sequences, seed) for seed in (42, 42, 7)]
    elsewhere = 0
    for residual, whole, scores, again, other in zip(ordinary_residuals(sequences), residuals(sequences), *of_seeds):
        anywhere = (model.splice.sae.encode(residual) > 0).any(0)
        elsewhere += int(((model.splice.sae.encode(whole) > 0).any(0) & ~anywhere).sum())
        assert torch.equal(scores != 0, anywhere) and torch.equal(scores, again) and not torch.equal(scores, other)
        topk, bottomk = rankings.top_and_bottom(scores, 6)
        assert len({*topk, *bottomk}) == 12
        ids = anywhere.nonzero().flatten().tolist()
        drawn += [ids.index(latent) / len(ids) for latent in topk + bottomk]
    assert elsewhere > 0
    assert scipy.stats.kstest(drawn, "uniform").pvalue > 0.001  # of all places in the list alike


def residuals(sequences):
    """The residual stream over each sequence that is ranked, [pos, d_model]."""
    read = sequences.ranked
    return [read.latents.residual[read.rows == n] for n in range(len(sequences.ids))]


def ordinary_residuals(sequences):
    """The residual stream at the positions of each sequence whose token is not special, [pos, d_model]."""
    read, found = sequences.ranked, []
    for n in range(len(sequences.ids)):
        ids = sequences.prompts[n] + sequences.generated[n][: sequences.brackets[n]]
        ordinary = torch.tensor([token not in sequences.special_ids for token in ids])
        found.append(read.latents.residual[read.rows == n][ordinary])
    return found


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_what_masks_remove(demo, sequences, ablation):
    """Against a loop over positions and latents, for lists of several lengths, an empty one among them."""
    model, _ = demo
    few = pick(sequences, *range(4))
    means = torch.rand(512, generator=torch.Generator().manual_seed(0)) if ablation == "mean" else None
    scores = rank(model, "baseline", few)
    lists = []
    for row, length in zip(scores, (12, 0, 5, 1)):
        topk, bottomk = rankings.top_and_bottom(row, length)
        lists.append(RankedLists(topk, bottomk))
    measured = ranked_lists.add_removed(model, few, lists, means)
    for residual, before, after in zip(ordinary_residuals(few), lists, measured):
        for which in ("topk", "bottomk"):
            expected = oracle.removed_shares(model.splice.sae, residual, before.latents(which), means)
            assert after.latents(which) == before.latents(which)
            assert after.removed(which) == pytest.approx(expected, rel=1e-3, abs=1e-5)  # of four digits
    assert all(value == float(f"{value:.4g}") for value in measured[0].removed_topk)


def test_nothing_is_removed_where_no_position_counts(demo, sequences):
    model, _ = demo
    few = pick(sequences, 0, 1)
    only_special = dataclasses.replace(few, special_ids=range(model.model.cfg.d_vocab))
    assert not only_special.ordinary.any()
    lists = [RankedLists([1, 2], [3])] * 2
    for sample in ranked_lists.add_removed(model, only_special, lists):
        assert sample.removed_topk == [0, 0] and sample.removed_bottomk == [0]
    assert not rank(model, "random", only_special).any()


def scale_bos(model, sequences, times):
    """The sequences as a model gives them whose residual stream at BOS is so many times as long as elsewhere."""
    read = sequences.ranked
    residual = read.latents.residual.clone()
    bos = read.columns == 0
    residual[bos] *= times * residual[~bos].norm(dim=1).mean() / residual[bos].norm(dim=1, keepdim=True)
    scaled = dataclasses.replace(read, latents=model.splice.encode(residual, read.latents.spliced))
    return dataclasses.replace(sequences, rows=list(range(len(sequences.ids))), read=scaled)


def test_bos_does_not_rule_what_is_removed(demo, sequences):
    """With a norm at BOS of 49 times the others', as real models have it: of the same latents the same is removed, and
    matched removes elsewhere what the baseline does, with latents that are active elsewhere."""
    model, _ = demo
    plain = pick(sequences, *range(12))
    scaled = scale_bos(model, plain, 49)
    lists = ranked_lists.rank(model, "baseline", plain, 42)
    assert ranked_lists.add_removed(model, scaled, lists) == ranked_lists.add_removed(model, plain, lists)
    baseline = ranked_lists.rank(model, "baseline", scaled, 42)
    matched = ranked_lists.rank(model, "matched", scaled, 42)
    shares = {"baseline": [], "matched": []}
    for n, residual in enumerate(ordinary_residuals(scaled)):
        acts = model.splice.sae.encode(residual)
        k = len(scaled.active[n]) // 2
        ranked = RankedLatents(active=scaled.active[n], **matched[n].fields())
        of_matched, enough = find_latents_to_mask(ranked, "topk", "50%")
        assert enough and (acts[:, of_matched] != 0).any(0).all()
        for name, latents in (("baseline", baseline[n].topk[:k]), ("matched", of_matched)):
            shares[name].append(oracle.removed_shares(model.splice.sae, residual, latents)[-1])
    mean_of = {name: sum(values) / len(values) for name, values in shares.items()}
    assert mean_of["baseline"] > 0.05
    assert mean_of["baseline"] <= mean_of["matched"] < mean_of["baseline"] + 0.02


def test_matched_ranking(demo, sequences):
    """None of those that the baseline masks at 50%; 100 latents, or as many as remove as much as its lists."""
    model, _ = demo
    batch = pick(sequences, *range(20))
    baseline, matched = (ranked_lists.rank(model, name, batch, 42) for name in ("baseline", "matched"))
    for active, theirs, lists in zip(batch.active, baseline, matched):
        half = len(active) // 2
        for which in ("topk", "bottomk"):
            assert not {*lists.latents(which)} & {*theirs.topk[:half], *theirs.bottomk[:half]}
            assert getattr(lists, f"target_{which}") == theirs.removed(which)
            removed, target = lists.removed(which), max(theirs.removed(which))
            reached = count_to_reach(removed, target)
            assert len(removed) == len(lists.latents(which)) == max(100, reached)
            assert all(value < target for value in removed[: reached - 1])


def test_negative_activations_rank_by_their_size(demo, sequences):
    """Of an SAE whose activations may be negative BottomK are those of least size, not the most negative ones."""
    model, _ = demo
    few = pick(sequences, 0)
    latents = few.read.latents
    signed = dataclasses.replace(latents, values=torch.where(latents.ids % 2 == 0, -latents.values, latents.values))
    of_signed = dataclasses.replace(few, read=dataclasses.replace(few.read, latents=signed))
    torch.testing.assert_close(rank(model, "baseline", of_signed), rank(model, "baseline", few))
    assert ranked_lists.rank(model, "baseline", of_signed, 42)[0].bottomk == (
        ranked_lists.rank(model, "baseline", few, 42)[0].bottomk
    )


def test_the_mean_over_no_position_is_0(demo, sequences):
    model, _ = demo
    read = pick(sequences, 0, 1).ranked
    scores = rankings.mean(model, read, where=read.rows == 1)
    assert not scores[0].any() and torch.equal(scores[1], rankings.mean(model, read)[1])


def test_stored_lists_hold_100_latents(demo, sequences):
    """So that --k 30 and --k 100 mean what they say; 50% is their beginning."""
    model, _ = demo
    few = pick(sequences, *range(9))
    for scores, lists in zip(rank(model, "baseline", few), ranked_lists.rank(model, "baseline", few, 42)):
        assert len(lists.topk) == len(lists.bottomk) == min(100, (scores != 0).sum())


def test_ties_go_to_the_lower_id():
    scores = torch.tensor([0.0, 2.0, 1.0, 2.0, 0.0, 1.0, 3.0, 2.0])
    assert rankings.top_and_bottom(scores, 3) == ([6, 1, 3], [2, 5, 1])
    assert rankings.top_and_bottom(scores, 0) == ([], [])


def test_special_tokens_bypass_the_sae(demo, sequences):
    """Against the oracle's full forward pass: special positions keep their residual stream and count in no score."""
    model, tokenizer = demo
    other, _ = load("--exclude-special-tokens")
    special, sae = common.find_special_ids(tokenizer), model.splice.sae
    ids = sequences.prompts[0]
    counted = torch.tensor([token not in special for token in ids])
    assert (~counted).sum() == 2 and not counted[0]  # BOS and the turn's marker
    seen = []

    def replace(residual, hook):
        seen.append(residual.clone())
        return torch.where(counted[None, :, None], sae.decode(sae.encode(residual)), residual)

    with torch.no_grad(), model.model.hooks(fwd_hooks=[(model.hook_name, replace)]):
        expected = model.model(torch.tensor([ids]))[0, -1]
    with torch.no_grad(), other.ready():
        found = other.forward(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0]
    with torch.no_grad(), model.ready():
        everywhere = model.forward(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(everywhere, expected, rtol=1e-2, atol=1e-2)
    _, read = conftest.answer(other, [ids], "x", 1)
    scores = rankings.mean(other, read)[0]
    residual = seen[0][0, counted]
    acts = sae.encode(residual)
    torch.testing.assert_close(scores, acts.mean(0), rtol=1e-4, atol=1e-5)
    bypassed = Sequences(["0"], [ids], [[]], [0], [[]], [0], read, special)
    assert torch.equal(bypassed.ordinary, counted)
    (lists,) = ranked_lists.rank(other, "baseline", bypassed, 42)
    expected = oracle.removed_shares(sae, residual, lists.topk[:3])
    assert lists.removed_topk[:3] == pytest.approx(expected, rel=1e-3)


def test_a_sure_model_keeps_its_gradient(demo, sequences):
    """Where P is all but 1, single precision has no 1 - P left; the scores must not vanish with it."""
    model, _ = demo
    head = model.lm.lm_head
    handle = head.original_component.register_forward_hook(lambda module, arguments, output: output * 3)
    try:
        scores = rank(model, "gradsae", pick(sequences, 0))[0]
    finally:
        handle.remove()
    assert math.isfinite(scores.sum()) and (scores > 0).sum() > 50


def test_parser_and_f1_agree(asked, demo):
    _, tokenizer = demo
    for case in asked:
        text = tokenizer.decode(case["generated"], skip_special_tokens=True)
        assert common.parse_answer(text) == oracle.parse(text)
        truths = case["question"].truths
        best = max(oracle.squad_f1(oracle.parse(text), truth) for truth in truths)
        assert score_answer(common.parse_answer(text), text, truths)["f1"] == pytest.approx(best)


def test_tokens_of_the_answer(demo, ranked):
    """Decoded, they are what stands inside the brackets, perhaps with the space before it."""
    _, tokenizer = demo
    for case in ranked:
        inside = prompts.find_answer(tokenizer, case["generated"])
        text = tokenizer.decode([case["generated"][place] for place in inside])
        assert text.strip() == common.parse_answer(tokenizer.decode(case["generated"], skip_special_tokens=True))
    assert prompts.find_answer(tokenizer, tokenizer("Result = Oslo", add_special_tokens=False)["input_ids"]) == []


def test_error_term_kept_and_nothing_masked_is_the_model_itself(demo, asked):
    """Token for token, in both ways of answering."""
    model, _ = load("--error-term", "keep")
    prompts = [case["prompt"] for case in asked[:20]]
    plain = []
    for prompt in prompts:
        ids = model.lm.generate(torch.tensor([prompt]), max_new_tokens=50)
        plain.append(ids[0, len(prompt) :].tolist())
    found, _ = answer_all(model, asked[:20])
    assert [answer.tokens for answer in found] == plain
    empty = {"zero": [[] for _ in prompts]}
    assert [a.tokens for a in answer_masked(model, asked[:20], plain, empty, 20)["zero"]] == plain
    assert options("--error-term", "keep").output_dir != options().output_dir


def test_masks_with_the_error_term_kept(demo, ranked):
    """Against hooks: the residual stream less what the masked latents wrote."""
    kept, _ = load("--error-term", "keep")
    sae, changed = kept.splice.sae, 0
    cases = ranked[:10]
    lists = [case["ranking"]["active"] for case in cases]
    found = answer_masked(kept, cases, [case["generated"] for case in cases], {"active": lists}, 10)["active"]
    for case, latents, answer in zip(cases, lists, found):

        def replace(residual, hook, latents=latents):
            acts = sae.encode(residual)
            return residual - acts[:, :, latents] @ sae.W_dec[latents]

        generated = []
        while len(generated) < 50 and not (generated and generated[-1] in kept.end_ids):
            with torch.no_grad(), kept.model.hooks(fwd_hooks=[(kept.hook_name, replace)]):
                generated.append(int(kept.model(torch.tensor([case["prompt"] + generated]))[0, -1].argmax()))
        assert answer.tokens == generated
        changed += generated != case["generated"]
    assert changed >= 3
