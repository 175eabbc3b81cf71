"""Prompts as tokens, and places in what was generated. Knows nothing of models."""

import re

BRACKETS = re.compile(r"\[\s*(.*?)\s*\]")  # on one line


def build_prompt(template, context, question):
    """The prompt's text, BOS not included. Only the two fields are filled in: other braces stay as they are."""
    fields = {"{context}": context, "{question}": question}
    return re.sub(r"\{context\}|\{question\}", lambda match: fields[match[0]], template)


def tokenize(tokenizer, text):
    """Token ids of a prompt; BOS stands first exactly once, whether or not the text begins with it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def find_special_ids(tokenizer):
    """The ids of BOS, padding, turn markers and the like, ascending."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*tokenizer.all_special_ids, *added})


def find_bracket(tokenizer, tokens):
    """The place of the last generated token whose text contains [, or None. Latents are ranked just before it."""
    return next((i for i in reversed(range(len(tokens))) if "[" in tokenizer.decode([tokens[i]])), None)


def find_answer(tokenizer, tokens):
    """The places of the generated tokens that write the answer inside the brackets; none where nothing stands there."""
    texts = [tokenizer.decode(tokens[:n], skip_special_tokens=True) for n in range(len(tokens) + 1)]
    match = BRACKETS.search(texts[-1])
    inner = match[1].lstrip("[]= ") if match else ""  # of [[ Oslo ]] the match holds a bracket too
    start = match.end(1) - len(inner) if match else 0
    end = start + len(inner.rstrip("[]= "))
    return [n for n in range(len(tokens)) if len(texts[n]) < end and len(texts[n + 1]) > start]
