"""The table of all results, what the paper has beside it, and the CSV; on made-up entries of results.json."""

import csv
import io
import json
import re
import subprocess
import sys

import pandas
import pytest
from made_entries import LAYERS, PAPERS, PERCENT, TEMPLATE, comparison, estimate, masked, parse, several, unmasked

from experiment import UserError
from experiment.records.entries import parse_entry
from experiment.report import blocks, latex, metrics, page, tables, terminal


def to_text(entries):
    return terminal.to_text(parse(entries))


def to_csv(entries):
    return [*csv.DictReader(io.StringIO(tables.to_csv(parse(entries))))]


def build_table(entries):
    return tables.build_table(parse(entries))


def find_published(entry):
    return tables.find_published(parse_entry(entry))


def rows(table, *columns):
    return table[list(columns)].values.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_order_of_rows():
    rankings = ("random", "zebra", "matched", "gradsae-answer", "aardvark", "gradsae", "baseline")
    entries = [masked(r, m, k, 50.0) for r in rankings for k in ("50%", "10", "1") for m in ("bottomk", "topk")]
    table = build_table([*entries[:9], unmasked(), *entries[9:]])
    assert rows(table, "ranking", "masked", "questions")[:2] == [["", "none", "all asked"], ["", "none", "kept"]]
    order = ("aardvark", "baseline", "gradsae", "gradsae-answer", "matched", "random", "zebra")
    assert rows(table[2:], "ranking", "masked", "k") == [
        [r, m, k] for r in order for m in ("TopK", "BottomK") for k in ("1", "50%", "10")
    ]
    # Where 10 and 50% mask equally many, the number comes first.
    entries = [masked("baseline", "topk", k, 50.0, mean_k=6.2) for k in ("50%", "10")]
    assert rows(build_table(entries)[1:], "k") == [["10"], ["50%"]]


def test_columns_are_numbers():
    table = build_table([unmasked(), masked("matched", "topk", "50%", 75.0, removed=20.75, fewer_than_k=12)])
    numbers = table.drop(columns=tables.TEXTS)
    assert [*numbers.columns] == tables.NUMBERS and all(map(pandas.api.types.is_numeric_dtype, numbers.dtypes))
    everyone, kept, after = (row._asdict() for row in table.itertuples(index=False))
    assert (everyone["n"], everyone["em"], everyone["em_low"], everyone["em_high"]) == (651, 91.25, 90, 92.5)
    assert (kept["n"], kept["named"], kept["named_low"]) == (595, 99.5, 98.25)
    assert (after["n"], after["mean_k"], after["fewer_than_k"], after["removed"]) == (595, 6.5, 12, 20.75)
    assert (after["f1"], after["f1_drop"], after["f1_drop_low"], after["f1_drop_high"]) == (75, 24.5, 23.25, 25.75)
    assert (after["answer_log_prob_drop"], after["format_log_prob_drop_high"]) == (0.1234, 0.1434)
    assert table.loc[:1, "em_drop"].isna().all() and table[["paper_em", "paper_f1"]].isna().all(axis=None)


def test_unmasked_rows_go_by_the_questions_and_not_by_their_number():
    """Two sets of 595 kept questions are two rows, one set is one, from wherever it is known."""
    other = "beef" * 16
    entries = [unmasked(), unmasked(run={"ranking": "gradsae"}), masked("baseline", "topk", "1", 80.0)]
    table = build_table([*entries, masked("mine", "topk", "1", 70.0, population=other, clean=98.0)])
    kept = table[(table.masked == "none") & (table.questions == "kept")]
    assert rows(kept, "population", "n", "em") == [["f00d" * 16, 595, 99.5], [other, 595, 98]]
    assert len(table[table.questions == "all asked"]) == 1
    # On the terminal each set has a table of its own, named after it.
    first, second = to_text([*entries, masked("mine", "topk", "1", 70.0, population=other, clean=98.0)]).split(
        "\n\nMasking"
    )
    assert "baseline" in first and "mine" not in first and "99.5/99.5/99.5" in first
    assert "\nquestions beefbe, error term dropped" in second and "mine" in second and "98.0/98.0/98.0" in second
    assert "uestions f00d" not in to_text(entries)


