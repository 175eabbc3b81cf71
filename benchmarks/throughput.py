"""Questions per second: the naive loop, plain Transformers without an SAE, our round 1 and our masked round.

    python benchmarks/throughput.py --demo                                     # the bundled model, on the CPU
    python benchmarks/throughput.py --shape gemma-2-9b-it --device cuda        # the real shape, random weights

The same questions in one run, so that the ratios hold on a shared machine too. With --shape nothing is downloaded: the
architecture of gemma-2-9b-it with random weights, a random JumpReLU SAE of width 131,072 whose threshold leaves about
120 latents active, prompts of SQuAD's length distribution, a fixed number of new tokens. Medians of --repeats runs
after a warm-up. Plain Transformers run in a process of their own: TransformerLens changes Gemma 2's attention for the
whole process.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NEW_TOKENS = 12  # with --shape: "Result = [[ ... ]]" and the end of the turn, around a short answer
QUESTIONS_A_CONTEXT = 5  # SQuAD's validation set has 10,570 questions on 2,067 contexts
SQUAD_QUESTIONS = 10_570


# ---------------------------------------------------------------------------------------------------------------------
# What is measured on: (model, SAE, prompts, context keys, new tokens)


def load_demo(options):
    """The bundled model and SAE; prompts of its questions."""
    import common
    from experiment import questions

    tokenizer = common.load_tokenizer(options)
    model, sae = common.load(options, tokenizer)
    return model, sae, *demo_prompts(options, tokenizer, questions, common), options.max_new_tokens


def demo_prompts(options, tokenizer, questions, common):
    found, *_ = questions.load(common.bundled(options.dataset), options.split)
    found = questions.select(found, options.limit)
    template = common.choose_template("auto", tokenizer)
    prompts = [common.tokenize(tokenizer, common.build_prompt(template, q.context, q.question)) for q in found]
    return prompts, [q.context for q in found]


def shape_config(scale):
    """gemma-2-9b-it's configuration; `scale` > 1 divides its sizes, to try this script on a small machine."""
    from transformers import Gemma2Config

    return Gemma2Config(
        vocab_size=256000 // scale,
        hidden_size=3584 // scale,
        intermediate_size=14336 // scale,
        num_hidden_layers=42 if scale == 1 else 12,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256 // scale,
        query_pre_attn_scalar=256 // scale,
        sliding_window=4096,
    )


def random_lm(config, device, dtype):
    """A Gemma 2 of this shape with random weights, made on the device itself."""
    import torch
    from transformers import Gemma2ForCausalLM, GenerationConfig

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            lm = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    # No token ends an answer: the number of new tokens is fixed.
    lm.generation_config = GenerationConfig(do_sample=False, eos_token_id=[config.vocab_size], pad_token_id=0)
    return lm


def random_sae(model, layer, d_sae, active):
    """A random JumpReLU SAE in float32 with about `active` latents over its threshold on random prompts."""
    import torch
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    d_in, device = model.cfg.d_model, next(model.original_model.parameters()).device
    hook_name = f"blocks.{layer}.hook_resid_post"
    config = JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, device=str(device), metadata=SAEMetadata(hook_name=hook_name))
    sae = JumpReLUSAE(config).eval().requires_grad_(False)
    torch.manual_seed(1)
    sae.W_enc.copy_(torch.randn(d_in, d_sae, device=device) / math.sqrt(d_in))
    sae.W_dec.copy_(sae.W_enc.T / active)
    seen = []
    with torch.inference_mode(), model.hooks(fwd_hooks=[(hook_name, lambda residual, hook: seen.append(residual))]):
        model.original_model(torch.randint(model.cfg.d_vocab, (4, 64), device=device), logits_to_keep=1)
    before = seen[0].flatten(0, 1).float() @ sae.W_enc + sae.b_enc  # [pos, d_sae]
    sae.threshold.fill_(before.topk(active + 1).values[:, -1].median().clamp(min=0).item())
    return sae


def random_prompts(count, vocab_size):
    """Token ids of SQuAD's lengths: contexts of about 155 tokens, questions of about 15, and the template's 40."""
    rng, prompts, contexts = random.Random(2), [], []

    def tokens(length):
        return [rng.randrange(3, vocab_size) for _ in range(length)]

    head, tail = tokens(15), tokens(25)
    for number in range(count):
        context = tokens(round(min(700, max(30, rng.lognormvariate(math.log(145), 0.38)))))
        for _ in range(QUESTIONS_A_CONTEXT):
            prompts.append([2, *head, *context, *tokens(rng.randint(9, 22)), *tail])
            contexts.append(number)
    return prompts[:count], contexts[:count]


