"""What is in results.json, as classes: entries with their figures and statistics. Rules as in schema.py."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from experiment.masks import Side
from experiment.records.schema import SCORES, Provenance, Stored, Text, parse_stored

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]

LOG_PROBS = ("answer_log_prob", "format_log_prob")  # of the unmasked answer's tokens; fields of Figures


class Figures(Stored):
    """Means over n questions: in percent, log probabilities in nats per token; None for what counts nowhere.

    intervals: 95%, low and high.  counted: over how many questions, of the metrics that do not count for all.
    """

    n: int
    em: float | None = None
    f1: float | None = None
    accuracy: float | None = None
    named: float | None = None
    answer_log_prob: float | None = None
    format_log_prob: float | None = None
    intervals: dict[str, Interval | None]
    counted: dict[str, int] | None = None

    @model_validator(mode="after")
    def _check_intervals(self) -> Self:
        for metric in (*SCORES, *LOG_PROBS):
            if self.mean_of(metric) is not None and metric not in self.intervals:
                raise ValueError(f"intervals lacks {metric}")
        return self

    def mean_of(self, metric: str) -> float | None:
        return getattr(self, metric)


class Estimate(Stored):
    """A mean over n questions, with its 95% interval over their contexts: a correlation, a share, or a recovery, which
    may be under 0 or over 1.

    mean: None where no question counts.  low, high: None where those that count are on a single context.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int


class Excess(Figures):
    """What a mask costs more than its control does: paired drops minus the control's, on n questions of both.

    Of EM, F1, named (in points) and the answer's log probability (nats per token).
    """


class Agreement(Stored):
    """How well a ranking's scores tell which latents matter: those whose masking alone costs the answer most.

    spearman: between scores and effects.  share: of the sum of the positive effects, what the ranking's TopK holds.
    found: of the K latents of largest effect, how many its TopK holds.  All are means over the questions in which
    something varies, at K = 50% of the latents active at the last position, over the latents that were measured.
    unmeasured: active latents without a measured effect, per question.
    """

    spearman: Estimate
    share: Estimate
    found: Estimate
    unmeasured: float | None = None
    k: Text = "50%"


class CommonLatent(Stored):
    """A latent in the TopK of so many questions. neuronpedia: its page there; empty where there is none."""

    latent: int
    questions: int
    neuronpedia: Text | None = None


class SharedPercent(Stored):
    """What two lists have in common, in percent of their length: TopK and BottomK. n: means over so many questions."""

    n: int | None = None
    topk: float | None
    bottomk: float | None

    def percent(self, side: Side) -> float | None:
        return self.topk if side == "topk" else self.bottomk


class LatentStatistics(Stored):
    """The paper's table 3 for one ranking, at K = 50%. overlap: with the other rankings, by name.

    union_topk: how many latents are in any question's TopK.
    """

    n: int
    active: float | None
    k_at_half: float | None = Field(alias="k_at_50%")
    same_context_percent: SharedPercent
    other_context_percent: SharedPercent | None = None
    union_topk: int | None = None
    most_frequent_topk: list[CommonLatent]
    overlap: dict[str, SharedPercent] = {}


class Entry(Figures):
    """An entry of results.json: the figures of one round, ranking and K.

    population: a hash of the ids of the questions.  journal: the name of the file.  left_out: ids of the questions that
    do not fit the model's context.
    """

    provenance: Provenance = Field(alias="run")
    round: Text
    em: float | None
    f1: float | None
    k: Text | None
    population: Text
    journal: Text | None = None
    left_out: list[str] = []

    @field_validator("provenance")
    @classmethod
    def _check_ranking(cls, provenance: Provenance) -> Provenance:
        if provenance.ranking is None:
            raise ValueError("names no ranking")
        return provenance


class UnmaskedEntry(Entry):
    """Of round 1: its own figures are those of the kept questions, `all` those of all that were asked."""

    all: Figures
    population_all: Text
    asked: int | None = None
    kept: int | None = None
    wrong: int | None = None
    unranked: int | None = None
    statistics: LatentStatistics | None = None
    agreement: Agreement | None = None


class MaskedEntry(Entry):
    """Of a masked round. clean: the unmasked answers to the same questions; drop: unmasked minus masked, paired.

    latents: the name of the file of activations.  mean_k: latents masked per question.  asked_k: how many K says,
    which a matched mask may exceed.  fewer_than_k: questions whose lists are shorter than K.  removed: percent of the
    residual stream's norm.  missed_target: questions for which a matched mask removes more or less than the
    baseline's by over half of it.  missing: of the file, those that the data set lacks.

    control: what the same hole was made of instead of these latents.  draws: figures are means over so many within each
    question first.  keep_only: everything but these latents is masked.  excess: over a control, by its name ("own": the
    baseline's own mask).  faithfulness, completeness: of TopK kept alone, and masked; auc: over log K, on the entry of
    the largest K.
    """

    masked: Side
    k: Text
    clean: Figures | None
    drop: Figures | None
    latents: Text | None = None
    mean_k: float
    asked_k: float | None = None
    fewer_than_k: int | None = None
    removed: float | None = None
    missed_target: int | None = None
    missing: list[str] = []
    control: Text | None = None
    draws: int | None = None
    keep_only: bool | None = None
    excess: dict[str, Excess] | None = None
    faithfulness: Estimate | None = None
    completeness: Estimate | None = None
    faithfulness_auc: Estimate | None = None
    completeness_auc: Estimate | None = None

    @property
    def masks_nothing(self) -> bool:
        """Whether it is the same for all rankings and masks: K = 0 masks nothing, unless it is what nothing keeps."""
        return self.k == "0" and not self.keep_only


def parse_entry(value: object) -> Entry:
    """An entry of results.json. Raises ValueError."""
    is_masked = isinstance(value, dict) and "masked" in value
    return parse_stored(MaskedEntry if is_masked else UnmaskedEntry, value)
