"""Two figures side by side are of one run, or they are refused: the rounds of the demo, and what is changed between."""

import json
import re
import shlex
import shutil

import pytest
import torch
from conftest import ROOT, read_activations, read_journal, run_script, write_activations
from safetensors.torch import load_file, save_file

from experiment import UserError, guard
from experiment.records import files
from experiment.report import __main__ as report
from experiment.report import figure, folders, page_data, tables

ROUND_1, ROUND_2, ROUND_3 = "baseline", "baseline_after_false", "baseline_after_true"


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """It takes longer than a round of few questions."""
    monkeypatch.setattr(figure, "draw", lambda entries: {})


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(script, *arguments): a demo round that ends well, in the folder `out`. Returns stdout and stderr."""

    def check(script, *arguments):
        given = ["--demo", "--output-dir", tmp_path / "out", *arguments]
        code, out, err = run_script(script, given, monkeypatch, capsys)
        assert code == 0, err
        return out, err

    return check


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(script, *arguments): a round that stops with one line, which is returned, and touches no file."""

    def check(script, *arguments):
        before = read_files(tmp_path)
        given = ["--demo", "--output-dir", tmp_path / "out", *arguments]
        code, out, err = run_script(script, given, monkeypatch, capsys)
        lines = [line for line in err.splitlines() if "looks like a base model" not in line]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert "null" not in err and not any(len(word) > 60 for word in err.split() if "/" not in word), err
        assert read_files(tmp_path) == before
        return err

    return check


@pytest.fixture
def run_report(monkeypatch, capsys):
    """run_report(*folders): the report, which ends well. Returns stdout and stderr."""

    def check(*given):
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, given)])
        capsys.readouterr()
        code = guard(report.main)
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, err

    return check


def read_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def read_entries(folder):
    return json.loads((folder / "results.json").read_text())


def follow(line, run):
    """Runs the command of round 1 that an error names."""
    words = shlex.split(line[line.index("python baseline.py") :])
    return run(ROUND_1, *words[2:])


def cut(path, records):
    """A journal as if its round had been interrupted after so many records."""
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) > records + 1
    path.write_bytes(b"".join(lines[: records + 1]))


def change_sample(path, **changed):
    """Changes the last sample of a file of activations; a function gets the field's value."""
    made, samples = read_activations(path)
    samples[-1] |= {name: change(samples[-1][name]) for name, change in changed.items()}
    write_activations(path, made, samples)


# ---------------------------------------------------------------------------------------------------------------------
# What a masked round depends on


def test_zero_and_mean_ablation_in_one_folder(run, run_report, tmp_path):
    """The report changes no figure, and the page shows each mask once, with its own answers."""
    out = tmp_path / "out"
    run(ROUND_1, "--limit", 24, "--ablation", "mean")
    run(ROUND_2, "--limit", 24)
    run(ROUND_2, "--limit", 24, "--ablation", "mean")
    before = (out / "results.json").read_bytes()
    figures = {entry["run"].get("ablation"): entry["em"] for entry in read_entries(out)}
    assert figures["zero"] != figures["mean"]
    run_report(out)
    assert (out / "results.json").read_bytes() == before
    found = folders.read_folder(out)
    assert [tables.name_mask(entry) for entry, _ in found.masked] == ["TopK", "TopK mean"]
    for name, (_, [records]) in zip(("predictions_false", "predictions_false_mean"), found.masked):
        assert {i: record.fields() for i, record in records.items()} == read_journal(out / f"{name}.jsonl")[1]
    assert len(page_data.collect(found)["masks"]) == 2


EDITS = {
    "active": lambda latents: latents[:-1],
    "topk": lambda latents: [latents[1], latents[0], *latents[2:]],
    "removed_topk": lambda shares: [share / 2 for share in shares],
    "target_topk": lambda shares: [share / 2 for share in shares],
    "tokens": lambda tokens: [7, *tokens[1:]],
    "inside": lambda places: [*places, 0],
    "log_probs": lambda values: [-1.0, *values[1:]],
    "em": lambda value: 1.0 - value,
}


