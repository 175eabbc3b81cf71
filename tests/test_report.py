"""The table and what is made of it: terminal, CSV, LaTeX, figure; on made-up entries of results.json."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys

import pandas
import pytest

from experiment.records.entries import LatentStatistics, parse_entry
from experiment.report import cells, figure, tables

PERCENT = ("em", "f1", "accuracy", "named")
LOGS = ("answer_log_prob", "format_log_prob")
TEMPLATE = json.loads(tables.PAPER.read_text())["published"]["gemma-2-9b-it"]["setting"]["prompt_template"]
# The paper's own setting, but for the ranking.
PAPERS = {
    "model": "gemma-2-9b-it",
    "sae_release": "gemma-scope-9b-it-res-canonical",
    "sae_id": "layer_9/width_131k/canonical",
    "dataset": "rajpurkar/squad",
    "split": "validation",
    "limit": None,
    "sample": None,
    "prompt_template": TEMPLATE,
    "dtype": "float16",
    "sae_dtype": "float32",
    "exclude_special_tokens": False,
    "max_new_tokens": 50,
}


def estimate(value, n, names=PERCENT, width=1.25):
    """n, a mean and an interval for each name, as `estimates.summarize` gives them."""
    return (
        {"n": n} | dict.fromkeys(names, value) | {"intervals": {name: [value - width, value + width] for name in names}}
    )


def masked(ranking, masked, k, value, n=595, clean=99.5, mean_k=None, population="f00d" * 16, run=None, **fields):
    """A masked round's entry. value: EM, F1, accuracy and named in percent."""
    logs = estimate(0.1234, n, LOGS, width=0.02)
    drop = estimate(clean - value, n)
    drop = drop | logs | {"intervals": drop["intervals"] | logs["intervals"]}
    return {
        "round": {"topk": "false", "bottomk": "true"}[masked],
        "masked": masked,
        "k": k,
        "mean_k": mean_k if mean_k is not None else 6.5 if k.endswith("%") else float(k),
        "fewer_than_k": 0,
        "run": PAPERS | {"model": "demo", "ranking": ranking} | (run or {}),
        "population": population,
        **estimate(value, n),
        "clean": estimate(clean, n),
        "drop": drop,
        **fields,
    }


def unmasked(n=595, value=99.5, population="f00d" * 16, run=None):
    """Round 1's entry: 56 questions more were asked than kept."""
    return {
        "round": "baseline",
        "k": None,
        "run": PAPERS | {"model": "demo", "ranking": "baseline"} | (run or {}),
        "all": estimate(91.25, n + 56),
        "asked": n + 56,
        "kept": n,
        "wrong": 50,
        "unranked": 6,
        "population": population,
        "population_all": f"all of {population}",
        **estimate(value, n),
    }


def parse(entries):
    return [parse_entry(entry) for entry in entries]


def build_table(entries):
    return tables.build_table(parse(entries))


def make_figure(entries):
    return figure.make_figure(build_table(entries))


def draw(entries):
    return figure.draw(parse(entries))


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
    text = cells.to_text(table)
    assert re.search(r"kept +none +f00df0 +595 +99\.50", text) and re.search(r"kept +none +beefbe +595 +98\.00", text)
    assert re.search(r"mine +TopK +1 +beefbe +595 +70\.00", text) and "set:" in text
    assert "set" not in cells.to_text(build_table(entries))


def test_masked_rounds_without_a_reference():
    """The authors' published file does not say what the unmasked answers were."""
    table = build_table([masked("baseline", "topk", "1", 80.0) | {"clean": None, "drop": None}])
    assert rows(table, "masked", "em") == [["TopK", 80]] and table.em_drop.isna().all()
    assert re.search(r"baseline +TopK +1 +595 +80.00 \[78.8, 81.2\] +80.00", cells.to_text(table))


def test_nothing_kept():
    nothing = dict.fromkeys(PERCENT) | {"n": 0, "intervals": dict.fromkeys(PERCENT)}
    table = build_table([unmasked() | nothing])
    assert rows(table, "questions", "n") == [["all asked", 651], ["kept", 0]] and table.em.isna().tolist() == [
        False,
        True,
    ]
    assert re.search(r"kept +none +0$", cells.to_text(table), re.MULTILINE)


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
    assert re.search(r"baseline +TopK mean +1 +595 +85\.00", cells.to_text(table))


