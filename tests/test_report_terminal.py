"""The table on the terminal, and what round 1 says of its rankings; on made-up entries of results.json."""

import re

import pytest
from made_entries import comparison, masked, parse, several, unmasked, with_controls

from experiment.report import statistics, terminal

WHOLE = ("0", "1", "3", "10", "50%")


def to_text(entries):
    return terminal.to_text(parse(entries))


def test_as_it_reads():
    run = {"ranking": "baseline"}
    drops = {"n": 595, "em": 25.7143, "f1": 15.1, "named": -0.001, "answer_log_prob": 0.354, "format_log_prob": 0.089}
    intervals = {"em": [21.9, 29.7], "f1": [12, 18], "named": [-0.002, 0.0], "answer_log_prob": [0.3, 0.4]}
    drops["intervals"] = intervals | {"format_log_prob": [0.05, 0.13]}
    nothing = masked("baseline", "topk", "0", 99.5)
    one = masked("baseline", "topk", "1", 97.0, removed=3.72)
    half = masked("baseline", "topk", "50%", 73.8, mean_k=6.2, removed=16.07) | {"drop": drops}
    matched = masked("matched", "topk", "50%", 91.4, mean_k=25.1, removed=16.6, missed_target=60)
    bottom = masked("baseline", "bottomk", "50%", 99.5, mean_k=6.2, removed=0.5)
    assert to_text([unmasked(run=run), nothing, half, one, matched, bottom]) == (
        "Masking the 6.2 latents that fire most (on average per question) costs 25.7 points of EM [21.9,\n"
        "29.7]. No control was run: with --control direction the same command says what any change of this\n"
        "size costs.\n"
        "error term dropped, masked latents set to zero; 595 questions kept of 651 asked.\n"
        "Unmasked EM / F1 / named, %: 99.5/99.5/99.5 (all asked 91.2/91.2/91.2). K = 0: EM drop 0.0.\n"
        "\n"
        "TopK: EM drop  K = 1           K = 50% (6.2)\n"
        "baseline       2.5 [1.2, 3.8]  25.7 [21.9, 29.7]\n"
        "matched                         8.1 [6.8, 9.3]*\n"
        "\n"
        "TopK: answer  K = 1                 K = 50% (6.2)\n"
        "baseline      0.123 [0.103, 0.143]  0.354 [0.300, 0.400]\n"
        "matched                             0.123 [0.103, 0.143]\n"
        "\n"
        "          removed, %  named    format     BottomK: EM\n"
        "            1   50%     1 50%     1  50%  50%\n"
        "baseline  3.7  16.1   2.5 0.0  0.12 0.09  0.0\n"
        "matched       16.6*       8.1       0.12\n"
        "Drops: points of EM and named, nats per token of answer and format. [ ]: 95% interval over contexts.\n"
        "*: not matched: over half more or less removed than by baseline, for over a tenth of the questions."
    )


def test_the_whole_comparison_is_at_most_40_lines_of_100_columns():
    entries = comparison(12_345, ks=WHOLE)
    entries[1]["journal"] = None
    controlled = with_controls(comparison(12_345, ks=WHOLE))
    agreement = {"mean": 0.123, "low": 0.1, "high": 0.15, "n": 12_345}
    controlled[0]["agreement"] = {name: agreement for name in ("spearman", "share", "found")}
    for shown in (entries, controlled):
        lines = to_text(shown).splitlines()
        assert len(lines) <= 40 and max(map(len, lines)) <= 100
        text = "\n".join(lines)
        for ranking in ("gradsae-answer", "attribution", "effect", "matched", "random"):
            assert len(re.findall(rf"^{ranking} ", text, re.MULTILINE)) >= 3
        assert text.count("[") > 2 * 7 * 4
        blocks_apart = re.search(r"\n\nTopK: answer", text) is not None
        assert blocks_apart == (shown is entries)  # where there is room for empty lines
    # The control of each is beside it.
    assert "TopK: EM drop" in text and "EM beyond direction" in text and "BottomK: EM" in text
    (row,) = re.findall(r"EM beyond direction.*\nbaseline +(.*)", text)
    (drops,) = re.findall(r"TopK: EM drop.*\nbaseline +(.*)", text)
    excess = [float(value) for value in re.findall(r"(-?[\d.]+) \[", row)]
    assert excess == [float(value) - 1 for value in re.findall(r"(-?[\d.]+) \[", drops)]