def test_all_that_a_masked_round_uses_of_the_activations(run, refused, tmp_path):
    """Edited between an interrupted round 2 and its continuation, even where that question was yet to come."""
    out = tmp_path / "out"
    given = ["--limit", 12, "--ranking", "matched"]
    run(ROUND_1, *given)
    run(ROUND_2, *given)
    cut(out / "predictions_matched_false.jsonl", 5)
    whole = (out / "activations_matched.json").read_bytes()
    for field, change in EDITS.items():
        change_sample(out / "activations_matched.json", **{field: change})
        line = refused(ROUND_2, *given)
        assert "predictions_matched_false.jsonl: is of another run (activations " in line, field
        (out / "activations_matched.json").write_bytes(whole)
    of_other_mask = dict.fromkeys(("bottomk", "removed_bottomk"), lambda values: values[1:])
    change_sample(out / "activations_matched.json", **of_other_mask)
    run(ROUND_2, *given)


def test_means_are_of_one_round(run, refused, tmp_path):
    out = tmp_path / "out"
    given = ["--limit", 12, "--ablation", "mean"]
    run(ROUND_1, *given)
    run(ROUND_2, *given)
    cut(out / "predictions_false_mean.jsonl", 5)
    content = json.loads((out / "means.json").read_text())
    content["means"][3] += 0.5
    (out / "means.json").write_text(json.dumps(content))
    assert "predictions_false_mean.jsonl: is of another run (means " in refused(ROUND_2, *given)


def test_means_made_for_more_questions_serve_fewer(run, refused, tmp_path):
    run(ROUND_1, "--limit", 12, "--ablation", "mean")
    run(ROUND_2, "--limit", 5, "--ablation", "mean")
    _, records = read_journal(tmp_path / "out" / "predictions_false_mean.jsonl")
    assert 0 < len(records) <= 5
    # And not the other way round: round 1 has gone on without them.
    run(ROUND_1, "--limit", 20)
    line = refused(ROUND_3, "--limit", 20, "--ablation", "mean")
    assert "means.json: round 1 never asked 8 of the 20 selected questions" in line
    follow(line, run)
    run(ROUND_3, "--limit", 20, "--ablation", "mean")


# ---------------------------------------------------------------------------------------------------------------------
# Names of folders


def change_weights(folder):
    """Another SAE, or another model, under the same name."""
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    name = next(name for name in weights if name == "W_dec" or name.endswith("mlp.down_proj.weight"))
    weights[name] = weights[name][torch.randperm(len(weights[name]))].contiguous()
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("option, name", [("--sae-release", "sae"), ("--model", "model")])
def test_weights_that_changed_in_their_folder(option, name, run, refused, tmp_path):
    """Never "finished", and never mixed with what is there; the commands that the lines name lead on."""
    folder = tmp_path / name
    shutil.copytree(ROOT / "demo" / name, folder)
    given = ["--limit", 8, option, folder]
    run(ROUND_1, *given)
    run(ROUND_2, *given)
    change_weights(folder)
    for script in (ROUND_1, ROUND_2, ROUND_3):
        line = refused(script, *given)
        field = option.removeprefix("--").replace("-", "_")
        assert re.search(rf"is of another run \({field} \S+ \(content \w{{8}}\), now \S+ \(content \w{{8}}\)\)", line)
    follow(line, run)
    (entry,) = read_entries(tmp_path / "out")  # what was masked before is of the other weights
    assert entry["round"] == "baseline"


def test_one_folder_spelled_in_two_ways(run, run_report, tmp_path, monkeypatch):
    """Is one run, of the SAE, the model and the questions: no column tells the spellings apart."""
    for name in ("sae", "model"):
        shutil.copytree(ROOT / "demo" / name, tmp_path / name)
    shutil.copy(ROOT / "demo" / "questions.jsonl", tmp_path / "q.jsonl")
    monkeypatch.chdir(tmp_path)
    run(ROUND_1, "--limit", 8, "--sae-release", tmp_path / "sae", "--model", "model", "--dataset", "q.jsonl")
    given = ["--sae-release", f"{tmp_path}/sae/", "--model", "./model", "--dataset", tmp_path / "q.jsonl"]
    run(ROUND_2, "--limit", 8, *given)
    assert "This round is finished" in run(ROUND_1, "--limit", 8, *given)[1]
    out, _ = run_report(tmp_path / "out")
    assert out.startswith("Masking the ")
    assert [*tables.build_table(folders.read_entries(tmp_path / "out" / "results.json")).masked] == [
        "none",
        "none",
        "TopK",
    ]


