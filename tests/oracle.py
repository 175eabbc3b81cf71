"""The experiment to the letter, as naive as it can be: one question at a time, no cache, the whole sequence again for
every token, Python sorting. It shares no code with the project; the tests hold the project against it."""

import re
import string

import torch

PROMPT = (
    "<start_of_turn>user\nAnswer the following question based on the context.\nContext:\n{context}\n\n"
    "Question:\n{question}\n\n"
    'Please organize your final answer in this format: "Result = [[ label ]]"\n'
)


def encode_prompt(tokenizer, context, question, prompt=PROMPT):
    text = prompt.replace("{question}", question).replace("{context}", context)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer.encode(text, add_special_tokens=False)


def read(sae, residual):
    """A hook's activations, a vector a position: the heads of hook_z side by side, where the SAE does not do it."""
    residual = residual.to(sae.dtype)
    return residual if sae.cfg.reshape_activations == "hook_z" else residual.reshape(*residual.shape[:2], -1)


def generate(
    model, sae, tokenizer, prompt, masked=(), max_new_tokens=50, end_of_turn="<end_of_turn>", means=None, error=False
):
    """Token ids generated greedily after `prompt` (ids), with the latents in `masked` zeroed at every position, or set
    to their means. error: what the SAE does not explain is added again."""
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end_of_turn)}
    masked = list(masked)

    def replace_residual(residual, hook):
        acts = sae.encode(read(sae, residual)).clone()
        acts[:, :, masked] = 0 if means is None else means[masked]
        decoded = sae.decode(acts)
        if error:
            decoded = decoded + read(sae, residual) - sae.decode(sae.encode(read(sae, residual)))
        return decoded.to(residual.dtype).reshape(residual.shape)

    generated = []
    with torch.no_grad(), model.hooks(fwd_hooks=[(sae.cfg.metadata.hook_name, replace_residual)]):
        while len(generated) < max_new_tokens and not (generated and generated[-1] in ends):
            logits = model(torch.tensor([prompt + generated]))
            generated.append(int(logits[0, -1].argmax()))
    return generated


def activations(model, sae, sequence):
    """Of every latent at every position of the sequence, [pos, d_sae]."""
    seen = []

    def keep_residual(residual, hook):
        seen.append(residual.clone())

    with torch.no_grad(), model.hooks(fwd_hooks=[(sae.cfg.metadata.hook_name, keep_residual)]):
        model(torch.tensor([sequence]))
        return sae.encode(read(sae, seen[0]))[0]


def score_latents(model, sae, sequence):
    """The mean activation of every latent over the sequence, and the latents that are not zero at its last position."""
    acts = activations(model, sae, sequence)
    active = [c for c, value in enumerate(acts[-1].tolist()) if value != 0]
    return acts.mean(dim=0).tolist(), active


def gradient_scores(model, sae, sequence, next_id):
    """GradSAE's score of every latent: plain autograd of P(next_id) through everything, over the whole sequence."""
    kept = []

    def replace_residual(residual, hook):
        acts = sae.encode(read(sae, residual).detach()).detach().requires_grad_()
        kept.append(acts)
        return sae.decode(acts).to(residual.dtype).reshape(residual.shape)

    with model.hooks(fwd_hooks=[(sae.cfg.metadata.hook_name, replace_residual)]):
        logits = model(torch.tensor([sequence]))
    # In double precision: 1 - P is lost in single where the model is sure.
    probability = torch.softmax(logits[0, -1].double(), dim=0)[next_id]
    probability.backward()
    return torch.relu(kept[0].grad * kept[0].detach())[0].mean(dim=0), float(probability.detach())


def rank_latents(model, sae, tokenizer, prompt, generated):
    """active, topk and bottomk of a question, and every score; None where no generated token has a [ in its text."""
    brackets = [i for i, token in enumerate(generated) if "[" in tokenizer.decode([token])]
    if not brackets:
        return None
    scores, active = score_latents(model, sae, prompt + generated[: brackets[-1]])
    k = len(active) // 2
    nonzero = [c for c in range(len(scores)) if scores[c] != 0]
    topk = sorted(nonzero, key=lambda c: (-scores[c], c))[:k]  # of equal scores the lower id first
    bottomk = sorted(nonzero, key=lambda c: (scores[c], c))[:k]
    return {"active": active, "topk": topk, "bottomk": bottomk, "scores": scores}


def removed_shares(sae, residual, latents, means=None):
    """What setting the first 1, 2, ... latents to zero (or to their means) takes away: at each position the norm of
    what they write there, latent by latent from the SAE's own decoding, over the position's norm; then the mean.

    residual: [pos, d_in], the positions that count.
    """
    nothing = sae.decode(torch.zeros(1, sae.cfg.d_sae))[0]
    totals = [0.0] * len(latents)
    for position in residual:
        acts = sae.encode(position[None])[0]
        taken = torch.zeros_like(position)
        for number, latent in enumerate(latents):
            alone = torch.zeros(1, sae.cfg.d_sae)
            alone[0, latent] = acts[latent] if means is None else acts[latent] - means[latent]
            taken = taken + sae.decode(alone)[0] - nothing
            totals[number] += float(taken.norm() / position.norm())
    return [total / max(1, len(residual)) for total in totals]


def parse(text):
    match = re.compile(r"\[\s*(.*?)\s*\]").search(text)
    answer = text if match is None else match.group(1)
    for character in "[]=":
        answer = answer.replace(character, "")
    return answer.strip()


def squad_f1(answer, truth):
    def words(text):
        for mark in string.punctuation:
            text = text.replace(mark, "")
        return [word for word in re.sub(r"\b(a|an|the)\b", " ", text.lower()).split()]

    left, right = words(answer), words(truth)
    common = 0
    for word in set(left):
        common += min(left.count(word), right.count(word))
    if common == 0:
        return 0.0
    precision, recall = common / len(left), common / len(right)
    return 2 * precision * recall / (precision + recall)