def test_masked_rounds_without_a_reference():
    """The authors' published file does not say what the unmasked answers were."""
    table = build_table([masked("baseline", "topk", "1", 80.0) | {"clean": None, "drop": None}])
    assert rows(table, "masked", "em") == [["TopK", 80]] and table.em_drop.isna().all()
    text = to_text([masked("baseline", "topk", "1", 80.0) | {"clean": None, "drop": None}])
    assert re.search(r"TopK: EM, % +K = 1\nbaseline +80.0 \[78.8, 81.2\]", text) and "Unmasked" not in text


def test_nothing_kept():
    nothing = dict.fromkeys(PERCENT) | {"n": 0, "intervals": dict.fromkeys(PERCENT)}
    table = build_table([unmasked() | nothing])
    assert rows(table, "questions", "n") == [["all asked", 651], ["kept", 0]] and table.em.isna().tolist() == [
        False,
        True,
    ]
    assert "named, %: -/-/- (all asked 91.2/91.2/91.2)." in to_text([unmasked() | nothing])


def test_settings():
    """Columns of their own; a mask that is not the paper's is named after what is not."""
    keep, mean = {"error_term": "keep"}, {"ablation": "mean"}
    entries = [unmasked(), masked("baseline", "topk", "1", 80.0, run={"error_term": "drop"})]
    entries += [unmasked(value=99.0, run=keep), masked("baseline", "topk", "1", 95.0, run=keep)]
    entries += [masked("baseline", "topk", "1", 85.0, run=mean), masked("baseline", "topk", "1", 96.0, run=keep | mean)]
    table = build_table(entries)
    assert rows(table, "questions", "masked", "error_term", "ablation", "em") == [
        ["all asked", "none", "drop", "", 91.25],
        ["all asked", "none", "keep", "", 91.25],
        ["kept", "none", "drop", "", 99.5],  # the same questions, but other answers
        ["kept", "none", "keep", "", 99],
        ["kept", "TopK", "drop", "zero", 80],
        ["kept", "TopK mean", "drop", "mean", 85],
        ["kept", "TopK keep", "keep", "zero", 95],
        ["kept", "TopK keep mean", "keep", "mean", 96],
    ]
    titles = [line for line in to_text(entries).splitlines() if "questions kept" in line]
    assert [title.split(";")[0] for title in titles] == [
        "error term dropped, masked latents set to zero",
        "error term dropped, masked latents set to their mean",
        "error term kept, masked latents set to zero",
        "error term kept, masked latents set to their mean",
    ]


def test_settings_that_differ_between_folders_are_columns():
    table = build_table(several())
    assert [*table.columns[:3]] == ["sae_id", "hook_name", "ranking"] and len(table) == 2 * 4
    assert rows(table[4:], "masked", "sae_id", "em_drop") == [
        ["TopK", LAYERS[0]["sae_id"], 9.5],
        ["TopK", LAYERS[1]["sae_id"], 8.0],
        ["BottomK", LAYERS[0]["sae_id"], 2.5],
        ["BottomK", LAYERS[1]["sae_id"], 1.0],
    ]
    # A reader sees what differs, once: the places say no more than the ids. Nor do the sets of questions.
    text = to_text(several())
    assert "hook" not in text and "f00d" not in text
    assert text.count("layer_9, error term dropped, masked latents set to zero; 595 questions kept of 651") == 1
    assert text.count("layer_20, error term dropped, masked latents set to zero; 595 questions kept of 651") == 1
    assert latex.to_latex(parse(several())).count("layer\\_20, error term dropped") == len(metrics.DROPS) + 1
    # What a run is not sure of before the SAE is loaded is no difference, and one folder has no such columns.
    early = unmasked(run=LAYERS[0])
    early["run"] = early["run"] | {"hook_name": None}
    assert tables.find_differing(parse([early, *several()[:3]])) == []


