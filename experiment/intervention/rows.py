"""One answer under generation, and what the model says next. Knows nothing of caches or batches."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from experiment import UserError

NO_TOKEN = -1  # ends a proposal that is only the beginning of an answer
NOT_A_TOKEN = -2  # what is said where logits are not finite
LOG_PROB_ROWS = 256  # of logits that are in memory in single precision at once
NOT_FINITE = (
    "the model's logits are not finite: float16 overflows in some models; try --dtype bfloat16 "
    "(or float32; and the same for --sae-dtype)"
)


@dataclass(frozen=True)
class Answer:
    """What was generated behind one prompt.

    tokens: their ids, up to and including the token that ended it.  log_probs: in nats, of each token given those
    before it: with a draft, of the draft's tokens; else of the answer's own.
    """

    tokens: list[int]
    log_probs: list[float]


@dataclass
class Row:
    """One answer under generation.

    prompt: token ids.  proposal: what a wide pass reads behind it: a draft, which is a whole answer, or what answers
    begin with, ended by NO_TOKEN.  tokens: what the model has said; no cache holds the last one.  log_probs: as an
    Answer's.
    """

    prompt: list[int]
    proposal: list[int]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @property
    def is_draft(self) -> bool:
        """Whether a whole answer is proposed, whose log probabilities are asked for then."""
        return self.proposal[-1] != NO_TOKEN

    @property
    def sequence(self) -> list[int]:
        """What the wide pass reads. What would follow a proposal's last token is not asked for."""
        return self.prompt + self.proposal[:-1]

    @property
    def cached(self) -> list[int]:
        """What a cache holds of the prompt and of what the model has said: all but the last token."""
        return self.prompt + self.tokens[:-1]

    def targets(self, said: list[int]) -> list[int]:
        """The tokens whose log probabilities are asked for, one per place of the proposal.

        said: what the model says at each of these places.
        """
        return self.proposal if self.is_draft else said

    def keep(self, said: list[int], log_probs: list[float]) -> None:
        """Keeps what the model says at the places of the proposal, up to its first token that differs from it.

        said, log_probs: of each place the model's token, and the log probability of `targets`.
        """
        end = 1  # the first token that differs is the model's own
        for token, proposed in zip(said, self.proposal):
            if token != proposed:
                break
            end += 1
        self.tokens = said[:end]
        self.log_probs = log_probs if self.is_draft else log_probs[:end]

    def append(self, token: int, log_prob: float) -> None:
        """Keeps the model's next token. log_prob: its own, in nats; not kept where a draft's are asked for."""
        self.tokens.append(token)
        if not self.is_draft:
            self.log_probs.append(log_prob)

    def has_ended(self, end_ids: set[int], max_new_tokens: int) -> bool:
        """Whether the last token ends an answer, or the answer is as long as it may get."""
        if self.tokens[-1] in end_ids:
            return True
        return len(self.tokens) >= max_new_tokens

    def answer(self) -> Answer:
        """What has been said so far, as an answer."""
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
    likeliest = logits.argmax(-1)
    tokens = torch.where(is_finite, likeliest, NOT_A_TOKEN).tolist()  # the one time that the device is waited for
    if NOT_A_TOKEN in tokens:
        raise UserError(NOT_FINITE)
    return tokens


def pick_log_probs(logits: Float[Tensor, "output vocab"], tokens: Int[Tensor, "output"]) -> Float[Tensor, "output"]:
    """The log probability of a token in each row of logits, in nats, computed in single precision."""
    parts = zip(logits.split(LOG_PROB_ROWS), tokens.split(LOG_PROB_ROWS))
    log_probs = []
    for part, chosen in parts:
        of_part = _pick_log_probs(part, chosen)
        log_probs.append(of_part)
    return torch.cat(log_probs)


def _pick_log_probs(logits: Float[Tensor, "part vocab"], tokens: Int[Tensor, "part"]) -> Float[Tensor, "part"]:
    """A function by itself, so that of what is as large as the vocabulary nothing lives on beside the next part's."""
    log_probs = logits.float().log_softmax(-1)
    of_tokens = log_probs.gather(1, tokens.unsqueeze(1))
    return of_tokens.flatten()
