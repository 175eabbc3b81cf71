"""How many tokens are run at once, and which questions: decided by lengths and memory, before anything is run."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

ON_CPU = 4096  # tokens in a batch, where nobody says otherwise: some twenty questions, so that a kill loses little
BATCHES_PER_GROUP = 8  # on a device that waits for its steps: how many batches' rows may go on together
ROOM = 0.9  # of the memory that is free after loading: the rest is for fragments and workspaces
WAITING = 1.25  # times the cache: room for the steps, and rows as wide as the longest
LONG_PROMPT = 800  # tokens: as long as SQuAD's prompts get


@dataclass(frozen=True)
class Sizes:
    """In tokens.

    batch: in one batch.  pool: in the caches of answers that go on together.  Both with padding.  group: of the batches
    whose answers a journal gets at once, which is what a killed round loses at most.
    """

    batch: int
    pool: int
    group: int


def choose_sizes(
    device: torch.device,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    batch: int | None,
    pool: int | None,
) -> Sizes:
    """Sizes for a loaded model, those that are given as they are. batch, pool: in tokens; None: not given.

    On CUDA from what is free now. An 80 GB card has room for batches of 32,768 tokens and a pool of 65,536 beside
    gemma-2-9b-it and its SAE.
    """
    if device.type != "cuda":
        batch = batch or ON_CPU
        pool = pool or batch
        return Sizes(batch, pool, max(batch, pool))  # a group of one batch, unless a pool is asked for
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)  # of which PyTorch has what is not allocated at hand
    free -= torch.cuda.memory_allocated(device)
    batch, pool = share_memory(ROOM * free, config, dtype, batch, pool)
    group = max(pool, BATCHES_PER_GROUP * batch)
    return Sizes(batch, pool, group)


def share_memory(
    free: float,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    batch: int | None,
    pool: int | None,
) -> tuple[int, int]:
    """Tokens of a batch and of the pool that fit into so many bytes, those that are given as they are.

    A batch is 1,024 times a power of two; the pool is as many batches as there is room for beside one, and one at
    least: a step takes a GPU's host as long for a thousand rows as for one.
    """
    running, waiting = _bytes_per_token(config, dtype)
    if batch is None:
        batch = 1024
        while 2 * batch * (running + waiting) <= free:
            batch *= 2
    if pool is None:
        left = free - batch * running
        batches = int(left // (batch * waiting))
        pool = batch * max(1, batches)
    return batch, pool


def room_of(sizes: Sizes, config: PreTrainedConfig, dtype: torch.dtype) -> float:
    """The bytes that a batch and the pool take together: as much is free where answers are made and no cache is there
    any more. Of the sizes alone, so that a round that goes on finds the same."""
    running, waiting = _bytes_per_token(config, dtype)
    return sizes.batch * running + sizes.pool * waiting


def _bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[float, float]:
    """What a token takes in a batch under way, and in the pool."""
    cached = cache_bytes_per_token(config, dtype)
    running = cached + layer_bytes_per_token(config, dtype)
    waiting = cached * WAITING
    return running, waiting


@dataclass(frozen=True)
class Shape:
    """A model's layers, as its configuration has them. d_model, d_mlp, d_head: how many numbers a vector has."""

    layers: int
    heads: int
    key_value_heads: int
    d_model: int
    d_mlp: int
    d_head: int

    @classmethod
    def of_model(cls, config: PreTrainedConfig) -> "Shape":
        """Where a family's configuration does not say a size, the one that its models have by default."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        d_model = config.hidden_size
        return cls(
            layers=config.num_hidden_layers,
            heads=heads,
            key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            d_model=d_model,
            d_mlp=getattr(config, "intermediate_size", None) or 4 * d_model,
            d_head=getattr(config, "head_dim", None) or d_model // heads,
        )


def cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """What the keys and values of all layers take per token: 344 KB for gemma-2-9b-it in half precision."""
    shape = Shape.of_model(config)
    numbers = 2 * shape.layers * shape.key_value_heads * shape.d_head
    return numbers * dtype.itemsize


def layer_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """What one layer has in memory at once per token, about: 24 vectors of the residual stream, 3 of the MLP, and
    attention in the model's precision and in single precision."""
    shape = Shape.of_model(config)
    vectors = 24 * shape.d_model + 3 * shape.d_mlp
    bytes_per_score = dtype.itemsize + torch.float32.itemsize
    attention = shape.heads * LONG_PROMPT * bytes_per_score // 2
    return vectors * dtype.itemsize + attention


def graph_bytes_per_token(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    layers: int,
    width: int,
) -> int:
    """What a gradient's graph keeps per token of sequences of this width, over so many layers: at most, about.

    Per layer, what Gemma 2 keeps: four and a half vectors of the residual stream in single precision (its norms), three
    of the MLP, three of all heads, and attention's scores once in single precision and twice in the model's. Llama and
    Qwen keep three quarters of that.
    """
    shape = Shape.of_model(config)
    single = torch.float32.itemsize
    own = dtype.itemsize
    of_heads = shape.heads * shape.d_head
    norms = 4.5 * shape.d_model * single
    products = 3 * (shape.d_mlp + of_heads) * own
    scores = shape.heads * width * (single + 2 * own)
    in_a_layer = norms + products + scores
    return layers * int(in_a_layer)


def gradient_rows(room: float | None, rows: int, width: int, token_bytes: int) -> int:
    """How many rows of a batch, all of this width, have their gradients found at once.

    room: bytes that their graph may take; None: a sixteenth of the batch, for on its way back a token takes in every
    layer about 16 times what it takes in the cache.  token_bytes: as of graph_bytes_per_token.
    """
    if room is None:
        return math.ceil(rows / 16)
    row_bytes = width * token_bytes
    fits = int(room // row_bytes)
    return max(1, fits)


def plan_batches(
    lengths: Sequence[int],
    batch_tokens: int,
    contexts: Sequence[Hashable],
) -> list[list[int]]:
    """Groups of indices into `lengths` (tokens per prompt), longest first, each within the budget, padding included.

    contexts: for each prompt a key; prompts with the same one stay together, so that what they share is run once.
    A prompt longer than the budget gets a batch of its own. The plan depends on nothing but its arguments.
    """
    longest: dict[Hashable, int] = {}  # of each context
    first: dict[Hashable, int] = {}
    for index, key in enumerate(contexts):
        longest[key] = max(longest.get(key, 0), lengths[index])
        first.setdefault(key, index)

    def rank(index: int) -> tuple[int, int, int]:
        key = contexts[index]
        return -longest[key], first[key], -lengths[index]

    batches: list[list[int]] = []
    batch: list[int] = []
    width = 0  # of the batch
    for index in sorted(range(len(lengths)), key=rank):
        width = max(width, lengths[index])
        tokens = width * (len(batch) + 1)
        if not batch or tokens > batch_tokens:
            batch = []
            batches.append(batch)
            width = lengths[index]
        batch.append(index)
    return batches


def plan_groups(
    batches: list[list[int]],
    lengths: Sequence[int],
    group_tokens: int,
) -> list[list[list[int]]]:
    """Batches one after the other in groups, each within the budget, padding included, or a single batch."""
    groups: list[list[list[int]]] = []
    tokens = 0
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        size = len(batch) * longest
        if groups and tokens + size <= group_tokens:
            groups[-1].append(batch)
            tokens += size
        else:
            groups.append([batch])
            tokens = size
    return groups
