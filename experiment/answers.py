"""Batched greedy answers with the SAE spliced in. Knows nothing of files, options or SQuAD.

The SAE divides the model in two. Below it nothing depends on a mask: those layers run once for a batch, over what the
prompts of a context share and then over the rest, and the SAE encodes each position once. Above it the layers run once
for every mask, over the prompt and the unmasked answer as a draft: where the masked model would have said the same all
along, nothing is left to generate. What most unmasked answers begin with is such a draft too.

Memory, gemma-2-9b-it in float16, 32,768 tokens in a batch: 18.5 GB of model, 3.8 GB of SAE in float32, 11.3 GB of
cache for one mask at a time (344 KB a token; the lower layers' part, a quarter at layer 9, is shared until rows leave
the batch), while a step copies the cache once more at most, 0.5 GB of latents, and 2 GB for attention in one layer.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate.utils.memory import release_memory, should_reduce_batch_size
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformers import DynamicCache

from experiment import UserError, own_mistakes, say
from experiment.passes import Layout, SplicedModel, find_shared
from experiment.splice import Latents, join

NO_TOKEN = -1  # ends a draft that is only the beginning of an answer


@dataclass(frozen=True)
class Answer:
    """tokens: what was generated, up to and including the token that ended it.  log_probs: in nats, of each token given
    those before it: of the draft's tokens under the mask, without a draft of its own."""

    tokens: list[int]
    log_probs: list[float]


@dataclass(frozen=True)
class Trace:
    """What the SAE read in the sequences of a batch: prompts and answers, but for the last token, which nothing reads.

    rows, columns: [pos], the sequence of each position and where it stands in it, sequence by sequence.  positions:
    [pos], where it stands among `latents`, in which what several prompts begin with may stand once.
    """

    latents: Latents
    rows: torch.Tensor
    columns: torch.Tensor
    positions: torch.Tensor

    def select(self, rows, ends):
        """The Trace of these sequences alone, each up to its end (a length), with the Latents in its own order."""
        device = self.rows.device
        numbers = torch.full((int(self.rows.max()) + 1,), -1, device=device)
        numbers[rows] = torch.arange(len(rows), device=device)
        numbers = numbers[self.rows]  # [pos], of each position's sequence among `rows`
        kept = (numbers >= 0) & (self.columns < torch.tensor([*ends, 0], device=device)[numbers])
        order = numbers[kept].sort(stable=True).indices
        positions = self.positions[kept][order]
        return Trace(
            self.latents.take(positions),
            numbers[kept][order],
            self.columns[kept][order],
            torch.arange(len(positions), device=device),
        )


def plan_batches(lengths, batch_tokens, contexts):
    """Groups of indices into `lengths` (tokens a prompt), longest first, each within the budget, padding included.

    contexts: for each prompt a key; prompts with the same one stay together, so that what they share is run once.
    A prompt longer than the budget gets a batch of its own. The plan depends on nothing but its arguments.
    """
    longest, first = {}, {}
    for index, key in enumerate(contexts):
        longest[key] = max(longest.get(key, 0), lengths[index])
        first.setdefault(key, index)
    order = sorted(range(len(lengths)), key=lambda i: (-longest[contexts[i]], first[contexts[i]], -lengths[i]))
    batches, width = [], 0
    for index in order:
        width = max(width, lengths[index])
        if batches and width * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            width = lengths[index]
    return batches


def is_out_of_memory(error: Exception) -> bool:
    if "CUBLAS_STATUS_ALLOC_FAILED" in str(error):  # accelerate does not know this one yet
        return True
    return should_reduce_batch_size(error)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Tells in one line what helps where the device runs out of memory and there is nothing to split any more."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        with own_mistakes():  # a process of several: the others may have memory enough
            raise UserError(
                "out of memory, with no batch left to split, so that a smaller --batch-tokens cannot help: several "
                "GPUs (--device-map auto), a smaller --sae-dtype or --dtype, a shorter --max-new-tokens or fewer "
                "rankings can; what was finished is kept"
            ) from error


