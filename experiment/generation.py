"""Batched greedy answers with the SAE spliced in, latents masked or not. Knows nothing of files or questions."""

import contextlib
import os

import torch
from transformers import DynamicCache, StoppingCriteria

from experiment import UserError

# Positions whose latents are held at once: 0.5 GB a tensor for a 131k-wide SAE in float32. On the CPU the demo's fit
# into the cache then, and the SAE takes two thirds of the time that it takes on a whole batch.
POSITIONS_AT_ONCE = 1024


def plan_batches(lengths, batch_tokens, contexts=None):
    """Groups of indices into `lengths` (tokens a prompt), longest first, each within the budget, padding included.

    contexts: for each prompt a key; prompts with the same one stay together, so that what they share is run once.
    A prompt longer than the budget gets a batch of its own. The plan depends on nothing but its arguments.
    """
    contexts = range(len(lengths)) if contexts is None else contexts
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


def inputs(sae, residual):
    """What the SAE reads at each position: residual [pos, d_model], or at `hook_z` [pos, head, d_head], in its dtype.

    Some SAEs for `hook_z` say in their configuration that they put the heads side by side themselves; Gemma Scope 2's
    do not.
    """
    residual = residual.to(sae.device, sae.dtype)
    return residual if sae.cfg.reshape_activations == "hook_z" else residual.flatten(1)


def splice(sae, masked=None, seen=None, bypass=()):
    """A function of a residual stream [batch, pos, d_model] and its token ids [batch, pos]: the SAE's reconstruction.

    masked: one list of latent ids a batch row, zeroed before decoding, or None.  No error term is added back.
    seen: a list that gets the residual stream of every forward pass as it was, or None.
    bypass: ids of tokens at whose positions the residual stream stays as it is.
    The SAE computes in its own dtype; the residual keeps its own.
    """
    device = sae.device
    if masked is not None:
        mask = torch.zeros(len(masked), sae.cfg.d_sae, dtype=torch.bool, device=device)  # [batch, d_sae]
        for row, latents in enumerate(masked):
            mask[row, latents] = True

    def reconstruct(residual, ids):
        if seen is not None:
            seen.append(residual)
        batch, pos = ids.shape
        rows = torch.arange(batch, device=device).repeat_interleave(pos)
        out = []
        for chunk, chunk_rows in zip(residual.flatten(0, 1).split(POSITIONS_AT_ONCE), rows.split(POSITIONS_AT_ONCE)):
            acts = sae.encode(inputs(sae, chunk))  # [chunk, d_sae]
            if masked is not None:
                acts = acts.masked_fill(mask[chunk_rows], 0)
            out.append(sae.decode(acts).to(residual).view_as(chunk))
        out = torch.cat(out).view_as(residual)
        if bypass:
            kept = torch.isin(ids, torch.tensor(bypass, device=ids.device)).to(out.device)
            out = torch.where(kept.view(batch, pos, *[1] * (out.dim() - 2)), residual, out)
        return out

    return reconstruct


@contextlib.contextmanager
def spliced(model, sae, replace):
    """The Transformers model with `replace` (as `splice` gives it) at the SAE's place; with sae None, as it is.

    TransformerLens' wrappers around every module compute what nobody hooks here. They are set aside meanwhile: a
    forward pass of the demo is a tenth faster without them, and the same bit for bit.
    """
    # Here, for it takes seconds, and what is wrong with a data set should show before.
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    lm, place = model.original_model, None if sae is None else sae.cfg.metadata.hook_name
    point = None if sae is None else model.hook_dict[place]
    wrapped = [
        (parent, name, child)
        for parent in lm.modules()
        if not isinstance(parent, GeneralizedComponent)
        for name, child in parent.named_children()
        if isinstance(child, GeneralizedComponent) and not any(point is part for part in child.children())
    ]
    token_ids = []  # of the forward pass under way

    def remember(module, arguments):
        token_ids[:] = arguments

    def hook(residual, hook):
        return replace(residual, token_ids[0])

    with model.hooks(fwd_hooks=[] if sae is None else [(place, hook)]):  # while it still finds the place by its name
        try:
            for parent, name, child in wrapped:
                setattr(parent, name, child.original_component)
            with lm.get_input_embeddings().register_forward_pre_hook(remember):
                yield lm
        finally:
            for parent, name, child in wrapped:
                setattr(parent, name, child)


class FiniteLogits:
    """A logits processor that changes nothing and remembers whether any logit was NaN or infinite.

    What goes wrong below, in the model or the SAE, arrives here as NaN. Looked at once a batch: asking at every token
    would make the device wait.
    """

    def __init__(self, device):
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, input_ids, scores):
        self.finite &= scores.isfinite().all()
        return scores

    def check(self):
        if not self.finite:
            raise UserError(
                "the model's logits are not finite: float16 overflows in some models; try --dtype bfloat16 "
                "(or float32; and the same for --sae-dtype)"
            )


