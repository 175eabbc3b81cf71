"""Round 2: the questions of round 1 again, each with its TopK latents masked. Expected: a clear drop.

    python baseline_after_false.py --demo      # the bundled model, on the CPU
    python baseline_after_false.py             # gemma-2-9b-it, on a CUDA GPU

Reads activations_baseline.json, which round 1 writes (the demo's ships with the project).
"""

import sys

import common


def main():
    options = common.parse_options(None, __doc__, masks=True)
    from experiment import rounds  # brings in torch: only once the options are known to be good

    rounds.mask(options, "topk")


if __name__ == "__main__":
    sys.exit(common.guard(main))
