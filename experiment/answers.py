"""Batched greedy answers with the SAE spliced in. Knows nothing of files, options or SQuAD.

The SAE divides the model in two. Below it nothing depends on a mask: those layers run once for a batch, over what the
prompts of a context share and then over the rest, and the SAE encodes each position once. Above it the layers run once
for every mask, over the prompt and the unmasked answer as a draft: where the masked model would have said the same all
along, nothing is left to generate.

Memory, gemma-2-9b-it in float16, 32,768 tokens in a batch: 18.5 GB of model, 3.8 GB of SAE in float32, 11.3 GB of
cache for one mask at a time (344 KB a token; the lower layers' part, a quarter at layer 9, is shared until rows leave
the batch), while a step copies the cache once more at most, 0.5 GB of latents, and 2 GB for attention in one layer.
"""

import contextlib
import copy
import os
from dataclasses import dataclass

import torch
from accelerate.utils.memory import release_memory, should_reduce_batch_size
from transformers import DynamicCache

from experiment import UserError, say
from experiment.splice import Latents, hooked, join


@dataclass(frozen=True)
class Answer:
    """tokens: what was generated, up to and including the token that ended it.  log_probs: of each token of the
    unmasked answer, in nats, one after the other given those before it (of a masked answer: under the mask).
    latents: over the prompt and all tokens but the last, where asked for."""

    tokens: list[int]
    log_probs: list[float]
    latents: Latents | None = None


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