def test_folders_whose_saes_are_called_the_same(run, run_report, tmp_path, monkeypatch):
    """Are told apart by a column, the beginning of the digest."""
    shutil.copytree(ROOT / "demo" / "sae", tmp_path / "sae")
    for name in ("a", "b"):
        run(ROUND_1, "--limit", 5, "--sae-release", tmp_path / "sae", "--output-dir", tmp_path / name)
        change_weights(tmp_path / "sae")
    out, _ = run_report(tmp_path / "a", tmp_path / "b", "--output-dir", tmp_path / "both")
    digests = [read_entries(tmp_path / name)[0]["run"]["sae_digest"] for name in ("a", "b")]
    assert digests[0] != digests[1]
    assert all(f"sae_digest {digest[:8]}, error term dropped" in out for digest in digests)


# ---------------------------------------------------------------------------------------------------------------------
# Several rankings


@pytest.mark.parametrize("change", ["tokens", "kept"])
def test_rankings_of_different_unmasked_answers(change, run, refused, tmp_path):
    """One draft and one reference cannot stand for both: refused, and the command in the line leads out of it."""
    given = ["--limit", 12, "--ranking", "baseline", "gradsae"]
    run(ROUND_1, *given)
    path = tmp_path / "out" / "predictions_gradsae.jsonl"
    made, records = read_journal(path)
    last = [record for record in records.values() if "active" in record][-1]
    if change == "tokens":
        last["tokens"] = [last["tokens"][0] + 1, *last["tokens"][1:]]
    else:
        of_wrong = ("id", "text", "answer", "em", "f1", "accuracy", "named", "log_probs")
        records[last["id"]] = {field: last[field] for field in of_wrong}
    path.write_text("\n".join(map(json.dumps, [{"run": made}, *records.values()])) + "\n")
    run(ROUND_1, *given)  # finished: the activations are made of the journals
    line = refused(ROUND_2, *given)
    assert "are of different unmasked answers (question " in line and last["id"] in line
    run(ROUND_2, "--limit", 12, "--ranking", "gradsae")  # as the line says
    follow(line, run)
    _, err = run(ROUND_2, *given, "--overwrite")
    kept = {entry["n"] for entry in read_entries(tmp_path / "out")}
    assert len(kept) == 1 and "left out" not in err


# ---------------------------------------------------------------------------------------------------------------------
# Entries of results.json, and the page


def test_round_1_again_with_another_seed(run, refused, run_report, tmp_path):
    """What was masked before goes from the table and the page, with a line each: such latents were never masked now."""
    given = ["--limit", 8, "--ranking", "random"]
    out = tmp_path / "out"
    run(ROUND_1, *given)
    run(ROUND_2, *given)
    run(ROUND_3, *given)
    assert [entry.get("journal") for entry in read_entries(out)] == [
        f"predictions_random{which}.jsonl" for which in ("", "_false", "_true")
    ]
    _, err = run(ROUND_1, *given, "--seed", 7, "--overwrite")
    lines = [line for line in err.splitlines() if "left out" in line]
    assert len(lines) == 2 and all("activations_random.json has other latents or answers now" in line for line in lines)
    assert [entry["round"] for entry in read_entries(out)] == ["baseline"]
    assert folders.read_folder(out).masked == []
    assert "ranking_seed 42, now 7" in refused(ROUND_2, *given)
    run(ROUND_2, *given, "--overwrite")
    ((entry, _),) = folders.read_folder(out).masked
    assert entry.provenance.ranking_seed == 7
    run_report(out)
    assert [entry["round"] for entry in read_entries(out)] == ["baseline", "false"]


def test_a_journal_of_another_run_takes_its_entry_along(run, run_report, tmp_path):
    """Begun again with other options and interrupted: its old figures stand beside no new answers."""
    run(ROUND_1, "--limit", 8)
    run(ROUND_2, "--limit", 8)
    path = tmp_path / "out" / "predictions_false.jsonl"
    made, records = read_journal(path)
    path.write_text(json.dumps({"run": made | {"activations": "0" * 64}}) + "\n")
    _, err = run_report(tmp_path / "out")
    assert "baseline TopK at K = 50% is left out: predictions_false.jsonl is of another run (activations " in err
    assert [entry["round"] for entry in read_entries(tmp_path / "out")] == ["baseline"]


