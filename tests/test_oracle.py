"""The project against the naive oracle, in float32 on the bundled model and SAE."""

import oracle
import pytest
import torch

import common
from experiment import generation, latents, questions, rounds

COUNT = 60


@pytest.fixture(scope="module")
def asked(demo, demo_questions):
    """The first questions: prompt ids, and the oracle's answer and ranking of each."""
    model, sae, tokenizer = demo
    found = []
    for question in demo_questions[:COUNT]:
        prompt = oracle.encode_prompt(tokenizer, question.context, question.question)
        generated = oracle.generate(model, sae, tokenizer, prompt)
        ranking = oracle.rank_latents(model, sae, tokenizer, prompt, generated)
        found.append({"question": question, "prompt": prompt, "generated": generated, "ranking": ranking})
    return found


def in_batches(asked, size):
    return [asked[start : start + size] for start in range(0, len(asked), size)]


def assert_same_latents(ours, oracles, scores):
    """The same list, but that latents whose scores differ by rounding alone (1e-5 relative) may have changed places."""
    assert len(ours) == len(oracles)
    for mine, theirs in zip(ours, oracles):
        assert mine == theirs or scores[mine] == pytest.approx(scores[theirs], rel=1e-5)


def test_prompts_are_the_papers(demo, asked):
    _, _, tokenizer = demo
    template = common.choose_template("auto", tokenizer)
    for case in asked:
        text = common.build_prompt(template, case["question"].context, case["question"].question)
        assert common.tokenize(tokenizer, text) == case["prompt"]
        assert case["prompt"].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(("size", "share"), [(1, True), (7, True), (60, True), (7, False), (60, False)])
def test_answers_and_rankings(demo, asked, size, share):
    """In batches that split the questions differently, what the questions of a context share run once or not."""
    model, sae, tokenizer = demo
    exact = ranked = 0
    for batch in in_batches(asked, size):
        prompts = [case["prompt"] for case in batch]
        contexts = [case["question"].context for case in batch] if share else None
        outputs, residuals = generation.answer(model, sae, prompts, 50, contexts=contexts, keep_residuals=True)
        assert outputs == [case["generated"] for case in batch]
        for case, residual in zip(batch, residuals):
            theirs = case["ranking"]
            cut = rounds.last_bracket(tokenizer, case["generated"])
            assert (cut is None) == (theirs is None)
            if theirs is None:
                continue
            ours = latents.rank(sae, residual[: len(case["prompt"]) + cut])
            ranked += 1
            assert ours["active"] == theirs["active"]
            for name in ("topk", "bottomk"):
                assert len(ours[name]) == len(ours["active"]) // 2 > 0
                assert_same_latents(ours[name], theirs[name], theirs["scores"])
            exact += ours["topk"] == theirs["topk"] and ours["bottomk"] == theirs["bottomk"]
    assert ranked >= 50 and exact >= 0.95 * ranked


@pytest.mark.parametrize("which", ["topk", "bottomk"])
def test_masked_answers(demo, asked, which):
    model, sae, tokenizer = demo
    ranked = [case for case in asked if case["ranking"]]
    masks = [case["ranking"][which] for case in ranked]
    expected = [oracle.generate(model, sae, tokenizer, case["prompt"], mask) for case, mask in zip(ranked, masks)]
    if which == "topk":  # masking has to change something for this to be a test
        assert sum(case["generated"] != ids for case, ids in zip(ranked, expected)) >= 3
    for size in (5, 60):
        ours = []
        for start in range(0, len(ranked), size):
            prompts = [case["prompt"] for case in ranked[start : start + size]]
            ours += generation.answer(model, sae, prompts, 50, masks[start : start + size])[0]
        assert ours == expected


def test_small_chunks_change_nothing(demo, asked, monkeypatch):
    """Latents are worked through in chunks of positions: here in chunks that end within a prompt."""
    model, sae, tokenizer = demo
    batch = [case for case in asked if case["ranking"]][:9]
    masks = [case["ranking"]["topk"] for case in batch]
    prompts = [case["prompt"] for case in batch]
    expected, residuals = generation.answer(model, sae, prompts, 50, masks, keep_residuals=True)
    rankings = [latents.rank(sae, residual) for residual in residuals]
    for module in (generation, latents):
        monkeypatch.setattr(module, "POSITIONS_AT_ONCE", 17)
    assert generation.answer(model, sae, prompts, 50, masks)[0] == expected
    for residual, theirs in zip(residuals, rankings):
        ours = latents.rank(sae, residual)
        assert ours["active"] == theirs["active"]
        assert set(ours["topk"]) == set(theirs["topk"])


def test_the_last_few_answers_may_be_left_unfinished(demo, asked):
    """As many as allowed, and only those: the others are as they would be, and the batch ends with the last of them."""
    model, sae, _ = demo
    prompts = [case["prompt"] for case in asked]
    whole, _ = generation.answer(model, sae, prompts, 50)
    ends = model.original_model.generation_config.eos_token_id
    lengths = sorted(map(len, whole))
    for few in (1, 5):
        found, _ = generation.answer(model, sae, prompts, 50, few=few)
        unfinished = [i for i, ids in enumerate(found) if ids[-1] not in ends]
        assert len(unfinished) == sum(length > lengths[-1 - few] for length in lengths) <= few
        assert max(map(len, found)) == lengths[-1 - few]
        assert all(ids == theirs[: len(ids)] for ids, theirs in zip(found, whole))
        assert all(found[i] == whole[i] for i in range(len(whole)) if i not in unfinished)


def test_hook_points_set_aside_change_nothing(demo, asked):
    """While the SAE is spliced in, TransformerLens' other wrappers are off: the same logits, and all back later."""
    model, sae, _ = demo
    ids = torch.tensor([asked[0]["prompt"]])
    before = str(model.original_model)
    with torch.no_grad():
        expected = model.original_model(ids).logits
        with generation.spliced(model, sae, lambda residual, ids: residual) as lm:
            found = lm(ids).logits
    assert torch.equal(found, expected) and str(model.original_model) == before


def test_ties_go_to_the_lower_id():
    scores = torch.tensor([0.0, 2.0, 1.0, 2.0, 0.0, 1.0, 3.0, 2.0])
    assert latents.top_and_bottom(scores, 3) == ([6, 1, 3], [2, 5, 1])
    assert latents.top_and_bottom(scores, 0) == ([], [])


def test_parser_and_f1_agree(asked, demo):
    _, _, tokenizer = demo
    for case in asked:
        text = tokenizer.decode(case["generated"], skip_special_tokens=True)
        assert common.parse_answer(text) == oracle.parse(text)
        truths = case["question"].truths
        best = max(oracle.squad_f1(oracle.parse(text), truth) for truth in truths)
        assert questions.score(common.parse_answer(text), truths)["f1"] == pytest.approx(best)


def test_batches_hold_every_question_once_within_the_budget():
    lengths = [5, 90, 7, 7, 300, 12, 41, 90, 3]
    plan = generation.plan_batches(lengths, 100)
    assert sorted(index for batch in plan for index in batch) == list(range(9))
    for batch in plan:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 100
    assert plan == [[4], [1], [7], [6, 5], [2, 3, 0, 8]]
