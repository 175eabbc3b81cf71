"""Files that are read and written: the readers take what a round writes, refuse the rest in one line that names file
and reason, and raise nothing but our own error whatever the file holds. Needs no model."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiment import UserError, questions
from experiment.records import files, journal, provenance, schema
from experiment.records.entries import parse_entry
from experiment.records.schema import Provenance

SHIPPED = Path(__file__).resolve().parent.parent / "activations_baseline.json"
RUN = json.loads(SHIPPED.read_text())["run"]
SAMPLE = {"id": "questions-000-0", "answer": "a", "em": 1.0, "f1": 1.0, "active": [1, 2], "topk": [1], "bottomk": [2]}
FULL = SAMPLE | {"tokens": [3], "inside": [0], "log_probs": [-0.1], "removed_topk": [0.1], "target_topk": [0.2]}
HUB = {name: value for name, value in RUN.items() if not name.endswith("_digest")}
HUB |= {"model": "gemma-2-9b-it", "sae_release": "gemma-scope-9b-it-res-canonical"}
HUB |= {"sae_id": "layer_9/width_131k/canonical"}
THEIRS = {"original": [1, 2], "have_gradient": [1], "no_gradient": [2]}


def with_sample(**changed):
    return json.dumps({"run": RUN, "samples": [SAMPLE | changed]})


ACTIVATIONS = {  # name: (content, what the line says)
    "empty": ("", "is not JSON"),
    "no json": ("{", "is not JSON"),
    "not utf-8": (b"\xff\xfe", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "half a character": (with_sample(id="\ud800"), "sample 1: id: 'utf-8' codec can't encode"),
    "a number": ("3", "it is not round 1's file"),
    "an empty object": ("{}", "it is not round 1's file"),
    "no run": (json.dumps({"samples": [SAMPLE]}), "names no run"),
    "run a number": (json.dumps({"samples": [SAMPLE], "run": 3}), "names no run"),
    "no samples": (json.dumps({"run": RUN, "samples": []}), "holds no sample"),
    "samples missing": (json.dumps({"run": RUN}), "holds no sample"),
    "samples an object": (json.dumps({"run": RUN, "samples": SAMPLE}), "holds no sample"),
    "sample a number": (json.dumps({"run": RUN, "samples": [1]}), "sample 1: Input should be an object"),
    "no answer": (
        json.dumps({"run": RUN, "samples": [{"id": "x"}]}),
        "sample 1: lacks active: the file is of another version of this project: "
        "go on with that version, or run round 1 again with --overwrite",
    ),
    "topk a text": (with_sample(topk="12"), "sample 1: topk: Input should be a valid list"),
    "topk with a float": (with_sample(topk=[1, 1.5]), "topk.1: Input should be a valid integer"),
    "topk negative": (with_sample(topk=[-1]), "topk.0: Input should be greater than or equal to 0"),
    "topk beyond 64 bits": (with_sample(topk=[2**63]), "topk.0: Input should be less than 9223372036854775808"),
    "bottomk missing": (with_sample(bottomk=None), "bottomk: Input should be a valid list"),
    "active with true": (with_sample(active=[True]), "active.0: Input should be a valid integer"),
    "em of 7": (with_sample(em=7.0), "em: Input should be less than or equal to 1"),
    "f1 not a number": (with_sample(f1=float("nan")), "f1: Input should be less than or equal to 1"),
    "tokens a text": (with_sample(tokens="12"), "tokens: Input should be a valid list"),
    "log_probs a number": (with_sample(log_probs=-0.5), "log_probs: Input should be a valid list"),
    "removed_topk with a text": (with_sample(removed_topk=["1"]), "removed_topk.0: Input should be a valid number"),
    "removed_bottomk too short": (with_sample(removed_bottomk=[]), "removed_bottomk is not as long as bottomk"),
    "id twice": (json.dumps({"run": RUN, "samples": [SAMPLE, SAMPLE]}), "sample 2: the id 'questions-000-0' stands"),
    "theirs: a list of numbers": ("[1]", "is not of the authors'"),
    "theirs: a list of lists": ('[{"prompt": [1]}]', "is not of the authors'"),
    "theirs: no lists": ('[{"prompt": {}}]', "sample 1: active: Field required"),
    "theirs: a second one without TopK": (
        json.dumps([{"p": THEIRS}, {}, {"q": THEIRS | {"have_gradient": 1}}]),
        "sample 2: topk: Input should be a valid list",
    ),
    "theirs: empty": ("[]", "holds no sample"),
    "theirs: all empty": ("[{}, {}]", "holds no sample"),
}

RECORD = {"id": "questions-000-0", "text": "t", "answer": "a", "em": 1.0, "f1": 1.0, "accuracy": 1.0, "named": 1.0}
LATENTS = {"tokens": [5], "active": [1], "topk": [1], "bottomk": [2]}


def with_record(**changed):
    """A journal with one record; a field changed to None is left out."""
    record = {name: value for name, value in (RECORD | changed).items() if value is not None}
    return '{"run": {}}\n' + json.dumps(record) + "\n"


def with_latents(**changed):
    return with_record(**LATENTS | changed)


JOURNALS = {
    "empty": ("", "line 1: is damaged (run: Field required): remove the file"),
    "a torn first line": ('{"run": {}}', "line 1: is damaged (run: Field required): remove the file"),
    "no run": ("{}\n", "line 1: is damaged"),
    "run a number": ('{"run": 3}\n', "line 1: is damaged"),
    "damaged in the middle": ('{"run": {}}\nnonsense\n' + json.dumps(RECORD) + "\n", "line 2: is damaged"),
    "deep": ('{"run": {}}\n' + "[" * 100_000 + "\n", "line 2: is damaged"),
    "a list": ('{"run": {}}\n[]\n', "line 2: is damaged"),
    "not utf-8": (b'{"run": {}}\n\xff\n', "line 2: is damaged"),
    "half a character": (with_record(text="\ud800"), "line 2: is damaged"),
    "no id": (
        with_record(id=None),
        "line 2: lacks id: the file is of another version of this project: "
        "go on with that version, or give --output-dir or --overwrite",
    ),
    "id a number": (with_record(id=1), "line 2: is damaged (id: Input should be a valid string)"),
    "id twice": (with_record() + json.dumps(RECORD) + "\n", "line 3: is damaged (its id stands twice)"),
    "no text": (
        with_record(text=None),
        "line 2: lacks text: the file is of another version of this project: "
        "go on with that version, or give --output-dir or --overwrite",
    ),
    "no scores": (
        '{"run": {}}\n{"id": "1", "text": "", "answer": ""}\n',
        "line 2: lacks em: the file is of another version of this project: "
        "go on with that version, or give --output-dir or --overwrite",
    ),
    "score of 7": (with_record(em=7.0), "line 2: is damaged (em: Input should be less than or equal to 1)"),
    "score a text": (with_record(f1="1.0"), "line 2: is damaged (f1: Input should be a valid number)"),
    "score not a number": (
        with_record(accuracy=float("nan")),
        "line 2: is damaged (accuracy: Input should be less than or equal to 1)",
    ),
    "named a truth value": (with_record(named=True), "line 2: is damaged (named: Input should be a valid number)"),
    "named missing": (
        with_record(named=None),
        "line 2: lacks named: the file is of another version of this project: "
        "go on with that version, or give --output-dir or --overwrite",
    ),
    "log_probs a number": (with_record(log_probs=-0.5), "line 2: is damaged (log_probs: Input should be a valid list)"),
    "inside texts": (with_latents(inside=["a"]), "line 2: is damaged (inside.0: Input should be a valid integer)"),
    "active with true": (
        with_record(**LATENTS | {"active": [True]}),
        "line 2: is damaged (active.0: Input should be a valid integer)",
    ),
    "bottomk negative": (
        with_latents(bottomk=[-1]),
        "line 2: is damaged (bottomk.0: Input should be greater than or equal to 0)",
    ),
    "removed_topk a text": (with_latents(removed_topk=["1"]), "line 2: is damaged (removed_topk.0: Input should be"),
    "removed_topk too long": (with_latents(removed_topk=[0.1, 0.2]), "line 2: is damaged (removed_topk is not as long"),
    "latents without lists": (
        with_record(active=[1]),
        "line 2: lacks topk: the file is of another version of this project: "
        "go on with that version, or give --output-dir or --overwrite",
    ),
    "half a run": ('{"run": {"limit": "5"}}\n', "line 1: is damaged (run.limit: Input should be a valid integer)"),
}

ESTIMATES = {"n": 5, "em": 50.0, "f1": 60.0, "accuracy": None}
ESTIMATES |= {"intervals": {"em": [40.0, 60.0], "f1": [50, 70.0], "accuracy": None}}
MASKED = {"run": RUN, "round": "false", "k": "50%", "masked": "topk", "mean_k": 6.4, "population": "0f"} | ESTIMATES
MASKED |= {"clean": ESTIMATES, "drop": ESTIMATES}
UNMASKED = {"run": RUN, "round": "baseline", "k": None, "all": ESTIMATES, "population": "0f"} | ESTIMATES
UNMASKED |= {"population_all": "1f"}


def with_entry(**changed):
    """Results whose second entry is changed."""
    return json.dumps([UNMASKED, MASKED | changed])


def without(name, values=MASKED):
    return {other: value for other, value in values.items() if other != name}


RESULTS = {
    "empty": ("", "is not JSON"),
    "no json": ("[", "is not JSON"),
    "not utf-8": (b"\xff", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "an object": ("{}", "is not a file of results"),
    "a list of numbers": ("[1]", "entry 1 is damaged, or of another version (Input should be an object)"),
    "no run": (json.dumps([without("run")]), "entry 1 is damaged, or of another version (run: Field required)"),
    "run a number": (with_entry(run=3), "entry 2 is damaged, or of another version (run: Input should be an object)"),
    "no ranking": (with_entry(run=without("ranking", RUN)), "entry 2 is damaged, or of another version (run: names no"),
    "no round": (json.dumps([without("round")]), "version (round: Field required)"),
    "round a number": (with_entry(round=2), "version (round: Input should be a valid string)"),
    "half a character": (with_entry(round="\ud800"), "version (round: 'utf-8' codec can't encode"),
    "no population": (json.dumps([without("population")]), "version (population: Field required)"),
    "no n": (json.dumps([without("n")]), "version (n: Field required)"),
    "n a text": (with_entry(n="5"), "version (n: Input should be a valid integer)"),
    "no em": (json.dumps([without("em")]), "version (em: Field required)"),
    "em a text": (with_entry(em="50"), "version (em: Input should be a valid number)"),
    "f1 a list": (with_entry(f1=[60.0]), "version (f1: Input should be a valid number)"),
    "accuracy true": (with_entry(accuracy=True), "version (accuracy: Input should be a valid number)"),
    "no intervals": (json.dumps([without("intervals")]), "version (intervals: Field required)"),
    "half an interval": (with_entry(intervals={"em": [1.0]}), "version (intervals.em: List should have at least 2"),
    "a side that is none": (with_entry(masked="top"), "version (masked: Input should be 'topk' or 'bottomk')"),
    "no drop": (json.dumps([without("drop")]), "version (drop: Field required)"),
    "another run's": (with_entry(run=RUN | {"model_digest": "0" * 64}), 'model "demo/model" (content 00000000)'),
}


def made(run=RUN, **changed):
    return Provenance(**run | changed)


def differ(run, wanted, fields=provenance.ALL):
    return provenance.differences(made(run), made(wanted), fields)


def depends_on(run):
    return provenance.depends_on(made(run))


def write_results(path, entries):
    files.write_results(path, [parse_entry(entry) for entry in entries])


def read_results(path, run, overwrite):
    return as_json(files.read_results_of(path, made(run), overwrite))


def as_json(stored):
    """What stands in a file, as json reads it."""
    return json.loads(schema.to_json(stored))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def assert_refused(read, path, says):
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert line.startswith(str(path)) and says in line and "\n" not in line
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_bad_activations(case, tmp_path):
    content, says = ACTIVATIONS[case]
    assert_refused(files.read_activations, write(tmp_path / "activations.json", content), says)


@pytest.mark.parametrize("case", JOURNALS)
def test_bad_journals(case, tmp_path):
    content, says = JOURNALS[case]
    assert_refused(lambda path: journal.Journal(path, Provenance()), write(tmp_path / "journal.jsonl", content), says)


@pytest.mark.parametrize("case", RESULTS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_bad_results(case, overwrite, tmp_path):
    content, says = RESULTS[case]
    path = write(tmp_path / "results.json", content)
    if case == "another run's" and overwrite:
        assert read_results(path, RUN, overwrite) == [UNMASKED]
    else:
        assert_refused(lambda path: read_results(path, RUN, overwrite), path, says)


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("model", "gemma-2-9b", 'model "google/gemma-2-9b", now "google/gemma-2-9b-it"'),
        ("sae_release", "other", 'sae_release "other", now "gemma-scope-9b-it-res-canonical"'),
        ("sae_id", "layer_20", 'sae_id "layer_20", now "layer_9/width_131k/canonical"'),
        ("hook_name", "blocks.2.hook_resid_post", "hook_name"),
        ("d_sae", 7, "d_sae 7, now 512"),
        ("dtype", "float16", 'dtype "float16", now "float32"'),
        ("sae_dtype", "tf32", 'sae_dtype "tf32", now "float32"'),
        ("error_term", "keep", 'error_term "keep", now "drop"'),
        ("exclude_special_tokens", True, "exclude_special_tokens true, now false"),
        ("questions", "0" * 64, "questions 00000000, now 044a8f20"),
        ("prompt_template", "{context}{question}", 'prompt_template "{context}{question}", now "<start_of_turn>user'),
        ("max_new_tokens", 12, "max_new_tokens 12, now 50"),
    ],
)
def test_another_run(field, value, says, tmp_path):
    """Each setting makes another run, of activations as of results.json's entries."""
    assert field in provenance.SETTINGS
    assert differ(HUB | {field: value}, HUB, provenance.SETTINGS).startswith(says)
    path = tmp_path / "results.json"
    of_hub, other = MASKED | {"run": HUB}, MASKED | {"run": HUB | {field: value}}
    write_results(path, [of_hub, other])
    line = f"{path}: is of another run ({says}"
    with pytest.raises(UserError, match=re.escape(line) + ".*repeat its options, or give --output-dir or --over"):
        read_results(path, HUB, False)
    assert read_results(path, HUB, True) == [of_hub]


