"""Batched greedy answers with the SAE spliced in, latents masked or not. Knows nothing of files or questions."""

import torch

from experiment.latents import positions_at_once


def plan_batches(lengths, batch_tokens):
    """Groups of indices into `lengths` (tokens a prompt), longest first, each within the budget, padding included.

    A prompt longer than the budget gets a batch of its own. The plan depends on nothing but its arguments.
    """
    batches = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # Longest first, so the first of a batch sets the padded length of all.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def splice(sae, masked=None):
    """A forward hook that puts the SAE's reconstruction in place of the residual stream, at every position.

    masked: one list of latent ids a batch row, zeroed before decoding, or None.  No error term is added back.
    The SAE computes in its own dtype; the residual keeps its own.
    """
    if masked is not None:
        mask = torch.zeros(len(masked), sae.cfg.d_sae, dtype=torch.bool, device=sae.W_enc.device)  # [batch, d_sae]
        for row, latents in enumerate(masked):
            mask[row, latents] = True

    def hook(residual, hook):  # [batch, pos, d_model]
        batch, pos, _ = residual.shape
        flat = residual.flatten(0, 1).to(sae.dtype)
        rows = torch.arange(batch, device=flat.device).repeat_interleave(pos)
        out = []
        for chunk, chunk_rows in zip(flat.split(positions_at_once(sae)), rows.split(positions_at_once(sae))):
            acts = sae.encode(chunk)  # [chunk, d_sae]
            if masked is not None:
                acts = acts.masked_fill(mask[chunk_rows], 0)
            out.append(sae.decode(acts))
        return torch.cat(out).view_as(residual).to(residual.dtype)

    return hook


@torch.inference_mode()
def answer(model, sae, prompts, max_new_tokens, masked=None):
    """Greedy continuations of tokenised prompts, the SAE spliced in on every forward pass.

    prompts: lists of token ids.  Returns what each generated, as ids, up to and including the token that ended it.
    masked: as in `splice`.  The ids that end a turn come from the model's generation config.
    """
    config = model.original_model.generation_config
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), config.pad_token_id, device=sae.W_enc.device)
    attention_mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left: every row's next token stands at the same place
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, length - len(prompt) :] = 1
    with model.hooks(fwd_hooks=[(sae.cfg.metadata.hook_name, splice(sae, masked))]):
        generated = model.original_model.generate(
            input_ids=ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens
        )
    return [_until_end(row, config.eos_token_id) for row in generated[:, length:].tolist()]


def _until_end(ids, end_ids):
    for position, token in enumerate(ids):
        if token in end_ids:
            return ids[: position + 1]
    return ids
