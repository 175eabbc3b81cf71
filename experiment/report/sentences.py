"""What was found, in a few sentences of plain words, from the figures in results.json. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiment.masks import EFFECT
from experiment.records.entries import Agreement, Entry, Estimate, Excess, MaskedEntry, UnmaskedEntry
from experiment.report.estimates import MASKS

FLOOR = 5  # percent: with an EM below it hardly an answer is left that a mask could cost
MANY = 5  # times K: a matched mask of more latents than this is of another kind
OTHER_QUESTIONS = {"other": "another question on the same context", "other-context": "a question on another context"}
CONTROLS = ("direction", "matched")  # the fairer one first


def tell_finding(entries: Iterable[Entry]) -> str:
    """What masking the latents that fire most costs, and its control; how many of those that matter most are among
    them; and where another K would tell more.

    entries: of one folder.  Of the baseline's TopK at K = 50% where that is there, else of what is nearest to it; empty
    where nothing was masked, or no unmasked answers are known.
    """
    entries = list(entries)
    masked = [entry for entry in entries if isinstance(entry, MaskedEntry)]
    told = [entry for entry in masked if _is_of_latents(entry) and entry.drop is not None]
    if not told:
        return ""
    first = min(told, key=_order)
    agreement = _find_agreement(first, entries)
    sentences = [_tell_cost(first, masked)]
    if agreement is not None:
        sentences.append(_tell_agreement(first, agreement, told))
    sentences.append(_tell_other_ks(first, told))
    return " ".join(sentence for sentence in sentences if sentence)


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
    own = (entry.excess or {}).get("own")
    if own is not None:
        return f"{cost}; the difference from masking a question's own is {_write_excess(own)}."
    advice = "with --control direction the same command says what any change of this size costs"
    return f"{cost}. No control was run: {advice}."


def _tell_excess(name: str, cost: float | None, excess: Excess) -> str:
    """How a mask's cost compares with its control's: the end of a sentence.

    name: the control's.  cost: in points of EM.
    """
    points = f"{cost:z.1f}"
    difference = _write_excess(excess)
    interval = excess.intervals.get("em")
    if interval is None:
        return f"; {name} {points}; the difference is {difference}."
    low, high = interval
    if high < 0:
        return f", less than {name}: {points}, a difference of {difference}."
    if low <= 0:
        return f"; {name} {points}; the difference, {difference}, may be nothing."
    return f"; {name} {points}; the difference is {difference}."


def _find_control(name: str, entry: MaskedEntry, masked: Iterable[MaskedEntry]) -> MaskedEntry | None:
    """The entry of the control of this name: of the same ranking, or a ranking of its own."""
    ranking = entry.provenance.ranking
    for other in masked:
        if not _is_alike(other, entry) or other.keep_only:
            continue
        is_control = other.control == name and other.provenance.ranking == ranking
        is_ranking = other.control is None and other.provenance.ranking == name
        if is_control or is_ranking:
            return other
    return None


def _is_alike(one: MaskedEntry, other: MaskedEntry) -> bool:
    """Whether both are of the same mask and K, set to the same."""
    is_same_mask = one.masked == other.masked and one.k == other.k
    return is_same_mask and one.provenance.ablation == other.provenance.ablation


# ---------------------------------------------------------------------------------------------------------------------
# Do they matter?


def _find_agreement(first: MaskedEntry, entries: Iterable[Entry]) -> Agreement | None:
    """How many of the latents that matter most are in a TopK; None where that is not known, and of the ranking by what
    matters itself."""
    ranking = first.provenance.ranking
    if first.masked != "topk" or ranking == EFFECT:
        return None
    for entry in entries:
        if not isinstance(entry, UnmaskedEntry) or entry.provenance.ranking != ranking or entry.agreement is None:
            continue
        if entry.population == first.population and entry.agreement.found.mean is not None:
            return entry.agreement
    return None


def _tell_agreement(first: MaskedEntry, agreement: Agreement, told: Iterable[MaskedEntry]) -> str:
    """How many of the latents that matter most are among those of `first`, and what masking these costs."""
    found = agreement.found
    if first.k == agreement.k:
        those_that_matter = f"Of {_count(first)} {_name(first)} that {_agree(first, 'matter')} most"
        these = "them"
    else:
        those_that_matter = f"At K = {agreement.k}, of the latents that matter most"
        is_baseline = first.provenance.ranking == "baseline"
        these = "those that fire most" if is_baseline else "those that it ranks highest"
    share = _write_estimate(found, ".0%")
    text = f"{those_that_matter}, measured one by one, {share} are among {these}"
    if agreement.spearman.mean is not None:
        correlation = _write_estimate(agreement.spearman, "z.2f")
        text += f" (rank correlation {correlation})"
    if found.n != first.n:
        text += f", on {found.n} of the {first.n} questions"
    for entry in told:
        if entry.provenance.ranking != EFFECT or entry.drop is None:
            continue
        if _is_alike(entry, first) and entry.population == first.population:
            masked = f"{_count(entry)} that {_agree(entry, 'matter')} most"
            interval = _write_interval(entry.drop.intervals.get("em"))
            text += f"; masking {masked} costs {entry.drop.em:z.1f}{interval}"
    return f"{text}."


# ---------------------------------------------------------------------------------------------------------------------
# Names and figures


def _name_latents(entry: MaskedEntry) -> str:
    """ "the 6.2 latents that fire most (on average per question)" """
    ranking = entry.provenance.ranking
    is_top = entry.masked == "topk"
    average = "" if _is_exact(entry) else " (on average per question)"
    if ranking == "baseline":
        what = f"{_agree(entry, 'fire')} {'most' if is_top else 'least'}"
    elif ranking == EFFECT:
        what = f"{_agree(entry, 'matter')} {'most' if is_top else 'least'}, measured one by one"
    else:
        who = OTHER_QUESTIONS.get(ranking or "", ranking)
        what = f"{who} ranks {'highest' if is_top else 'lowest'}"
    return f"{_count(entry)} {_name(entry)} that {what}{average}"


def _is_exact(entry: MaskedEntry) -> bool:
    """Whether a K is the same number of latents for every question."""
    return entry.k == f"{entry.mean_k:g}"


def _count(entry: MaskedEntry) -> str:
    """ "the 6.2", "the 10", "the one" """
    if entry.mean_k == 1:
        return "the one"
    return f"the {entry.k}" if _is_exact(entry) else f"the {entry.mean_k:.1f}"


def _name(entry: MaskedEntry) -> str:
    """One latent, or several."""
    return "latent" if entry.mean_k == 1 else "latents"


def _agree(entry: MaskedEntry, verb: str) -> str:
    """The verb for one latent, or for several."""
    return f"{verb}s" if entry.mean_k == 1 else verb


def _name_control(name: str, entry: MaskedEntry, control: MaskedEntry) -> str:
    if name == "direction":
        return "taking away as much in a random direction"
    count = f"{control.mean_k:.1f} of them"
    if control.mean_k > MANY * entry.mean_k:
        count += f", more than {MANY} times as many"
    return f"active latents drawn at random that take away as much ({count})"


def _tell_other_ks(first: MaskedEntry, told: Iterable[MaskedEntry]) -> str:
    """A sentence on the K of `first`, where smaller or larger ones would tell more; an empty text elsewhere."""
    at_floor: dict[str, None] = {}  # rankings
    for entry in told:
        if entry.masked != first.masked or entry.k != first.k or entry.em is None:
            continue
        if entry.em < FLOOR:
            at_floor[entry.provenance.ranking or ""] = None
    if at_floor:
        names = ", ".join(at_floor)
        return f"At K = {first.k} hardly an answer is left ({names}: EM under {FLOOR}%): smaller K tell more."
    interval = first.drop.intervals.get("em") if first.drop is not None else None
    if first.masked == "topk" and interval is not None and interval[0] <= 0:
        name = MASKS[first.masked]
        return f"At K = {first.k} what {name} costs may be nothing: more questions, or larger K, tell more."
    return ""


def _write_excess(excess: Excess) -> str:
    """In points of EM."""
    return f"{excess.em:z.1f}{_write_interval(excess.intervals.get('em'))}"


def _write_estimate(estimate: Estimate, form: str) -> str:
    """Its mean and its interval. form: of each, as in an f-string."""
    text = format(estimate.mean, form)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{format(estimate.low, form)}, {format(estimate.high, form)}]"


def _write_interval(interval: Sequence[float] | None) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f" [{low:z.1f}, {high:z.1f}]"
