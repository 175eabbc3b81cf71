"""What round 1 leaves for rounds 2 and 3: ranked latents and their means. Written and read with the run they are of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiment import UserError, own_rankings, say
from experiment.options import ROOT, write_command
from experiment.records import files, lists, provenance

if TYPE_CHECKING:
    from experiment.rounds import Round  # which stands on this module


def name_file(options, ranking):
    """Round 1's file of a ranking."""
    return options.activations or options.output_dir / f"activations_{own_rankings.name_of(ranking)}.json"


def refuse_others(round_):
    """Refuses, before anything is run, to replace the activations of another run, or a file that is none."""
    for name in round_.options.ranking:
        path = name_file(round_.options, name)
        for file in (path, files.name_mean_file(path)) if round_.options.ablation == "mean" else (path,):
            if file.exists() and not round_.options.overwrite:
                made, _ = files.read_activations(file)
                if made is None:
                    says = "is the authors' published file: give another --activations, or --overwrite"
                    raise UserError(f"{file}: {says}")
                if round_.options.activations or not round_.is_begun(name):
                    wanted = round_.find_wanted(round_.run_of(name), made)
                    provenance.refuse_other_run(file, made, wanted, (*provenance.RANKED, *provenance.SELECTION))


@dataclass(frozen=True)
class Ranked:
    """The ranked latents of a file of activations.

    run: of the round that masks them.  path: the file's.  name: the file's in results.json, without the folder where it
    is the output folder's own or ships.  samples: by question id.  which: topk or bottomk.  missing: the questions that
    the data set lacks.  selection: round 1's --limit, --sample and --seed; None where the file does not say (the
    authors'): then it has no unmasked answers either.
    """

    run: dict
    path: Path
    name: str
    samples: dict[str, dict]
    which: str
    missing: list[str]
    selection: dict[str, int | None] | None

    def describe(self, selected: list) -> dict:
        """What the run of a round says of the latents of these questions: the digest of all that it uses of them."""
        ids = [question.id for question in selected]
        return {"activations": provenance.digest_samples(self.samples, self.which, ids)}


def read_ranked(round_, ranking: str, which: str) -> Ranked:
    """The Ranked of one ranking, from --activations, the output folder, or the file that ships with the project."""
    path = find_activations(round_, ranking)
    if not path.exists():
        raise UserError(f"{path}: there is no such file: {advise_round_1(round_)}")
    made, samples = files.read_activations(path)
    if made is None:
        say(f"{path}: the authors' published form: model, SAE, layer and dtype that made it cannot be checked.")
        by_id, missing = match_prompts(round_, samples)
    else:
        if named := provenance.differences(made, round_.run_of(ranking), (*provenance.SETTINGS, "ranking")):
            advice = advise_round_1(round_, overwrite=True)
            raise UserError(f"{path}: is of another run ({named}): repeat its options, or {advice}")
        refuse_unasked(round_, path, made)
        if round_.options.ablation == "mean":
            path, samples = take_from_mean_file(round_, path, made, samples)
        known = {question.id for question in round_.questions}
        by_id = {sample["id"]: sample for sample in samples if sample["id"] in known}
        missing = [sample["id"] for sample in samples if sample["id"] not in known]
    if missing:
        named = ", ".join(repr(name[-80:]) for name in missing[:5])
        say(f"{path}: {len(missing)} of its {len(samples)} questions are not in the data set: {named}")
    if not any(question.id in by_id for question in round_.asked):
        raise UserError(f"{path}: none of its questions is among the {len(round_.asked)} selected ones")
    needed = {f"target_{which}", f"removed_{which}"} if ranking == "matched" else set()
    if not all(needed <= sample.keys() for sample in by_id.values()):
        advice = advise_round_1(round_, overwrite=True)
        raise UserError(f"{path}: does not say what the baseline's latents remove: {advice}")
    # Of what made the file, not of what was asked for now:
    of_file = {name: made[name] for name in ("ranking_seed", "hook_name", "d_sae") if made and name in made}
    run = round_.run_of(ranking, masked=which, ablation=round_.options.ablation) | of_file
    name = path.name if path.parent in (round_.options.output_dir, ROOT) else str(path.resolve())
    selection = {name: made.get(name) for name in provenance.SELECTION} if made else None
    ranked = Ranked(run, path, name, by_id, which, missing, selection)
    run |= ranked.describe(round_.asked)
    return ranked