def test_questions_that_only_another_questions_latents_are_of():
    """Their table is named in words, and says why it has questions of its own; other sets go by their hash."""
    entries = [*comparison(rankings=1), masked("other", "topk", "50%", 71.0, n=121, population="beef" * 16)]
    first, second = blocks.split_settings(parse(entries))
    assert first.names == {} and second.names == {"questions": "with another one on their context"}
    text = to_text(entries)
    assert "\nerror term dropped, masked latents set to zero; 595 questions kept of 651 asked." in text
    assert (
        "questions with another one on their context, error term dropped, masked latents set to zero; 121\n"
        "questions.\n"
        "other masks the latents of another question on the same context: questions without one are left out.\n"
    ) in text
    assert "another one" not in to_text(entries[:-1])


def test_settings_that_say_more_are_shown():
    runs = [{"model": model, "d_sae": width} for model in ("a", "b") for width in (16, 131)]
    runs_as_texts = [{"model": run["model"], "d_sae": str(run["d_sae"])} for run in runs]
    table = build_table([masked("baseline", "topk", "1", 90.0 + n, run=run) for n, run in enumerate(runs)])
    settings = blocks.split_settings(parse([masked("baseline", "topk", "1", 90.0, run=run) for run in runs]))
    assert [setting.names for setting in settings] == runs_as_texts
    assert rows(table[table.masked == "TopK"], "model", "d_sae", "em") == [
        ["a", "16", 90], ["a", "131", 91], ["b", "16", 92], ["b", "131", 93]
    ]  # fmt: skip


def test_csv_is_in_full_precision():
    third = masked("baseline", "topk", "1", 100 / 3)
    _, row = to_csv([third])
    assert float(row["em"]) == 100 / 3 and row["fewer_than_k"] == "0" and row["paper_em"] == ""


def test_what_only_some_results_have_are_columns_where_they_are_there():
    excess = estimate(3.5, 595, ("em", "f1", "named")) | {"answer_log_prob": None}
    keep = masked("baseline", "topk", "1", 60.0) | {"keep_only": True}
    keep["faithfulness"] = {"mean": 0.7, "low": 0.6, "high": 0.8, "n": 500}
    first = unmasked()
    agreement = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 300}
    first["agreement"] = {name: agreement for name in ("spearman", "share", "found")}
    entries = [
        first,
        masked("baseline", "topk", "1", 80.0) | {"excess": {"direction": excess}},
        masked("baseline", "topk", "1", 98.0) | {"control": "direction"},
        keep,
    ]
    *_, plain, direction, kept, agreeing = to_csv(entries)
    assert [row["masked"] for row in (plain, direction, kept)] == ["TopK", "TopK direction", "all but TopK"]
    assert (plain["em_beyond_direction"], plain["named_beyond_direction_low"]) == ("3.5", "2.25")
    assert direction["em_beyond_direction"] == "" and kept["faithfulness_low"] == "0.6"
    assert (agreeing["ranking"], agreeing["k"], agreeing["spearman_high"]) == ("baseline", "50%", "0.6")
    assert not [name for name in to_csv([masked("baseline", "topk", "1", 80.0)])[0] if "beyond" in name]


def test_rankings_and_k_are_the_readers_choice():
    entries = parse(comparison(rankings=3))
    chosen = blocks.choose(entries, ["gradsae"], ["3", "10"])
    (setting,) = blocks.split_settings(chosen)
    assert [line.name for line in setting.lines] == ["gradsae", "gradsae"] and [*setting.ks] == ["3", "10"]
    assert setting.nothing is not None and setting.unmasked and blocks.choose(entries, [], []) == entries
    for rankings, ks, named in ((["mine"], [], "--rankings mine"), ([], ["7"], "--k 7")):
        with pytest.raises(UserError, match=named):
            blocks.choose(entries, rankings, ks)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's figures


