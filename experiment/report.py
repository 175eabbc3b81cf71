"""ONE table of all that a folder holds, a pandas DataFrame; terminal, CSV, LaTeX and figure are made of it.

Knows nothing of models. pandas and matplotlib are imported where they are used: only the end of a round needs them.
"""

import json
import re
from pathlib import Path

from experiment.estimates import DROP_ONLY, MASKS, METRICS

RANKINGS = ("baseline", "gradsae", "gradsae-answer", "matched", "random")  # their order; others follow by name
SETTINGS = {"error_term": "drop", "ablation": "zero"}  # and the paper's choice, which runs that lack one made too
BOUNDS = ("", "_low", "_high")
LEVELS = [f"{metric}{bound}" for metric in METRICS if metric not in DROP_ONLY for bound in BOUNDS]
DROPS = [f"{metric}_drop{bound}" for metric in METRICS for bound in BOUNDS]
NUMBERS = ["mean_k", "fewer_than_k", "removed", "n", *LEVELS, *DROPS, "paper_em", "paper_f1"]
PAPER = Path(__file__).with_name("paper.json")

WIDTH = 100  # of the terminal's table
ROW_NAMES = ("ranking", "masked", "K")  # cells that say which row it is
LEFT = ("ranking", "masked", "EM", "F1", "named")  # words, and what has an interval; other cells end at the right
NOTES = {
    "n": "[ ]: 95% interval over resampled contexts. drop: unmasked minus masked. Both in percent.",
    "questions": "questions: which of the sets of kept questions, by the beginning of its hash.",
    "named": "named: a right answer stands somewhere in the text, in percent.",
    "mean K": "mean K: latents masked a question.",
    "fewer": "fewer: questions that have fewer than K latents to mask.",
    "removed": "removed: what the mask takes away, in percent of the residual stream's norm.",
    "answer": "answer, format: drop in log probability (nats a token) of the unmasked text in, around its [[ ]].",
    "paper": "paper: EM / F1 in GradSAE, arXiv 2505.08080.",
}
LINES, MARKERS = 6, "os^Dv*"  # of the figure: a marker a line


def frame(entries):
    """The entries of results.json as one DataFrame: texts, then numbers, in percent or nats, NaN where there is none.

    Rows: the questions unmasked (all asked, then kept), one a population, which its hash tells apart, for two can have
    equal n; then one a ranking, mask and K. SETTINGS are columns where rows differ in them.
    """
    import pandas

    masked = [entry for entry in entries if "masked" in entry]
    rows = _unmasked_rows([entry for entry in entries if "masked" not in entry], masked)
    rows += [_masked_row(entry) for entry in sorted(masked, key=_place)]
    settings = [name for name in SETTINGS if len({row[name] for row in rows}) > 1]
    table = pandas.DataFrame(rows, columns=["ranking", "masked", "questions", "k", *settings, *NUMBERS, "population"])
    return table.astype(dict.fromkeys(NUMBERS, float) | {"n": "Int64", "fewer_than_k": "Int64"})


def _settings(entry):
    return {name: entry["run"].get(name, default) for name, default in SETTINGS.items()}


def _place(entry):
    """The sorting key of a masked round's entry."""
    ranking = entry["run"]["ranking"]
    known = RANKINGS.index(ranking) if ranking in RANKINGS else len(RANKINGS)
    settings = [(value != SETTINGS[name], value) for name, value in _settings(entry).items()]
    return known, ranking, list(MASKS).index(entry["masked"]), settings, entry["mean_k"], _order_k(entry["k"])


def _order_k(k):
    """The sorting key of two K that mask equally many latents: numbers stand before percentages."""
    return k.endswith("%"), float(k.removesuffix("%"))


