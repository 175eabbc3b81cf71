"""The figure: what masking costs against K, a paper's column wide, for the page and for papers."""

import io

from experiment.report import tables

PANELS = {"em": "EM (%)", "f1": "F1 (%)", "answer_log_prob_drop": "answer's log prob.,\ndrop (nats a token)"}
MARKERS = "os^Dv*"  # of the figure: a marker a line
STYLE = {"font.size": 7, "legend.frameon": False, "lines.linewidth": 1, "lines.markersize": 4, "errorbar.capsize": 2}
# TrueType, for publishers refuse Matplotlib's Type 3 fonts; a salt in place of the random ids of an SVG.
STYLE |= {"pdf.fonttype": 42, "svg.hashsalt": "results"}


def draw(entries):
    """`make_figure`'s figure as {"png": bytes, "pdf": ..., "svg": ...}: for the same entries the same bytes. Empty
    where nothing was masked."""
    import matplotlib

    if (tables.frame(entries).masked == "none").all():
        return {}
    dates, files = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}, {}
    with matplotlib.rc_context(STYLE):
        figure = make_figure(entries)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out: not once more for each format
        for format, date in dates.items():
            file = io.BytesIO()
            figure.savefig(file, format=format, dpi=300, metadata=date, transparent=format == "svg")
            files[format] = file.getvalue()
    return files


def make_figure(entries):
    """EM and F1 against K with their intervals, and the drop in the answer's log probability where there is one.

    As wide as a paper's column (3.3 inches), of at most six lines, the paper's settings and TopK first; dotted: the
    unmasked level, and that of K = 0. entries: of masked rounds at least one.
    """
    from matplotlib.figure import Figure

    table = tables.frame(entries)
    masked = table[table.masked != "none"]
    names = masked.ranking, masked.masked, *tables.write_settings(masked).values()
    masked = masked.assign(line=[" ".join(texts) for texts in zip(*names)])
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
        for number, level in enumerate(unmasked[metric].dropna().unique()):  # of each folder one
            axis.axhline(level, color="0", linestyle=":", linewidth=0.9, label="" if number else "unmasked")
        axis.set_ylabel(PANELS[metric])
    ticks = range(places.max() + 1)
    axes[-1].set_xticks(ticks, [" = ".join(places.index[places == tick]) for tick in ticks])
    axes[-1].set_xlim(-0.5, places.max() + 0.5)
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
