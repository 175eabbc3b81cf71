"""Scores of SAE latents on a sequence, and the TopK and BottomK by score. Knows nothing of files or questions."""

import re

import torch

# Latents held at once, in elements: 0.5 GB a tensor in float32, a thousand positions of a 131k-wide SAE.
LATENTS_AT_ONCE = 2**27


def positions_at_once(sae):
    return max(1, LATENTS_AT_ONCE // sae.cfg.d_sae)


@torch.inference_mode()
def residuals(model, sae, sequences):
    """Yields the residual stream at the SAE's hook for each sequence, without the layers above it.

    sequences: lists of token ids, of any lengths; they run as one batch.  Yields [pos, d_model] each.
    """
    hook_name = sae.cfg.metadata.hook_name
    layer = int(re.search(r"blocks\.(\d+)\.", hook_name).group(1))
    lengths = [len(sequence) for sequence in sequences]
    # Padded on the right: causal attention never looks there, so real positions see exactly their own sequence.
    ids = torch.zeros(len(sequences), max(lengths), dtype=torch.long, device=sae.W_enc.device)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    _, cache = model.run_with_cache(
        ids, names_filter=hook_name, stop_at_layer=layer + 1, return_cache_object=False, return_type=None
    )
    residual = cache[hook_name]  # [batch, pos, d_model]
    for row, length in enumerate(lengths):
        yield residual[row, :length]


@torch.inference_mode()
def mean_activation(sae, residual):
    """The baseline's score of each latent on one sequence: its mean activation over all positions, BOS included.

    residual: [pos, d_model], any dtype.  Returns the scores [d_sae] in the SAE's dtype, and the ids of the latents
    active (non-zero) at the last position, ascending.  Source: GradSAE (arXiv 2505.08080), its baseline.
    """
    total = 0
    for chunk in residual.to(sae.dtype).split(positions_at_once(sae)):
        acts = sae.encode(chunk)  # [chunk, d_sae]
        total = total + acts.sum(0)
    return total / len(residual), acts[-1].nonzero().flatten().tolist()


def top_and_bottom(scores, k):
    """The ids of the k highest scores, highest first, and of the k lowest non-zero scores, lowest first.

    scores: [d_sae].  Equal scores stand in the order of their ids in both lists.
    """
    ids = scores.nonzero().flatten()
    ascending = scores[ids].sort(stable=True).indices
    descending = scores[ids].sort(stable=True, descending=True).indices
    return ids[descending[:k]].tolist(), ids[ascending[:k]].tolist()


def rank(model, sae, sequences):
    """For each sequence of token ids: latents active at its last position, TopK and BottomK, K half of the active."""
    for residual in residuals(model, sae, sequences):
        scores, active = mean_activation(sae, residual)
        topk, bottomk = top_and_bottom(scores, len(active) // 2)
        yield {"active": active, "topk": topk, "bottomk": bottomk}
