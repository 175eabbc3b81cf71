"""Answers that go on together, over batches and masks: the same as alone, in as few steps as the longest one takes."""

import dataclasses
import gc
import json
import os
import random
import sys
import weakref
from collections import defaultdict

import oracle
import pytest
import test_families
import torch
import transformers
from conftest import ROOT, load, options
from test_oracle import log_probs_by_hand
from torch.utils._python_dispatch import TorchDispatchMode

from experiment import UserError
from experiment.hub import prepare_libraries
from experiment.intervention import forward, generate, plan, pool, splice, steps
from experiment.intervention.ablations import Ablation
from experiment.intervention.caches import new_cache
from experiment.intervention.generate import Group, Limits
from experiment.intervention.layout import choose_shared
from experiment.intervention.rows import Answer
from experiment.prompts import build_prompt, tokenize

sys.path.insert(0, str(ROOT / "benchmarks"))

import workloads  # noqa: E402

EVERYTHING = 10**9  # tokens that may wait: all of them
KS = (1, 10, 20, None)  # numbers of latents; None: half of those that are active
windowed = test_families.windowed  # a fixture: a tiny Gemma 2 with a short window, and one with a long one


def make_group(tokenizer, questions, samples, batch_tokens=2048, ks=KS):
    """The kept questions of the shipped activations, TopK masked with several K."""
    asked = {question.id: question for question in questions}
    template = json.loads((ROOT / "activations_baseline.json").read_text())["run"]["prompt_template"]
    of_samples = [asked[sample["id"]] for sample in samples]
    prompts = [tokenize(tokenizer, build_prompt(template, q.context, q.question)) for q in of_samples]
    contexts = [question.context for question in of_samples]
    drafts = [sample["tokens"] for sample in samples]
    lengths = [len(prompt) + len(draft) for prompt, draft in zip(prompts, drafts)]
    batches = plan.plan_batches(lengths, batch_tokens, contexts)
    masks = []
    for k in ks:
        latents = [sample["topk"][: len(sample["active"]) // 2 if k is None else k] for sample in samples]
        masks.append(Ablation(latents))
    return Group(prompts, contexts, batches, drafts, masks)


@pytest.fixture(scope="module")
def samples():
    return json.loads((ROOT / "activations_baseline.json").read_text())["samples"]


@pytest.fixture(scope="module")
def group(demo, demo_questions, samples):
    return make_group(demo[1], demo_questions, samples[::12])


@pytest.fixture(scope="module")
def few(demo, demo_questions, samples):
    """All questions on three contexts, in three batches: rows of one context go on in different masks."""
    contexts = {question.id: question.context for question in demo_questions}
    of_context = defaultdict(list)
    for sample in samples:
        of_context[contexts[sample["id"]]].append(sample)
    chosen = [*of_context.values()][2:7:2]
    made = make_group(demo[1], demo_questions, [sample for of_one in chosen for sample in of_one], 550)
    assert len(made.batches) == len(set(made.contexts)) == 3 and len(made.prompts) == 12
    return made


@pytest.fixture(scope="module")
def expected(demo, few):
    """[mask][question], what the naive loop says."""
    model, tokenizer = demo
    said = []
    for of_mask in few.masks:
        said.append([])
        for prompt, latents in zip(few.prompts, of_mask.latents):
            said[-1].append(oracle.generate(model.model, model.splice.sae, tokenizer, prompt, latents))
    return said


@pytest.fixture
def little_garbage():
    """What was made before is not searched for garbage, which takes most of a second each time memory runs out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def take(group, numbers, size):
    """These questions of a group, in batches of so many."""
    numbers = list(numbers)
    places = list(range(len(numbers)))
    return Group(
        prompts=[group.prompts[number] for number in numbers],
        contexts=[group.contexts[number] for number in numbers],
        batches=[places[first : first + size] for first in range(0, len(places), size)],
        drafts=[group.drafts[number] for number in numbers],
        masks=[of_mask.take(numbers) for of_mask in group.masks],
    )


def one_by_one(group):
    """The group in batches of one question."""
    return take(group, range(len(group.prompts)), 1)


def watch_passes(model, monkeypatch):
    """How many rows each wide pass and each step has, from now on: two lists."""
    wide = []
    steps = []
    run = model._run

    def watched(ids, attention, *arguments, **more):
        is_step = ids.shape[1] == 1 < attention.shape[1]
        (steps if is_step else wide).append(len(ids))
        return run(ids, attention, *arguments, **more)

    monkeypatch.setattr(model, "_run", watched)
    return wide, steps


def tokens_of(found: list[list[Answer]]) -> list[list[list[int]]]:
    return [[answer.tokens for answer in of_mask] for of_mask in found]


def count_left(said, drafts):
    """Of all answers that go on behind their draft the number of steps: [mask][question] tokens, a draft a question."""
    left = []
    for of_mask in said:
        left += map(test_families.count_left, of_mask, drafts)
    return [count for count in left if count]


def assert_same(found: list[Answer], expected: list[Answer]):
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    for one, other in zip(found, expected):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The same answers


class Watch(TorchDispatchMode):
    """Notes what PyTorch is asked for: names of operators, and the shapes of tensors that are indexed by others."""

    def __init__(self):
        super().__init__()
        self.operators = set()
        self.indexed = set()

    def __torch_dispatch__(self, function, types, given=(), named=None):
        self.operators.add(function.overloadpacket.__name__)
        if function is torch.ops.aten.index.Tensor:
            self.indexed.add(tuple(given[0].shape))
        return function(*given, **(named or {}))


@pytest.mark.parametrize("seeds", [None, ["a", "b", "c"]])
def test_what_is_recorded_waits_for_nothing(demo, few, seeds, monkeypatch):
    """No operator whose result's size or value the host has to know; and what the SAE reads and masks is indexed by
    rows, but no output of the layers, for numbers of those lie on the CPU and would have to be copied."""
    model, _ = demo
    watch = Watch()

    def record(step):
        def watched():
            with watch:
                return step()

        return watched

    monkeypatch.setattr(steps, "record", record)
    monkeypatch.setattr(model, "can_record", True)
    latents = few.masks[0].latents[:3]
    group = Group(few.prompts[:3], few.contexts[:3], [[0, 1, 2]], [[], [], []], [Ablation(latents, seeds=seeds)])
    generate.answer_masked(model, group, Limits(6, EVERYTHING))
    d_sae = model.splice.d_sae
    d_model = model.lm.config.hidden_size
    assert (3, d_sae) in watch.indexed and (3, 1, d_model) not in watch.indexed
    assert {"mm", "tanh"} <= watch.operators
    assert not {"nonzero", "bincount", "_local_scalar_dense", "equal", "masked_select"} & watch.operators


@pytest.mark.parametrize("room", [600, 1000])
def test_what_waits_is_decoded_before_more_is_copied(demo, few, room, monkeypatch):
    """So that both are not in memory at once; and no more waits than may, each row as wide as the widest.

    room: in places, for the rows of some batches and masks, or for hardly more than one batch has: there it takes more
    than one decoding until the next one's fit.
    """
    model, _ = demo
    pools = []
    decoded = []  # how many pieces waited each time
    take_rows = pool.take_rows
    decode_half = pool.Pool._decode_half

    def take(*arguments):
        piece = take_rows(*arguments)
        for one in pools:
            assert count_places([*one.waiting, piece]) <= room
        return piece

    def decode(self):
        pools[:] = [self]
        assert count_places(self.waiting) <= room
        decoded.append(len(self.waiting))
        decode_half(self)

    monkeypatch.setattr(pool, "take_rows", take)
    monkeypatch.setattr(pool.Pool, "_decode_half", decode)
    generate.answer_masked(model, few, Limits(50, room))
    assert len(decoded) > 2 and max(decoded) > 1


def count_places(pieces):
    rows = sum(len(piece.rows) for piece in pieces)
    return rows * max((piece.attention.shape[1] for piece in pieces), default=0)


def test_what_is_left_goes_on_with_what_comes(demo, few, expected, monkeypatch):
    """Rows of which half have ended wait again: their next step is one of rows that have come since."""
    model, _ = demo
    together = []  # for each decoding its rows, and how many tokens each has said already
    begin = pool.begin_steps

    def watch(model, pieces, *arguments):
        together.append([(id(row), len(row.tokens)) for piece in pieces for row in piece.rows])
        return begin(model, pieces, *arguments)

    monkeypatch.setattr(pool, "begin_steps", watch)
    found = generate.answer_masked(model, one_by_one(few), Limits(50, 1000))
    assert tokens_of(found) == expected
    said = {}  # {row: how many tokens it had said when it was last decoded}
    mixed = 0
    for rows in together:
        new = [row for row, _ in rows if row not in said]
        if 0 < len(new) < len(rows):
            mixed += 1
        for row, length in rows:
            assert length > said.get(row, 0)
            said[row] = length
    assert mixed >= 3


def test_a_cache_is_taken_layer_by_layer(demo, monkeypatch):
    """What is not taken of a layer is free before the next one is copied."""
    before = []  # weak references to what was copied from, of the layers before
    pick = pool.pick_positions

    def watch(states, *arguments):
        gone = [reference() is None for reference in before[:-1]]  # the last one: keys of the same layer, or values
        assert all(gone)
        before.append(weakref.ref(states))
        return pick(states, *arguments)

    monkeypatch.setattr(pool, "pick_positions", watch)
    cache = new_cache(demo[0].lm)
    layers = len(cache.layers)
    for number in range(layers):
        cache.update(torch.rand(3, 2, 5, 4), torch.rand(3, 2, 5, 4), number)
    keys = cache.layers[-1].keys[1:].clone()
    attention = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    piece = pool.take_rows(["a", "b", "c"], [1, 2], cache, attention, None)
    assert len(before) == 2 * layers and not cache.layers
    assert piece.rows == ["b", "c"] and piece.attention.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    torch.testing.assert_close(piece.keys[-1][:, :, 1:], keys[:, :, 2:])


@pytest.mark.parametrize("drafted", [True, False])
@pytest.mark.parametrize("together", [1, 2, None])
def test_pools_of_so_many_rows(demo, few, expected, together, drafted, monkeypatch):
    """One, two and all: the naive loop's answers, the rows of a context side by side in different masks. Without drafts
    the log probabilities are of what was said in the pool."""
    model, _ = demo
    group = one_by_one(few)
    if not drafted:
        group = dataclasses.replace(group, drafts=[[] for _ in few.drafts])
    left = count_left(expected, group.drafts)
    assert len(left) >= 20 and len({*left}) >= 5
    longest = max(map(len, few.prompts)) + 12
    assert 3 * min(map(len, few.prompts)) > 2 * longest  # three rows never fit where two do
    _, steps = watch_passes(model, monkeypatch)
    found = generate.answer_masked(model, group, Limits(50, together * longest if together else EVERYTHING))
    assert tokens_of(found) == expected
    assert max(steps) == (together or len(left))
    assert len(steps) == {1: sum(left), None: max(left)}.get(together, len(steps))
    for of_mask, latents in zip(found, few.masks):
        for number in range(0, len(few.prompts), 4):
            scored = few.drafts[number] if drafted else of_mask[number].tokens
            by_hand = log_probs_by_hand(model, few.prompts[number], scored, latents.latents[number])
            assert of_mask[number].log_probs == pytest.approx(by_hand, abs=2e-4)


def test_masked_answers_whatever_waits(demo, group, replayed):
    """Alone, in pools of a few rows and all together: the naive loop's answers, and the same log probabilities."""
    model, tokenizer = demo
    alone = generate.answer_masked(model, group, Limits(50, 1))
    changed = 0
    for number in range(0, len(group.prompts), 9):
        for of_mask, latents in zip(alone, group.masks):
            masked = latents.latents[number]
            expected = oracle.generate(model.model, model.splice.sae, tokenizer, group.prompts[number], masked)
            assert of_mask[number].tokens == expected
            changed += expected != group.drafts[number]
    assert changed >= 4
    for pool_tokens in (400, 3000, EVERYTHING):
        for found, expected in zip(generate.answer_masked(model, group, Limits(50, pool_tokens)), alone):
            assert_same(found, expected)


def test_unmasked_answers_and_what_was_read(demo, group, replayed):
    """Round 1's rows go on together too, and what the SAE read is put together from the steps they shared."""
    model, tokenizer = demo
    opening = tokenizer("Result = [[", add_special_tokens=False)["input_ids"]
    for first_tokens in (opening, []):
        expected, _ = generate.answer(model, group, Limits(50, 1), first_tokens)
        assert [answer.tokens for answer in expected] == group.drafts
        found, read = generate.answer(model, group, Limits(50, EVERYTHING), first_tokens)
        assert_same(found, expected)
        for number in range(0, len(group.prompts), 9):
            sequence = group.prompts[number] + found[number].tokens[:-1]
            latents = read.select([number], [len(sequence)]).latents
            theirs = oracle.activations(model.model, model.splice.sae, sequence)
            assert len(latents.counts) == len(sequence)
            where, ids = theirs.nonzero(as_tuple=True)
            assert torch.equal(latents.ids, ids) and torch.equal(latents.entry_positions(), where)
            torch.testing.assert_close(latents.values, theirs[where, ids], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("error_term", ["drop", "keep"])
def test_pools_of_other_masks(demo, few, error_term, ablation, replayed, monkeypatch):
    """Latents at zero or at their means, without the error term and with it, decoded from entries and whole: as the
    naive loop."""
    model = forward.SplicedModel(demo[0].model, splice.Splice(demo[0].splice.sae, error_term))
    means = 0.06 * torch.rand(512, generator=torch.Generator().manual_seed(2)) if ablation == "mean" else None
    rng = random.Random(3)
    masks = [Ablation([sorted(rng.sample(range(512), 200)) for _ in few.prompts]) for _ in range(2)]
    group = take(dataclasses.replace(few, masks=masks), range(7), 3)
    how = {"means": means, "error": error_term == "keep"}
    expected = []
    for of_mask in group.masks:
        expected.append([])
        for prompt, latents in zip(group.prompts, of_mask.latents):
            said = oracle.generate(model.model, model.splice.sae, demo[1], prompt, latents, 12, **how)
            expected[-1].append(said)
    left = count_left(expected, group.drafts)
    assert len(left) >= 7 and len({*left}) >= 4
    assert (model.splice.mask(Ablation([[1]]), means).written is not None) == (ablation == "mean")
    for dense in (1, 0):  # from which share of active latents on activations are decoded whole
        monkeypatch.setattr(splice, "DENSE", dense)
        for batched, pool_tokens in ((one_by_one(group), 1), (group, EVERYTHING)):
            found = generate.answer_masked(model, batched, Limits(12, pool_tokens), means)
            assert tokens_of(found) == expected


@pytest.mark.parametrize(
    "hook_name",
    [
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_mlp_out",
        "blocks.1.attn.hook_z",
        "blocks.2.hook_resid_post",
    ],
)
def test_pools_behind_windows_and_at_other_places(hook_name, windowed, replayed, monkeypatch):
    """A window shorter than the prompts, and one that is longer; an SAE before all layers, between two, inside one and
    behind the last: the naive loop's answers."""
    monkeypatch.setattr(generate, "PASS_ON_CPU", 0)
    model = test_families.splice_into(windowed, hook_name)
    masks = test_families.draw_masks(model.splice.d_sae)
    sae = model.splice.sae
    longest = 12

    def say(prompt, latents):
        return oracle.generate(windowed.bridge, sae, windowed.tokenizer, prompt, latents, longest)

    unmasked = [say(prompt, []) for prompt in windowed.prompts]
    expected = [[say(*row) for row in zip(windowed.prompts, latents)] for latents in masks]
    wrong = [[*tokens[:3], *(7, 8, 9, 7, 8, 9)] for tokens in unmasked]  # rejected, and pushes keys out of the window
    for drafts in (unmasked, wrong):
        left = count_left(expected, drafts)
        assert len(left) >= 3 and max(left) >= 6
        group = Group(
            windowed.prompts, windowed.contexts, [[0, 1], [2, 3]], drafts, [Ablation(latents) for latents in masks]
        )
        for batched, pool_tokens, together in ((one_by_one(group), 1, 1), (group, EVERYTHING, len(left))):
            with monkeypatch.context() as patch:
                _, steps = watch_passes(model, patch)
                found = generate.answer_masked(model, batched, Limits(longest, pool_tokens))
            assert tokens_of(found) == expected
            assert max(steps) == together
    group = Group(windowed.prompts, windowed.contexts, [[0, 1], [2, 3]])
    for pool_tokens in (1, EVERYTHING):
        found, _ = generate.answer(model, group, Limits(longest, pool_tokens), unmasked[0][:2])
        assert [answer.tokens for answer in found] == unmasked


def test_pools_in_half_precision(demo, few):
    """As the naive loop in half precision, but for the last digits; and the same digits each time."""
    half, tokenizer = load("--dtype", "float16")
    group = dataclasses.replace(few, masks=few.masks[1:3])
    numbers = range(0, len(few.prompts), 3)
    expected = []
    for of_mask in ([[]] * len(few.prompts), *(mask.latents for mask in group.masks)):
        said = []
        for number in numbers:
            prompt = few.prompts[number]
            said.append(oracle.generate(half.model, half.splice.sae, tokenizer, prompt, of_mask[number]))
        expected.append(said)
    assert len(count_left(expected[1:], few.drafts[::3])) >= 4
    for batched, pool_tokens in ((one_by_one(group), 1), (group, EVERYTHING)):
        limits = Limits(50, pool_tokens)
        unmasked, _ = generate.answer(half, batched, limits)
        masked = generate.answer_masked(half, batched, limits)
        same = []
        for found, said in zip([unmasked, *masked], expected):
            same += [found[number].tokens == tokens for number, tokens in zip(numbers, said)]
        assert len(same) == 12 and sum(same) >= 11
        for number in numbers:
            prompt = few.prompts[number]
            by_hand = log_probs_by_hand(half, prompt, unmasked[number].tokens, [])
            assert unmasked[number].log_probs == pytest.approx(by_hand, abs=0.02)
            by_hand = log_probs_by_hand(half, prompt, few.drafts[number], group.masks[1].latents[number])
            assert masked[1][number].log_probs == pytest.approx(by_hand, abs=0.02)
    assert generate.answer(half, batched, limits)[0] == unmasked
    assert generate.answer_masked(half, batched, limits) == masked


# ---------------------------------------------------------------------------------------------------------------------
# Where answers end


def test_answers_cut_at_the_longest(demo, group):
    """In rounds of such lengths, whose drafts are of that length too."""
    model, _ = demo
    whole = generate.answer_masked(model, group, Limits(50, EVERYTHING))
    for longest in (1, 2, 6, 9):
        cut = dataclasses.replace(group, drafts=[draft[:longest] for draft in group.drafts])
        for found, expected in zip(generate.answer_masked(model, cut, Limits(longest, EVERYTHING)), whole):
            assert_same(found, [Answer(one.tokens[:longest], one.log_probs[:longest]) for one in expected])


def test_an_end_at_any_step(demo, few, expected, monkeypatch):
    """An answer that ends with the first token that differs from its draft, at the first step, at the last and at each
    one between, whatever the others do."""
    model, _ = demo
    rows = [(mask, number) for mask in range(len(expected)) for number in range(len(few.prompts))]
    mask, number = max(rows, key=lambda row: test_families.count_left(expected[row[0]][row[1]], few.drafts[row[1]]))
    said = expected[mask][number]
    steps_of_all = test_families.count_left(said, few.drafts[number])
    first = len(said) - steps_of_all - 1

    def cut(tokens):
        for place, token in enumerate(tokens):
            if token in model.end_ids:
                return tokens[: place + 1]
        return tokens

    ended = set()
    for place in range(first, len(said)):
        with monkeypatch.context() as patch:
            patch.setattr(model, "end_ids", {*model.end_ids, said[place]})
            found = tokens_of(generate.answer_masked(model, few, Limits(50, EVERYTHING)))
            assert found == [[cut(tokens) for tokens in of_mask] for of_mask in expected]
        ended.add(len(found[mask][number]) - 1 - first)
    assert steps_of_all >= 6 and {0, 1, steps_of_all} < ended and len(ended) >= 5


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def test_steps_are_shared(demo, demo_questions, samples, monkeypatch):
    """The whole demo: all that leaves its draft is decoded in as many steps as its longest answers take."""
    for ks, most in (((None,), 16), (KS, 40)):
        of_all = make_group(demo[1], demo_questions, samples, 16384, ks)
        with monkeypatch.context() as patch:
            wide, steps = watch_passes(demo[0], patch)
            generate.answer_masked(demo[0], of_all, Limits(50, EVERYTHING))
        assert len(wide) >= len(of_all.batches) * (len(ks) + 1)
        assert 5 <= len(steps) <= most


def test_steps_of_many_layers(monkeypatch, capsys):
    """As many as gemma-2-9b-it has, of little width: every masked answer differs, and all go on together."""
    chosen = options()
    prepare_libraries(chosen)
    work = workloads.load_shape(workloads.SHAPES["narrow"], chosen, 80)
    # Steps do not depend on how long prompts are, and time does.
    short = [[*prompt[:30], *prompt[-30:]] for prompt in work.prompts]
    work = dataclasses.replace(work, prompts=short, pool_tokens=EVERYTHING)
    batches = plan.plan_batches([len(prompt) + work.new_tokens for prompt in work.prompts], 2048, work.contexts)
    found = workloads.round_1(work, batches)
    for ks, most in ((("50%",), 14), (("1", "10", "20", "50%"), 20)):
        with monkeypatch.context() as patch:
            wide, steps = watch_passes(work.model, patch)
            masked = workloads.masked_round(work, batches, found, "topk", ks)
        changed = 0
        for of_mask in masked:
            assert [len(answer.tokens) for answer in of_mask] == [work.new_tokens] * len(work.prompts)
            changed += sum(answer.tokens != one.tokens for answer, one in zip(of_mask, found))
        assert changed >= 0.9 * len(ks) * len(work.prompts)
        assert len(wide) == len(batches) * (len(ks) + 2) and len(batches) > 1
        assert 5 <= len(steps) <= most


# ---------------------------------------------------------------------------------------------------------------------
# What prompts begin with


def with_example(tokenizer, questions, group):
    """The group behind a solved example, which all its prompts begin with."""
    example = questions[0]
    template = json.loads((ROOT / "activations_baseline.json").read_text())["run"]["prompt_template"]
    solved = build_prompt(template, example.context, example.question) + "Result = [[ no ]]<end_of_turn>\n"
    ids = tokenize(tokenizer, solved)
    return dataclasses.replace(group, prompts=[[*ids, *prompt[1:]] for prompt in group.prompts])  # BOS once


def watch_shapes(model, monkeypatch):
    """The shape of each wide pass from now on."""
    shapes = []
    run = model._run

    def watched(ids, attention, *arguments, **more):
        if not ids.shape[1] == 1 < attention.shape[1]:
            shapes.append(tuple(ids.shape))
        return run(ids, attention, *arguments, **more)

    monkeypatch.setattr(model, "_run", watched)
    return shapes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_all_prompts_begin_with_is_run_once(demo, demo_questions, few, dtype, monkeypatch):
    """A few-shot template, then the contexts, then the rests: three passes over less than half of the positions, in
    round 1 as below the SAE of a masked round. Answers are the naive loop's."""
    model, tokenizer = demo if dtype == "float32" else load("--dtype", dtype)
    whole = list(range(len(few.prompts)))
    rng = random.Random(5)
    drawn = [sorted(rng.sample(range(512), 200)) for _ in whole]
    masks = [Ablation(drawn)]
    group = dataclasses.replace(with_example(tokenizer, demo_questions, few), batches=[whole], masks=masks)
    expected = [[], []]
    for number in whole[::3]:
        for said, latents in zip(expected, ([], drawn[number])):
            prompt = group.prompts[number]
            said.append(oracle.generate(model.model, model.splice.sae, tokenizer, prompt, latents, 12))
    of_all = len(os.path.commonprefix(group.prompts))
    assert of_all > 60

    with monkeypatch.context() as patch:
        shapes = watch_shapes(model, patch)
        found, _ = generate.answer(model, group, Limits(12, EVERYTHING))
    drafts = [answer.tokens for answer in found]
    (first, second, third) = shapes
    assert first == (1, of_all) and (second[0], third[0]) == (3, 12)
    run = sum(rows * positions for rows, positions in shapes)
    assert run < 0.45 * 12 * max(map(len, group.prompts))

    group = dataclasses.replace(group, drafts=drafts)
    with monkeypatch.context() as patch:
        shapes = watch_shapes(model, patch)
        (masked,) = generate.answer_masked(model, group, Limits(12, EVERYTHING))
    assert shapes[0] == first and len(shapes) == 4  # the last one above the SAE, whole
    for found_here, said in zip((found, masked), expected):
        same = [found_here[number].tokens == tokens for number, tokens in zip(whole[::3], said)]
        assert sum(same) >= (4 if dtype == "float32" else 3)
        assert len(same) == 4
    assert expected[0] != expected[1]


def test_what_is_not_worth_a_pass(demo, few, monkeypatch):
    """BOS alone, and a few tokens of a few rows, are run again: no level is made for them."""
    model, _ = demo
    of_contexts = {context: number for number, context in enumerate(few.contexts)}
    one_each = take(few, of_contexts.values(), 3)
    for prompts in (one_each.prompts, [[prompt[0], *prompt[20:]] for prompt in one_each.prompts]):
        assert 0 < len(os.path.commonprefix(prompts)) < 60
        group = dataclasses.replace(one_each, prompts=prompts)
        with monkeypatch.context() as patch:
            shapes = watch_shapes(model, patch)
            generate.answer(model, group, Limits(12, EVERYTHING))
        assert shapes == [(3, max(map(len, prompts)))]


def test_levels_by_what_they_save():
    """The levels of the least cost: positions, padding included, and so many more for each pass."""
    head = list(range(10))
    prompts = []
    for context in (1, 2):
        prompts += [[*head, *[100 + context] * 5, 200 + number, 7] for number in range(3)]
    contexts = [1, 1, 1, 2, 2, 2]
    limits = [len(prompt) - 1 for prompt in prompts]

    def count(pass_cost, window=1000):
        levels = choose_shared(prompts, limits, contexts, window, pass_cost)
        return [[len(tokens) for tokens in level.tokens] for level in levels]

    # 102 positions at once, 52 with a head, 42 with contexts, 32 with both.
    assert count(9) == [[10], [5, 5]]
    assert count(11) == count(59) == [[15, 15]]
    assert count(61) == []
    assert count(9, window=16) == []


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory


@pytest.mark.parametrize("masked", [True, False])
def test_out_of_memory_at_any_pass(demo, few, expected, masked, little_garbage, monkeypatch, capsys):
    """30 times: whichever pass finds no memory, of a batch or of the pool, once or as long as there are many rows."""
    model, _ = demo
    monkeypatch.setattr(generate, "PASS_ON_CPU", 0)  # passes over prefixes, too
    group = take(dataclasses.replace(few, masks=few.masks[1:3]), range(7), 3)

    def answer():
        limits = Limits(50, 500)
        if masked:
            return [one for of_mask in generate.answer_masked(model, group, limits) for one in of_mask]
        return generate.answer(model, group, limits)[0]

    with monkeypatch.context() as patch:
        wide, steps = watch_passes(model, patch)
        whole = answer()
    tokens = [tokens for of_mask in expected[1:3] for tokens in of_mask[:7]] if masked else group.drafts
    assert [one.tokens for one in whole] == tokens
    passes = len(wide) + len(steps)
    assert len(wide) >= 5 and len(steps) >= 10
    once = min(passes, 24)
    run = model._run
    rng = random.Random(4)
    for most, points in ((None, once), (1, 30 - once)):  # once; or from then on wherever there are more rows than one
        for number in rng.sample(range(passes), points):
            count = 0

            def run_out(ids, *arguments, number=number, most=most, **more):
                nonlocal count
                count += 1
                if count - 1 == number or (most and count > number and len(ids) > most):
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return run(ids, *arguments, **more)

            with monkeypatch.context() as patch:
                patch.setattr(model, "_run", run_out)
                assert_same(answer(), whole)
            assert count > number
    capsys.readouterr()


def test_one_question_that_does_not_fit(demo, group, little_garbage, monkeypatch, capsys):
    def run_out(ids, *arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(demo[0], "_run", run_out)
    with pytest.raises(torch.OutOfMemoryError):  # what it is a part of may still be split; a round makes it a line
        generate.answer_masked(demo[0], group, Limits(50, EVERYTHING))


def test_one_answer_that_cannot_go_on(demo, group, little_garbage, monkeypatch, capsys):
    """The pool's rows are in no batch any more that could be split: one line, and no answer that is cut short."""
    run = demo[0]._run

    def run_out(ids, attention, *arguments, **more):
        if ids.shape[1] == 1 < attention.shape[1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(ids, attention, *arguments, **more)

    monkeypatch.setattr(demo[0], "_run", run_out)
    with pytest.raises(UserError, match="out of memory, with no batch left to split"):
        generate.answer_masked(demo[0], group, Limits(50, 1))


def test_ended_answers_are_told(demo, group, little_garbage, monkeypatch, capsys):
    """What the bar counts: each answer once, as soon as it has ended, also where memory runs out behind a wide pass."""
    told = []
    generate.answer_masked(demo[0], group, Limits(50, 3000), on_ended=told.append)
    assert sum(told) == len(group.prompts) * len(group.masks) and len(told) > len(group.batches) * len(group.masks)

    join = generate.join
    failed = []

    def run_out(parts):
        if not failed:
            failed.append(parts)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return join(parts)

    monkeypatch.setattr(generate, "join", run_out)
    told.clear()
    found, _ = generate.answer(demo[0], group, Limits(50, 3000), on_ended=told.append)
    assert failed and sum(told) == len(group.prompts) and [answer.tokens for answer in found] == group.drafts


def test_groups_of_batches():
    lengths = [5, 9, 5, 9, 3]
    batches = plan.plan_batches(lengths, 20, "ababc")
    assert batches == [[1, 3], [0, 2, 4]]
    assert plan.plan_groups(batches, lengths, 33) == [batches]
    assert plan.plan_groups(batches, lengths, 32) == [[batches[0]], [batches[1]]]


def test_tokens_that_fit():
    gemma = dict(num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8, head_dim=256)
    config = transformers.Gemma2Config(**gemma, hidden_size=3584, intermediate_size=14336)
    assert plan.cache_bytes_per_token(config, torch.float16) == 344_064
    shared = [plan.share_memory(size * 1e9, config, torch.float16, None, None) for size in (0.1, 15, 20, 52, 110)]
    assert shared == [(1024, 1024), (8192, 16384), (16384, 16384), (32768, 65536), (65536, 131072)]
    assert plan.share_memory(52e9, config, torch.float16, 16384, None) == (16384, 81920)
    assert plan.share_memory(52e9, config, torch.float16, None, 7) == (32768, 7)


def test_gradients_that_fit():
    """Of gemma-2-9b-it on an 80 GB card, whose batches and pool take 49 GB: six of SQuAD's longest prompts at once."""
    gemma = dict(num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8, head_dim=256)
    config = transformers.Gemma2Config(**gemma, hidden_size=3584, intermediate_size=14336)
    room = plan.room_of(plan.Sizes(32768, 65536, 262144), config, torch.float16)
    assert room == 32768 * (344_064 + plan.layer_bytes_per_token(config, torch.float16)) + 1.25 * 65536 * 344_064
    assert 48e9 < room < 50e9
    rows = []
    for width in (100, 210, 815, 100_000):
        token_bytes = plan.graph_bytes_per_token(config, torch.float16, 32, width)
        rows.append(plan.gradient_rows(room, 109, width, token_bytes))
        assert rows[-1] == 1 or rows[-1] * width * token_bytes <= room < (rows[-1] + 1) * width * token_bytes
    assert rows == [81, 36, 6, 1]
    assert [plan.gradient_rows(None, count, 815, 1) for count in (1, 16, 17, 109)] == [1, 1, 2, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["Gemma2", "Llama", "Qwen2"])
def test_what_a_graph_keeps(family, dtype):
    """What PyTorch saves for the way back, weights left out: no more than is reckoned with, and not much less."""
    sizes = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
    config = getattr(transformers, f"{family}Config")(**sizes, head_dim=16, num_hidden_layers=3, use_cache=False)
    config._attn_implementation = "eager"
    lm = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval().requires_grad_(False)
    weights = {weight.data_ptr() for weight in lm.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows, width = 2, 100
    start = torch.randn(rows, width, 64, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm.model(inputs_embeds=start)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / (rows * width)
    expected = plan.graph_bytes_per_token(config, dtype, 3, width)
    assert 0.6 * expected < found < 1.1 * expected
