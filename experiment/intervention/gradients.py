"""Gradients of what the model says, at the SAE's reconstruction. Knows nothing of rankings."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from experiment.intervention import plan
from experiment.intervention.forward import SplicedModel
from experiment.intervention.layout import Layout
from experiment.intervention.sequences import SequenceActivations


def gradients(
    model: SplicedModel, sequences: list[list[int]], next_ids: list[int], read: SequenceActivations
) -> tuple[Float[Tensor, "pos *d_in"], Float64[Tensor, "row"]]:
    """The gradient of the probability of next_ids[row] after each sequence, at the reconstruction at read's positions.

    sequences: lists of token ids; read: theirs. Also returns what each row's is to be multiplied by: gradients are
    scaled up on their way down, where float16 would lose what is small.
    The graph begins at the reconstruction, so only the layers above the SAE keep what their gradient needs.
    """
    layout = Layout(sequences, model.pad_id, model.device)
    whole = model.splice.reconstruct(read.latents)
    lengths = torch.tensor([len(ids) for ids in sequences], device=read.rows.device)
    padding = layout.ids.shape[1] - lengths
    columns = padding[read.rows] + read.columns
    # With --device-map auto the SAE, its place in the model and the last layer may be on three devices.
    places = (read.rows.to(whole.device), columns.to(whole.device))
    leaf = whole.new_zeros(*layout.ids.shape, *whole.shape[1:])
    leaf[places] = whole
    leaf.requires_grad_()
    with model.ready(), torch.enable_grad():
        logits = model.forward_from(leaf, layout.ids, layout.attention)
    pull = pull_of(logits.detach(), next_ids)
    scale = pull.abs().amax(1, keepdim=True)
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    scaled = (pull / scale).to(logits.dtype)
    (slope,) = torch.autograd.grad(logits, leaf, scaled)
    of_positions = slope[places]
    return of_positions.to(model.splice.device), scale.flatten().to(model.splice.device)


def pull_of(logits: Float[Tensor, "row vocab"], next_ids: list[int]) -> Float64[Tensor, "row vocab"]:
    """The derivative of each row's probability of its next id by the logits: P times (1 at that id, else 0) minus p.

    In double precision: where P is all but 1, 1 - P would vanish.
    """
    p = logits.double().softmax(-1)
    target = torch.tensor(next_ids, device=p.device).unsqueeze(1)
    probability = p.gather(1, target)
    pull = -probability * p
    return pull.scatter_add_(1, target, probability)


def rows_at_once(model: SplicedModel, rows: int, width: int) -> int:
    """How many rows of a batch, at most this wide, have their gradients found at once."""
    layers = max(1, model.layers_above)
    width = max(1, width)
    token_bytes = plan.graph_bytes_per_token(model.lm.config, model.lm.dtype, layers, width)
    return plan.gradient_rows(model.gradient_room, rows, width, token_bytes)