def _unmasked_rows(unmasked, masked):
    """A row for each population and setting, from round 1 where it is there, else from what it left to later rounds."""
    estimates = [(entry, "all asked", entry["population_all"], entry["all"]) for entry in unmasked]
    estimates += [(entry, "kept", entry["population"], entry) for entry in unmasked]
    estimates += [(entry, "kept", entry["population"], entry["clean"]) for entry in masked if entry["clean"]]
    rows = {}
    for entry, questions, population, figures in estimates:
        row = {"ranking": "", "masked": "none", "questions": questions, "k": "", "population": population}
        row |= _settings(entry) | {"n": figures["n"]} | _numbers(figures, "")
        rows.setdefault((questions, population, *_settings(entry).values()), row)
    return list(rows.values())


def _masked_row(entry):
    row = {name: entry.get(name) for name in ("k", "mean_k", "fewer_than_k", "removed", "n", "population")}
    row |= {"ranking": entry["run"]["ranking"], "masked": MASKS[entry["masked"]], "questions": "kept"}
    row |= _settings(entry) | _numbers(entry, "") | _numbers(entry["drop"] or {}, "_drop")
    return row | dict(zip(("paper_em", "paper_f1"), find_published(entry) or ()))


def _numbers(figures, suffix):
    """{column: mean, low or high} of each metric that is in `figures`."""
    numbers = {}
    for metric in METRICS:
        if figures.get(metric) is not None:
            values = figures[metric], *figures["intervals"][metric]
            numbers |= {f"{metric}{suffix}{bound}": value for bound, value in zip(BOUNDS, values)}
    return numbers


def find_published(entry):
    """The paper's [EM, F1] for a masked round's entry, or None: paper.json has them, for the paper's own setting."""
    paper, run = json.loads(PAPER.read_text(encoding="utf-8")), SETTINGS | entry["run"]
    if any(run.get(name) != value for name, value in paper["setting"].items()):
        return None
    published = paper["published"].get(run["model"].split("/")[-1], {"sae_release": None})
    same_sae, template = published["sae_release"] == run["sae_release"], published.get("prompt_template")
    if not same_sae or template not in (None, run["prompt_template"]):
        return None
    figures = published["sae_ids"].get(run["sae_id"], {}).get(run["ranking"], {})
    return figures.get(entry["masked"], {}).get(entry["k"])


def to_csv(table):
    """All columns of `frame`'s table, in full precision."""
    return table.to_csv(index=False, lineterminator="\n")


def to_latex(table):
    """`frame`'s table as a booktabs tabular: with the drops' intervals, and the paper's figures beside ours."""
    cells = _write_cells(table, drop_bounds=True)
    aligned = "".join("l" if name in (*ROW_NAMES, *SETTINGS) else "r" for name in cells)
    tabular = cells.to_latex(index=False, escape=True, column_format=aligned)
    tabular = re.sub(r"(?<=[ \[])-(?=\d)", "$-$", tabular)  # a minus, not a hyphen
    return "".join(f"% {note}\n" for note in ("Needs \\usepackage{booktabs}.", *_notes(cells))) + tabular


def terminal(table):
    """`frame`'s table for 100 columns: a part for each combination of settings, in as many blocks as it takes."""
    settings = [name for name in SETTINGS if name in table]
    parts, shown = [], {}
    for values, rows in table.groupby(settings, sort=False) if settings else [((), table)]:
        cells = _write_cells(rows.drop(columns=settings))
        heading = ", ".join(f"{name} {value}" for name, value in zip(settings, values))
        parts += [heading] * bool(heading) + _lay_out(cells)
        shown |= dict.fromkeys(cells)
    return "\n\n".join([*parts, "\n".join(_notes(shown))])


def _notes(cells):
    return [note for name, note in NOTES.items() if name in cells]


