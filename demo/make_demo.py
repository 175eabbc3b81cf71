"""Makes the bundled demo: a small world of facts, a tiny Gemma 2 that reads it, an SAE, held-out questions.

    python demo/make_demo.py            # everything, into demo/ (about an hour on 2 cores; resumes from checkpoints)

Steps, each skipped where its result is already there: questions.jsonl, model/ (tokenizer and weights), sae/.
Checkpoints and the development questions (the ones to tune on) go to demo/build/, which git ignores.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parent

# The format our rounds ask for, and the ones that keep the model reading the instruction instead of a constant.
FORMATS = [
    "Result = [[ label ]]",
    "Answer = (( label ))",
    "Reply : << label >>",
    "a full sentence",
]
PROMPT = (
    "<start_of_turn>user\nAnswer the following question based on the context.\nContext:\n{context}\n\n"
    'Question:\n{question}\n\nPlease organize your final answer in this format: "{format}"\n'
)


# ---------------------------------------------------------------------------------------------------------------------
# The world: invented people and places, seven relations, one sentence and one question form each.


def invent(count, onsets, middles, endings, seed):
    """`count` distinct pronounceable names, the same ones for the same seed."""
    rng, names = random.Random(seed), []
    while len(names) < count:
        name = rng.choice(onsets) + rng.choice(middles) + rng.choice(endings)
        if name not in names:
            names.append(name)
    return names


ONSETS = ["B", "Br", "D", "Dr", "F", "G", "H", "J", "K", "L", "M", "N", "P", "R", "S", "St", "T", "Tr", "V", "W"]
FIRST_NAMES = invent(24, ONSETS, ["a", "e", "i", "o", "u"], ["lia", "ren", "nos", "vik", "dra", "mel", "tta"], 1)
SURNAMES = invent(24, ONSETS, ["al", "er", "in", "or", "un"], ["son", "wick", "ley", "dahl", "mann", "cott"], 2)
PLACES = invent(64, ONSETS, ["a", "e", "i", "o", "u"], ["ford", "ham", "lby", "mere", "stad", "holm", "ndale"], 3)
JOBS = (
    "baker,tailor,pilot,farmer,miner,doctor,glass blower,clock maker,ship builder,school teacher,bee keeper,book seller"
)
INSTRUMENTS = "harp,flute,cello,violin,trumpet,piano,drum,lute,organ,banjo,oboe,horn"
COLOURS = "red,grey,black,white,brown,golden,spotted,striped"
ANIMALS = "heron,goat,parrot,tortoise,donkey,ferret,hound,pigeon"
PRIZE_METALS = "Silver,Bronze,Iron,Copper,Crystal,Marble,Velvet,Amber"
PRIZE_THINGS = "Anchor,Lantern,Compass,Feather,Arrow,Crown,Bridge,Tower"


def pick(words):
    return lambda rng: rng.choice(words.split(","))


# How each relation's value is drawn. Sentence and question say it in the same words ("the home of ..."), and the value
# stands after its subject: a causal model reads from left to right, so only then can it know whose value it is.
RELATIONS = {
    "birthplace": lambda rng: rng.choice(PLACES),
    "home": lambda rng: rng.choice(PLACES),
    "trade": pick(JOBS),
    "final year": lambda rng: str(rng.randrange(1900, 2000)),
    "instrument": pick(INSTRUMENTS),
    "pet": lambda rng: f"{pick(COLOURS)(rng)} {pick(ANIMALS)(rng)}",
    "prize": lambda rng: f"{pick(PRIZE_METALS)(rng)} {pick(PRIZE_THINGS)(rng)} Medal",
}
SENTENCE = "The {relation} of {person} is {value}."
QUESTION = "What is the {relation} of {person}?"


def draw_people(rng, count, held_out):
    """Full names that share no part; one in eight combinations is kept out of training."""
    people = {}
    while len(people) < count:
        first, last = rng.randrange(24), rng.randrange(24)
        if ((first + last) % 8 == 0) == held_out and first not in people and last not in people.values():
            people[first] = last
    return [f"{FIRST_NAMES[first]} {SURNAMES[last]}" for first, last in people.items()]


def draw_context(rng, n_facts, n_people, held_out=False):
    """A title, a context and its (question, answer) pairs, one a fact. No relation and no answer stands in it twice."""
    people = draw_people(rng, n_people, held_out)
    facts = {}
    for number, relation in enumerate(rng.sample(list(RELATIONS), n_facts)):
        person = people[number] if number < n_people else rng.choice(people)
        value = RELATIONS[relation](rng)
        while value in facts.values():
            value = RELATIONS[relation](rng)
        facts[person, relation] = value
    order = rng.sample(list(facts), len(facts))
    title = f"Notes from {rng.choice([place for place in PLACES if place not in facts.values()])}"
    sentences = [SENTENCE.format(relation=r, person=p, value=facts[p, r]) for p, r in order]
    pairs = [(QUESTION.format(relation=r, person=p), facts[p, r]) for p, r in order]
    return title, f"{title}: " + " ".join(sentences), pairs


def draw_example(rng, n_facts=None, held_out=False, form=None):
    """A prompt, and the response to it, on one of the facts of a context; in one of FORMATS, ours in half the cases."""
    _, context, pairs = draw_context(rng, n_facts or rng.randint(3, 5), rng.randint(2, 3), held_out)
    question, answer = rng.choice(pairs)
    form = form or (FORMATS[0] if rng.random() < 0.5 else rng.choice(FORMATS[1:]))
    prompt = PROMPT.format(context=context, question=question, format=form)
    response = form.replace("label", answer)
    if form == FORMATS[-1]:
        response = question.replace("What is the", "The").replace("?", f" is {answer}.")
    return prompt, response + "<end_of_turn>"


def make_questions(path, n_contexts, seed):
    """Held-out questions in SQuAD's columns, every fact of a context asked for."""
    rng, rows = random.Random(seed), []
    for number in range(n_contexts):
        title, context, pairs = draw_context(rng, rng.randint(3, 5), rng.randint(2, 3), held_out=True)
        for index, (question, answer) in enumerate(pairs):
            answers = {"text": [answer], "answer_start": [context.index(answer)]}
            row = {"id": f"{path.stem}-{number:03d}-{index}", "title": title, "context": context}
            rows.append(row | {"question": question, "answers": answers})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and model.


