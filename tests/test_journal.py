"""Journals: whatever ends the processes that write one, going on gives the same bytes; nothing is lost or mixed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiment import UserError
from experiment.records import files, journal, schema
from experiment.records.schema import Provenance

ROOT = Path(__file__).resolve().parent.parent
NAME = "predictions_baseline.jsonl"
RUN = {"model": "m", "dtype": "float32", "limit": 6, "prompt_template": "{context} {question}\n"}
LATE = {"hook_name": "blocks.1.hook_resid_post", "d_sae": 512}
SCORES = {"em": 1.0, "f1": 1.0, "accuracy": 1.0, "named": 1.0}
LATENTS = {"topk": [7, 3], "bottomk": [9], "removed_topk": [0.25, 0.5], "removed_bottomk": [0.0]}


def make_record(number):
    record = {"id": f"q{number}", "text": f" Über {number} 字]]\n", "answer": f"Über {number}"} | SCORES
    if number % 2:
        record |= {"tokens": [5, number], "log_probs": [-0.1], "active": [1, 3], "inside": []} | LATENTS
    return record


LINES = [make_record(number) for number in range(6)]
RECORDS = [schema.parse_record(line) for line in LINES]
IDS = [record.id for record in RECORDS]


def open_journal(folder, process=0, run=RUN, **options):
    return journal.Journal(folder / NAME, Provenance(**run), process, **options)


def write_uninterrupted(folder, run=RUN):
    """The bytes of a round that one process writes in batches of 2."""
    opened = open_journal(folder, run=run)
    for start in range(0, len(RECORDS), 2):
        opened.append(RECORDS[start : start + 2])
    opened.finish(IDS)
    return (folder / NAME).read_bytes()


def go_on(folder, processes=1, **options):
    """Appends what is missing, every n-th record by each of `processes` processes, and finishes."""
    opened = [open_journal(folder, process, **options) for process in range(processes)]
    missing = [record for record in RECORDS if record.id not in opened[0]]
    for process in range(processes):
        opened[process].append(missing[process::processes])
    opened[0].finish(IDS)
    return opened


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_uninterrupted(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def fast_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def full_disk(monkeypatch):
    """Switches on and off that nothing can be synced."""

    def switch(full):
        if full:
            monkeypatch.setattr(os, "fsync", fail)
        else:
            monkeypatch.undo()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    return switch


def test_file(tmp_path, whole):
    """What is in the file, and what a journal knows of it."""
    lines = whole.decode().splitlines()
    assert [json.loads(line) for line in lines] == [{"run": RUN}, *LINES]
    assert "Über" in lines[1]
    (tmp_path / NAME).write_bytes(whole)
    opened = open_journal(tmp_path)
    assert len(opened) == 6 and "q3" in opened and "q6" not in opened
    assert opened["q3"] == RECORDS[3] and opened == dict(zip(IDS, RECORDS))
    assert opened.provenance == Provenance(**RUN)


def test_every_cut(tmp_path, whole, capsys, fast_disk):
    """Cut off after any byte: what was whole is kept, the rest is asked again, and the end is the same."""
    ends = [0]
    for line in whole.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    for cut in range(len(whole) + 1):
        (tmp_path / NAME).write_bytes(whole[:cut])
        if cut < ends[1]:  # never seen: the file appears with its first batch
            with pytest.raises(UserError, match="line 1: is damaged"):
                open_journal(tmp_path)
            go_on(tmp_path, overwrite=True)
        else:
            capsys.readouterr()
            opened = open_journal(tmp_path)
            assert len(opened) == sum(end <= cut for end in ends[2:])
            assert (tmp_path / NAME).read_bytes() == whole[:cut]  # opening alone changes nothing
            assert ("its last line was cut off" in capsys.readouterr().err) == (cut not in ends)
            go_on(tmp_path)
        assert contents(tmp_path) == {NAME: whole}, cut


def test_every_cut_of_a_part(tmp_path, whole, fast_disk):
    """The same for a part of process 1 of 2, gone on with by one process, by two and by three."""
    part = "predictions_baseline.part1.jsonl"
    first, second = (open_journal(tmp_path, process) for process in range(2))
    first.append(RECORDS[4:])
    second.append(RECORDS[:2])
    files = contents(tmp_path)
    run_line = files[part].index(b"\n") + 1
    for cut in range(run_line, len(files[part]) + 1):
        (tmp_path / NAME).write_bytes(files[NAME])
        (tmp_path / part).write_bytes(files[part][:cut])
        assert open_journal(tmp_path).keys() >= {"q4", "q5"}
        go_on(tmp_path, processes=1 + cut % 3)
        assert contents(tmp_path) == {NAME: whole}, cut


@pytest.mark.parametrize("processes", [2, 3, 12])
def test_several_processes(tmp_path, whole, processes):
    """The file of one; process 0 then knows what all wrote. Twelve: most have nothing to do."""
    opened = go_on(tmp_path, processes)
    assert contents(tmp_path) == {NAME: whole}
    assert list(opened[0]) == IDS and list(opened[0].values()) == RECORDS and opened[0].provenance == Provenance(**RUN)


def test_other_number_of_processes(tmp_path, whole):
    """Three were killed, two go on and are killed, one ends it; each sees what all before it wrote."""
    for number, process in enumerate([0, 2, 2, 1]):
        open_journal(tmp_path, process).append([RECORDS[number]])
    parts = {f"predictions_baseline.part{process}.jsonl" for process in (1, 2)}
    assert contents(tmp_path).keys() == {NAME, *parts}
    for process in range(2):
        opened = open_journal(tmp_path, process)
        assert len(opened) == 4 + process
        opened.append([RECORDS[4 + process]])
    go_on(tmp_path)
    assert contents(tmp_path) == {NAME: whole}


@pytest.mark.parametrize("done", [5, 6])
def test_only_parts(tmp_path, done):
    """Process 0 was killed before its first batch: it goes on with what the others wrote, their run included."""
    part = open_journal(tmp_path, 1)
    part.provenance = part.provenance.with_fields(**LATE)  # known once the SAE is loaded
    assert not RUN.keys() & LATE.keys()
    part.append(RECORDS[:done])
    opened = open_journal(tmp_path)
    assert opened.provenance == Provenance(**RUN | LATE) and len(opened) == done
    opened.append(RECORDS[done:])
    opened.finish(IDS)
    found = contents(tmp_path)
    assert found == {NAME: write_uninterrupted(tmp_path, RUN | LATE)}


def test_once_each(tmp_path, whole):
    """A record that is there is not written again, in whatever file it is; one in two files counts once."""
    opened = open_journal(tmp_path)
    opened.append(RECORDS[:2])
    opened.append([RECORDS[1].with_fields(answer="other"), RECORDS[2], RECORDS[2]])
    assert (tmp_path / NAME).read_bytes().count(b"\n") == 4 and opened["q1"] == RECORDS[1]
    part = open_journal(tmp_path, 1)
    part.append(RECORDS[:2])
    assert list(contents(tmp_path)) == [NAME]
    part.clear()
    part.append([RECORDS[0].with_fields(answer="other")])
    opened = open_journal(tmp_path)
    assert len(opened) == 3 and opened["q0"] == RECORDS[0]
    go_on(tmp_path)
    assert contents(tmp_path) == {NAME: whole}


def test_synced_once_a_batch(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    opened = open_journal(tmp_path)
    opened.append([])
    assert not synced and not contents(tmp_path)
    opened.append(RECORDS[:3])
    assert len(synced) == 1
    opened.append(RECORDS[3:])
    assert len(synced) == 2
    opened.append(RECORDS)
    assert len(synced) == 2


def test_finished_file_is_left_alone(tmp_path, whole):
    """Where a process was killed between the move into place and the removal of the parts, it has the same bytes."""
    (tmp_path / NAME).write_bytes(whole)
    before = (tmp_path / NAME).stat().st_ino
    open_journal(tmp_path).finish(IDS)
    assert (tmp_path / NAME).stat().st_ino == before
    part = open_journal(tmp_path, 1)
    part.clear()
    part.append(RECORDS[:2])
    (tmp_path / "predictions_baseline.part2.jsonl.part").write_bytes(b"left when process 2 was killed")
    open_journal(tmp_path).finish(IDS)
    assert contents(tmp_path) == {NAME: whole}


def test_parts_of_another_journal(tmp_path):
    """A name that begins with the name of another journal is not a part of it."""
    other = journal.Journal(tmp_path / "predictions_baseline_k10.jsonl", Provenance(**RUN, k="10"), process=1)
    other.append(RECORDS)
    opened = open_journal(tmp_path)
    assert len(opened) == 0
    open_journal(tmp_path, overwrite=True)
    assert list(contents(tmp_path)) == ["predictions_baseline_k10.part1.jsonl"]


def test_a_record_is_missing(tmp_path):
    """An end that is none is refused, and loses nothing."""
    for process in range(2):
        open_journal(tmp_path, process).append([RECORDS[process]])
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"predictions_baseline\.jsonl: lacks 4 records \('q2'\)"):
        open_journal(tmp_path).finish(IDS)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"model": "other"}, 'model "m", now "other"'),
        ({"limit": 7}, "limit 6, now 7"),
        ({"dtype": "float16"}, 'dtype "float32", now "float16"'),
        ({"error_term": "keep"}, 'error_term "drop", now "keep"'),
        ({"d_sae": 7}, "d_sae 512, now 7"),
        ({"model": "other", "demo": False}, 'model "m", now "other"'),
    ],
)
@pytest.mark.parametrize("process", [0, 1])
def test_another_run(tmp_path, process, changed, says):
    """Refused, the file of process 0 as well as a part; a demo run's files do not make way either."""
    open_journal(tmp_path, process, RUN | LATE | {"demo": True}).append(RECORDS)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="--output-dir or --overwrite") as caught:
        open_journal(tmp_path, run=RUN | LATE | changed)
    assert str(caught.value).startswith(f"{tmp_path / next(iter(before))}: is of another run ({says})")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "field, one, two",
    [
        *((field, 7, 8) for field in ("limit", "sample", "seed", "ranking_seed")),
        ("masked", "topk", "bottomk"),
        ("k", "7", "8"),
        ("activations", "0f", "1f"),
    ],
)
def test_another_selection(tmp_path, field, one, two):
    """What need not agree where a file of activations is read makes another journal."""
    open_journal(tmp_path, run=RUN | {field: one}).append(RECORDS)
    says = f"is of another run .{field} {json.dumps(one)}, now {json.dumps(two)}"
    with pytest.raises(UserError, match=says):
        open_journal(tmp_path, run=RUN | {field: two})