LAYERS = [{"sae_id": f"layer_{n}/width_131k/canonical", "hook_name": f"blocks.{n}.hook_resid_post"} for n in (9, 20)]


def several():
    """The entries of two folders: layers 9 and 20, each with questions of its own."""
    return [
        entry
        for run, population, clean in zip(LAYERS, ("f00d" * 16, "beef" * 16), (99.5, 98.0))
        for entry in (
            unmasked(population=population, value=clean, run=run),
            masked("baseline", "topk", "1", 90.0, population=population, clean=clean, run=run),
            masked("baseline", "bottomk", "1", 97.0, population=population, clean=clean, run=run),
        )
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
    text = cells.to_text(table)
    assert "hook_name" not in text and "set" not in text.split("\n\n")[0]
    assert re.search(r"^layer_9 +all asked +none +651", text, re.MULTILINE)
    assert re.search(r"^layer_20 +baseline +TopK +1 +595 +90\.00", text, re.MULTILINE)
    assert [row[0] for row in latex_cells(cells.to_latex(table))] == ["sae_id"] + ["layer_9", "layer_20"] * 4
    # What a run is not sure of before the SAE is loaded is no difference, and one folder has no such columns.
    early = unmasked(run=LAYERS[0])
    early["run"] = early["run"] | {"hook_name": None}
    assert tables.find_differing(parse([early, *several()[:3]])) == []


def test_settings_that_say_more_are_shown():
    runs = [{"model": model, "d_sae": width} for model in ("a", "b") for width in (16, 131)]
    table = build_table([masked("baseline", "topk", "1", 90.0 + n, run=run) for n, run in enumerate(runs)])
    assert [*cells.write_settings(table)] == ["model", "d_sae"]
    assert rows(table[table.masked == "TopK"], "model", "d_sae", "em") == [
        ["a", "16", 90], ["a", "131", 91], ["b", "16", 92], ["b", "131", 93]
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


def test_terminal_table_as_it_reads():
    few = {"n": 595, "em": 74.2857, "f1": 84.9, "intervals": {"em": [70.3, 78.1], "f1": [82.7, 87.0]}}
    drop = {"n": 595, "em": 25.7143, "f1": -0.001, "intervals": {"em": [21.9, 29.7], "f1": [-0.002, 0.0]}}
    entry = masked("baseline", "topk", "50%", 0.0, mean_k=6.2)
    for name in ("accuracy", "named"):
        del entry[name]
    text = cells.to_text(build_table([entry | few | {"drop": drop, "clean": estimate(100.0, 595, ("em", "f1"), 0)}]))
    assert text == (
        "ranking  masked K    n     EM                    drop   F1                    drop\n"
        "kept     none          595 100.00 [100.0, 100.0]        100.00 [100.0, 100.0]\n"
        "baseline TopK    50%   595  74.29 [70.3, 78.1]    25.71  84.90 [82.7, 87.0]     0.00\n"
        "\n"
        "ranking  masked K    mean K\n"
        "kept     none\n"
        "baseline TopK    50%    6.2\n"
        "\n"
        "[ ]: 95% interval over resampled contexts. drop: unmasked minus masked. Both in percent.\n"
        "mean K: latents masked per question."
    )


def comparison(n=595, rankings=6, settings=({},), **fields):
    names = ["baseline", "gradsae", "gradsae-answer", "matched", "random", "my_own_ranking"][:rankings]
    ks = ("0", "1", "10", "50%", "100%", "1000")
    entries = [unmasked(n, run=run) for run in settings]
    for number, (ranking, which, k, run) in enumerate(
        (r, m, k, run) for r in names for m in ("topk", "bottomk") for k in ks for run in settings
    ):
        entries.append(masked(ranking, which, k, number % 101, n, run=run, removed=20.8, **fields))
    return entries


@pytest.mark.parametrize("more", [{}, {"population": "beef" * 16}, {"run": {"ablation": "mean"}}])
def test_terminal_table_fits_in_100_columns(more):
    """6 rankings, 6 K, 2 masks, all columns at their widest; no row and no figure is lost for it."""
    entries = comparison(12_345, fewer_than_k=1234, clean=100.0)
    for entry in (entries[5], entries[5]["drop"]):
        entry["em"], entry["intervals"]["em"] = 100.0, [100.0, 100.0]
    entries[6]["drop"]["answer_log_prob"] = -12.345
    entries += [masked("gradsae-answer", "bottomk", "2000", 50.0, 12_345, **more)]
    table = build_table(entries)
    table.loc[3, ["paper_em", "paper_f1"]] = 100.0
    text = cells.to_text(table)
    assert max(map(len, text.splitlines())) <= 100
    (head, *first), (other_head, *second), _ = (block.splitlines() for block in text.split("\n\n"))
    row = ["ranking", "masked", "K"] + ["set"] * ("population" in more)
    assert head.split() == [*row, "n", "EM", "drop", "F1", "drop"]
    other = ["named", "answer", "format", "removed", "mean", "K", "fewer", "paper"]
    assert other_head.split() == [*row, *other]
    assert len(first) == len(second) == len(table) >= 64
    assert "12345" in text and "-12.345" in text and "0.123" in text and "100.00 / 100.00" in text
    # Every line has its columns at the same places: an interval ends where the next column may begin.
    assert len({line.index("[") for line in first}) == 1


def test_a_mean_without_an_interval():
    """Of questions on one context: the mean stands alone, on the terminal, in the files and in the figure."""
    entry = masked("baseline", "topk", "1", 80.0)
    for figures in (entry, entry["clean"], entry["drop"]):
        figures["intervals"] = dict.fromkeys(figures["intervals"])
    table = build_table([entry])
    assert table.em.tolist() == [99.5, 80.0] and table.em_low.isna().all() and table.f1_drop_high.isna().all()
    text = cells.to_text(table)
    assert (
        re.search(r"baseline TopK +1 +595 +80\.00 +19\.50 +80\.00 +19\.50", text) and "[" not in text.split("\n\n")[0]
    )
    assert "nan" not in cells.to_latex(table) + cells.to_csv(table) + text
    figure = make_figure([entry])
    assert [container[0].get_ydata().tolist() for container in figure.axes[0].containers] == [[80.0]]
    figure.draw_without_rendering()


def test_matched_masks_that_miss_are_marked():
    """Where more than a tenth of the questions miss what is to be matched by more than half of it."""
    entries = [
        masked("matched", "bottomk", "1", 99.0, n=100, removed=3.5, missed_target=11),
        masked("matched", "bottomk", "10", 99.0, n=100, removed=4.5, missed_target=10),
        masked("baseline", "bottomk", "1", 99.0, n=100, removed=0.6, missed_target=None),
    ]
    table = build_table(entries)
    assert table.missed_target.fillna(-1).tolist() == [-1, -1, 11, 10]
    text = cells.to_text(table)
    assert " 3.5* " in text and " 4.5  " in text and " 0.6  " in text and "\n*: " in text
    assert "*" not in cells.to_text(build_table(entries[1:]))


def test_notes_are_of_columns_that_are_there():
    plain = masked("baseline", "topk", "1", 80.0)
    assert "removed" not in cells.to_text(build_table([plain])) and "fewer" not in cells.to_text(build_table([plain]))
    text = cells.to_text(build_table([plain | {"removed": 20.8, "fewer_than_k": 3}]))
    assert "removed:" in text and "fewer:" in text and "20.8" in text
    assert all(len(note) <= 100 for note in cells.NOTES.values())


# ---------------------------------------------------------------------------------------------------------------------
# CSV and LaTeX


def latex_cells(text):
    """The cells of a tabular, a list a row, heading first."""
    body = text[text.index("\\toprule") : text.index("\\bottomrule")]
    lines = [line.removesuffix("\\\\") for line in body.splitlines() if line.rstrip().endswith("\\\\")]
    return [
        [cell.strip().replace("$-$", "-").replace("\\", "") for cell in re.split(r"(?<!\\)&", line)] for line in lines
    ]


def test_csv_and_latex_hold_the_same_numbers():
    entries = comparison(rankings=3, settings=({}, {"ablation": "mean"}))
    entries[7]["drop"]["format_log_prob"], entries[7]["drop"]["intervals"]["format_log_prob"] = -0.25, [-0.5, 0.125]
    table = build_table(entries)
    in_csv = [*csv.DictReader(io.StringIO(cells.to_csv(table)))]
    head, *lines = latex_cells(cells.to_latex(table))
    assert len(in_csv) == len(lines) == len(table) == 3 + 3 * 5 * 2 * 2
    assert [*in_csv[0]] == [*table.columns] == tables.TEXTS + tables.NUMBERS
    in_latex = [dict(zip(head, line)) for line in lines]
    pairs = {"em": "EM", "f1_drop": "F1 drop", "named_drop": "named drop", "format_log_prob_drop": "format"}
    for expected, found in zip(in_csv, in_latex):
        assert (expected["ranking"] or expected["questions"], expected["masked"]) == (found["ranking"], found["masked"])
        assert (expected["k"], expected["n"]) == (found["K"], found["n"])
        for name, heading in pairs.items():
            bounds = [float(expected[f"{name}{bound}"] or "nan") for bound in ("", "_low", "_high")]
            shown = [float(number) for number in re.findall(r"-?\d+\.\d+", found[heading])]
            assert shown == pytest.approx([bound for bound in bounds if bound == bound], abs=0.0501)
    assert [
        row for row in in_latex if row["format"] == "-0.250 [-0.500, 0.125]"
    ] and "$-$0.250 [$-$0.500" in cells.to_latex(table)


def test_csv_is_in_full_precision():
    third = masked("baseline", "topk", "1", 100 / 3)
    _, row = csv.DictReader(io.StringIO(cells.to_csv(build_table([third]))))
    assert float(row["em"]) == 100 / 3 and row["fewer_than_k"] == "0" and row["paper_em"] == ""


def test_latex_is_balanced_and_escaped(tmp_path):
    entries = comparison(rankings=2) + [masked("my_own & 100% {x} #1", "topk", "50%", 30.0)]
    text = cells.to_latex(build_table(entries))
    assert text.count("\\begin{") == text.count("\\end{") == 1 and "\\toprule" in text and "booktabs" in text
    body = [line for line in text.splitlines() if not line.startswith("%")]
    aligned = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text).group(1)
    lines = [line for line in body if line.rstrip().endswith("\\\\")]
    assert len(lines) == 1 + len(build_table(entries))
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(aligned) - 1}
    assert "my\\_own \\& 100\\% \\{x\\} \\#1" in text and " 50\\% &" in text
    assert not re.search(r"(?<!\\)[%#_]", "\n".join(body))
    assert all(line.count("{") == line.count("}") for line in body)
    if shutil.which("pdflatex"):
        page = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}" + text + "\\end{document}"
        (tmp_path / "page.tex").write_text(page)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


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
    text = cells.to_text(table)
    assert re.search(r"gradsae +TopK +50%.* 30\.58 / +43\.33$", text, re.MULTILINE)
    assert not re.search(r"gradsae +TopK +2.* / ", text) and "arXiv 2505.08080" in text
    assert re.search(r"30\.58 / +43\.33 \\\\", cells.to_latex(table))


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
    assert "paper" not in cells.to_text(build_table([entry]))


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