def load_shape(config, device, dtype, count, d_sae):
    """A random model of this configuration and a random SAE after its layer 9; `count` prompts of SQuAD's lengths."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    lm = random_lm(config, device, getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")  # any: prompts are made of random ids
    model = TransformerBridge.boot_transformers("google/gemma-2-9b-it", hf_model=lm, tokenizer=tokenizer)
    sae = random_sae(model, 9, d_sae, 120)
    return model, sae, *random_prompts(count, config.vocab_size), NEW_TOKENS


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def naive_loop(model, sae, prompts, new_tokens, masks):
    """As the authors' scripts do it: batch 1, no cache, the whole sequence again for every new token."""
    import torch

    end_ids = model.original_model.generation_config.eos_token_id
    for prompt, mask in zip(prompts, masks):
        ids = list(prompt)

        def replace_residual(residual, hook, mask=mask):
            acts = sae.encode(residual.to(sae.dtype))
            acts[:, :, mask] = 0
            return sae.decode(acts).to(residual.dtype)

        while len(ids) - len(prompt) < new_tokens and ids[-1] not in end_ids:
            with torch.no_grad(), model.hooks(fwd_hooks=[(sae.cfg.metadata.hook_name, replace_residual)]):
                logits = model(torch.tensor([ids], device=sae.W_enc.device))
            ids.append(logits[0, -1].argmax().item())


def our_round_1(model, sae, prompts, contexts, batches, new_tokens):
    """Answers and, for every question, latents: more than a real round, which ranks the right answers alone."""
    from experiment import generation, latents

    rankings = {}

    def work(batch, few):
        chosen, shared = [prompts[i] for i in batch], [contexts[i] for i in batch]
        found = generation.answer(model, sae, chosen, new_tokens, contexts=shared, keep_residuals=True, few=few)
        for i, residual in zip(batch, found[1]):
            rankings[i] = latents.rank(sae, residual[: len(prompts[i]) + 2])
        return found[0]

    in_two_passes(work, model, prompts, batches, new_tokens)
    return rankings


def our_masked_round(model, sae, prompts, batches, new_tokens, masks):
    from experiment import generation

    def work(batch, few):
        chosen, rows = [prompts[i] for i in batch], [masks[i] for i in batch]
        return generation.answer(model, sae, chosen, new_tokens, rows, few=few)[0]

    in_two_passes(work, model, prompts, batches, new_tokens)