def test_same_run(tmp_path):
    """What is only for readers may differ, and what the SAE says may be unknown yet. The file's run stays."""
    found = RUN | LATE | {"versions": {"torch": "1"}, "device": "cpu"}
    before = write_uninterrupted(tmp_path, found)
    opened = open_journal(tmp_path, run=RUN | {"device": "cuda", "error_term": "drop"})
    assert opened.provenance == Provenance(**found)
    opened.finish(IDS)
    assert contents(tmp_path) == {NAME: before}


def test_overwrite_keeps_the_old_file_until_the_first_batch(tmp_path, full_disk):
    old, new = write_uninterrupted(tmp_path), RUN | {"model": "new"}
    (tmp_path / "predictions_baseline.part3.jsonl").write_bytes(b"of an earlier run")
    opened = open_journal(tmp_path, run=new, overwrite=True)
    assert len(opened) == 0 and contents(tmp_path) == {NAME: old}
    full_disk(True)
    with pytest.raises(UserError, match=f"{NAME}: cannot be written .No space left on device"):
        opened.append(RECORDS[:2])
    assert len(opened) == 0 and contents(tmp_path) == {NAME: old}
    full_disk(False)
    opened.append(RECORDS[:2])
    assert (tmp_path / NAME).read_bytes() == old.splitlines(keepends=True)[0].replace(b'"m"', b'"new"') + b"".join(
        old.splitlines(keepends=True)[1:3]
    )
    go_on(tmp_path, run=new)
    assert contents(tmp_path) == {NAME: old.replace(b'"m"', b'"new"')}


