"""Gradients of what the model says, at the SAE's reconstruction. Knows nothing of rankings."""

import torch
from jaxtyping import Float, Float64, Int
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
    leaf, places = _begin_at_reconstruction(model, layout, read)
    with model.ready(), torch.enable_grad():
        logits = model.forward_from(leaf, layout.ids, layout.attention)
    pull = pull_of(logits.detach(), next_ids)
    rows = torch.arange(len(sequences), device=pull.device)
    return _go_back(model, logits, pull, rows, leaf, places)


def pull_of(logits: Float[Tensor, "row vocab"], next_ids: list[int]) -> Float64[Tensor, "row vocab"]:
    """The derivative of each row's probability of its next id by the logits: P times (1 at that id, else 0) minus p.

    In double precision: where P is all but 1, 1 - P would vanish.
    """
    p = logits.double().softmax(-1)
    target = torch.tensor(next_ids, device=p.device).unsqueeze(1)
    probability = p.gather(1, target)
    pull = -probability * p
    return pull.scatter_add_(1, target, probability)


def log_prob_gradients(
    model: SplicedModel,
    sequences: list[list[int]],
    targets: list[dict[int, int]],
    read: SequenceActivations,
) -> tuple[Float[Tensor, "pos *d_in"], Float64[Tensor, "row"]]:
    """The gradient of a mean log probability of tokens (nats per token), at the reconstruction at read's positions.

    sequences: lists of token ids; read: theirs. targets: {position: token id} of each sequence, the tokens whose log
    probabilities given what stands before them are averaged. Also returns the scale of each, as `gradients` does.
    """
    layout = Layout(sequences, model.pad_id, model.device)
    leaf, places = _begin_at_reconstruction(model, layout, read)
    rows = []
    columns = []
    tokens = []
    for row, of_sequence in enumerate(targets):
        padding = layout.ids.shape[1] - len(sequences[row])
        for position, token in of_sequence.items():
            rows.append(row)
            columns.append(padding + position - 1)
            tokens.append(token)
    outputs = (torch.tensor(rows), torch.tensor(columns))
    with model.ready(), torch.enable_grad():
        logits = model.forward_from(leaf, layout.ids, layout.attention, outputs=outputs)
    # dm/dlogits in double precision: where a token is all but sure, 1 - P would vanish.
    pull = -logits.detach().double().softmax(-1)
    pull[torch.arange(len(tokens)), tokens] += 1
    of_outputs = outputs[0].to(pull.device)
    pull /= of_outputs.bincount()[of_outputs].unsqueeze(1)
    return _go_back(model, logits, pull, of_outputs, leaf, places)


def _begin_at_reconstruction(
    model: SplicedModel, layout: Layout, read: SequenceActivations
) -> tuple[Float[Tensor, "row pos *d_in"], tuple[Int[Tensor, "pos"], Int[Tensor, "pos"]]]:
    """What stands in the model's place in a batch, as a leaf of the graph, and where read's positions are in it."""
    whole = model.splice.reconstruct(read.latents)
    padding = layout.ids.shape[1] - layout.attention.sum(1).to(read.rows.device)
    columns = padding[read.rows] + read.columns
    # With --device-map auto the SAE, its place in the model and the last layer may be on three devices.
    places = read.rows.to(whole.device), columns.to(whole.device)
    nothing = whole.new_zeros(*layout.ids.shape, *whole.shape[1:])
    return nothing.index_put(places, whole).requires_grad_(), places


def _go_back(
    model: SplicedModel,
    logits: Float[Tensor, "output vocab"],
    pull: Float64[Tensor, "output vocab"],
    rows: Int[Tensor, "output"],
    leaf: Float[Tensor, "row pos *d_in"],
    places: tuple[Int[Tensor, "pos"], Int[Tensor, "pos"]],
) -> tuple[Float[Tensor, "pos *d_in"], Float64[Tensor, "row"]]:
    """From the derivative by the logits (`pull`) down to the leaf, at these places; and each row's scale.

    rows: the row of each output.
    """
    largest = pull.abs().amax(1)
    scale = largest.new_zeros(len(leaf)).scatter_reduce(0, rows, largest, "amax")
    scale = scale.clamp(min=torch.finfo(pull.dtype).tiny)
    scaled = pull / scale[rows].unsqueeze(1)
    (slope,) = torch.autograd.grad(logits, leaf, scaled.to(logits.dtype))
    of_positions = slope[places]
    return of_positions.to(model.splice.device), scale.to(model.splice.device)


def rows_at_once(model: SplicedModel, rows: int, width: int) -> int:
    """How many rows of a batch, at most this wide, have their gradients found at once."""
    layers = max(1, model.layers_above)
    width = max(1, width)
    token_bytes = plan.graph_bytes_per_token(model.lm.config, model.lm.dtype, layers, width)
    return plan.gradient_rows(model.gradient_room, rows, width, token_bytes)
