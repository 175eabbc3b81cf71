"""results.html in a real browser, and `python -m experiment.report`; on demo rounds of three rankings."""

import base64
import collections
import csv
import dataclasses
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from importlib import resources

import pytest
from browser import CHROMIUM, Browser
from conftest import ROOT, read_journal, run_script
from made_entries import comparison, masked, parse, with_controls
from PIL import Image

from experiment import guard
from experiment.questions import Question
from experiment.records import files
from experiment.records.schema import KeptRecord, RankedQuestion, Record
from experiment.report import __main__ as report
from experiment.report import figure, folders, page, page_data, page_latents, terminal

RANKINGS = ("baseline", "gradsae", "matched")
KS = ("0", "1", "10", "50%")
MASKS = {"topk": "TopK", "bottomk": "BottomK"}
PAINTED = "new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"
READY = "document.querySelector('#questions tbody button')"
HOSTILE = "<img src=x onerror='window.hit=1'></td></script><script>window.hit=1</script> &lt;b&gt; & \"'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What three rounds leave."""
    path, patch = tmp_path_factory.mktemp("rounds"), pytest.MonkeyPatch()
    given = ["--demo", "--limit", 40, "--output-dir", path, "--ranking", *RANKINGS]
    for name in ("baseline", "baseline_after_false", "baseline_after_true"):
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, given), *([] if name == "baseline" else ["--k", *KS])])
        with patch.context() as short:
            if name == "baseline_after_false":  # the third round draws its figure again
                short.setattr(figure, "draw", lambda entries: {})
            assert guard(__import__(name).main) == 0
    patch.undo()
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to open the page with (Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, folder):
    browser.open(folder / "results.html", READY)
    return browser


def test_readmes_picture(opened, folder, tmp_path):
    """The command of README that makes it."""
    script, picture = ROOT / "demo" / "screenshot.py", tmp_path / "page.png"
    subprocess.run([sys.executable, script, folder / "results.html", picture], check=True)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 100_000


def choose(browser, **values):
    """Sets the selects of these names."""
    for name, value in values.items():
        browser.run(f"""{{ const select = document.getElementById("{name}");
            select.value = {json.dumps(value)}; console.assert(select.value === {json.dumps(value)});
            select.dispatchEvent(new Event("change", {{bubbles: true}})) }}""")


def search(browser, text):
    browser.run(f"""{{ const input = document.getElementById("search");
        input.value = {json.dumps(text)}; input.dispatchEvent(new Event("input", {{bubbles: true}})) }}""")


def count(browser):
    """How many questions the page says it shows."""
    return int(browser.run("document.getElementById('count').textContent").split()[0])


def texts(browser, selector):
    return browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((found) => found.textContent)")


def address(browser):
    return browser.run("decodeURIComponent(location.hash.slice(1))")


def column(browser, place):
    """The texts of a column of the questions that are shown."""
    return texts(browser, f"#questions > tbody > tr:not(.opened) > td:nth-child({place})")


def problems(browser):
    """What the console complains of, and what was asked for beside the page itself."""
    named = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    found = [str(event)[:500] for event in browser.events if event["method"] in named]
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    return found, [url for url in asked if not url.startswith("data:")]


def rounds_of(folder):
    """Unmasked records of all that was asked, and {(ranking, mask, K): records}, from the journals' lines."""
    _, unmasked = read_journal(folder / "predictions_baseline.jsonl")
    masked = {}
    for path in folder.glob("predictions_*.jsonl"):
        run, records = read_journal(path)
        if "masked" in run:
            masked[run["ranking"], MASKS[run["masked"]], run["k"]] = records
    return unmasked, masked


def kept_of(unmasked):
    return {name: record for name, record in unmasked.items() if "active" in record}


def drop_of(before, after):
    """What the unmasked answer's tokens inside its brackets lost, nats per token."""
    lost = [before["log_probs"][place] - after["log_probs"][place] for place in before["inside"]]
    return sum(lost) / len(lost)


def masked_entries(folder):
    """Those of results.json but of K = 0."""
    entries = json.loads((folder / "results.json").read_text())
    return [entry for entry in entries if "masked" in entry and entry["k"] != "0"]


def judge(record):
    if record["f1"] >= 0.9:
        return "✓"
    return "≁" if record["named"] else "✗"


# ---------------------------------------------------------------------------------------------------------------------
# What was found: sentence, figure, table


def test_the_finding_comes_first(opened, folder):
    titles = texts(opened, "title") + texts(opened, ".subject")
    for title in titles:
        assert title.startswith("demo/model, demo/sae, blocks.1.hook_resid_post")
    (finding,) = texts(opened, ".finding")
    (entry,) = [
        entry
        for entry in masked_entries(folder)
        if (entry["run"]["ranking"], entry["masked"], entry["k"]) == ("baseline", "topk", "50%")
    ]
    low, high = entry["drop"]["intervals"]["em"]
    assert f"costs {entry['drop']['em']:.1f} points of EM [{low:.1f}, {high:.1f}]" in finding
    order = "[...document.querySelectorAll('.finding, figure, .block, #questions, #template, #run')]"
    places = opened.run(f"{order}.map((found) => found.id || found.className || found.localName)")
    assert list(dict.fromkeys(places)) == ["finding", "figure", "block", "rankings", "questions", "template", "run"]
    assert opened.run("document.getElementById('run').open") is False
    shown = " ".join(texts(opened, "#run dd"))
    first = json.loads((folder / "results.json").read_text())[0]
    for text in (f"{first['kept']} of 40 asked", "float32", "cpu", f"torch {first['run']['versions']['torch']}"):
        assert text in shown
    assert texts(opened, "#template pre") == [first["run"]["prompt_template"]]
    assert problems(opened) == ([], [(folder / "results.html").resolve().as_uri()])


def test_the_tables_are_results_json(opened, folder):
    captions = texts(opened, ".block caption")
    assert captions == [
        "EM drop, points",
        "EM drop, points",
        "F1 drop, points",
        "named drop, points",
        "answer drop, nats per token",
        "format drop, nats per token",
        "removed, %",
        "latents masked, per question",
    ]
    assert texts(opened, "details:has(.blocks) > summary") == [
        "BottomK masked: EM drop",
        "F1 drop, named drop, answer drop, format drop, removed, latents masked",
    ]
    read_tables = """[...document.querySelectorAll(".block:not(#rankings)")].map((table) => [...table.rows].map(
        (row) => [...row.cells].map((cell) => cell.textContent)))"""
    metrics = {"EM": "em", "F1": "f1", "named": "named", "answer": "answer_log_prob", "format": "format_log_prob"}
    cells = {caption: {} for caption in captions}
    for caption, (heads, *rows) in zip(captions, opened.run(read_tables)):
        for row in rows:
            if len(row) == 1:
                mask = row[0].removesuffix(" masked")
                continue
            for head, cell in zip(heads[1:], row[1:]):
                cells[caption][row[0], mask, head.split()[2]] = cell
    seen = 0
    for caption in cells:
        metric = metrics.get(caption.split()[0])
        digits = 3 if "nats" in caption else 1
        for entry in masked_entries(folder):
            ranking, mask, k = entry["run"]["ranking"], MASKS[entry["masked"]], entry["k"]
            shown = {ranking: entry["drop"]}
            if ranking == "baseline" and metric not in (None, "format_log_prob"):
                shown["beyond matched"] = entry["excess"]["matched"]
            for name, figures in shown.items():
                if metric:
                    low, high = figures["intervals"][metric]
                    expected = f"{figures[metric]:z.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"
                else:
                    expected = f"{entry['removed' if 'removed' in caption else 'mean_k']:.1f}"
                assert cells[caption][name, mask, k].removesuffix("*") == expected, (caption, ranking)
                seen += 1
    assert seen == (7 * len(RANKINGS) + 4) * 2 * (len(KS) - 1)
    levels = texts(opened, ".level")
    (unmasked,) = [line for line in levels if line.startswith("Unmasked EM / F1 / named, %: 100.0/100.0/100.0")]
    assert unmasked.endswith("K = 0: EM drop 0.0.")
    shared = texts(opened, "#rankings tbody tr")
    assert len(shared) == len(RANKINGS) and shared[0].startswith("1 baseline")


@pytest.fixture(scope="module")
def controlled():
    """Made-up entries of a whole comparison: five K, a control of each mask, other ones' latents."""
    entries = with_controls(comparison(rankings=3, ks=("0", "1", "3", "10", "50%")))
    for entry in entries:
        entry["journal"] = f"{entry.get('journal')}{entry.get('control', '')}"
    entries[3]["missed_target"] = 300
    entries.append(masked("other", "topk", "50%", 71.0, n=121, population="beef" * 16))
    return parse(entries)


def write_controlled(folder, path, entries):
    """A page of these entries, over the questions of a folder."""
    with (path / "results.html").open("w") as file:
        page.write_page(file, folders.read_folder(folder), entries)
    return path / "results.html"


