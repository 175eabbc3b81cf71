"""What the words on the page mean: a line each, of the rankings and controls that its folder has."""

from __future__ import annotations

from collections.abc import Sequence

from experiment.records.entries import Entry, MaskedEntry

GENERAL = {
    "kept": "answered right without a mask, by an F1 of at least 90%. All drops are over kept questions.",
    "EM": "the share of answers that are a ground truth; F1: the words that an answer shares with it.",
    "named": "a ground truth stands somewhere in the text, in the asked format or not.",
    "answer drop": "how much less likely the unmasked answer's own tokens inside the brackets became.",
    "format drop": "the same of the tokens around the brackets.",
    "questions and six signs": "the set of questions that a table is of, by a hash of their ids.",
    "TopK, BottomK": "the K latents of a question that a ranking puts highest, lowest.",
    "K = 50%": "half of the latents active at a question's last position; in brackets their mean number.",
    "error term": "what the SAE does not reconstruct. Dropped: its reconstruction alone stands in the model; kept: "
    "masking takes away only what the masked latents wrote.",
    "removed": "the norm of what the masked latents wrote, in percent of the position's own, the mean over positions.",
}
RANKINGS = {
    "baseline": "latents by mean activation over all positions.",
    "gradsae": "by activation times the gradient of the probability of the [ token, where that is positive.",
    "gradsae-answer": "the same, of the answer's first token inside the brackets.",
    "attribution": "by activation times the gradient of the answer's log probability: an estimate of effect. "
    "Its lowest latents are those it takes to speak against the answer.",
    "effect": "by what masking the latent alone costs the answer's log probability, measured.",
    "matched": "a control: active latents drawn at random, none of the baseline's, as many as it takes to "
    "remove no less of the norm; that may be many more than K.",
    "random": "a control: K active latents drawn at random; they remove less.",
    "other": "a control: the baseline's latents of another question on the same context.",
    "other-context": "a control: the baseline's latents of a question on another context.",
}
CONTROLS = {
    "direction": "the control of a ranking: at every position as much is taken away as its masked latents write there, "
    "with the same part along what stands there; the rest points in a random direction.",
}
KEPT_ALONE = {
    "all but TopK": "everything but a ranking's TopK is masked: is TopK enough?",
    "faithfulness": "the share of the answer's log probability that keeping TopK alone gives back, of what is lost "
    "where nothing is kept.",
    "completeness": "the same share with TopK masked, and nothing else.",
}


def list_words(entries: Sequence[Entry]) -> dict[str, str]:
    """{word: what it means}"""
    masked = [entry for entry in entries if isinstance(entry, MaskedEntry)]
    rankings = {entry.provenance.ranking for entry in masked}
    controls = {entry.control for entry in masked}
    words = dict(GENERAL)
    words.update((name, text) for name, text in RANKINGS.items() if name in rankings)
    words.update((name, text) for name, text in CONTROLS.items() if name in controls)
    if any(entry.keep_only for entry in masked):
        words.update(KEPT_ALONE)
    return words
