"""One answer under generation, and what the model says next. Knows nothing of caches or batches."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from experiment import UserError

NO_TOKEN = -1  # ends a proposal that is only the beginning of an answer
LOG_PROB_ROWS = 256  # of logits that are in memory in single precision at once
NOT_FINITE = (
    "the model's logits are not finite: float16 overflows in some models; try --dtype bfloat16 "
    "(or float32; and the same for --sae-dtype)"
)


@dataclass(frozen=True)
class Answer:
    """tokens: what was generated, up to and including the token that ended it.  log_probs: in nats, of each token given
    those before it: of the unmasked answer's tokens under the mask, or, without one, of the answer's own."""

    tokens: list[int]
    log_probs: list[float]


@dataclass
class Row:
    """One answer under generation.

    prompt: token ids.  proposal: tokens that may follow it, ended by NO_TOKEN where they are only a beginning.
    tokens: what the model has said; no cache holds the last one.  log_probs: as an Answer's.
    """

    prompt: list[int]
    proposal: list[int]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @property
    def is_draft(self) -> bool:
        """Whether a whole answer is proposed, whose log probabilities are asked for."""
        return self.proposal[-1] != NO_TOKEN

    @property
    def sequence(self) -> list[int]:
        """What the wide pass reads. What would follow a proposal's last token is not asked for."""
        return self.prompt + self.proposal[:-1]

    def targets(self, said: list[int]) -> list[int]:
        """The tokens whose log probabilities are asked for, one per place of the proposal."""
        return self.proposal if self.is_draft else said

    def keep(self, said: list[int], log_probs: list[float]) -> None:
        """Keeps what the model says at the places of the proposal, as far as it was asked under its own words."""
        agreed = 0
        while agreed < len(said) and said[agreed] == self.proposal[agreed]:
            agreed += 1
        self.tokens = said[: agreed + 1]  # the first token that differs is the model's own
        self.log_probs = log_probs if self.is_draft else log_probs[: agreed + 1]

    def append(self, token: int, log_prob: float) -> None:
        self.tokens.append(token)
        if not self.is_draft:
            self.log_probs.append(log_prob)

    def has_ended(self, end_ids: set[int], max_new_tokens: int) -> bool:
        return self.tokens[-1] in end_ids or len(self.tokens) >= max_new_tokens

    def answer(self) -> Answer:
        return Answer(self.tokens, self.log_probs)


def cut_at_end(draft: list[int], end_ids: set[int]) -> list[int]:
    """A draft up to its first token that ends an answer."""
    for place, token in enumerate(draft):
        if token in end_ids:
            return draft[: place + 1]
    return draft


def pick_tokens(logits: Float[Tensor, "output vocab"]) -> list[int]:
    """The likeliest token of each row of logits. Raises UserError where they are not finite."""
    is_finite = logits.isfinite().all(-1)
    tokens = torch.where(is_finite, logits.argmax(-1), NO_TOKEN).tolist()  # the one time that the device is waited for
    if NO_TOKEN in tokens:
        raise UserError(NOT_FINITE)
    return tokens


def pick_log_probs(logits: Float[Tensor, "output vocab"], tokens: Int[Tensor, "output"]) -> Float[Tensor, "output"]:
    """The log probability of a token in each row of logits, in nats, computed in single precision."""
    log_probs = []
    for part, chosen in zip(logits.split(LOG_PROB_ROWS), tokens.split(LOG_PROB_ROWS)):
        log_probs.append(part.float().log_softmax(-1).gather(1, chosen.unsqueeze(1)).flatten())
    return torch.cat(log_probs)