def test_controls_stand_below_their_rankings(browser, folder, controlled, tmp_path):
    browser.open(write_controlled(folder, tmp_path, controlled), READY, width=1600)
    read_rows = """[...document.querySelectorAll(".block")[0].tBodies[0].rows].map(
        (row) => [row.className, ...[...row.cells].slice(0, 2).map((cell) => cell.textContent)])"""
    rows = browser.run(read_rows)
    assert [(of, name) for of, name, *_ in rows[1:]] == [
        ("", "baseline"),
        ("below", "in a random direction"),
        ("below", "difference"),
        ("", "gradsae"),
        ("below", "in a random direction"),
        ("below", "difference"),
        ("", "gradsae-answer"),
        ("below", "in a random direction"),
        ("below", "difference"),
    ]
    assert [cell for _, _, cell in rows[1:4]] == ["1.0 [-0.2, 2.2]", "1.0 [-0.2, 2.2]*", "0.0 [-2.0, 2.0]"]
    color = "getComputedStyle(document.querySelector('.block tr{} td')).color"
    assert browser.run(color.format(".below")) == browser.run(
        "getComputedStyle(document.querySelector('.level')).color"
    )
    assert browser.run(color.format(":not(.below)")) == browser.run("getComputedStyle(document.body).color")
    # What a mark means stands right below its table, and nowhere else.
    notes = texts(browser, ".block ~ .notes")
    told = "*: not matched: over half more or less removed than by baseline, for over a tenth of the questions."
    assert notes == [told, told]
    read_tables = "[...document.querySelectorAll('.block ~ .notes')].map((note) => note.parentElement.ariaLabel)"
    assert browser.run(read_tables) == ["EM drop, points", "removed, %"]
    # The table of other says why it has its own questions.
    heads = texts(browser, "h3.setting")
    assert heads[-1].startswith("questions with another one on their context,") and heads[-1].endswith(
        "; 121 questions."
    )
    assert (
        "other masks the latents of another question on the same context: questions without one are left out."
        in texts(browser, ".level")
    )
    assert texts(browser, "#left-out") == ["Not in the figure: other. What they remove is not measured; see the table."]
    summaries = [text for text in texts(browser, "summary") if "drop" in text]
    assert summaries == [
        "BottomK masked: EM drop",
        "F1 drop, named drop, answer drop, format drop, removed, latents masked",
        "F1 drop, named drop, answer drop, format drop, latents masked",
    ]


