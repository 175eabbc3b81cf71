"""Means with their intervals, statistics of latents, the table and the figure. Knows nothing of models."""

import array
import collections
import itertools
import math

import numpy as np

METRICS = ("em", "f1", "accuracy")
RESAMPLES = 10_000
LABELS = {"topk": "TopK", "bottomk": "BottomK"}

# EM / F1 in percent as published (GradSAE, arXiv 2505.08080; no n, no intervals), by model, SAE release and id, ranking
# and what is masked: K -> (EM, F1).
_GEMMA = ("gemma-2-9b-it", "gemma-scope-9b-it-res-canonical")
_LAYER_9, _LAYER_20, _LAYER_31 = ((*_GEMMA, f"layer_{layer}/width_131k/canonical") for layer in (9, 20, 31))
_LLAMA = ("Meta-Llama-3-8B-Instruct", "llama-3-8b-it-res-jh", "blocks.25.hook_resid_post")
_ALL_K = ("1", "10", "20", "30", "50%")
_SOME_K = ("1", "10", "50%")


def _by_k(ks, *figures):
    return dict(zip(ks, figures, strict=True))


PAPER = {
    (*_LAYER_9, "baseline", "topk"): _by_k(
        _ALL_K, (94.79, 97.04), (91.81, 94.46), (85.47, 88.49), (75.42, 79.62), (53.42, 58.46)
    ),
    (*_LAYER_9, "baseline", "bottomk"): _by_k(
        _ALL_K, (100, 100), (98.51, 99.93), (98.51, 99.93), (98.51, 99.93), (98.41, 99.84)
    ),
    (*_LAYER_9, "gradsae", "topk"): _by_k(
        _ALL_K, (80.45, 82.67), (51.21, 60.46), (39.48, 50.51), (37.80, 49.37), (30.58, 43.33)
    ),
    (*_LAYER_9, "gradsae", "bottomk"): _by_k(
        _ALL_K, (100, 100), (98.14, 99.68), (98.14, 99.68), (98.14, 99.68), (98.21, 99.66)
    ),
    (*_LAYER_20, "baseline", "topk"): {"50%": (73.83, 82.53)},
    (*_LAYER_20, "baseline", "bottomk"): {"50%": (96.14, 99.39)},
    (*_LAYER_20, "gradsae", "topk"): {"50%": (9.06, 38.35)},
    (*_LAYER_20, "gradsae", "bottomk"): {"50%": (96.81, 99.74)},
    (*_LAYER_31, "baseline", "topk"): {"50%": (69.52, 77.69)},
    (*_LAYER_31, "baseline", "bottomk"): {"50%": (96.73, 99.68)},
    (*_LAYER_31, "gradsae", "topk"): {"50%": (6.53, 17.38)},
    (*_LAYER_31, "gradsae", "bottomk"): {"50%": (96.73, 99.80)},
    (*_LLAMA, "baseline", "topk"): _by_k(_SOME_K, (88.57, 95.97), (80.02, 88.73), (65.71, 78.94)),
    (*_LLAMA, "baseline", "bottomk"): _by_k(_SOME_K, (100, 100), (97.14, 99.78), (97.14, 99.78)),
    (*_LLAMA, "gradsae", "topk"): _by_k(_SOME_K, (65.71, 79.24), (58.14, 72.98), (48.57, 60.99)),
    (*_LLAMA, "gradsae", "bottomk"): _by_k(_SOME_K, (100, 100), (97.14, 99.78), (97.14, 99.78)),
}


def published(run, masked, k):
    """The paper's (EM, F1) for a run's model, SAE and ranking, or None where it has none."""
    if run["dataset"] != "rajpurkar/squad" or run["split"] != "validation":
        return None
    model = run["model"].split("/")[-1]
    return PAPER.get((model, run["sae_release"], run["sae_id"], run["ranking"], masked), {}).get(k)


