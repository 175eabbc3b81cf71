"""ONE table of all that a folder holds, a pandas DataFrame; terminal, CSV, LaTeX, figure and page are made of it.

Knows nothing of models. pandas and matplotlib are imported where they are used: only the end of a round needs them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from experiment.records import provenance
from experiment.report.estimates import DROP_ONLY, MASKS, METRICS

if TYPE_CHECKING:
    import pandas

SETTINGS = {"error_term": "drop", "ablation": "zero"}  # and the paper's choice, which runs that lack one made too
TEXTS = ["ranking", "masked", "questions", "k", *SETTINGS, "population"]  # which, in one folder, no two rows share
# Of several folders: those of these settings that differ are columns too.
COLUMNS = [name for name in provenance.SETTINGS if name not in ("questions", *SETTINGS)]
COLUMNS += ["model_digest", "sae_digest", "dataset", "dataset_config", "split", "limit", "sample"]
NAMES = {
    "model": ("model",),
    "sae_release": ("sae_release", "sae_id"),
    "questions": ("dataset", "dataset_config", "split"),
}
BOUNDS = ("", "_low", "_high")
LEVELS = [f"{metric}{bound}" for metric in METRICS if metric not in DROP_ONLY for bound in BOUNDS]
DROPS = [f"{metric}_drop{bound}" for metric in METRICS for bound in BOUNDS]
NUMBERS = ["mean_k", "fewer_than_k", "removed", "missed_target", "n", "left_out"]
NUMBERS += [*LEVELS, *DROPS, "paper_em", "paper_f1"]
PAPER = Path(__file__).with_name("paper.json")

SCORES = {"EM": "em", "EM drop": "em_drop", "F1": "f1", "F1 drop": "f1_drop"}
OTHERS = {"named": "named", "named drop": "named_drop"}
OTHERS |= {"answer": "answer_log_prob_drop", "format": "format_log_prob_drop"}
MISSED_SHARE = 0.1  # of the questions: from there on a matched mask is marked
MISSED = "*"  # marks what a matched mask removes where it is not matched to the baseline's
NOTES = {
    "n": "[ ]: 95% interval over resampled contexts. drop: unmasked minus masked. Both in percent.",
    "set": "set: which of the sets of kept questions, by the beginning of its hash.",
    "named": "named: a right answer stands somewhere in the text, in percent.",
    "answer": "answer, format: drop in log probability (nats a token) of the unmasked text in, around its [[ ]].",
    "removed": "removed: what the mask takes away, in percent of each position's norm, special tokens left out.",
    MISSED: f"{MISSED}: for over a tenth of the questions this is more than half above or below the baseline's.",
    "mean K": "mean K: latents masked a question.",
    "fewer": "fewer: questions for which the file of activations holds fewer latents than K asks for.",
    "left out": "left out: questions that do not fit the model's context, and are in no figure.",
    "paper": "paper: EM / F1 in GradSAE, arXiv 2505.08080.",
}


def frame(entries):
    """The entries of results.json as one DataFrame: texts, then numbers, in percent or nats, NaN where there is none.

    Rows: the questions unmasked (all asked, then kept), one a population, which its hash tells apart, for two can have
    equal n; then one a ranking, mask and K, and a single one of K = 0, which is the same for all of them. Settings in
    which the entries differ are columns, the first ones.
    """
    import pandas

    entries = _name_alike(entries)
    differing = find_differing(entries)
    unmasked = [entry for entry in entries if "masked" not in entry]
    masked = sort_masked(entries)
    parts = {entry["population"] for entry in unmasked if not _asks_all(entry)}  # round 1 did not ask all there is
    rows = []
    for entry in unmasked:
        row = _row(entry, entry["all"], "all asked", entry["population_all"])
        rows.append(row | {"left_out": len(entry.get("left_out", ()))})
    rows += [_row(entry, entry, "kept", entry["population"]) for entry in unmasked]
    rows += [_row(entry, entry["clean"], "kept", entry["population"]) for entry in masked if entry["clean"]]
    for entry in sorted(masked, key=lambda entry: entry["k"] != "0"):
        row = _row(entry, entry, "kept", entry["population"]) | _numbers(entry["drop"] or {}, "_drop")
        row |= {name: entry.get(name) for name in ("k", "mean_k", "fewer_than_k", "removed", "missed_target")}
        row |= {"left_out": len(entry.get("left_out", ()))}
        if entry["population"] not in parts:
            row |= dict(zip(("paper_em", "paper_f1"), find_published(entry) or ()))
        if entry["k"] != "0":
            row |= {"ranking": entry["run"]["ranking"], "masked": name_mask(entry)}
            row |= {"ablation": entry["run"].get("ablation", SETTINGS["ablation"])}
        rows.append(row)
    table = pandas.DataFrame(rows, columns=differing + TEXTS + NUMBERS)
    counts = dict.fromkeys(("n", "fewer_than_k", "missed_target", "left_out"), "Int64")
    table = table.astype(dict.fromkeys(NUMBERS, float) | counts)
    return table.drop_duplicates(differing + TEXTS, ignore_index=True)


def _name_alike(entries: list[dict]) -> list[dict]:
    """The entries, with models, SAEs and data sets that are the same named alike, as the first entry names them."""
    first, named = {}, []
    for entry in entries:
        run, values = dict(entry["run"]), provenance.depends_on(entry["run"])
        for field, names in NAMES.items():
            if values[field] is None:
                continue
            content = field, json.dumps([values[field], values["sae_id"] if field == "sae_release" else None])
            run |= first.setdefault(content, {name: run.get(name) for name in names})
        named.append(entry | {"run": run})
    return named


def _asks_all(entry: dict) -> bool:
    return entry["run"].get("limit") is None and entry["run"].get("sample") is None


def find_differing(entries):
    """Those of COLUMNS in which the entries' runs differ: none in one folder, but for what was selected."""
    values = {name: {_write_setting(entry["run"].get(name)) for entry in entries} for name in COLUMNS}
    return [name for name in COLUMNS if len(values[name] - ({""} if name in provenance.WHERE_BOTH else set())) > 1]


