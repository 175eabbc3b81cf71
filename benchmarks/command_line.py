"""What was asked for on the command line."""

import argparse
from dataclasses import dataclass

from workloads import SHAPES

from experiment import options

SIZES = {  # questions, those of the naive loop, and tokens in a batch, where not asked for
    None: (640, 24, 16384),  # the demo
    "gemma-2-9b-it": (640, 8, 32768),
    "gemma-3-270m": (32, 4, 4096),
    "tiny": (12, 2, 1024),
    "narrow": (80, 4, 4096),
}


@dataclass(frozen=True)
class Asked:
    """shape: of a random model, a name of SHAPES; None: the demo.  width: latents of its SAE; None: the shape's own.
    naive_questions: how many of the questions the naive loop answers.  batch_tokens: padding included."""

    shape: str | None
    width: int | None
    device: str
    dtype: str
    sae_dtype: str
    compare_sae_dtypes: tuple[str, ...]
    questions: int
    naive_questions: int
    repeats: int
    batch_tokens: int

    def options(self, sae_dtype: str | None = None) -> options.Options:
        """Those of a round on this device, in these precisions. Raises UserError where there is no TF32."""
        arguments = ["--demo", "--limit", str(self.questions)]
        arguments += ["--device", self.device, "--dtype", self.dtype, "--sae-dtype", sae_dtype or self.sae_dtype]
        return options.parse(arguments, "", masks=None)


def parse(doc: str | None) -> Asked:
    """The command line. doc: the script's, for --help. Raises UserError for a precision that the device lacks."""
    parser = _build_parser(doc)
    given = parser.parse_args()
    if given.compare_sae_dtypes and given.sae_dtype != "float32":
        parser.error("--compare-sae-dtypes: the others are compared with --sae-dtype float32")
    questions, naive_questions, batch_tokens = SIZES[given.shape]
    on_cuda = given.device.startswith("cuda")
    questions = given.questions or questions
    naive_questions = given.naive_questions or naive_questions
    asked = Asked(
        shape=given.shape,
        width=given.width,
        device=given.device,
        dtype=given.dtype or ("float16" if on_cuda else "float32"),
        sae_dtype=given.sae_dtype,
        compare_sae_dtypes=tuple(given.compare_sae_dtypes),
        questions=questions,
        naive_questions=min(naive_questions, questions),
        repeats=given.repeats,
        batch_tokens=given.batch_tokens or batch_tokens,
    )
    for sae_dtype in (asked.sae_dtype, *asked.compare_sae_dtypes):
        asked.options(sae_dtype)
    return asked


def _build_parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--demo", action="store_true", help="the bundled model, SAE and questions")
    what.add_argument("--shape", choices=tuple(SHAPES), help="random weights in this shape")
    parser.add_argument("--width", type=int, help="latents of a shape's SAE (default: the shape's own)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=options.FLOATS, help="(default: float32; on CUDA float16)")
    parser.add_argument("--sae-dtype", choices=(*options.FLOATS, "tf32"), default="float32")
    parser.add_argument("--compare-sae-dtypes", nargs="+", choices=("float16", "bfloat16", "tf32"), default=[])
    parser.add_argument("--questions", type=int)
    parser.add_argument("--naive-questions", type=int, help="of these, for the naive loop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int)
    return parser
