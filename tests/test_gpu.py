"""The default path on a CUDA device: `python -m pytest tests/test_gpu.py -s`. Without one, a small shape on the CPU."""

import sys

import pytest
import torch
from conftest import ROOT
from test_rounds import run_rounds

sys.path.insert(0, str(ROOT / "benchmarks"))

import throughput  # noqa: E402

from experiment import generation, latents  # noqa: E402

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
def test_demo_rounds_in_float16_on_cuda(tmp_path):
    found = run_rounds(tmp_path, "--device", "cuda", "--dtype", "float16")
    kept = sum("topk" in record for record in found["baseline"].values())
    assert kept >= 0.8 * len(found["baseline"])
    assert len(found["false"]) == len(found["true"]) == kept


@pytest.mark.parametrize(
    ("scale", "device", "dtype"),
    [(32, "cpu", "float32"), (32, "cpu", "float16"), pytest.param(1, "cuda", "float16", marks=needs_cuda)],
)
def test_gemma_shape(scale, device, dtype):
    """gemma-2-9b-it's shape (on the CPU: the same, smaller), random weights: generation, both rankings and masking."""
    config = throughput.shape_config(scale)
    model, sae, prompts, contexts, new_tokens = throughput.load_shape(config, device, dtype, 10, 131072 // scale)
    outputs, residuals = generation.answer(model, sae, prompts, new_tokens, contexts=contexts, keep_residuals=True)
    assert [len(output) for output in outputs] == [new_tokens] * len(prompts)
    assert residuals[0].dtype == getattr(torch, dtype) and sae.dtype == torch.float32
    rankings = [latents.rank(sae, residual) for residual in residuals]
    for ranking in rankings:
        assert 10 <= len(ranking["active"]) <= 2000
        assert len(ranking["topk"]) == len(ranking["bottomk"]) == len(ranking["active"]) // 2
    # GradSAE's ranking, a question at a time, as the scripts come down to where memory is short.
    for prompt, output in zip(prompts[:3], outputs):
        scores = latents.gradient_scores(model, sae, [prompt + output[:-1]], output[-1:])
        assert scores.isfinite().all() and (scores > 0).sum() > 10
    masked, _ = generation.answer(model, sae, prompts, new_tokens, [ranking["topk"] for ranking in rankings])
    assert masked != outputs
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"\npeak memory of the gemma-2-9b-it shape: {peak:.1f} GB on {torch.cuda.get_device_name()}")
        assert peak < 80