@pytest.mark.parametrize("interval, is_open", [([0.0, 3.0], False), ([0.1, 3.0], True), ([-3.0, -0.1], True)])
def test_bottomk_is_folded_where_it_costs_nothing(browser, folder, tmp_path, interval, is_open):
    """Whatever is masked in its place costs."""
    entries = with_controls([masked("baseline", "topk", "10", 71.0), masked("baseline", "bottomk", "10", 98.0)])
    for entry in entries:
        if entry["masked"] == "bottomk" and "control" not in entry:
            entry["drop"]["intervals"]["em"] = interval
    browser.open(write_controlled(folder, tmp_path, parse(entries)), READY)
    assert texts(browser, ".block .group")[:2] == ["TopK masked", "BottomK masked"]
    seen = "[...document.querySelectorAll('.block .group')].slice(0, 3).map((group) => group.checkVisibility())"
    assert browser.run(seen) == [True, is_open, False]  # the third is of F1
    # On paper, which nobody can click, everything is there.
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.run(seen) == [True, True, True]
    browser.send("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize("width", [400, 1000, 1200, 1600])
def test_tables_stand_side_by_side_where_both_fit(browser, folder, controlled, tmp_path, width):
    browser.open(write_controlled(folder, tmp_path, controlled), READY, width=width)
    browser.run("document.querySelectorAll('details:has(.blocks)').forEach((fold) => { fold.open = true })")
    read_boxes = """[...document.querySelectorAll("details .blocks")[1].children].slice(0, 2).map(
        (box) => [box.getBoundingClientRect().top, box.scrollWidth - box.clientWidth])"""
    (top, beyond), (other_top, other_beyond) = browser.run(read_boxes)
    assert (top == other_top) == (width == 1600)
    assert (beyond == other_beyond == 0) == (width > 400)  # nothing to scroll to
    # Where there is, the names stay.
    left = "document.querySelector('.block tbody th[scope=row]').getBoundingClientRect().left"
    before = browser.run(left)
    browser.run("document.querySelector('.blocks .wide').scrollLeft = 150")
    assert browser.run(left) == before


def test_the_legend_shows_one_ranking_alone(browser, folder, controlled, tmp_path):
    browser.open(write_controlled(folder, tmp_path, controlled), READY)
    browser.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def lit():
        """(ranking, control) of all that is drawn and not dimmed."""
        drawn = "[...document.querySelectorAll('figure [data-ranking]')]"
        is_lit = "(({opacity, display}) => opacity === '1' && display !== 'none')(getComputedStyle(line))"
        shown = f"{drawn}.filter((line) => {is_lit})"
        pairs = browser.run(f"{shown}.map((line) => [line.dataset.ranking, line.dataset.control])")
        return {tuple(pair) for pair in pairs}

    def both(*rankings):
        return {(ranking, control) for ranking in rankings for control in ("", "direction")}

    rankings = texts(browser, ".legend button")
    names = [text.split()[-1] for text in rankings]
    assert names == ["baseline", "gradsae", "gradsae-answer"] and lit() == both(*names)
    button = "document.querySelector('.legend [data-line={}]')"
    baseline, gradsae = button.format("baseline"), button.format("gradsae")
    browser.run(f"{gradsae}.dispatchEvent(new Event('mouseenter'))")
    assert lit() == both("gradsae")
    browser.run(f"{gradsae}.dispatchEvent(new Event('mouseleave'))")
    assert lit() == both(*names)
    browser.run(f"{baseline}.focus()")
    assert lit() == both("baseline")
    browser.press("Enter", 13)
    browser.run("document.activeElement.blur()")
    assert lit() == both("baseline") and browser.run(f"{baseline}.ariaPressed") == "true"
    # The controls' lines can be left out: of the one that is pressed, and of all.
    switch = "document.querySelector('.legend input')"
    browser.run(f"{switch}.click()")
    assert lit() == {("baseline", "")}
    browser.run(f"{baseline}.click()")
    browser.run("document.activeElement.blur()")
    assert lit() == {(name, "") for name in names} and browser.run(f"{baseline}.ariaPressed") == "false"
    browser.run(f"{switch}.click()")
    assert lit() == both(*names) and problems(browser)[0] == []


def test_the_words_of_its_rankings_are_explained(opened, folder):
    words = {text.split(":")[0] for text in texts(opened, "#words li")}
    rankings = {entry["run"]["ranking"] for entry in masked_entries(folder)}
    assert rankings <= words and "faithfulness" not in words
    assert {"kept", "EM", "TopK, BottomK", "K = 0", "beyond matched"} <= words
    # Nothing that is not there; right below what was found, before the words are used.
    assert not words & {"in a random direction", "difference", "beyond its own latents", "effect"}
    assert not any("hash" in text for text in texts(opened, "#words li"))
    assert opened.run("document.querySelector('.finding').nextElementSibling.id") == "words"


def test_the_words_of_its_tables_are_explained(browser, folder, controlled, tmp_path):
    """All that stands below a ranking, and sets of questions that only a hash tells apart."""
    own = masked("other-context", "topk", "50%", 70.0) | {
        "excess": {"own": {"n": 595, "em": 2.0, "intervals": {"em": [1.0, 3.0]}}}
    }
    browser.open(write_controlled(folder, tmp_path, [*controlled, *parse([own])]), READY)
    below = set(texts(browser, ".block .below th"))
    assert below == {"in a random direction", "difference", "beyond its own latents"}
    words = {text.split(":")[0] for text in texts(browser, "#words li")}
    assert below <= words and not any("hash" in text for text in texts(browser, "#words li"))
    another = parse([masked("baseline", "topk", "50%", 71.0, n=121, population="feed" * 16)])
    browser.open(write_controlled(folder, tmp_path, [*controlled, *another]), READY)
    assert any(head.startswith("questions feedfe,") for head in texts(browser, "h3.setting"))
    assert any("hash" in text for text in texts(browser, "#words li"))


def test_a_mark_of_the_figure_says_what_it_is_and_shows_its_questions(opened, folder):
    entries = masked_entries(folder)
    assert opened.run("document.querySelectorAll('.point').length") == 2 * len(entries)
    kept, masked = kept_of(rounds_of(folder)[0]), rounds_of(folder)[1]
    for entry in entries:
        ranking, mask, k = entry["run"]["ranking"], MASKS[entry["masked"]], entry["k"]
        point = f"document.getElementById('em:{entry['journal']}')"
        opened.run(f"{point}.dispatchEvent(new Event('mouseenter'))")
        low, high = entry["drop"]["intervals"]["em"]
        assert texts(opened, "#tip") == [
            f"{ranking} {mask}, K = {k} ({entry['mean_k']:.1f} latents per question, {entry['removed']:.1f}% of the "
            f"norm removed): EM drop {entry['drop']['em']:z.1f} [{low:z.1f}, {high:z.1f}] points"
        ]
        assert texts(opened, "#tip")[0] == opened.run(f"{point}.getAttribute('aria-label')")
    opened.run(f"{point}.dispatchEvent(new Event('mouseleave'))")
    assert opened.run("document.getElementById('tip').hidden")
    opened.run("document.getElementById('em:predictions_gradsae_false_k10.jsonl').focus()")
    opened.press("Enter", 13)
    assert [opened.run(f"document.getElementById('{name}').value") for name in ("ranking", "mask", "k")] == [
        "gradsae",
        "TopK",
        "10",
    ]
    changed = [n for n in kept if masked["gradsae", "TopK", "10"][n]["answer"] != kept[n]["answer"]]
    assert count(opened) == len(changed) > 5
    assert problems(opened)[0] == []


def test_every_mark_can_be_pointed_at(opened):
    """Whatever lines pass through it."""
    covered = opened.run("""[...document.querySelectorAll(".point .target")].filter((target) => {
        target.scrollIntoView({ block: "center" });
        const { x, y, width, height } = target.getBoundingClientRect();
        return !document.elementFromPoint(x + width / 2, y + height / 2).closest(".point");
    }).map((target) => target.closest(".point").ariaLabel)""")
    assert covered == []


def test_the_figure_says_what_is_fair_to_compare(browser, opened, folder, tmp_path):
    """Of several rankings; one alone is named, and needs no legend."""
    (fair,) = texts(opened, "#fair")
    assert "fair to compare are marks above one another" in " ".join(fair.split())
    assert opened.run("document.querySelector('#fair').nextElementSibling.className") == "drawing"  # it comes first
    entries = [entry for entry in folders.read_folder(folder).entries if entry.provenance.ranking == "baseline"]
    browser.open(write_controlled(folder, tmp_path, entries), READY)
    assert texts(browser, ".legend, #fair") == [] and browser.run("document.querySelectorAll('.point').length") > 0
    assert texts(browser, ".drawing .notes")[0].startswith("Ranking: baseline. Filled: TopK masked;")
    assert problems(browser)[0] == []


def test_no_line_breaks_inside_of_signs_and_options(browser, folder, tmp_path):
    """However narrow the page is: in the sign of intervals, in an option, and in what measures effects."""
    entries = parse([masked("baseline", "topk", "10", 71.0)])
    browser.open(write_controlled(folder, tmp_path, entries), READY)
    browser.run(f"{READY}.click()")
    whole = "[...document.querySelectorAll('.finding .unbroken, .notes > .unbroken, .detail .unbroken')]"
    assert browser.run(f"{whole}.map((part) => part.textContent)") == ["--control", "[ ]", "--ranking effect"]
    assert "No control was run: with --control direction the same command" in texts(browser, ".finding")[0]
    assert texts(browser, ".foremost") == [
        "Which latent matters most was not measured: run round 1 with --ranking effect."
    ]
    for width in range(320, 640, 8):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.send("Emulation.setDeviceMetricsOverride", **size)
        assert browser.run(f"{whole}.map((part) => part.getClientRects().length)") == [1, 1, 1], width


def test_zeros_recede(opened):
    """Where neither a mean nor its interval is anything but zero."""
    read_cells = "[...document.querySelectorAll('.block:not(#rankings) td')]"
    cells = opened.run(f"{read_cells}.map((cell) => [cell.className, cell.textContent])")
    for name, text in cells:
        is_figure = bool(re.match(r"-?[0-9]", text))
        if is_figure:
            assert (name == "nothing") == (set(re.findall(r"[1-9]", text)) == set()), text
    assert {name for name, text in cells if text == "0.0 [0.0, 0.0]"} == {"nothing"}


# ---------------------------------------------------------------------------------------------------------------------
# The list of questions


def test_the_list_is_sorted_by_the_drop_that_the_reader_chose(opened, folder):
    kept, masked = kept_of(rounds_of(folder)[0]), rounds_of(folder)[1]
    assert count(opened) == len(kept)
    for ranking, mask, k in (("baseline", "TopK", "50%"), ("gradsae", "TopK", "10"), ("matched", "BottomK", "1")):
        choose(opened, ranking=ranking, mask=mask, k=k)
        records = masked[ranking, mask, k]
        drops = {name: drop_of(kept[name], records[name]) for name in kept}
        expected = sorted(drops.values(), reverse=True)[:25]
        assert [float(text) for text in column(opened, 5)] == pytest.approx(expected, abs=0.00051)
        first = max(drops, key=drops.get)
        assert column(opened, 4)[0] == f"{judge(records[first])} {records[first]['answer'] or '(empty)'}"
        assert column(opened, 3)[0] == f"✓ {kept[first]['answer']}"
    opened.run("document.getElementById('sort-drop').click()")
    assert float(column(opened, 5)[0]) == pytest.approx(min(drops.values()), abs=0.00051)
    opened.run("document.getElementById('sort-changed').click()")
    shown = [records for key, records in masked.items() if key[2] != "0"]
    most = max(sum(records[n]["answer"] != kept[n]["answer"] for records in shown) for n in kept)
    assert column(opened, 6)[0] == f"{most} of {len(shown)}"
    assert texts(opened, "#questions th[aria-sort=descending]") == ["Changed by, of all masks"]
    assert problems(opened)[0] == []


def test_search_and_filters_count_as_the_journals_do(opened, folder, demo_questions):
    unmasked, masked = rounds_of(folder)
    kept = kept_of(unmasked)
    assert len(kept) < len(unmasked) == 40
    counted = dict.fromkeys(("kept", "changed", "wrong", "format"), f"{len(kept)} kept questions")
    counted |= {"unkept": f"{40 - len(kept)} questions that were not kept", "all": "40 asked questions"}
    for key in (("gradsae", "TopK", "10"), ("baseline", "TopK", "50%"), ("matched", "BottomK", "1")):
        choose(opened, **dict(zip(("ranking", "mask", "k"), key)))
        records = masked[key]
        expected = {
            "kept": len(kept),
            "changed": sum(records[n]["answer"] != kept[n]["answer"] for n in kept),
            "wrong": sum(judge(records[n]) == "✗" for n in kept),
            "format": sum(judge(records[n]) == "≁" for n in kept),
            "unkept": len(unmasked) - len(kept),
            "all": len(unmasked),
        }
        for show, number in expected.items():
            choose(opened, show=show)
            assert texts(opened, "#count") == [f"{number} of {counted[show]}"], (key, show)
    # Those not kept are there with their answer, and say what was wrong.
    choose(opened, show="unkept")
    wrong = [record for record in unmasked.values() if "active" not in record]
    assert sorted(column(opened, 3)) == sorted(f"{judge(record)} {record['answer'] or '(empty)'}" for record in wrong)
    assert texts(opened, "#questions > thead th") == ["Question", "Ground truth", "Unmasked"]  # nothing of masks
    opened.run(f"{READY}.click()")
    assert len(texts(opened, ".detail .context")) == 1 and texts(opened, ".matrix") == []
    first = unmasked[opened.run("document.querySelector('.detail .link').textContent")]
    assert texts(opened, ".unkept") == [
        f"Not kept, so no mask was tried: its unmasked answer has an F1 of {100 * first['f1']:.0f}, below 90."
    ]
    choose(opened, show="all")
    whole = {}  # all texts of a question
    for question in demo_questions:
        if question.id in unmasked:
            answers = [unmasked[question.id]]
            answers += [records[question.id] for key, records in masked.items() if question.id in records]
            found = [question.context, question.question, *question.truths, *(record["text"] for record in answers)]
            whole[question.id] = " ".join(found).lower()
    for word in ("instrument", demo_questions[0].context.split()[5].strip("."), "no such word"):
        search(opened, word)
        assert count(opened) == sum(word.lower() in text for text in whole.values())
    assert problems(opened)[0] == []


def test_few_rows_leave_the_controls_where_they_are(opened):
    """And above the rows it stands how a view is shared."""
    opened.run("document.getElementById('questions-head').scrollIntoView()")
    top = "document.getElementById('controls').getBoundingClientRect().top"
    before = opened.run(top)
    search(opened, "no such word")
    assert count(opened) == 0 and opened.run(top) == before < 200
    for tab in ("latents", "questions"):
        opened.run(f"document.getElementById('tab-{tab}').click()")
        assert opened.run(top) == before
        assert opened.run("document.getElementById('share').getBoundingClientRect().bottom") < 300


def test_the_histogram_filters(opened, folder):
    kept, masked = kept_of(rounds_of(folder)[0]), rounds_of(folder)[1]
    choose(opened, ranking="baseline", mask="TopK", k="10")
    drops = [round(drop_of(kept[n], masked["baseline", "TopK", "10"][n]), 3) for n in kept]
    bars = opened.run("[...document.querySelectorAll('.bars button')].map((bar) => bar.title)")
    counted = 0
    for place, bar in enumerate(bars):
        number, low, high = re.fullmatch(r"(\d+) questions? lost (\S+) to (\S+)", bar).groups()
        inside = sum(float(low) <= drop < float(high) for drop in drops)
        assert int(number) == inside, bar
        counted += inside
        if inside:
            button = f"document.querySelectorAll('.bars button')[{place}]"
            opened.run(f"{button}.click()")
            assert count(opened) == inside and f"bar={low}:{high}" in address(opened)
            opened.run(f"{button}.click()")
    assert counted == len(kept) == count(opened) and len(bars) > 10
    # Of a single question there is nothing to see in bars.
    name = next(iter(kept))
    search(opened, name)
    lost = drop_of(kept[name], masked["baseline", "TopK", "10"][name])
    (told,) = texts(opened, "#histogram p")
    assert told == f"In this question the answer's log probability dropped by {lost:.3f} nats per token."
    assert texts(opened, ".bars button") == [] and count(opened) == 1
    assert problems(opened)[0] == []


@pytest.mark.parametrize("width", [400, 1200])
def test_the_histograms_axis(browser, folder, width):
    """Its ends, and a tick at 0, below the side at which the bars of what lost begin; what it is of is below that."""
    browser.open(folder / "results.html", READY, width=width)
    boxes = "[...document.querySelectorAll('#histogram {}')].map((part) => part.getBoundingClientRect().toJSON())"
    ticks = 0
    for ranking, k in itertools.product(RANKINGS, ("1", "10", "50%")):
        choose(browser, ranking=ranking, k=k)
        bars = browser.run("[...document.querySelectorAll('.bars button')].map((bar) => bar.title)")
        bounds = [re.fullmatch(r".* lost (\S+) to (\S+)", bar).groups() for bar in bars]
        ends = [bounds[0][0], bounds[-1][1]]
        axis, told = browser.run(boxes.format("p"))
        assert told["y"] >= axis["bottom"] and texts(browser, ".axis span")[:2] == ends
        shown = browser.run(boxes.format(".axis span"))
        assert (len(shown) == 3) == (float(ends[0]) < 0 < float(ends[1])), (ranking, k)
        if len(shown) == 3:
            zero = [low for low, _ in bounds].index("0")
            middle = shown[2]["x"] + shown[2]["width"] / 2
            assert middle == pytest.approx(browser.run(boxes.format("button"))[zero]["x"], abs=4)
            assert shown[2]["width"] == 0 or shown[0]["right"] < shown[2]["x"] < shown[2]["right"] < shown[1]["x"]
            ticks += 1
    assert ticks > 2


def test_the_view_is_in_the_address_and_back_works(browser, folder):
    page = folder / "results.html"
    browser.open(page, READY)
    choose(browser, ranking="gradsae", k="10", show="changed")
    search(browser, "trade")
    browser.run(f"{READY}.click()")
    shown, where = column(browser, 1), address(browser)
    for text in ("ranking=gradsae", "k=10", "show=changed", "search=trade", "question=questions-"):
        assert text in where
    answers = texts(browser, ".matrix td")
    browser.open(page, READY, fragment=where)
    assert column(browser, 1) == shown and texts(browser, ".matrix td") == answers
    assert browser.run("document.getElementById('search').value") == "trade"
    browser.open(page, READY)
    choose(browser, ranking="gradsae")
    browser.run(f"{READY}.click()")
    browser.run("history.back()")
    wait(browser, "!document.querySelector('.detail')")
    assert browser.run("document.getElementById('ranking').value") == "gradsae"
    browser.run("history.back()")
    wait(browser, "document.getElementById('ranking').value === 'baseline'")
    # A view that this page does not have is the nearest one.
    browser.open(page, READY, fragment="ranking=<b>&k=7&show=toString&sort=constructor&page=x&question=none")
    assert count(browser) == 40 and problems(browser)[0] == []


def wait(browser, condition):
    browser.run(f"""new Promise((done) => {{
        const look = () => ({condition}) ? done() : setTimeout(look, 10); look(); }})""")


def test_a_link_opens_its_question(browser, folder):
    *_, last = kept_of(rounds_of(folder)[0])
    browser.open(folder / "results.html", READY, fragment=last)
    assert texts(browser, ".detail .link") == [last] and count(browser) > 25
    top, height = browser.run("[document.querySelector('.detail').getBoundingClientRect().top, innerHeight]")
    assert 0 < top < height
    wrong = next(name for name, record in rounds_of(folder)[0].items() if "active" not in record)
    browser.open(folder / "results.html", READY, fragment=wrong)
    assert texts(browser, ".detail .link") == [wrong]


def test_copies_as_csv(opened, folder, demo_questions):
    kept, masked = kept_of(rounds_of(folder)[0]), rounds_of(folder)[1]
    opened.run("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    choose(opened, ranking="gradsae", k="10", show="changed")
    opened.run("document.getElementById('copy').click()")
    head, *rows = csv.reader(io.StringIO(opened.run("window.copied")))
    masked_name = "gradsae TopK K = 10"
    assert head == ["id", "question", "ground truth", "unmasked", masked_name, "verdict", "drop", "changed", "masks"]
    verdicts = {"✓": "right", "✗": "wrong", "≁": "format broken"}
    assert len(rows) == count(opened) > 25  # not the first page alone
    questions = {question.id: question for question in demo_questions}
    for name, question, truths, unmasked, answer, verdict, drop, _, masks in rows:
        record = masked["gradsae", "TopK", "10"][name]
        assert (question, truths) == (questions[name].question, " / ".join(questions[name].truths))
        assert (unmasked, answer) == (kept[name]["answer"], record["answer"]) and int(masks) == 18
        assert verdict == verdicts[judge(record)]
        assert float(drop) == pytest.approx(drop_of(kept[name], record), abs=0.00051)
    opened.run(f"{READY}.click()")
    opened.run("document.querySelector('.detail .copy').click()")
    assert [*csv.reader(io.StringIO(opened.run("window.copied")))] == [head, rows[0]]


# ---------------------------------------------------------------------------------------------------------------------
# A question


def test_a_question_opens_by_keyboard(opened, folder, demo_questions):
    unmasked, masked = rounds_of(folder)
    kept = kept_of(unmasked)
    choose(opened, ranking="gradsae", k="10")
    records = masked["gradsae", "TopK", "10"]
    name = max(kept, key=lambda name: drop_of(kept[name], records[name]))
    question = next(question for question in demo_questions if question.id == name)
    opened.run(f"{READY}.focus()")
    opened.press("Enter", 13)
    assert opened.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert texts(opened, ".detail .context") == [question.context]
    assert {*texts(opened, ".detail .context mark")} == {*question.truths}
    # The matrix: rankings down, K across, of the mask that was chosen.
    for mask in ("TopK", "BottomK"):
        opened.run(
            f"[...document.querySelectorAll('.matrix caption button')].find((b) => b.textContent === '{mask}').click()"
        )
        half = sum(len(record["active"]) // 2 for record in kept.values()) / len(kept)
        assert texts(opened, ".matrix thead th") == ["", "K = 1", f"K = 50% ({half:.1f})", "K = 10"]
        assert texts(opened, ".matrix tbody th") == list(RANKINGS)
        expected = []
        for ranking in RANKINGS:
            for k in ("1", "50%", "10"):
                record = masked[ranking, mask, k][name]
                expected.append(f"{judge(record)} {record['answer'] or '(empty)'}")
        assert texts(opened, ".matrix td") == expected
    choose(opened, mask="TopK")
    verdicts = opened.run("[...document.querySelectorAll('.matrix td button')].map((button) => button.classList[0])")
    signs = {"✓": "right", "✗": "wrong", "≁": "format"}
    assert verdicts == [signs[text[0]] for text in texts(opened, ".matrix td")]
    # A cell's text and figures, and its latents.
    chosen = opened.run("document.querySelector('.matrix [data-mask][aria-pressed=true]').dataset.mask")
    for ranking in RANKINGS:
        record = masked[ranking, "TopK", "10"][name]
        place = 3 * RANKINGS.index(ranking) + 2
        opened.run(f"document.querySelectorAll('.matrix td button')[{place}].click()")
        (facts,) = texts(opened, ".cell h3")
        assert facts.startswith(f"{ranking}, TopK, K = 10; EM {100 * record['em']:.0f}, F1 {100 * record['f1']:.0f}")
        assert f"lost {drop_of(kept[name], record):.3f} nats" in facts
        assert texts(opened, ".cell code") == [record["text"]]
        check_latents(opened, folder, ranking, name)
    assert opened.run("document.querySelector('.matrix [data-mask][aria-pressed=true]').dataset.mask") != chosen
    opened.run("document.activeElement.blur()")
    opened.run("document.querySelector('#questions button[aria-expanded=true]').focus()")
    opened.press("Enter", 13)
    assert texts(opened, ".detail") == [] and problems(opened)[0] == []


def read_table(browser, selector):
    """The texts of a table's cells, by rows."""
    return browser.run(f"""[...document.querySelector({json.dumps(selector)}).rows].map(
        (row) => [...row.cells].map((cell) => cell.textContent))""")


def check_latents(browser, folder, ranking, name):
    """As many as K = 10 masks, in the order of the file, and in how many questions' lists each is."""
    _, ranked = files.read_activations(folder / f"activations_{ranking}.json")
    lists = {question.id: question.topk[:10] for question in ranked}
    if ranking == "matched":
        found = folders.read_folder(folder)
        (entry,) = [e for e, _ in found.masked if e.journal == "predictions_matched_false_k10.jsonl"]
        lists = {one: folders.find_masked_latents(found, entry, one) for one in lists}
    heads, *rows = read_table(browser, ".latents")
    assert heads == ["Latent", f"Place in {ranking} TopK", "At K = 10", "Questions with it at K = 10"]
    expected = []
    for place, latent in enumerate(lists[name][: page_latents.MOST_LATENTS]):
        often = sum(latent in of_question for of_question in lists.values())
        expected.append([str(latent), str(place + 1), "masked", str(often)])
    assert rows == expected
    number = len(lists[name])
    known = "" if len(rows) == number else f", the first {len(rows)} of them here"
    assert texts(browser, ".cell summary") == [f"The question's latents: {number} masked{known}"]
    assert browser.run("document.querySelectorAll('.latents a').length") == 0  # the demo's have no page


def test_every_draw_is_shown(browser, measured):
    """Of a mask that was drawn three times: how many are right, and on demand the answers of all."""
    kept = kept_of(rounds_of(measured)[0])
    browser.open(measured / "results.html", READY)
    for ranking, journal in (("matched", "matched_false_k10"), ("baseline, direction", "false_k10_direction")):
        choose(browser, ranking=ranking, k="10")
        names = [f"predictions_{journal}{draw}.jsonl" for draw in ("", "_draw2", "_draw3")]
        draws = [read_journal(measured / name)[1] for name in names]
        drops = {}
        cells = {}
        for name, before in kept.items():
            drops[name] = sum(drop_of(before, records[name]) for records in draws) / 3
            right = sum(judge(records[name]) == "✓" for records in draws)
            sign = "✓" if right == 3 else "◐" if right else judge_wrong([records[name] for records in draws])
            cells[name] = f"{sign} {right} of 3 right"
        assert [float(text) for text in column(browser, 5)] == pytest.approx(
            sorted(drops.values(), reverse=True), abs=0.00101
        )
        assert sorted(column(browser, 4)) == sorted(cells.values())
        counts = collections.Counter()  # in any draw
        for name, before in kept.items():
            counts["changed"] += any(records[name]["answer"] != before["answer"] for records in draws)
            counts["wrong"] += any(judge(records[name]) == "✗" for records in draws)
            counts["format"] += any(judge(records[name]) == "≁" for records in draws)
        for show in ("changed", "wrong", "format"):
            choose(browser, show=show)
            assert count(browser) == counts[show], (ranking, show)
        choose(browser, show="kept")
        name = max(kept, key=lambda name: len({records[name]["answer"] for records in draws}))
        answers = [records[name] for records in draws]
        assert len({record["answer"] for record in answers}) > 1
        browser.run(f"document.getElementById('open-{name}').click()")
        assert texts(browser, ".matrix [aria-pressed=true][data-mask]") == [cells[name]]
        (facts,) = texts(browser, ".cell h3")
        em = sum(record["em"] for record in answers) / 3
        name_told = ranking.replace(", direction", " in a random direction")
        assert facts.startswith(f"{name_told}, TopK, K = 10; 3 draws, means: EM {100 * em:.0f}, F1 ")
        shown = []
        for record in answers:
            lost = drop_of(kept[name], record)
            shown.append(f"{judge(record)} {record['answer'] or '(empty)'} {record['text']} lost {lost:z.3f}")
        assert texts(browser, ".draws li") == shown
        browser.run(f"document.getElementById('open-{name}').click()")
    assert problems(browser)[0] == []


def judge_wrong(records):
    """The sign of several answers of which none is right."""
    return "≁" if all(judge(record) == "≁" for record in records) else "✗"


def test_which_latents_matter_in_a_question(browser, measured):
    """By effect and by the ranking, whatever ranking is chosen; which of them the mask holds."""
    _, by_effect = files.read_activations(measured / "activations_effect.json")
    _, by_activation = files.read_activations(measured / "activations_baseline.json")
    effects = {question.id: dict(zip(question.measured, question.effects)) for question in by_effect}
    scores = {question.id: dict(zip(question.measured, question.scores)) for question in by_activation}
    ranked = by_activation[0]
    of_question = effects[ranked.id]
    costliest = sorted(of_question, key=of_question.get, reverse=True)
    listed = ranked.topk[:10]
    wanted = {*listed, *costliest[:10]}
    browser.open(measured / "results.html", READY, fragment=f"k=3&question={ranked.id}")
    (told,) = texts(browser, ".foremost")
    cost = float(f"{of_question[costliest[0]]:.3g}")
    told_first = f"Latents that matter most: {costliest[0]} (masked alone, it costs {cost} nats per token), "
    assert told.startswith(told_first)
    assert re.findall(r"(?:: |, )(\d+) \(", told) == [str(latent) for latent in costliest[:3]]
    heads, *rows = read_table(browser, ".latents")
    assert heads == [
        "Latent",
        "Place in baseline TopK",
        "Score",
        "At K = 3",
        "Effect alone, nats per token",
        "Questions with it at K = 3",
    ]
    shown = {int(row[0]): row[1:] for row in rows}
    assert shown.keys() == wanted and len(rows) == len(wanted)
    assert [int(row[0]) for row in rows][:10] == costliest[:10]
    assert [float(row[4] or "-inf") for row in rows] == sorted((float(row[4] or "-inf") for row in rows), reverse=True)
    often = collections.Counter(latent for question in by_activation for latent in question.topk[:3])
    for latent, (place, score, is_masked, effect, questions) in shown.items():
        assert place == (str(listed.index(latent) + 1) if latent in listed else "")
        assert is_masked == ("masked" if latent in listed[:3] else "")
        assert int(questions) == often[latent]
        if score:
            assert float(score) == pytest.approx(scores[ranked.id][latent], rel=0.01)
        if effect:
            assert float(effect) == pytest.approx(of_question[latent], rel=0.01)
    assert texts(browser, ".cell summary") == ["The question's latents: 3 masked"]
    wide = "[...document.querySelectorAll('.detail .wide')]"
    for width in range(700, 1650, 50):  # nothing cut off, below each other or beside
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.send("Emulation.setDeviceMetricsOverride", **size)
        assert browser.run(f"{wide}.map((box) => box.scrollWidth > box.clientWidth)") == [False, False], width
    # Ten rows at first, and those that are masked; all on demand, in the same order.
    order = [int(row[0]) for row in rows]
    first = [latent for place, latent in enumerate(order) if place < 10 or latent in listed[:3]]
    read_shown = """[...document.querySelectorAll('.latents tbody tr')].filter((row) => row.offsetParent).map(
        (row) => Number(row.cells[0].textContent))"""
    assert browser.run(read_shown) == first and 10 < len(first) < len(order)
    browser.run("document.querySelector('.more').click()")
    assert browser.run(read_shown) == order
    browser.run("document.getElementById('by-ranking').click()")
    assert [int(row[0]) for row in read_table(browser, ".latents")[1:]][:10] == listed
    assert texts(browser, ".latents [aria-sort=ascending]") == ["Place in baseline TopK"]
    assert "by=ranking" in address(browser)
    # A control stands for latents of the ranking; its list is that of its ranking.
    choose(browser, ranking="baseline, direction")
    assert texts(browser, ".cell summary") == ["The question's latents: 3 imitated"]
    assert [row[3] for row in read_table(browser, ".latents")[1:]].count("imitated") == 3
    choose(browser, ranking="matched")
    assert texts(browser, ".latents th")[1] == "Place in matched TopK, first draw"
    assert [told] == texts(browser, ".foremost")
    assert problems(browser)[0] == []


def test_nothing_kept_stands_once(browser, measured):
    """What keeps no latent is the same of all rankings."""
    name = next(iter(kept_of(rounds_of(measured)[0])))
    browser.open(measured / "results.html", READY, fragment=name)
    control = "in a random direction"  # has no name of its own but in the list of all
    assert texts(browser, ".matrix tbody th") == ["baseline", control, "effect", control, "matched", control]
    assert texts(browser, ".matrix .below") == [control] * 3
    assert texts(browser, "#ranking option")[:4] == ["baseline", f"baseline {control}", "effect", f"effect {control}"]
    buttons = "[...document.querySelectorAll('.matrix caption button')]"
    browser.run(f"{buttons}.find((button) => button.textContent === 'all but TopK').click()")
    assert texts(browser, ".matrix thead th") == ["", "K = 0: none kept", "K = 3"]
    assert texts(browser, ".matrix tbody th") == ["baseline", "effect"]
    cells = texts(browser, ".matrix td")
    journals = ["keep_k0", "keep_k3", "effect_keep_k3"]
    answers = [read_journal(measured / f"predictions_{journal}.jsonl")[1][name] for journal in journals]
    assert cells == [f"{judge(record)} {page_data.shorten(record['answer'])}" for record in answers]
    assert browser.run("document.querySelector('.matrix .of-all').rowSpan") == 2
    # The cell that is opened is in the address, and the list stays as it is.
    browser.run("document.querySelectorAll('.matrix td button')[2].click()")
    where = address(browser)
    assert browser.run("document.getElementById('mask').value") == "TopK"
    facts = texts(browser, ".cell h3")
    assert facts[0].startswith("effect, all but TopK, K = 3; ")
    assert texts(browser, ".cell summary") == ["The question's latents: 3 kept"]
    browser.open(measured / "results.html", READY, fragment=where)
    assert texts(browser, ".cell h3") == facts
    masks = json.loads(browser.run("document.getElementById('data').textContent"))["masks"]
    assert column(browser, 6)[0].endswith(f" of {sum(not mask['repeats'] for mask in masks)}")
    assert sum(mask["repeats"] for mask in masks) == 1 and problems(browser)[0] == []


def test_masks_to_choose_from_stand_side_by_side(browser, folder, tmp_path):
    """However narrow the table below them is."""
    found = folders.read_folder(folder)
    of_one_k = [(entry, draws) for entry, draws in found.masked if entry.k == "1"]
    with open(tmp_path / "results.html", "w", encoding="utf-8") as file:
        page.write_page(file, dataclasses.replace(found, masked=of_one_k), found.entries)
    browser.open(tmp_path / "results.html", READY, width=400)
    browser.run(f"{READY}.click()")
    assert texts(browser, ".matrix caption") == ["Masked: TopKBottomK"]
    tops = "[...document.querySelectorAll('.matrix caption button')].map((button) => button.offsetTop)"
    assert len(set(browser.run(tops))) == 1
    assert browser.run("document.documentElement.scrollWidth") <= 400


def test_round_1_alone(browser, folder, tmp_path):
    """Without any mask there are the questions with their unmasked answers."""
    found = dataclasses.replace(folders.read_folder(folder), masked=[])
    unmasked, _ = rounds_of(folder)
    with open(tmp_path / "results.html", "w", encoding="utf-8") as file:
        page.write_page(file, found, found.entries)
    for fragment, number in (("", len(kept_of(unmasked))), ("show=all", 40), ("latent=3&tab=latents", 0)):
        browser.open(tmp_path / "results.html", "document.querySelector('#count')?.textContent", fragment=fragment)
        assert count(browser) == number
        assert number == 0 or texts(browser, "#questions > thead th") == ["Question", "Ground truth", "Unmasked"]
        browser.run(f"{READY}?.click()")
        assert texts(browser, ".matrix, .foremost") == [] and len(texts(browser, ".detail")) == min(number, 1)
        assert problems(browser)[0] == []


def test_as_many_latents_as_the_rounds_masked(folder):
    """Of every ranking, mask and K: the page counts them again from the lists, without a model."""
    found = folders.read_folder(folder)
    data = page_data.collect(found)
    shown = [entry for entry, _ in found.masked if entry.k != "0"]
    assert len(data["masks"]) == len(shown) == len(RANKINGS) * 2 * (len(KS) - 1)
    for place, entry in enumerate(shown):
        counts = [question["counts"][place] for question in data["questions"] if "counts" in question]
        assert sum(counts) / len(counts) == pytest.approx(entry.mean_k)
        assert (data["masks"][place]["k"], data["masks"][place]["ranking"]) == (entry.k, entry.provenance.ranking)


# ---------------------------------------------------------------------------------------------------------------------
# The latents


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What rounds 1 and 2 leave where latents were also masked one by one, with controls, draws and TopK kept alone."""
    path, patch = tmp_path_factory.mktemp("measured"), pytest.MonkeyPatch()
    given = ["--demo", "--limit", 12, "--output-dir", path, "--ranking", "baseline", "effect"]
    drawn = ["matched", "--draws", 3]
    for name, more in (
        ("baseline", drawn),
        ("baseline_after_false", [*drawn, "--k", 3, 10, "--control", "direction"]),
        ("baseline_after_false", ["--k", 3, "--keep-only"]),
    ):
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, [*given, *more])])
        assert guard(__import__(name).main) == 0
    patch.undo()
    return path


def read_latents(browser):
    """Heads, and {latent: texts} of the rows of the latents that are shown, in their order."""
    heads, *rows = browser.run(
        "[...document.querySelector('#latents').rows].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    return heads, {int(row[0]): row[1:] for row in rows}


def read_all_latents(browser):
    """Rows as of read_latents, of all pages."""
    rows = read_latents(browser)[1]
    while browser.run("!document.getElementById('page-Next')?.disabled && !document.getElementById('pager').hidden"):
        browser.run("document.getElementById('page-Next').click()")
        rows |= read_latents(browser)[1]
    return rows


def test_a_row_a_latent(browser, measured, demo_questions):
    """In how many lists it is, its means over the questions that it was measured in, and where it costs most."""
    browser.open(measured / "results.html", READY)
    browser.run("document.getElementById('tab-latents').click()")
    _, by_activation = files.read_activations(measured / "activations_baseline.json")
    _, by_effect = files.read_activations(measured / "activations_effect.json")
    activations, effects = {}, {}  # {latent: {question id: figure}}
    for question in by_activation:
        for latent, score in zip(question.measured, question.scores, strict=True):
            activations.setdefault(latent, {})[question.id] = score
    for question in by_effect:
        for latent, effect in zip(question.measured, question.effects, strict=True):
            effects.setdefault(latent, {})[question.id] = effect
    words = {question.id: question.question for question in demo_questions}
    browser.run("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    for ranking, ranked, k in (("baseline", by_activation, 10), ("effect", by_effect, 3), ("effect", by_effect, 10)):
        choose(browser, ranking=ranking, k=str(k))
        heads, shown = read_latents(browser)
        assert heads == [
            "Latent",
            f"Questions with it in {ranking} TopK, K = {k}",
            "Mean activation",
            "Mean effect alone, nats per token",
            "Questions in which it matters most, by effect alone",
            "Row",
        ]
        often = collections.Counter(latent for question in ranked for latent in question.topk[:k])
        rows = read_all_latents(browser)
        assert {latent: int(row[0]) for latent, row in rows.items()} == often
        assert [int(row[0]) for row in shown.values()] == sorted(often.values(), reverse=True)[:25]
        assert texts(browser, "#count") == [f"{len(often)} latents in {ranking} TopK, K = {k}"]
        for latent, (_, activation, effect, *_) in rows.items():
            for text, of_latent in ((activation, activations.get(latent)), (effect, effects.get(latent))):
                mean = sum(of_latent.values()) / len(of_latent)
                assert float(text) == pytest.approx(mean, rel=0.01, abs=1e-6), latent
        # The same as CSV, with the ids of questions.
        browser.run("document.getElementById('copy').click()")
        head, *copied = csv.reader(io.StringIO(browser.run("window.copied")))
        assert head == [title.lower() for title in heads[:-1]]
        assert {int(row[0]): row[1:4] for row in copied} == {latent: row[:3] for latent, row in rows.items()}
        for latent, *_, ids in copied:
            costly = sorted(effects[int(latent)], key=effects[int(latent)].get, reverse=True)
            assert ids.split(" / ")[0] == (costly[0] if effects[int(latent)][costly[0]] > 0 else "")
        browser.run("document.querySelector('#latents .copy').click()")
        (first, *_) = read_latents(browser)[1]
        assert [*csv.reader(io.StringIO(browser.run("window.copied")))] == [
            head,
            next(row for row in copied if row[0] == str(first)),
        ]
    browser.run("document.getElementById('sort-alone').click()")
    highest = max(often, key=lambda latent: sum(effects[latent].values()) / len(effects[latent]))
    _, shown = read_latents(browser)
    assert next(iter(shown)) == highest and texts(browser, "#latents th[aria-sort=descending]")[0].startswith(
        "Mean eff"
    )
    costly = sorted(effects[highest], key=effects[highest].get, reverse=True)[:3]
    assert shown[highest][3] == "".join(f"{words[name]} {effects[highest][name]:.3g}" for name in costly)
    search(browser, str(highest))
    # A search finds those that the mask takes nowhere, too.
    all_latents = {row[0] for row in json.loads(browser.run("document.getElementById('data').textContent"))["latents"]}
    found = {latent for latent in all_latents if str(highest)[:1] in str(latent)}
    search(browser, str(highest)[:1])
    assert set(read_all_latents(browser)) == found > {latent for latent in often if latent in found}
    assert texts(browser, "#count") == [f"{len(found)} of {len(all_latents)} latents in any list"]
    search(browser, str(highest))
    assert set(read_all_latents(browser)) == {latent for latent in all_latents if str(highest) in str(latent)}
    # A link opens its question, and Back shows the latents again.
    browser.run("document.querySelector('#latents td a').click()")
    wait(browser, "document.querySelector('.detail')")
    assert texts(browser, ".detail .link") == [costly[0]]
    assert browser.run("document.querySelector('#latents').offsetParent") is None
    browser.run("history.back()")
    wait(browser, "document.querySelector('#latents').offsetParent")
    assert next(iter(read_latents(browser)[1])) == highest
    search(browser, "")
    choose(browser, ranking="effect, direction")  # a control has no latents of its own
    assert texts(browser, "#count")[0].endswith("latents in effect TopK, K = 10")
    assert problems(browser)[0] == []


def test_a_latents_questions(browser, measured):
    """A click on how many there are shows them, from either table; and they can be let go of."""
    _, ranked = files.read_activations(measured / "activations_effect.json")
    browser.open(
        measured / "results.html", "document.querySelector('#latents td')", fragment="tab=latents&ranking=effect&k=3"
    )
    often = collections.Counter(latent for question in ranked for latent in question.topk[:3])
    latent, number = often.most_common(1)[0]
    assert 1 < number < len(ranked) and next(iter(read_latents(browser)[1].values()))[0] == str(number)
    first = next(iter(read_latents(browser)[1]))
    browser.run("document.querySelector('#latents .count').click()")
    assert count(browser) == number and f"latent={first}" in address(browser)
    opened = {text.removeprefix("open-") for text in browser.run(
        "[...document.querySelectorAll('#questions button[aria-expanded]')].map((button) => button.id)"
    )}  # fmt: skip
    assert opened == {question.id for question in ranked if first in question.topk[:3]}
    assert texts(browser, "#filters button") == [f"latent {first} in effect TopK, K = 3 ×"]
    choose(browser, k="10")  # still of this latent
    assert count(browser) == sum(first in question.topk[:10] for question in ranked)
    browser.run("document.getElementById('undo-latent').click()")
    assert count(browser) == len(ranked) and texts(browser, "#filters button") == []
    choose(browser, k="3")
    browser.run(f"{READY}.click()")
    places = "[...document.querySelectorAll('.latents .count')]"
    some, label = browser.run(f"{places}.map((button) => [button.textContent, button.title])[0]")
    browser.run(f"{places}[0].click()")
    assert count(browser) == int(some) and label.endswith(address(browser).partition("latent=")[2].split("&")[0])
    assert problems(browser)[0] == []


def test_latents_without_scores_or_effects(opened, folder, demo_questions):
    """No column of figures that nobody measured; a latent matters most where it stands first in the list."""
    opened.run("document.getElementById('tab-latents').click()")
    heads, shown = read_latents(opened)
    k = heads[1].rpartition(" ")[2]
    assert heads == [
        "Latent",
        f"Questions with it in baseline TopK, K = {k}",
        "Questions in which it matters most, by place in baseline TopK",
        "Row",
    ]
    assert k == "50%"
    _, ranked = files.read_activations(folder / "activations_baseline.json")
    latent, row = next(iter(shown.items()))
    places = {question.id: question.topk.index(latent) for question in ranked if latent in question.topk}
    first = sorted(places, key=places.get)[:3]
    words = {question.id: question.question for question in demo_questions}
    assert row[1] == "".join(words[name] for name in first)


# ---------------------------------------------------------------------------------------------------------------------
# Whatever is in it, wherever it is read


def test_html_is_shown_as_text(browser, folder, demo_questions, tmp_path, monkeypatch):
    """In a question, a context, a ground truth and an answer; and the addresses of latents, which are not fetched."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    kept = kept_of(rounds_of(folder)[0])
    hostile = [
        Question(q.id, f"{HOSTILE} {q.context} {HOSTILE}", f"{HOSTILE}?", (HOSTILE, *q.truths)) for q in demo_questions
    ]
    for path in tmp_path.glob("predictions_*false*.jsonl"):
        run, records = read_journal(path)
        lines = [record | {"answer": HOSTILE, "text": f"[[ {HOSTILE} ]]"} for record in records.values()]
        path.write_text("\n".join(map(json.dumps, [{"run": run}, *lines])) + "\n")
    monkeypatch.setattr(
        page_data.catalogue, "neuronpedia_page", lambda *names: f"https://www.neuronpedia.org/x/{names[-1]}"
    )
    found = folders.read_folder(tmp_path, known=hostile)
    entries = []
    for entry in found.entries:
        run = entry.provenance.with_fields(model="google/gemma-2-9b-it", prompt_template=HOSTILE, hook_name=HOSTILE)
        entries.append(entry.with_fields(run=run))
    found = dataclasses.replace(found, entries=entries)
    with open(tmp_path / "results.html", "w", encoding="utf-8") as file:
        page.write_page(file, found, found.entries)
    browser.open(tmp_path / "results.html", READY)
    browser.run(f"{READY}.click()")
    assert browser.run("window.hit") is None and count(browser) == len(kept)
    assert texts(browser, "#questions tbody button")[0] == f"{HOSTILE}?"
    assert texts(browser, ".detail .context mark")[0] == HOSTILE
    assert HOSTILE in column(browser, 4)[0] and HOSTILE in texts(browser, "title")[0]
    assert sum(HOSTILE in cell for cell in texts(browser, ".matrix td")) == len(RANKINGS) * (len(KS) - 1)
    assert texts(browser, "#template pre") == [HOSTILE]
    search(browser, "onerror='window.hit=1'></td>")
    assert count(browser) == len(kept)
    assert browser.run("document.querySelector('.latents a').href").startswith("https://www.neuronpedia.org/x/")
    browser.run("document.getElementById('tab-latents').click()")
    link = browser.run("document.querySelector('#latents th a').href")
    assert link == f"https://www.neuronpedia.org/x/{next(iter(read_latents(browser)[1]))}"
    assert texts(browser, "#latents td a")[0] == f"{HOSTILE}?"
    assert "wrongly placed BOS" in texts(browser, "#caveat")[0]
    assert browser.run("window.hit") is None and problems(browser) == ([], [(tmp_path / "results.html").as_uri()])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1000, 1600])
def test_light_and_dark_narrow_and_wide(browser, folder, dark, width):
    browser.open(folder / "results.html", READY, dark, width)
    browser.run(f"{READY}.click()")
    assert browser.run("document.documentElement.scrollWidth") <= width  # nothing beside the screen
    clear = "rgba(0, 0, 0, 0)"  # else a group's head hides the shadow that says that there is more to scroll to
    assert browser.run("getComputedStyle(document.querySelector('.block .group')).backgroundColor") == clear
    if width > 400:  # where there is room, no table is cut off
        wide = "[...document.querySelectorAll('.detail .wide')]"
        assert browser.run(f"{wide}.map((box) => box.scrollWidth > box.clientWidth)") == [False, False]
    assert browser.run("document.querySelector('.detail').offsetHeight") < 1800  # two screens
    heads = "[...document.querySelectorAll('#questions > thead th')].filter((head) => head.offsetParent)"
    widths = browser.run(f"{heads}.map((head) => head.offsetWidth)")
    assert len(widths) == (3 if width == 400 else 6) and min(widths) > 70  # words fit
    for selector in ("body", ".detail", "#questions td", "select", ".matrix button", "figure svg text"):
        what = "fill" if "svg" in selector else "color"
        ink = browser.run(f"getComputedStyle(document.querySelector('{selector}')).{what}")
        assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 380) == dark, (selector, ink)
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 380) == dark
    picture = Image.open(io.BytesIO(browser.screenshot())).convert("L")
    black = sum(picture.histogram()[:12])  # the night's paper is lighter: ticks and marks would drown in it
    assert picture.width == width and (black == 0 or not dark)