def in_two_passes(work, model, prompts, batches, new_tokens):
    """As a round does: the last few answers of each batch are put off, and generated together at the end."""
    from experiment import generation, rounds

    end_ids = model.original_model.generation_config.eos_token_id
    left = []
    for batch in batches:
        for i, ids in zip(batch, work(batch, len(batch) // rounds.FEW)):
            if ids[-1] not in end_ids and len(ids) < new_tokens:
                left.append(i)
    budget = max(max(len(prompts[i]) for i in batch) * len(batch) for batch in batches)
    for batch in generation.plan_batches([len(prompts[i]) for i in left], budget):
        work([left[i] for i in batch], 0)


def plain_generate(lm, prompts, batches, new_tokens):
    """Transformers alone on the same batches: no SAE, no hooks, no TransformerLens in the process."""
    import torch

    config = lm.generation_config
    device = next(lm.parameters()).device
    with torch.inference_mode():
        for batch in batches:
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), config.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            lm.generate(input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=new_tokens)


class Stopwatch:
    """Seconds and peak memory of a piece of work, the device's queue included."""

    def __init__(self, device):
        import torch

        self.cuda = torch.cuda if str(device).startswith("cuda") else None

    def time(self, work):
        if self.cuda:
            self.cuda.synchronize()
            self.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        if self.cuda:
            self.cuda.synchronize()
        return time.perf_counter() - start

    def median(self, work, repeats):
        work()  # warm-up
        return statistics.median(self.time(work) for _ in range(repeats))

    def peak_gb(self):
        if self.cuda:
            return self.cuda.max_memory_allocated() / 1e9
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def split_masked_round(model, sae, prompts, batches, new_tokens, masks, watch):
    """Seconds of a masked round's prefill, decoding and SAE, each measured apart (the SAE is within the other two)."""
    one = watch.time(lambda: our_masked_round(model, sae, prompts, batches, 1, masks))
    whole = watch.time(lambda: our_masked_round(model, sae, prompts, batches, new_tokens, masks))
    spent, encode, decode = [0.0], sae.encode, sae.decode

    def timed(function):
        def call(x):
            result = []
            spent[0] += watch.time(lambda: result.append(function(x)))
            return result[0]

        return call

    sae.encode, sae.decode = timed(encode), timed(decode)
    try:
        our_masked_round(model, sae, prompts, batches, new_tokens, masks)
    finally:
        del sae.encode, sae.decode
    return {"prefill": one, "decode": whole - one, "SAE in both": spent[0]}


# ---------------------------------------------------------------------------------------------------------------------


def measure_plain(args, options, device):
    """In a process of its own: seconds of plain Transformers, as JSON on standard output."""
    import torch

    import common
    from experiment import generation, questions

    watch = Stopwatch(device)
    if args.demo:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        common.prepare(options)
        tokenizer = AutoTokenizer.from_pretrained(common.bundled(options.model))
        lm = AutoModelForCausalLM.from_pretrained(
            common.bundled(options.model), dtype=getattr(torch, options.dtype), attn_implementation="eager"
        ).to(device)
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
        lm.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
        prompts, _ = demo_prompts(options, tokenizer, questions, common)
        new_tokens = options.max_new_tokens
    else:
        config = shape_config(args.scale)
        lm = random_lm(config, device, getattr(torch, args.dtype))
        prompts, _ = random_prompts(args.questions, config.vocab_size)
        new_tokens = NEW_TOKENS
    batches = generation.plan_batches([len(prompt) for prompt in prompts], args.batch_tokens)
    seconds = watch.median(lambda: plain_generate(lm, prompts, batches, new_tokens), args.repeats)
    print(json.dumps({"seconds": seconds, "peak": watch.peak_gb()}))


def plain_in_its_own_process():
    """What `measure_plain` prints, for the options of this command line."""
    command = [sys.executable, __file__, *sys.argv[1:], "--plain-only"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="the bundled model, SAE and questions")
    parser.add_argument("--shape", choices=["gemma-2-9b-it"], help="random weights in this shape")
    parser.add_argument("--scale", type=int, default=1, help="divide the shape's sizes, to try the script (default: 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--questions", type=int, default=640)
    parser.add_argument("--naive-questions", type=int, default=24, help="the naive loop runs on the first ones alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--plain-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.demo == bool(args.shape):
        parser.error("give --demo or --shape")

    import common

    defaults = common.DEMO_DEFAULTS if args.demo else common.DEFAULTS
    args.dtype = args.dtype or defaults["dtype"]
    args.batch_tokens = args.batch_tokens or defaults["batch_tokens"]
    chosen = ["--demo", "--device", args.device, "--dtype", args.dtype, "--limit", str(args.questions)]
    options = common.parse_options(chosen, "", masks=False)
    if args.plain_only:
        measure_plain(args, options, args.device)
        return
    plain = [plain_in_its_own_process()]  # first, while this process holds no memory of the device
    common.prepare(options)
    if args.demo:
        loaded = load_demo(options)
    else:
        config = shape_config(args.scale)
        loaded = load_shape(config, args.device, args.dtype, args.questions, 131072 // args.scale)
    report(args, plain, *loaded)


def report(args, plain, model, sae, prompts, contexts, new_tokens):
    """Measures the naive loop and our rounds, and prints the table."""
    from experiment import generation

    watch, n = Stopwatch(args.device), len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    batches = generation.plan_batches(lengths, args.batch_tokens)
    shared = generation.plan_batches(lengths, args.batch_tokens, contexts)
    rows = []
    rankings = our_round_1(model, sae, prompts, contexts, shared, new_tokens)
    masks = [rankings[i]["topk"] for i in range(n)]
    seconds = watch.median(lambda: our_round_1(model, sae, prompts, contexts, shared, new_tokens), args.repeats)
    rows.append(("round 1, ranking included", n / seconds, watch.peak_gb()))
    seconds = watch.median(lambda: our_masked_round(model, sae, prompts, batches, new_tokens, masks), args.repeats)
    rows.append(("masked round", n / seconds, watch.peak_gb()))
    few = min(n, args.naive_questions)
    # Of all lengths: the first questions could be short ones.
    chosen = random.Random(3).sample(range(n), few)
    seconds = watch.median(
        lambda: naive_loop(model, sae, [prompts[i] for i in chosen], new_tokens, [masks[i] for i in chosen]), 1
    )
    naive = few / seconds
    rows.insert(0, (f"naive loop ({few} questions)", naive, watch.peak_gb()))
    if not watch.cuda:  # a shared machine's speed changes meanwhile: once more at the end
        plain.append(plain_in_its_own_process())
    plain_seconds = statistics.mean(found["seconds"] for found in plain)
    rows.insert(1, ("plain generate, no SAE", n / plain_seconds, plain[0]["peak"]))
    parts = split_masked_round(model, sae, prompts, batches, new_tokens, masks, watch)

    print(
        f"{n} questions, {sum(lengths) / n:.0f} prompt tokens on average, {len(batches)} batches, {device_name(args)}"
    )
    print(f"{'':28}  questions/s   / naive   time / plain   peak GB")
    for name, rate, peak in rows:
        print(f"{name:28}  {rate:11.2f}  {rate / naive:8.1f}  {n / rate / plain_seconds:13.2f}  {peak:8.2f}")
    print("masked round, once: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items()))
    if args.shape:
        for name, rate, _ in rows[2:]:
            print(f"all {SQUAD_QUESTIONS} SQuAD questions, extrapolated, {name}: {SQUAD_QUESTIONS / rate / 60:.1f} min")


def device_name(args):
    import torch

    return torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    main()
