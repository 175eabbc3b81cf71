"""results.png and .pdf, and the page's panels, through Matplotlib's own objects; made-up entries."""

import re

import matplotlib.colors
import pytest
from made_entries import LAYERS, comparison, masked, parse, several, unmasked, with_controls

from experiment.report import figure, panels


def make_figure(entries):
    return figure.make_figure(figure.list_settings(parse(entries)))


def draw(entries):
    return figure.draw(parse(entries))


def drawn(panel):
    """{label: (x, y, low, high) of its points} of a panel's lines; no low and high of those without intervals."""
    found = {}
    for container in panel.containers:
        line, _, bars = container
        bounds = zip(*(segment[:, 1] for segment in bars[0].get_segments())) if bars else ()
        found[container.get_label()] = [*map(list, (line.get_xdata(), line.get_ydata(), *bounds))]
    return found


def marks(panel):
    """{name: its Line2D} of the points that the page can point at."""
    found = {}
    for line in panel.lines:
        name = (line.get_gid() or "").rpartition("|")[2]
        if name:
            found[name] = line
    return found


def legend(drawing):
    return [text.get_text() for text in drawing.legends[0].get_texts()]


def test_what_was_lost_over_what_was_removed():
    removed = {"1": 3.7, "10": 21.4, "50%": 16.1}
    entries = [unmasked()]
    for ranking in ("baseline", "matched"):
        for side in ("topk", "bottomk"):
            for k, percent in removed.items():
                value = 99.5 - (percent if side == "topk" else 0)
                entry = masked(ranking, side, k, value, removed=percent, journal=f"{ranking}_{side}_{k}.jsonl")
                entries.append(entry)
    entries[1]["drop"]["intervals"]["em"] = [3.0, 5.5]
    drawing = make_figure(entries)
    assert drawing.get_size_inches()[0] == 3.3 and len(drawing.axes) == 2
    em, answer = drawing.axes
    assert (em.get_ylabel(), answer.get_ylabel()) == ("EM drop, points", "answer drop, nats per token")
    assert (em.get_xlabel(), answer.get_xlabel()) == ("", "removed, % of the norm")
    x, y, low, high = drawn(em)["baseline TopK"]
    assert x == [3.7, 16.1, 21.4] and y == pytest.approx([3.7, 16.1, 21.4])
    assert low == pytest.approx([3.0, 14.85, 20.15]) and high == pytest.approx([5.5, 17.35, 22.65])
    assert drawn(em).keys() == {f"{r} {m}" for r in ("baseline", "matched") for m in ("TopK", "BottomK")}
    assert drawn(answer)["matched BottomK"][1] == [0.1234] * 3
    assert drawn(answer)["baseline TopK"][2] == pytest.approx([0.1034] * 3)
    assert marks(em).keys() == {f"em:{entry['journal']}" for entry in entries[1:]}
    assert marks(answer)["answer_log_prob:baseline_topk_10.jsonl"].get_xdata() == [21.4]
    assert legend(drawing) == ["baseline", "matched", "TopK", "BottomK"]
    assert drawing.legends[0].get_title().get_text() == "along a line: K = 1, 50% (6.5), 10"


def test_nothing_is_dropped_and_each_line_has_a_look_of_its_own():
    drawing = make_figure(with_controls(comparison()))
    lines = {container.get_label(): container[0] for container in drawing.axes[0].containers}
    assert len(lines) == 7 * 2 * 2  # rankings, masks, and their controls
    looks = set()
    for label, line in lines.items():
        is_chance = "direction" in label or label.split()[0] in ("matched", "random")
        assert line.get_linestyle() == ("--" if is_chance else "-"), label
        if "direction" not in label:
            looks.add(line.get_color())
    assert len(looks) == 7
    shapes = {handle.get_marker() for handle in drawing.legends[0].legend_handles[:7]}
    assert len(shapes) == 7  # so that it reads in grey
    assert legend(drawing)[7:] == ["the same in a random direction", "TopK", "BottomK"]
    # A control is thinner, and has no intervals to add to the others'.
    for label, points in drawn(drawing.axes[0]).items():
        own = lines[label.replace(", direction", "")]
        assert (len(points), lines[label].get_linewidth() / own.get_linewidth()) == (
            (2, 0.6) if "direction" in label else (4, 1)
        ), label
    for name, mark in marks(drawing.axes[0]).items():
        assert mark.get_zorder() > max(line.get_zorder() for line in lines.values())  # no line passes through it
        is_hollow = matplotlib.colors.to_hex(mark.get_markerfacecolor()) == "#ffffff"
        assert is_hollow == ("bottomk" in name), name


def test_colours_are_of_a_palette_for_colour_blind_readers():
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert set(figure.COLORS) < okabe_ito and len(set(figure.COLORS)) == 7
    for grey in figure.GREYS:
        red, green, blue = matplotlib.colors.to_rgb(grey)
        assert red == green == blue


def test_error_terms_stand_side_by_side():
    entries = comparison(rankings=2, settings=({}, {"error_term": "keep"}))
    drawing = make_figure(entries)
    assert drawing.get_size_inches()[0] == 3.3 and len(drawing.axes) == 4
    titles = [panel.get_title() for panel in drawing.axes[:2]]
    assert [title.splitlines()[0] for title in titles] == ["error term dropped", "error term kept"]
    assert drawing.axes[0].get_ylim() == drawing.axes[1].get_ylim()
    for panel, place in zip(drawing.axes[:2], (0, 1)):
        expected = [
            e["drop"]["em"] for e in entries[2:] if e["run"].get("error_term", "drop") == ("drop", "keep")[place]
        ]
        shown = [value for _, y, _, _ in drawn(panel).values() for value in y]
        nothing = [e["drop"]["em"] for e in entries[2:] if e["k"] == "0"]
        assert set(shown) == set(expected) - set(nothing)


