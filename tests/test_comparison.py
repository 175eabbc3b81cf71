"""Rankings, intervals, statistics, table and figure: against the naive oracle, third parties and hand-made cases."""

import json
import math

import numpy as np
import oracle
import pytest
import scipy.stats
import torch
from conftest import ROOT, options, run_script
from statsmodels.stats.contingency_tables import mcnemar
from test_rounds import read_journal

import common
from experiment import generation, latents, report, rounds

ARGUMENTS = ["--demo", "--limit", "60"]


# ---------------------------------------------------------------------------------------------------------------------
# Rankings


@pytest.fixture(scope="module")
def sequences(demo, demo_questions):
    """Token ids up to the last [, and the id of that token, of some questions."""
    model, sae, tokenizer = demo
    prompts = [oracle.encode_prompt(tokenizer, q.context, q.question) for q in demo_questions[:24]]
    generated, _ = generation.answer(model, sae, prompts, 50)
    cut = [rounds.last_bracket(tokenizer, ids) for ids in generated]
    assert None not in cut
    return [(prompt + ids[:at], ids[at]) for prompt, ids, at in zip(prompts, generated, cut)]


@pytest.mark.parametrize("size", [1, 24])
def test_gradient_scores(demo, sequences, size, monkeypatch):
    """Padded batches, the gradient from the reconstruction on by hand and in chunks, against plain autograd."""
    model, sae, _ = demo
    monkeypatch.setattr(latents, "POSITIONS_AT_ONCE", 17)
    for start in range(0, len(sequences), size):
        batch = sequences[start : start + size]
        ours = latents.gradient_scores(model, sae, [ids for ids, _ in batch], [token for _, token in batch])
        for row, (ids, token) in zip(ours, batch):
            theirs, _ = oracle.gradient_scores(model, sae, ids, token)
            assert (theirs > 0).sum() > 50
            # Of a score that is a sum with terms of both sizes, the smallest ones carry the largest ones' rounding.
            torch.testing.assert_close(row, theirs, rtol=1e-5, atol=1e-5 * float(theirs.max()))


