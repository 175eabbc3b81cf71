"""results.html in a real browser, and `python -m experiment.report`; on demo rounds of two rankings."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
from browser import CHROMIUM, Browser
from conftest import ROOT, read_journal, run_script

from experiment import guard
from experiment.questions import Question
from experiment.records import files
from experiment.records.schema import RankedQuestion, Record
from experiment.report import __main__ as report
from experiment.report import cells, figure, folders, page, tables

RANKINGS = ("baseline", "matched")
KS = ("0", "10", "50%")
READY = "document.querySelector('#questions tbody button')"
HOSTILE = "<img src=x onerror='window.hit=1'></td></script><script>window.hit=1</script> &lt;b&gt; & \"'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What three rounds leave."""
    path, patch = tmp_path_factory.mktemp("rounds"), pytest.MonkeyPatch()
    given = ["--demo", "--limit", 32, "--output-dir", path, "--ranking", *RANKINGS]
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


def set_filter(browser, **values):
    for name, value in values.items():
        browser.run(f"""{{ const select = document.getElementById("{name}");
            select.value = {json.dumps(value)}; console.assert(select.value === {json.dumps(value)});
            select.dispatchEvent(new Event("change", {{bubbles: true}})) }}""")


def search(browser, text):
    browser.run(f"""{{ const input = document.querySelector(".dt-search input");
        input.value = {json.dumps(text)}; input.dispatchEvent(new Event("input", {{bubbles: true}})) }}""")


def count(browser):
    """How many questions the page says it shows."""
    return int(browser.run("document.querySelector('.dt-info').textContent").split()[0].replace(",", ""))


def texts(browser, selector):
    return browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((found) => found.textContent)")


def problems(browser):
    """What the console complains of, and what was asked for beside the page itself."""
    named = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    found = [str(event)[:500] for event in browser.events if event["method"] in named]
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    return found, [url for url in asked if not url.startswith("data:")]


def rounds_of(folder):
    """Unmasked records of the kept questions, and {(ranking, mask, K): records}, from the journals' lines."""
    _, unmasked = read_journal(folder / "predictions_baseline.jsonl")
    masked = {}
    for path in folder.glob("predictions_*.jsonl"):
        run, records = read_journal(path)
        if "masked" in run:
            masked[run["ranking"], {"topk": "TopK", "bottomk": "BottomK"}[run["masked"]], run["k"]] = records
    return {name: record for name, record in unmasked.items() if "active" in record}, masked


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_the_pages_table_is_results_json(opened, folder):
    heads, body = texts(opened, "#figures th"), texts(opened, "#figures tbody tr")
    cells = texts(opened, "#figures td")
    rows = [dict(zip(heads, cells[start:])) for start in range(0, len(cells), len(heads))]
    entries = json.loads((folder / "results.json").read_text())
    masked = [entry for entry in entries if "masked" in entry]
    assert len(masked) == len(RANKINGS) * len(KS) * 2
    assert len(rows) == len(body) == 3 + len(RANKINGS) * (len(KS) - 1) * 2  # K = 0 is one row
    for entry in masked:
        names = entry["run"]["ranking"], {"topk": "TopK", "bottomk": "BottomK"}[entry["masked"]], entry["k"]
        names = ("kept", "none", "0") if entry["k"] == "0" else names
        (row,) = [row for row in rows if (row["ranking"], row["masked"], row["K"].strip()) == names]
        low, high = entry["intervals"]["f1"]
        assert row["F1"].split() == [f"{entry['f1']:.2f}", f"[{low:.1f},", f"{high:.1f}]"]
        assert row["EM drop"].split()[0] == f"{abs(entry['drop']['em']):.2f}" and int(row["n"]) == entry["n"]
        assert row["answer"].split()[0] == f"{entry['drop']['answer_log_prob']:z.3f}"
    shown = " ".join(texts(opened, "#run dd"))
    kept = entries[0]["kept"]
    for text in ("demo/model", "demo/sae", f"{kept} of 32 asked", "float32", "cpu", "blocks.1.hook_resid_post"):
        assert text in shown
    assert f"torch {entries[0]['run']['versions']['torch']}" in shown
    assert opened.run("document.querySelectorAll('figure svg path').length") > 50
    assert problems(opened) == ([], [(folder / "results.html").resolve().as_uri()])


