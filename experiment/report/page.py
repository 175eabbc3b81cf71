"""The page: results.html, one file without network. Knows nothing of models.

From its top: what was found, what the words mean (`page_words`), the figure (`panels`), the tables, every question and
latent, the prompt and what was run. page.html is its text, page.css its looks. All but questions and latents stands in
it as it is. These are `page_data`, in JSON, which the scripts show: state.js (data and address), answers.js (verdicts),
tables.js (heads, pages, CSV), histogram.js, list.js (the questions), question.js (an opened one), latents.js,
figures.js (marks and legend), and page.js, which binds them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import jinja2
import markupsafe

from experiment.records.entries import Entry, UnmaskedEntry
from experiment.report import blocks, cells, figure, metrics, page_data, page_words, panels, sentences, statistics
from experiment.report.blocks import Line, Setting
from experiment.report.folders import Folder
from experiment.report.metrics import Metric

FOREMOST = (metrics.EM,)  # what the page's first table is of; the others are one click away
COMPARED = tuple(metric for metric in metrics.DROPS if metric.name in metrics.EXCESS)  # with controls
DROP = "Drop: unmasked minus masked, on the same questions."
UNBROKEN = re.compile(r"\[ \]|--[a-z-]+")  # on one line: the sign of intervals, and options
GLYPHS = {
    "": "",
    "o": "●",
    "s": "■",
    "D": "◆",
    "^": "▲",
    "v": "▼",
    "P": "✚",
    "X": "✖",
    "<": "◀",
    ">": "▶",
    "p": "⬟",
    "h": "⬢",
}
# Neuronpedia's issue 123. Not known of other models.
CAVEATS = {"gemma-2-9b-it": "Neuronpedia's pages on gemma-2-9b-it were made with a wrongly placed BOS token."}
FACTS = {
    "model": "model",
    "SAE": "sae_release",
    "SAE id": "sae_id",
    "place": "hook_name",
    "latents": "d_sae",
    "error term": "error_term",
    "data set": "dataset",
    "split": "split",
    "configuration": "dataset_config",
    "precision": "dtype",
    "SAE's precision": "sae_dtype",
    "device": "device",
    "longest answer, tokens": "max_new_tokens",
}


@dataclass(frozen=True)
class LegendEntry:
    """Of a ranking's lines in the figure, or of those of all rankings' controls."""

    name: str
    color: str
    glyph: str
    is_dashed: bool
    is_control: bool


@dataclass(frozen=True)
class Row:
    """A row of a table: a mask's name, and a text for each K. is_below: of the ranking above it."""

    name: str
    texts: list[str]
    is_below: bool = False

    @property
    def cells(self) -> list[tuple[str, str, bool]]:
        """(mean, interval with what follows, whether all of it is zero) of each text."""
        parts = []
        for text in self.texts:
            mean, bracket, interval = text.partition(" [")
            is_nothing = "0" in text and not any(digit in text for digit in "123456789")
            parts.append((mean, f"[{interval}" if bracket else "", is_nothing))
        return parts


@dataclass(frozen=True)
class Table:
    """A block for the page: rows in groups, a group per mask. notes: what its marks mean."""

    title: str
    heads: list[str]
    groups: dict[str, list[Row]]
    notes: list[str]


@dataclass(frozen=True)
class Fold:
    """Tables that are one click away, and what they hold; is_open: that are there at once."""

    title: str
    tables: list[Table]
    is_open: bool = False


@dataclass(frozen=True)
class Part:
    """A setting's tables: the foremost, and others, which are folded. levels: what stands above them."""

    levels: list[str]
    foremost: list[Table]
    folds: list[Fold]


