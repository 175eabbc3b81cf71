"""ONE table of all that a folder holds, a pandas DataFrame; terminal, CSV, LaTeX and figure are made of it.

Knows nothing of models. pandas and matplotlib are imported where they are used: only the end of a round needs them.
"""

import json
import re
from pathlib import Path

from experiment.estimates import DROP_ONLY, MASKS, METRICS

SETTINGS = {"error_term": "drop", "ablation": "zero"}  # and the paper's choice, which runs that lack one made too
TEXTS = ["ranking", "masked", "questions", "k", *SETTINGS, "population"]  # which together no two rows share
BOUNDS = ("", "_low", "_high")
LEVELS = [f"{metric}{bound}" for metric in METRICS if metric not in DROP_ONLY for bound in BOUNDS]
DROPS = [f"{metric}_drop{bound}" for metric in METRICS for bound in BOUNDS]
NUMBERS = ["mean_k", "fewer_than_k", "removed", "n", *LEVELS, *DROPS, "paper_em", "paper_f1"]
PAPER = Path(__file__).with_name("paper.json")

ROW = ["ranking", "masked", "K", "set"]  # of the table as a reader sees it: what says which row it is
SCORES = {"EM": "em", "EM drop": "em_drop", "F1": "f1", "F1 drop": "f1_drop"}
OTHERS = {"named": "named", "named drop": "named_drop"}
OTHERS |= {"answer": "answer_log_prob_drop", "format": "format_log_prob_drop"}
NOTES = {
    "n": "[ ]: 95% interval over resampled contexts. drop: unmasked minus masked. Both in percent.",
    "set": "set: which of the sets of kept questions, by the beginning of its hash.",
    "named": "named: a right answer stands somewhere in the text, in percent.",
    "answer": "answer, format: drop in log probability (nats a token) of the unmasked text in, around its [[ ]].",
    "removed": "removed: what the mask takes away, in percent of the residual stream's norm.",
    "mean K": "mean K: latents masked a question.",
    "fewer": "fewer: questions that have fewer than K latents to mask.",
    "paper": "paper: EM / F1 in GradSAE, arXiv 2505.08080.",
}
PANELS = {"em": "EM (%)", "f1": "F1 (%)", "answer_log_prob_drop": "answer's log prob.,\ndrop (nats a token)"}
MARKERS = "os^Dv*"  # of the figure: a marker a line
STYLE = {"font.size": 7, "legend.frameon": False, "lines.linewidth": 1, "lines.markersize": 4, "errorbar.capsize": 2}
# TrueType, for publishers refuse Matplotlib's Type 3 fonts; a salt in place of the random ids of an SVG.
STYLE |= {"pdf.fonttype": 42, "svg.hashsalt": "results"}


def frame(entries):
    """The entries of results.json as one DataFrame: texts, then numbers, in percent or nats, NaN where there is none.

    Rows: the questions unmasked (all asked, then kept), one a population, which its hash tells apart, for two can have
    equal n; then one a ranking, mask and K.
    """
    import pandas

    unmasked = [entry for entry in entries if "masked" not in entry]
    masked = sorted((entry for entry in entries if "masked" in entry), key=_place)
    rows = [_row(entry, entry["all"], "all asked", entry["population_all"]) for entry in unmasked]
    rows += [_row(entry, entry, "kept", entry["population"]) for entry in unmasked]
    rows += [_row(entry, entry["clean"], "kept", entry["population"]) for entry in masked if entry["clean"]]
    for entry in masked:
        row = _row(entry, entry, "kept", entry["population"]) | _numbers(entry["drop"] or {}, "_drop")
        row |= {name: entry.get(name) for name in ("k", "mean_k", "fewer_than_k", "removed")}
        row |= dict(zip(("paper_em", "paper_f1"), find_published(entry) or ()))
        row |= {name: entry["run"].get(name, default) for name, default in SETTINGS.items()}
        others = [row[name] for name, default in SETTINGS.items() if row[name] != default]
        masks = " ".join([MASKS[entry["masked"]], *others])
        rows.append(row | {"ranking": entry["run"]["ranking"], "masked": masks})
    table = pandas.DataFrame(rows, columns=TEXTS + NUMBERS).drop_duplicates(TEXTS, ignore_index=True)
    return table.astype(dict.fromkeys(NUMBERS, float) | {"n": "Int64", "fewer_than_k": "Int64"})