def in_halves(work: Callable[[list], list], batch: list) -> list:
    """work(batch), a list; where the device runs out of memory, that of the two halves, and so on.

    Raises what `work` raised where even one of the batch is too much: a caller's own batch may still be split.
    """
    try:
        return work(batch)
    except Exception as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
    say(f"Out of memory with {len(batch)} questions in a batch: this one is split in two; nothing is lost.")
    release_memory()
    half = len(batch) // 2
    return in_halves(work, batch[:half]) + in_halves(work, batch[half:])


@torch.no_grad()
def answer(model, prompts, contexts, max_new_tokens, guess=()):
    """Greedy Answers, unmasked, and their Trace. prompts: lists of token ids; contexts: for each a key.

    guess: tokens with which most answers begin: where the model says the same, they take no step each.
    """
    too_long = max(map(len, prompts)) + len(guess) + max_new_tokens > model.window
    drafts = [[*([] if too_long else guess[: max_new_tokens - 1]), NO_TOKEN]] * len(prompts)
    layout, cache, seen = lay_out(model, prompts, drafts, contexts, max_new_tokens), new_cache(model), []
    outputs = find_outputs(drafts, layout.rest_ids.shape[1])

    def run(ids, attention, cache):
        return model.run(ids, attention, cache, outputs=outputs if ids is layout.rest_ids else None)

    with model.ready(seen):
        logits = model.run_shared(layout, cache, run)[-1]
        answers, attention, steps = go_on_from(model, drafts, logits, cache, layout.attention, None, max_new_tokens)
    lengths = [len(prompt) + len(one.tokens) - 1 for prompt, one in zip(prompts, answers)]
    return answers, trace(layout, attention, steps, join(seen), lengths)


def trace(layout, attention, steps, latents, lengths):
    """The Trace of what a batch's passes have seen.

    attention: what of the layout is of the sequences.  steps: for each step of generation the rows that were in it:
    what they had generated last was run then.  lengths: of the sequences; a row may stay in the batch after its end.
    """
    rows, columns = attention.nonzero(as_tuple=True)
    stepped = torch.tensor([row for step in steps for row in step], dtype=torch.long, device=rows.device)
    first = layout.prefix_ids.numel() + layout.rest_ids.numel()
    positions = torch.cat([layout.places[rows, columns], first + torch.arange(len(stepped), device=rows.device)])
    rows, order = torch.cat([rows, stepped]).sort(stable=True)
    counts = rows.bincount(minlength=len(lengths))
    columns = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    kept = columns < torch.tensor(lengths, device=rows.device)[rows]
    return Trace(latents, rows[kept], columns[kept], positions[order][kept])


@torch.no_grad()
def answer_masked(model, prompts, contexts, drafts, masks, max_new_tokens):
    """Yields for each of `masks` (one at a time) the greedy Answers under it.

    drafts: the unmasked answers, lists of token ids, possibly empty.
    """
    drafts = [until_end(model, draft) or [NO_TOKEN] for draft in drafts]
    layout = lay_out(model, prompts, drafts, contexts if model.boundary else None, max_new_tokens)
    (count, width), below = layout.ids.shape, new_cache(model)
    rows = torch.arange(count, device=model.splice.device).repeat_interleave(width)
    # A window counts places in the cache, also those that a draft leaves behind its first difference.
    redo = prompts if width + max_new_tokens > model.window else None
    start = None
    with model.ready():
        if model.boundary:
            parts = [part.flatten(0, 1) for part in model.run_shared(layout, below, model.run_below)]
        if model.at_boundary:
            latents = join([model.splice.encode(*part) for part in zip(parts, layout.stands(model))])
            latents = latents.take(layout.places.flatten().to(model.splice.device))
        elif model.boundary:
            start = torch.cat(parts)[layout.places]
        for mask in masks:
            cache = new_cache(model)
            if model.at_boundary:
                start = model.splice.reconstruct(latents, rows, mask).unflatten(0, (count, width))
            outputs, replacement = find_outputs(drafts, width), start if model.at_boundary else None
            logits = model.run(layout.ids, layout.attention, cache, mask, outputs, start, replacement)
            for number in range(model.boundary or 0):
                cache.layers[number] = copy.copy(below.layers[number])  # updates replace its tensors
            answers, *_ = go_on_from(model, drafts, logits, cache, layout.attention, mask, max_new_tokens, redo)
            yield answers


def new_cache(model):
    return DynamicCache(config=model.lm.config)


def lay_out(model, prompts, drafts, contexts, max_new_tokens):
    """The Layout of prompts with all but the last token of their drafts: what would follow that is not asked for.

    contexts None: without shared prefixes.
    """
    sequences = [prompt + draft[:-1] for prompt, draft in zip(prompts, drafts)]
    short = min(map(len, prompts)) < 2  # nothing to share that leaves a token to go on from
    if contexts is None or short or max(map(len, sequences)) + max_new_tokens > model.window:
        return Layout(sequences, model.pad_id, model.device)
    limits = [len(prompt) - 1 for prompt in prompts]
    return Layout(sequences, model.pad_id, model.device, *find_shared(sequences, limits, contexts))


def find_outputs(drafts, width):
    """Rows and columns of what says each draft's tokens, draft after draft.

    On the CPU: from there they index what is on any device. With --device-map auto the last layer may be on another one
    than the first.
    """
    lengths = list(map(len, drafts))
    rows = torch.arange(len(drafts)).repeat_interleave(torch.tensor(lengths))
    columns = torch.cat([torch.arange(width - n, width) for n in lengths])
    return rows, columns


def cut(items: list, lengths: list[int]) -> list[list]:
    """The items in lists of these lengths, which add up to all of them."""
    remaining = iter(items)
    return [list(itertools.islice(remaining, length)) for length in lengths]


def go_on_from(model, drafts, logits, cache, attention, mask, max_new_tokens, redo=None):
    """Each draft as far as the model says the same, and greedily on from there.

    logits: at `find_outputs`.  redo: the prompts, where the cache is of no use for what differs from its draft.
    Returns Answers, the attention without what drafts have behind their first difference, and the steps of `go_on`.
    """
    lengths = list(map(len, drafts))
    said = cut(logits.argmax(-1).tolist(), lengths)
    given = [draft[-1] != NO_TOKEN for draft in drafts]  # an answer whose log probabilities are asked for
    scored = [draft if is_given else own for draft, own, is_given in zip(drafts, said, given)]
    targets = torch.tensor(list(itertools.chain.from_iterable(scored)), device=logits.device)
    log_probs = cut(pick_log_probs(logits, targets), lengths)
    tokens, left = [], []
    for row, (draft, own) in enumerate(zip(drafts, said)):
        agree = next((i for i, (a, b) in enumerate(zip(draft, own)) if a != b), len(draft))
        tokens.append(own[: agree + 1])  # the first token that differs is the model's own
        if not given[row]:
            del log_probs[row][agree + 1 :]
        if not has_ended(model, tokens[row], max_new_tokens):
            left.append(row)
    width = attention.shape[1]
    ends = [width - n + len(generated) for n, generated in zip(lengths, tokens)]
    columns = torch.arange(width, device=attention.device)
    attention = attention * (columns < torch.tensor(ends, device=attention.device).unsqueeze(1))
    if not left:
        return [Answer(*of_row) for of_row in zip(tokens, log_probs)], attention, []
    # The cache of those that go on ends with their last token but one.
    index = torch.tensor(left, device=attention.device)
    mask = mask and mask.take(index)
    if redo is None:
        keep(cache, index)
        going_on = attention[index]
    else:
        layout = Layout([redo[row] + tokens[row][:-1] for row in left], model.pad_id, model.device)
        cache, going_on = new_cache(model), layout.attention
        model.run(layout.rest_ids, going_on, cache, mask)
    own = {row: log_probs[row] for row in left if not given[row]}
    steps = go_on(model, tokens, left, own, cache, going_on, mask, max_new_tokens)
    return [Answer(*of_row) for of_row in zip(tokens, log_probs)], attention, steps


