"""Answers that go on together, over batches and masks: the same as alone, in as few steps as the longest one takes."""

import json
import random

import oracle
import pytest
import torch
import transformers
from conftest import ROOT

from experiment import UserError
from experiment.intervention import generate, plan
from experiment.intervention.generate import Group, Limits
from experiment.intervention.rows import Answer
from experiment.prompts import build_prompt, tokenize

EVERYTHING = 10**9  # tokens that may wait: all of them
KS = (1, 10, 20, None)  # numbers of latents; None: half of those that are active


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
        masks.append([sample["topk"][: len(sample["active"]) // 2 if k is None else k] for sample in samples])
    return Group(prompts, contexts, batches, drafts, masks)


@pytest.fixture(scope="module")
def samples():
    return json.loads((ROOT / "activations_baseline.json").read_text())["samples"]


@pytest.fixture(scope="module")
def group(demo, demo_questions, samples):
    return make_group(demo[1], demo_questions, samples[::12])


@pytest.fixture(scope="module")
def few(demo, demo_questions, samples):
    return make_group(demo[1], demo_questions, samples[::60], 600, KS[1:3])


def count_passes(model, monkeypatch):
    """Counts wide passes and steps from now on: [wide, steps]."""
    counts = [0, 0]
    run = model._run

    def counted(ids, *arguments, **more):
        counts[ids.shape[1] == 1] += 1
        return run(ids, *arguments, **more)

    monkeypatch.setattr(model, "_run", counted)
    return counts


def assert_same(found: list[Answer], expected: list[Answer]):
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    for one, other in zip(found, expected):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_masked_answers_whatever_waits(demo, group):
    """Alone, in pools of a few rows and all together: the naive loop's answers, and the same log probabilities."""
    model, tokenizer = demo
    alone = generate.answer_masked(model, group, Limits(50, 1))
    changed = 0
    for number in range(0, len(group.prompts), 9):
        for of_mask, latents in zip(alone, group.masks):
            expected = oracle.generate(model.model, model.splice.sae, tokenizer, group.prompts[number], latents[number])
            assert of_mask[number].tokens == expected
            changed += expected != group.drafts[number]
    assert changed >= 4
    for pool_tokens in (400, 3000, EVERYTHING):
        for found, expected in zip(generate.answer_masked(model, group, Limits(50, pool_tokens)), alone):
            assert_same(found, expected)


def test_unmasked_answers_and_what_was_read(demo, group):
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


def test_steps_are_shared(demo, demo_questions, samples, monkeypatch):
    """The whole demo: all that leaves its draft is decoded in as many steps as its longest answers take."""
    for ks, most in (((None,), 16), (KS, 40)):
        of_all = make_group(demo[1], demo_questions, samples, 16384, ks)
        with monkeypatch.context() as patch:
            counts = count_passes(demo[0], patch)
            generate.answer_masked(demo[0], of_all, Limits(50, EVERYTHING))
        assert counts[0] >= len(of_all.batches) * (len(ks) + 1)
        assert 5 <= counts[1] <= most


def test_an_end_at_any_step(demo, group):
    """Answers that end at their first, a middle and the last step, cut by the longest answer."""
    model, _ = demo
    whole = generate.answer_masked(model, group, Limits(50, EVERYTHING))
    for longest in (1, 2, 6, 9):
        cut = generate.answer_masked(model, group, Limits(longest, EVERYTHING))
        for found, expected in zip(cut, whole):
            for answer, uncut, draft in zip(found, expected, group.drafts):
                # A draft was generated with another limit: where the model says the same, it is the answer.
                assert answer.tokens == (uncut.tokens if uncut.tokens == draft else uncut.tokens[:longest]) or (
                    answer.tokens == uncut.tokens[: len(answer.tokens)]
                )


@pytest.mark.parametrize("masked", [True, False])
def test_out_of_memory_at_any_pass(demo, few, masked, monkeypatch, capsys):
    """Whichever pass finds no memory, of a batch or of the pool, once or as long as there are many rows."""
    model, _ = demo

    def answer():
        limits = Limits(50, 700)
        if masked:
            return [one for of_mask in generate.answer_masked(model, few, limits) for one in of_mask]
        return generate.answer(model, few, limits)[0]

    with monkeypatch.context() as patch:
        counts = count_passes(model, patch)
        expected = answer()
        passes = sum(counts)
    run = model._run
    rng = random.Random(4)
    for most in (None, 1):  # once; or from then on wherever there are more rows than one
        for number in rng.sample(range(passes), min(passes, 15)):
            count = 0

            def run_out(ids, *arguments, number=number, most=most, **more):
                nonlocal count
                count += 1
                if count - 1 == number or (most and count > number and len(ids) > most):
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return run(ids, *arguments, **more)

            with monkeypatch.context() as patch:
                patch.setattr(model, "_run", run_out)
                assert_same(answer(), expected)
            assert count > number
    capsys.readouterr()


def test_one_question_that_does_not_fit(demo, group, monkeypatch, capsys):
    def run_out(ids, *arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(demo[0], "_run", run_out)
    with pytest.raises(torch.OutOfMemoryError):  # what it is a part of may still be split; a round makes it a line
        generate.answer_masked(demo[0], group, Limits(50, EVERYTHING))


def test_one_answer_that_cannot_go_on(demo, group, monkeypatch, capsys):
    """The pool's rows are in no batch any more that could be split: one line, and no answer that is cut short."""
    run = demo[0]._run

    def run_out(ids, attention, *arguments, **more):
        if ids.shape[1] == 1 < attention.shape[1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(ids, attention, *arguments, **more)

    monkeypatch.setattr(demo[0], "_run", run_out)
    with pytest.raises(UserError, match="out of memory, with no batch left to split"):
        generate.answer_masked(demo[0], group, Limits(50, 1))


def test_ended_answers_are_told(demo, group):
    """What the bar counts: each answer once, as soon as it has ended."""
    told = []
    generate.answer_masked(demo[0], group, Limits(50, 3000), on_ended=told.append)
    assert sum(told) == len(group.prompts) * len(group.masks) and len(told) > len(group.batches) * len(group.masks)


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
    assert shared == [(1024, 1024), (8192, 24576), (16384, 16384), (32768, 65536), (65536, 196608)]
    assert plan.share_memory(52e9, config, torch.float16, 16384, None) == (16384, 131072 - 16384)
    assert plan.share_memory(52e9, config, torch.float16, None, 7) == (32768, 7)