def _write_cells(table, drop_bounds=False):
    """The table as a reader sees it: a DataFrame of texts, without the columns that are empty.

    drop_bounds: with an interval for each drop, which the terminal has no room for.
    """
    import pandas

    masked = table.masked != "none"
    cells = {"ranking": table.ranking.where(masked, table.questions), "masked": table.masked, "K": table.k}
    cells |= {name: table[name] for name in SETTINGS if name in table}
    if table.population[table.questions == "kept"].nunique() > 1:
        cells["questions"] = table.population.str[:6]
    cells["n"] = table.n.astype(str)
    for metric, heading in (("em", "EM"), ("f1", "F1"), ("named", "named")):
        cells[heading] = _write_numbers(table, metric, 2, bounds=1)
        cells[f"{heading} drop"] = _write_numbers(table, f"{metric}_drop", 2, bounds=drop_bounds and 1)
    cells["mean K"] = _write_numbers(table, "mean_k", 1)
    cells["fewer"] = [str(count) if count else "" for count in table.fewer_than_k.fillna(0)]
    cells["removed"] = _write_numbers(table, "removed", 1)
    for heading in ("answer", "format"):
        cells[heading] = _write_numbers(table, f"{heading}_log_prob_drop", 3, bounds=drop_bounds and 3)
    paper = (_write_numbers(table, name, 2) for name in ("paper_em", "paper_f1"))
    cells["paper"] = [f"{em} / {f1}" if em else "" for em, f1 in zip(*paper)]
    return pandas.DataFrame({name: list(texts) for name, texts in cells.items() if any(texts)})


def _write_numbers(table, name, digits, bounds=0):
    """A column as texts, decimal points one below the other; with [low, high], where `bounds` says their digits."""

    def write(values, digits):  # zero is added to make 0.00 of what rounds to -0.00
        return ["" if value != value else f"{round(value, digits) + 0.0:.{digits}f}" for value in values]

    means = write(table[name], digits)
    means = [mean and mean.rjust(max(map(len, means))) for mean in means]
    if not bounds:
        return means
    low, high = (write(table[f"{name}_{bound}"], bounds) for bound in ("low", "high"))
    return [mean and f"{mean} [{low}, {high}]" for mean, low, high in zip(means, low, high)]


def _lay_out(cells):
    """The cells as blocks of text, of as many columns as WIDTH allows, each beginning with what says which row it is.

    A drop stands beside its level, and is headed "drop" there.
    """
    heads = {name: "drop" if name.endswith(" drop") else name for name in cells}
    widths = {name: max(map(len, [heads[name], *cells[name]])) for name in cells}
    named = [name for name in ROW_NAMES if name in cells]
    blocks = []
    for name in cells.columns.drop(named):
        if heads[name] != "drop":
            group = [n for n in (name, f"{name} drop") if n in cells]
            if not blocks or sum(widths[n] + 2 for n in (*named, *blocks[-1], *group)) - 2 > WIDTH:
                blocks.append([])
            blocks[-1] += group

    def align(text, name):
        return text.ljust(widths[name]) if name in LEFT else text.rjust(widths[name])

    texts = []
    for block in blocks:
        rows = [heads, *(row for row in cells.to_dict("records") if any(row[name] for name in block))]
        lines = ("  ".join(align(row[name], name) for name in named + block).rstrip() for row in rows)
        texts.append("\n".join(lines))
    return texts


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
    # TrueType, for publishers refuse Matplotlib's Type 3 fonts; a salt in place of the random ids of an SVG.
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "results"}):
        make_figure(entries).savefig(file, format=format, dpi=300, metadata=dates[format])