def test_folders_stand_side_by_side():
    drawing = make_figure(several())
    assert len(drawing.axes) == 4
    assert [panel.get_title().splitlines()[0] for panel in drawing.axes[:2]] == [
        run["sae_id"].split("/")[0] for run in LAYERS
    ]
    assert make_figure(comparison(rankings=1, settings=[{"dtype": name} for name in "abc"])).get_size_inches()[0] == 6.9


def test_where_it_is_not_known_what_was_removed_the_number_of_latents_is_shown():
    drawing = make_figure([masked("baseline", "topk", k, 80.0) for k in ("1", "10")])
    assert drawing.axes[1].get_xlabel() == "latents masked per question"
    assert drawn(drawing.axes[0])["baseline TopK"][0] == [1.0, 10.0]


def test_what_has_no_measured_place_is_named_and_makes_no_panel():
    """other has questions of its own, and nobody knows what it removes."""
    entries = comparison(rankings=2)
    entries.append(masked("other-context", "topk", "50%", 70.0))
    entries.append(masked("other", "topk", "50%", 71.0, n=121, population="beef" * 16))
    entries.append(masked("gradsae", "topk", "30", 72.0))  # by an older version
    drawing = figure.make_figure(figure.list_settings(parse(entries)), figure.tell_left_out(parse(entries)))
    assert len(drawing.axes) == 2 and drawing.axes[1].get_xlabel() == "removed, % of the norm"
    assert drawn(drawing.axes[0]).keys() == {f"{r} {m}" for r in ("baseline", "gradsae") for m in ("TopK", "BottomK")}
    told = (
        "Not in the figure: gradsae at K = 30, other-context, other. What they remove is not measured; see the table."
    )
    assert figure.tell_left_out(parse(entries)) == told
    title = drawing.legends[0].get_title().get_text()
    assert " ".join(title.splitlines()) == f"along a line: K = 1, 3, 50% (6.5), 10, 30 {told}"
    assert legend(drawing) == ["baseline", "gradsae", "TopK", "BottomK"]
    assert figure.tell_left_out(parse(comparison(rankings=2))) == ""


def test_each_folder_has_the_axis_that_it_can_have():
    """Of one it is known what its masks remove; of another, whose SAE normalizes as it runs, it is not."""
    entries = several()
    for entry in entries:
        if "masked" in entry and entry["run"]["sae_id"] == LAYERS[0]["sae_id"]:
            entry["removed"] = 20.8
    drawing = make_figure(entries)
    assert [panel.get_xlabel() for panel in drawing.axes[2:]] == [
        "removed, % of the norm",
        "latents masked per question",
    ]
    assert figure.tell_left_out(parse(entries)) == ""


def test_without_intervals_or_reference():
    entry = masked("baseline", "topk", "1", 80.0)
    entry["drop"]["intervals"] = dict.fromkeys(entry["drop"]["intervals"])
    drawing = make_figure([entry])
    assert drawn(drawing.axes[0])["baseline TopK"][1:] == [[19.5], [19.5], [19.5]]
    drawing.draw_without_rendering()
    assert draw([masked("baseline", "topk", "1", 80.0) | {"clean": None, "drop": None}]) == {}


def test_nothing_masked_is_nothing_drawn():
    nothing = [masked(r, m, "0", 99.5, mean_k=0.0) for r in ("baseline", "gradsae") for m in ("topk", "bottomk")]
    assert draw(nothing) == {} == draw([unmasked()]) and panels.draw_panels(parse(nothing)) == {}


def test_files():
    """The same bytes for the same entries, whenever they are drawn, a column wide."""
    files = draw(comparison(rankings=2))
    assert files == draw(comparison(rankings=2)) and files.keys() == {"png", "pdf"}
    assert files["png"].startswith(b"\x89PNG") and files["pdf"].startswith(b"%PDF")
    assert not any(date in files["pdf"] for date in (b"CreationDate", b"Date</"))
    assert int.from_bytes(files["png"][16:20], "big") == 990  # 3.3 inches at 300 dots per inch
    assert b"/Type3" not in files["pdf"]  # publishers refuse such fonts


def test_panels_of_the_page():
    made = panels.draw_panels(parse(with_controls(comparison(rankings=2))))
    assert made == panels.draw_panels(parse(with_controls(comparison(rankings=2))))
    (drawn,) = made.values()
    assert [*made] == ["error term dropped, masked latents set to zero"]
    assert [title for title, _ in drawn] == ["EM drop, points", "answer drop, nats per token"]
    for (_, svg), metric in zip(drawn, ("em", "answer_log_prob")):
        assert svg.startswith("<svg") and "<dc:date>" not in svg
        points = re.findall(rf'<g data-ranking="(.*?)" data-control="" id="{metric}:([^"]*)">', svg)
        assert len(points) == 2 * 2 * 4 and ("gradsae", "predictions_gradsae_bottomk_50%.jsonl") in points
        controls = re.findall(rf'data-ranking="gradsae" data-control="direction" id="{metric}:', svg)
        assert len(controls) == (2 * 4 if metric == "em" else 0)
        # All that is drawn of a line: itself, its bars with their two ends, its points; of a control no bars.
        assert svg.count('data-ranking="baseline" data-control=""') == 2 * (1 + 3 + 4)
        assert svg.count('data-ranking="baseline" data-control="direction"') == (2 * (1 + 4) if metric == "em" else 0)
