"""Round 3: the questions of round 1 again, each with its BottomK latents masked. Expected: next to no change.

    python baseline_after_true.py --demo                                # the bundled model, on the CPU
    python baseline_after_true.py                                       # gemma-2-9b-it, on a CUDA GPU
    python baseline_after_true.py --ranking baseline gradsae --k 1 50%  # several masks, the model loaded once

Reads activations_baseline.json, which round 1 writes (the demo's ships with the project).
"""

import sys

from experiment import guard, options

if __name__ == "__main__":
    options.stop_at_mistakes(__doc__, masks="bottomk")  # before PyTorch is imported, which takes seconds

import common


def main() -> None:
    chosen = options.parse(None, __doc__, masks="bottomk")
    common.masked_round(chosen, "bottomk")


if __name__ == "__main__":
    sys.exit(guard(main))
