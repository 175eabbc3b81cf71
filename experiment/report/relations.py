"""What an entry says in the light of others of its folder: excess over controls, recovery, agreement with effects.

Made anew whenever a folder is read, so that it is of what lies there now; where a journal that it takes is not whole,
it stays as it is. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from experiment.masks import EFFECT, OTHERS
from experiment.records.entries import Agreement, Entry, Estimate, Excess, MaskedEntry, UnmaskedEntry
from experiment.records.schema import KeptRecord, RankedLatents, RankedQuestion, Record
from experiment.report import comparisons, estimates
from experiment.report.comparisons import Contexts, Effects, PerQuestion, Scores

MADE_HERE = ("excess", "faithfulness", "completeness", "faithfulness_auc", "completeness_auc")
UNKNOWN = RankedLatents(active=[], topk=[], bottomk=[])
RECOVERIES = ("faithfulness", "completeness")


@dataclass(frozen=True)
class Mask:
    """What tells the masks of a folder apart."""

    ranking: str | None
    side: str
    k: str
    ablation: str
    control: str | None = None
    keep_only: bool = False

    @classmethod
    def of(cls, entry: MaskedEntry) -> Mask:
        provenance = entry.provenance
        return cls(
            ranking=provenance.ranking,
            side=entry.masked,
            k=entry.k,
            ablation=provenance.ablation,
            control=entry.control,
            keep_only=bool(entry.keep_only),
        )

    @property
    def controls(self) -> dict[str, Mask]:
        """The masks that it is held against, by the name of the control. matched is matched to the baseline's alone."""
        if self.k == "0" or self.control is not None or self.keep_only:
            return {}
        controls = {"direction": replace(self, control="direction")}
        if self.ranking == "baseline":
            controls["matched"] = replace(self, ranking="matched")
        if self.ranking in OTHERS:
            controls["own"] = replace(self, ranking="baseline")
        return controls


def score_mask(draws: Sequence[Mapping[str, Record]], ranked: Mapping[str, RankedLatents]) -> Scores:
    """The scores of the answers under a mask, means over its draws. ranked: by id, what is known of their latents."""
    scores = []
    for journal in draws:
        records = list(journal.values())
        scores.append(comparisons.find_scores(records, [ranked.get(record.id, UNKNOWN) for record in records]))
    return comparisons.average_draws(scores)


def score_unmasked(files: Iterable[Mapping[str, RankedQuestion]]) -> PerQuestion:
    """m of the unmasked answers in files of activations: the mean log probability of their tokens in the brackets."""
    unmasked: PerQuestion = {}
    for of_file in files:
        questions = list(of_file.values())
        columns = estimates.collect_columns(questions, questions)
        unmasked.update(zip(of_file, columns.get("answer_log_prob", [])))
    return unmasked


def add_agreement(
    entries: Iterable[Entry], journals: Mapping[str, Mapping[str, Record]], contexts: Contexts
) -> list[Entry]:
    """The entries, round 1's with how well their rankings' scores tell effects, where these were measured.

    journals: of the unmasked answers, by ranking.
    """
    entries = list(entries)
    rankings = {entry.provenance.ranking for entry in entries if isinstance(entry, UnmaskedEntry)}
    effects = _find_kept(journals.get(EFFECT, {}))
    agreeing: list[Entry] = []
    for entry in entries:
        ranking = entry.provenance.ranking or ""
        is_known = ranking in journals and EFFECT in journals
        stays = EFFECT in rankings and not is_known
        if not isinstance(entry, UnmaskedEntry) or stays:
            agreeing.append(entry)
            continue
        values = {name: value for name, value in entry.fields().items() if name != "agreement"}
        agreement = _measure_agreement(_find_kept(journals.get(ranking, {})), effects, contexts)
        if agreement is not None:
            values["agreement"] = agreement
        agreeing.append(UnmaskedEntry.model_validate(values))
    return agreeing


def _find_kept(journal: Mapping[str, Record]) -> dict[str, KeptRecord]:
    return {record.id: record for record in journal.values() if isinstance(record, KeptRecord)}


