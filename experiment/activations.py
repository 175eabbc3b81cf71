"""What round 1 leaves for rounds 2 and 3: ranked latents and their means. Written and read with the run they are of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from experiment import UserError, say
from experiment.demo import ROOT
from experiment.intervention.forward import SplicedModel
from experiment.masks import DRAWN, OTHERS, Side
from experiment.options import write_command
from experiment.questions import Question
from experiment.records import files
from experiment.records.files import Activations, PublishedActivations
from experiment.records.lists import RankedFile
from experiment.records.others import take_from_others
from experiment.records.provenance import RANKED, SELECTION, SETTINGS, differences, refuse_other_run, same_answer
from experiment.records.schema import Provenance, PublishedQuestion, RankedLatents, RankedQuestion
from experiment.rounds import Experiment

OF_RANKING = (*SETTINGS, "ranking")


def refuse_others(experiment: Experiment) -> None:
    """Refuses, before anything is run, to replace the activations of another run, or a file that is none."""
    options = experiment.options
    if options.overwrite:
        return
    for ranking in options.ranking:
        path = experiment.activations_file(ranking)
        paths = [path]
        if options.ablation == "mean":
            paths.append(files.name_mean_file(path))
        for file in paths:
            if file.exists():
                refuse_other_file(experiment, ranking, file)


def refuse_other_file(experiment: Experiment, ranking: str, file: Path) -> None:
    """Raises UserError for a file of activations that round 1 may not replace."""
    content = files.read_activations(file)
    if isinstance(content, PublishedActivations):
        raise UserError(f"{file}: is the authors' published file: give another --activations, or --overwrite")
    if experiment.options.activations or not experiment.is_begun(ranking):
        stored = content.provenance
        provenance = experiment.adopt_selection(experiment.round_1_of(ranking), stored)
        refuse_other_run(file, stored, provenance, (*RANKED, *SELECTION))


def read_ranked(experiment: Experiment, ranking: str, side: Side) -> RankedFile:
    """The RankedFile of one ranking, from --activations, the output folder, or the file that ships with the project."""
    path = find_activations(experiment, ranking)
    if not path.exists():
        raise UserError(f"{path}: there is no such file: {advise_round_1(experiment)}")
    content = files.read_activations(path)
    stored = content.provenance
    selection = None
    by_id: Mapping[str, RankedLatents]
    if isinstance(content, PublishedActivations):
        say(f"{path}: the authors' published form: model, SAE, layer and dtype that made it cannot be checked.")
        by_id, missing = match_prompts(experiment, content.ranked)
    else:
        refuse_other_ranking(experiment, ranking, path, content.provenance)
        refuse_unasked(experiment, path, content.provenance)
        if experiment.options.ablation == "mean":
            path, content = take_from_mean_file(experiment, path, content)
        by_id, missing = match_ids(experiment, content.ranked)
        selection = {name: getattr(stored, name) for name in SELECTION}
    tell_missing(experiment, path, by_id, missing, len(content.ranked))
    if ranking == "matched":
        refuse_untold(experiment, path, by_id, side)
    if ranking in DRAWN:
        refuse_fewer_draws(experiment, path, by_id)
    is_at_home = path.parent in (experiment.options.output_dir, ROOT)
    file = RankedFile(
        provenance=mask_provenance(experiment, ranking, side, stored),
        path=path,
        name=path.name if is_at_home else str(path.resolve()),
        questions=by_id,
        side=side,
        missing=missing,
        selection=selection,
    )
    return file.with_digest(experiment.asked_ids)


def refuse_other_ranking(experiment: Experiment, ranking: str, path: Path, stored: Provenance) -> None:
    """Raises UserError for the activations of another run or ranking. stored: what their file says."""
    if named := differences(stored, experiment.provenance_of(ranking), OF_RANKING):
        advice = advise_round_1(experiment, overwrite=True)
        raise UserError(f"{path}: is of another run ({named}): repeat its options, or {advice}")


def tell_missing(
    experiment: Experiment, path: Path, ranked: Mapping[str, RankedLatents], missing: list[str], count: int
) -> None:
    """Says which of a file's `count` questions the data set lacks. Raises UserError where none is left that is asked.

    ranked: the others, by id.  missing: ids, or prompts, of which the end is shown.
    """
    if missing:
        endings = [repr(name[-80:]) for name in missing[:5]]
        named = ", ".join(endings)
        say(f"{path}: {len(missing)} of its {count} questions are not in the data set: {named}")
    for question in experiment.asked:
        if question.id in ranked:
            return
    selected = len(experiment.asked)
    raise UserError(f"{path}: none of its questions is among the {selected} selected ones")


def read_all_ranked(experiment: Experiment, side: Side) -> dict[str, RankedFile]:
    """The RankedFile of each of --ranking; another question's lists are the baseline's of that question."""
    read: dict[str, RankedFile] = {}
    ranked = {}
    for ranking in experiment.options.ranking:
        source = "baseline" if ranking in OTHERS else ranking
        if source not in read:
            read[source] = read_ranked(experiment, source, side)
        ranked[ranking] = read[source]
        if ranking in OTHERS:
            ranked[ranking] = read_others(experiment, ranking, read[source])
    return ranked


def read_others(experiment: Experiment, ranking: str, baseline: RankedFile) -> RankedFile:
    """The baseline's file with another question's lists for each question: `take_from_others`.

    Raises UserError where none of the selected questions has another one.
    """
    provenance = baseline.provenance.with_fields(ranking=ranking)
    if ranking == "other-context":
        provenance = provenance.with_fields(ranking_seed=experiment.options.seed)
    contexts = {question.id: question.context for question in experiment.questions}
    questions = take_from_others(provenance, baseline.questions, contexts)
    kept = 0
    alone = 0
    for question_id in experiment.asked_ids:
        kept += question_id in baseline.questions
        alone += question_id in baseline.questions and question_id not in questions
    where = "on the same context" if ranking == "other" else "on another context"
    if alone == kept:
        raise UserError(f"--ranking {ranking}: no selected question has another kept one {where}: leave it out")
    if alone:
        say(f"{ranking}: {alone} of {kept} questions have no other kept one {where}: they are left out of it")
    file = dataclasses.replace(baseline, provenance=provenance, questions=questions)
    return file.with_digest(experiment.asked_ids)


def refuse_fewer_draws(experiment: Experiment, path: Path, ranked: Mapping[str, RankedLatents]) -> None:
    """Raises UserError where a drawn ranking's file holds fewer lists than --draws asks for."""
    wanted = experiment.options.draws
    held = min(question.draws for question in ranked.values())
    if held < wanted:
        advice = advise_round_1(experiment, overwrite=True)
        raise UserError(f"{path}: holds {held} of --draws {wanted}: give --draws {held}, or {advice}")


