"""Prompts as tokens, and places in what was generated. Knows nothing of models."""

import os
import re
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from experiment import UserError

BRACKETS = re.compile(r"\[\s*(.*?)\s*\]")  # on one line


def read_template(path: str, named: list[str]) -> str:
    """A prompt template from a text file, which holds each of the two fields once. named: what --prompt-template may be
    besides."""
    given = f"--prompt-template {path}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # a BOM, as Windows writes it, is no text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{given}: neither {', '.join(named)} nor a text file ({error})") from None
    for field in ("{context}", "{question}"):
        if text.count(field) != 1:
            raise UserError(f"{given}: must hold {field} exactly once")
    return text


def build_prompt(template: str, context: str, question: str) -> str:
    """The prompt's text, BOS not included. Only the two fields are filled in: other braces stay as they are."""
    fields = {"{context}": context, "{question}": question}
    parts = re.split(r"(\{context\}|\{question\})", template)
    return "".join(fields.get(part, part) for part in parts)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt. BOS stands before it where the tokenizer puts it there by itself, and the text does not
    begin with it already."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos] or not _adds_bos(tokenizer):
        return ids
    return [bos, *ids]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts its BOS before a text, as Gemma's and Llama's do; SmolLM2's has one and does not."""
    return tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def find_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of BOS, padding, turn markers and the like, ascending."""
    ids = set(tokenizer.all_special_ids)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            ids.add(token_id)
    return sorted(ids)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """What tokens say to a reader: special ones are no text."""
    return cast(str, tokenizer.decode(tokens, skip_special_tokens=True))  # a list is of several sequences


def find_bracket(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> int | None:
    """The place of the last generated token whose text contains [, or None. Latents are ranked just before it.

    An end token such as [EOS] is no text.
    """
    for place in reversed(range(len(tokens))):
        if "[" in decode(tokenizer, [tokens[place]]):
            return place
    return None


def find_answer(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    """The places of the generated tokens that write the answer inside the brackets; none where nothing stands there.

    A character may be written by several tokens: then all of them count.
    """
    text = decode(tokenizer, tokens)
    match = BRACKETS.search(text)
    if not match:
        return []
    inner = match[1].lstrip("[]= ")  # of [[ Oslo ]] the match holds a bracket too
    start = match.end(1) - len(inner)
    end = start + len(inner.rstrip("[]= "))
    if start == end:
        return []
    # How much of the text the first n tokens have written for sure. Inside a character they decode to a replacement
    # character, which is not in the text; their lengths would count it.
    written = []
    for n in range(len(tokens) + 1):
        common = os.path.commonprefix([decode(tokenizer, tokens[:n]), text])
        written.append(len(common))
    special = set(find_special_ids(tokenizer))
    places = []
    for place, token in enumerate(tokens):
        # A token that leaves its character unfinished has written a part of the next one.
        reaches = max(written[place + 1], written[place] + 1)
        if token not in special and written[place] < end and reaches > start:
            places.append(place)
    return places