def _measure_agreement(
    kept: Mapping[str, KeptRecord], effects: Mapping[str, KeptRecord], contexts: Contexts
) -> Agreement | None:
    """Of one ranking's records with those of the ranking by effects, by id."""
    measured = {}
    unmeasured = []
    for record in kept.values():
        effect = effects.get(record.id)
        if effect is None or effect.effects is None or record.measured != effect.measured:
            continue
        scores = effect.effects if record is effect else record.scores
        if scores is None:
            continue
        measured[record.id] = Effects(scores, effect.effects, k=len(record.active) // 2)
        if effect.unmeasured is not None:
            unmeasured.append(effect.unmeasured)
    return comparisons.measure_agreement(measured, unmeasured, contexts)


def relate(
    entries: Iterable[Entry], scores_of: Mapping[Mask, Scores], unmasked: PerQuestion, contexts: Contexts
) -> list[Entry]:
    """The entries with what stands on other ones (MADE_HERE), of the masks that have scores.

    scores_of: the answers under each mask, means over its draws.  unmasked: m of the unmasked answers.
    """
    entries = list(entries)
    masked = {Mask.of(entry): entry for entry in entries if isinstance(entry, MaskedEntry)}
    excesses = _measure_excesses(scores_of, contexts)
    recovered = _measure_recoveries(masked, scores_of, unmasked, contexts)
    related: list[Entry] = []
    for entry in entries:
        if not isinstance(entry, MaskedEntry):
            related.append(entry)
            continue
        mask = Mask.of(entry)
        values = {name: value for name, value in entry.fields().items() if name not in MADE_HERE}
        excess = _keep_excess(entry, mask, masked, scores_of) | excesses.get(mask, {})
        if excess:
            values["excess"] = excess
        values |= _keep_recovery(entry, mask, masked, scores_of) | recovered.get(mask, {})
        related.append(MaskedEntry.model_validate(values))
    return related


def _keep_excess(
    entry: MaskedEntry, mask: Mask, masked: Mapping[Mask, MaskedEntry], scores_of: Mapping[Mask, Scores]
) -> dict[str, Excess]:
    """What an entry says of its excess over controls that are there, but cannot be made anew."""
    kept = {}
    for name, excess in (entry.excess or {}).items():
        control = mask.controls.get(name)
        if control in masked and not {mask, control} <= scores_of.keys():
            kept[name] = excess
    return kept


def _keep_recovery(
    entry: MaskedEntry, mask: Mask, masked: Mapping[Mask, MaskedEntry], scores_of: Mapping[Mask, Scores]
) -> dict[str, Estimate]:
    """What an entry says of recovery, where the masks that it takes are there, but it cannot be made anew."""
    kept = {}
    for name in RECOVERIES:
        taken = {mask, replace(mask, k="0")}
        if name == "completeness":
            taken.add(replace(mask, keep_only=False))
        if not taken <= masked.keys() or taken <= scores_of.keys():
            continue
        for field in (name, f"{name}_auc"):
            estimate = getattr(entry, field)
            if estimate is not None:
                kept[field] = estimate
    return kept


def _measure_excesses(scores_of: Mapping[Mask, Scores], contexts: Contexts) -> dict[Mask, dict[str, Excess]]:
    """{mask: {control: excess}}"""
    pairs = {}
    for mask, scores in scores_of.items():
        for name, control in mask.controls.items():
            if control in scores_of:
                pairs[mask, name] = (scores, scores_of[control])
    found: dict[Mask, dict[str, Excess]] = {}
    for (mask, name), excess in comparisons.measure_excesses(pairs, contexts).items():
        found.setdefault(mask, {})[name] = excess
    return found


def _measure_recoveries(
    masked: Mapping[Mask, MaskedEntry], scores_of: Mapping[Mask, Scores], unmasked: PerQuestion, contexts: Contexts
) -> dict[Mask, dict[str, Estimate]]:
    """{mask of --keep-only: {field of its entry: estimate}}; areas stand with the largest K."""
    columns: dict[tuple[Mask, str], PerQuestion] = {}
    curves: dict[tuple[Mask, str], dict[float, PerQuestion]] = {}  # by a mask without K
    largest: dict[tuple[Mask, str], Mask] = {}
    for mask in sorted(scores_of, key=lambda mask: masked[mask].mean_k):
        if not mask.keep_only or mask.k == "0":
            continue
        none = _find_log_probs(scores_of, replace(mask, k="0"))
        reached = {"faithfulness": mask, "completeness": replace(mask, keep_only=False)}
        for name in RECOVERIES:
            log_probs = _find_log_probs(scores_of, reached[name])
            if not none or not log_probs:
                continue
            columns[mask, name] = comparisons.measure_recovery(log_probs, none, unmasked)
            without_k = replace(mask, k="")
            curves.setdefault((without_k, name), {})[masked[mask].mean_k] = columns[mask, name]
            largest[without_k, name] = mask
    for curve, of_ks in curves.items():
        area = comparisons.area_over_log_k(of_ks)
        if area:
            columns[largest[curve], f"{curve[1]}_auc"] = area
    recovered: dict[Mask, dict[str, Estimate]] = {}
    for (mask, name), estimate in comparisons.estimate_each(columns, contexts).items():
        recovered.setdefault(mask, {})[name] = estimate
    return recovered


def _find_log_probs(scores_of: Mapping[Mask, Scores], mask: Mask) -> PerQuestion:
    """m of the answers under a mask; none where it was not run, or it is not known."""
    return scores_of.get(mask, {}).get("answer_log_prob", {})