def test_every_setting_is_tested():
    (cases,) = (mark.args[1] for mark in test_another_run.pytestmark if mark.name == "parametrize")
    assert [field for field, *_ in cases] == list(provenance.SETTINGS)


def test_same_run(tmp_path):
    """What is only for readers, what older files lack, and what the SAE has yet to say make no other run."""
    assert not differ(RUN | {"device": "cuda", "batch_tokens": 1, "versions": {}}, RUN)
    older = without("error_term", RUN)
    assert not differ(older, RUN)
    assert differ(older, RUN | {"error_term": "keep"}) == 'error_term "drop", now "keep"'
    early = {name: value for name, value in RUN.items() if name not in ("hook_name", "d_sae")}
    assert not differ(RUN, early) and not differ(early, RUN)
    assert not differ(RUN, RUN | {"ranking_seed": 7})
    assert differ(RUN | {"ranking_seed": 7}, RUN | {"ranking_seed": 42}) == "ranking_seed 7, now 42"
    assert differ(RUN | {"limit": 7}, RUN) == "limit 7, now none"
    # Other rankings stand in the same results.json.
    entries = [UNMASKED, MASKED | {"run": RUN | {"ranking": "gradsae"}}]
    write_results(tmp_path / "results.json", entries)
    assert read_results(tmp_path / "results.json", RUN, False) == entries