def test_answers_can_be_judged_on_a_narrow_screen(browser, folder, demo_questions):
    """Where the ground truths have no column they stand below their questions; on a wide one they do not."""
    questions = {question.id: question for question in demo_questions}
    read_ids = "[...document.querySelectorAll('#questions button[aria-expanded]')].map((button) => button.id)"
    browser.open(folder / "results.html", READY, width=400)
    ids = [name.removeprefix("open-") for name in browser.run(read_ids)]
    told = [f"ground truth: {' / '.join(questions[name].truths)}" for name in ids]
    assert texts(browser, "#questions td small") == told and len(told) == 25
    assert browser.run("document.querySelector('#questions td:nth-child(2)').offsetParent") is None
    # Those that no mask was tried on have their unmasked answer there.
    choose(browser, show="unkept")
    browser.run(f"{READY}.click()")
    heads = "[...document.querySelectorAll('#questions > thead th')].filter((head) => head.checkVisibility())"
    assert browser.run(f"{heads}.map((head) => head.textContent)") == ["Question", "Unmasked"]
    assert browser.run("document.querySelector('#questions .opened td').colSpan") == 2
    choose(browser, show="kept")
    size = {"width": 1000, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.send("Emulation.setDeviceMetricsOverride", **size)
    wait(browser, "!document.querySelector('#questions td small')")
    assert browser.run("document.querySelector('#questions td:nth-child(2)').offsetParent !== null")


def test_by_keyboard_alone(browser, folder):
    """From the top to an opened question and a latent's question, and a mark of the figure."""
    browser.open(folder / "results.html", READY)
    focused = "document.activeElement.id"

    def tab(*ids):
        for expected in ids:
            browser.press("Tab", 9)
            assert browser.run(focused) == expected

    tab("skip")
    assert browser.run("document.activeElement.getBoundingClientRect().left") >= 0  # it shows while it has the focus
    browser.press("Enter", 13)
    assert browser.run(focused) == "questions-head"
    tab("tab-questions", "tab-latents")
    browser.press("Enter", 13)
    assert browser.run(focused) == "tab-latents" and "tab=latents" in address(browser)
    tab("ranking", "mask", "k", "search", "copy")
    browser.press("Tab", 9)  # the table, which can be scrolled
    tab("sort-latent", "sort-often")
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter", 13)
    assert browser.run("document.activeElement.parentElement.ariaSort") == "ascending"
    for _ in range(2):  # the number of its questions, and a link to one
        browser.press("Tab", 9)
    browser.press("Enter", 13)
    wait(browser, "document.querySelector('.detail')")
    opened = browser.run("document.querySelector('.detail .link').textContent")
    assert browser.run(focused) == f"open-{opened}"
    browser.run("document.getElementById('em:predictions_gradsae_true_k1.jsonl').focus()")
    browser.press(" ", 32)
    assert all(text in address(browser) for text in ("ranking=gradsae", "mask=BottomK", "k=1", "show=changed"))
    assert problems(browser)[0] == []


@pytest.mark.parametrize("dark", [False, True])
def test_screen_readers_and_weak_eyes(browser, measured, dark):
    """axe-core, an independent checker, finds nothing that is more than minor: names, roles, headings, contrast."""
    checker = (resources.files("axe_core_python") / "axe.min.js").read_text()
    for fragment in ("tab=latents", "k=10"):
        browser.open(
            measured / "results.html", "document.querySelector('tbody button, #latents td')", dark, fragment=fragment
        )
        browser.run("document.querySelectorAll('details').forEach((part) => { part.open = true })")
        if fragment == "k=10":
            browser.run(f"{READY}.click()")
        browser.run(f"{checker}; null")
        found = browser.run("axe.run({resultTypes: ['violations']}).then((result) => result.violations)")
        assert [(one["id"], one["nodes"]) for one in found if one["impact"] != "minor"] == []
        assert browser.run("axe.run({resultTypes: ['passes']}).then((result) => result.passes.length)") > 15


def test_printed(browser, folder):
    """Dark ink on light paper, whatever the screen's scheme is; nothing to press, nothing cut off."""
    browser.open(folder / "results.html", READY, dark=True, width=700)
    browser.run(f"{READY}.click()")
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.send("Emulation.setEmulatedMedia", media="print", features=scheme)
    for selector in ("body", ".detail", "#questions td", ".sign", ".matrix button", "figure svg text", ".finding"):
        what = "fill" if "svg" in selector else "color"
        ink = browser.run(f"getComputedStyle(document.querySelector('{selector}')).{what}")
        assert sum(map(int, re.findall(r"\d+", ink)[:3])) < 300, (selector, ink)
    for selector in ("#skip", "#tabs", "#controls", "#histogram", "#copy", ".copy", "#pager"):
        assert browser.run(f"document.querySelector('{selector}').offsetParent") is None, selector
    for selector in (".finding", "figure svg", ".block td", ".detail .context", ".matrix td", "#count", "#view"):
        assert browser.run(f"document.querySelector('{selector}').getClientRects().length") > 0, selector
    assert texts(browser, "#view") == ["; masked: baseline TopK, K = 50%"]  # which the controls say on a screen
    assert browser.run("getComputedStyle(document.querySelector('.wide')).overflowX") == "visible"
    assert browser.run("document.documentElement.scrollWidth") <= 700
    pdf = base64.b64decode(browser.send("Page.printToPDF")["data"])
    browser.send("Emulation.setEmulatedMedia", media="")
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


def test_as_many_questions_as_squad_keeps(browser, folder, tmp_path):
    """5,745 kept of 10,570 questions on 2,067 contexts, 20 masks, two of them with five draws: 40 MB, painted in 2 s,
    searched in 0.5 s.

    On 2 cores where nothing else runs; a loaded machine is given twice as long.
    """
    found = folders.read_folder(folder)
    words = [f"{word}{number}" for number in range(1000) for word in ("under", "the", "of", "Broncos")]
    contexts = [" ".join(words[(7 * n + i * i) % 4000] for i in range(110)) for n in range(2067)]
    asked = [
        Question(f"{n:024x}", contexts[n % 2067], f"What {n} is of {words[n % 4000]}?", ("Oslo",)) for n in range(10570)
    ]
    scores = dict.fromkeys(("em", "f1", "accuracy", "named"), 1.0)
    answer = {"answer": "Oslo", "text": "Result = [[ Oslo ]]", "log_probs": [-0.1, -0.2], **scores}
    answers = {q.id: Record(id=q.id, **answer) for q in asked}
    kept = [q.id for q in asked[:5745]]

    def answer_wrong(mask):
        """Each question in a way of its own, the first one least."""
        wrong = {}
        for number, name in enumerate(kept):
            fields = {"answer": f"not {name} but {mask}", "text": f"Result = [[ not {name} but {mask} ]]", "f1": 0.0}
            fields["log_probs"] = [-0.1, -0.2 - number / 1000]
            wrong[name] = answers[name].model_copy(update=fields)
        return wrong

    latents, alone = {}, {}
    for number, name in enumerate(kept):  # 100 of the 16,384 latents, as K = 50% masks; scores and effects of 206
        first = number * 7 % 16_000
        lists = {side: list(range(first, first + 100)) for side in ("topk", "bottomk")}
        measured = {"measured": list(range(first, first + 206)), "scores": [1 / 7 + n / 1000 for n in range(206)]}
        fields = {"active": [0] * 103, "inside": [1], "log_probs": [-0.1, -0.2], **lists, **measured}
        latents[name] = RankedQuestion(id=name, answer="Oslo", **fields)
        effects = [math.sin(n) / 100 for n in range(206)]
        alone[name] = KeptRecord(**{"id": name, **answer, **fields}, effects=effects)
    ranked = {f"activations_{name}.json": latents for name in RANKINGS}
    right = {name: answers[name] for name in kept}
    masked = []
    for entry, _ in found.masked:
        masked.append((entry, [answer_wrong(entry.journal) if entry.masked == "topk" else right]))
    for entry in [entry for entry, _ in masked if entry.provenance.ranking == "matched" and entry.k == "10"]:
        wrong = [answer_wrong(draw) for draw in range(3)]
        drawn = [*wrong, right, right] if entry.masked == "topk" else [right] * 5
        masked.append((entry.with_fields(control="direction", draws=5), drawn))
    big = dataclasses.replace(
        found,
        questions={q.id: q for q in asked},
        answers=answers,
        kept=kept,
        masked=masked,
        ranked=ranked,
        unmasked={"effect": alone},
    )
    with open(tmp_path / "results.html", "w", encoding="utf-8") as file:
        page.write_page(file, big, found.entries)
    assert (tmp_path / "results.html").stat().st_size < 40e6
    assert len(page_data.list_shown(big)) == 20
    browser.open(tmp_path / "results.html", READY)
    (paint,) = browser.run("performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)")
    assert paint < 4000
    assert count(browser) == 5745 and column(browser, 5)[0] == "5.744"
    choose(browser, show="all")
    for text, number in (("what broncos17", None), ("What 3000 is", 1), ("", 10570)):
        before = browser.run("performance.now()")
        search(browser, text)
        browser.run(PAINTED)
        assert browser.run("performance.now()") - before < 1000
        assert number is None or count(browser) == number
    before = browser.run("performance.now()")
    browser.run("document.getElementById('tab-latents').click()")
    browser.run(PAINTED)
    assert browser.run("performance.now()") - before < 1000 and count(browser) > 10_000
    browser.run("document.getElementById('tab-questions').click()")
    choose(browser, show="changed")
    assert count(browser) == 5745 and browser.run("document.querySelectorAll('#questions tr').length") < 30
    choose(browser, ranking="matched, direction", k="10")
    assert column(browser, 4)[0] == "◐ 2 of 5 right" and column(browser, 5)[0] == "3.446"
    before = browser.run("performance.now()")
    choose(browser, mask="BottomK", show="kept")
    browser.run(PAINTED)
    assert browser.run("performance.now()") - before < 1000
    assert texts(browser, "#histogram p") == [
        "In each of these 5745 questions the answer's log probability dropped by 0.000 nats per token."
    ]
    browser.run(f"{READY}.click()")
    assert browser.run("document.querySelectorAll('.detail *').length") < 500
    assert problems(browser)[0] == []


# ---------------------------------------------------------------------------------------------------------------------
# python -m experiment.report


def run_report(monkeypatch, capsys, *arguments):
    """Exit code, stdout, stderr. Without a figure, which takes time."""
    monkeypatch.setattr(figure, "draw", lambda entries: {})
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    capsys.readouterr()
    return guard(report.main), *capsys.readouterr()


def rewrite(folder, old, new, pattern="*.json*"):
    for path in folder.glob(pattern):
        path.write_text(path.read_text().replace(old, new))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_one_folder_again_without_torch(folder, copy):
    """The same files, from what lies in the folder, and no model is loaded."""
    for path in copy.glob("results.*"):
        if path.suffix != ".json":
            path.unlink()
    code = "import sys\nfrom experiment.report import __main__ as report\nreport.main()\n"
    code += "print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, copy], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.split() == ["False"], done.stderr
    for ending in ("json", "csv", "tex", "png", "pdf"):
        assert (copy / f"results.{ending}").read_bytes() == (folder / f"results.{ending}").read_bytes(), ending
    pages = [(path / "results.html").read_text().replace(str(path), "") for path in (copy, folder)]
    assert pages[0] == pages[1]
    text = terminal.to_text(files.read_results(folder / "results.json"))
    assert done.stdout == f"{text}\n\nAll files: {copy}\n"


def test_several_folders(folder, copy, tmp_path, monkeypatch, capsys):
    """As if of another layer: a table for each, and where each one's page is."""
    rewrite(copy, "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    both = tmp_path / "both"
    code, out, err = run_report(monkeypatch, capsys, folder, copy, "--output-dir", both)
    assert code == 0 and not err, err
    assert {path.name for path in both.glob("results.*")} == {"results.csv", "results.json", "results.tex"}
    entries = json.loads((both / "results.json").read_text())
    assert len(entries) == 2 * len(json.loads((folder / "results.json").read_text()))
    for layer in (1, 2):
        assert f"\nblocks.{layer}.hook_resid_post, error term dropped" in out
    assert out.count("TopK: EM drop") == 2
    *_, first, second, last = out.splitlines()
    assert first == f"Its questions: {folder / 'results.html'}" and second == f"Its questions: {copy / 'results.html'}"
    assert last == f"All files: {both}"


def test_the_reader_chooses_rankings_and_k(folder, copy, monkeypatch, capsys):
    for path in copy.glob("results.*"):
        if path.suffix != ".json":
            path.unlink()
    chosen = ["--rankings", "gradsae", "--k", "1", "10"]
    code, out, err = run_report(monkeypatch, capsys, copy, *chosen)
    assert code == 0 and "gradsae" in out and "matched" not in out and "50%" not in out
    tex = (copy / "results.tex").read_text()
    assert "gradsae &" in tex and "matched &" not in tex
    for ending in ("json", "csv"):  # these hold all
        assert (copy / f"results.{ending}").read_bytes() == (folder / f"results.{ending}").read_bytes(), ending
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    code, out, err = run_report(monkeypatch, capsys, copy, "--k", "7")
    assert code == 2 and "--k 7: not in these results, which have 0, 1, 10, 50%" in err and not out
    assert len(err.splitlines()) == 1
    assert before == {path: path.stat().st_mtime_ns for path in copy.iterdir()}


def test_the_data_set_is_not_there_or_another_one(copy, monkeypatch, capsys):
    before = (copy / "results.json").read_text()
    rewrite(copy, "demo/questions.jsonl", "nowhere.jsonl")
    code, out, err = run_report(monkeypatch, capsys, copy)
    assert code == 0 and len(err.splitlines()) == 1 and "nowhere.jsonl: cannot be read" in err
    assert (copy / "results.json").read_text() == before.replace("demo/questions.jsonl", "nowhere.jsonl")
    assert '"contexts":[]' in (copy / "results.html").read_text()
    rewrite(copy, "nowhere.jsonl", "demo/questions.jsonl")
    digest = json.loads((copy / "results.json").read_text())[0]["run"]["questions"]
    rewrite(copy, digest, "0" * 64)
    code, out, err = run_report(monkeypatch, capsys, copy)
    assert code == 0 and len(err.splitlines()) == 1 and "is not what it was" in err


def test_a_damaged_journal_is_left_out(copy, monkeypatch, capsys):
    path = copy / "predictions_true.jsonl"
    path.write_text(path.read_text() + "{}\n")
    code, out, err = run_report(monkeypatch, capsys, copy)
    assert code == 0 and len(err.splitlines()) == 1 and "predictions_true.jsonl" in err and "left out" in err
    assert '"ranking":"baseline","mask":"BottomK","k":"50%"' not in (copy / "results.html").read_text()


def test_rounds_begun_again_and_interrupted(copy, folder, monkeypatch, capsys):
    """Their journals do not hold what results.json counts: the figures stay as they are."""
    for name in ("baseline", "matched", "false"):
        path = copy / f"predictions_{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]))
    for name in RANKINGS:
        (copy / f"activations_{name}.json").unlink()
    monkeypatch.setattr(folders, "ROOT", copy)
    code, out, err = run_report(monkeypatch, capsys, copy)
    assert code == 0 and err.count("holds 9 of") == len(err.splitlines()) == 3, err
    before, after = (json.loads((path / "results.json").read_text()) for path in (folder, copy))
    for entry in [*before, *after]:
        entry.pop("excess", None)  # is of several journals, as far as they are whole
    assert after == before


def break_results(folder, change):
    entries = json.loads((folder / "results.json").read_text())
    change(entries)
    (folder / "results.json").write_text(json.dumps(entries))


BROKEN = {
    "an older version": lambda entries: [entry.pop("population", None) for entry in entries],
    "no interval": lambda entries: entries[0]["intervals"].pop("em"),
    "no K": lambda entries: [entry.pop("k") for entry in entries if "masked" in entry],
    "a run without a model": lambda entries: entries[-1].update(run=[]),
    "an unknown mask": lambda entries: entries[-1].update(masked="sometimes"),
    "empty": lambda entries: entries.clear(),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_broken_results_json_is_one_line(copy, monkeypatch, capsys, change):
    break_results(copy, change)
    files = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    code, out, err = run_report(monkeypatch, capsys, copy)
    assert code == 2 and len(err.splitlines()) == 1 and "results.json" in err and not out
    assert files == {path: path.stat().st_mtime_ns for path in copy.iterdir()}


def test_mistakes_are_one_line(folder, copy, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "twin")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "results.json").write_text('{"half')
    others = {"model_digest": "x", "sae_digest": "y", "questions": "z"}
    break_results(copy, lambda entries: [e["run"].update(others) for e in entries])
    shutil.copytree(copy, tmp_path / "contradicted")
    for journal in copy.glob("predictions_*.jsonl"):
        journal.unlink()
    for given, named in (
        ([], "--help"),
        (["--colour", folder], "--help"),
        ([tmp_path / "nothing"], "nothing/results.json"),
        ([tmp_path / "empty"], "empty/results.json"),
        ([tmp_path / "text"], "not JSON"),
        ([tmp_path / "contradicted"], "contradicted: none of its results is of what lies in it"),
        ([folder, copy, "--output-dir", tmp_path / "never"], "in common"),
        ([folder, tmp_path / "twin", "--output-dir", tmp_path / "never"], "told apart"),
    ):
        code, out, err = run_report(monkeypatch, capsys, *given)
        assert code == 2 and named in err.splitlines()[-1] and not out, (given, err)
    assert not (tmp_path / "never").exists()
    done = subprocess.run(
        [sys.executable, "-m", "experiment.report", "nowhere"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("report: nowhere")


def test_rounds_2_and_3_on_what_ships(tmp_path, monkeypatch, capsys):
    """Without round 1 the unmasked answers and the latents are the shipped file's."""
    monkeypatch.setattr(figure, "draw", lambda entries: {})
    given = ["--demo", "--limit", 5, "--output-dir", tmp_path]
    code, _, err = run_script("baseline_after_false", given, monkeypatch, capsys)
    assert code == 0, err
    found = folders.read_folder(tmp_path)
    ((entry, (records,)),) = found.masked
    assert found.kept == list(records) and found.answers.keys() >= records.keys()
    data = page_data.collect(found)
    shown = {question["id"]: question for question in data["questions"]}
    first = found.kept[0]
    ranked = found.ranked["activations_baseline.json"][first]
    assert shown.keys() >= records.keys() and shown[first]["answers"][0][0] == ranked.answer
    assert shown[first]["latents"] == [ranked.topk[: len(ranked.active) // 2]]
    assert entry.latents == "activations_baseline.json" and entry.journal == "predictions_false.jsonl"