def test_search_and_filters_count_as_the_journals_do(opened, folder, demo_questions):
    kept, masked = rounds_of(folder)
    assert count(opened) == len(kept)

    def expect(holds, *chosen):
        keys = [key for key in masked if all(want in ("", has) for want, has in zip(chosen, key))]
        return sum(any(holds(masked[key][name], kept[name]) for key in keys) for name in kept)

    def changed(record, before):
        return record["answer"] != before["answer"]

    def misparsed(record, before):
        return record["named"] == 1 and record["f1"] < 0.9

    seen = set()
    for state, holds in (("changed", changed), ("misparsed", misparsed)):
        for choice in [(), ("matched",), ("", "BottomK"), ("baseline", "TopK", "50%"), ("", "", "0")]:
            ranking, mask, k = (*choice, "", "", "")[:3]
            set_filter(opened, state=state, ranking=ranking, masked=mask, k=k)
            assert count(opened) == expect(holds, ranking, mask, k), (state, choice)
            seen.add(count(opened))
            asked = [int(text.split()[-1]) for text in texts(opened, "#questions tbody td.count")]
            assert {*asked} <= {sum(all(c in ("", has) for c, has in zip((ranking, mask, k), key)) for key in masked)}
    assert len(seen) > 4  # not the same few everywhere
    set_filter(opened, state="", ranking="", masked="", k="")
    whole = {}  # all texts of a question
    for question in demo_questions:
        if question.id in kept:
            answers = [kept[question.id], *(records[question.id] for records in masked.values())]
            found = [question.context, question.question, *question.truths, *(record["text"] for record in answers)]
            whole[question.id] = " ".join(found).lower()
    for word in ("instrument", demo_questions[0].context.split()[5].strip("."), "no such word"):
        search(opened, word)
        assert count(opened) == sum(word.lower() in text for text in whole.values())
    search(opened, "")
    opened.run("document.querySelector('#questions th.count').click()")
    opened.run("document.querySelector('#questions th.count').click()")
    most = max(sum(records[n]["answer"] != kept[n]["answer"] for records in masked.values()) for n in kept)
    assert texts(opened, "#questions tbody td.count")[0] == f"{most} of {len(masked)}"
    assert problems(opened)[0] == []


def test_a_question_opens_by_keyboard(opened, folder, demo_questions):
    kept, masked = rounds_of(folder)
    first = next(question for question in demo_questions if question.id in kept)
    set_filter(opened, masked="TopK", ranking="matched")
    opened.run(f"{READY}.focus()")
    opened.press("Enter", 13)
    assert opened.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert texts(opened, ".detail .context") == [first.context]
    assert {*texts(opened, ".detail .context mark")} == {*first.truths}
    shown = texts(opened, ".answers tbody tr")
    assert len(shown) == 1 + len(KS) and shown[0].startswith("none") and kept[first.id]["text"] in shown[0]
    for k, row in zip(("0", "50%", "10"), shown[1:]):
        record = masked["matched", "TopK", k][first.id]
        assert row.startswith(f"matchedTopK{k}{record['answer']}") and record["text"] in row
        assert ("changed" in row) == (record["answer"] != kept[first.id]["answer"])
    # The latents: as many as the largest K masks, in the order of the file. The demo's have no page to link to.
    entry = next(e for e in json.loads((folder / "results.json").read_text()) if e["run"]["ranking"] == "matched")
    (latents,) = texts(opened, ".latents")
    listed = [int(number) for number in latents.split("masks")[-1].split()]
    _, ranked = files.read_activations(folder / "activations_matched.json")
    assert entry and listed and next(q for q in ranked if q.id == first.id).topk[: len(listed)] == listed
    assert opened.run("document.querySelectorAll('.latents a').length") == 0
    opened.press("Enter", 13)
    assert texts(opened, ".detail") == [] and problems(opened)[0] == []