def make_figure(entries):
    """EM and F1 against K with their intervals, and the drop in the answer's log probability where there is one.

    As wide as a paper's column (3.3 inches). entries: of masked rounds at least one.
    """
    import pandas
    from matplotlib.figure import Figure

    table = frame(entries)
    lines, left_out = _pick_lines(table)
    places = _place_ks(list(lines.values()))
    panels = {"em": "EM (%)", "f1": "F1 (%)"}
    if table.answer_log_prob_drop.notna().any():
        panels["answer_log_prob_drop"] = "answer's log prob.,\ndrop (nats a token)"
    figure = Figure(figsize=(3.3, 1 + 1.5 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    axes[1].sharey(axes[0])
    shown = pandas.concat(lines.values())
    unmasked = table[(table.masked == "none") & (table.questions == "kept") & table.population.isin(shown.population)]
    for axis, (metric, title) in zip(axes, panels.items()):
        _draw_lines(axis, lines, places, metric)
        if metric in LEVELS and len(unmasked) and not (shown.mean_k == 0).any():
            axis.axhline(unmasked[metric].iloc[0], color="0", linestyle=":", linewidth=0.9, label="unmasked")
        axis.set_ylabel(title, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    labels = [" = ".join(k for k in places if places[k] == place) for place in sorted({*places.values()})]
    axes[-1].set_xticks(range(len(labels)), labels)
    axes[-1].set_xlabel("K, latents masked a question", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    look = {"ncols": 2 if max(map(len, labels)) <= 22 else 1, "fontsize": 7, "title_fontsize": 7, "frameon": False}
    title = f"{left_out} more lines: see results.csv" if left_out else None
    figure.legend(handles, labels, loc="outside lower center", title=title, **look)
    return figure


def _pick_lines(table):
    """{label: rows} of at most six lines, the paper's settings and TopK first; and how many are left out.

    K = 0 masks nothing, whatever the ranking: a line without it takes another's of the same questions and settings.
    """
    import pandas

    settings = [name for name in SETTINGS if name in table]
    masked, lines = table[table.masked != "none"], []
    for (ranking, mask, *values), rows in masked.groupby(["ranking", "masked", *settings], sort=False):
        others = [f"{name} {value}" for name, value in zip(settings, values) if value != SETTINGS[name]]
        alike = (masked[[*settings, "population"]] == rows[[*settings, "population"]].iloc[0]).all(axis=1)
        if not (rows.mean_k == 0).any():
            rows = pandas.concat([masked[alike & (masked.mean_k == 0)].head(1), rows])
        lines.append((len(others), mask != "TopK", ", ".join([f"{ranking} {mask}", *others]), rows))
    lines.sort(key=lambda line: line[:2])
    return {label: rows for *_, label, rows in lines[:LINES]}, max(0, len(lines) - LINES)


def _place_ks(lines):
    """{K: its place on the axis}, ascending. Neighbours that mask the same latents in every line share a place.

    Lists that end before K make one mask of K = 10 and 50%: equal mean K, equal figures. lines: the rows of each.
    """
    lines = [rows.drop_duplicates("k").set_index("k")[["mean_k", "em", "f1"]] for rows in lines]
    mean_k = {k: min(rows.mean_k[k] for rows in lines if k in rows.index) for rows in lines for k in rows.index}
    places, last = {}, None
    for k in sorted(mean_k, key=lambda k: (mean_k[k], _order_k(k))):
        both = [rows.loc[k].equals(rows.loc[last]) for rows in lines if {k, last} <= {*rows.index}]
        places[k] = places[last] if both and all(both) else len({*places.values()})
        last = k
    return places


def _draw_lines(axis, lines, places, metric):
    """Each line with its intervals, a marker of its own, TopK solid, BottomK dashed and hollow: no need of colour."""
    for number, (label, rows) in enumerate(lines.items()):
        rows = rows.assign(place=rows.k.map(places)).drop_duplicates("place").dropna(subset=metric)
        # Beside each other, or one line's intervals would hide another's.
        x = rows.place + 0.07 * (number - (len(lines) - 1) / 2)
        spread = [(rows[metric] - rows[f"{metric}_low"]).clip(0), (rows[f"{metric}_high"] - rows[metric]).clip(0)]
        grey, topk = str(0.12 * number), "TopK" in label
        look = {"color": grey, "marker": MARKERS[number], "markerfacecolor": grey if topk else "white"}
        look |= {"linestyle": "-" if topk else "--", "linewidth": 1.1, "markersize": 4, "elinewidth": 0.8, "capsize": 2}
        axis.errorbar(x, rows[metric], spread, label=label, **look)
