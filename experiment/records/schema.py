"""What is on disk, as classes: questions' records, ranked questions, provenance, means, results. Checked by pydantic.

Field names and order are the files': what a file lacks is not written again, and what it has besides is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)


def _refuse_half_characters(text: str) -> str:
    """Refuses half a character, which JSON can hold and no file in UTF-8 can."""
    text.encode("utf-8")
    return text


Side = Literal["topk", "bottomk"]
Text = Annotated[str, AfterValidator(_refuse_half_characters)]
Score = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Latents = list[Number]
Tokens = list[Number]
Positions = list[Number]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


SCORES = ("em", "f1", "accuracy", "named")  # of an answer; fields of Record, RankedQuestion and Figures
LOG_PROBS = ("answer_log_prob", "format_log_prob")  # of the unmasked answer's tokens; fields of Figures


class Stored(BaseModel):
    """What stands in a file. Fields that are None and were not given are absent there."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    _names: tuple[str, ...] = PrivateAttr(())  # of the fields that were given, in their order

    @model_validator(mode="wrap")
    @classmethod
    def _keep_order(cls, values: Any, validate: Callable[[Any], Self]) -> Self:
        stored = validate(values)
        if isinstance(values, dict):
            stored._names = tuple(values)
        return stored

    def fields(self) -> dict[str, Any]:
        """{name: value} as in the file."""
        values = dict(self.model_extra or {})  # what the file has besides; a name of ours says nothing there
        for attribute, field in type(self).model_fields.items():
            values[field.alias or attribute] = getattr(self, attribute)
        return {name: values[name] for name in self._names}

    def with_fields(self, **changed: Any) -> Self:
        """The same with other fields, by their names in the file; new ones come last."""
        return type(self).model_validate(self.fields() | changed)


Kind = TypeVar("Kind", bound=Stored)


def parse_stored(kind: type[Kind], value: object) -> Kind:
    """A value of JSON as one of these classes. Raises ValueError, which says in one line what is wrong, and where."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    says = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        says = "Input should be an object"
    place = ".".join(map(str, first["loc"]))
    raise ValueError(f"{place}: {says}" if place else says)


def to_json(value: object, **how: Any) -> str:
    """A value with any of these classes in it as JSON."""
    return json.dumps(value, default=Stored.fields, **{"ensure_ascii": False, **how})


class Provenance(Stored):
    """What made a file. `records.provenance` says which of it the file depends on; the rest is for readers.

    All may be absent: some is known once the SAE is loaded, or is of masked rounds alone, or is younger than a file.
    """

    demo: bool | None = None
    model: Text | None = None
    sae_release: Text | None = None
    sae_id: Text | None = None
    dtype: Text | None = None
    sae_dtype: Text | None = None
    error_term: Text = "drop"
    exclude_special_tokens: bool | None = None
    dataset: Text | None = None
    dataset_config: Text | None = None
    max_new_tokens: int | None = None
    limit: int | None = None
    sample: int | None = None
    ranking: Text | None = None
    split: Text | None = None
    questions: Text | None = None
    """A hash of the data set's questions."""
    prompt_template: Text | None = None
    seed: int | None = None
    """Of --sample."""
    model_digest: Text | None = None
    """Of the files in a local folder, as is sae_digest."""
    sae_digest: Text | None = None
    device: Text | None = None
    versions: dict[str, str] | None = None
    ranking_seed: int | None = None
    """Of a ranking that draws."""
    ranking_digest: str | None = None
    """Of the file of a ranking of one's own."""
    masked: Side | None = None
    ablation: Text = "zero"
    hook_name: Text | None = None
    d_sae: int | None = None
    activations: Text | None = None
    """A hash of all that a masked round uses of a file of activations."""
    k: Text | None = None
    means: Text | None = None
    """A hash of the means that masked latents are set to."""
    batch_tokens: int | None = None
    pool_tokens: int | None = None
    asked: int | None = None
    kept: int | None = None


class Draw(Stored):
    """Lists of a further draw of a ranking that draws, as of RankedLatents."""

    topk: Latents
    bottomk: Latents
    removed_topk: list[float] | None = None
    removed_bottomk: list[float] | None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        for name, latents, removed in (
            ("topk", self.topk, self.removed_topk),
            ("bottomk", self.bottomk, self.removed_bottomk),
        ):
            if removed is not None and len(removed) != len(latents):
                raise ValueError(f"removed_{name} is not as long as {name}")
        return self