# ---------------------------------------------------------------------------------------------------------------------
# Sentences


def test_statistics_in_sentences():
    statistics = {
        "n": 50,
        "active": 12.8,
        "k_at_50%": 6.2,
        "same_context_percent": {"topk": 86.25, "bottomk": 98.0},
        "most_frequent_topk": [{"latent": 7, "questions": 40, "neuronpedia": "https://x/7"}],
        "overlap": {
            "gradsae": {"n": 50, "topk": 5.7, "bottomk": 5.8},
            "random": {"n": 0, "topk": None, "bottomk": None},
        },
    }

    def tell(**changed):
        return cells.tell_statistics(LatentStatistics(**statistics | changed), "baseline")

    assert tell().splitlines() == [
        "12.80 latents are active at the last position on average; K at 50% is 6.20.",
        "Two questions on one context share 86.25% of their TopK and 98.00% of their BottomK.",
        "baseline and gradsae share 5.70% of their TopK and 5.80% of their BottomK.",
        "In most questions' TopK:",
        "  latent 7 in 80.0%  https://x/7",
    ]
    assert "context" not in tell(same_context_percent={"topk": None, "bottomk": None})
    assert tell(n=0).startswith("No question was kept")


# ---------------------------------------------------------------------------------------------------------------------
# The figure