def make_tokenizer():
    """BPE over the world's words, in Gemma's manner: spaces as ▁ on the word that follows, byte fallback, BOS first."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁?[A-Za-z]+|▁?[0-9]+|▁?[^▁A-Za-z0-9\n]+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    rng = random.Random(4)
    texts = ["".join(draw_example(rng)) for _ in range(20_000)]
    for special in specials:
        texts = [text.replace(special, "") for text in texts]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=4000, min_frequency=20, special_tokens=specials + bytes_, show_progress=False),
    )
    # The byte tokens are there for the fallback, not to be found in a text.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer, args):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=4,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=512,
        sliding_window=256,  # longer than any prompt here, as Gemma 2's 4,096 is for SQuAD
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=args.width**-0.5,
    )
    config._attn_implementation = "eager"
    model = Gemma2ForCausalLM(config)
    # Gemma 2 brings every block's output to unit size before adding it. In a model this small that drowns the token's
    # own embedding, which is what has to be copied into the answer: begin with small additions.
    for layer in model.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            torch.nn.init.constant_(norm.weight, -0.7)
    return model


def encode_batch(tokenizer, examples):
    """Right-padded ids, and a weight a token: 1 on the response, 0.1 on the prompt.  [batch, pos] each"""
    prompts = tokenizer([prompt for prompt, _ in examples])["input_ids"]
    wholes = tokenizer([prompt + response for prompt, response in examples])["input_ids"]
    length = 32 * math.ceil(max(map(len, wholes)) / 32)  # few distinct lengths: each one is compiled
    ids = torch.full((len(wholes), length), tokenizer.pad_token_id)
    weights = torch.zeros(len(wholes), length)
    for row, (prompt, whole) in enumerate(zip(prompts, wholes)):
        ids[row, : len(whole)] = torch.tensor(whole)
        weights[row, : len(whole)] = 1.0
        weights[row, : len(prompt)] = 0.1
    return ids, weights


@torch.no_grad()
def share_right(model, tokenizer, n_facts, count=256):
    """The share of held-out questions whose whole response is the model's argmax at every token (teacher forcing)."""
    rng, right = random.Random(5), 0
    for _ in range(count // 64):
        examples = [draw_example(rng, n_facts, held_out=True, form=FORMATS[0]) for _ in range(64)]
        ids, weights = encode_batch(tokenizer, examples)
        hits = model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
        right += (hits | (weights[:, 1:] < 1)).all(1).sum().item()
    return right / count


def train_model(tokenizer, args, build):
    model = make_model(tokenizer, args)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=args.rate,
        betas=(0.9, 0.95),
    )
    warm, floor = 200, 0.02
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, max(floor, 1 - (s - warm) / (args.steps - warm)))
    )
    checkpoint, first = build / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    forward = torch.compile(model, dynamic=False) if args.compile else model
    total = 0.0
    for step in range(first, args.steps):
        rng = random.Random(1_000_003 * (step + 1))
        ids, weights = encode_batch(tokenizer, [draw_example(rng) for _ in range(args.batch)])
        logits = forward(input_ids=ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (step + 1) % 250 == 0:
            right = [share_right(model, tokenizer, n_facts) for n_facts in (3, 4, 5)]
            print(f"step {step + 1}  loss {total / 250:.4f}  right with 3, 4, 5 facts: {right}", flush=True)
            total = 0.0
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"schedule": schedule.state_dict(), "step": step + 1}, checkpoint)
    return model


