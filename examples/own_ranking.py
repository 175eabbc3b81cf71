"""A ranking of one's own: a function that scores the latents of a batch of kept questions.

    python baseline.py --demo --ranking baseline examples/own_ranking.py:by_answer
    python baseline_after_false.py --demo --ranking baseline examples/own_ranking.py:by_answer
    python baseline_after_true.py --demo --ranking baseline examples/own_ranking.py:by_answer

Tables and files name it by_answer. What this file holds is part of the run: once it has changed, round 1 is to be run
again.
"""

import torch

from experiment.intervention.forward import SplicedModel
from experiment.intervention.rankings import Scores, Sequences, mean


def by_answer(model: SplicedModel, sequences: Sequences, seed: int) -> Scores:
    """Mean activation over what was generated, up to the last [: scores [sequence, d_sae], the highest are TopK."""
    read = sequences.ranked  # what the SAE read in prompt and answer up to there, position by position
    prompt_lengths = torch.tensor([len(prompt) for prompt in sequences.prompts], device=read.rows.device)
    is_generated = read.columns >= prompt_lengths[read.rows]
    return mean(model, read, where=is_generated)
