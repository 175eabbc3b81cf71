"""Tables for people. Knows nothing of models or files."""

METRICS = ("em", "f1", "accuracy")


def mean_scores(scores):
    """n, and EM, F1 and accuracy in percent, over an iterable of scores from 0 to 1."""
    n, totals = 0, dict.fromkeys(METRICS, 0.0)
    for score in scores:
        n += 1
        for metric in METRICS:
            totals[metric] += score[metric]
    return {"n": n} | {metric: 100 * total / n if n else None for metric, total in totals.items()}


def drops(clean, masked):
    """How many points each metric of `masked` lies below that of `clean`; None where the clean one is not known."""
    return {metric: clean[metric] - masked[metric] if clean else None for metric in METRICS}


def table(rows):
    """Text columns. rows: dicts with masked, k, n, em, f1, accuracy and, where it has a reference, drop."""
    head = ["masked latents", "K", "n", "EM", "F1", "accuracy", "EM drop", "F1 drop", "accuracy drop"]
    lines = [head]
    for row in rows:
        drop = row.get("drop") or dict.fromkeys(METRICS)
        figures = [row[metric] for metric in METRICS] + [drop[metric] for metric in METRICS]
        lines.append([row["masked"], row["k"], str(row["n"])] + ["-" if x is None else f"{x:.2f}" for x in figures])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )
