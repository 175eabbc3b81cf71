"""What the words on the page mean: a line each, of the rankings, controls and differences that its folder has."""

from __future__ import annotations

from collections.abc import Sequence

from experiment.records.entries import Entry, MaskedEntry
from experiment.report import blocks

GENERAL = {
    "kept": "answered right without a mask, by an F1 of at least 90%. All drops are over kept questions.",
    "EM": "exact match: the share of answers that are a ground truth. F1: the words that an answer shares with it.",
    "named": "a ground truth stands somewhere in the text, in the asked format or not.",
    "answer drop": "how much less likely the unmasked answer's own tokens inside the brackets became: what their log "
    "probability lost, in nats per token.",
    "format drop": "the same of the tokens around the brackets.",
    "TopK, BottomK": "the K latents of a question that a ranking puts highest, lowest.",
    "K = 50%": "half of the latents active at a question's last position; in brackets their mean number.",
    "error term": "what the SAE does not reconstruct. Dropped: its reconstruction alone stands in the model; kept: "
    "masking takes away only what the masked latents wrote.",
    "removed": "how much was taken away: the norm of what the masked latents wrote, in percent of the norm of all that "
    "stands at the position; the mean over positions.",
}
NOTHING = {"K = 0": "masked in the same way, but no latent: what the way alone changes."}
NAMED_QUESTIONS = {
    "questions, with six letters or digits": "the set of questions that a table is of, by a hash of their ids.",
}
RANKINGS = {
    "baseline": "latents by mean activation over all positions.",
    "gradsae": "the paper's (GradSAE, arXiv 2505.08080): by activation times the gradient of the probability of the "
    "[ token, where that is positive.",
    "gradsae-answer": "by activation times the gradient of the probability of the answer's first token inside the "
    "brackets, where that is positive.",
    "attribution": "by activation times the gradient of the answer's log probability: an estimate of effect. "
    "Its lowest latents are those it takes to speak against the answer.",
    "effect": "by what masking the latent alone costs the answer's log probability, measured.",
    "matched": "a control: active latents drawn at random, none of those that the baseline masks at K = 50%, as many "
    "as it takes to remove no less of the norm; that may be many more than K.",
    "random": "a control: K active latents drawn at random; they remove less.",
    "other": "a control: the baseline's latents of another question on the same context.",
    "other-context": "a control: the baseline's latents of a question on another context.",
}
CONTROLS = {
    "direction": {
        "in a random direction": "a ranking's control, what the size alone costs: at every position as much is taken "
        "away as its masked latents write there, with the same part along what stands there; the rest points in a "
        "random direction."
    },
}
DIFFERENCES = {"direction": "difference", "matched": "beyond matched", "own": "beyond its own latents"}
COMPARED = {
    "direction": "what masking a ranking's latents costs more than its control, each question compared with itself. "
    "Where its interval holds 0, the latents may matter no more than their size.",
    "matched": "what masking the baseline's latents costs more than masking matched does, on the same questions.",
    "own": "what masking another question's latents costs more than masking the question's own.",
}
KEPT_ALONE = {
    "all but TopK": "everything but a ranking's TopK is masked: is TopK enough?",
    "faithfulness": "the share of the answer's log probability that keeping TopK alone gives back, of what is lost "
    "where nothing is kept. 1: TopK is enough.",
    "completeness": "the same share with TopK masked, and nothing else. 0: nothing else would do.",
}


def list_words(entries: Sequence[Entry]) -> dict[str, str]:
    """{word: what it means}"""
    masked = [entry for entry in entries if isinstance(entry, MaskedEntry)]
    rankings = {entry.provenance.ranking for entry in masked}
    words = dict(GENERAL)
    if any(entry.masks_nothing for entry in masked):
        words.update(NOTHING)
    if any(setting.has_nameless_questions for setting in blocks.split_settings(entries)):
        words.update(NAMED_QUESTIONS)
    words.update((name, text) for name, text in RANKINGS.items() if name in rankings)
    words.update(list_comparisons(masked))
    if any(entry.keep_only for entry in masked):
        words.update(KEPT_ALONE)
    return words


def list_comparisons(masked: Sequence[MaskedEntry]) -> dict[str, str]:
    """The words of what rankings are compared with."""
    words: dict[str, str] = {}
    compared: set[str] = set()
    for entry in masked:
        words.update(CONTROLS.get(entry.control or "", {}))
        compared.update(entry.excess or {})
    for control, name in DIFFERENCES.items():
        if control in compared:
            words[name] = COMPARED[control]
    return words