def drawn(figure, panel):
    """{label: (x, y, low, high) of its points} of a panel's lines with intervals."""
    found = {}
    for container in figure.axes[panel].containers:
        line, _, (bars,) = container
        low, high = zip(*(segment[:, 1] for segment in bars.get_segments()))
        found[container.get_label()] = [*map(list, (line.get_xdata(), line.get_ydata(), low, high))]
    return found


def ticks(figure):
    return [label.get_text() for label in figure.axes[-1].get_xticklabels()]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_figure_draws_the_tables_numbers():
    values = {"1": 97.0, "10": 90.0, "50%": 75.0}
    entries = [masked("baseline", m, k, v - (m == "topk"), mean_k=20.0 if k == "50%" else None)
               for m in ("topk", "bottomk") for k, v in values.items()]  # fmt: skip
    for entry in entries:
        entry["f1"], entry["intervals"]["f1"] = entry["em"] + 2, [entry["em"], entry["em"] + 3]
    figure = make_figure(entries)
    assert figure.get_size_inches()[0] == 3.3 and ticks(figure) == ["1", "10", "50%"]
    assert [axis.get_ylabel()[:6] for axis in figure.axes] == ["EM (%)", "F1 (%)", "answer"]
    em, f1, logs = (drawn(figure, panel) for panel in range(3))
    assert em.keys() == f1.keys() == logs.keys() == {"baseline TopK", "baseline BottomK"}
    x, y, low, high = em["baseline TopK"]
    assert x == pytest.approx([0, 1, 2], abs=0.2) and y == [96, 89, 74]
    assert low == [94.75, 87.75, 72.75] and high == [97.25, 90.25, 75.25]
    assert f1["baseline BottomK"][1:] == [[99, 92, 77], [97, 90, 75], [100, 93, 78]]
    assert logs["baseline TopK"][1] == [0.1234] * 3 and logs["baseline TopK"][2] == pytest.approx([0.1034] * 3)
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    # The unmasked level, dotted, in percent; in nats there is none.
    levels = [[line.get_ydata()[0] for line in axis.lines if line.get_label() == "unmasked"] for axis in figure.axes]
    assert levels == [[99.5], [99.5], []] and "unmasked" in legend(figure)
    # Not the level of other questions.
    figure = make_figure([unmasked(value=50.0, population="beef" * 16), *entries])
    assert [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_label() == "unmasked"] == [99.5]


