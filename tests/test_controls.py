"""Controls, draws, another question's latents and TopK kept alone, as rounds 2 and 3 run them on the demo: against
journals worked out by hand, and naive hooks."""

import hashlib
import json
import math
import random
import shutil

import oracle
import pytest
import scipy.stats
import torch
from conftest import read_activations, read_journal, run_script, write_activations

from experiment import prompts
from experiment.report import estimates, figure, folders

ASKED = ["--demo", "--limit", 32]
RANKINGS = ["baseline", "attribution", "effect", "matched", "random"]
ROUND_2 = "baseline_after_false"
CONTROLLED = ["--ranking", "baseline", "matched", "other", "--k", "0", "3", "50%", "--control", "direction"]
KEPT = ["--ranking", "baseline", "effect", "--k", "1", "3", "50%", "--keep-only"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Round 1 with two draws, and rounds 2 and 3: controls and draws, another question's latents, TopK kept alone."""
    folder = tmp_path_factory.mktemp("controls")
    steps = [
        ("baseline", ["--ranking", *RANKINGS, "--draws", 2]),
        (ROUND_2, [*CONTROLLED, "--draws", 2]),
        (ROUND_2, KEPT),
        (ROUND_2, ["--ranking", "effect", "--k", "3"]),
        (ROUND_2, ["--ranking", "other-context", "--seed", 7]),
        ("baseline_after_true", ["--control", "direction"]),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "draw", lambda entries: {})
        for script, more in steps:
            given = [*ASKED, "--output-dir", folder, *more]
            patch.setattr("sys.argv", [f"{script}.py", *map(str, given)])
            __import__(script).main()
    return folder


@pytest.fixture(scope="module")
def kept(folder):
    """{id: round 1's record} of the kept questions."""
    _, records = read_journal(folder / "predictions_baseline.jsonl")
    return {question_id: record for question_id, record in records.items() if "active" in record}


@pytest.fixture(scope="module")
def contexts(demo_questions):
    return {question.id: question.context for question in demo_questions}


def records_of(folder, name):
    return read_journal(folder / f"predictions_{name}.jsonl")[1]


def find_entry(folder, ranking, k, control=None, keep_only=None, round="false"):
    wanted = (round, ranking, k, control, keep_only)
    found = []
    for entry in json.loads((folder / "results.json").read_text()):
        name = (entry["round"], entry["run"]["ranking"], entry["k"], entry.get("control"), entry.get("keep_only"))
        if name == wanted:
            found.append(entry)
    (entry,) = found
    return entry


def inside(record, unmasked):
    """m: the mean log probability of the unmasked answer's tokens inside the brackets."""
    values = [record["log_probs"][place] for place in unmasked["inside"]]
    return sum(values) / len(values)


def measure(metric, record, unmasked):
    return inside(record, unmasked) if metric == "answer_log_prob" else 100 * record[metric]


def drops_of(metric, journals, kept):
    """{id: unmasked minus masked, the mean over these journals}, of the questions that all have."""
    drops = {}
    for question_id, unmasked in kept.items():
        if all(question_id in journal for journal in journals):
            before = measure(metric, unmasked, unmasked)
            after = [measure(metric, journal[question_id], unmasked) for journal in journals]
            drops[question_id] = sum(before - value for value in after) / len(journals)
    return drops


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ---------------------------------------------------------------------------------------------------------------------
# Journals


def test_journals_of_a_control_round(folder, kept):
    """A journal for each ranking, K, control and draw, and none of what K = 0 does not need."""
    found = set()
    for path in folder.glob("predictions_*false*.jsonl"):
        found.add(path.name.removeprefix("predictions_").removesuffix(".jsonl"))
    found -= {"other-context_false"}
    expected = {"false_k0", "matched_false_k0", "other_false_k0", "effect_false_k3"}
    for ranking in ("", "matched_", "other_"):
        for k in ("", "_k3"):
            expected |= {f"{ranking}false{k}{more}" for more in ("", "_direction", "_direction_draw2")}
    expected |= {"matched_false_draw2", "matched_false_k3_draw2"}
    assert found == expected
    run, records = read_journal(folder / "predictions_matched_false_k3_direction_draw2.jsonl")
    assert [run[name] for name in ("ranking", "k", "control", "control_seed", "draw")] == [
        "matched", "3", "direction", 42, 2,
    ]  # fmt: skip
    assert list(records) == list(kept)
    run, _ = read_journal(folder / "predictions_false_k3.jsonl")
    assert not run.keys() & {"control", "control_seed", "draw", "draws", "effects", "keep_only"}
    run, _ = read_journal(folder / "predictions_matched.jsonl")
    assert run["draws"] == 2 and "draws" not in read_journal(folder / "predictions_effect.jsonl")[0]
    assert read_journal(folder / "predictions_effect_keep_k0.jsonl")[0]["keep_only"] is True
    assert read_journal(folder / "predictions_effect_keep.jsonl")[0]["effects"] == 256
    # Each draw's lists are its own, and said to be.
    digests = [read_journal(folder / f"predictions_matched_false{draw}.jsonl")[0]["activations"]
               for draw in ("", "_draw2", "_direction", "_direction_draw2")]  # fmt: skip
    assert digests[0] == digests[2] != digests[1] == digests[3]


def test_draws_are_of_the_lists_that_were_drawn(folder, kept, demo, demo_questions):
    """The second draw's answers are those with the second list masked, as many of it as remove enough."""
    model, tokenizer = demo
    _, samples = read_activations(folder / "activations_matched.json")
    answers = records_of(folder, "matched_false_draw2")
    first = records_of(folder, "matched_false")
    by_id = {question.id: question for question in demo_questions}
    differ = [s for s in samples if answers[s["id"]]["log_probs"] != first[s["id"]]["log_probs"]]
    assert len(differ) > 0.8 * len(samples)
    for sample in differ[:3]:
        (draw,) = sample["more_draws"]
        target = sample["target_topk"][len(sample["active"]) // 2 - 1]
        count = next(n for n, value in enumerate(draw["removed_topk"], 1) if value >= target)
        assert draw["topk"][:count] != sample["topk"][:count]
        question = by_id[sample["id"]]
        prompt = oracle.encode_prompt(tokenizer, question.context, question.question)
        generated = oracle.generate(model.model, model.splice.sae, tokenizer, prompt, draw["topk"][:count])
        assert answers[sample["id"]]["text"] == tokenizer.decode(generated)


def draw_direction(seed, d_in):
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.empty(d_in).normal_(generator=generator)


def generate_turned(model, sae, tokenizer, prompt, latents, direction):
    """As oracle.generate, but what the latents write at a position is taken away in another direction."""

    def replace(residual, hook):
        acts = sae.encode(residual)
        unmasked = sae.decode(acts)
        r = acts[..., latents] @ sae.W_dec[latents]
        along = unmasked / unmasked.norm(dim=-1, keepdim=True)
        c = (r * along).sum(-1, keepdim=True)
        u = direction - (direction * along).sum(-1, keepdim=True) * along
        u = u / u.norm(dim=-1, keepdim=True)
        size = (r.norm(dim=-1, keepdim=True) ** 2 - c**2).clamp(min=0).sqrt()
        return unmasked - c * along - size * u

    generated = []
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    with torch.no_grad(), model.hooks(fwd_hooks=[(sae.cfg.metadata.hook_name, replace)]):
        while len(generated) < 50 and not (generated and generated[-1] in ends):
            generated.append(int(model(torch.tensor([prompt + generated]))[0, -1].argmax()))
    return generated


def test_control_is_the_same_hole_in_a_random_direction(folder, kept, demo, demo_questions):
    """Drawn for each question and draw, at every position of prompt and answer."""
    model, tokenizer = demo
    sae = model.splice.sae
    by_id = {question.id: question for question in demo_questions}
    unmasked = {question_id: record["text"] for question_id, record in kept.items()}
    checked = 0
    for draw, name in ((1, "false_direction"), (2, "false_direction_draw2")):
        answers = records_of(folder, name)
        changed = [question_id for question_id in answers if answers[question_id]["text"] != unmasked[question_id]]
        for question_id in [*changed[:2], *list(answers)[:2]]:
            question = by_id[question_id]
            prompt = oracle.encode_prompt(tokenizer, question.context, question.question)
            latents = kept[question_id]["topk"][: len(kept[question_id]["active"]) // 2]
            direction = draw_direction(f"42 {draw} {question_id}", sae.cfg.d_in)
            generated = generate_turned(model.model, sae, tokenizer, prompt, latents, direction)
            assert answers[question_id]["text"] == tokenizer.decode(generated)
            checked += question_id in changed
    assert checked >= 2


# ---------------------------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("metric", ["em", "f1", "named", "answer_log_prob"])
def test_excess_from_the_journals(metric, folder, kept, contexts):
    """Over directions and matched, of two draws each, and over a question's own latents: paired, with intervals."""
    own = records_of(folder, "false_k3")
    pairs = {
        ("baseline", "direction"): ([own], ["false_k3_direction", "false_k3_direction_draw2"]),
        ("baseline", "matched"): ([own], ["matched_false_k3", "matched_false_k3_draw2"]),
        ("other", "own"): ([records_of(folder, "other_false_k3")], ["false_k3"]),
        ("matched", "direction"): (
            [records_of(folder, f"matched_false_k3{draw}") for draw in ("", "_draw2")],
            ["matched_false_k3_direction", "matched_false_k3_direction_draw2"],
        ),
    }
    for (ranking, control), (masked, names) in pairs.items():
        drops = drops_of(metric, masked, kept)
        of_control = drops_of(metric, [records_of(folder, name) for name in names], kept)
        differences = [drops[question_id] - of_control[question_id] for question_id in drops]
        excess = find_entry(folder, ranking, "3")["excess"][control]
        assert excess["n"] == len(differences)
        assert excess[metric] == pytest.approx(mean(differences), abs=1e-9)
        keys = [contexts[question_id] for question_id in drops]
        expected = estimates.bootstrap([[difference] for difference in differences], keys)[:, 0]
        assert excess["intervals"][metric] == pytest.approx(expected.tolist(), abs=1e-9)
    assert find_entry(folder, "baseline", "3")["excess"].keys() == {"direction", "matched"}
    assert find_entry(folder, "other", "3")["excess"].keys() == {"direction", "own"}
    for entry in (find_entry(folder, "baseline", "0"), find_entry(folder, "baseline", "3", "direction")):
        assert "excess" not in entry


def test_an_entry_of_several_draws(folder, kept):
    """One entry: means over the draws within a question first."""
    journals = [records_of(folder, f"matched_false{draw}") for draw in ("", "_draw2")]
    entry = find_entry(folder, "matched", "50%")
    assert (entry["draws"], entry["n"], entry["journal"]) == (2, len(kept), "predictions_matched_false.jsonl")
    assert entry["em"] == pytest.approx(mean(mean(j[i]["em"] for j in journals) for i in kept) * 100)
    assert entry["drop"]["answer_log_prob"] == pytest.approx(mean(drops_of("answer_log_prob", journals, kept).values()))
    control = find_entry(folder, "matched", "50%", "direction")
    assert (control["draws"], control["control"]) == (2, "direction")
    assert control["mean_k"] == entry["mean_k"] and control["removed"] == entry["removed"]
    assert "draws" not in find_entry(folder, "baseline", "50%")
    # What was masked: the mean over both draws.
    _, samples = read_activations(folder / "activations_matched.json")
    counts = []
    for sample in samples:
        target = sample["target_topk"][len(sample["active"]) // 2 - 1]
        for drawn in (sample, *sample["more_draws"]):
            counts.append(next(n for n, value in enumerate(drawn["removed_topk"], 1) if value >= target))
    assert entry["mean_k"] == pytest.approx(mean(counts))


def test_what_was_found_comes_first(folder, monkeypatch, capsys):
    """The sentence of the comparison, from the figures, before the table."""
    monkeypatch.setattr(figure, "draw", lambda entries: {})
    monkeypatch.setattr("common.load", None)  # the round is finished
    given = [*ASKED, "--output-dir", folder, *CONTROLLED, "--draws", 2]
    code, out, err = run_script(ROUND_2, given, monkeypatch, capsys)
    assert code == 0, err
    mask, control = find_entry(folder, "baseline", "50%"), find_entry(folder, "baseline", "50%", "direction")
    low, high = mask["drop"]["intervals"]["em"]
    cost = f"costs {mask['drop']['em']:.1f} points of EM [{low:.1f}, {high:.1f}]"
    table = out.index("\nTopK: ")
    told = " ".join(out[:table].split())
    assert told.startswith(
        f"Masking the {mask['mean_k']:.1f} latents that fire most (on average per question) {cost}; "
    )
    excess = mask["excess"]["direction"]
    assert f"random direction {control['drop']['em']:.1f}; the difference is {excess['em']:.1f} [" in told
    assert max(len(line) for line in out[:table].splitlines()) <= 100


def test_how_well_scores_tell_effects(folder, kept):
    """By SciPy, from what the files hold; the ranking by effects is the best there can be."""
    _, effects = read_activations(folder / "activations_effect.json")
    for ranking in RANKINGS:
        _, samples = read_activations(folder / f"activations_{ranking}.json")
        spearman, share, found = [], [], []
        for sample, effect in zip(samples, effects, strict=True):
            scores = effect["effects"] if ranking == "effect" else sample["scores"]
            assert sample["measured"] == effect["measured"] and len(scores) == len(sample["measured"])
            k = len(sample["active"]) // 2
            numbers = range(len(scores))
            own = [n for n in sorted(numbers, key=lambda n: -scores[n]) if scores[n]][:k]
            most = [n for n in sorted(numbers, key=lambda n: -effect["effects"][n]) if effect["effects"][n]][:k]
            spearman.append(scipy.stats.spearmanr(scores, effect["effects"]).statistic)
            positive = [max(0, value) for value in effect["effects"]]
            share.append(sum(positive[n] for n in own) / sum(positive))
            found.append(len({*own} & {*most}) / k)
        (entry,) = [e for e in json.loads((folder / "results.json").read_text())
                    if e["round"] == "baseline" and e["run"]["ranking"] == ranking]  # fmt: skip
        agreement = entry["agreement"]
        assert agreement["spearman"]["mean"] == pytest.approx(mean(spearman))
        assert agreement["share"]["mean"] == pytest.approx(mean(share))
        assert agreement["found"]["mean"] == pytest.approx(mean(found))
        assert agreement["spearman"]["n"] == len(kept) and agreement["spearman"]["low"] < agreement["spearman"]["high"]
        assert agreement["unmeasured"] == pytest.approx(mean(effect["unmeasured"] for effect in effects))
        if ranking == "effect":
            assert (agreement["spearman"]["mean"], agreement["found"]["mean"]) == (pytest.approx(1), 1)
            assert agreement["share"]["mean"] > 0.5


def test_sharing_over_contexts(folder, kept, contexts):
    """All pairs, one by one."""
    tops = {question_id: {*record["topk"][: len(record["active"]) // 2]} for question_id, record in kept.items()}
    shared = {True: [0, 0], False: [0, 0]}
    ids = list(kept)
    for number, one in enumerate(ids):
        for other in ids[:number]:
            of_pair = shared[contexts[one] == contexts[other]]
            of_pair[0] += 2 * len(tops[one] & tops[other])
            of_pair[1] += len(tops[one]) + len(tops[other])
    (entry,) = [e for e in json.loads((folder / "results.json").read_text())
                if e["round"] == "baseline" and e["run"]["ranking"] == "baseline"]  # fmt: skip
    statistics = entry["statistics"]
    assert statistics["same_context_percent"]["topk"] == pytest.approx(100 * shared[True][0] / shared[True][1])
    assert statistics["other_context_percent"]["topk"] == pytest.approx(100 * shared[False][0] / shared[False][1])
    assert statistics["union_topk"] == len(set().union(*tops.values())) > len(statistics["most_frequent_topk"])


# ---------------------------------------------------------------------------------------------------------------------
# TopK kept alone


def test_all_but_topk_are_masked(folder, kept, demo, demo_questions):
    model, tokenizer = demo
    sae = model.splice.sae
    _, samples = read_activations(folder / "activations_effect.json")
    by_id = {question.id: question for question in demo_questions}
    for k in (0, 3):
        answers = records_of(folder, f"effect_keep_k{k}")
        for sample in samples[:2]:
            question = by_id[sample["id"]]
            prompt = oracle.encode_prompt(tokenizer, question.context, question.question)
            masked = [latent for latent in range(sae.cfg.d_sae) if latent not in sample["topk"][:k]]
            generated = oracle.generate(model.model, sae, tokenizer, prompt, masked)
            assert answers[sample["id"]]["text"] == tokenizer.decode(generated)
    assert records_of(folder, "keep_k0") == records_of(folder, "effect_keep_k0")  # nothing is kept of any


def test_faithfulness_and_completeness(folder, kept, contexts):
    none = records_of(folder, "effect_keep_k0")
    curves = {"faithfulness": {}, "completeness": {}}
    names = {"faithfulness": {"1": "effect_keep_k1", "3": "effect_keep_k3", "50%": "effect_keep"},
             "completeness": {"3": "effect_false_k3"}}  # fmt: skip
    for field, journals in names.items():
        for k, name in journals.items():
            reached = records_of(folder, name)
            values = {}
            for question_id, unmasked in kept.items():
                m = [inside(records[question_id], unmasked) for records in (reached, none)]
                loss = inside(unmasked, unmasked) - m[1]
                if loss > 0.1:
                    values[question_id] = (m[0] - m[1]) / loss
            found = find_entry(folder, "effect", k, keep_only=True)
            assert (found[field]["mean"], found[field]["n"]) == (pytest.approx(mean(values.values())), len(values))
            keys = [contexts[question_id] for question_id in values]
            expected = estimates.bootstrap([[value] for value in values.values()], keys)[:, 0]
            assert [found[field]["low"], found[field]["high"]] == pytest.approx(expected.tolist(), abs=0.02)
            curves[field][math.log(found["mean_k"])] = mean(values.values())
    places = list(curves["faithfulness"])
    assert places == sorted(places)
    area = 0.0
    for left, right in zip(places, places[1:]):
        area += (right - left) * (curves["faithfulness"][left] + curves["faithfulness"][right]) / 2
    last = find_entry(folder, "effect", "50%", keep_only=True)
    assert last["faithfulness_auc"]["mean"] == pytest.approx(area / (places[-1] - places[0]))
    assert "completeness_auc" not in last and "completeness" not in last  # one K is no curve; 50% was not masked
    assert "faithfulness_auc" not in find_entry(folder, "effect", "3", keep_only=True)
    assert "faithfulness" not in find_entry(folder, "effect", "0", keep_only=True)
    # Of the baseline both masks are there at two K.
    last = find_entry(folder, "baseline", "50%", keep_only=True)
    assert last["completeness_auc"]["n"] == last["faithfulness_auc"]["n"] > 0.9 * len(kept)
    assert last["removed"] is None and last["mean_k"] == find_entry(folder, "baseline", "50%")["mean_k"]


def test_what_is_of_other_unmasked_answers_counts_nowhere(folder, tmp_path):
    """A ranking that was added on another device, where answers differ: what others recover is not of its answers."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    run, samples = read_activations(copy / "activations_effect.json")
    for sample in samples:
        sample["answer"] += " else"
        sample["log_probs"] = [value - 3 for value in sample["log_probs"]]
    write_activations(copy / "activations_effect.json", run, samples)
    found = {}
    for entry in folders.read_folder(copy).entries:
        if entry.provenance.ranking == "baseline" and getattr(entry, "keep_only", None):
            found[entry.k] = entry.faithfulness
    for k in ("1", "3", "50%"):
        assert found[k].fields() == find_entry(folder, "baseline", k, keep_only=True)["faithfulness"]


# ---------------------------------------------------------------------------------------------------------------------
# Another question's latents


def score_tokens(model, sae, prompt, tokens, masked):
    """The log probabilities of these tokens behind the prompt, with latents set to zero at every position."""

    def replace(residual, hook):
        acts = sae.encode(residual).clone()
        acts[:, :, masked] = 0
        return sae.decode(acts)

    with torch.no_grad(), model.hooks(fwd_hooks=[(sae.cfg.metadata.hook_name, replace)]):
        logits = model(torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1 :]
    return logits.log_softmax(-1)[range(len(tokens)), tokens].tolist()


def test_round_3_has_controls_too(folder, kept):
    entry = find_entry(folder, "baseline", "50%", round="true")
    drops = drops_of("answer_log_prob", [records_of(folder, "true")], kept)
    of_control = drops_of("answer_log_prob", [records_of(folder, "true_direction")], kept)
    expected = mean(drops.values()) - mean(of_control.values())
    assert entry["excess"]["direction"]["answer_log_prob"] == pytest.approx(expected)
    assert entry["excess"].keys() == {"direction"}


def test_the_next_questions_latents_are_masked(folder, kept, contexts, demo, demo_questions):
    """The next one on the same context, behind the last the first; without a second one a question is left out."""
    model, tokenizer = demo
    by_id = {question.id: question for question in demo_questions}
    answers = records_of(folder, "other_false")
    on_context = {}
    for question_id in kept:
        on_context.setdefault(contexts[question_id], []).append(question_id)
    single = [ids[0] for ids in on_context.values() if len(ids) == 1]
    expected = [question_id for question_id in kept if question_id not in single]
    assert list(answers) == expected and len(single) < len(kept)
    entry = find_entry(folder, "other", "50%")
    assert entry["n"] == len(expected) and entry["removed"] is None
    several = [ids for ids in on_context.values() if len(ids) > 2][:2]
    for ids in several:
        for one, following in ((ids[0], ids[1]), (ids[-1], ids[0])):
            latents = kept[following]["topk"][: len(kept[following]["active"]) // 2]
            question = by_id[one]
            prompt = oracle.encode_prompt(tokenizer, question.context, question.question)
            expected = score_tokens(model.model, model.splice.sae, prompt, kept[one]["tokens"], latents)
            assert answers[one]["log_probs"] == pytest.approx(expected, abs=2e-4)
            assert answers[one]["log_probs"] != pytest.approx(kept[one]["log_probs"], abs=2e-3)


def test_latents_of_a_question_on_another_context(folder, kept, contexts, demo, demo_questions):
    """Drawn by the seed."""
    model, tokenizer = demo
    by_id = {question.id: question for question in demo_questions}
    run, answers = read_journal(folder / "predictions_other-context_false.jsonl")
    assert run["ranking_seed"] == 7 and list(answers) == list(kept)
    ids = list(kept)
    for one in ids[:4]:
        draw = random.Random(f"7 {one}")
        source = draw.choice(ids)
        while contexts[source] == contexts[one]:
            source = draw.choice(ids)
        latents = kept[source]["topk"][: len(kept[source]["active"]) // 2]
        question = by_id[one]
        prompt = oracle.encode_prompt(tokenizer, question.context, question.question)
        expected = score_tokens(model.model, model.splice.sae, prompt, kept[one]["tokens"], latents)
        assert answers[one]["log_probs"] == pytest.approx(expected, abs=2e-4)


def test_questions_that_are_alone_on_their_context(folder, kept, contexts, tmp_path, monkeypatch, capsys):
    """Left out of that ranking, counted in one line, and the others' figures are over all; none left: refused."""
    monkeypatch.setattr(figure, "draw", lambda entries: {})
    run, samples = read_activations(folder / "activations_baseline.json")
    first = contexts[samples[0]["id"]]
    on_first = [s for s in samples if contexts[s["id"]] == first][:2]
    alone = next(s for s in samples if contexts[s["id"]] != first)
    write_activations(tmp_path / "activations_baseline.json", run, [*on_first, alone])
    given = [*ASKED, "--output-dir", tmp_path, "--ranking", "other", "baseline", "--k", "3"]
    code, _, err = run_script(ROUND_2, given, monkeypatch, capsys)
    assert code == 0, err
    says = "other: 1 of 3 questions have no other kept one on the same context: they are left out of it"
    assert [line for line in err.splitlines() if line.startswith("other:")] == [says]
    assert list(records_of(tmp_path, "other_false_k3")) == [s["id"] for s in on_first]
    assert list(records_of(tmp_path, "false_k3")) == [s["id"] for s in (*on_first, alone)]
    other, own = find_entry(tmp_path, "other", "3"), find_entry(tmp_path, "baseline", "3")
    assert (other["n"], own["n"], other["excess"]["own"]["n"]) == (2, 3, 2)
    assert other["population"] != own["population"]
    # The finished round says so, and asks nothing again.
    monkeypatch.setattr("common.load", None)
    code, _, err = run_script(ROUND_2, given, monkeypatch, capsys)
    assert code == 0 and "This round is finished" in err
    write_activations(tmp_path / "activations_baseline.json", run, [on_first[0], alone])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, err = run_script(ROUND_2, [*given, "--overwrite"], monkeypatch, capsys)
    assert code == 2 and len(err.splitlines()) == 1
    assert "--ranking other: no selected question has another kept one on the same context: leave it out" in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---------------------------------------------------------------------------------------------------------------------
# Refused, interrupted, asked for later


def test_more_draws_than_a_file_holds(folder, tmp_path, monkeypatch, capsys):
    given = [*ASKED, "--output-dir", folder, "--ranking", "baseline", "random", "--draws", 3]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _, err = run_script(ROUND_2, given, monkeypatch, capsys)
    assert code == 2 and len(err.splitlines()) == 1
    assert "activations_random.json: holds 2 of --draws 3: give --draws 2, or run this first: python baseline.py" in err
    assert "--ranking baseline random --draws 3" in err and "--overwrite" in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    code, _, err = run_script("baseline", [*given[:-1], 3], monkeypatch, capsys)
    assert code == 2 and "draws 2, now 3" in err and len(err.splitlines()) == 1


def test_a_draw_that_names_no_latent_of_the_sae(folder, tmp_path, monkeypatch, capsys):
    run, samples = read_activations(folder / "activations_random.json")
    samples[3]["more_draws"][0]["topk"][0] = 99_999
    write_activations(tmp_path / "activations_random.json", run, samples)
    given = [*ASKED, "--output-dir", tmp_path, "--ranking", "random", "--draws", 2]
    code, _, err = run_script(ROUND_2, given, monkeypatch, capsys)
    says = f"question {samples[3]['id']} names latent 99999, but the SAE has 512"
    assert code == 2 and says in err and not list(tmp_path.glob("*.jsonl"))


def test_mean_ablation_with_draws_and_controls(tmp_path, monkeypatch, capsys):
    """The lists of every draw beside their own means; each mask's journal under a name of its own."""
    monkeypatch.setattr(figure, "draw", lambda entries: {})
    given = [
        "--demo",
        "--limit",
        6,
        "--output-dir",
        tmp_path,
        "--ranking",
        "matched",
        "--ablation",
        "mean",
        "--draws",
        2,
    ]
    for script, more in (("baseline", []), (ROUND_2, ["--k", "3", "--control", "direction"])):
        code, _, err = run_script(script, [*given, *more], monkeypatch, capsys)
        assert code == 0, err
    found = {path.name for path in tmp_path.glob("predictions_matched_false*")}
    expected = ("", "_direction", "_draw2", "_direction_draw2")
    assert found == {f"predictions_matched_false_mean_k3{more}.jsonl" for more in expected}
    entry = find_entry(tmp_path, "matched", "3")
    _, samples = read_activations(tmp_path / "activations_matched_mean.json")
    _, of_zero = read_activations(tmp_path / "activations_matched.json")
    counts = []
    for sample, zero in zip(samples, of_zero, strict=True):
        (draw,), (other,) = sample["more_draws"], zero["more_draws"]
        assert draw["topk"] == other["topk"] and draw["removed_topk"] != other["removed_topk"]
        for drawn in (sample, draw):
            reached = [n for n, value in enumerate(drawn["removed_topk"], 1) if value >= sample["target_topk"][2]]
            counts.append(min(reached, default=len(drawn["topk"])))
    assert entry["mean_k"] == pytest.approx(mean(counts))


def test_a_control_of_another_seed_is_another_run(folder, tmp_path, monkeypatch, capsys):
    for name in ("activations_baseline.json", "predictions_false_k3_direction.jsonl"):
        shutil.copy(folder / name, tmp_path / name)
    given = [*ASKED, "--output-dir", tmp_path, "--control", "direction", "--k", "3", "--seed", 8]
    code, _, err = run_script(ROUND_2, given, monkeypatch, capsys)
    assert code == 2 and "control_seed 42, now 8" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("left", [0, 15])
def test_interrupted_control_round_ends_in_the_same_bytes(left, folder, tmp_path, monkeypatch, capsys):
    """Some journals are whole, some cut off within a line, some not begun."""
    monkeypatch.setattr(figure, "draw", lambda entries: {})
    for name in ("activations_baseline.json", "activations_matched.json"):
        shutil.copy(folder / name, tmp_path / name)
    # Batches of a few questions each, so that groups are finished one after another.
    given = [*ASKED, "--output-dir", tmp_path, "--batch-tokens", 1500, "--ranking", "matched", "other", "--k", "0", "3"]
    given += ["--control", "direction", "--draws", 2]
    code, table, err = run_script(ROUND_2, given, monkeypatch, capsys)
    assert code == 0, err
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    journals = sorted(path for path in tmp_path.iterdir() if path.suffix == ".jsonl")
    for number, path in enumerate(journals):
        lines = whole[path.name].splitlines(keepends=True)
        if number % 3 == 0:
            path.write_bytes(b"".join(lines[: left + 1]) + lines[left + 1][:20])
        elif number % 3 == 1 and left == 0:
            path.unlink()
    code, again, err = run_script(ROUND_2, given, monkeypatch, capsys)
    assert (code, again) == (0, table), err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_a_control_that_is_run_later(folder, kept, tmp_path, monkeypatch, capsys):
    """Its excess is filled in from the journals of the earlier command, and goes where the control goes."""
    monkeypatch.setattr(figure, "draw", lambda entries: {})
    for name in ("activations_baseline.json", "activations_matched.json"):
        shutil.copy(folder / name, tmp_path / name)
    given = [*ASKED, "--output-dir", tmp_path, "--k", "3"]
    code, out, err = run_script(ROUND_2, given, monkeypatch, capsys)
    assert code == 0 and "No control was run: with --control direction the same command" in " ".join(out.split()), err
    assert "excess" not in find_entry(tmp_path, "baseline", "3")
    more = ["--ranking", "matched", "--draws", 2]
    code, out, err = run_script(ROUND_2, [*given, *more], monkeypatch, capsys)
    assert code == 0 and "active latents drawn at random that take away as much" in " ".join(out.split()), err
    matched = find_entry(folder, "baseline", "3")["excess"]["matched"]
    found = find_entry(tmp_path, "baseline", "3")["excess"]
    assert found.keys() == {"matched"} and found["matched"]["em"] == pytest.approx(matched["em"])
    # The matched ranking is made anew: its entry is no longer of what lies there, nor is the difference to it.
    run, samples = read_activations(tmp_path / "activations_matched.json")
    samples[0]["topk"] = samples[0]["topk"][::-1]
    write_activations(tmp_path / "activations_matched.json", run, samples)
    code, out, err = run_script(ROUND_2, given, monkeypatch, capsys)
    assert code == 0 and "matched TopK at K = 3 is left out" in err, err
    assert "excess" not in find_entry(tmp_path, "baseline", "3")


def test_the_shipped_file_serves_controls(tmp_path, monkeypatch, capsys):
    """python baseline_after_false.py --demo --control direction in a fresh clone."""
    monkeypatch.setattr(figure, "draw", lambda entries: {})
    given = ["--demo", "--limit", 12, "--output-dir", tmp_path, "--control", "direction", "--k", "1"]
    code, _, err = run_script(ROUND_2, given, monkeypatch, capsys)
    assert code == 0, err
    assert "direction" in find_entry(tmp_path, "baseline", "1")["excess"]


@pytest.mark.parametrize("more", [["--control", "direction"], ["--keep-only"]])
def test_half_precision(more, folder, tmp_path, monkeypatch, capsys):
    """With a float32 SAE, as by default on CUDA: nearly as in single precision."""
    monkeypatch.setattr(figure, "draw", lambda entries: {})
    given = ["--demo", "--limit", 20, "--dtype", "float16", "--sae-dtype", "float32", "--output-dir", tmp_path]
    for script, options in (("baseline", []), (ROUND_2, ["--k", "3", *more])):
        code, _, err = run_script(script, [*given, *options], monkeypatch, capsys)
        assert code == 0, err
    name = "keep_k3" if "--keep-only" in more else "false_k3_direction"
    half, single = records_of(tmp_path, name), records_of(folder, name)
    both = half.keys() & single.keys()
    same = sum(half[question_id]["answer"] == single[question_id]["answer"] for question_id in both)
    assert len(both) >= 0.9 * len(half) >= 14 and same >= 0.8 * len(both)
    for question_id in both:  # of the same unmasked answer
        one, other = half[question_id]["log_probs"], single[question_id]["log_probs"]
        assert len(one) != len(other) or one == pytest.approx(other, abs=0.15)


def test_answers_outside_the_brackets_are_counted(demo, tmp_path, monkeypatch, capsys):
    """Rankings that need the answer's tokens name the questions that have none; those count in no agreement."""
    monkeypatch.setattr(figure, "draw", lambda entries: {})
    find = prompts.find_answer
    calls = []

    def find_in_two_of_three(tokenizer, tokens):
        calls.append(1)
        return [] if len(calls) % 3 == 0 else find(tokenizer, tokens)

    monkeypatch.setattr(prompts, "find_answer", find_in_two_of_three)
    given = ["--demo", "--limit", 12, "--output-dir", tmp_path, "--ranking", "attribution", "effect"]
    code, _, err = run_script("baseline", given, monkeypatch, capsys)
    assert code == 0, err
    _, samples = read_activations(tmp_path / "activations_effect.json")
    without = [sample["id"] for sample in samples if not sample["inside"]]
    assert len(without) == len(samples) // 3 > 0
    says = f"attribution, effect: {len(without)} of {len(samples)} kept questions have no answer inside the brackets"
    assert says in err and without[0] in err.split(says)[1]
    entries = json.loads((tmp_path / "results.json").read_text())
    assert {entry["agreement"]["found"]["n"] for entry in entries} == {len(samples) - len(without)}
