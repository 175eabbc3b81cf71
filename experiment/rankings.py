"""Scores of SAE latents, and the TopK and BottomK by score. Knows nothing of files or SQuAD.

To add a ranking of your own, write a function that gives the scores [sequence, d_sae] of a batch, and put it into
RANKINGS: `--ranking` takes its name then.
"""

import functools
import random
from dataclasses import dataclass

LONGEST = 1000  # of the lists of the matched ranking, which takes as many latents as remove enough
ROOM = 2**26  # numbers that may be in memory while what masks remove is computed


@dataclass(frozen=True)
class Sequences:
    """The kept questions of a batch as a ranking sees them: lists with an item each.

    ids: the questions'.  prompts, generated: token ids.  brackets: the place in `generated` of the last token with a [
    in its text.  insides: the places there of the tokens inside the brackets.  rows: each one's in `trace`, which is
    the Trace of the whole batch.
    """

    ids: list[str]
    prompts: list[list[int]]
    generated: list[list[int]]
    brackets: list[int]
    insides: list[list[int]]
    rows: list[int]
    trace: object

    def until(self, places, numbers=None):
        """The Trace of sequences (`numbers`; None: of all) up to these places in what was generated, one for each."""
        numbers = range(len(self.rows)) if numbers is None else numbers
        ends = [len(self.prompts[n]) + place for n, place in zip(numbers, places)]
        return self.trace.select([self.rows[n] for n in numbers], ends)

    @functools.cached_property
    def ranked(self):
        """The Trace that the paper ranks: up to the last [, without it."""
        return self.until(self.brackets)

    @functools.cached_property
    def active(self):
        """The latents active at the last position that is ranked, ascending: a list for each sequence."""
        latents, spliced = self.ranked.latents, self.ranked.latents.spliced
        last = self.ranked.rows.new_zeros(len(self.rows))
        last = last.scatter_reduce(0, self.ranked.rows[spliced], spliced.nonzero().flatten(), "amax")
        at_the_end = latents.take(last)
        return [ids.sort().values.tolist() for ids in at_the_end.ids.split(at_the_end.counts.tolist())]


def mean(model, trace, values=None, where=None):
    """The mean of each latent's activation (or of other `values`, [entry]) over a sequence's positions (or over those
    `where` [pos] is true), [sequence, d_sae]. In double precision, so that the order in which a GPU adds up does not
    show."""
    latents, rows, d_sae = trace.latents, trace.rows, model.splice.d_sae
    counted = latents.spliced if where is None else latents.spliced & where
    values = (latents.values if values is None else values).double() * counted.repeat_interleave(latents.counts)
    entries = rows.repeat_interleave(latents.counts) * d_sae + latents.ids
    count = int(rows.max()) + 1
    total = values.new_zeros(count * d_sae).index_add_(0, entries, values).view(count, d_sae)
    return (total / rows[counted].bincount(minlength=count).unsqueeze(1)).float()


def rank_by_mean_activation(model, sequences, seed):
    """The baseline: mean activation over all positions, BOS included. Source: GradSAE (arXiv 2505.08080)."""
    return mean(model, sequences.ranked)


def rank_by_gradient(model, sequences, seed):
    """GradSAE: the mean over positions of relu(dP/dH * H), P the probability of the [ token that the model gave, H the
    activations. Source: GradSAE (arXiv 2505.08080)."""
    return _score_by_gradient(model, sequences, sequences.brackets)


def rank_by_gradient_of_answer(model, sequences, seed):
    """As GradSAE, but P is the probability of the answer's first token inside the brackets; no scores without one."""
    return _score_by_gradient(model, sequences, [inside[0] if inside else None for inside in sequences.insides])