# ---------------------------------------------------------------------------------------------------------------------
# Means, intervals, tests


def bootstrap(columns, contexts, resamples=RESAMPLES, seed=0):
    """95% percentile intervals of the columns' means, [2, column], over resampled contexts.

    columns: [question, column].  contexts: a key for each question: those on one context are not independent, so
    contexts are drawn, with all their questions. All columns see the same draws (differences are paired).
    """
    columns = np.asarray(columns, dtype=float)
    _, group = np.unique(np.asarray(contexts), return_inverse=True)
    groups = group.max() + 1
    sums = np.zeros((groups, columns.shape[1]))
    np.add.at(sums, group, columns)
    sizes = np.bincount(group)
    rng = np.random.default_rng(seed)
    means, part = [], max(1, 1_000_000 // groups)  # in parts: [resamples, contexts] need not fit in memory
    for start in range(0, resamples, part):
        times = rng.multinomial(groups, np.full(groups, 1 / groups), size=min(part, resamples - start))
        means.append(times @ sums / (times @ sizes)[:, None])
    return np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)


def columns(records):
    """Scores of records (dicts with EM, F1 and accuracy from 0 to 1), one by one, as an array [question, metric]."""
    return np.fromiter((record[metric] for record in records for metric in METRICS), float).reshape(-1, len(METRICS))


def summarize(scores, contexts):
    """n, and EM, F1 and accuracy in percent with their intervals. scores: as `columns` gives them."""
    return {"n": len(scores)} | _estimates(scores, contexts)


def compare(clean, masked, contexts):
    """What masking does to the same questions: scores after it, drops from the unmasked ones, and McNemar's p for EM.

    clean, masked: the questions' scores as `columns` gives them, in the same order.
    """
    lost = int(((clean[:, 0] == 1) & (masked[:, 0] == 0)).sum())
    won = int(((clean[:, 0] == 0) & (masked[:, 0] == 1)).sum())
    return (
        summarize(masked, contexts)
        | {"clean": summarize(clean, contexts), "drop": _estimates(clean - masked, contexts)}
        | {"em_lost": lost, "em_won": won, "p": mcnemar(lost, won)}
    )


def _estimates(scores, contexts):
    if not len(scores):
        return dict.fromkeys(METRICS) | {"intervals": dict.fromkeys(METRICS)}
    low, high = 100 * bootstrap(scores, contexts)
    means = 100 * scores.mean(0)
    return dict(zip(METRICS, means.tolist())) | {"intervals": dict(zip(METRICS, np.stack([low, high], 1).tolist()))}


def mcnemar(lost, won):
    """The exact two-sided p of McNemar's test: `lost` answers turned wrong, `won` turned right."""
    n = lost + won
    tail = sum(math.comb(n, i) for i in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**n)


# ---------------------------------------------------------------------------------------------------------------------
# Latents


def shared_percent(a, b):
    """How many latents two lists have in common, in percent of their mean length (0 where both are empty)."""
    length = len(a) + len(b)
    return 200 * len(np.intersect1d(a, b)) / length if length else 0.0


def latent_statistics(samples, contexts):
    """The paper's table 3 of one ranking: latents active at the last position and K at 50%, means over questions; what
    TopK and BottomK of two questions on one context share, in percent of their mean length, pooled over all such
    pairs; and the 10 latents in most TopKs.

    samples: dicts with active, topk, bottomk, those on one context next to each other.  contexts: for each a key.
    """
    counts, active = collections.Counter(), array.array("q")
    shared, possible = dict.fromkeys(LABELS, 0), dict.fromkeys(LABELS, 0)
    for _, group in itertools.groupby(zip(contexts, samples), key=lambda pair: pair[0]):
        group = [sample for _, sample in group]
        for name in LABELS:
            # A latent that n lists have is shared by n (n - 1) / 2 pairs.
            _, times = np.unique(np.concatenate([sample[name] for sample in group]), return_counts=True)
            shared[name] += (times * (times - 1) / 2).sum()
            possible[name] += (len(group) - 1) * times.sum() / 2
        for sample in group:
            counts.update(sample["topk"])
            active.append(len(sample["active"]))
    return {
        "n": len(active),
        "active": _mean(active),
        "k_at_50%": _mean(number // 2 for number in active),
        "same_context_percent": {
            name: float(100 * shared[name] / possible[name]) if possible[name] else None for name in LABELS
        },
        "most_frequent_topk": [
            {"latent": latent, "questions": count}
            for latent, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]
        ],
    }


