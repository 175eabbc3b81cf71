"""The three rounds as a person runs them, on the bundled demo: files, tables, half precision, the authors' file."""

import csv
import json
import re

import oracle
import pytest
import torch
from conftest import ROOT, options, read_activations, read_journal, run_script, write_activations

import common
from experiment import UserError, masks, prompts
from experiment.intervention import rankings
from experiment.report import folders

ROUNDS = [("baseline", "baseline"), ("baseline_after_false", "false"), ("baseline_after_true", "true")]
METRICS = ("em", "f1", "accuracy", "named")


def run_rounds(folder, monkeypatch, capsys, *arguments, masks=(), rounds=ROUNDS):
    """Rounds in `folder`; returns what the last one printed, and the journals' records by round and id."""
    for script, _ in rounds:
        more = masks if script != "baseline" else ()
        given = ["--demo", "--output-dir", folder, *arguments, *more]
        code, out, err = run_script(script, given, monkeypatch, capsys)
        assert code == 0, err
    return out, {name: read_journal(folder / f"predictions_{name}.jsonl")[1] for _, name in rounds}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The whole demo in float32: its folder and its records."""
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        for script, _ in ROUNDS:
            patch.setattr("sys.argv", [f"{script}.py", "--demo", "--output-dir", str(folder)])
            __import__(script).main()
    return folder, {name: read_journal(folder / f"predictions_{name}.jsonl")[1] for _, name in ROUNDS}


def mean(values):
    values = list(values)
    return 100 * sum(values) / len(values)


def kept_ids(records):
    return [question_id for question_id, record in records.items() if "active" in record]


def test_the_effect(full, demo_questions):
    """What the experiment is about: TopK matters, BottomK does not. The bounds are the demo's acceptance."""
    _, found = full
    baseline = found["baseline"]
    assert list(baseline) == [question.id for question in demo_questions] and len(baseline) >= 500
    kept = kept_ids(baseline)
    assert len(kept) >= 0.8 * len(baseline)
    clean = mean(baseline[question_id]["em"] for question_id in kept)
    assert clean - mean(record["em"] for record in found["false"].values()) >= 10
    assert clean - mean(record["em"] for record in found["true"].values()) <= 3
    assert list(found["false"]) == list(found["true"]) == kept


def test_results_agree_with_the_journals(full):
    folder, found = full
    entries = {entry["round"]: entry for entry in json.loads((folder / "results.json").read_text())}
    kept = kept_ids(found["baseline"])
    baseline = entries["baseline"]
    assert baseline["asked"] == len(found["baseline"]) and baseline["kept"] == baseline["n"] == len(kept)
    assert baseline["kept"] + baseline["wrong"] + baseline["unranked"] == baseline["asked"]
    assert len({entry["population"] for entry in entries.values()}) == 1 != baseline["population_all"]
    for name in ("false", "true"):
        entry = entries[name]
        assert entry["n"] == entry["clean"]["n"] == len(kept)
        for metric in METRICS:
            clean = mean(found["baseline"][question_id][metric] for question_id in kept)
            masked = mean(record[metric] for record in found[name].values())
            assert entry[metric] == pytest.approx(masked)
            assert entry["clean"][metric] == pytest.approx(clean)
            assert entry["drop"][metric] == pytest.approx(clean - masked)
            assert entry["drop"]["intervals"][metric][0] <= entry["drop"][metric]
    (row,) = [r for r in csv.DictReader((folder / "results.csv").open()) if r["masked"] == "TopK"]
    assert float(row["em"]) == pytest.approx(entries["false"]["em"]) and int(row["n"]) == len(kept)
    assert f"{entries['false']['drop']['em']:.1f}" in (folder / "results.tex").read_text()


def test_drops_in_log_probability(full, demo):
    """The mean over questions of the mean over the answer's tokens, and over the others', from the journals."""
    folder, found = full
    _, tokenizer = demo
    entries = {entry["round"]: entry for entry in json.loads((folder / "results.json").read_text())}
    drops = {"answer_log_prob": [], "format_log_prob": []}
    for question_id, record in found["false"].items():
        unmasked = found["baseline"][question_id]
        inside = prompts.find_answer(tokenizer, unmasked["tokens"])
        change = [before - after for before, after in zip(unmasked["log_probs"], record["log_probs"], strict=True)]
        for name, places in (
            ("answer_log_prob", inside),
            ("format_log_prob", [place for place in range(len(change)) if place not in inside]),
        ):
            if places:
                drops[name].append(sum(change[place] for place in places) / len(places))
    for name, values in drops.items():
        assert entries["false"]["drop"][name] == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert entries["false"]["drop"][name] > 0.05 > abs(entries["true"]["drop"][name])


