"""Every command that README or a script's docstring shows, at a tiny size; and what README says of files and names."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_script

from experiment import guard
from experiment.intervention import rankings
from experiment.report import __main__ as report

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SCRIPTS = ("baseline", "baseline_after_false", "baseline_after_true")


def find_commands():
    """(script, arguments) of every line that runs one of the scripts, loops written out."""
    texts = [README, *((ROOT / f"{script}.py").read_text(encoding="utf-8") for script in SCRIPTS)]
    for text in texts:
        text = text.replace("\\\n", " ")  # a command over several lines
        names = re.search(r'names="(.*)"', text)
        some = re.search(r'some="(.*)"', text)
        for line in re.findall(r"^ {4,}(.*python .*)$", text, re.MULTILINE):
            for command in line.split("#")[0].split(" && "):
                found = re.search(r"python (baseline\w*)\.py(.*)", command)
                if found:
                    arguments = found[2].replace("$names", names[1] if names else "")
                    arguments = arguments.replace("$some", some[1] if some else "")
                    for error in ("drop", "keep") if "$error" in arguments else ("",):
                        yield found[1], tuple(arguments.replace("$error", error).split())


COMMANDS = list(dict.fromkeys(find_commands()))


def test_all_commands_are_found():
    assert {script for script, _ in COMMANDS} == {*SCRIPTS} and len(COMMANDS) >= 3 + 6 + 3 + 3
    assert ("baseline_after_false", ("--demo",)) in COMMANDS


def test_the_commands_run(tmp_path, monkeypatch, capsys):
    """One after the other, as a reader would, on questions of two contexts; what needs a CUDA device, on the demo."""
    monkeypatch.chdir(ROOT)
    order = sorted(COMMANDS, key=lambda command: SCRIPTS.index(command[0]))
    for script, arguments in order:
        given = {"--demo": [], "--limit": [5], "--output-dir": [tmp_path / "demo"]}
        for word in arguments:
            if word.startswith("--"):
                option = word
                given[option] = []
            else:
                given[option].append(word)
        given.pop("--sample", None)
        if "--draws" in given:
            given["--draws"] = [2]
        given["--output-dir"] = [tmp_path / Path(given["--output-dir"][0]).name]
        given = [word for option, values in given.items() for word in (option, *values)]
        code, out, err = run_script(script, given, monkeypatch, capsys)
        assert code == 0, (script, arguments, err)
        assert "baseline" in out or "kept" in out
    # What the folders hold is put together, or written again: runs/A, runs/B and runs/demo are these here.
    folders = {"runs/A": tmp_path / "comparison_drop", "runs/B": tmp_path / "comparison_keep"}
    folders["runs/demo"] = tmp_path / "demo"
    folders |= {"runs/both": tmp_path / "both"}
    reports = re.findall(r"^ {4}python -m experiment\.report (.*)$", README, re.MULTILINE)
    assert len(reports) == 2
    for arguments in reports:
        given = [str(folders.get(argument, argument)) for argument in arguments.split()]
        monkeypatch.setattr("sys.argv", ["report", *given])
        assert guard(report.main) == 0
        assert "kept" in capsys.readouterr().out
    for ending in ("json", "csv", "tex", "png", "pdf"):
        assert (tmp_path / "both" / f"results.{ending}").stat().st_size


def test_the_table_in_readme_has_the_columns_that_are_printed(tmp_path, monkeypatch, capsys):
    given = ["--demo", "--limit", 6, "--output-dir", tmp_path]
    for script in SCRIPTS:
        code, out, err = run_script(script, given, monkeypatch, capsys)
        assert code == 0, err
    heads = re.findall(r"^(?:TopK: | +removed).*", re.sub(r"\(.*?\)", "", out), re.MULTILINE)
    shown = [" ".join(line.split()) for line in re.sub(r"\(.*?\)", "", README).splitlines()]
    assert len(heads) == 3 and all(" ".join(head.split()) in shown for head in heads)
    # What was found is told in the same words, whatever its figures are.
    finding, _, _ = " ".join(out[out.index("Masking") :].split()).partition("this size costs.")
    told = re.sub(r"-?[\d.]+\d", "0", " ".join(README.split()))
    assert len(finding) > 150 and re.sub(r"-?[\d.]+\d", "0", finding) in told


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_lines_fit_a_screen(text):
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_readme_names_every_ranking():
    for name in rankings.RANKINGS:
        assert f"`{name}`" in README


def test_the_house_has_the_rooms_that_contributing_shows():
    """Each file of the scripts, common.py, the examples and the package has its line, and nothing else has one."""
    tree = re.search(r"```\n(.*?)```", CONTRIBUTING, re.DOTALL)[1]
    shown = []
    folders = []
    for indent, name in re.findall(r"^( *)(\S+)(?:  |$)", tree, re.MULTILINE):
        folders = folders[: len(indent) // 4]
        if name.endswith("/"):
            folders.append(name)
        else:
            shown.append("".join(folders) + name)
    there = []
    for pattern in ("*.py", "examples/*.py", "experiment/**/*.py"):
        for path in ROOT.glob(pattern):
            if path.stat().st_size:
                there.append(path.relative_to(ROOT).as_posix())
    assert sorted(shown) == sorted(there)


def find_imports(path):
    """The modules of this project that a file imports, also inside functions and for types alone."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".replace(".", "/")
                is_module = (ROOT / f"{whole}.py").exists() or (ROOT / whole).is_dir()
                # What is no module stands in the package's own file.
                package = "experiment.__init__" if node.module == "experiment" else node.module
                names.add(f"{node.module}.{alias.name}" if is_module else package)
    return {name for name in names if name.split(".")[0] in ("experiment", "common", "baseline")}


def test_imports_go_down_the_floors_that_contributing_shows():
    """Seven at most; the modules of a sub-package are one room, on one floor."""
    [floors] = re.findall(r"^ {4}the scripts(?:\n {4}.+)+", CONTRIBUTING, re.MULTILINE)
    floor_of = {"baseline": 0, "baseline_after_false": 0, "baseline_after_true": 0}
    for number, line in enumerate(floors.splitlines()):
        for room in re.findall(r"\w+(?=[./,]|$)", line.replace(".py", "")):
            floor_of[room] = number
    assert max(floor_of.values()) == 6

    def room_of(name):
        parts = name.split(".")
        return parts[1] if parts[0] == "experiment" else parts[0]

    arrows = 0
    for pattern in ("*.py", "experiment/**/*.py"):
        for path in ROOT.glob(pattern):
            room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
            for name in find_imports(path):
                target = room_of(name)
                arrows += 1
                assert room == target or floor_of[room] < floor_of[target], (path, name)
    assert arrows > 100


@pytest.mark.parametrize("path", re.findall(r"`((?:experiment/|tests/|examples/)[\w/.]+)`", CONTRIBUTING))
def test_files_that_contributing_names_are_there(path):
    assert (ROOT / path).exists()


def test_who_is_cited():
    """The paper by what identifies it, and every field that the format asks for."""
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert content.keys() >= {"cff-version", "message", "title", "authors", "references"}
    [paper] = content["references"]
    assert paper["title"].startswith("Beyond Input Activations") and len(paper["authors"]) == 5
    assert paper["identifiers"][0]["value"] == "arXiv:2505.08080" and paper["url"].endswith("2025.emnlp-main.87")


@pytest.mark.parametrize("path", re.findall(r"`((?:experiment/|tests/|demo/|benchmarks/|examples/)[\w/.]+)`", README))
def test_files_that_readme_names_are_there(path):
    assert (ROOT / path).exists()
