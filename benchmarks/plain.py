"""Plain Transformers, without an SAE. All of this runs in a process of its own, in which there is no TransformerLens,
which changes Gemma 2's attention. What a call has loaded stays there for the next one."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import workloads
from command_line import Asked
from measures import Passes, count_passes, measure, measure_step
from transformers import PreTrainedModel

import common
from experiment.demo import bundled
from experiment.hub import prepare_libraries
from experiment.intervention import layout, plan


@dataclass(frozen=True)
class Loaded:
    """A Transformers model, and the prompts that it answers."""

    lm: PreTrainedModel
    prompts: list[list[int]]
    batches: list[list[int]]
    new_tokens: int

    def generate_all(self) -> None:
        for batch in self.batches:
            self.generate(batch)

    @torch.no_grad()
    def generate(self, batch: Sequence[int]) -> None:
        """Transformers alone: no SAE, no hooks, no shared prefixes. batch: numbers of prompts."""
        prompts = [self.prompts[number] for number in batch]
        ids, attention = layout.pad(prompts, self.lm.generation_config.pad_token_id, self.lm.device, "left")
        lm: Any = self.lm  # its class does not say that it generates
        lm.generate(input_ids=ids, attention_mask=attention, max_new_tokens=self.new_tokens)


@functools.cache
def load(asked: Asked) -> Loaded:
    """The model that the rounds have, without the SAE, and their prompts."""
    chosen = asked.options()
    prepare_libraries(chosen)
    tokenizer = common.load_tokenizer(chosen)
    dtype = getattr(torch, chosen.dtype)
    lm: PreTrainedModel
    if asked.shape is None:
        auto = transformers.AutoModelForCausalLM
        where = {"": asked.device}
        lm = auto.from_pretrained(bundled(chosen.model), dtype=dtype, attn_implementation="eager", device_map=where)
        prompts, _ = workloads.demo_prompts(chosen, tokenizer)
        new_tokens = chosen.max_new_tokens
        common.configure_generation(lm, tokenizer)
    else:
        lm = workloads.make_lm(workloads.SHAPES[asked.shape], asked.device, dtype)
        prompts, _ = workloads.make_prompts(asked.questions, lm.config.vocab_size)
        new_tokens = workloads.NEW_TOKENS
        common.configure_generation(lm, tokenizer)
        lm.generation_config.eos_token_id = [lm.config.vocab_size]  # nothing, as for ours
    lengths = [len(prompt) for prompt in prompts]
    batches = plan.plan_batches(lengths, asked.batch_tokens, range(len(prompts)))
    return Loaded(lm, prompts, batches, new_tokens)


def count_all(asked: Asked) -> Passes:
    """The forward passes of all answers; and a warm-up."""
    with count_passes(load(asked).lm) as passes:
        measure_all(asked)
    return passes


def measure_all(asked: Asked) -> tuple[float, float]:
    """Seconds, and peak memory in GB, of all answers."""
    return measure(load(asked).generate_all, asked.device)


def measure_step_of(asked: Asked, numbers: Sequence[int]) -> float:
    """CPU seconds of a step in which these questions are answered together."""
    loaded = load(asked)
    generate = functools.partial(loaded.generate, numbers)
    return measure_step(loaded.lm, generate)