def ranking_overlap(samples, others):
    """What the TopKs and the BottomKs of two rankings share, in percent, over the questions that both have.

    samples: dicts with id, topk, bottomk, one by one.  others: a list of such.
    """
    places = {other["id"]: number for number, other in enumerate(others)}
    shared = {name: array.array("d") for name in LABELS}
    for sample in samples:
        if sample["id"] in places:
            other = others[places[sample["id"]]]
            for name, found in shared.items():
                found.append(shared_percent(sample[name], other[name]))
    return {"n": len(shared["topk"])} | {name: _mean(found) for name, found in shared.items()}


def describe(statistics, ranking):
    """`latent_statistics`, and what the other rankings share, as sentences."""
    if not statistics["n"]:
        return "No question was kept: there are no latents to describe."
    lines = [
        f"{statistics['active']:.2f} latents are active at the last position on average; K at 50% is "
        f"{statistics['k_at_50%']:.2f}."
    ]
    shared = statistics["same_context_percent"]
    if shared["topk"] is not None:
        lines.append(
            f"Two questions on one context share {shared['topk']:.2f}% of their TopK and {shared['bottomk']:.2f}% of "
            "their BottomK."
        )
    for other, shared in statistics["overlap"].items():
        if shared["n"]:
            lines.append(
                f"{ranking} and {other} share {shared['topk']:.2f}% of TopK and {shared['bottomk']:.2f}% of BottomK."
            )
    lines.append("In most questions' TopK:")
    for latent in statistics["most_frequent_topk"]:
        page = f"  {latent['neuronpedia']}" if latent["neuronpedia"] else ""
        lines.append(f"  latent {latent['latent']} in {100 * latent['questions'] / statistics['n']:.1f}%{page}")
    return "\n".join(lines)


def _mean(values):
    values = np.fromiter(values, float)
    return math.fsum(values) / len(values) if len(values) else None


# ---------------------------------------------------------------------------------------------------------------------
# Table and figure


