"""What round 1 leaves for rounds 2 and 3: ranked latents and their means. Written and read with the run they are of."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from experiment import UserError, answers, results, say
from experiment.options import ROOT


def name_file(options, ranking):
    """Round 1's file of a ranking."""
    return options.activations or options.output_dir / f"activations_{ranking}.json"


def refuse_others(round_):
    """Refuses, before anything is run, to replace the activations of another run, or a file that is none."""
    for name in round_.options.ranking:
        path = name_file(round_.options, name)
        if path.exists() and not round_.options.overwrite:
            made, _ = results.read_activations(path)
            if made is None:
                raise UserError(f"{path}: is the authors' published file: give another --activations, or --overwrite")
            if round_.options.activations or not round_.is_begun(name):
                fields = (*results.COMPARED, "limit", "sample", "seed")
                results.refuse_other_run(path, made, round_.run_of(name), fields)


@dataclass(frozen=True)
class Ranked:
    """The ranked latents of a file of activations.

    run: of the round that masks them.  path: the file's.  samples: by question id.  which: topk or bottomk.  missing:
    the questions that the data set lacks.  has_answers: whether the unmasked answers are there (not in the authors').
    """

    run: dict
    path: Path
    samples: dict[str, dict]
    which: str
    missing: list[str]
    has_answers: bool


def read_ranked(round_, ranking, which):
    """The Ranked of one ranking, from --activations, the output folder, or the file that ships with the project."""
    path = find_activations(round_, ranking)
    made, samples = results.read_activations(path)
    if made is None:
        say(f"{path}: the authors' published form: model, SAE, layer and dtype that made it cannot be checked.")
        by_id, missing = match_prompts(round_, samples)
    else:
        if named := results.differences(made, round_.run_of(ranking), results.COMPARED):
            raise UserError(f"{path}: is of another run ({named}): repeat its options, or run baseline.py again")
        known = {question.id for question in round_.questions}
        by_id = {sample["id"]: sample for sample in samples if sample["id"] in known}
        missing = [sample["id"] for sample in samples if sample["id"] not in known]
    if missing:
        named = ", ".join(repr(name[-80:]) for name in missing[:5])
        say(f"{path}: {len(missing)} of its {len(samples)} questions are not in the data set: {named}")
    if not any(question.id in by_id for question in round_.asked):
        raise UserError(f"{path}: none of its questions is among the {len(round_.asked)} selected ones")
    lists = ({"id": question_id, which: sample[which]} for question_id, sample in by_id.items())
    more = {"masked": which, "ablation": round_.options.ablation}
    run = round_.run_of(ranking, activations=results.digest(lists, "id", which), **more)
    # Of what made the file, not of what was asked for now:
    run |= {name: made[name] for name in ("ranking_seed", "hook_name", "d_sae") if made and name in made}
    needed = {f"target_{which}", f"removed_{which}"} if ranking == "matched" else set()
    if not all(needed <= sample.keys() for sample in by_id.values()):
        raise UserError(f"{path}: does not say what the baseline's latents remove: run baseline.py again")
    return Ranked(run, path, by_id, which, missing, made is not None)


def find_activations(round_, ranking):
    """The file of a ranking's activations: the one that ships is used where the folder has none of its own."""
    options = round_.options
    path, shipped = name_file(options, ranking), ROOT / f"activations_{ranking}.json"
    if options.activations is None and not path.exists() and shipped.exists():
        made, _ = results.read_activations(shipped)
        if not results.differences(made, round_.run_of(ranking), results.COMPARED):
            say(f"{path} is not there: using {shipped.name}, which ships with the project.")
            return shipped
    return path


def match_prompts(round_, samples):
    """Samples of the authors' file by question id, and the prompts that no question has."""
    by_prompt, by_id, missing = {}, {}, []
    for question in round_.questions:
        by_prompt.setdefault(round_.prompt(question), []).append(question.id)
    for sample in samples:
        if ids := by_prompt.get(sample["prompt"]):
            by_id[ids.pop(0)] = sample  # the same prompt twice: the first stands for the first question, and so on
        else:
            missing.append(sample["prompt"])
    return by_id, missing


def find_asked(round_, ranked):
    """The questions that are masked: those selected that the files have."""
    ids = [{question_id for question_id in file.samples} for file in ranked.values()]
    if any(other != ids[0] for other in ids):
        raise UserError("the activations files are of different questions: run baseline.py with all these rankings")
    return [question for question in round_.asked if question.id in ids[0]]


def check_latents(ranked, model):
    """Refuses latents that the SAE, and tokens that the model does not have."""
    words = model.lm.get_input_embeddings().num_embeddings
    for file in ranked.values():
        for question_id, sample in file.samples.items():
            where, latents, tokens = f"{file.path}: question {question_id}", sample[file.which], sample.get("tokens")
            if latents and max(latents) >= model.splice.d_sae:
                raise UserError(f"{where} names latent {max(latents)}, but the SAE has {model.splice.d_sae}")
            if tokens and max(tokens) >= words:
                raise UserError(f"{where} names token {max(tokens)}, but the model has {words}")


def store_means(round_, model, kept):
    """For --ablation mean: each latent's mean activation over all positions of the kept questions and answers.

    kept: {question: its record}. Goes to means.json, which rounds 2 and 3 read.
    """
    total, positions = torch.zeros(model.splice.d_sae, dtype=torch.float64, device=model.splice.device), 0
    contexts = [question.context for question in kept]
    sequences = [round_.prompt_ids(question) + record["tokens"][:-1] for question, record in kept.items()]

    def add_up(part):
        # One token more says nothing new: what counts is what the SAE read on the way there.
        _, trace = answers.answer(model, [sequences[i] for i in part], [contexts[i] for i in part], 1)
        latents = trace.select(range(len(part)), [len(sequences[i]) for i in part]).latents
        sums = torch.zeros_like(total).index_add_(0, latents.ids, latents.values.double())
        return [(sums, int(latents.spliced.sum()))]

    for batch in answers.plan_batches(list(map(len, sequences)), round_.options.batch_tokens, contexts):
        for sums, count in answers.in_halves(add_up, batch):
            total, positions = total + sums, positions + count
    means = (total / max(1, positions)).float().tolist()
    with results.write_whole(round_.options.output_dir / "means.json") as file:
        json.dump({"run": round_.run, "positions": positions, "means": means}, file)


def read_means(round_, model):
    """The mean activations that round 1 stored with --ablation mean, [d_sae] on the SAE's device."""
    path = round_.options.output_dir / "means.json"
    if not path.exists():
        raise UserError(f"{path}: there is no such file: run baseline.py with --ablation mean first")
    content = results.load_json(path)
    try:
        made, means = dict(content["run"]), torch.tensor(content["means"], dtype=torch.float32)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: is damaged ({error!r}): move it away") from None
    results.refuse_other_run(path, made, round_.run, (*results.COMPARED, *results.SELECTED))
    if means.shape != (model.splice.d_sae,) or not means.isfinite().all():
        raise UserError(f"{path}: is damaged, or of another SAE: move it away")
    return means.to(model.splice.device)