def test_gradient_scores_against_finite_differences(demo, sequences):
    """The probability when a latent's activation moves a little at one position, in double precision."""
    _, _, tokenizer = demo
    # Where the model is least sure: Transformers computes norms and softmax in single precision all the same.
    ids, token = min(sequences[:8], key=lambda case: oracle.gradient_scores(*demo[:2], *case)[1])
    model64, sae64 = common.load(options(), tokenizer)
    model64.original_model.double()
    sae64.double()
    sae64.dtype = torch.float64
    scores = latents.gradient_scores(model64, sae64, [ids], [token])[0]

    def probabilities(latent, step):
        """P when the latent is scaled by 1 + step at one position: a row for each position."""

        def replace(residual, token_ids):
            acts = sae64.encode(residual)  # [row, pos, d_sae], row by row the same
            rows = torch.arange(len(ids))
            acts[rows, rows, latent] *= 1 + step
            return sae64.decode(acts)

        with torch.no_grad(), generation.spliced(model64, sae64, replace) as lm:
            return lm(torch.tensor([ids] * len(ids)), logits_to_keep=1).logits[:, -1].softmax(-1)[:, token]

    for latent in scores.topk(3).indices.tolist():
        slopes = (probabilities(latent, 0.01) - probabilities(latent, -0.01)) / 0.02  # dP/dH * H at each position
        assert scores[latent].item() == pytest.approx(slopes.relu().mean().item(), rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradient_scores_in_half_precision(demo, sequences, dtype):
    model, sae, tokenizer = demo
    chosen = options("--dtype", dtype)
    half, _ = common.load(chosen, tokenizer)
    ids, tokens = [ids for ids, _ in sequences], [token for _, token in sequences]
    ours = latents.gradient_scores(half, sae, ids, tokens)
    exact = latents.gradient_scores(model, sae, ids, tokens)
    shared = [
        report.shared_percent(latents.top_and_bottom(a, 6)[0], latents.top_and_bottom(b, 6)[0])
        for a, b in zip(ours, exact)
    ]
    assert ours.dtype == torch.float32 and np.mean(shared) >= 85


def test_random_scores(demo, sequences):
    model, sae, _ = demo
    _, residuals = generation.answer(model, sae, [ids for ids, _ in sequences], 1, keep_residuals=True)
    drawn = []
    for number, residual in enumerate(residuals):
        scores = latents.random_scores(sae, residual, f"42 {number}")
        anywhere = (sae.encode(residual) > 0).any(0)
        assert torch.equal(scores != 0, anywhere)
        assert torch.equal(scores, latents.random_scores(sae, residual, f"42 {number}"))
        topk, bottomk = latents.top_and_bottom(scores, 6)
        assert len({*topk, *bottomk}) == 12
        ids = anywhere.nonzero().flatten().tolist()
        drawn += [ids.index(latent) / len(ids) for latent in topk + bottomk]
    assert scipy.stats.kstest(drawn, "uniform").pvalue > 0.001  # of all places in the list alike


def test_special_tokens_bypass_the_sae(demo, sequences):
    """Against the oracle's full forward pass: special positions keep their residual stream and count in no score."""
    model, sae, tokenizer = demo
    special = common.special_ids(tokenizer)
    ids, _ = sequences[0]
    counted = [token not in special for token in ids]
    assert counted.count(False) == 2 and not counted[0]  # BOS and the turn's marker

    def replace(residual, hook):
        out = sae.decode(sae.encode(residual))
        out[0, [not c for c in counted]] = residual[0, [not c for c in counted]]
        return out

    with torch.no_grad(), model.hooks(fwd_hooks=[(sae.cfg.metadata.hook_name, replace)]):
        expected = model(torch.tensor([ids]))[0, -1]
    with torch.no_grad(), generation.spliced(model, sae, generation.splice(sae, bypass=special)) as lm:
        found = lm(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), generation.spliced(model, sae, generation.splice(sae)) as lm:
        assert not torch.allclose(lm(torch.tensor([ids])).logits[0, -1], expected, rtol=1e-2, atol=1e-2)
    assert latents.counted_positions(ids, special) == [i for i, c in enumerate(counted) if c]


# ---------------------------------------------------------------------------------------------------------------------
# Intervals and tests


def clustered(rng, contexts, share=0.7):
    """Right or wrong answers with as many questions a context as SQuAD has, and a context's own difficulty."""
    sizes = rng.integers(1, 10, contexts)
    keys = np.repeat(np.arange(contexts), sizes)
    difficulty = rng.beta(2 * share, 2 * (1 - share), contexts)
    return (rng.random(len(keys)) < difficulty[keys]).astype(float), keys


def test_intervals_agree_with_scipy():
    values, keys = clustered(np.random.default_rng(5), 150)
    low, high = report.bootstrap(values[:, None], keys)[:, 0]
    sums, sizes = (np.bincount(keys, weights) for weights in (values, np.ones_like(values)))
    theirs = scipy.stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=10_000,
        rng=1,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(low - theirs.low) < 0.04 * width and abs(high - theirs.high) < 0.04 * width


def test_intervals_cover_the_truth():
    """Of 300 simulated data sets; intervals over questions instead of contexts cover it far less often."""
    rng, hits, naive_hits = np.random.default_rng(6), 0, 0
    for _ in range(300):
        values, keys = clustered(rng, 60)
        low, high = report.bootstrap(values[:, None], keys, resamples=300)[:, 0]
        hits += low <= 0.7 <= high
        low, high = report.bootstrap(values[:, None], np.arange(len(values)), resamples=300)[:, 0]
        naive_hits += low <= 0.7 <= high
    assert 0.91 <= hits / 300 <= 0.98 and naive_hits / 300 < 0.85


def test_paired_drops_are_narrower_than_their_parts():
    rng = np.random.default_rng(7)
    before, keys = clustered(rng, 200)
    after = before * (rng.random(len(before)) < 0.95)
    scores = [[{"em": x, "f1": x, "accuracy": x} for x in column] for column in (before, after)]
    found = report.compare(*map(report.columns, scores), keys)

    def width(estimates):
        low, high = estimates["intervals"]["em"]
        return high - low

    assert found["drop"]["em"] == pytest.approx(found["clean"]["em"] - found["em"])
    assert width(found["drop"]) < 0.5 * width(found) and found["em_won"] == 0
    assert found["em_lost"] == int((before - after).sum())


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 5), (12, 3), (3, 12), (700, 400), (2000, 10)])
def test_mcnemar(lost, won):
    if lost + won:
        theirs = mcnemar([[7, lost], [won, 9]], exact=True).pvalue
        assert report.mcnemar(lost, won) == pytest.approx(min(1, theirs), rel=1e-9)
    else:
        assert report.mcnemar(0, 0) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Statistics, table, figure