def mask_provenance(experiment: Experiment, ranking: str, side: Side, stored: Provenance | None) -> Provenance:
    """The provenance of a round that masks one side of a file: what only that says is of it. stored: the file's."""
    provenance = experiment.provenance_of(ranking).with_fields(masked=side, ablation=experiment.options.ablation)
    known = stored.fields() if stored else {}
    for name in ("ranking_seed", "effects", "measured_for", "hook_name", "d_sae"):
        if name in known:
            provenance = provenance.with_fields(**{name: known[name]})
    return provenance


def refuse_untold(experiment: Experiment, path: Path, ranked: Mapping[str, RankedLatents], side: Side) -> None:
    """Raises UserError for a matched ranking's file that does not say what its latents and the baseline's remove."""
    for question in ranked.values():
        if question.target(side) is None or question.removed(side) is None:
            advice = advise_round_1(experiment, overwrite=True)
            raise UserError(f"{path}: does not say what the baseline's latents remove: {advice}")


def advise_round_1(experiment: Experiment, **changed: object) -> str:
    """What to do where a masked round lacks what round 1 makes: the command, with the round's own options."""
    command = write_command(experiment.options, activations=None, **changed)
    if experiment.options.activations:  # it may be somebody else's file
        return f"leave --activations out and run this first: {command}"
    return f"run this first: {command}"


def refuse_unasked(experiment: Experiment, path: Path, stored: Provenance) -> None:
    """Raises UserError where questions are selected that round 1 never asked. stored: what its file says."""
    asked = {question.id for question in experiment.select_as(stored)}
    unasked = [question.id for question in experiment.asked if question.id not in asked]
    if not unasked:
        return
    selection = []
    for name in SELECTION:
        value = getattr(stored, name)
        if value is not None:
            selection.append(f"--{name} {value}")
    goes_on = asked <= {question.id for question in experiment.asked}
    advice = advise_round_1(experiment, overwrite=not goes_on)
    raise UserError(
        f"{path}: round 1 never asked {len(unasked)} of the {len(experiment.asked)} selected questions ({unasked[0]}): "
        f"give {' '.join(selection)}, as in round 1, or {advice}"
    )


def find_activations(experiment: Experiment, ranking: str) -> Path:
    """The file of a ranking's activations: the one that ships is used where the folder has none of its own."""
    path = experiment.activations_file(ranking)
    shipped = ROOT / path.name
    if experiment.options.activations or path.exists() or not shipped.exists():
        return path
    content = files.read_activations(shipped)
    assert isinstance(content, Activations)  # what ships is of the form that round 1 writes
    if differences(content.provenance, experiment.provenance_of(ranking), OF_RANKING):
        return path
    say(f"{path} is not there: using {shipped.name}, which ships with the project.")
    return shipped