def write_page(file: IO[str], folder: Folder, entries: Sequence[Entry]) -> None:
    """Writes a folder's page to a text file. entries: those of its entries that figure and tables show."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["unbroken"] = keep_together
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    settings = blocks.split_settings(entries)
    rankings = statistics.describe_rankings(blocks.list_unmasked(entries))
    model = name_model(folder)
    stream = environment.get_template("page.html").stream(
        finding=sentences.tell_finding(entries),
        subject=name_subject(folder),
        panels=panels.draw_panels(entries),
        legend=list_legend(entries),
        left_out=figure.tell_left_out(entries),
        parts=[make_part(setting) for setting in settings],
        notes=f"{DROP} {cells.INTERVALS}",
        words=page_words.list_words(entries),
        shows_removed=any(setting.has(metrics.REMOVED) for setting in figure.list_settings(entries)),
        rankings=list(zip(*rankings.values())),
        ranking_notes=statistics.list_notes(rankings),
        facts=list_facts(folder),
        template=folder.provenance.prompt_template or "",
        caveat=CAVEATS.get(model),
        data=page_data.collect(folder),
    )
    file.writelines(stream)


def keep_together(text: str) -> markupsafe.Markup:
    """A text as HTML, in which no line breaks inside of what is UNBROKEN."""
    escaped = str(markupsafe.escape(text))
    return markupsafe.Markup(UNBROKEN.sub(r'<span class="unbroken">\g<0></span>', escaped))


# ---------------------------------------------------------------------------------------------------------------------
# Figure and tables


def list_legend(entries: Sequence[Entry]) -> list[LegendEntry]:
    settings = figure.list_settings(entries)
    legend = figure.list_legend(settings, figure.choose_looks(settings))
    listed = []
    for name, look in legend.items():
        listed.append(LegendEntry(name, look.color, GLYPHS[look.marker], look.is_dashed, look.is_control))
    return listed


def make_part(setting: Setting) -> Part:
    """The foremost tables of the first mask, TopK where it is there; folded: of BottomK, whose rows are mostly zeros,
    and all tables of other metrics."""
    wanted = metrics.RESTORED if setting.keep_only else FOREMOST
    foremost: list[Table] = []
    folds = []
    for mask in setting.masks:
        of_mask = dataclasses.replace(setting, lines=setting.of(mask))
        tables = [make_table(of_mask, metric) for metric in of_mask.list_metrics() if metric in wanted]
        if not foremost:
            foremost = tables
        elif tables:
            folds.append(Fold(f"{mask} masked: {name_tables(tables)}", tables, has_effect(of_mask, wanted)))
    others = []
    for metric in setting.list_metrics():
        if metric not in wanted and metric.source != "excess":  # an excess stands in the table of its drop
            others.append(make_table(setting, metric))
    if others:
        folds.append(Fold(name_tables(others), others))
    return Part(cells.write_levels(setting), foremost, folds)


def name_tables(tables: Iterable[Table]) -> str:
    """What they are of, without units."""
    return ", ".join(table.title.partition(",")[0] for table in tables)


def has_effect(setting: Setting, of: Iterable[Metric]) -> bool:
    """Whether 0 is outside of an interval of any of these metrics. What stands below a ranking does not count."""
    for metric in of:
        for entry in setting.entries:
            cell = metric.read(entry)
            if entry.control is not None or cell is None or cell.low is None or cell.high is None:
                continue
            if cell.low > 0 or cell.high < 0:
                return True
    return False


def make_table(setting: Setting, metric: Metric) -> Table:
    """A metric's figures, a group of rows per mask, and what their marks mean."""
    ks = setting.list_ks(metric, setting.lines)
    groups: dict[str, list[Row]] = {}
    texts: list[str] = []
    for mask in setting.masks:
        rows = make_rows(setting, metric, setting.of(mask), ks)
        if rows:
            groups[mask] = rows
        for row in rows:
            texts += row.texts
    return Table(metric.label, list(ks.values()), groups, cells.list_marks(texts))


def make_rows(setting: Setting, metric: Metric, lines: Sequence[Line], ks: Iterable[str]) -> list[Row]:
    """The rows of a mask's lines: a ranking's; below it the paper's, its control's, and the differences."""
    rows = []
    lines_of: dict[str, list[Line]] = {}
    for line in lines:
        if line.has(metric):
            lines_of.setdefault(line.ranking, []).append(line)
    for of_ranking in lines_of.values():
        for line in of_ranking:
            is_below = line.control is not None and line is not of_ranking[0]
            name = f"in a random {line.control}" if is_below else line.name
            texts = cells.write_row(metric, line, ks, cells.find_digits(metric))
            rows.append(Row(name, texts, is_below))
            rows += make_papers_row(setting, metric, line, ks)
        rows += make_differences(setting, metric, of_ranking[0], ks)
    return rows


def make_papers_row(setting: Setting, metric: Metric, line: Line, ks: Iterable[str]) -> list[Row]:
    """The paper's figures of a line; nothing where it has none."""
    paper = blocks.find_papers(setting, [line], metric.name)
    if line.ranking not in paper:
        return []
    texts = cells.write_published(paper[line.ranking], ks)
    return [Row(f"the paper's {metrics.SHORT[metric.name]}", texts, is_below=True)]


def make_differences(setting: Setting, metric: Metric, line: Line, ks: Iterable[str]) -> list[Row]:
    """How much more a ranking costs than each of its controls; nothing of rankings that are drawn."""
    rows: list[Row] = []
    if metric not in COMPARED or line.ranking in blocks.DRAWN:
        return rows
    for control in setting.controls:
        beyond = metrics.make_excess(control, metric.name)
        if line.has(beyond):
            texts = cells.write_row(beyond, line, ks, cells.find_digits(beyond))
            rows.append(Row(page_words.DIFFERENCES[control], texts, is_below=True))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# What was run


def name_model(folder: Folder) -> str:
    """Without the organization that it is of."""
    return (folder.provenance.model or "").split("/")[-1]


def name_subject(folder: Folder) -> str:
    """Model, SAE and place."""
    provenance = folder.provenance
    parts = [provenance.model, provenance.sae_release, provenance.sae_id, provenance.hook_name]
    return ", ".join(part for part in parts if part)


def list_facts(folder: Folder) -> dict[str, str]:
    """{what: text} of what was run in a folder."""
    provenance = folder.provenance
    facts = {"questions kept": tell_kept(folder)}
    left_out = list_left_out(folder.entries)
    if left_out:
        facts["left out, too long for the model's context"] = f"{len(left_out)}: {', '.join(left_out)}"
    for name, field in FACTS.items():
        value = getattr(provenance, field)
        if value not in (None, ""):
            facts[name] = str(value)
    versions = (provenance.versions or {}).items()
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions)
    return facts


def tell_kept(folder: Folder) -> str:
    """How many questions were kept, and where round 1 says it, of how many."""
    for entry in folder.entries:
        if isinstance(entry, UnmaskedEntry) and entry.asked is not None:
            return f"{entry.kept} of {entry.asked} asked"
    return str(len(folder.kept))


def list_left_out(entries: Sequence[Entry]) -> list[str]:
    """The ids of the questions that do not fit the model's context."""
    ids: dict[str, None] = {}
    for entry in entries:
        ids.update(dict.fromkeys(entry.left_out))
    return list(ids)