@pytest.mark.parametrize("run", [RUN, RUN | {"model": "new"}])
def test_overwrite_where_process_0_has_nothing_to_do(tmp_path, run):
    """The old file's records do not come back where only another process had a batch."""
    write_uninterrupted(tmp_path)
    opened = [open_journal(tmp_path, process, run, overwrite=True) for process in range(2)]
    changed = [record.with_fields(answer="new") for record in RECORDS]
    opened[1].append(changed)
    assert opened[0].finish(IDS) == changed
    assert b"new" in (tmp_path / NAME).read_bytes() and len(contents(tmp_path)) == 1


def test_full_disk(tmp_path, whole, full_disk):
    """A batch that could not be synced is not there, in memory as on disk; the same journal can go on."""
    opened = open_journal(tmp_path)
    opened.append(RECORDS[:2])
    full_disk(True)
    with pytest.raises(UserError, match=f"{NAME}: cannot be written .No space left on device"):
        opened.append(RECORDS[3:])
    assert len(opened) == 2
    full_disk(False)
    opened.append(RECORDS[2:3])
    assert (tmp_path / NAME).read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    opened.append(RECORDS[3:])
    full_disk(True)
    opened.finish(IDS)  # there is nothing to write
    assert contents(tmp_path) == {NAME: whole}