def test_latent_statistics():
    samples = [
        {"id": "a", "active": [1, 2, 3, 4], "topk": [1, 2], "bottomk": [9, 8]},
        {"id": "b", "active": [1, 2, 3, 4, 5], "topk": [2, 3], "bottomk": [9, 8]},
        {"id": "c", "active": [1, 7], "topk": [7], "bottomk": [1]},
    ]
    found = report.latent_statistics(samples, ["x", "x", "y"])
    assert found["active"] == pytest.approx(11 / 3) and found["k_at_50%"] == pytest.approx(5 / 3)
    assert found["same_context_percent"] == {"topk": 50, "bottomk": 100}
    assert report.latent_statistics(samples, ["x", "y", "z"])["same_context_percent"]["topk"] is None
    # Three on one context: each pair's shared latents over each pair's mean length, pooled.
    pooled = report.latent_statistics(samples, ["x"] * 3)["same_context_percent"]
    assert pooled == {"topk": pytest.approx(100 * (1 + 0 + 0) / (2 + 1.5 + 1.5)), "bottomk": pytest.approx(40)}
    assert found["most_frequent_topk"][0] == {"latent": 2, "questions": 2}
    others = [samples[0] | {"topk": [5, 6]}, samples[2] | {"bottomk": [1, 3]}]
    assert report.ranking_overlap(samples, others) == {
        "n": 2, "topk": 50, "bottomk": pytest.approx((100 + 200 / 3) / 2)
    }  # fmt: skip


def entry(ranking, which, k, em, run=None, n=4):
    """An entry of results.json with made-up figures."""

    def estimates(value):
        return {"n": n, "em": value, "f1": value, "accuracy": value} | {
            "intervals": {metric: [value - 1, value + 1] for metric in report.METRICS}
        }  # fmt: skip

    run = {"ranking": ranking, "dataset": "d.jsonl", "split": None, "model": "m", "sae_release": "r", "sae_id": ""} | (
        run or {}
    )
    return estimates(em) | {
        "round": rounds.WORDS[which], "masked": which, "k": k, "run": run, "p": 0.01, "clean": estimates(100.0),
        "drop": estimates(100.0 - em), "mean_k": 6.5 if k == "50%" else float(k),
    }  # fmt: skip


def test_table():
    entries = [entry("random", "topk", "1", 98.0), entry("baseline", "bottomk", "50%", 99.0)]
    entries += [entry("baseline", "topk", "50%", 75.0), entry("baseline", "topk", "1", 97.0)]
    lines = [line.split("  ") for line in report.table(entries).splitlines()]
    lines = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert lines[1] == ["-", "none, kept", "-", "4", *["100.00 [99.0, 101.0]"] * 3]
    assert [line[:3] for line in lines[2:]] == [
        ["baseline", "TopK", "1"],
        ["baseline", "TopK", "50% (mean 6.5)"],
        ["baseline", "BottomK", "50% (mean 6.5)"],
        ["random", "TopK", "1"],
    ]
    assert lines[3][3:] == ["4", *["75.00 [74.0, 76.0]"] * 3, *["25.00 [24.0, 26.0]"] * 2, "0.01"]
    assert "paper" not in lines[0][-1]


def test_the_papers_figures_stand_beside_ours():
    run = {name: common.DEFAULTS[name] for name in ("model", "sae_release", "sae_id", "dataset", "split")}
    table = report.table([entry("gradsae", "topk", "50%", 30.0, run), entry("gradsae", "topk", "2", 90.0, run)])
    assert table.splitlines()[0].endswith("paper EM / F1")
    rows = [line for line in table.splitlines() if "TopK" in line]
    assert not rows[0].endswith("43.33") and rows[1].endswith("30.58 / 43.33")
    assert report.published(run | {"ranking": "baseline", "split": "train"}, "topk", "50%") is None
    assert len(report.PAPER) == 16 and sum(map(len, report.PAPER.values())) == 40


