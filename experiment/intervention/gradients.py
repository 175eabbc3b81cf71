"""Gradients of what the model says, at the SAE's reconstruction. Knows nothing of rankings.

Every graph begins at the reconstruction, so only the layers above the SAE keep what their gradient needs. All of this
runs inside the model's `ready()`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from experiment.intervention import plan
from experiment.intervention.forward import Outputs, SplicedModel
from experiment.intervention.layout import Layout
from experiment.intervention.sequences import SequenceActivations

Gradients = tuple[Float[Tensor, "pos *d_in"], Float64[Tensor, "row"]]


@dataclass(frozen=True)
class Beginning:
    """Where the graph of a batch begins.

    leaf: what stands in the model's place, whose gradient is asked for.  rows, columns: where each position of what the
    SAE read is in it.
    """

    leaf: Float[Tensor, "row pos *d_in"]
    rows: Int[Tensor, "pos"]
    columns: Int[Tensor, "pos"]


def gradients(
    model: SplicedModel,
    sequences: list[list[int]],
    next_ids: list[int],
    read: SequenceActivations,
) -> Gradients:
    """The gradient of the probability of next_ids[row] after each sequence, at the reconstruction at read's positions.

    sequences: lists of token ids.  read: what the SAE read in them.  Also returns what each row's gradient is to be
    multiplied by: gradients are scaled up on their way down, where float16 would lose what is small.
    """
    layout = Layout(sequences, model.pad_id, model.device)
    beginning = _begin_at_reconstruction(model, layout, read)
    with torch.enable_grad():
        logits = model.forward_from(beginning.leaf, layout.ids, layout.attention)
    pull = pull_of(logits.detach(), next_ids)
    rows = torch.arange(len(sequences), device=pull.device)
    return _go_back(model, logits, pull, rows, beginning)


def pull_of(logits: Float[Tensor, "row vocab"], next_ids: list[int]) -> Float64[Tensor, "row vocab"]:
    """The derivative of each row's probability P of its next id by the logits: P times (1 at that id, else 0, less the
    softmax).

    In double precision: where P is all but 1, 1 - P would vanish.
    """
    softmax = logits.double().softmax(-1)
    ids = torch.tensor(next_ids, device=logits.device)
    at_ids = ids.unsqueeze(1)
    probability = softmax.gather(1, at_ids)
    pull = -probability * softmax
    return pull.scatter_add_(1, at_ids, probability)


def log_prob_gradients(
    model: SplicedModel,
    sequences: list[list[int]],
    targets: list[dict[int, int]],
    read: SequenceActivations,
) -> Gradients:
    """The gradient of a mean log probability of tokens (nats per token), at the reconstruction at read's positions.

    sequences, read: as of `gradients`, and so is what is returned.  targets: {position: token id} of each sequence, the
    tokens whose log probabilities given what stands before them are averaged.
    """
    layout = Layout(sequences, model.pad_id, model.device)
    beginning = _begin_at_reconstruction(model, layout, read)
    outputs, tokens = _place_targets(layout, sequences, targets)
    with torch.enable_grad():
        logits = model.forward_from(beginning.leaf, layout.ids, layout.attention, outputs=outputs)
    # dm/dlogits in double precision: where a token is all but sure, 1 - P would vanish.
    pull = -logits.detach().double().softmax(-1)
    pull[torch.arange(len(tokens)), tokens] += 1
    rows = outputs[0].to(pull.device)
    counts = rows.bincount()  # of each row's tokens
    pull /= counts[rows].unsqueeze(1)
    return _go_back(model, logits, pull, rows, beginning)


def _place_targets(
    layout: Layout,
    sequences: list[list[int]],
    targets: list[dict[int, int]],
) -> tuple[Outputs, list[int]]:
    """Where the targets' logits are in the batch, one position before each, and the targets' ids. On the CPU."""
    width = layout.ids.shape[1]
    rows = []
    columns = []
    tokens = []
    for row, sequence in enumerate(sequences):
        padding = width - len(sequence)
        for position, token in targets[row].items():
            rows.append(row)
            columns.append(padding + position - 1)
            tokens.append(token)
    outputs = (torch.tensor(rows), torch.tensor(columns))
    return outputs, tokens


def _begin_at_reconstruction(
    model: SplicedModel,
    layout: Layout,
    read: SequenceActivations,
) -> Beginning:
    """What stands in the model's place in a batch, as a leaf of the graph; zero at padding."""
    reconstruction = model.splice.reconstruct(read.latents)
    device = reconstruction.device
    lengths = layout.attention.sum(1)
    padding = layout.ids.shape[1] - lengths
    padding = padding.to(read.rows.device)
    columns = padding[read.rows] + read.columns
    # With --device-map auto the SAE, its place in the model and the last layer may be on three devices.
    rows = read.rows.to(device)
    columns = columns.to(device)
    d_in = reconstruction.shape[1:]  # two numbers at `hook_z`
    leaf = reconstruction.new_zeros(*layout.ids.shape, *d_in)
    leaf[rows, columns] = reconstruction
    return Beginning(leaf.requires_grad_(), rows, columns)


def _go_back(
    model: SplicedModel,
    logits: Float[Tensor, "output vocab"],
    pull: Float64[Tensor, "output vocab"],
    rows: Int[Tensor, "output"],
    beginning: Beginning,
) -> Gradients:
    """From the derivative by the logits (`pull`) down to where the graph begins; and each row's scale.

    rows: the row of each output.
    """
    leaf = beginning.leaf
    largest = pull.abs().amax(1)
    scale = largest.new_zeros(len(leaf))
    scale = scale.scatter_reduce(0, rows, largest, "amax")
    tiny = torch.finfo(pull.dtype).tiny
    scale = scale.clamp(min=tiny)
    scaled = pull / scale[rows].unsqueeze(1)
    scaled = scaled.to(logits.dtype)
    (slope,) = torch.autograd.grad(logits, leaf, scaled)
    of_positions = slope[beginning.rows, beginning.columns]
    device = model.splice.device
    return of_positions.to(device), scale.to(device)


def rows_at_once(model: SplicedModel, rows: int, width: int) -> int:
    """How many rows of a batch, at most this wide, have their gradients found at once."""
    layers = max(1, model.layers_above)
    width = max(1, width)
    token_bytes = plan.graph_bytes_per_token(model.lm.config, model.lm.dtype, layers, width)
    return plan.gradient_rows(model.gradient_room, rows, width, token_bytes)
