"""The default path on a CUDA device: `python -m pytest tests/test_gpu.py -s`. Without one, a tiny shape on the CPU."""

import dataclasses
import itertools
import random
import sys

import pytest
import torch
from conftest import ROOT, options, read_journal
from test_rounds import run_rounds

from experiment.hub import prepare_libraries
from experiment.intervention import generate, plan, rankings, steps
from experiment.intervention.ablations import Ablation
from experiment.intervention.generate import Group

sys.path.insert(0, str(ROOT / "benchmarks"))

import workloads  # noqa: E402

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices")
SEVERAL_K = ("50%", "10", "1")


@needs_cuda
def test_demo_rounds_in_float16_on_cuda(tmp_path, monkeypatch, capsys):
    _, found = run_rounds(tmp_path, monkeypatch, capsys, "--device", "cuda", "--dtype", "float16")
    kept = sum("active" in record for record in found["baseline"].values())
    assert kept >= 0.8 * len(found["baseline"])
    assert len(found["false"]) == len(found["true"]) == kept


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_steps_are_recorded(dtype, monkeypatch, capsys):
    """What is replayed says what is run step by step, masked and not, and reads the same."""
    chosen = options("--device", "cuda", "--dtype", dtype, "--limit", "120")
    prepare_libraries(chosen)
    work = workloads.load_demo(chosen)
    assert work.model.can_record
    recorded = []
    record = steps.record
    monkeypatch.setattr(steps, "record", lambda step: recorded.append(record(step)) or recorded[-1])
    whole = [range(len(work.prompts))]
    rng = random.Random(1)
    lists = [sorted(rng.sample(range(512), 200)) for _ in work.prompts]
    seeds = [str(number) for number in whole[0]]
    masks = [Ablation(lists), Ablation(lists, seeds=seeds), Ablation(lists, keep_only=True)]
    group = Group(work.prompts, work.contexts, whole, [[5, 5]] * len(work.prompts), masks)

    def answer_all():
        masked = generate.answer_masked(work.model, group, work.limits)
        unmasked, read = generate.answer(work.model, group, work.limits)
        numbers = list(whole[0])
        in_order = read.select(numbers, [10**6] * len(numbers))
        return list(itertools.chain(*masked, unmasked)), rankings.mean(work.model, in_order)

    found, means = answer_all()
    assert len(recorded) >= 4 and "cannot be recorded" not in capsys.readouterr().err
    work.model.can_record = False
    expected, means_before = answer_all()
    same = sum(one.tokens == other.tokens for one, other in zip(found, expected, strict=True))
    if dtype == "float16":
        assert same >= 0.97 * len(found)
        return
    assert same == len(found)
    for one, other in zip(found, expected):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-3)
    torch.testing.assert_close(means, means_before, rtol=1e-3, atol=1e-4)


@needs_two
def test_gradient_rankings_on_several_gpus(tmp_path, monkeypatch, capsys):
    """Spread by the library, the layers above the SAE on another GPU than the SAE: as on one."""
    given = ("--limit", 30, "--ranking", "baseline", "gradsae", "gradsae-answer", "--device", "cuda")
    one, several = tmp_path / "one", tmp_path / "several"
    run_rounds(one, monkeypatch, capsys, *given)
    run_rounds(several, monkeypatch, capsys, *given, "--device-map", "auto")
    for name in ("gradsae", "gradsae-answer"):
        _, expected = read_journal(one / f"predictions_{name}.jsonl")
        _, found = read_journal(several / f"predictions_{name}.jsonl")
        for question_id, record in expected.items():
            assert found[question_id]["text"] == record["text"]
            assert found[question_id].get("topk", [])[:6] == record.get("topk", [])[:6]


@pytest.mark.parametrize(
    ("shape", "count", "batch_tokens", "device", "dtype"),
    [
        ("tiny", 10, 1024, "cpu", "float32"),
        ("tiny", 10, 1024, "cpu", "float16"),
        pytest.param("gemma-2-9b-it", 200, 32768, "cuda", "float16", marks=needs_cuda),
    ],
)
def test_rounds_of_a_random_model(shape, count, batch_tokens, device, dtype, capsys):
    """Round 1 with both rankings, TopK and BottomK masked with several K, more than one full batch; on the CPU in
    float32 some of the answers against the naive loop's."""
    chosen = options("--device", device, "--dtype", dtype)
    prepare_libraries(chosen)
    work = workloads.load_shape(workloads.SHAPES[shape], chosen, count)
    assert work.model.lm.dtype == getattr(torch, dtype) and work.model.splice.sae.dtype == torch.float32
    batches = plan.plan_batches([len(prompt) for prompt in work.prompts], batch_tokens, work.contexts)
    assert len(batches) > 1
    found = workloads.round_1(work, batches)
    assert_answered(work, found)
    for ranked in (found, workloads.round_1(work, batches, ("gradsae",))):
        for question in ranked:
            assert 2 <= question.active <= 2000
            for which in ("topk", "bottomk"):
                length = len(question.lists.latents(which))
                assert 20 <= length <= max(100, question.active // 2)
                assert all(0 <= removed < 100 for removed in question.lists.removed(which))  # 0: at BOS alone
    for which in ("topk", "bottomk"):
        for k, masked in zip(SEVERAL_K, workloads.masked_round(work, batches, found, which, SEVERAL_K), strict=True):
            assert_answered(work, masked, [question.latents(which, k) for question in found])
            assert which == "bottomk" or [a.tokens for a in masked] != [question.tokens for question in found]
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        out, err = capsys.readouterr()
        with capsys.disabled():
            print(f"\npeak memory of {shape}: {peak:.1f} GB on {torch.cuda.get_device_name()}")
        assert peak < 80 and "Out of memory" not in err


def test_made_in_place_is_as_loaded():
    """gemma-2-9b-it's random weights are not saved and loaded but made on the device: the same as those that are."""
    chosen, shape = options(), workloads.SHAPES["tiny"]
    prepare_libraries(chosen)
    found = []
    for saved in (True, False):
        work = workloads.load_shape(dataclasses.replace(shape, saved=saved), chosen, 5)
        assert not work.model.lm.config.output_attentions and not work.model.lm.generation_config.do_sample
        found.append(workloads.round_1(work, [range(5)]))
    assert found[0] == found[1]


def assert_answered(work, given, masked=None):
    """Answers of the length that all have; in float32 some of them are made again by the naive loop."""
    assert [len(answer.tokens) for answer in given] == [work.new_tokens] * len(work.prompts)
    if work.model.lm.dtype == torch.float32:
        numbers = range(0, len(given), 4)
        latents = [masked[i] if masked else [] for i in numbers]
        assert [given[i].tokens for i in numbers] == workloads.naive_loop(work, numbers, latents)