def test_a_run_goes_by_content_and_not_by_spelling():
    """Of folders, of models' names on the Hub, and of data sets; zero ablation and mean ablation are two runs."""
    spelled = RUN | {"model": "./demo/model/", "sae_release": "demo", "sae_id": "sae", "dataset": "d.jsonl"}
    spelled |= {"split": "train"}
    assert depends_on(spelled) == depends_on(RUN)
    assert depends_on(HUB | {"model": "google/gemma-2-9b-it"}) == depends_on(HUB) != depends_on(RUN)
    for digest, name in (("model_digest", "model"), ("sae_digest", "sae_release")):
        other = RUN | {digest: "0" * 64}
        says = f'{name} "{RUN[name]}" (content 00000000), now "{RUN[name]}" (content {RUN[digest][:8]})'
        assert differ(other, RUN) == says
    older = RUN | {"masked": "topk"}
    assert differ(older, older | {"ablation": "zero"}) == ""
    assert differ(older, older | {"ablation": "mean"}) == 'ablation "zero", now "mean"'


def test_digest_of_a_folder(tmp_path):
    """Of what a round reads there, whatever the folder is called; not of what somebody has it write there."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("cfg.json", "sae_weights.safetensors"):
            write(tmp_path / name / file, file)
    digest = provenance.digest_folder(tmp_path / "a")
    assert digest == provenance.digest_folder(tmp_path / "b")
    for file in ("results.json", "activations_baseline.json", "means.json", "README.md", "predictions_false.jsonl"):
        write(tmp_path / "b" / file, "")
    assert digest == provenance.digest_folder(tmp_path / "b")
    for file in (
        "cfg.json",
        "tokenizer.json",
        "model-1-of-2.safetensors",
        "generation_config.json",
        "vocab.txt",
    ):
        write(tmp_path / "b" / file, "changed")
        assert digest != (digest := provenance.digest_folder(tmp_path / "b"))


@pytest.mark.parametrize("field, value", [("limit", 5), ("sample", 5), ("seed", 7), ("ranking_seed", 7)])
def test_results_of_other_selections_stand_side_by_side(field, value, tmp_path):
    write_results(tmp_path / "results.json", [MASKED | {"run": RUN | {field: value}}])
    (entry,) = read_results(tmp_path / "results.json", RUN | {"ranking_seed": 42}, False)
    assert entry["run"][field] == value


def test_activations_come_back(tmp_path):
    """All fields, numbers and order, unknown fields too; a generator will do; a line for each question."""
    full = SAMPLE | {"id": "字 2", "tokens": [3, 4], "log_probs": [-0.1, float("-inf")], "removed_topk": [0.1 + 0.2]}
    full |= {"removed_bottomk": [0.0]}
    unknown = {"fields": 1, "_names": 2, "model_extra": 3, "provenance": 4, "run": {"x": 5}}
    samples, run = [unknown | full, SAMPLE], unknown | RUN | {"ranking_seed": 7}
    stored = Provenance.model_validate(run), [schema.RankedQuestion.model_validate(sample) for sample in samples]
    path = tmp_path / "new" / "activations.json"
    files.write_activations(path, stored[0], iter(stored[1]))
    assert files.read_activations(path) == stored
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written["run"].items()) == list(run.items())
    assert [list(sample.items()) for sample in written["samples"]] == [list(sample.items()) for sample in samples]
    assert path.read_text(encoding="utf-8").count("\n") == 2 + len(samples) + 1 and "字" in path.read_text()
    first = path.read_bytes()
    files.write_activations(path, *files.read_activations(path))
    assert path.read_bytes() == first


def test_shipped_activations(tmp_path):
    """The file reads, and is written again to the same bytes."""
    run, ranked = files.read_activations(SHIPPED)
    assert run == made() and len(ranked) == run.kept == 595
    first = ranked[0]
    assert (first.id, first.answer, first.em) == ("questions-000-0", "Voham", 1.0)
    assert first.active == [4, 8, 42, 83, 125, 147, 195, 206, 209, 347, 400, 469, 503]
    assert first.topk[:6] == [492, 358, 310, 4, 117, 312]
    assert first.bottomk[:6] == [259, 224, 60, 172, 288, 130]
    files.write_activations(tmp_path / "again.json", run, ranked)
    assert (tmp_path / "again.json").read_bytes() == SHIPPED.read_bytes()


def test_the_authors_file(tmp_path):
    """Their form: no run; empty objects in between are nothing; the same prompt may stand twice."""
    path = write(
        tmp_path / "theirs.json", json.dumps([{}, {"p": THEIRS}, {}, {"q": THEIRS, "r": THEIRS}, {"p": THEIRS}])
    )
    run, ranked = files.read_activations(path)
    assert run is None
    assert as_json(ranked) == [{"prompt": p, "active": [1, 2], "topk": [1], "bottomk": [2]} for p in "pqrp"]


def test_no_activations(tmp_path):
    with pytest.raises(UserError, match="none.json: cannot be read .No such file"):
        files.read_activations(tmp_path / "none.json")
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be read"):
        files.read_activations(tmp_path)


def test_digest():
    """It hangs on all that a masked round uses, on the order of latents, and on which questions; on nothing else."""

    def find_digest(samples, side, ids):
        ranked = {name: schema.RankedQuestion(**sample) for name, sample in samples.items()}
        return provenance.digest_ranked(ranked, side, ids)

    samples = {"1": FULL, "2": FULL | {"id": "2", "topk": [3, 4], "removed_topk": [0.1, 0.2]}}
    digest = find_digest(samples, "topk", ["1", "2"])
    assert re.fullmatch("[0-9a-f]{64}", digest)
    same = {name: sample | {"bottomk": [9], "removed_bottomk": [0.5], "x": 1} for name, sample in samples.items()}
    assert digest == find_digest(same | {"3": FULL}, "topk", ["1", "2", "4"])
    others = [samples["2"] | {"topk": [4, 3]}, FULL | {"active": [1]}, FULL | {"tokens": [7]}, FULL | {"inside": [1]}]
    others += [FULL | {"removed_topk": [0.5]}, FULL | {"target_topk": [0.5]}, FULL | {"log_probs": [-1.0]}]
    others = [find_digest(samples | {"2": other}, "topk", ["1", "2"]) for other in others]
    others += [find_digest(samples, "topk", ids) for ids in (["1"], ["2", "1"])]
    others += [find_digest(samples, "bottomk", ["1", "2"])]
    assert len({digest, *others}) == 1 + len(others)


def test_results_come_back(tmp_path):
    path = tmp_path / "new" / "results.json"
    assert read_results(path, RUN, False) == []
    entries = [UNMASKED, MASKED, MASKED | {"k": "0", "clean": None, "drop": None, "missing": ["字"]}]
    write_results(path, entries)
    assert read_results(path, RUN, False) == read_results(path, RUN, True) == entries
    assert "字" in path.read_text(encoding="utf-8")


def test_whole_or_absent(tmp_path, monkeypatch):
    """Whatever ends the writing, the old file stays as it is, and nothing is left beside it."""
    path = write(tmp_path / "file", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error):
            with files.write_whole(path) as file:
                file.write("half")
                raise error
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: full(0))
            with pytest.raises(UserError, match=f"{path}: cannot be written .No space left on device"):
                with files.write_whole(path, "wb") as file:
                    file.write(b"half")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.write_whole(path) as file:
        file.write("new\n")
        assert path.read_text() == "old"
    assert path.read_bytes() == b"new\n" and list(tmp_path.iterdir()) == [path]


def test_folder(tmp_path):
    with files.lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    write(tmp_path / "file", "")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written"):
            files.write_results(path / "results.json", [])
        with pytest.raises(UserError, match=f"{path}: cannot be written"):
            files.lock(path)


# --- any file at all --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = ["id", "context", "question", "answers", "text", "data", "paragraphs", "qas", "is_impossible", "run", "samples"]
KEYS += ["answer", "em", "f1", "accuracy", "named", "active", "topk", "bottomk", "tokens", "log_probs", "inside"]
KEYS += ["original", "have_gradient", "no_gradient", "round", "k", "demo", "model", "ranking", "n", "intervals"]
KEYS += ["masked", "mean_k", "clean", "drop", "all", "removed_topk"]
NEAR = st.recursive(  # JSON made of the very names that the readers look for
    JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=8),
    max_leaves=20,
)
VALID = (SAMPLE, RECORD | LATENTS, MASKED, UNMASKED, ESTIMATES, {"run": {}}, {"run": {}, "samples": [SAMPLE]}, THEIRS)
CHANGED = st.builds(  # what a round writes, with a field replaced
    lambda entry, name, value: entry | {name: value}, st.sampled_from(VALID), st.sampled_from(KEYS), NEAR
)
SAMPLES = CHANGED.map(lambda entry: {"run": {}, "samples": [entry]})
VALUES = NEAR | CHANGED | SAMPLES | st.lists(CHANGED, max_size=2)
CONTENT = (
    st.binary(max_size=200)
    | VALUES.map(lambda value: json.dumps(value).encode())
    | st.lists(VALUES, max_size=4).map(
        lambda values: b"\n".join(json.dumps(value).encode() for value in values) + b"\n"
    )
    | st.lists(VALUES, max_size=4).map(
        lambda values: b"\n".join(json.dumps(value).encode() for value in [{"run": {}}, *values]) + b"\n"
    )
)
READERS = {
    "d.json": lambda path: questions.load(str(path), ""),
    "d.jsonl": lambda path: questions.load(str(path), ""),
    "activations.json": files.read_activations,
    "journal.jsonl": lambda path: journal.Journal(path, Provenance()).finish([]),
    "results.json": lambda path: read_results(path, RUN, True),
}


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENT)
def test_readers_raise_nothing_else(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    try:
        READERS[name](tmp_path / name)
    except UserError as error:
        assert str(tmp_path / name) in str(error)