def test_each_folder_is_told_what_was_found_in_it():
    """How many of the latents that matter most fire most, too: each folder's own share, in the order of the folders."""
    entries = several()
    shares = iter((0.12, 0.34))
    for entry in entries:
        if "masked" not in entry:
            estimate = {"mean": next(shares), "low": 0.1, "high": 0.4, "n": 595}
            entry["agreement"] = {name: estimate for name in ("spearman", "share", "found")}
    findings = re.findall(r"Masking the one latent .*?\.(?= error| layer)", " ".join(to_text(entries).split()))
    for finding, cost, share in zip(findings, ("9.5", "8.0"), ("12%", "34%"), strict=True):
        assert f"costs {cost} points" in finding
        assert f" At K = 50%, of the latents that matter most, measured one by one, {share} [10%, 40%] are" in finding


@pytest.mark.parametrize("more", [{}, {"population": "beef" * 16}, {"run": {"ablation": "mean"}}])
def test_it_fits_in_100_columns_whatever_is_in_it(more):
    """All figures at their widest, ten K: no figure is lost for it."""
    ks = ("1", "2", "5", "10", "20", "30", "50", "100", "50%", "100%")
    entries = comparison(12_345, ks=ks, fewer_than_k=1234, clean=100.0)
    for entry in entries[1:]:
        entry["drop"]["em"], entry["drop"]["intervals"]["em"] = 100.0, [100.0, 100.0]
    entries[6]["drop"]["answer_log_prob"] = -12.345
    text = to_text([*entries, masked("my_own_ranking_by_a_long_name", "topk", "2", 50.0, 12_345, **more)])
    assert max(map(len, text.splitlines())) <= 100
    assert len(re.findall(r"100\.0 \[100\.0, 100\.0\]", text)) == 7 * 10 and "my_own_ranking_by_a_l..." in text
    assert "-12.35" in text or "-12.34" in text


def test_a_mean_without_an_interval():
    """Of questions on one context: the mean stands alone."""
    entry = masked("baseline", "topk", "1", 80.0)
    for figures in (entry, entry["clean"], entry["drop"]):
        figures["intervals"] = dict.fromkeys(figures["intervals"])
    text = to_text([entry])
    assert re.search(r"TopK: EM drop +K = 1\nbaseline +19.5\n", text) and "[" not in text and "nan" not in text


def test_matched_masks_that_miss_are_marked():
    """Where more than a tenth of the questions miss what is to be matched by more than half of it."""
    entries = [
        masked("matched", "bottomk", "1", 99.0, n=100, removed=3.5, missed_target=11),
        masked("matched", "bottomk", "10", 99.0, n=100, removed=4.5, missed_target=10),
        masked("baseline", "bottomk", "1", 99.0, n=100, removed=0.6, missed_target=None),
    ]
    text = to_text(entries)
    assert re.search(r"matched +3\.5\* +4\.5\b[^*]*$", text, re.MULTILINE) and "\n*: not matched: over half" in text
    assert "*" not in to_text(entries[1:])


def test_matched_masks_of_many_latents_are_marked():
    """More than five times K."""
    entries = [
        masked("matched", "topk", "1", 99.0, mean_k=5.1, asked_k=1.0, missed_target=0, removed=3.5),
        masked("matched", "topk", "10", 99.0, mean_k=50.0, asked_k=10.0, missed_target=0, removed=4.5),
        masked("baseline", "topk", "1", 99.0, mean_k=1.0, asked_k=1.0, removed=3.4),
    ]
    text = to_text(entries)
    assert re.search(r"matched +3\.5\+ +4\.5\b", text) and "\n+: matched takes more than 5 times" in text
    assert "+" not in to_text(entries[1:])