def in_halves(work, batch):
    """work(batch), a list; where the device runs out of memory, that of the two halves, and so on."""
    try:
        return work(batch)
    except Exception as error:
        # accelerate does not know this one yet
        out_of_memory = should_reduce_batch_size(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
        if len(batch) == 1 or not out_of_memory:
            raise
    say(f"Out of memory with {len(batch)} questions in a batch: this one is split in two; nothing is lost.")
    release_memory()
    half = len(batch) // 2
    return in_halves(work, batch[:half]) + in_halves(work, batch[half:])


def pad_left(sequences, pad_id, device):
    """Token ids and attention mask [row, pos]: every row's next token stands at the same place."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = torch.tensor(sequence, dtype=torch.long)
        mask[row, length - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def find_shared(sequences, limits, contexts):
    """What the sequences of each context begin with: a list of prefixes, and for each sequence the index of its own.

    limits: how much of each sequence may be in a prefix, at least 1 less than its length. Prefixes are cut so that
    about as much is left of all sequences: padding costs what it costs in a batch without prefixes.
    """
    groups = {}
    for row, (key, sequence) in enumerate(zip(contexts, sequences)):
        groups.setdefault((key, sequence[0]), []).append(row)  # those that begin alike, so that no prefix is empty
    shared = [
        min(len(os.path.commonprefix([sequences[row] for row in rows])), *(limits[row] for row in rows))
        for rows in groups.values()
    ]
    left = max(
        (max(len(sequences[row]) for row in rows) - n for rows, n in zip(groups.values(), shared) if len(rows) > 1),
        default=max(map(len, sequences)),
    )
    prefixes, owners = [], [0] * len(sequences)
    for number, (rows, n) in enumerate(zip(groups.values(), shared)):
        longest = max(rows, key=lambda row: len(sequences[row]))
        prefixes.append(sequences[longest][: max(1, min(n, len(sequences[longest]) - left))])
        for row in rows:
            owners[row] = number
    return prefixes, owners


class Layout:
    """A batch of sequences on the device, left-padded in two parts: shared prefixes, and the rest of each sequence.

    prefix_ids, prefix_mask: [context, prefix]; rest_ids, rest_mask: [row, rest]; owners: [row], each one's prefix.
    Without prefixes that part is 0 positions wide. attention: [row, prefix + rest].
    """

    def __init__(self, sequences, pad_id, device, prefixes=((),), owners=None):
        owners = [0] * len(sequences) if owners is None else owners
        self.lengths = [(len(prefixes[o]), len(ids) - len(prefixes[o])) for o, ids in zip(owners, sequences)]
        self.prefix_ids, self.prefix_mask = pad_left(prefixes, pad_id, device)
        self.rest_ids, self.rest_mask = pad_left([s[n:] for s, (n, _) in zip(sequences, self.lengths)], pad_id, device)
        self.owners = torch.tensor(owners, device=device)
        self.attention = torch.cat([self.prefix_mask[self.owners], self.rest_mask], 1)
        self.ids = torch.cat([self.prefix_ids[self.owners], self.rest_ids], 1)

    def places(self):
        """Where each position of [row, prefix + rest] stands among the prefixes' positions and then the rests'."""
        contexts, prefix = self.prefix_ids.shape
        rows, rest = self.rest_ids.shape
        device = self.rest_ids.device
        of_prefix = self.owners[:, None] * prefix + torch.arange(prefix, device=device)
        of_rest = contexts * prefix + torch.arange(rows * rest, device=device).view(rows, rest)
        return torch.cat([of_prefix, of_rest], 1)


class _Reached(Exception):
    """Carries what the first layer above the SAE reads, and ends the forward pass there."""


class _Passed(torch.nn.Module):
    """A layer that was run before: the last one of these hands on its result, the others whatever they get."""

    def __init__(self, result=None):
        super().__init__()
        self.result = result

    def forward(self, hidden, *_, **__):
        return hidden if self.result is None else self.result


class SplicedModel:
    """A TransformerBridge with an SAE in it. All forward passes of the rounds are made here.

    boundary: the first layer that has to run again for another mask; None where all have to.  at_boundary: whether
    the SAE stands between two layers there, so that what it gives is all that the layers above see.
    """

    def __init__(self, model, splice):
        self.model, self.splice, self.lm = model, splice, model.original_model
        self.hook_name = splice.sae.cfg.metadata.hook_name
        config = self.lm.generation_config
        self.end_ids, self.pad_id, self.device = set(config.eos_token_id), config.pad_token_id, self.lm.device
        layers = len(self.lm.get_decoder().layers)
        above = int(self.hook_name.split(".")[1]) + self.hook_name.endswith("resid_post")
        self.boundary = above if 0 < above < layers else None
        self.at_boundary = self.boundary is not None and "resid" in self.hook_name
        # A window counts places in the cache, padding between prefix and rest included.
        self.window = getattr(self.lm.config.get_text_config(), "sliding_window", None) or float("inf")
        self.seen = None  # a list that gets the Latents of every pass, when asked for
        self._pass = None  # where the SAE stands in the pass under way, its mask, and what stands in its place

    @contextlib.contextmanager
    def ready(self):
        """The SAE in its place, for as long as the block lasts."""
        with hooked(self.model, self.hook_name, self._replace):
            yield self

    def _replace(self, residual):
        stands, mask, replacement = self._pass
        if replacement is _Reached:
            raise _Reached(residual)
        if replacement is not None:
            return replacement.to(residual)
        latents = self.splice.encode(residual.flatten(0, 1), stands.flatten())
        if self.seen is not None:
            self.seen.append(latents)
        rows = torch.arange(len(residual), device=self.splice.device).repeat_interleave(residual.shape[1])
        return self.splice.reconstruct(latents, rows, mask).view_as(residual)

    def stands_at(self, ids, attention):
        """Where the SAE stands, [row, pos]: not at padding, nor at tokens that bypass it."""
        return attention.bool() & ~torch.isin(ids, self.splice.bypass.to(ids.device))

    def run(self, ids, attention, cache=None, mask=None, outputs=None, start=None, replacement=None):
        """One forward pass over token ids [row, pos], and the logits [output, vocab] at `outputs`.

        attention: [row, cached + pos].  mask: a Mask.  outputs: rows and columns of the logits wanted; None: each row's last.
        start [row, pos, d_model]: what the layer at the boundary reads; those below are not run.
        replacement [row, pos, d_in]: what stands in the SAE's place, instead of what the splice makes of it.
        """
        self._pass = self.stands_at(ids, attention[:, -ids.shape[1] :]), mask, replacement
        layers, below = self.lm.get_decoder().layers, 0 if start is None else self.boundary
        saved = list(layers[:below])
        rows, columns = (slice(None), -1) if outputs is None else outputs

        def pick(module, args):
            return (args[0][rows, columns],)

        try:
            for number in range(below):
                layers[number] = _Passed(start if number == below - 1 else None)
            with self.lm.get_output_embeddings().register_forward_pre_hook(pick):
                logits = self.lm(
                    input_ids=ids,
                    attention_mask=attention,
                    position_ids=(attention.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                    past_key_values=cache,
                    use_cache=cache is not None,
                ).logits
        finally:
            self._pass = None
            for number, layer in enumerate(saved):
                layers[number] = layer
        if not logits.isfinite().all():
            raise UserError(
                "the model's logits are not finite: float16 overflows in some models; try --dtype bfloat16 "
                "(or float32; and the same for --sae-dtype)"
            )
        return logits

    def run_below(self, ids, attention, cache):
        """The layers under the boundary alone: what the layer there reads, [row, pos, d_model]."""

        def stop(module, args, kwargs):
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        with self.lm.get_decoder().layers[self.boundary].register_forward_pre_hook(stop, with_kwargs=True):
            try:
                self.run(ids, attention, cache, replacement=_Reached)
            except _Reached as reached:
                return reached.args[0]

    def run_shared(self, layout, cache, run):
        """run(ids, attention, cache) over the prefixes and then over the rest of each row; what each run gave."""
        if not layout.prefix_ids.shape[1]:
            return [run(layout.rest_ids, layout.attention, cache)]
        of_prefix = run(layout.prefix_ids, layout.prefix_mask, cache)
        for layer in cache.layers:
            if layer.is_initialized:
                layer.batch_select_indices(layout.owners.to(layer.keys.device))
        return [of_prefix, run(layout.rest_ids, layout.attention, cache)]


@torch.no_grad()
def answer(model, prompts, contexts, max_new_tokens, known=None):
    """Greedy Answers, unmasked, with latents. prompts: lists of token ids; contexts: for each a key.

    known: what was answered before, lists of token ids: only the latents are asked for.
    """
    layout = lay_out(model, prompts, known or [[]] * len(prompts), contexts, max_new_tokens)
    cache, model.seen = DynamicCache(config=model.lm.config), []
    with model.ready():
        logits = model.run_shared(layout, cache, model.run)[-1]
        log_probs = [[p] for p in pick_log_probs(logits, logits.argmax(-1))]
        tokens, steps = [[token] for token in logits.argmax(-1).tolist()], []
        if known is None:
            steps = go_on(model, tokens, cache, layout.attention, None, max_new_tokens, log_probs)
    latents, model.seen = join(model.seen), None
    return [
        Answer(*of_row, model.splice.with_entries(latents.take(index)))
        for *of_row, index in zip(known or tokens, log_probs, find_positions(layout, steps, prompts, known or tokens))
    ]


def find_positions(layout, steps, prompts, tokens):
    """Where each row's tokens but the last stand among all that a batch's passes have seen, [pos] each.

    steps: for each step of generation the rows that were in it: what they had generated last was run then.
    """
    positions = [row[mask].tolist() for row, mask in zip(layout.places(), layout.attention.bool())]
    seen = layout.prefix_ids.numel() + layout.rest_ids.numel()
    for rows in steps:
        for place, row in enumerate(rows):
            positions[row].append(seen + place)
        seen += len(rows)
    lengths = [len(prompt) + len(ids) - 1 for prompt, ids in zip(prompts, tokens)]  # a row may stay after its end
    return [torch.tensor(row[:n], device=layout.owners.device) for row, n in zip(positions, lengths)]


@torch.no_grad()
def answer_masked(model, prompts, contexts, drafts, masks, max_new_tokens):
    """Yields for each of `masks` (one at a time) the greedy Answers under it.

    drafts: the unmasked answers, lists of token ids, possibly empty.
    """
    # The draft's last token is not run: what would follow it is not asked for.
    layout = lay_out(model, prompts, drafts, contexts if model.boundary else None, max_new_tokens)
    below = DynamicCache(config=model.lm.config)
    with model.ready():
        if model.boundary:
            residual = torch.cat([part.flatten(0, 1) for part in model.run_shared(layout, below, model.run_below)])
            places = layout.places()
            if model.at_boundary:
                stands = [
                    model.stands_at(layout.prefix_ids, layout.prefix_mask),
                    model.stands_at(layout.rest_ids, layout.rest_mask),
                ]
                latents = model.splice.encode(residual, torch.cat([part.flatten() for part in stands]))
        for mask in masks:
            cache, start = DynamicCache(config=model.lm.config), None
            if model.at_boundary:
                rows = torch.arange(len(places), device=model.splice.device).repeat_interleave(places.shape[1])
                start = model.splice.reconstruct(latents.take(places.flatten()), rows, mask).unflatten(0, places.shape)
            elif model.boundary:
                start = residual[places]
            outputs = draft_outputs(drafts, layout.ids.shape[1], model.device)
            replacement = start if model.at_boundary else None
            logits = model.run(layout.ids, layout.attention, cache, mask, outputs, start, replacement)
            if start is not None:
                for number in range(model.boundary):
                    cache.layers[number] = copy.copy(below.layers[number])  # updates replace its tensors
            yield check_drafts(model, prompts, drafts, logits, cache, layout.attention, mask, max_new_tokens)


def lay_out(model, prompts, drafts, contexts, max_new_tokens):
    """The Layout of prompts with all but the last token of their drafts; contexts None: without shared prefixes."""
    sequences = [prompt + draft[:-1] for prompt, draft in zip(prompts, drafts)]
    short = min(map(len, prompts)) < 2  # nothing to share that leaves a token to go on from
    if contexts is None or short or max(map(len, sequences)) + max_new_tokens > model.window:
        return Layout(sequences, model.pad_id, model.device)
    limits = [len(prompt) - 1 for prompt in prompts]
    return Layout(sequences, model.pad_id, model.device, *find_shared(sequences, limits, contexts))


def draft_outputs(drafts, width, device):
    """Rows and columns of what says each draft's tokens, one draft after the other; of an empty one what comes first."""
    lengths = [max(1, len(draft)) for draft in drafts]
    rows = torch.arange(len(drafts)).repeat_interleave(torch.tensor(lengths))
    columns = torch.cat([torch.arange(width - n, width) for n in lengths])
    return rows.to(device), columns.to(device)


def check_drafts(model, prompts, drafts, logits, cache, attention, mask, max_new_tokens):
    """Answers: each draft as far as the masked model says the same, and greedily on from there."""
    lengths = [max(1, len(draft)) for draft in drafts]
    said = [part.tolist() for part in logits.argmax(-1).split(lengths)]
    targets = torch.cat([torch.tensor(draft or [0], device=logits.device) for draft in drafts])
    log_probs = pick_log_probs(logits, targets)
    answers, on = [], []
    for row, (draft, tokens) in enumerate(zip(drafts, said)):
        agree = next((i for i, (a, b) in enumerate(zip(draft, tokens)) if a != b), len(draft))
        answers.append(tokens[: agree + 1])  # the first token that differs is the masked model's own
        attention_ends = attention.shape[1] - (lengths[row] - 1) + len(answers[-1]) - 1
        if not has_ended(model, answers[-1], max_new_tokens):
            on.append((row, attention_ends))
    if on:
        rows = [row for row, _ in on]
        generated = [answers[row] for row in rows]
        index = torch.tensor(rows, device=attention.device)
        mask = mask and mask.take(index)
        if attention.shape[1] + max_new_tokens > model.window:  # the window would count what is dropped here
            layout = Layout([prompts[row] + answers[row][:-1] for row in rows], model.pad_id, model.device)
            cache, attention = DynamicCache(config=model.lm.config), layout.attention
            model.run(layout.rest_ids, attention, cache, mask)
        else:
            keep(cache, index)
            attention = attention[index]
            for place, (_, end) in enumerate(on):
                attention[place, end:] = 0  # the draft behind the first difference
        go_on(model, generated, cache, attention, mask, max_new_tokens)
    starts = [sum(lengths[:row]) for row in range(len(drafts))]
    return [
        Answer(tokens, log_probs[start : start + len(draft)])
        for tokens, start, draft in zip(answers, starts, drafts)
    ]


def go_on(model, rows, cache, attention, mask, max_new_tokens, log_probs=None):
    """Greedy steps until all rows have ended; each row (and each of log_probs) grows in place.

    rows: lists of generated tokens, the last one not in the cache. Those that have ended leave the batch once half of
    them have. Returns for each step the rows that were in it.
    """
    going, steps = list(range(len(rows))), []
    while True:
        unfinished = [place for place, row in enumerate(going) if not has_ended(model, rows[row], max_new_tokens)]
        if not unfinished:
            return steps
        if 2 * len(unfinished) <= len(going):
            index = torch.tensor(unfinished, device=attention.device)
            keep(cache, index)
            attention, going = attention[index], [going[place] for place in unfinished]
            mask = mask and mask.take(index)
            unfinished = range(len(going))
        ids = torch.tensor([rows[row][-1:] for row in going], device=attention.device)
        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], 1)
        logits = model.run(ids, attention, cache, mask)
        steps.append(going)
        tokens = logits.argmax(-1)
        found = None if log_probs is None else pick_log_probs(logits, tokens)
        tokens = tokens.tolist()
        for place in unfinished:
            rows[going[place]].append(tokens[place])
            if found is not None:
                log_probs[going[place]].append(found[place])


