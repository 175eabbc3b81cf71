"""results.tex: compiled where there is a LaTeX, measured by its characters where there is none; made-up entries."""

import re
import shutil
import subprocess

import pytest
from made_entries import comparison, masked, parse, several, unmasked, with_controls

from experiment.report import latex

CASES = {
    "the whole comparison": comparison(12_345, ks=("0", "1", "3", "10", "50%")),
    "with a control for each": with_controls(comparison(12_345, rankings=4)),
    "ten K, figures at their widest": comparison(
        12_345, rankings=3, ks=("1", "2", "5", "10", "20", "30", "50", "100", "50%", "100%"), missed_target=12_345
    ),
    "two layers": several(),
    "both error terms and ablations": comparison(
        rankings=2,
        settings=({}, {"error_term": "keep"}, {"ablation": "mean"}, {"error_term": "keep", "ablation": "mean"}),
    ),
    "hostile and long names": [masked("my_own & 100% {x} #1 ^~\\ <b> $y$ and more", "topk", "50%", 30.0)],
}


def to_latex(entries):
    return latex.to_latex(parse(entries))


def rows_of(tabular):
    """[row][cell] of a tabular's texts, rules and the rows that name a mask left out."""
    body = tabular[tabular.index("\\toprule") : tabular.index("\\bottomrule")]
    lines = [line.removesuffix("\\\\") for line in body.splitlines() if line.endswith("\\\\")]
    lines = [line for line in lines if not line.startswith("\\multicolumn")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)&", line)] for line in lines]


def tabulars_of(text):
    return re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", text, re.DOTALL)


@pytest.mark.parametrize("entries", CASES.values(), ids=CASES)
def test_it_compiles_without_an_overfull_box(entries, tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("there is no LaTeX (Debian: apt-get install texlive-latex-recommended)")
    tables = to_latex(entries).replace("\\begin{table*}", "\\begin{table*}[p]")
    for columns in ("", "[twocolumn]"):
        head = f"\\documentclass{columns}{{article}}\\usepackage{{booktabs}}\\begin{{document}}"
        (tmp_path / "page.tex").write_text(f"{head}{tables}\\end{{document}}")
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
        assert "Overfull" not in done.stdout


@pytest.mark.parametrize("entries", CASES.values(), ids=CASES)
def test_each_table_is_as_wide_as_an_articles_text_by_its_characters(entries):
    tabulars = tabulars_of(to_latex(entries))
    assert tabulars
    for tabular in tabulars:
        head, *rows = rows_of(tabular)
        widths = [0.0] * len(rows[0])
        for row in rows:
            for place, cell in enumerate(row):
                shown = re.sub(r"\\tiny |\\quad|[{}$\\]", "", cell)
                each = 3.1 if "\\tiny" in cell else 4.0  # brackets, points and commas are narrower than digits
                widths[place] = max(widths[place], each * len(shown))
        gaps = 6 * (len(widths) // 2)
        assert sum(widths) + gaps <= 345, tabular


def test_the_numbers_are_the_entries():
    entries = [
        unmasked(),
        masked("baseline", "topk", "1", 90.0, removed=3.72),
        masked("baseline", "topk", "50%", 75.0, removed=16.1),
        masked("matched", "topk", "50%", 91.0, removed=16.6, mean_k=25.1),
        masked("baseline", "bottomk", "50%", 99.5, removed=0.5),
    ]
    entries[2]["drop"]["format_log_prob"] = -0.25
    entries[2]["drop"]["intervals"]["format_log_prob"] = [-0.5, 0.125]
    text = to_latex(entries)
    tables = re.findall(r"\\begin\{table\*\}.*?\\end\{table\*\}", text, re.DOTALL)
    captions = [re.search(r"\\caption\{(.*)\}", table)[1] for table in tables]
    assert [caption.split(" ")[0:3] for caption in captions[:3]] == [["Points", "of", n] for n in ("EM", "F1", "named")]
    assert captions[0].endswith("Unmasked: 99.5. In brackets: 95\\% intervals over resampled contexts.")
    assert "595 questions" in captions[0] and "error term dropped" in captions[0]
    em, *_, removed, latents = [rows_of(table) for table in tables]
    assert em == [
        ["", "\\multicolumn{2}{c}{$K$ = 1}", "\\multicolumn{2}{c}{$K$ = 50\\% (6.5)}"],
        ["baseline", "9.5", "{\\tiny [8.2, 10.8]}", "24.5", "{\\tiny [23.2, 25.8]}"],
        ["matched", "", "", "8.5", "{\\tiny [7.2, 9.8]}"],
        ["baseline", "", "", "0.0", "{\\tiny [$-$1.2, 1.2]}"],
    ]
    assert re.search(r"TopK masked.*BottomK masked", tables[0], re.DOTALL)
    assert [row[3] for row in removed[1:]] == ["16.1", "16.6", "0.5"] and latents[2][3] == "25.1"
    assert "$-$0.250 & {\\tiny [$-$0.500, 0.125]}" in text


def test_marks_and_controls():
    entries = with_controls([masked("matched", "topk", "10", 90.0, n=100, missed_target=50)])
    text = to_latex(entries)
    assert "matched & 9.5$^*$ &" in text and "\\quad in a random direction & 1.0$^*$" in text
    assert "$^*$: not matched: over half more or less" in text and "EM drop beyond direction's, points: what" in text


def test_what_round_1_knows():
    first = unmasked()
    share = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 300}
    first["agreement"] = {name: share for name in ("spearman", "share", "found")}
    shared = {"topk": 86.25, "bottomk": 98.0}
    first["statistics"] = {"n": 9, "active": 12.8, "k_at_50%": 6.2, "same_context_percent": shared}
    first["statistics"]["most_frequent_topk"] = []
    text = to_latex([first])
    assert "baseline & 12.80 & 6.20 & 86.25 & 98.00 \\\\" in text
    assert "baseline & 0.50 [0.40, 0.60] & 0.50 [0.40, 0.60] & 0.50 [0.40, 0.60] \\\\" in text