def test_the_report_locks_before_it_reads(run, run_report, tmp_path, monkeypatch):
    """A round that finishes meanwhile would be lost from results.json."""
    run(ROUND_1, "--limit", 5)
    read, held = folders.read_folder, []

    def watch(path, *given):
        try:
            with files.lock(path):
                pass
        except UserError:
            held.append(path)
        return read(path, *given)

    monkeypatch.setattr(folders, "read_folder", watch)
    run_report(tmp_path / "out")
    assert held == [tmp_path / "out"]


# ---------------------------------------------------------------------------------------------------------------------
# Which questions are asked


def test_questions_that_round_1_never_asked(run, refused, tmp_path):
    """Are an error in one line, and both ways out that it names lead out."""
    run(ROUND_1, "--sample", 12, "--seed", 7)
    run(ROUND_2, "--sample", 12, "--seed", 7)
    line = refused(ROUND_3, "--sample", 12)
    assert "round 1 never asked " in line and "give --sample 12 --seed 7, as in round 1, or run this first: " in line
    assert "never asked" in refused(ROUND_3)
    assert "never asked" in refused(ROUND_3, "--limit", 12)
    run(ROUND_3, "--sample", 12, "--seed", 7)
    assert len({entry["n"] for entry in read_entries(tmp_path / "out")}) == 1
    follow(line, run)
    run(ROUND_3, "--sample", 12, "--overwrite")
    entries = read_entries(tmp_path / "out")
    assert [entry["round"] for entry in entries] == ["baseline", "true"] and entries[0]["n"] == entries[1]["n"]


def test_fewer_questions_than_round_1_asked(run, tmp_path):
    run(ROUND_1, "--limit", 12)
    run(ROUND_2, "--limit", 5)
    _, unmasked = read_journal(tmp_path / "out" / "predictions_baseline.jsonl")
    _, masked = read_journal(tmp_path / "out" / "predictions_false.jsonl")
    assert list(masked) == [name for name in list(unmasked)[:5] if "active" in unmasked[name]]


@pytest.mark.parametrize("first, more", [(["--limit", 10], ["--limit", 20]), (["--sample", 5, "--seed", 3], [])])
def test_more_questions_go_on_from_fewer(first, more, run, refused, tmp_path):
    """All three rounds: what was answered is kept to the letter, and the end is that of one round of all of them."""
    data = tmp_path / "q.jsonl"
    data.write_text("".join((ROOT / "demo" / "questions.jsonl").read_text().splitlines(keepends=True)[:24]))
    given = ["--dataset", data, "--batch-tokens", 1000]
    names = {ROUND_1: "baseline", ROUND_2: "false", ROUND_3: "true"}
    before = {}
    for script, name in names.items():
        run(script, *given, *first)
        before[name] = read_journal(tmp_path / "out" / f"predictions_{name}.jsonl")[1]
    marked = next(iter(before["baseline"]))
    mark_answer(tmp_path / "out" / "predictions_baseline.jsonl", marked)
    for script, name in names.items():
        run(script, *given, *more)
        made, records = read_journal(tmp_path / "out" / f"predictions_{name}.jsonl")
        assert (made["limit"], made["sample"]) == (more[1] if more else None, None)
        assert len(records) > len(before[name]) and records.keys() >= before[name].keys()
        if name != "baseline":
            assert all(records[i] == record for i, record in before[name].items())
    assert read_journal(tmp_path / "out" / "predictions_baseline.jsonl")[1][marked]["text"] == "kept as it was"
    for script in names:
        run(script, *given, *more, "--output-dir", tmp_path / "at once")
    for name in names.values():
        ours, whole = (read_journal(tmp_path / f / f"predictions_{name}.jsonl") for f in ("out", "at once"))
        assert ours[0] == whole[0] and list(ours[1]) == list(whole[1])
        same = [ours[1][i]["answer"] == whole[1][i]["answer"] for i in whole[1] if i != marked]
        assert all(same)
    entries = [read_entries(tmp_path / f) for f in ("out", "at once")]
    assert [[entry["n"], entry["em"]] for entry in entries[0]] == [[entry["n"], entry["em"]] for entry in entries[1]]
    # The other way round nothing is dropped.
    assert "is of another run" in refused(ROUND_1, *given, *first)