def go_on(model, tokens, going, log_probs, cache, attention, mask, max_new_tokens):
    """Greedy steps until all rows have ended. Those that have ended leave the batch once half of them have.

    tokens: of all rows, the last one not in the cache; they grow in place, as do log_probs {row: of its tokens}.
    going: the rows that cache, attention and mask are of.  Returns for each step the rows that were in it.
    """
    steps = []
    while True:
        places = [place for place, row in enumerate(going) if not has_ended(model, tokens[row], max_new_tokens)]
        if not places:
            return steps
        if 2 * len(places) <= len(going):
            index = torch.tensor(places, device=attention.device)
            keep(cache, index)
            attention, mask, going = attention[index], mask and mask.take(index), [going[place] for place in places]
            places = range(len(going))
        ids = torch.tensor([tokens[row][-1:] for row in going], device=attention.device)
        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], 1)
        logits = model.run(ids, attention, cache, mask)
        steps.append(going)
        chosen = logits.argmax(-1)
        chosen_log_probs = pick_log_probs(logits, chosen) if log_probs else None
        chosen_ids = chosen.tolist()
        for place in places:
            tokens[going[place]].append(chosen_ids[place])
            if going[place] in log_probs:
                log_probs[going[place]].append(chosen_log_probs[place])


def until_end(model: SplicedModel, tokens: list[int]) -> list[int]:
    """Tokens up to and including the first that ends an answer; all where none does."""
    for number, token in enumerate(tokens, 1):
        if token in model.end_ids:
            return tokens[:number]
    return tokens


def has_ended(model, tokens, max_new_tokens):
    return tokens[-1] in model.end_ids or len(tokens) >= max_new_tokens


def keep(cache, index):
    """Only these rows of the cache, ascending: where it is all of them, without a copy."""
    for layer in cache.layers:
        if len(index) < len(layer.keys):
            layer.batch_select_indices(index.to(layer.keys.device))


def pick_log_probs(logits: Float[Tensor, "output vocab"], tokens: Int[Tensor, " output"]) -> list[float]:
    """The log probability of a token in each row of logits, in nats."""
    picked = []
    for part, chosen in zip(logits.split(256), tokens.split(256)):  # in single precision, a part at a time
        log_probs = part.float().log_softmax(-1)
        picked.append(log_probs.gather(1, chosen.unsqueeze(1)).flatten())
    return torch.cat(picked).tolist()


def gradients(
    model: SplicedModel, sequences: list[list[int]], next_ids: list[int], trace: Trace
) -> tuple[Float[Tensor, "pos ..."], Float64[Tensor, " row"]]:
    """The gradient of the probability of next_ids[row] after each sequence, at the reconstruction at trace's positions.

    sequences: lists of token ids; trace: theirs. Also returns what each row's is to be multiplied by: gradients are
    scaled up on their way down, where float16 would lose what is small.
    The graph begins at the reconstruction, so only the layers above the SAE keep what their gradient needs.
    """
    layout = Layout(sequences, model.pad_id, model.device)
    whole = model.splice.reconstruct(trace.latents)
    padding = layout.ids.shape[1] - torch.tensor([len(ids) for ids in sequences], device=trace.rows.device)
    columns = padding[trace.rows] + trace.columns
    # With --device-map auto the SAE, its place in the model and the last layer may be on three devices.
    places = trace.rows.to(whole.device), columns.to(whole.device)
    leaf = whole.new_zeros(*layout.ids.shape, *whole.shape[1:]).index_put(places, whole).requires_grad_()
    with model.ready(), torch.enable_grad():
        logits = model.run(layout.ids, layout.attention, start=leaf if model.at_boundary else None, replacement=leaf)
    # dP/dlogits in double precision: where P is all but 1, 1 - P would vanish.
    p = logits.detach().double().softmax(-1)
    target = torch.tensor(next_ids, device=p.device).unsqueeze(1)
    pull = -p.gather(1, target) * p
    pull.scatter_add_(1, target, p.gather(1, target))
    scale = pull.abs().amax(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    (slope,) = torch.autograd.grad(logits, leaf, (pull / scale).to(logits.dtype))
    return slope[places].to(model.splice.device), scale.flatten().to(model.splice.device)