@pytest.mark.parametrize("count", [1, 7])
def test_figure(tmp_path, count):
    """A picture of the size of a paper's column, of a folder that holds one entry or several."""
    from PIL import Image

    entries = [entry(r, w, k, 60.0) for r in ("baseline", "random") for w in ("topk", "bottomk") for k in ("1", "50%")]
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        with open(path, "wb") as file:
            report.draw(file, entries[:count])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = Image.open(tmp_path / "a.png")
    assert picture.width == 990 and picture.info["dpi"][0] == pytest.approx(300, abs=1)
    assert len(picture.convert("L").getcolors()) > 20


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


def test_all_rankings(tmp_path, monkeypatch, capsys):
    """One command a round and ranking; the unmasked answers are made once; every row is in the table and the figure."""
    arguments = [*ARGUMENTS, "--output-dir", tmp_path]
    made = {}
    for ranking in common.RANKINGS:
        code, out, err = run_script("baseline", [*arguments, "--ranking", ranking], monkeypatch, capsys)
        assert code == 0, err
        assert ("answering is finished" in err) == (ranking != "baseline")
        made[ranking] = json.loads((tmp_path / f"activations_{ranking}.json").read_text())
        for script in ("baseline_after_false", "baseline_after_true"):
            some = [*arguments, "--ranking", ranking, "--k", "1", "50%"]
            code, out, err = run_script(script, some, monkeypatch, capsys)
            assert code == 0, err
    rows = [line.split()[:3] for line in out.splitlines() if line.split()[:1] and line.split()[0] in common.RANKINGS]
    assert rows == [[r, w, k] for r in common.RANKINGS for w in ("TopK", "BottomK") for k in ("1", "50%")]
    entries = json.loads((tmp_path / "results.json").read_text())
    assert len(entries) == 3 + 12 and (tmp_path / "results.png").exists()
    baseline = made["baseline"]["samples"]
    for ranking, content in made.items():
        assert content["run"]["ranking"] == ranking
        for name in ("id", "answer", "active"):
            assert [s[name] for s in content["samples"]] == [s[name] for s in baseline]
    assert [s["topk"] for s in made["gradsae"]["samples"]] != [s["topk"] for s in baseline]
    _, found = read_journal(tmp_path / "predictions_gradsae_false_k1.jsonl")
    assert set(found) == {sample["id"] for sample in baseline}
    of_round_1 = {e["run"]["ranking"]: e["statistics"] for e in entries if e["round"] == "baseline"}
    assert set(of_round_1["random"]["overlap"]) == {"baseline", "gradsae"}
    # A ranking whose journal was cut goes on to the same bytes; one of another seed is another run.
    path = tmp_path / "predictions_gradsae.jsonl"
    whole, activations = path.read_bytes(), (tmp_path / "activations_gradsae.json").read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:20]))
    code, out, err = run_script("baseline", [*arguments, "--ranking", "gradsae"], monkeypatch, capsys)
    assert code == 0 and "are in" in err
    assert path.read_bytes() == whole and (tmp_path / "activations_gradsae.json").read_bytes() == activations
    for name in ("predictions_baseline.jsonl", "predictions_random.jsonl", "activations_random.json", "results.json"):
        content = (tmp_path / name).read_text().replace('"demo": true', '"demo": false')
        (tmp_path / name).write_text(content)
    other = [*arguments, "--ranking", "random", "--seed", "7"]
    code, out, err = run_script("baseline", other, monkeypatch, capsys)
    assert code == 2 and "ranking_seed 42, now 7" in err and len(err.splitlines()) == 1
    # A file of another ranking than the one asked for is refused.
    mixed = [*arguments, "--activations", tmp_path / "activations_gradsae.json", "--ranking", "baseline"]
    code, out, err = run_script("baseline_after_false", mixed, monkeypatch, capsys)
    assert code == 2 and 'ranking "gradsae", now "baseline"' in err


def test_nothing_kept(tmp_path, monkeypatch, capsys):
    """A round 1 that keeps no question says so, whatever the ranking; there is nothing to mask then."""
    questions = [json.loads(line) for line in (ROOT / "demo" / "questions.jsonl").read_text().splitlines()[:5]]
    lines = [json.dumps(question | {"answers": {"text": ["quite another answer"]}}) for question in questions]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    arguments = ["--demo", "--dataset", tmp_path / "questions.jsonl", "--output-dir", tmp_path]
    for ranking in ("baseline", "gradsae"):
        code, out, err = run_script("baseline", [*arguments, "--ranking", ranking], monkeypatch, capsys)
        assert code == 0 and "0 answered right and kept" in out and "No question was kept" in out
        code, _, err = run_script("baseline_after_false", [*arguments, "--ranking", ranking], monkeypatch, capsys)
        assert code == 2 and "kept no question" in err and len(err.splitlines()) == 1