class RankedLatents(Stored):
    """The latents of a kept question: those active at the last position, TopK and BottomK.

    removed: what masking the first 1, 2, ... of a list takes away.  target: of the matched ranking, what the baseline's
    take away.  tokens: of the unmasked answer.  inside: the positions of those inside its brackets.
    measured: latents whose effect on the answer was measured by masking each alone.  effects: of each of them, in nats
    per token; in the file of the ranking by effects.  scores: the file's ranking's own, of each of them.  unmeasured:
    active latents that were left out.  more_draws: further lists of a ranking that draws.
    """

    active: Latents
    topk: Latents
    bottomk: Latents
    tokens: Tokens | None = None
    inside: Positions | None = None
    removed_topk: list[float] | None = None
    removed_bottomk: list[float] | None = None
    target_topk: list[float] | None = None
    target_bottomk: list[float] | None = None
    measured: Latents | None = None
    effects: list[FiniteFloat] | None = None
    scores: list[FiniteFloat] | None = None
    unmeasured: int | None = None
    more_draws: list[Draw] | None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        for side in ("topk", "bottomk"):
            removed = self.removed(side)
            if removed is not None and len(removed) != len(self.latents(side)):
                raise ValueError(f"removed_{side} is not as long as {side}")
        return self

    def latents(self, side: Side) -> list[int]:
        return self.topk if side == "topk" else self.bottomk

    def removed(self, side: Side) -> list[float] | None:
        return self.removed_topk if side == "topk" else self.removed_bottomk

    def target(self, side: Side) -> list[float] | None:
        return self.target_topk if side == "topk" else self.target_bottomk


class RankedQuestion(RankedLatents):
    """A kept question in a file of activations: its latents, and the scores of its unmasked answer."""

    id: Text
    answer: Text
    em: Score | None = None
    f1: Score | None = None
    accuracy: Score | None = None
    named: Score | None = None
    log_probs: list[float] | None = None


class PublishedQuestion(RankedLatents):
    """A kept question in the authors' published file, which goes by its prompt."""

    prompt: Text


class JournalHead(Stored):
    """The first line of a journal."""

    provenance: Provenance = Field(alias="run")


class Record(Stored):
    """An answer in a journal. text: all that was generated; answer: what was parsed from it."""

    id: Text
    text: Text
    answer: Text
    em: Score
    f1: Score
    accuracy: Score
    named: Score
    log_probs: list[float] | None = None


class KeptRecord(Record, RankedLatents):
    """An answer in round 1's journal that is right, with its latents."""

    def as_ranked(self) -> RankedQuestion:
        """As a file of activations has it: without the text."""
        fields = self.fields()
        del fields["text"]
        return RankedQuestion.model_validate(fields)


def parse_record(value: object) -> Record:
    """A line of a journal. Raises ValueError."""
    is_kept = isinstance(value, dict) and "active" in value
    return parse_stored(KeptRecord if is_kept else Record, value)


class Means(Stored):
    """means.json: each latent's mean activation over so many positions."""

    provenance: Provenance = Field(alias="run")
    positions: int | None = None
    means: list[FiniteFloat]


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
    """The paper's table 3 for one ranking, at K = 50%. overlap: with the other rankings, by name."""

    n: int
    active: float | None
    k_at_half: float | None = Field(alias="k_at_50%")
    same_context_percent: SharedPercent
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


class MaskedEntry(Entry):
    """Of a masked round. clean: the unmasked answers to the same questions; drop: unmasked minus masked, paired.

    latents: the name of the file of activations.  mean_k: latents masked per question.  fewer_than_k: questions whose
    lists are shorter than K.  removed: percent of the residual stream's norm.  missed_target: questions for which a
    matched mask removes more or less than the baseline's by over half of it.  missing: of the file, those that the
    data set lacks.
    """

    masked: Side
    k: Text
    clean: Figures | None
    drop: Figures | None
    latents: Text | None = None
    mean_k: float
    fewer_than_k: int | None = None
    removed: float | None = None
    missed_target: int | None = None
    missing: list[str] = []


def parse_entry(value: object) -> Entry:
    """An entry of results.json. Raises ValueError."""
    is_masked = isinstance(value, dict) and "masked" in value
    return parse_stored(MaskedEntry if is_masked else UnmaskedEntry, value)
