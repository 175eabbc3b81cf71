"""Peak memory and questions per second of rounds 1 and 2, with 2,000 questions and with 20,000: both should be flat.

    python benchmarks/memory.py

The demo's questions again and again under new ids, the scripts as they are, on the CPU (6 to 12 minutes on two cores).
What a run of a single question takes, which is Python, the libraries and the model, is subtracted.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = (1, 2000, 20000)
# glibc raises this by itself while a process runs, and then keeps freed memory: peaks of equal work differed by 90 MB.
FIXED = {"MALLOC_MMAP_THRESHOLD_": "1048576"}


def write_questions(path, count):
    lines = (ROOT / "demo" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            question = found[number % len(found)]
            file.write(json.dumps(question | {"id": f"{question['id']}-{number}"}) + "\n")


def measure(script, folder, questions):
    """Seconds and peak memory in MB of one script run as a process of its own."""
    arguments = [sys.executable, script, "--demo", "--dataset", str(questions), "--output-dir", str(folder)]
    quiet = os.open(os.devnull, os.O_WRONLY)
    start = time.perf_counter()
    files = [(os.POSIX_SPAWN_DUP2, quiet, descriptor) for descriptor in (1, 2)]
    process = os.posix_spawn(sys.executable, arguments, os.environ | FIXED, file_actions=files)
    _, status, usage = os.wait4(process, 0)
    if status:
        sys.exit(f"{script} failed: {' '.join(arguments)}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main():
    with tempfile.TemporaryDirectory() as folder:
        print("script                    questions  questions/s  peak MB  peak MB, less that of one question")
        for script in ("baseline.py", "baseline_after_false.py"):
            for size in SIZES:
                output = Path(folder) / str(size)
                output.mkdir(exist_ok=True)
                questions = output / "questions.jsonl"
                if not questions.exists():
                    write_questions(questions, size)
                seconds, peak = measure(str(ROOT / script), output, questions)
                if size == SIZES[0]:
                    seconds_of_one, peak_of_one = seconds, peak
                    continue
                rate = (size - 1) / (seconds - seconds_of_one)
                print(f"{script:25} {size:9}  {rate:11.1f}  {peak:7.0f}  {peak - peak_of_one:34.0f}", flush=True)


if __name__ == "__main__":
    main()