def test_the_papers_figures_stand_beside_its_own_setting():
    run = PAPERS | {"error_term": "drop"}
    entries = [masked("gradsae", "topk", "50%", 30.0, run=PAPERS), masked("gradsae", "topk", "2", 90.0, run=PAPERS)]
    entries += [masked("baseline", "bottomk", "1", 90.0, run=run | {"model": "google/gemma-2-9b-it"})]
    table = build_table(entries)
    assert rows(table[table.masked != "none"].fillna(-1), "k", "paper_em", "paper_f1") == [
        ["1", 100, 100],
        ["2", -1, -1],
        ["50%", 30.58, 43.33],
    ]
    text = to_text(entries)
    assert re.search(
        r"TopK: EM drop +K = 2 +K = 50% \(6\.5\)\ngradsae .*\n  the paper's EM +30\.58$", text, re.MULTILINE
    )
    assert "arXiv 2505.08080" in text
    tex = latex.to_latex(parse(entries))
    for metric, figure in (("EM", "30.58"), ("F1", "43.33")):
        assert re.search(rf"quad the paper's {metric} &  &  &  &  & {figure} &", tex), metric
    gradsae = next(setting for setting in blocks.split_settings(parse(entries)) if "50%" in setting.ks)
    shown = page.make_table(gradsae, metrics.EM).groups["TopK"]
    assert [(row.name, row.is_below) for row in shown] == [("gradsae", False), ("the paper's EM", True)]
    assert shown[1].cells[-1] == ("30.58", "", False) and set(shown[1].cells[:-1]) == {("", "", False)}
    # Not beside what round 1 has asked of a part of the questions.
    asked = [unmasked(run=PAPERS | {"limit": 10}), *entries]
    assert "paper" not in to_text(asked) and build_table(asked).paper_em.isna().all()


def test_llama_has_figures_whatever_its_template():
    run = PAPERS | {"model": "meta-llama/Meta-Llama-3-8B-Instruct", "prompt_template": "{context} {question}"}
    run |= {"sae_release": "llama-3-8b-it-res-jh", "sae_id": "blocks.25.hook_resid_post"}
    assert find_published(masked("baseline", "topk", "50%", 0.0, run=run)) == [65.71, 78.94]
    assert find_published(masked("baseline", "topk", "20", 0.0, run=run)) is None


NEAR_MISSES = [
    {"limit": 1000},
    {"sample": 1000},
    {"split": "train"},
    {"dataset": "squad_v2"},
    {"dtype": "bfloat16"},
    {"sae_dtype": "float16"},
    {"exclude_special_tokens": True},
    {"max_new_tokens": 20},
    {"error_term": "keep"},
    {"ablation": "mean"},
    {"prompt_template": TEMPLATE.rstrip()},
    {"sae_id": "layer_9/width_16k/canonical"},
    {"sae_release": "gemma-scope-9b-it-res"},
    {"model": "gemma-2-9b"},
    {"ranking": "random"},
]


@pytest.mark.parametrize("difference", NEAR_MISSES, ids=lambda difference: next(iter(difference)))
def test_the_papers_figures_stand_beside_nothing_else(difference):
    assert find_published(masked("baseline", "topk", "50%", 0.0, run=PAPERS)) == [53.42, 58.46]
    entry = masked("baseline", "topk", "50%", 0.0, run=PAPERS | difference)
    assert find_published(entry) is None
    assert "paper" not in to_text([entry])


def test_a_run_that_does_not_say_how_it_was_made_is_not_the_papers():
    for field in ("dtype", "split", "max_new_tokens", "exclude_special_tokens"):
        entry = masked("baseline", "topk", "50%", 0.0, run=PAPERS)
        del entry["run"][field]
        assert find_published(entry) is None


def test_all_that_the_paper_publishes():
    published = json.loads(tables.PAPER.read_text())["published"].values()
    figures = [
        figure
        for model in published
        for rankings in model["sae_ids"].values()
        for masks in rankings.values()
        for ks in masks.values()
        for figure in ks.values()
    ]
    assert len(figures) == 40 and all(0 < em <= f1 <= 100 for em, f1 in figures)


def test_import_is_light():
    """--help and typing mistakes do not wait for libraries that only a round's end needs."""
    slow = ("pandas", "matplotlib", "torch")
    command = f"import sys, experiment.report.__main__; print([name for name in {slow} if name in sys.modules])"
    root = tables.PAPER.parent.parent.parent
    done = subprocess.run([sys.executable, "-c", command], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
