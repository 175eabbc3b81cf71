"""Round 1: answer, keep the right ones, rank their latents.

    python baseline.py --demo                # the bundled model, on the CPU
    python baseline.py                       # gemma-2-9b-it, on a CUDA GPU
    python baseline.py --ranking gradsae     # the same answers, latents ranked by GradSAE's score

Every question is answered with the residual stream at one layer replaced by an SAE's reconstruction. For each question
answered right, the TopK and BottomK latents by mean activation go to activations_baseline.json.
"""

import sys

import common


def main():
    options = common.parse_options(None, __doc__, masks=False)
    from experiment import rounds  # brings in torch: only once the options are known to be good

    rounds.rank(options)


if __name__ == "__main__":
    sys.exit(common.guard(main))