def mark_answer(path, question_id):
    """Changes a text in a journal, to see whether it is kept."""
    made, records = read_journal(path)
    records[question_id]["text"] = "kept as it was"
    lines = [json.dumps(line, ensure_ascii=False) for line in ({"run": made}, *records.values())]
    path.write_text("\n".join(lines) + "\n")


def test_more_questions_in_one_batch_are_the_same_bytes(run, tmp_path):
    """Where the batches are those of one round, so is every byte."""
    given = ["--batch-tokens", 1]
    for limit in (3, 6):
        run(ROUND_1, "--limit", limit, *given)
        run(ROUND_2, "--limit", limit, *given)
    for script in (ROUND_1, ROUND_2):
        run(script, "--limit", 6, *given, "--output-dir", tmp_path / "at once")
    files = [{path.name: path.read_bytes() for path in (tmp_path / f).glob("*.json*")} for f in ("out", "at once")]
    assert files[0] == files[1] and len(files[0]) == 4


def test_the_papers_figures_stand_beside_whole_data_sets_only():
    """Whatever the masked round's own command said: round 1 selected."""
    from test_report import PAPERS, build_table, masked, unmasked

    for selection in ({"limit": 1000}, {"sample": 1000, "seed": 7}):
        entries = [unmasked(run=PAPERS | selection), masked("baseline", "topk", "50%", 0.0, run=PAPERS)]
        assert build_table(entries).paper_em.isna().all()
        other = [unmasked(run=PAPERS, population="beef" * 16), entries[1] | {"population": "beef" * 16}]
        assert build_table(entries[:1] + other).paper_em.dropna().tolist() == [53.42]


# ---------------------------------------------------------------------------------------------------------------------
# What a person is told


def test_the_command_of_round_1_that_is_missing(refused, run, tmp_path):
    """With all options that it takes, and none that it does not: pasted, it makes what the round asked for."""
    given = ["--limit", 6, "--ranking", "gradsae", "matched", "--error-term", "keep", "--exclude-special-tokens"]
    template = tmp_path / "a template.txt"
    template.write_text("{context} {question}\n<start_of_turn>")
    given += ["--max-new-tokens", 9, "--prompt-template", template]
    line = refused(ROUND_3, *given, "--k", 1, "10%")
    assert "activations_gradsae.json: there is no such file: run this first: python baseline.py --demo " in line
    assert "--k" not in line and "--overwrite" not in line and shlex.quote(str(template)) in line
    follow(line, run)
    assert (tmp_path / "out" / "predictions_matched.jsonl").exists()


def test_where_the_page_is(run, tmp_path):
    run(ROUND_1, "--limit", 5)
    for script in (ROUND_2, ROUND_3):
        out, _ = run(script, "--limit", 5)
        assert out.endswith(f"\nThe page: {tmp_path / 'out' / 'results.html'}\n")


@pytest.mark.parametrize("more, says", [([], "; the same command goes on"), (["--overwrite"], "without --overwrite")])
def test_ctrl_c_says_how_to_go_on(more, says, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["baseline.py", "--demo", *more])
    assert guard(interrupted) == 130
    assert says in capsys.readouterr().err


def test_effects_are_of_latents_that_the_rankings_beside_them_put_first(run, refused):
    """Where not all are measured: with other rankings beside it, a round that went on would mix two kinds of lists."""
    some = ["--effects", 10, "--ranking"]
    run(ROUND_1, "--limit", 8, *some, "baseline", "effect")
    line = refused(ROUND_1, "--limit", 16, *some, "baseline", "random", "effect")
    assert 'activations_effect.json: is of another run (measured_for "baseline", now "baseline, random 42")' in line
    run(ROUND_1, "--limit", 16, *some, "effect", "baseline")  # in any order
    everything = ["--effects", 512, "--ranking"]
    run(ROUND_1, "--limit", 8, *everything, "baseline", "effect", "--overwrite")
    run(ROUND_1, "--limit", 16, *everything, "baseline", "random", "effect")