def _score_by_gradient(model, sequences, places):
    from experiment.answers import gradients, in_halves

    def work(part):
        ends = [places[n] for n in part]
        tokens = [sequences.prompts[n] + sequences.generated[n][:end] for n, end in zip(part, ends)]
        trace = sequences.until(ends, part)
        slopes, scale = gradients(model, tokens, [sequences.generated[n][end] for n, end in zip(part, ends)], trace)
        values = (model.splice.pull_back(trace.latents, slopes) * trace.latents.values).relu()
        return list(mean(model, trace, values) * scale.unsqueeze(1))

    numbers = [n for n, place in enumerate(places) if place is not None]
    # On its way back a token takes in every layer about 16 times what it takes in the cache (an estimate).
    size, scores = -(-len(places) // 16), sequences.ranked.latents.values.new_zeros(len(places), model.splice.d_sae)
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        for n, row in zip(part, in_halves(work, part)):
            scores[n] = row
    return scores


def rank_at_random(model, sequences, seed):
    """A score drawn for each latent that is active anywhere: TopK and BottomK are two draws of active latents."""
    scores = rank_by_mean_activation(model, sequences, seed)
    for question_id, row in zip(sequences.ids, scores):
        active, draw = row.nonzero().flatten(), random.Random(f"{seed} {question_id}")
        row[active] = row.new_tensor([1 + draw.random() for _ in active])
    return scores


def rank_matched(model, sequences, seed):
    """The fair control: as at random, but none of those that the baseline masks at K = 50%. Rounds 2 and 3 mask as many
    as remove as much of the residual stream as the baseline's K."""
    scores = rank_at_random(model, sequences, seed)
    for row, means, active in zip(scores, rank_by_mean_activation(model, sequences, seed), sequences.active):
        for ids in top_and_bottom(means, len(active) // 2):
            row[ids] = 0
    return scores


RANKINGS = {
    "baseline": rank_by_mean_activation,
    "gradsae": rank_by_gradient,
    "gradsae-answer": rank_by_gradient_of_answer,
    "matched": rank_matched,
    "random": rank_at_random,
}


def rank(model, name, sequences, seed):
    """The lists of each sequence: topk, bottomk, and removed_topk, removed_bottomk: what masking the first 1, 2, ...
    latents of a list takes away, over the norm of the residual stream.

    The lists hold 100 latents, or half of those active at the last position where that is more. Those of the matched
    ranking go on until they remove as much as the baseline's, whose removed_ stand beside them as target_.
    """
    scores, lists = RANKINGS[name](model, sequences, seed), []
    for row, active in zip(scores, sequences.active):
        length = LONGEST if name == "matched" else max(100, len(active) // 2)
        lists.append(dict(zip(("topk", "bottomk"), top_and_bottom(row, length))))
    for which in ("topk", "bottomk"):
        removed = compute_removed(model.splice, sequences.ranked, [sample[which] for sample in lists])
        for sample, norms in zip(lists, removed):
            sample[f"removed_{which}"] = norms
    if name == "matched":
        for sample, baseline in zip(lists, rank(model, "baseline", sequences, seed)):
            for which in ("topk", "bottomk"):
                sample[f"target_{which}"] = baseline[f"removed_{which}"]
                enough = count_to_reach(sample[f"removed_{which}"], max(sample[f"target_{which}"], default=0))
                for field in (which, f"removed_{which}"):
                    sample[field] = sample[field][:enough]
    return lists


def top_and_bottom(scores, k):
    """The ids of the k highest scores, highest first, and of the k lowest non-zero scores, lowest first.

    scores: [d_sae].  Equal scores stand in the order of their ids in both lists.
    """
    ids = scores.nonzero().flatten()
    ascending = scores[ids].sort(stable=True).indices
    descending = scores[ids].sort(stable=True, descending=True).indices
    return ids[descending[:k]].tolist(), ids[ascending[:k]].tolist()


def pick_latents(sample, which, k):
    """The latents that a question has masked, and whether its list has as many as K asks for.

    K is a number, or a percentage (rounded down) of the latents active at the last position. Of the matched ranking
    as many are masked as it takes to remove as much as the baseline's first K.
    """
    count, latents = count_masked(k, len(sample["active"])), sample[which]
    if f"target_{which}" not in sample or not count:
        return latents[:count], len(latents) >= count
    target, removed = [0, *sample[f"target_{which}"][:count]][-1], sample[f"removed_{which}"]
    return latents[: count_to_reach(removed, target)], max(removed, default=0) >= target


def count_masked(k, active):
    return active * int(k[:-1]) // 100 if k.endswith("%") else int(k)


def count_to_reach(removed, target):
    """The smallest number of a list's latents that remove as much as `target`; all where none do."""
    return next((n for n, value in enumerate(removed, 1) if value >= target), len(removed))


def compute_removed(splice, trace, lists):
    """What masking the first 1, 2, ... of a sequence's latents takes away, over the norm of its residual stream: a list
    of numbers for each of `lists`, one list of latents a sequence. Four digits, for files of a readable size.

    The norm of `A_S W_dec[S]` over all positions. Its square grows, with the nth latent of a list, by the nth row of
    (A^T A) * (W W^T) up to the diagonal, all but the diagonal twice.
    """
    import torch

    latents, d_sae, device = trace.latents, splice.d_sae, splice.device
    rows, columns = (index.repeat_interleave(latents.counts) for index in (trace.rows, trace.columns))  # [entry]
    longest, width = max(map(len, lists)), int(trace.columns.max()) + 1
    squares = latents.residual.to(device).flatten(1).float().square().sum(1) * latents.spliced  # [pos]
    norms = squares.new_zeros(len(lists), 1).index_add_(0, trace.rows, squares.unsqueeze(1)).sqrt()
    size, removed = max(1, ROOM // (d_sae + longest * (width + splice.sae.cfg.d_in + 3 * longest))), []
    for first in range(0, len(lists), size):
        part = lists[first : first + size]
        padded = torch.tensor([ids + [d_sae] * (longest - len(ids)) for ids in part], device=device).long()
        places = torch.full((len(part), d_sae + 1), -1, device=device)  # of each latent in its sequence's list
        places.scatter_(1, padded, torch.arange(longest, device=device).expand_as(padded))
        entries = ((rows >= first) & (rows < first + size)).nonzero().flatten()
        place = places[rows[entries] - first, latents.ids[entries]]
        listed = (place >= 0).nonzero().flatten()
        entries, place = entries[listed], place[listed]
        acts = torch.zeros(len(part), width, longest, device=device)
        acts[rows[entries] - first, columns[entries], place] = latents.values[entries].float()
        decoder = splice.sae.W_dec[padded.clamp(max=d_sae - 1)].float()  # [sequence, longest, d_in]
        products = (acts.mT @ acts) * (decoder @ decoder.mT)
        growth = 2 * products.tril().sum(2) - products.diagonal(dim1=1, dim2=2)
        shares = (growth.cumsum(1).clamp(min=0).sqrt() / norms[first : first + size]).double()
        power = (10 ** (3 - shares.clamp(min=1e-9).log10().floor())).round()
        removed += [numbers[: len(ids)] for numbers, ids in zip(((shares * power).round() / power).tolist(), part)]
    return removed
