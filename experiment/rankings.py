"""Scores of SAE latents, and the TopK and BottomK by score. Knows nothing of files or SQuAD.

To add a ranking of your own, write a function that yields a score [d_sae] for each sequence, and put it into RANKINGS:
`--ranking` takes its name then. Nothing heavy is imported here before a ranking runs, for `--help` reads the names.
"""

import functools
import random
from dataclasses import dataclass

LONGEST = 1000  # of the lists of the matched ranking, which takes as many latents as remove enough


@dataclass(frozen=True)
class Sequence:
    """A kept question as a ranking sees it.

    id: the question's.  prompt, generated: token ids.  bracket: the place in `generated` of the last token with a [ in
    its text.  answer: the places there of the tokens inside the brackets.  latents: over all tokens but the last.
    """

    id: str
    prompt: list[int]
    generated: list[int]
    bracket: int
    answer: list[int]
    latents: object

    def until(self, place):
        """The Latents over the prompt and what was generated before this place."""
        return self.latents.first(len(self.prompt) + place)

    @functools.cached_property
    def ranked(self):
        """The Latents that the paper ranks: up to the last [, without it."""
        return self.until(self.bracket)

    @functools.cached_property
    def active(self):
        """The latents active at the last position that is ranked, ascending."""
        return self.ranked.active_at_the_end()


def rank_by_mean_activation(model, sequences, seed, baseline):
    """The baseline: mean activation over all positions, BOS included. Source: GradSAE (arXiv 2505.08080)."""
    for sequence in sequences:
        yield sequence.ranked.mean(model.splice.d_sae)


def rank_by_gradient(model, sequences, seed, baseline):
    """GradSAE: the mean over positions of relu(dP/dH * H), P the probability of the [ token that the model gave, H the
    activations. Source: GradSAE (arXiv 2505.08080)."""
    return _score_by_gradient(model, sequences, [sequence.bracket for sequence in sequences])


def rank_by_gradient_of_answer(model, sequences, seed, baseline):
    """As GradSAE, but P is the probability of the answer's first token inside the brackets; no scores without one."""
    return _score_by_gradient(
        model, sequences, [sequence.answer[0] if sequence.answer else None for sequence in sequences]
    )


def _score_by_gradient(model, sequences, places):
    from experiment.answers import gradients, in_halves

    def work(batch):
        latents = [sequence.until(place) for sequence, place in batch]
        tokens = [sequence.prompt + sequence.generated[:place] for sequence, place in batch]
        next_ids = [sequence.generated[place] for sequence, place in batch]
        scores = []
        for part, slope, scale in zip(latents, *gradients(model, tokens, next_ids, latents)):
            values = (model.splice.pull_back(part, slope) * part.values).relu()
            scores.append(part.mean(model.splice.d_sae, values) * scale)
        return scores

    pairs = [(sequence, place) for sequence, place in zip(sequences, places) if place is not None]
    # On its way back a token takes in every layer about 16 times what it takes in the cache (an estimate).
    size, scores = -(-len(sequences) // 16), {}
    for start in range(0, len(pairs), size):
        batch = pairs[start : start + size]
        scores |= {sequence.id: score for (sequence, _), score in zip(batch, in_halves(work, batch))}
    for sequence in sequences:
        yield scores.get(sequence.id)


def rank_at_random(model, sequences, seed, baseline):
    """A score drawn for each latent that is active anywhere: TopK and BottomK are two draws of active latents."""
    for sequence, scores in zip(sequences, rank_by_mean_activation(model, sequences, seed, baseline)):
        active = scores.nonzero().flatten().tolist()
        draw = random.Random(f"{seed} {sequence.id}")
        scores[active] = scores.new_tensor([1 + draw.random() for _ in active])
        yield scores


def rank_matched(model, sequences, seed, baseline):
    """The fair control: as at random, but none of those that the baseline masks at K = 50%. Rounds 2 and 3 mask as many
    as remove as much of the residual stream as the baseline's K."""
    for sequence, scores in zip(sequences, rank_at_random(model, sequences, seed, baseline)):
        half = len(sequence.active) // 2
        lists = baseline[sequence.id]
        scores[lists["topk"][:half] + lists["bottomk"][:half]] = 0
        yield scores


RANKINGS = {
    "baseline": rank_by_mean_activation,
    "gradsae": rank_by_gradient,
    "gradsae-answer": rank_by_gradient_of_answer,
    "matched": rank_matched,
    "random": rank_at_random,
}


def rank(model, name, sequences, seed, baseline=None):
    """Yields the lists of each sequence: topk, bottomk, and removed_topk, removed_bottomk: what masking the first 1, 2,
    ... latents of a list takes away, over the norm of the residual stream.

    The lists hold 100 latents, or half of those active at the last position where that is more.
    baseline: the baseline's lists by id, for the matched ranking, whose lists go on until they remove as much.
    """
    for sequence, scores in zip(sequences, RANKINGS[name](model, sequences, seed, baseline)):
        length = LONGEST if name == "matched" else max(100, len(sequence.active) // 2)
        lists = dict(zip(("topk", "bottomk"), ([], []) if scores is None else top_and_bottom(scores, length)))
        for which, removed in zip(("topk", "bottomk"), model.splice.removed(sequence.ranked, *lists.values())):
            removed = [float(f"{value:.4g}") for value in removed]  # files of a readable size
            if name == "matched":
                target = max(baseline[sequence.id][f"removed_{which}"], default=0)
                enough = count_to_reach(removed, target)
                removed, lists[which] = removed[:enough], lists[which][:enough]
            lists[f"removed_{which}"] = removed
        yield lists


def count_to_reach(removed, target):
    """The smallest number of a list's latents that remove as much as `target`; all where none do."""
    return next((n for n, value in enumerate(removed, 1) if value >= target), len(removed))


def top_and_bottom(scores, k):
    """The ids of the k highest scores, highest first, and of the k lowest non-zero scores, lowest first.

    scores: [d_sae].  Equal scores stand in the order of their ids in both lists.
    """
    ids = scores.nonzero().flatten()
    ascending = scores[ids].sort(stable=True).indices
    descending = scores[ids].sort(stable=True, descending=True).indices
    return ids[descending[:k]].tolist(), ids[ascending[:k]].tolist()