def test_figure_without_log_probabilities_or_reference():
    entry = masked("baseline", "topk", "1", 80.0) | {"clean": None, "drop": None}
    figure = make_figure([entry])
    assert (
        len(figure.axes) == 2 and drawn(figure, 0)["baseline TopK"][1] == [80] and legend(figure) == ["baseline TopK"]
    )


def test_k_that_mask_the_same_are_one_point():
    """Lists that end at 50% make K = 10 and 50% one mask; another line's larger K must not be drawn into it."""
    same = [masked(r, "topk", k, 75.0, mean_k=6.2) for r in ("baseline", "gradsae") for k in ("10", "50%")]
    ones = [masked(r, "topk", "1", 97.0) for r in ("baseline", "gradsae")]
    figure = make_figure(same + ones)
    assert ticks(figure) == ["1", "10 = 50%"]
    assert all(len(x) == 2 and y == [97, 75] for x, y, _, _ in drawn(figure, 0).values())
    # One ranking's lists are longer: 10 and 50% are two masks there, so they are two points for all.
    figure = make_figure([*same[:3], masked("gradsae", "topk", "50%", 60.0, mean_k=9.0), *ones])
    assert ticks(figure) == ["1", "10", "50%"] and drawn(figure, 0)["baseline TopK"][1] == [97, 75, 75]
    # Equally many, but not the same ones: questions of 10 and 30 active latents have 10 at 50% on average.
    by_chance = [masked("baseline", "topk", "10", 75.0), masked("baseline", "topk", "50%", 72.0, mean_k=10.0)]
    assert ticks(make_figure(by_chance)) == ["10", "50%"]


