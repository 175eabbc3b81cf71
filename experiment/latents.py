"""Scores of SAE latents on a sequence, and the TopK and BottomK by score. Knows nothing of files or questions."""

import random

import torch

from experiment.generation import POSITIONS_AT_ONCE, FiniteLogits, inputs, pad_left, positions_of, splice, spliced


@torch.inference_mode()
def mean_activation(sae, residual):
    """The baseline's score of each latent on one sequence: its mean activation over all positions, BOS included.

    residual: [pos, d_model], any dtype.  Returns the scores [d_sae] in float32, and the ids of the latents
    active (non-zero) at the last position, ascending.  Source: GradSAE (arXiv 2505.08080), its baseline.
    """
    total = 0
    for chunk in residual.split(POSITIONS_AT_ONCE):
        acts = sae.encode(inputs(sae, chunk))  # [chunk, d_sae]
        total = total + acts.sum(0, dtype=torch.float32)
    return total / len(residual), acts[-1].nonzero().flatten().tolist()


def gradient_scores(model, sae, sequences, next_ids, bypass=()):
    """GradSAE's score of each latent on each sequence: the mean over positions of relu(dP/dH * H).

    sequences: lists of token ids.  P: the probability that the model, the SAE spliced in, gives next_ids[row] after
    the row.  H: the latents' activations.  bypass: as in `splice`; these positions do not count.
    Returns [row, d_sae] in float32.  Source: GradSAE (arXiv 2505.08080).

    Only the layers above the SAE keep what their gradient needs: the graph begins at the reconstruction. From there
    to H it goes on for a chunk of positions at a time, so that [pos, d_sae] is never held as a whole.
    """
    lm = model.original_model
    seen, leaves = [], []
    reconstruct = splice(sae, None, seen, bypass)

    def reconstruct_as_leaf(residual, ids):
        with torch.no_grad():
            leaves.append(reconstruct(residual, ids).requires_grad_())
        return leaves[0]

    ids, mask = pad_left(sequences, lm.generation_config.pad_token_id, lm.device)
    with spliced(model, sae, reconstruct_as_leaf):
        logits = lm(
            input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False, logits_to_keep=1
        ).logits[:, -1]  # [row, vocab]
    finite = FiniteLogits(logits.device)
    finite(ids, logits.detach())
    finite.check()
    # dP/dlogits in double precision: where P is all but 1, 1 - P would vanish. And scaled to 1 for the way down, where
    # float16 would lose what is small.
    p = logits.detach().double().softmax(-1)
    target = torch.tensor(next_ids, device=p.device).unsqueeze(1)
    pull = -p.gather(1, target) * p
    pull.scatter_add_(1, target, p.gather(1, target))
    scale = pull.abs().amax(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    (slope,) = torch.autograd.grad(logits, leaves[0], (pull / scale).to(logits.dtype))  # [row, pos, d_model]

    scores = torch.zeros(len(sequences), sae.cfg.d_sae, device=sae.device)
    for row, sequence in enumerate(sequences):
        counted = counted_positions(sequence, bypass)
        residual, down = (inputs(sae, tensor[row, -len(sequence) :][counted]) for tensor in (seen[0], slope))
        for chunk, down_chunk in zip(residual.split(POSITIONS_AT_ONCE), down.split(POSITIONS_AT_ONCE)):
            with torch.no_grad():
                acts = sae.encode(chunk)  # [chunk, d_sae]
            decoded = sae.decode(acts.requires_grad_())
            (slopes,) = torch.autograd.grad(decoded, acts, down_chunk)
            scores[row] += (slopes * acts.detach()).relu().sum(0, dtype=torch.float32)
        scores[row] *= scale[row].to(scores) / len(residual)
    return scores


def random_scores(sae, residual, seed):
    """A score drawn for each latent that is active anywhere in the sequence, residual [pos, d_model]; 0 for the rest.

    seed: a text, another one for each sequence.  The control: TopK and BottomK by it are two draws of active latents.
    """
    scores, _ = mean_activation(sae, residual)
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    drawn = 1 + torch.rand(len(scores), generator=generator)
    return torch.where(scores != 0, drawn.to(scores.device), 0)


def counted_positions(ids, bypass):
    """The positions of a sequence that scores are taken over: all but those whose token is in `bypass`."""
    return [position for position, token in enumerate(ids) if token not in bypass]


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