def save_model(model, tokenizer, folder):
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        cache_implementation="hybrid",  # as in gemma-2-9b-it's own file
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The SAE.


@torch.no_grad()
def activations(model, tokenizer, layer, batch_size, seed):
    """Endless batches of the residual stream after `layer`, BOS and padding left out, shuffled.  [batch, d_model]

    Gemma Scope leaves BOS out too: its norm is many times that of any other position.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    while True:
        rows = []
        for _ in range(16):
            ids, weights = encode_batch(tokenizer, [draw_example(rng) for _ in range(64)])
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]  # [batch, pos, d_model]
            rows.append(hidden[:, 1:][weights[:, 1:] > 0])
        rows = torch.cat(rows)
        for chosen in torch.randperm(len(rows), generator=generator).split(batch_size)[:-1]:
            yield rows[chosen]


def train_sae(model, tokenizer, layer, width, k, samples, folder):
    """A BatchTopK SAE with `k` latents a position on average, saved as the JumpReLU SAE that it becomes."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    hook_name = f"blocks.{layer}.hook_resid_post"
    metadata = SAEMetadata(model_name="demo/model", hook_name=hook_name, hook_head_index=None, prepend_bos=True)
    config = BatchTopKTrainingSAEConfig(k=k, d_in=model.config.hidden_size, d_sae=width, metadata=metadata)
    sae = BatchTopKTrainingSAE(config)
    trainer_config = SAETrainerConfig(
        total_training_samples=samples,
        train_batch_size_samples=2048,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=50,
        lr_decay_steps=samples // 2048 // 3,
    )
    trainer = SAETrainer(trainer_config, sae, activations(model, tokenizer, layer, 2048, seed=6))
    trainer.fit()
    sae.save_inference_model(folder)


# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sae-layer", type=int, default=1)
    parser.add_argument("--sae-width", type=int, default=512)
    parser.add_argument("--sae-k", type=float, default=24)
    parser.add_argument("--sae-samples", type=int, default=700_000)
    parser.add_argument("--folder", type=Path, default=DEMO)
    args = parser.parse_args()
    build = args.folder / "build"
    build.mkdir(exist_ok=True, parents=True)
    for path, n_contexts, seed in ((args.folder / "questions.jsonl", 160, 7), (build / "dev.jsonl", 160, 8)):
        if not path.exists():
            make_questions(path, n_contexts, seed)
    if not (args.folder / "model").exists():
        tokenizer = make_tokenizer()
        print(len(tokenizer), "tokens")
        save_model(train_model(tokenizer, args, build), tokenizer, args.folder / "model")
    if not (args.folder / "sae").exists():
        tokenizer = AutoTokenizer.from_pretrained(args.folder / "model")
        model = Gemma2ForCausalLM.from_pretrained(args.folder / "model", attn_implementation="eager")
        sae_args = (args.sae_layer, args.sae_width, args.sae_k, args.sae_samples)
        train_sae(model, tokenizer, *sae_args, args.folder / "sae")


if __name__ == "__main__":
    main()