def take_from_mean_file(experiment: Experiment, path: Path, own: Activations) -> tuple[Path, Activations]:
    """The file beside a ranking's own, and what it holds: the same lists, and what mean ablation of them changes.

    own: what the ranking's own file holds.  Raises UserError where the file beside it is missing, or of another run or
    lists.
    """
    beside = files.name_mean_file(path)
    if not beside.exists():
        raise UserError(f"{beside}: there is no such file: {advise_round_1(experiment)}")
    content = files.read_activations(beside)
    if isinstance(content, PublishedActivations) or differences(content.provenance, own.provenance, OF_RANKING):
        problem = f"is of another run than {path.name}"
    elif select_lists(content.ranked) != select_lists(own.ranked):
        problem = f"has other lists than {path.name}"
    else:
        return beside, content
    raise UserError(f"{beside}: {problem}: {advise_round_1(experiment, overwrite=True)}")


def select_lists(ranked: list[RankedQuestion]) -> list[tuple]:
    """The ids and the lists of latents of ranked questions."""
    lists = []
    for question in ranked:
        lists.append((question.id, question.topk, question.bottomk))
    return lists


def match_ids(experiment: Experiment, ranked: list[RankedQuestion]) -> tuple[dict[str, RankedQuestion], list[str]]:
    """Ranked questions by id, and the ids that the data set lacks."""
    known = {question.id for question in experiment.questions}
    by_id = {}
    missing = []
    for question in ranked:
        if question.id in known:
            by_id[question.id] = question
        else:
            missing.append(question.id)
    return by_id, missing


def match_prompts(
    experiment: Experiment, ranked: list[PublishedQuestion]
) -> tuple[dict[str, PublishedQuestion], list[str]]:
    """Ranked questions of the authors' file by question id, and the prompts that no question has."""
    ids_of_prompt: dict[str, list[str]] = {}
    for question in experiment.questions:
        ids_of_prompt.setdefault(experiment.prompt(question), []).append(question.id)
    by_id = {}
    missing = []
    for published in ranked:
        ids = ids_of_prompt.get(published.prompt)
        if ids:
            by_id[ids.pop(0)] = published  # the same prompt twice: the first stands for the first question, and so on
        else:
            missing.append(published.prompt)
    return by_id, missing


def find_asked(experiment: Experiment, ranked: dict[str, RankedFile]) -> list[Question]:
    """The questions that are masked: those selected that any of the files has.

    Raises UserError where the files are not of the same unmasked answers: one draft, and one reference, stands for all.
    """
    rankings = sorted(ranked, key=lambda ranking: ranking in OTHERS)  # these lack some of the questions
    first = ranked[rankings[0]]
    for question in experiment.asked:
        for ranking in rankings[1:]:
            other = ranked[ranking]
            is_left_out = ranking in OTHERS and question.id not in other.questions
            if is_left_out or same_answer(first.questions.get(question.id), other.questions.get(question.id)):
                continue
            command = write_command(experiment.options, overwrite=True, **(first.selection or {}))
            raise UserError(
                f"{first.path} and {other.path} are of different unmasked answers (question {question.id}): give "
                f"one --ranking at a time, or answer once for all of them: {command}"
            )
    ids: set[str] = set()
    for file in ranked.values():
        ids.update(file.questions)
    return [question for question in experiment.asked if question.id in ids]


def find_drafts(asked: list[Question], ranked: dict[str, RankedFile]) -> dict[str, list[int]]:
    """{id: the unmasked answer's tokens}, none where the file does not have them; the same for all rankings."""
    drafts = {}
    for file in ranked.values():
        for question in asked:
            if question.id in file.questions:
                drafts[question.id] = file.questions[question.id].tokens or []
    return drafts


def check_latents(ranked: dict[str, RankedFile], model: SplicedModel) -> None:
    """Refuses latents that the SAE, and tokens that the model does not have."""
    vocabulary = cast(int, model.lm.get_input_embeddings().num_embeddings)  # PyTorch cannot say what an attribute is
    d_sae = model.splice.d_sae
    for file in ranked.values():
        for question_id, question in file.questions.items():
            where = f"{file.path}: question {question_id}"
            latents = list(question.latents(file.side))
            for draw in question.more_draws or []:
                latents += draw.topk if file.side == "topk" else draw.bottomk
            latent = max(latents, default=0)
            if latent >= d_sae:
                raise UserError(f"{where} names latent {latent}, but the SAE has {d_sae}")
            tokens = question.tokens or []
            token = max(tokens, default=0)
            if token >= vocabulary:
                raise UserError(f"{where} names token {token}, but the model has {vocabulary}")


def read_stored_means(experiment: Experiment) -> list[float]:
    """The mean activation of each latent of the SAE that round 1 stored with --ablation mean."""
    path = experiment.options.output_dir / "means.json"
    if not path.exists():
        raise UserError(f"{path}: there is no such file: {advise_round_1(experiment)}")
    content = files.read_means(path)
    refuse_other_run(path, content.provenance, experiment.provenance, SETTINGS)
    refuse_unasked(experiment, path, content.provenance)
    return content.means