def test_gradsae_ranking_is_the_oracles(demo, demo_questions, tmp_path, monkeypatch, capsys):
    """Round 1's file with --ranking gradsae, against the oracle's scores."""
    model, sae, tokenizer = demo
    arguments = ["--demo", "--limit", "12", "--output-dir", tmp_path, "--ranking", "gradsae"]
    code, _, err = run_script("baseline", arguments, monkeypatch, capsys)
    assert code == 0, err
    samples = json.loads((tmp_path / "activations_gradsae.json").read_text())["samples"]
    _, answers = read_journal(tmp_path / "predictions_baseline.jsonl")
    by_id = {q.id: q for q in demo_questions}
    assert len(samples) >= 8
    for sample in samples:
        question, tokens = by_id[sample["id"]], answers[sample["id"]]["tokens"]
        prompt = oracle.encode_prompt(tokenizer, question.context, question.question)
        assert "[" in tokenizer.decode(tokens[-1:])
        scores, _ = oracle.gradient_scores(model, sae, prompt + tokens[:-1], tokens[-1])
        nonzero = [c for c in range(len(scores)) if scores[c] > 0]
        k = len(sample["active"]) // 2
        best = sorted(nonzero, key=lambda c: (-scores[c], c))[:k]
        assert [float(scores[c]) for c in sample["topk"]] == pytest.approx([float(scores[c]) for c in best], rel=1e-4)
        assert len(sample["bottomk"]) == k and all(0 < scores[c] <= scores[best[-1]] for c in sample["bottomk"])


def test_no_splice_and_special_tokens(demo, demo_questions, tmp_path, monkeypatch, capsys):
    """The model by itself answers as plain Transformers do; and special tokens left out are another run."""
    model, _, tokenizer = demo
    code, out, err = run_script("baseline", [*ARGUMENTS, "--no-splice", "--output-dir", tmp_path], monkeypatch, capsys)
    assert code == 0 and "none, no SAE" in out
    run, found = read_journal(tmp_path / "predictions_no_splice.jsonl")
    assert run["splice"] is False and len(found) == 60
    assert not (tmp_path / "activations_baseline.json").exists()
    for record in list(found.values())[:10]:
        question = next(q for q in demo_questions if q.id == record["id"])
        prompt = torch.tensor([oracle.encode_prompt(tokenizer, question.context, question.question)])
        expected = model.original_model.generate(prompt, max_new_tokens=50)[0, prompt.shape[1] :]
        assert record["text"] == tokenizer.decode(expected)
    excluding = [*ARGUMENTS, "--exclude-special-tokens", "--output-dir", tmp_path / "x"]
    for script in ("baseline", "baseline_after_false"):
        code, out, err = run_script(script, excluding, monkeypatch, capsys)
        assert code == 0, err
    content = json.loads((tmp_path / "x" / "activations_baseline.json").read_text())
    assert content["run"]["exclude_special_tokens"] is True
    arguments = [*ARGUMENTS, "--output-dir", tmp_path / "x"]
    code, _, err = run_script("baseline_after_true", arguments, monkeypatch, capsys)
    assert code == 2 and "exclude_special_tokens true, now false" in err


def test_log_probability_of_a_sure_model_keeps_its_gradient(demo, sequences):
    """Where P is all but 1, single precision has no 1 - P left; the scores must not vanish with it."""
    model, sae, _ = demo
    ids, token = sequences[0]
    head = model.original_model.lm_head

    def sharpen(module, arguments, output):
        return output * 3  # P = 1 - 1e-9 or closer

    with generation.spliced(model, sae, generation.splice(sae)) as lm, torch.no_grad():
        plain = lm(torch.tensor([ids])).logits[0, -1].double()
    with torch.no_grad():
        assert 1 - plain.softmax(-1)[token] < 0.1
    handle = head.original_component.register_forward_hook(sharpen)
    try:
        scores = latents.gradient_scores(model, sae, [ids], [token])[0]
    finally:
        handle.remove()
    assert math.isfinite(scores.sum()) and (scores > 0).sum() > 50