class AllButFewEnded(StoppingCriteria):
    """Ends a batch's generation once at most `few` of its rows still go on. Decided on the device, without waiting."""

    def __init__(self, few, end_ids, device):
        self.few, self.end_ids, self.ended = few, torch.tensor(end_ids, device=device), False

    def __call__(self, input_ids, scores, **_):
        self.ended = self.ended | torch.isin(input_ids[:, -1], self.end_ids)  # [batch]
        return ((~self.ended).sum() <= self.few).expand(len(input_ids))


def pad_left(sequences, pad_id, device):
    """Token ids and attention mask [batch, pos]: every row's next token stands at the same place."""
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = torch.tensor(sequence)
        mask[row, length - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def positions_of(mask):
    """Each token's place in its own sequence, [batch, pos], of a left-padded attention mask."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def shared_prefixes(prompts, contexts):
    """What the prompts of each context begin with, cut so that about as much is left of all of them.

    Returns the prefixes, lists of token ids, and for each prompt the index of its own; or None where none is shared.
    """
    rows = {}
    for row, key in enumerate(contexts):
        rows.setdefault(key, []).append(row)
    groups = [[prompts[row] for row in members] for members in rows.values()]
    suffixes = [max(map(len, group)) - len(os.path.commonprefix(group)) for group in groups if len(group) > 1]
    if not suffixes:
        return None
    prefixes, owner = [], {}
    for number, (members, group) in enumerate(zip(rows.values(), groups)):
        # At least one token is left to go on from.
        length = max(1, min(max(map(len, group)) - max(suffixes), min(map(len, group)) - 1))
        prefixes.append(group[0][:length])
        owner |= dict.fromkeys(members, number)
    return prefixes, [owner[row] for row in range(len(prompts))]


@torch.inference_mode()
def answer(model, sae, prompts, max_new_tokens, masked=None, *, bypass=(), contexts=None, keep_residuals=False, few=0):
    """Greedy continuations of tokenised prompts, the SAE spliced in on every forward pass; with sae None, without.

    prompts: lists of token ids.  masked, bypass: as in `splice`.  What ends a turn stands in the generation config.
    contexts: for each prompt a key, or None: what prompts with the same key begin with is run once. Not with masks:
    above the SAE's layer they make prefixes differ.
    few: how many answers may be left unfinished: a batch lasts as long as its longest answer.
    Returns what each prompt generated, ids up to and including the one that ended it; and, with keep_residuals, the
    residual stream at the SAE's hook for each, [pos, d_model], over the prompt and at least all but the last of these.
    """
    lm = model.original_model
    pad_id, end_ids, device = lm.generation_config.pad_token_id, lm.generation_config.eos_token_id, lm.device
    width = max(map(len, prompts))
    # In a prefix cache padding stands in the middle. Positions and masks allow for it, a sliding window would not.
    window = getattr(lm.config.get_text_config(), "sliding_window", None) or width + max_new_tokens
    shared = None
    if contexts is not None and masked is None and width + max_new_tokens <= window:
        shared = shared_prefixes(prompts, contexts)
    seen, logits = [] if keep_residuals else None, FiniteLogits(device)
    with spliced(model, sae, None if sae is None else splice(sae, masked, seen, bypass)):
        if shared is None:
            cache, suffixes = None, prompts
            ids, mask = pad_left(prompts, pad_id, device)
        else:
            prefixes, owner = shared
            suffixes = [prompt[len(prefixes[number]) :] for prompt, number in zip(prompts, owner)]
            cache, ids, mask = run_prefixes(lm, prefixes, owner, suffixes, pad_id, device)
        generated = lm.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            logits_processor=[logits],
            stopping_criteria=[AllButFewEnded(few, end_ids, device)],
        )[:, ids.shape[1] :]
    logits.check()
    outputs = [_until_end(row, end_ids) for row in generated.tolist()]
    if not keep_residuals:
        return outputs, None
    prefix = None if shared is None else seen.pop(0)  # [context, pos, d_model]
    prompt, steps = seen[0], seen[1:]  # [batch, pos, d_model], [batch, 1, d_model] each
    residuals = []
    for row, suffix in enumerate(suffixes):
        parts = [prompt[row, prompt.shape[1] - len(suffix) :], *(step[row] for step in steps)]
        if prefix is not None:
            parts.insert(0, prefix[owner[row], prefix.shape[1] - len(prefixes[owner[row]]) :])
        residuals.append(torch.cat(parts))
    return outputs, residuals


def run_prefixes(lm, prefixes, owner, suffixes, pad_id, device):
    """Runs each prefix once, and sets up each prompt's generation behind its own: cache, ids and attention mask."""
    ids, mask = pad_left(prefixes, pad_id, device)
    cache = DynamicCache(config=lm.config)
    lm(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache, logits_to_keep=1)
    rows = torch.tensor(owner)  # on the CPU: the cache's layers may be on several devices
    cache.batch_select_indices(rows)
    suffix_ids, suffix_mask = pad_left(suffixes, pad_id, device)
    return cache, torch.cat([ids[rows], suffix_ids], 1), torch.cat([mask[rows], suffix_mask], 1)


def _until_end(ids, end_ids):
    for position, token in enumerate(ids):
        if token in end_ids:
            return ids[: position + 1]
    return ids
