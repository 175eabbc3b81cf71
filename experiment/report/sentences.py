"""What was found, in a sentence of plain words, from the figures in results.json. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiment.records.entries import Entry, Excess, MaskedEntry
from experiment.report.estimates import MASKS

FLOOR = 5  # percent: with an EM below it hardly an answer is left that a mask could cost
MANY = 5  # times K: a matched mask of more latents than this is of another kind
OTHER_QUESTIONS = {"other": "another question on the same context", "other-context": "a question on another context"}
CONTROLS = ("direction", "matched")  # the fairer one first


def tell_finding(entries: Iterable[Entry]) -> str:
    """What masking the latents that fire most costs, what its control costs, and where another K would tell more.

    entries: of one folder.  Of the baseline's TopK at K = 50% where that is there, else of what is nearest to it; empty
    where nothing was masked, or no unmasked answers are known.
    """
    masked = [entry for entry in entries if isinstance(entry, MaskedEntry)]
    told = [entry for entry in masked if _is_of_latents(entry) and entry.drop is not None]
    if not told:
        return ""
    first = min(told, key=_order)
    sentences = [_tell_cost(first, masked), *_tell_other_ks(first, told)]
    return " ".join(sentences)


def _is_of_latents(entry: MaskedEntry) -> bool:
    """Whether an entry is of masks that take some latents away: no control, and no mask that keeps them."""
    return entry.k != "0" and entry.control is None and not entry.keep_only


def _order(entry: MaskedEntry) -> tuple:
    """What is told of comes first."""
    made = entry.provenance
    return (
        entry.masked != "topk",
        made.ranking != "baseline",
        made.ablation != "zero",
        entry.k != "50%",
        -entry.mean_k,
    )


def _tell_cost(entry: MaskedEntry, masked: Sequence[MaskedEntry]) -> str:
    """What an entry's mask costs, and what its control does."""
    assert entry.drop is not None  # tell_finding has seen to it
    interval = _write_interval(entry.drop.intervals.get("em"))
    cost = f"Masking {_name_latents(entry)} costs {entry.drop.em:z.1f} points of EM{interval}"
    for name in CONTROLS:
        control = _find_control(name, entry, masked)
        excess = (entry.excess or {}).get(name)
        if control is not None and control.drop is not None and excess is not None:
            return cost + _tell_excess(_name_control(name, entry, control), control.drop.em, excess)
    advice = "with --control direction the same command says how much of that the size of the hole alone costs"
    return f"{cost}. No control was run: {advice}."


def _tell_excess(name: str, cost: float | None, excess: Excess) -> str:
    """How a mask's cost compares with its control's: the end of a sentence.

    name: the control's.  cost: in points of EM.
    """
    interval = excess.intervals.get("em")
    difference = f"{excess.em:z.1f}{_write_interval(interval)}"
    if interval is None or interval[0] > 0:
        return f"; {name} {cost:z.1f}; the difference is {difference}."
    how = "less than" if interval[1] < 0 else "no more than"
    return f", {how} {name}: {cost:z.1f}, a difference of {difference}."


def _find_control(name: str, entry: MaskedEntry, masked: Iterable[MaskedEntry]) -> MaskedEntry | None:
    """The entry of the control of this name."""
    for other in masked:
        is_control = other.control == name and other.provenance.ranking == entry.provenance.ranking
        is_ranking = other.control is None and not other.keep_only and other.provenance.ranking == name
        is_alike = other.masked == entry.masked and other.k == entry.k
        if is_alike and other.provenance.ablation == entry.provenance.ablation and (is_control or is_ranking):
            return other
    return None


def _name_latents(entry: MaskedEntry) -> str:
    """ "the 6.2 latents that fire most" """
    ranking = entry.provenance.ranking
    is_one = entry.mean_k == 1
    count = "the one latent" if is_one else f"the {entry.mean_k:.1f} latents"
    if ranking == "baseline":
        fire = "fires" if is_one else "fire"
        return f"{count} that {fire} {'most' if entry.masked == 'topk' else 'least'}"
    who = OTHER_QUESTIONS.get(ranking or "", ranking)
    return f"{count} that {who} ranks {'highest' if entry.masked == 'topk' else 'lowest'}"


def _name_control(name: str, entry: MaskedEntry, control: MaskedEntry) -> str:
    if name == "direction":
        return "the same in a random direction"
    count = f"{control.mean_k:.1f} of them"
    if control.mean_k > MANY * entry.mean_k:
        count += f", more than {MANY} times as many"
    return f"active latents drawn at random that take away as much ({count})"


def _tell_other_ks(first: MaskedEntry, told: Iterable[MaskedEntry]) -> list[str]:
    """Sentences on the K of `first`, where smaller or larger ones would tell more."""
    at_floor = []
    for entry in told:
        is_alike = entry.masked == first.masked and entry.k == first.k
        if is_alike and entry.em is not None and entry.em < FLOOR:
            at_floor.append(str(entry.provenance.ranking))
    names = ", ".join(dict.fromkeys(at_floor))
    if names:
        return [f"At K = {first.k} hardly an answer is left ({names}: EM under {FLOOR}%): smaller K tell more."]
    interval = first.drop.intervals.get("em") if first.drop is not None else None
    if first.masked == "topk" and interval is not None and interval[0] <= 0:
        return [f"At K = {first.k} {MASKS[first.masked]} moves next to nothing: larger K may tell more."]
    return []


def _write_interval(interval: Sequence[float] | None) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f" [{low:z.1f}, {high:z.1f}]"