def table(entries):
    """All that a folder of results holds, unmasked first, as text columns; intervals in brackets.

    entries: those of results.json.
    """
    head = ["ranking", "masked", "K", "n", "EM", "F1", "accuracy", "EM drop", "F1 drop", "p (EM)"]
    lines = []
    for entry in _in_order(entries):
        if entry["round"] == "no_splice":
            lines.append(["-", "none, no SAE", "-", *_figures(entry)])
        elif entry["round"] == "baseline" and entry["run"]["ranking"] == "baseline":
            lines += [
                ["-", "none, all asked", "-", *_figures(entry["all"])],
                ["-", "none, kept", "-", *_figures(entry)],
            ]
    masked = [entry for entry in _in_order(entries) if "masked" in entry]
    known = {line[3] for line in lines[1:]}
    for entry in masked:  # round 1 left no results here, or was asked about other questions
        clean = entry["clean"]
        if clean and str(clean["n"]) not in known:
            known.add(str(clean["n"]))
            lines.append(["-", "none, kept", "-", *_figures(clean)])
    for entry in masked:
        k = entry["k"] if entry["mean_k"] == int(entry["mean_k"]) else f"{entry['k']} (mean {entry['mean_k']:.1f})"
        line = [entry["run"]["ranking"], LABELS[entry["masked"]], k, *_figures(entry)]
        if entry["clean"]:
            line += [_figure(entry["drop"], metric) for metric in ("em", "f1")]
            line.append("< 1e-99" if entry["p"] < 1e-99 else f"{entry['p']:.2g}")
        if paper := published(entry["run"], entry["masked"], entry["k"]):
            line += [""] * (len(head) - len(line)) + ["{:.2f} / {:.2f}".format(*paper)]
        lines.append(line)
    if any(len(line) > len(head) for line in lines):
        head.append("paper EM / F1")
    lines = [head, *([*line, *[""] * (len(head) - len(line))] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join(rows)


def _figures(entry):
    return [str(entry["n"]), *(_figure(entry, metric) for metric in METRICS)]


def _figure(estimates, metric):
    if estimates[metric] is None:
        return "-"
    low, high = estimates["intervals"][metric]
    return f"{estimates[metric]:.2f} [{low:.1f}, {high:.1f}]"


def _in_order(entries):
    """Rankings as the paper has them, TopK before BottomK, K ascending."""
    rounds, rankings = ("no_splice", "baseline", "false", "true"), ("baseline", "gradsae", "random")
    return sorted(
        entries, key=lambda e: (rankings.index(e["run"]["ranking"]), rounds.index(e["round"]), e.get("mean_k", 0))
    )


def draw(file, entries):
    """The figure, as PNG: F1 and EM against K, a line for each ranking and mask, with intervals; unmasked dotted.

    As wide as a paper's column (3.3 inches), and told apart by markers and dashes, not by colour alone.
    """
    from matplotlib.figure import Figure  # here: it takes a second, and only the end of a round needs it

    masked = [entry for entry in _in_order(entries) if "masked" in entry]
    ks = [e["k"] for e in sorted(masked, key=lambda e: e["mean_k"])]
    ks = list(dict.fromkeys(ks))  # each once, at equal distances: 1 and 10 lie as far apart as 30 and 50%
    looks = {"baseline": ("o", "0.0"), "gradsae": ("s", "0.35"), "random": ("^", "0.6")}
    lines = sorted(
        dict.fromkeys((e["run"]["ranking"], e["masked"]) for e in masked), key=lambda line: line[1] != "topk"
    )
    figure = Figure(figsize=(3.3, 4.6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    for panel, metric in zip(panels, ("f1", "em")):
        for number, (ranking, which) in enumerate(lines):
            found = {e["k"]: e for e in masked if (e["run"]["ranking"], e["masked"]) == (ranking, which)}
            points = [k for k in ks if k in found]
            x = [ks.index(k) + 0.07 * (number - (len(lines) - 1) / 2) for k in points]
            y = [found[k][metric] for k in points]
            bounds = [found[k]["intervals"][metric] for k in points]
            spread = [[max(0, v - b[0]) for v, b in zip(y, bounds)], [max(0, b[1] - v) for v, b in zip(y, bounds)]]
            marker, grey = looks[ranking]
            panel.errorbar(
                x, y, spread, color=grey, marker=marker, markersize=4, linewidth=1.1, elinewidth=0.8, capsize=2,
                linestyle="-" if which == "topk" else "--", markerfacecolor=grey if which == "topk" else "white",
                label=f"{ranking} {LABELS[which]}",
            )  # fmt: skip
        clean = next((entry["clean"][metric] for entry in masked if entry["clean"]), None)
        if clean is not None:
            panel.axhline(clean, color="0.0", linestyle=":", linewidth=0.9, label="unmasked")
        panel.set_ylabel({"f1": "F1 (%)", "em": "EM (%)"}[metric], fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].set_xticks(range(len(ks)), ks)
    panels[1].set_xlabel("K, latents masked a question", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    # A column for TopK and the unmasked level, one for BottomK.
    order = sorted(range(len(labels)), key=lambda i: (labels[i].endswith("BottomK"), labels[i] == "unmasked"))
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    figure.savefig(file, format="png", dpi=300)
