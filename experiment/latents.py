"""Scores of SAE latents on a sequence, and the TopK and BottomK by score. Knows nothing of files or questions."""

import torch

# Latents held at once, in elements: 0.5 GB a tensor in float32, a thousand positions of a 131k-wide SAE.
LATENTS_AT_ONCE = 2**27


def positions_at_once(sae):
    return max(1, LATENTS_AT_ONCE // sae.cfg.d_sae)


@torch.inference_mode()
def mean_activation(sae, residual):
    """The baseline's score of each latent on one sequence: its mean activation over all positions, BOS included.

    residual: [pos, d_model], any dtype.  Returns the scores [d_sae] in float32, and the ids of the latents
    active (non-zero) at the last position, ascending.  Source: GradSAE (arXiv 2505.08080), its baseline.
    """
    total = 0
    for chunk in residual.to(sae.dtype).split(positions_at_once(sae)):
        acts = sae.encode(chunk)  # [chunk, d_sae]
        total = total + acts.sum(0, dtype=torch.float32)
    return total / len(residual), acts[-1].nonzero().flatten().tolist()


def top_and_bottom(scores, k):
    """The ids of the k highest scores, highest first, and of the k lowest non-zero scores, lowest first.

    scores: [d_sae].  Equal scores stand in the order of their ids in both lists.
    """
    ids = scores.nonzero().flatten()
    ascending = scores[ids].sort(stable=True).indices
    descending = scores[ids].sort(stable=True, descending=True).indices
    return ids[descending[:k]].tolist(), ids[ascending[:k]].tolist()


def rank(sae, residual):
    """Of one sequence, residual [pos, d_model]: the latents active at its last position, and as `topk` and `bottomk`
    half as many (rounded down) of the highest and of the lowest mean activation."""
    scores, active = mean_activation(sae, residual)
    topk, bottomk = top_and_bottom(scores, len(active) // 2)
    return {"active": active, "topk": topk, "bottomk": bottomk}