def _write_setting(value):
    return "" if value is None else str(value)


def sort_masked(entries):
    """The entries of masked rounds, by ranking, mask, setting and K; folders stay in their order.

    Of K that mask equally many, numbers stand before percentages.
    """
    alike = _name_alike(entries)
    differing = find_differing(alike)
    folders = list(dict.fromkeys(_settings_of(entry, differing) for entry in alike))

    def place(entry, named):
        run, k = SETTINGS | entry["run"], entry["k"]
        settings = [run[name] != SETTINGS[name] for name in SETTINGS]
        order_k = entry["mean_k"], k.endswith("%"), float(k.removesuffix("%"))
        folder = folders.index(_settings_of(named, differing))
        return run["ranking"], list(MASKS).index(entry["masked"]), folder, settings, order_k

    masked = [(entry, named) for entry, named in zip(entries, alike) if "masked" in entry]
    return [entry for entry, _ in sorted(masked, key=lambda pair: place(*pair))]


def _settings_of(entry, names):
    return tuple(_write_setting(entry["run"].get(name)) for name in names)


def name_mask(entry):
    """ "TopK" or "BottomK", and what of SETTINGS is not the paper's."""
    run = SETTINGS | entry["run"]
    return " ".join([MASKS[entry["masked"]], *(run[name] for name in SETTINGS if run[name] != SETTINGS[name])])


def _row(entry, figures, questions, population):
    """An unmasked row. figures: those of `entry` itself, or of a part of it."""
    row = {name: _write_setting(entry["run"].get(name)) for name in COLUMNS}
    row |= {"ranking": "", "masked": "none", "questions": questions, "k": "", "population": population}
    row |= {"error_term": entry["run"].get("error_term", "drop"), "ablation": "", "n": figures["n"]}
    return row | _numbers(figures, "")


def _numbers(figures: dict, suffix: str) -> dict[str, float]:
    """{column: mean, low or high} of each metric that is in `figures`; no low and high without an interval."""
    numbers = {}
    for metric in METRICS:
        if figures.get(metric) is not None:
            interval = figures["intervals"][metric] or ()
            for bound, value in zip(BOUNDS, (figures[metric], *interval)):
                numbers[f"{metric}{suffix}{bound}"] = value
    return numbers


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
    cells, notes = write_cells(table)
    texts = cells.columns.get_loc("n")
    aligned = "l" * texts + "r" * (len(cells.columns) - texts)
    tabular = cells.to_latex(index=False, escape=True, column_format=aligned)
    tabular = re.sub(r"(?<=[ \[])-(?=\d)", "$-$", tabular)  # a minus, not a hyphen
    return "".join(f"% {note}\n" for note in ("Needs \\usepackage{booktabs}.", *notes)) + tabular