def test_full_disk_at_the_end(tmp_path, whole, full_disk):
    """Where the parts cannot be joined, they stay."""
    opened = [open_journal(tmp_path, process) for process in range(2)]
    opened[0].append(RECORDS[3:])
    opened[1].append(RECORDS[:3])
    before = contents(tmp_path)
    full_disk(True)
    with pytest.raises(UserError, match="cannot be written"):
        opened[0].finish(IDS)
    assert contents(tmp_path) == before
    full_disk(False)
    go_on(tmp_path)
    assert contents(tmp_path) == {NAME: whole}


def test_folder_in_the_way(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(UserError, match=f"{NAME}: cannot be read"):
        open_journal(tmp_path)


WRITER = """
import sys
from pathlib import Path
from experiment.records import journal, schema
opened = journal.Journal(Path(sys.argv[1]), schema.Provenance(model="m"))
scores = dict.fromkeys(("em", "f1", "accuracy", "named"), 1.0)
for number in range(10**9):
    opened.append([schema.Record(id=str(number), text="t" * 10_000, answer="a", **scores)])
    print(number, flush=True)
"""


def test_killed(tmp_path):
    """What append() returned from is there after a kill."""
    command = [sys.executable, "-c", WRITER, tmp_path / NAME]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        told = [int(writer.stdout.readline()) for _ in range(20)]
        os.kill(writer.pid, signal.SIGKILL)
        told += map(int, writer.stdout.read().split())
    opened = open_journal(tmp_path, run={"model": "m"})
    assert len(told) <= len(opened) <= len(told) + 1
    opened.finish([str(number) for number in range(len(opened))])
    assert len(open_journal(tmp_path, run={"model": "m"})) == len(opened)


def test_two_locks(tmp_path):
    """A second writer is refused while the first one lives, in this process or another, and not after."""
    with files.lock(tmp_path):
        with pytest.raises(UserError, match=f"{tmp_path}: another round is writing here"):
            files.lock(tmp_path)
    hold = "import sys, time\nfrom experiment.records import files\nheld = files.lock(sys.argv[1])\n"
    hold += "print(flush=True)\ntime.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(UserError, match="another round is writing here"):
            files.lock(tmp_path)
        holder.kill()
    with files.lock(tmp_path):
        pass