def test_lists_that_are_too_short_are_marked():
    text = to_text([masked("baseline", "topk", "10", 80.0, removed=20.8, fewer_than_k=3)])
    assert "20.8<" in text and "\n<: for some questions the list is shorter" in text
    assert "<" not in to_text([masked("baseline", "topk", "10", 80.0, removed=20.8)])


def test_keep_only_has_a_table_of_its_own():
    keep = masked("baseline", "topk", "10", 30.0, keep_only=True)
    keep["faithfulness"] = {"mean": 0.71, "low": 0.62, "high": 0.8, "n": 500}
    first, second = to_text([keep, masked("baseline", "topk", "10", 80.0)]).split("\n\nerror")
    assert re.search(r"TopK: EM drop +K = 10\nbaseline +19\.5 \[", first)
    assert "69.5" not in first and "faithfulness" not in first
    assert second.startswith(" term dropped, masked latents set to zero, all but TopK masked; 595 questions.")
    assert "\nfaithfulness  K = 10\nbaseline      0.71 [0.62, 0.80]\n" in second
    assert re.search(r"all but TopK: EM\n +10\nbaseline +69\.5\n", second) and "K = 0" not in second


def test_left_out_questions_are_counted():
    first = unmasked() | {"left_out": ["a", "b"]}
    text = to_text([first, masked("baseline", "topk", "1", 80.0, left_out=["b", "c"])])
    assert "595 questions kept of 651 asked, 3 left out as too long." in " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------------------
# Round 1


def described(ranking, **changed):
    entry = unmasked(run={"ranking": ranking})
    entry["statistics"] = {
        "n": 50,
        "active": 12.8,
        "k_at_50%": 6.2,
        "same_context_percent": {"topk": 86.25, "bottomk": 98.0},
        "other_context_percent": {"topk": 21.5, "bottomk": 2.0},
        "union_topk": 213,
        "most_frequent_topk": [{"latent": 7, "questions": 40, "neuronpedia": "https://x/7"}],
        "overlap": {"baseline": {"n": 50, "topk": 5.7, "bottomk": 5.8}} if ranking == "gradsae" else {},
    } | changed
    return entry


def test_what_round_1_says_of_its_rankings():
    text = statistics.tell_rankings(parse([described("baseline"), described("gradsae")]))
    assert text.splitlines()[:5] == [
        "12.80 latents are active at the last position on average; K at 50% is 6.20.",
        "            one context  other ones   in any  with",
        "ranking     Top  Bottom  Top  Bottom  TopK    1",
        "1 baseline  86.2  98.0   21.5   2.0   213",
        "2 gradsae   86.2  98.0   21.5   2.0   213     6",
    ]
    nowhere = {"topk": None, "bottomk": None}
    assert "one context" not in statistics.tell_rankings(parse([described("gradsae", same_context_percent=nowhere)]))
    assert statistics.tell_rankings(parse([described("baseline", n=0)])).startswith("No question was kept")


def test_round_1_is_at_most_30_lines_however_many_rankings():
    entries = []
    for number in range(40):
        entry = described(f"mine_{number}")
        estimate = {"mean": 0.123, "low": 0.1, "high": 0.15, "n": 40}
        entry["agreement"] = {name: estimate for name in ("spearman", "share", "found")}
        entries.append(entry)
    told = statistics.tell_rankings(parse(entries))
    lines = [*to_text(entries).splitlines(), "", *told.splitlines(), "", "Round 1: ..."]
    assert len(lines) <= 30 and "and 25 more rankings, in results.json" in lines
    assert max(map(len, lines)) <= 100 and "0.12 [0.10, 0.15]" in told and "12%" in told


def test_nats_have_two_digits_where_three_do_not_fit():
    entries = [masked("baseline", "topk", k, 80.0) for k in ("1", "3", "10", "20", "50%")]
    assert "0.123 [0.103, 0.143]" in to_text(entries[:4]) and "0.12 [0.10, 0.14]" in to_text(entries)