def terminal(table):
    """`frame`'s table for 100 columns, in two halves: EM and F1 with their intervals, then the rest."""
    cells, notes = write_cells(table)
    cells = cells.drop(columns="named drop", errors="ignore")
    row = cells.columns[: cells.columns.get_loc("n")]
    without = cells.columns.drop(["EM", "F1"])
    cells[without] = cells[without].replace(r" \[.*", "", regex=True)
    cells = cells.apply(lambda column: column.str.ljust(column.str.len().max()))
    texts = []
    for names in ([*row, "n", *SCORES], cells.columns.drop(["n", *SCORES], errors="ignore")):
        half = cells[[name for name in names if name in cells]]
        heads = [re.sub(".* drop", "drop", name) for name in half]
        texts.append(half.to_string(index=False, header=heads, justify="left"))
    return re.sub(" +$", "", "\n\n".join([*texts, "\n".join(notes)]), flags=re.MULTILINE)


def write_cells(table):
    """The table as a reader sees it, a DataFrame of texts without the columns that are empty, and notes on them."""
    import pandas

    is_masked, differing = table.masked != "none", table.columns[: table.columns.get_loc("ranking")]
    cells = write_settings(table)
    cells |= {"ranking": table.ranking.where(is_masked, table.questions), "masked": table.masked}
    cells["masked"] = table.masked.where(is_masked | (table.error_term == "drop"), "none " + table.error_term)
    cells["K"] = table.k.str.rjust(4)
    kept = table[table.questions == "kept"]
    if kept.population.nunique() > len(kept[[*differing, "error_term"]].drop_duplicates()):
        cells["set"] = table.population.str[:6]
    cells["n"] = _write("{:5}", table.n)
    for name, column in (SCORES | OTHERS).items():
        form = "{:z6.3f} [{:z.3f}, {:z.3f}]" if "log_prob" in column else "{:z6.2f} [{:z.1f}, {:z.1f}]"  # z: no -0.00
        cells[name] = _write(form, *(table[f"{column}{bound}"] for bound in BOUNDS))
    cells |= {"removed": _write_removed(table), "mean K": _write("{:6.1f}", table.mean_k)}
    cells["fewer"] = _write("{:5}", table.fewer_than_k.replace(0, pandas.NA))
    cells["left out"] = _write("{:8}", table.left_out.replace(0, pandas.NA))
    cells["paper"] = _write("{:6.2f} / {:6.2f}", table.paper_em, table.paper_f1)
    cells = {name: list(texts) for name, texts in cells.items() if any(map(str.strip, texts))}
    shown = [*cells, *(MISSED for text in cells.get("removed", ()) if MISSED in text)]
    return pandas.DataFrame(cells), [note for name, note in NOTES.items() if name in shown]


def write_settings(table):
    """{setting: a text for each row} of the settings that differ, but for those that say no more than earlier ones."""
    told, rows = [], [()] * len(table)
    for name in table.columns[: table.columns.get_loc("ranking")]:
        longer = [(*row, text) for row, text in zip(rows, table[name])]
        if len(set(longer)) > len(set(rows)):
            told, rows = [*told, name], longer
    return {name: _shorten(table[name]) for name in told}


def _shorten(texts):
    """Of paths that differ in some of their parts (layer_9/width_131k, layer_20/width_131k), these parts; of digests
    the beginning."""
    if all(re.fullmatch("[0-9a-f]{64}|", text) for text in texts):
        return [text[:8] for text in texts]
    parts = [text.split("/") for text in texts]
    places = [place for place, names in enumerate(zip(*parts)) if len(set(names)) > 1]
    if len(set(map(len, parts))) > 1 or not places:
        return list(texts)
    return ["/".join(part[place] for place in places) for part in parts]


def _write(form: str, *columns: pandas.Series) -> list[str]:
    """Columns as one of texts, empty where there is no number; a mean without its interval where there is none."""
    import pandas

    texts = []
    for numbers in zip(*columns):
        missing = [pandas.isna(number) for number in numbers]
        if missing[0]:
            texts.append("")
        elif any(missing):
            texts.append(form.partition(" [")[0].format(numbers[0]))
        else:
            texts.append(form.format(*numbers))
    return texts


def _write_removed(table: pandas.DataFrame) -> list[str]:
    """What masks remove, in percent, and a mark where that is not what a matched mask was to remove."""
    texts = _write("{:7.1f}", table.removed)
    marked = table.missed_target.fillna(0) > MISSED_SHARE * table.n
    if not marked.any():
        return texts
    return [text and text + (MISSED if is_marked else " ") for text, is_marked in zip(texts, marked)]


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