def test_nothing_masked_is_one_row_and_a_level():
    """K = 0 is the same for each ranking and mask; where no other K is there, there is no figure to draw."""
    nothing = [masked(r, m, "0", 99.5, mean_k=0.0) for r in ("baseline", "gradsae") for m in ("topk", "bottomk")]
    entries = [masked(r, "topk", k, v) for r in ("baseline", "gradsae") for k, v in (("1", 97.0), ("10", 60.0))]
    table = build_table([unmasked(), *entries, *nothing])
    assert rows(table, "ranking", "masked", "k")[1:4] == [
        ["", "none", ""],
        ["", "none", "0"],
        ["baseline", "TopK", "1"],
    ]
    assert table.em_drop[2] == masked("baseline", "topk", "0", 99.5)["drop"]["em"] and len(table) == 3 + 4
    figure = make_figure([*entries, *nothing])
    assert ticks(figure) == ["1", "10"] and "unmasked" in legend(figure)
    assert [points[1] for points in drawn(figure, 0).values()] == [[97, 60], [97, 60]]
    assert 99.5 in [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert draw(nothing) == {} == draw([unmasked()])


def test_at_most_six_lines_each_with_a_look_of_its_own():
    figure = make_figure(comparison(settings=({}, {"ablation": "mean"})))
    assert len(drawn(figure, 0)) == 6 and figure.legends[0].get_title().get_text().startswith("18 more lines")
    assert all(label.endswith(" TopK") for label in drawn(figure, 0))
    figure = make_figure(comparison(rankings=3))
    lines = [container[0] for container in figure.axes[0].containers]
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == len(lines) == 6
    for line, label in zip(lines, drawn(figure, 0), strict=True):
        assert line.get_linestyle() == ("-" if "TopK" in label else "--")
        assert (line.get_markerfacecolor() == "white") == ("BottomK" in label)
        assert line.get_color() == line.get_color().strip("#") and 0 <= float(line.get_color()) < 0.7  # a grey
    assert not figure.legends[0].get_title().get_text() and len(legend(figure)) == 7


def test_figure_files():
    """The same bytes for the same entries, whenever they are drawn, a column wide."""
    files = draw(comparison(rankings=1))
    assert files == draw(comparison(rankings=1)) and files.keys() == {"png", "pdf", "svg"}
    for format, start in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        assert files[format].startswith(start)
        assert not any(date in files[format] for date in (b"CreationDate", b"<dc:date>", b"Date</"))
    assert int.from_bytes(files["png"][16:20], "big") == 990  # 3.3 inches at 300 dots an inch
    assert b'width="237.6pt"' in files["svg"]
    assert b"/Type3" not in files["pdf"]  # publishers refuse such fonts


def test_figure_of_several_folders():
    figure = make_figure(several())
    assert drawn(figure, 0).keys() == {f"baseline {m}K layer_{n}" for m in ("Top", "Bottom") for n in (9, 20)}
    levels = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert levels == [99.5, 98] and legend(figure).count("unmasked") == 1


def test_import_is_light():
    """--help and typing mistakes do not wait for libraries that only a round's end needs."""
    slow = ("pandas", "matplotlib", "torch")
    command = f"import sys, experiment.report.__main__; print([name for name in {slow} if name in sys.modules])"
    root = tables.PAPER.parent.parent.parent
    done = subprocess.run([sys.executable, "-c", command], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