def has_ended(model, tokens, max_new_tokens):
    return tokens[-1] in model.end_ids or len(tokens) >= max_new_tokens


def keep(cache, index):
    """Only these rows of the cache."""
    for layer in cache.layers:
        layer.batch_select_indices(index.to(layer.keys.device))


def pick_log_probs(logits, tokens):
    """The log probability of a token [output] in each row of logits [output, vocab], in nats."""
    found = []
    for part, chosen in zip(logits.split(256), tokens.split(256)):  # in single precision, a part at a time
        found += part.float().log_softmax(-1).gather(1, chosen[:, None]).flatten().tolist()
    return found


def gradients(model, sequences, next_ids, latents):
    """The gradient of the probability of next_ids[row] after each sequence, at the reconstruction: [pos, d_in] each.

    sequences: lists of token ids; latents: the Latents of each. Also returns what each is to be multiplied by: they
    are scaled up on their way down, where float16 would lose what is small.
    The graph begins at the reconstruction, so only the layers above the SAE keep what their gradient needs.
    """
    layout = Layout(sequences, model.pad_id, model.device)
    parts = [model.splice.reconstruct(part) for part in latents]
    leaf = parts[0].new_zeros(len(parts), layout.ids.shape[1], *parts[0].shape[1:])
    for row, part in enumerate(parts):
        leaf[row, -len(part) :] = part
    leaf.requires_grad_()
    with model.ready(), torch.enable_grad():
        logits = model.run(layout.ids, layout.attention, start=leaf if model.at_boundary else None, replacement=leaf)
    # dP/dlogits in double precision: where P is all but 1, 1 - P would vanish.
    p = logits.detach().double().softmax(-1)
    target = torch.tensor(next_ids, device=p.device).unsqueeze(1)
    pull = -p.gather(1, target) * p
    pull.scatter_add_(1, target, p.gather(1, target))
    scale = pull.abs().amax(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    (slope,) = torch.autograd.grad(logits, leaf, (pull / scale).to(logits.dtype))
    return [slope[row, -len(part) :] for row, part in enumerate(parts)], scale.flatten().tolist()