def _place(entry):
    """The sorting key of a masked round's entry. Of K that mask equally many, numbers stand before percentages."""
    run, k = SETTINGS | entry["run"], entry["k"]
    settings = [run[name] != SETTINGS[name] for name in SETTINGS]
    order_k = entry["mean_k"], k.endswith("%"), float(k.removesuffix("%"))
    return run["ranking"], list(MASKS).index(entry["masked"]), settings, order_k


def _row(entry, figures, questions, population):
    """An unmasked row. figures: those of `entry` itself, or of a part of it."""
    row = {"ranking": "", "masked": "none", "questions": questions, "k": "", "population": population}
    row |= {"error_term": entry["run"].get("error_term", "drop"), "ablation": "", "n": figures["n"]}
    return row | _numbers(figures, "")


def _numbers(figures, suffix):
    """{column: mean, low or high} of each metric that is in `figures`."""
    return {
        f"{metric}{suffix}{bound}": value
        for metric in METRICS
        if figures.get(metric) is not None
        for bound, value in zip(BOUNDS, (figures[metric], *figures["intervals"][metric]))
    }


def find_published(entry):
    """The paper's [EM, F1] for a masked round's entry, or None: paper.json has them, for the paper's own setting."""
    paper, run = json.loads(PAPER.read_text(encoding="utf-8")), SETTINGS | entry["run"]
    published = paper["published"].get(run["model"].split("/")[-1], {"sae_ids": {}, "setting": {}})
    if any(run.get(name) != value for name, value in (paper["setting"] | published["setting"]).items()):
        return None
    figures = published["sae_ids"].get(run["sae_id"], {}).get(run["ranking"], {})
    return figures.get(entry["masked"], {}).get(entry["k"])


def to_csv(table):
    """All columns of `frame`'s table, in full precision."""
    return table.to_csv(index=False, lineterminator="\n")


def to_latex(table):
    """`frame`'s table as a booktabs tabular: all intervals, and the paper's figures beside ours."""
    cells, notes = _write_cells(table)
    aligned = "".join("l" if name in ROW else "r" for name in cells)
    tabular = cells.to_latex(index=False, escape=True, column_format=aligned)
    tabular = re.sub(r"(?<=[ \[])-(?=\d)", "$-$", tabular)  # a minus, not a hyphen
    return "".join(f"% {note}\n" for note in ("Needs \\usepackage{booktabs}.", *notes)) + tabular


def terminal(table):
    """`frame`'s table for 100 columns, in two halves: EM and F1 with their intervals, then the rest."""
    cells, notes = _write_cells(table)
    cells = cells.drop(columns="named drop", errors="ignore")
    without = cells.columns.drop(["EM", "F1"])
    cells[without] = cells[without].replace(r" \[.*", "", regex=True)
    cells = cells.apply(lambda column: column.str.ljust(column.str.len().max()))
    texts = []
    for names in ([*ROW, "n", *SCORES], cells.columns.drop(["n", *SCORES], errors="ignore")):
        half = cells[[name for name in names if name in cells]]
        heads = [re.sub(".* drop", "drop", name) for name in half]
        texts.append(half.to_string(index=False, header=heads, justify="left"))
    return re.sub(" +$", "", "\n\n".join([*texts, "\n".join(notes)]), flags=re.MULTILINE)


def _write_cells(table):
    """The table as a reader sees it, a DataFrame of texts without the columns that are empty, and notes on them."""
    import pandas

    names = table.ranking.where(table.masked != "none", table.questions)
    cells = {"ranking": names, "masked": table.masked, "K": table.k.str.rjust(4)}
    if table.population[table.questions == "kept"].nunique() > 1:
        cells["set"] = table.population.str[:6]
    cells["n"] = _write("{:5}", table.n)
    for name, column in (SCORES | OTHERS).items():
        form = "{:z6.3f} [{:z.3f}, {:z.3f}]" if "log_prob" in column else "{:z6.2f} [{:z.1f}, {:z.1f}]"  # z: no -0.00
        cells[name] = _write(form, *(table[f"{column}{bound}"] for bound in BOUNDS))
    cells |= {"removed": _write("{:7.1f}", table.removed), "mean K": _write("{:6.1f}", table.mean_k)}
    cells["fewer"] = _write("{:5}", table.fewer_than_k.replace(0, pandas.NA))
    cells["paper"] = _write("{:6.2f} / {:6.2f}", table.paper_em, table.paper_f1)
    cells = {name: list(texts) for name, texts in cells.items() if any(map(str.strip, texts))}
    return pandas.DataFrame(cells), [note for name, note in NOTES.items() if name in cells]


def _write(form, *columns):
    """Columns as one of texts, empty where there is no number."""
    there = columns[0].notna()
    return [form.format(*numbers) if is_there else "" for is_there, *numbers in zip(there, *columns)]