def test_as_many_latents_as_the_rounds_masked(folder):
    """Of every ranking, mask and K: the page counts them again from the lists, without a model."""
    found = folders.read_folder(folder)
    data = page.collect([found])
    assert len(data["masks"]) == len(RANKINGS) * 2 * len(KS)
    for place, (entry, _) in enumerate(found.masked):
        counts = [question["counts"][place] for question in data["questions"]]
        assert sum(counts) / len(counts) == pytest.approx(entry.mean_k)
        assert (data["masks"][place]["k"], data["masks"][place]["ranking"]) == (entry.k, entry.provenance.ranking)


def test_html_is_shown_as_text(browser, folder, demo_questions, tmp_path, monkeypatch):
    """In a question, a context, a ground truth and an answer; and the addresses of latents, which are not fetched."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    kept, _ = rounds_of(folder)
    hostile = [
        Question(q.id, f"{HOSTILE} {q.context} {HOSTILE}", f"{HOSTILE}?", (HOSTILE, *q.truths)) for q in demo_questions
    ]
    for path in tmp_path.glob("predictions_*false*.jsonl"):
        run, records = read_journal(path)
        lines = [record | {"answer": HOSTILE, "text": f"[[ {HOSTILE} ]]"} for record in records.values()]
        path.write_text("\n".join(map(json.dumps, [{"run": run}, *lines])) + "\n")
    monkeypatch.setattr(page.catalogue, "neuronpedia_page", lambda *names: f"https://www.neuronpedia.org/x/{names[-1]}")
    found = folders.read_folder(tmp_path, known=hostile)
    entries = [
        entry.with_fields(run=entry.provenance.with_fields(model="google/gemma-2-9b-it")) for entry in found.entries
    ]
    found = dataclasses.replace(found, entries=entries)
    with open(tmp_path / "results.html", "w", encoding="utf-8") as file:
        page.write_page(file, [found], found.entries, "")
    browser.open(tmp_path / "results.html", READY)
    browser.run(f"{READY}.click()")
    assert browser.run("window.hit") is None and count(browser) == len(kept)
    assert texts(browser, "#questions tbody button")[0] == f"{HOSTILE}?"
    assert texts(browser, ".detail .context mark")[0] == HOSTILE
    assert HOSTILE in texts(browser, "#questions tbody tr:first-child td")[3]
    assert sum(HOSTILE in row for row in texts(browser, ".answers td.answer")) == len(RANKINGS) * len(KS)
    search(browser, "onerror='window.hit=1'></td>")
    assert count(browser) == len(kept)
    assert browser.run("document.querySelector('.latents a').href").startswith("https://www.neuronpedia.org/x/")
    assert "wrongly placed BOS" in texts(browser, "#caveat")[0]
    assert browser.run("window.hit") is None and problems(browser) == ([], [(tmp_path / "results.html").as_uri()])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1600])
def test_light_and_dark_narrow_and_wide(browser, folder, dark, width):
    browser.open(folder / "results.html", READY, dark, width)
    browser.run(f"{READY}.click()")
    assert browser.run("document.documentElement.scrollWidth") <= width  # nothing beside the screen
    heads = "[...document.querySelectorAll('#questions > thead th')].filter((head) => head.offsetParent)"
    widths = browser.run(f"{heads}.map((head) => head.offsetWidth)")
    assert len(widths) == (3 if width == 400 else 5) and min(widths) > 70  # words fit
    for selector in ("body", ".detail", "#questions td", "select"):
        ink = browser.run(f"getComputedStyle(document.querySelector('{selector}')).color")
        assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 380) == dark, (selector, ink)
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 380) == dark
    assert len(browser.screenshot()) > 10_000


def test_as_many_questions_as_squad_keeps(browser, folder, tmp_path):
    """5,745 questions on 2,067 contexts, 12 masks: 40 MB at most, and a search in under a second."""
    found = folders.read_folder(folder)
    words = [f"{word}{number}" for number in range(1000) for word in ("under", "the", "of", "Broncos")]
    texts = [" ".join(words[(7 * n + i * i) % 4000] for i in range(110)) for n in range(2067)]
    asked = [
        Question(f"{n:024x}", texts[n % 2067], f"What {n} is of {words[n % 4000]}?", ("Oslo",)) for n in range(5745)
    ]
    scores = dict.fromkeys(("em", "f1", "accuracy", "named"), 1.0)
    answers = {q.id: Record(id=q.id, answer="Oslo", text="Result = [[ Oslo ]]", **scores) for q in asked}
    wrong = {
        name: record.with_fields(answer=f"not {name}", text=f"Result = [[ not {name} ]]", f1=0.0)
        for name, record in answers.items()
    }
    lists = {side: list(range(100_000, 100_100)) for side in ("topk", "bottomk")}
    latents = RankedQuestion(id="any", answer="Oslo", active=[0] * 103, **lists)
    ranked = {f"activations_{name}.json": {q.id: latents for q in asked} for name in RANKINGS}
    masked = [(entry, wrong if entry.masked == "topk" else answers) for entry, _ in found.masked]
    big = dataclasses.replace(
        found, questions={q.id: q for q in asked}, answers=answers, kept=list(answers), masked=masked, ranked=ranked
    )
    with open(tmp_path / "results.html", "w", encoding="utf-8") as file:
        page.write_page(file, [big], found.entries, "")
    assert (tmp_path / "results.html").stat().st_size < 40e6
    browser.open(tmp_path / "results.html", READY)
    for text, number in (("what broncos17", None), ("What 3000 is", 1), ("", 5745)):
        before = browser.run("performance.now()")
        search(browser, text)
        browser.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        assert browser.run("performance.now()") - before < 1000
        assert number is None or count(browser) == number
    set_filter(browser, state="changed", k="50%", masked="TopK")
    assert count(browser) == 5745 and browser.run("document.querySelectorAll('#questions tr').length") < 30
    assert problems(browser)[0] == []


def test_a_link_opens_its_question(browser, folder):
    *_, last = rounds_of(folder)[0]
    browser.open(folder / "results.html", READY, fragment=last)
    assert texts(browser, ".detail .link") == [last] and count(browser) > 25
    top, height = browser.run("[document.querySelector('.detail').getBoundingClientRect().top, innerHeight]")
    assert 0 < top < height
    search(browser, last)
    assert count(browser) == 1


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
    table = cells.to_text(tables.build_table(files.read_results(folder / "results.json")))
    assert done.stdout == f"{table}\n\nAll files: {copy}\n"


def test_several_folders(folder, copy, browser, tmp_path, monkeypatch, capsys):
    """As if of another layer: what differs is a column, and a filter of the page."""
    rewrite(copy, "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    code, out, err = run_report(monkeypatch, capsys, folder, copy, "--output-dir", tmp_path / "both")
    assert code == 0 and not err, err
    both = tmp_path / "both"
    assert {path.name for path in both.glob("results.*")} == {
        f"results.{ending}" for ending in ("csv", "html", "json", "tex")
    }
    entries = json.loads((both / "results.json").read_text())
    assert len(entries) == 2 * len(json.loads((folder / "results.json").read_text()))
    assert out.startswith("hook_name") and "blocks.2.hook_resid_post" in out
    browser.open(both / "results.html", READY)
    kept, masked = rounds_of(folder)
    assert texts(browser, "#folder option")[1:] == [str(folder), str(copy)]
    assert len(texts(browser, "#run dl")) == 2 and texts(browser, "#figures th")[0] == "hook_name"
    assert count(browser) == len(kept)
    set_filter(browser, folder=str(copy), k="50%", masked="TopK")
    browser.run(f"{READY}.click()")
    assert len(texts(browser, ".answers tbody tr")) == 2 + len(RANKINGS)
    assert problems(browser)[0] == []


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
    assert not re.search(r'"ranking":"baseline","masked":"BottomK","k":"50%"', (copy / "results.html").read_text())


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
    assert (copy / "results.json").read_bytes() == (folder / "results.json").read_bytes()


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
    (entry, records), = found.masked  # fmt: skip
    assert found.kept == list(records) and found.answers.keys() >= records.keys()
    data = page.collect([found])
    ranked = found.ranked["activations_baseline.json"][found.kept[0]]
    assert len(data["questions"]) == len(records) and data["questions"][0]["unmasked"][0][0] == ranked.answer
    assert data["questions"][0]["latents"] == [ranked.topk[: len(ranked.active) // 2]]
    assert entry.latents == "activations_baseline.json" and entry.journal == "predictions_false.jsonl"
