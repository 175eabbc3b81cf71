"""What is on disk, as classes: questions' records, ranked questions, provenance, means, results. Checked by pydantic.

Field names and order are the files': what a file lacks is not written again, and what it has besides is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from experiment.masks import Side


def _refuse_half_characters(text: str) -> str:
    """Refuses half a character, which JSON can hold and no file in UTF-8 can."""
    text.encode("utf-8")
    return text


Text = Annotated[str, AfterValidator(_refuse_half_characters)]
Score = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Latents = list[Number]
Tokens = list[Number]
Positions = list[Number]


SCORES = ("em", "f1", "accuracy", "named")  # of an answer; fields of Record, RankedQuestion and Figures


class Stored(BaseModel):
    """What stands in a file. Fields that are None and were not given are absent there."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    _names: tuple[str, ...] = PrivateAttr(())  # of the fields that were given, in their order

    @model_validator(mode="wrap")
    @classmethod
    def _keep_order(cls, values: Any, validate: Callable[[Any], Self]) -> Self:
        """Notes which fields were given, in which order: so they are written again."""
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


class FieldMissing(ValueError):
    """A field that has to be there is not: what stands there is another version's, or no such thing at all."""

    def __init__(self, field: str):
        super().__init__(f"{field}: Field required")
        self.field = field


def parse_stored(kind: type[Kind], value: object) -> Kind:
    """A value of JSON as one of these classes. Raises ValueError (FieldMissing), which says in one line what is wrong,
    and where."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        raise FieldMissing(place)
    says = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        says = "Input should be an object"
    raise ValueError(f"{place}: {says}" if place else says)


def tell_version(error: FieldMissing, instead: str) -> str:
    """What is wrong with a file whose record lacks a field, and what to do. instead: where that version is gone."""
    return f"lacks {error.field}: the file is of another version of this project: go on with that version, or {instead}"


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
    draws: int | None = None
    """Lists that round 1 drew for each question, where these are several."""
    effects: int | None = None
    """Latents of a question that round 1 masked alone, at most."""
    measured_for: Text | None = None
    """The rankings whose TopK were the first of these."""
    ranking_digest: str | None = None
    """Of the file of a ranking of one's own."""
    masked: Side | None = None
    control: Text | None = None
    """What the same hole is made of instead of the latents that are masked: "direction", one drawn at random."""
    control_seed: int | None = None
    draw: int | None = None
    """Of what is drawn several times: which one, from the second on."""
    keep_only: bool | None = None
    """Whether everything but these latents is masked."""
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

    removed: what masking the first 1, 2, ... of a list takes away, in shares of the position's norm.  target: of the
    matched ranking, what the baseline's take away.  tokens: of the unmasked answer.  inside: the positions of those
    inside its brackets.  measured: latents whose effect on the answer was measured by masking each alone.
    effects: of each of them, in nats per token; in the file of the ranking by effects.  scores: the file's ranking's
    own, of each of them.  unmeasured: active latents that were left out.  more_draws: further lists of a ranking that
    draws.
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

    @property
    def draws(self) -> int:
        """How often its lists were drawn; 1 where they are not."""
        return 1 + len(self.more_draws or [])

    def of_draw(self, draw: int) -> Self:
        """The same with the lists of another draw, from 2 on."""
        assert self.more_draws is not None  # activations.refuse_fewer_draws has seen to it
        further = self.more_draws[draw - 2]  # the first draw's lists are our own
        return self.with_fields(**further.fields())

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