def test_removed_is_the_mean_of_the_files(full):
    folder, found = full
    samples = json.loads((folder / "activations_baseline.json").read_text())["samples"]
    entries = {entry["round"]: entry for entry in json.loads((folder / "results.json").read_text())}
    expected = [s["removed_topk"][len(s["active"]) // 2 - 1] if len(s["active"]) > 1 else 0 for s in samples]
    assert entries["false"]["removed"] == pytest.approx(mean(expected))
    assert entries["false"]["mean_k"] == pytest.approx(mean(len(s["active"]) // 2 for s in samples) / 100)


def test_shipped_activations_are_round_1_of_the_demo(full):
    """Made again, the shipped file has the same run and the same samples, near-ties in a score aside."""
    folder, _ = full
    made, shipped = (json.loads((f / "activations_baseline.json").read_text()) for f in (folder, ROOT))
    for run in (made["run"], shipped["run"]):
        # What a reader wants to know and nothing is decided by; older files do not have them all.
        for field in ("versions", "device", "batch_tokens", "pool_tokens"):
            run.pop(field, None)
    assert made["run"] == shipped["run"]
    assert [s["id"] for s in made["samples"]] == [s["id"] for s in shipped["samples"]]
    same = 0
    for ours, theirs in zip(made["samples"], shipped["samples"]):
        assert (ours["answer"], ours["em"], ours["f1"]) == (theirs["answer"], theirs["em"], theirs["f1"])
        half = len(ours["active"]) // 2
        assert half <= len(ours["topk"]) <= max(100, half)
        same += all(ours[name][:half] == theirs[name][:half] for name in ("active", "topk", "bottomk"))
    # Another processor's kernels round differently: a latent at its threshold, or two scores that all but agree.
    assert same >= 0.98 * len(made["samples"])


def test_a_report_takes_what_ships_for_its_own_run_alone(tmp_path, monkeypatch, capsys):
    """A folder whose activations were left behind keeps its results: what ships is of another run."""
    given = ["--demo", "--limit", 12, "--error-term", "keep", "--output-dir", tmp_path]
    for script in ("baseline", "baseline_after_false"):
        assert run_script(script, given, monkeypatch, capsys)[0] == 0
    before = (tmp_path / "results.json").read_text()
    (tmp_path / "activations_baseline.json").unlink()
    capsys.readouterr()
    folder = folders.read_folder(tmp_path)
    assert not folder.ranked and "is not there: what it held is left out" in capsys.readouterr().err
    kept = {(entry.round, entry.k) for entry in folder.entries}
    assert kept == {(entry["round"], entry["k"]) for entry in json.loads(before)} and len(kept) == 2
    assert set(folder.answers) <= set(read_journal(tmp_path / "predictions_baseline.jsonl")[1])


def test_shipped_activations_serve_rounds_2_and_3(full, tmp_path, monkeypatch, capsys):
    """`python baseline_after_false.py --demo` in a fresh clone, without round 1: says so, and leaves the file alone."""
    before, (_, found) = (ROOT / "activations_baseline.json").read_bytes(), full
    given = ["--demo", "--output-dir", tmp_path]
    code, out, err = run_script("baseline_after_false", given, monkeypatch, capsys)
    assert code == 0 and "using activations_baseline.json, which ships with the project" in err
    _, ours = read_journal(tmp_path / "predictions_false.jsonl")
    same = sum(ours[question_id]["text"] == record["text"] for question_id, record in found["false"].items())
    assert set(ours) == set(found["false"]) and same >= 0.98 * len(ours)
    assert (ROOT / "activations_baseline.json").read_bytes() == before
    # Of another run it is not used.
    code, out, err = run_script("baseline_after_true", [*given, "--dtype", "bfloat16"], monkeypatch, capsys)
    assert code == 2 and "there is no such file: run this first: python baseline.py --demo" in err


def test_activations_of_the_earlier_length_are_read(tmp_path, monkeypatch, capsys, full):
    """Lists that end at 50%, and neither tokens nor log probabilities: the same answers, without the new columns."""
    folder, found = full
    content = json.loads((folder / "activations_baseline.json").read_text())
    content["run"].pop("error_term")
    for sample in content["samples"]:
        for name in ("tokens", "log_probs", "removed_topk", "removed_bottomk", "accuracy", "named"):
            sample.pop(name)
        for name in ("topk", "bottomk"):
            sample[name] = sample[name][: len(sample["active"]) // 2]
    (tmp_path / "old.json").write_text(json.dumps(content))
    given = ["--demo", "--limit", 60, "--activations", tmp_path / "old.json", "--output-dir", tmp_path / "out"]
    code, out, err = run_script("baseline_after_false", [*given, "--k", "50%", "500"], monkeypatch, capsys)
    assert code == 0 and "baseline's TopK, K = 500: old.json holds fewer latents for" in err
    ours = [read_journal(tmp_path / "out" / f"predictions_false{k}.jsonl")[1] for k in ("", "_k500")]
    assert len(ours[0]) > 50 and [r["text"] for r in ours[0].values()] == [r["text"] for r in ours[1].values()]
    assert all(record["text"] == found["false"][question_id]["text"] for question_id, record in ours[0].items())
    (entry, _) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert entry["drop"]["em"] > 10 and "answer_log_prob" not in entry["drop"] and entry["removed"] is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(full, dtype, tmp_path, monkeypatch, capsys):
    """A half-precision model with a float32 SAE, the default on CUDA: all rounds and rankings, against float32."""
    _, exact = full
    names = ["--ranking", "baseline", "gradsae", "gradsae-answer", "matched", "random"]
    given = ["--dtype", dtype, "--limit", 16, *names]
    _, found = run_rounds(tmp_path, monkeypatch, capsys, *given)
    run, _ = read_journal(tmp_path / "predictions_baseline.jsonl")
    assert (run["dtype"], run["sae_dtype"]) == (dtype, "float32")
    for name in exact:
        both = [question_id for question_id in exact[name] if question_id in found[name]]
        agree = sum(exact[name][question_id]["answer"] == found[name][question_id]["answer"] for question_id in both)
        with capsys.disabled():
            print(f"\n{dtype}, predictions_{name}: {agree} of {len(both)} answers agree with float32", end="")
        wanted = [question_id for question_id in list(exact["baseline"])[:16] if question_id in exact[name]]
        assert len(both) >= 0.95 * len(wanted) and agree >= 0.95 * len(both)


@pytest.mark.parametrize(
    ("dtype", "sae_dtype", "more"),
    [
        ("float16", "float32", ["--ablation", "mean"]),  # the default's precisions
        ("float16", "float16", ["--error-term", "keep", "--exclude-special-tokens"]),
        ("bfloat16", "bfloat16", ["--error-term", "keep", "--ablation", "mean"]),
    ],
)
def test_half_precision_of_other_settings(dtype, sae_dtype, more, tmp_path, monkeypatch, capsys):
    """Error term, mean ablation and special tokens, also with an SAE in half precision, against float32."""
    found, after = {}, "false_mean" if "mean" in more else "false"
    for kind, precisions in (("half", (dtype, sae_dtype)), ("single", ("float32", "float32"))):
        given = ["--limit", 24, "--dtype", precisions[0], "--sae-dtype", precisions[1], *more]
        both_rounds = [ROUNDS[0], ("baseline_after_false", after)]
        found[kind] = run_rounds(tmp_path / kind, monkeypatch, capsys, *given, rounds=both_rounds)[1]
    for name in ("baseline", after):
        half, single = found["half"][name], found["single"][name]
        both = half.keys() & single.keys()
        assert len(both) >= 0.9 * len(single) >= 18
        assert sum(half[i]["answer"] == single[i]["answer"] for i in both) >= 0.9 * len(both)


def test_published_format(full, demo, demo_questions, tmp_path, monkeypatch, capsys):
    """The authors' own file, matched by the prompt's text: same answers, no drop; what cannot be checked is said."""
    folder, found = full
    _, tokenizer = demo
    template = common.choose_template("auto", tokenizer)
    texts = {q.id: prompts.build_prompt(template, q.context, q.question) for q in demo_questions}
    samples = json.loads((folder / "activations_baseline.json").read_text())["samples"][:60]
    theirs = [{}]
    for sample in samples:
        half = len(sample["active"]) // 2
        lists = {"have_gradient": sample["topk"][:half], "no_gradient": sample["bottomk"][:half]}
        theirs.append({texts[sample["id"]]: {"original": sample["active"], **lists}})
    theirs.append({"a prompt of another data set": {"original": [1], "have_gradient": [1], "no_gradient": [1]}})
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    given = ["--demo", "--activations", tmp_path / "theirs.json", "--output-dir", tmp_path]
    for script, name in ROUNDS[1:]:
        code, out, err = run_script(script, given, monkeypatch, capsys)
        assert code == 0 and "cannot be checked" in err and "1 of its 61 questions are not in the data set" in err
        entry = next(e for e in json.loads((tmp_path / "results.json").read_text()) if e["round"] == name)
        assert entry["clean"] is entry["drop"] is None
        assert entry["missing"] == ["a prompt of another data set"] and entry["n"] == 60
        _, ours = read_journal(tmp_path / f"predictions_{name}.jsonl")
        assert {i: r["answer"] for i, r in ours.items()} == {s["id"]: found[name][s["id"]]["answer"] for s in samples}


def test_finished_and_resumed_rounds(tmp_path, monkeypatch, capsys):
    """A journal cut short goes on to the same bytes; a finished one prints its table and loads nothing."""
    arguments = ["--demo", "--limit", "30", "--batch-tokens", "1500", "--output-dir", tmp_path]
    for script, name in ROUNDS:
        code, table, err = run_script(script, arguments, monkeypatch, capsys)
        assert code == 0, err
        whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with monkeypatch.context() as nothing_loads:
            nothing_loads.setattr(common, "load", None)
            code, out, err = run_script(script, arguments, nothing_loads, capsys)
        assert (code, out) == (0, table) and "is finished" in err
        path = tmp_path / f"predictions_{name}.jsonl"
        lines = whole[path.name].splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:20]) + lines[20][:20])  # the 20th record was being written
        code, out, err = run_script(script, arguments, monkeypatch, capsys)
        assert (code, out) == (0, table) and "its last line was cut off" in err
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_device_map(full, tmp_path, monkeypatch, capsys):
    """Placed by the library, on a CPU, the model answers as it does when placed by us."""
    _, found = full
    _, ours = run_rounds(tmp_path, monkeypatch, capsys, "--device-map", "auto", "--limit", 30)
    for name, records in ours.items():
        assert records and all(record["text"] == found[name][i]["text"] for i, record in records.items())
    assert read_journal(tmp_path / "predictions_true.jsonl")[0]["device"] == "auto"


def test_another_runs_files(tmp_path, monkeypatch, capsys):
    """Refused with one line, and untouched; with --overwrite replaced."""
    arguments = ["--demo", "--limit", "20", "--output-dir", tmp_path]
    assert run_script("baseline", arguments, monkeypatch, capsys)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = [*arguments, "--dtype", "bfloat16"]
    for script in ("baseline", "baseline_after_false"):
        code, out, err = run_script(script, other, monkeypatch, capsys)
        assert code == 2 and 'dtype "float32", now "bfloat16"' in err and len(err.splitlines()) == 1
        assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = run_script("baseline", ["--demo", "--limit", 9, *arguments[3:]], monkeypatch, capsys)
    assert code == 2 and "limit 20, now 9" in err
    assert run_script("baseline", [*other, "--overwrite"], monkeypatch, capsys)[0] == 0
    assert run_script("baseline_after_false", other, monkeypatch, capsys)[0] == 0


def test_several_rankings_and_k_at_once(full, tmp_path, monkeypatch, capsys):
    """Three commands: the model is loaded once each, every file is what a single command of its own leaves."""
    names = list(rankings.RANKINGS)
    given = ["--limit", 24, "--ranking", *names]
    loads, load = [], common.load
    monkeypatch.setattr(common, "load", lambda *arguments: loads.append(1) or load(*arguments))
    ks = ["--k", "0", "1", "10", "50%"]
    out, found = run_rounds(tmp_path, monkeypatch, capsys, *given, masks=ks)
    assert len(loads) == 3
    assert all(len(line) <= 100 for line in out.splitlines())
    entries = json.loads((tmp_path / "results.json").read_text())
    assert len(entries) == len(names) * (1 + 2 * 4)
    assert (tmp_path / "results.png").exists()
    _, whole = full
    for name, records in found.items():  # as in the run of the baseline alone, in other batches
        assert all(record["text"] == whole[name][i]["text"] for i, record in records.items())
    texts = {}
    for name in names:
        content = json.loads((tmp_path / f"activations_{name}.json").read_text())
        assert content["run"]["ranking"] == name
        kept = [sample["id"] for sample in content["samples"]]
        assert kept == kept_ids(found["baseline"])
        prefix = "" if name == "baseline" else f"{name}_"
        _, zero = read_journal(tmp_path / f"predictions_{prefix}false_k0.jsonl")
        assert [r["text"] for r in zero.values()] == [found["baseline"][i]["text"] for i in kept]
        texts[name] = [r["text"] for r in read_journal(tmp_path / f"predictions_{prefix}false.jsonl")[1].values()]
    assert len({tuple(text) for text in texts.values()}) >= 4
    # One of them alone, in a folder of its own, and asked for later.
    alone = ["--limit", 24, "--output-dir", tmp_path / "alone", "--demo"]
    for more in ([], ["--ranking", "gradsae"]):
        assert run_script("baseline", [*alone, *more], monkeypatch, capsys)[0] == 0
    for name in ("activations_gradsae.json", "activations_baseline.json", "predictions_gradsae.jsonl"):
        ours, theirs = (samples_of(folder / name) for folder in (tmp_path / "alone", tmp_path))
        assert [s["id"] for s in ours] == [s["id"] for s in theirs]
        same = sum(lists_of(a) == lists_of(b) for a, b in zip(ours, theirs))
        assert same >= 0.95 * len(ours)  # known answers run in one pass: scores that all but agree change places


def samples_of(path):
    return json.loads(path.read_text())["samples"] if path.suffix == ".json" else list(read_journal(path)[1].values())


def lists_of(sample):
    return sample.get("topk", [])[:6], sample.get("bottomk", [])[:3]


def test_the_random_rankings_seed_is_the_files(tmp_path, monkeypatch, capsys):
    """Round 1 with --seed 7; rounds 2 and 3 take ranking and seed from the file, whatever they are given."""
    given = ["--demo", "--limit", 20, "--output-dir", tmp_path, "--ranking", "random"]
    assert run_script("baseline", [*given, "--seed", 7], monkeypatch, capsys)[0] == 0
    code, _, err = run_script("baseline_after_false", given, monkeypatch, capsys)
    assert code == 0, err
    assert read_journal(tmp_path / "predictions_random_false.jsonl")[0]["ranking_seed"] == 7
    entries = json.loads((tmp_path / "results.json").read_text())
    assert {entry["run"]["ranking_seed"] for entry in entries} == {7}
    code, _, err = run_script("baseline", given, monkeypatch, capsys)
    assert code == 2 and "ranking_seed 7, now 42" in err and len(err.splitlines()) == 1


def test_matched_masks_remove_as_much(full, tmp_path, monkeypatch, capsys):
    """As many as it takes and no more, for each K of its own; the table's column is near the baseline's."""
    given = ["--demo", "--limit", 60, "--output-dir", tmp_path, "--ranking", "baseline", "matched"]
    assert run_script("baseline", given, monkeypatch, capsys)[0] == 0
    code, _, err = run_script("baseline_after_false", [*given, "--k", "1", "50%", "10"], monkeypatch, capsys)
    assert code == 0, err
    entries = json.loads((tmp_path / "results.json").read_text())
    removed = {(e["run"]["ranking"], e["k"]): e["removed"] for e in entries if e["round"] == "false"}
    counts = {(e["run"]["ranking"], e["k"]): e["mean_k"] for e in entries if e["round"] == "false"}
    for k in ("1", "50%", "10"):
        assert removed["baseline", k] <= removed["matched", k] <= removed["baseline", k] + 6
    assert counts["matched", "50%"] > 2 * counts["baseline", "50%"]
    # Asked for alone, it needs no other ranking's file; one without what the baseline removes is refused.
    (tmp_path / "activations_baseline.json").unlink()
    alone = ["--demo", "--limit", 60, "--output-dir", tmp_path, "--ranking", "matched", "--k", "2"]
    code, _, err = run_script("baseline_after_false", alone, monkeypatch, capsys)
    assert code == 0, err
    path = tmp_path / "activations_matched.json"
    run, samples = read_activations(path)
    write_activations(path, run, [{k: v for k, v in s.items() if k != "target_topk"} for s in samples])
    code, _, err = run_script("baseline_after_false", [*alone, "--overwrite"], monkeypatch, capsys)
    assert code == 2 and "does not say what the baseline's latents remove" in err


def test_more_latents_than_are_stored(tmp_path, monkeypatch, capsys):
    """That is not TopK of K: round 2 says of which ranking how many are stored, and masks these."""
    given = ["--demo", "--limit", 12, "--output-dir", tmp_path, "--ranking", "baseline", "random"]
    assert run_script("baseline", given, monkeypatch, capsys)[0] == 0
    code, _, err = run_script("baseline_after_false", [*given, "--k", "100", "100000"], monkeypatch, capsys)
    assert code == 0
    samples = {name: samples_of(tmp_path / f"activations_{name}.json") for name in ("baseline", "random")}
    said = [line for line in err.splitlines() if "holds fewer" in line]
    count = len(samples["baseline"])
    assert said == [
        f"{name}'s TopK, K = 100000: activations_{name}.json holds fewer latents for {count} of {count} questions "
        "(100): these are masked, not K."
        for name in ("baseline", "random")
    ]
    entries = json.loads((tmp_path / "results.json").read_text())
    assert (
        {entry["mean_k"] for entry in entries if entry["k"]}
        == {100}
        == {len(sample["topk"]) for of_ranking in samples.values() for sample in of_ranking}
    )
    # Of a file that holds the percentage's list alone, a number beside it is masked as far as the list goes.
    run, _ = read_activations(tmp_path / "activations_random.json")
    for sample in samples["random"]:
        for name in ("topk", "removed_topk"):
            sample[name] = sample[name][: len(sample["active"]) // 2]
    write_activations(tmp_path / "activations_random.json", run, samples["random"])
    halves = [len(sample["topk"]) for sample in samples["random"]]
    given = [*given[:5], "--ranking", "random", "--k", "50"]
    code, _, err = run_script("baseline_after_false", given, monkeypatch, capsys)
    assert code == 0 and f"questions ({min(halves)} to {max(halves)}): these are masked, not K." in err


def test_bottomk_of_matched_says_what_it_removes(tmp_path, monkeypatch, capsys):
    """One latent is more than the baseline's lowest together: the row says how much, and is marked."""
    given = ["--demo", "--limit", 24, "--output-dir", tmp_path, "--ranking", "baseline", "matched"]
    assert run_script("baseline", given, monkeypatch, capsys)[0] == 0
    code, out, err = run_script("baseline_after_true", given, monkeypatch, capsys)
    assert code == 0, err
    baseline, matched = (e for e in json.loads((tmp_path / "results.json").read_text()) if e["k"])
    assert baseline["missed_target"] is None
    missed, removed = 0, []
    for sample in samples_of(tmp_path / "activations_matched.json"):
        target = [0, *sample["target_bottomk"]][len(sample["active"]) // 2]
        count = next(n for n, value in enumerate([0, *sample["removed_bottomk"]]) if value >= target)
        removed.append([0, *sample["removed_bottomk"]][count])
        missed += not 0.5 * target <= removed[-1] <= 1.5 * target
    assert matched["removed"] == pytest.approx(mean(removed)) and matched["removed"] > baseline["removed"]
    assert matched["missed_target"] == missed > 0.1 * matched["n"]
    assert re.search(rf"\nmatched +{matched['removed']:.1f}\* ", out) and "\n*: " in out


def test_kept_from_an_f1_of_0_9_on(full, demo_questions, tmp_path, monkeypatch, capsys):
    """Not exact matches alone. With answers of ten words, for the demo's are short."""
    more = "one two three four five six seven eight nine".split()
    chosen = [q for q in demo_questions if full[1]["baseline"][q.id]["em"] and len(q.truths[0].split()) == 1][:3]
    rows = [
        {"id": q.id, "context": q.context, "question": q.question,
         "answers": {"text": [" ".join([q.truths[0], *more[: 9 - wrong], *["other"] * wrong])]}}
        for wrong, q in enumerate(chosen)
    ]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parse = common.parse_answer
    monkeypatch.setattr(common, "parse_answer", lambda text: " ".join([parse(text), *more]))
    given = ["--dataset", tmp_path / "questions.jsonl"]
    _, found = run_rounds(tmp_path, monkeypatch, capsys, *given, rounds=ROUNDS[:1])
    assert [record["f1"] for record in found["baseline"].values()] == [1.0, 0.9, 0.8]
    samples = json.loads((tmp_path / "activations_baseline.json").read_text())["samples"]
    assert [sample["id"] for sample in samples] == [q.id for q in chosen[:2]]


def test_nothing_kept(tmp_path, monkeypatch, capsys):
    """A round 1 that keeps no question says so, whatever the ranking; there is nothing to mask then."""
    questions = [json.loads(line) for line in (ROOT / "demo" / "questions.jsonl").read_text().splitlines()[:5]]
    lines = [json.dumps(question | {"answers": {"text": ["quite another answer"]}}) for question in questions]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    arguments = ["--demo", "--dataset", tmp_path / "questions.jsonl", "--output-dir", tmp_path]
    arguments += ["--ranking", "baseline", "gradsae"]
    code, out, err = run_script("baseline", arguments, monkeypatch, capsys)
    assert code == 0 and "0 answered right and kept" in out and "No question was kept" in out
    code, _, err = run_script("baseline_after_false", arguments, monkeypatch, capsys)
    assert code == 2 and "kept no question" in err and len(err.splitlines()) == 1


def test_questions_that_are_too_long(tmp_path, monkeypatch, capsys):
    """Left out, and counted and named wherever the figures of the others stand, who answer as without them."""
    rows = [json.loads(line) for line in (ROOT / "demo" / "questions.jsonl").read_text().splitlines()[:8]]
    too_long = rows[0] | {"id": "<the long one>", "context": "The harp. " * 300}
    longer = rows[1] | {"id": "longer", "context": rows[1]["context"] + " harp" * 500}
    found = {}
    for name, asked in (("without", rows), ("with", [rows[0], too_long, *rows[1:], longer])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
        given = ["--dataset", tmp_path / name / "questions.jsonl"]
        out, found[name] = run_rounds(tmp_path / name, monkeypatch, capsys, *given)
        assert ("2 left out as too long" in " ".join(out.split())) == (name == "with")
    assert found["with"] == found["without"] and list(found["with"]["baseline"]) == [row["id"] for row in rows]

    entries = json.loads((tmp_path / "with" / "results.json").read_text())
    assert [entry["left_out"] for entry in entries] == [["<the long one>", "longer"], [], []]
    assert [entry.get("asked") for entry in entries] == [8, None, None]
    table = list(csv.DictReader((tmp_path / "with" / "results.csv").read_text().splitlines()))
    assert [(row["questions"], row["n"], row["left_out"]) for row in table[:2]] == [
        ("all asked", "8", "2"),
        ("kept", "8", ""),
    ]
    assert "left out, too long for the model&#39;s context" in (tmp_path / "with" / "results.html").read_text()
    assert "2: &lt;the long one&gt;, longer" in (tmp_path / "with" / "results.html").read_text()
    assert "left out, too long" not in (tmp_path / "without" / "results.html").read_text()

    monkeypatch.setattr("common.load", None)
    code, out, err = run_script("baseline", ["--demo", "--output-dir", tmp_path / "with", *given], monkeypatch, capsys)
    assert code == 0 and "0 right but without any [ to rank at, 2 left out as too long." in out
    assert "This round is finished" in err
    says = "2 questions do not fit the model's context of 512 tokens, with an answer of 50: they are left out "
    assert says + "(<the long one>, longer)" in err


def test_a_question_that_just_fits(demo, demo_questions, tmp_path, monkeypatch):
    """The context holds the prompt and the longest answer, and not a token more."""
    _, tokenizer = demo
    question = demo_questions[0]
    template = common.choose_template("auto", tokenizer)
    length = len(prompts.tokenize(tokenizer, prompts.build_prompt(template, question.context, question.question)))
    experiment = common.prepare(options("--limit", 1, "--max-new-tokens", 512 - length))
    assert (experiment.asked, experiment.lengths, experiment.left_out) == ([question], {question.id: length}, [])
    with pytest.raises(UserError, match="no selected question fits the model's context of 512 tokens"):
        common.prepare(options("--limit", 1, "--max-new-tokens", 513 - length))


def test_nothing_in_the_brackets(tmp_path, monkeypatch, capsys, demo):
    """gradsae-answer has no score then: the question stays, its lists are empty, and the table says for how many."""
    monkeypatch.setattr(prompts, "find_answer", lambda tokenizer, tokens: [])
    given = ["--demo", "--limit", 10, "--output-dir", tmp_path, "--ranking", "gradsae-answer"]
    assert run_script("baseline", given, monkeypatch, capsys)[0] == 0
    code, _, err = run_script("baseline_after_false", given, monkeypatch, capsys)
    samples = json.loads((tmp_path / "activations_gradsae-answer.json").read_text())["samples"]
    says = (
        f"K = 50%: activations_gradsae-answer.json holds fewer latents for {len(samples)} of {len(samples)} questions"
    )
    assert code == 0 and f"gradsae-answer's TopK, {says} (0)" in err
    assert len(read_journal(tmp_path / "predictions_gradsae-answer_false.jsonl")[1]) == len(samples)


def test_questions_of_other_forms(demo_questions, tmp_path, monkeypatch, capsys):
    """The demo's first questions by way of `datasets` and in SQuAD's form answer as they do line by line."""
    from test_questions import UNANSWERABLE, write

    rows = [
        {"id": q.id, "context": q.context, "question": q.question,
         "answers": {"text": list(q.truths), "answer_start": [0] * len(q.truths)}}
        for q in demo_questions[:12]
    ]  # fmt: skip
    found = []
    for form in ("lines", "nested", "folder"):
        arguments = ["--demo", "--dataset", write(form, [*rows, UNANSWERABLE], tmp_path)]
        arguments += ["--split", "validation", "--output-dir", tmp_path / form]
        code, _, err = run_script("baseline", arguments, monkeypatch, capsys)
        assert code == 0 and "1 questions without a ground truth are left out" in err
        found.append(read_journal(tmp_path / form / "predictions_baseline.jsonl")[1])
    assert found[0] == found[1] == found[2] and len(found[0]) == 12


def test_k_of_a_question():
    assert [masks.count_masked(k, 27) for k in ("50%", "10%", "1%", "7", "99", "0")] == [13, 2, 0, 7, 99, 0]
    reached = [masks.count_to_reach([1.0, 2.0, 3.0], target) for target in (0.5, 1.0, 2.0, 2.5, 9.0)]
    assert reached == [1, 1, 2, 3, 3]  # as much is enough, and all where nothing is
    assert masks.count_to_reach([1.0, 2.0], 0) == 0


def test_activations_of_different_questions(full, tmp_path, monkeypatch, capsys):
    folder, _ = full
    run, samples = read_activations(folder / "activations_baseline.json")
    write_activations(tmp_path / "activations_baseline.json", run, samples)
    write_activations(tmp_path / "activations_gradsae.json", run | {"ranking": "gradsae"}, samples[:9])
    given = ["--demo", "--output-dir", tmp_path, "--ranking", "baseline", "gradsae"]
    code, _, err = run_script("baseline_after_false", given, monkeypatch, capsys)
    assert code == 2 and "of different unmasked answers" in err and len(err.splitlines()) == 1


def test_mean_ablation(full, demo, demo_questions, tmp_path, monkeypatch, capsys):
    """Masked latents stand at their mean over the kept questions' positions, also where they were not active."""
    given = ["--demo", "--limit", 20, "--output-dir", tmp_path, "--ablation", "mean"]
    code, _, err = run_script("baseline_after_false", [*given, "--activations", full[0] / "activations_baseline.json"],
                              monkeypatch, capsys)  # fmt: skip
    assert code == 2 and "run this first: python baseline.py --demo --limit 20 --ablation mean" in err
    for script, _ in ROUNDS[:2]:
        assert run_script(script, given, monkeypatch, capsys)[0] == 0
    (model, tokenizer), by_id = demo, {question.id: question for question in demo_questions}
    sae, samples = model.splice.sae, json.loads((tmp_path / "activations_baseline.json").read_text())["samples"]
    prompts_of = [oracle.encode_prompt(tokenizer, by_id[s["id"]].context, by_id[s["id"]].question) for s in samples]
    acts = []

    def keep(residual, hook):
        acts.append(sae.encode(residual)[0])

    with torch.no_grad(), model.model.hooks(fwd_hooks=[(model.hook_name, keep)]):
        for sample, prompt in zip(samples, prompts_of):
            model.model(torch.tensor([prompt + sample["tokens"][:-1]]))
    means = torch.cat(acts).mean(0)
    stored = torch.tensor(json.loads((tmp_path / "means.json").read_text())["means"])
    torch.testing.assert_close(stored, means, rtol=1e-4, atol=1e-5)
    # What is removed is what mean ablation changes, at the positions before the [ whose tokens are not special.
    of_means = samples_of(tmp_path / "activations_baseline_mean.json")
    special = prompts.find_special_ids(tokenizer)
    changes = []
    for sample, of_mean in zip(samples, of_means, strict=True):
        count = len(sample["active"]) // 2
        changes.append(of_mean["removed_topk"][count - 1])
        assert of_mean["topk"] == sample["topk"] and of_mean["removed_topk"] != sample["removed_topk"]
    for sample, of_mean, prompt in list(zip(samples, of_means, prompts_of))[:3]:
        ids = prompt + sample["tokens"][: prompts.find_bracket(tokenizer, sample["tokens"])]
        ordinary = torch.tensor([token not in special for token in ids])
        seen = []
        with torch.no_grad(), model.model.hooks(fwd_hooks=[(model.hook_name, lambda x, hook, to=seen: to.append(x))]):
            model.model(torch.tensor([ids]))
        for which in ("topk", "bottomk"):
            expected = oracle.removed_shares(sae, seen[0][0, ordinary], sample[which][:6], means)
            assert of_mean[f"removed_{which}"][:6] == pytest.approx(expected, rel=2e-3)
    (entry,) = [e for e in json.loads((tmp_path / "results.json").read_text()) if e["k"]]
    assert entry["removed"] == pytest.approx(mean(changes))
    run, found = read_journal(tmp_path / "predictions_false_mean.jsonl")
    assert run["ablation"] == "mean" and len(found) == len(samples)
    zeroed = full[1]["false"]
    for sample, prompt in zip(samples[:8], prompts_of):
        latents = sample["topk"][: len(sample["active"]) // 2]

        def replace(residual, hook, latents=latents):
            values = sae.encode(residual).clone()
            values[:, :, latents] = means[latents]
            return sae.decode(values)

        generated = []
        while len(generated) < 50 and not (generated and generated[-1] in model.end_ids):
            with torch.no_grad(), model.model.hooks(fwd_hooks=[(model.hook_name, replace)]):
                generated.append(int(model.model(torch.tensor([prompt + generated]))[0, -1].argmax()))
        assert found[sample["id"]]["text"] == tokenizer.decode(generated)
    assert any(found[i]["log_probs"] != zeroed[i]["log_probs"] for i in found)


def test_matched_to_what_mean_ablation_changes(tmp_path, monkeypatch, capsys):
    """As many latents as it takes to change as much as the baseline's do when they are set to their means."""
    given = ["--demo", "--limit", 16, "--output-dir", tmp_path, "--ranking", "baseline", "matched"]
    for script, more in (("baseline", []), ("baseline_after_false", ["--k", "1", "50%"])):
        for ablation in ("zero", "mean"):
            code, _, err = run_script(script, [*given, *more, "--ablation", ablation], monkeypatch, capsys)
            assert code == 0, err
    masked = [e for e in json.loads((tmp_path / "results.json").read_text()) if e["k"] == "50%"]
    found = {(e["run"]["ranking"], e["run"]["ablation"]): e for e in masked}
    for ablation in ("zero", "mean"):
        target, removed = (found[name, ablation]["removed"] for name in ("baseline", "matched"))
        assert target <= removed < target + 3
    assert abs(found["baseline", "zero"]["removed"] - found["baseline", "mean"]["removed"]) > 0.1
    assert found["matched", "zero"]["mean_k"] != found["matched", "mean"]["mean_k"]
    # The page shows the latents that were masked, of each ablation its own.
    read = folders.read_folder(tmp_path)
    for entry, _ in read.masked:
        shown = [len(folders.find_masked_latents(read, entry, question_id)) for question_id in read.kept]
        assert sum(shown) / len(shown) == pytest.approx(entry.mean_k)
    # Files that do not belong together are refused.
    path = tmp_path / "activations_matched_mean.json"
    run, samples = read_activations(path)
    samples[0]["topk"] = samples[0]["topk"][::-1]
    write_activations(path, run, samples)
    code, _, err = run_script("baseline_after_true", [*given, "--ablation", "mean"], monkeypatch, capsys)
    assert code == 2 and f"{path}: has other lists than activations_matched.json" in err
    path.unlink()
    code, _, err = run_script("baseline_after_true", [*given, "--ablation", "mean"], monkeypatch, capsys)
    assert code == 2 and f"{path}: there is no such file: run this first: python baseline.py" in err