def advise_round_1(round_, **changed: object) -> str:
    """What to do where a masked round lacks what round 1 makes: the command, with the round's own options."""
    leave_out = "leave --activations out and " if round_.options.activations else ""  # it may be somebody else's file
    return f"{leave_out}run this first: {write_command(round_.options, activations=None, **changed)}"


def refuse_unasked(round_, path: Path, made: dict) -> None:
    """Raises UserError where questions are selected that round 1 never asked. made: the run in its file."""
    asked = {question.id for question in round_.select(made)}
    unasked = [question.id for question in round_.asked if question.id not in asked]
    if not unasked:
        return
    named = [f"--{name} {made[name]}" for name in provenance.SELECTION if made.get(name) is not None]
    goes_on = asked <= {question.id for question in round_.asked}
    advice = advise_round_1(round_, overwrite=not goes_on)
    raise UserError(
        f"{path}: round 1 never asked {len(unasked)} of the {len(round_.asked)} selected questions ({unasked[0]}): "
        f"give {' '.join(named)}, as in round 1, or {advice}"
    )


def find_activations(round_, ranking):
    """The file of a ranking's activations: the one that ships is used where the folder has none of its own."""
    options = round_.options
    path, shipped = name_file(options, ranking), ROOT / f"activations_{own_rankings.name_of(ranking)}.json"
    if options.activations is None and not path.exists() and shipped.exists():
        made, _ = files.read_activations(shipped)
        if not provenance.differences(made, round_.run_of(ranking), (*provenance.SETTINGS, "ranking")):
            say(f"{path} is not there: using {shipped.name}, which ships with the project.")
            return shipped
    return path


def take_from_mean_file(round_: Round, path: Path, run: dict, samples: list[dict]) -> tuple[Path, list[dict]]:
    """The file beside a ranking's own and its samples: the same lists, and what mean ablation of them changes.

    run: of the ranking's own file.  Raises UserError where the file beside it is missing, or of another run or lists.
    """
    beside = files.name_mean_file(path)
    if not beside.exists():
        raise UserError(f"{beside}: there is no such file: {advise_round_1(round_)}")
    made, of_means = files.read_activations(beside)
    problem = None
    if made is None or provenance.differences(made, run, (*provenance.SETTINGS, "ranking")):
        problem = f"is of another run than {path.name}"
    elif select_lists(samples) != select_lists(of_means):
        problem = f"has other lists than {path.name}"
    if problem:
        raise UserError(f"{beside}: {problem}: {advise_round_1(round_, overwrite=True)}")
    return beside, of_means


def select_lists(samples: list[dict]) -> list[list]:
    """The ids and the lists of latents of samples."""
    return [[sample[field] for field in ("id", *lists.SIDES)] for sample in samples]


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


def find_asked(round_, ranked: dict[str, Ranked]) -> list:
    """The questions that are masked: those selected that the files have.

    Raises UserError where the files are not of the same unmasked answers: one draft, and one reference, stands for all.
    """
    first, *others = ranked.values()
    for question in round_.asked:
        one = first.samples.get(question.id, {})
        for other in others:
            two = other.samples.get(question.id, {})
            if not provenance.same_answer(one, two):
                command = write_command(round_.options, overwrite=True, **(first.selection or {}))
                raise UserError(
                    f"{first.path} and {other.path} are of different unmasked answers (question {question.id}): give "
                    f"one --ranking at a time, or answer once for all of them: {command}"
                )
    return [question for question in round_.asked if question.id in first.samples]


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


def read_means(round_) -> list[float]:
    """The mean activation of each latent of the SAE that round 1 stored with --ablation mean."""
    path = round_.options.output_dir / "means.json"
    if not path.exists():
        raise UserError(f"{path}: there is no such file: {advise_round_1(round_)}")
    content = files.load_json(path)
    if problem := files.find_problem(content, files.MEANS):
        raise UserError(f"{path}: is damaged ({problem}): move it away")
    provenance.refuse_other_run(path, content["run"], round_.run, provenance.SETTINGS)
    refuse_unasked(round_, path, content["run"])
    return content["means"]