def describe(statistics, ranking):
    """`estimates.latent_statistics`, with what other rankings share ("overlap"), as sentences."""
    if not statistics["n"]:
        return "No question was kept: there are no latents to describe."
    share = "share {topk:.2f}% of their TopK and {bottomk:.2f}% of their BottomK."
    lines = [
        f"{statistics['active']:.2f} latents are active at the last position on average; K at 50% is "
        f"{statistics['k_at_50%']:.2f}."
    ]
    if statistics["same_context_percent"]["topk"] is not None:
        lines.append(f"Two questions on one context {share.format(**statistics['same_context_percent'])}")
    for other, overlap in statistics["overlap"].items():
        if overlap["n"]:
            lines.append(f"{ranking} and {other} {share.format(**overlap)}")
    lines.append("In most questions' TopK:")
    for latent in statistics["most_frequent_topk"]:
        page = f"  {latent['neuronpedia']}" if latent["neuronpedia"] else ""
        lines.append(f"  latent {latent['latent']} in {100 * latent['questions'] / statistics['n']:.1f}%{page}")
    return "\n".join(lines)


def draw(file, entries, format):
    """Writes `make_figure`'s figure to a binary file as "png", "pdf" or "svg": for the same entries the same bytes."""
    import matplotlib

    dates = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with matplotlib.rc_context(STYLE):
        make_figure(entries).savefig(file, format=format, dpi=300, metadata=dates[format])


def make_figure(entries):
    """EM and F1 against K with their intervals, and the drop in the answer's log probability where there is one.

    As wide as a paper's column (3.3 inches), of at most six lines, the paper's settings and TopK first. entries: of
    masked rounds at least one.
    """
    from matplotlib.figure import Figure

    table = frame(entries)
    masked = table[table.masked != "none"]
    masked = masked.assign(line=masked.ranking + " " + masked.masked)
    lines = sorted(masked.line.unique(), key=lambda line: (line.count(" "), "BottomK" in line))
    more, lines = len(lines[len(MARKERS) :]), lines[: len(MARKERS)]
    shown = masked[masked.line.isin(lines)]
    unmasked = table[(table.masked == "none") & (table.questions == "kept") & table.population.isin(shown.population)]
    # K that mask the same latents in every line share a place, as 10 and 50% do where the lists end before 10.
    order = shown.groupby("k", sort=False).mean_k.min().sort_values(kind="stable").index
    same = shown.pivot_table(index="k", columns="line", values=["mean_k", "em", "f1"]).loc[order]
    places = same.groupby(list(same), dropna=False, sort=False).ngroup()
    panels = [metric for metric in PANELS if shown[metric].notna().any()]
    figure = Figure(figsize=(3.3, 1 + 1.5 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    axes[1].sharey(axes[0])
    for axis, metric in zip(axes, panels):
        for number, line in enumerate(lines):
            # Beside each other, or one line's intervals would hide another's.
            beside = places + 0.07 * (number - (len(lines) - 1) / 2)
            _draw_line(axis, shown[shown.line == line], metric, beside, number)
        for level in unmasked[metric].dropna().head(1):
            axis.axhline(level, color="0", linestyle=":", linewidth=0.9, label="unmasked")
        axis.set_ylabel(PANELS[metric])
    ticks = range(places.max() + 1)
    axes[-1].set_xticks(ticks, [" = ".join(places.index[places == tick]) for tick in ticks])
    axes[-1].set_xlabel("K, latents masked a question")
    handles, labels = axes[0].get_legend_handles_labels()
    title = f"{more} more lines: see results.csv" if more else None
    columns = 2 if max(map(len, labels)) <= 22 else 1
    figure.legend(handles, labels, loc="outside lower center", title=title, ncols=columns)
    return figure


def _draw_line(axis, rows, metric, places, number):
    """A line with its intervals, a marker of its own, TopK solid, BottomK dashed and hollow: no need of colour."""
    rows = rows.assign(x=rows.k.map(places)).drop_duplicates("x").dropna(subset=metric)
    spread = [rows[metric] - rows[f"{metric}_low"], rows[f"{metric}_high"] - rows[metric]]
    grey, solid = str(0.12 * number), "TopK" in rows.line.iloc[0]
    look = {"color": grey, "marker": MARKERS[number], "markerfacecolor": grey if solid else "white"}
    look |= {"label": rows.line.iloc[0], "linestyle": "-" if solid else "--"}
    axis.errorbar(rows.x, rows[metric], spread, **look)
