"""Which latents matter, against naive versions: single effects, attribution, controls in a random direction, masks that
keep a list alone, lists of several draws. Float32, unless a test says otherwise."""

import dataclasses
import hashlib
import random

import conftest
import oracle
import pytest
import test_families
import torch
import transformers
from conftest import ROOT, load, read_activations, run_script
from test_families import get_layers, splice_by_hand, splice_into

from experiment import prompts
from experiment.intervention import effects, forward, memory, ranked_lists, rankings, splice
from experiment.intervention.ablations import Ablation, Mask, draw_directions
from experiment.intervention.ranked_lists import Settings
from experiment.intervention.sequences import Sequences

windowed = test_families.windowed  # a fixture: a tiny Gemma 2, as TransformerLens and as Transformers have it
COUNT = 6
LAYER = 1  # of the demo's SAE
PLACES = [
    "blocks.0.hook_resid_post",
    "blocks.1.hook_mlp_out",
    "blocks.1.attn.hook_z",
    "blocks.2.hook_resid_post",
]


@pytest.fixture(scope="module")
def plain():
    """The demo's model as Transformers has it."""
    return transformers.AutoModelForCausalLM.from_pretrained(ROOT / "demo/model", attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def cases(demo, demo_questions):
    """Prompts of the first questions that are answered inside brackets, and what answers them."""
    model, tokenizer = demo
    asked = demo_questions[: 2 * COUNT]
    given = [oracle.encode_prompt(tokenizer, question.context, question.question) for question in asked]
    found, _ = conftest.answer(model, given, [question.context for question in asked], 50)
    kept = []
    for question, prompt, one in zip(asked, given, found):
        if prompts.find_answer(tokenizer, one.tokens):
            kept.append((question, prompt, one.tokens))
    assert len(kept) > COUNT
    return kept[:COUNT]


def make_sequences(model, tokenizer, cases):
    """The Sequences of these cases, read by this model."""
    questions, given, generated = zip(*cases)
    whole = [prompt + tokens[:-1] for prompt, tokens in zip(given, generated)]
    _, read = conftest.answer(model, whole, [question.context for question in questions], 1)
    return Sequences(
        ids=[question.id for question in questions],
        prompts=list(given),
        generated=list(generated),
        brackets=[prompts.find_bracket(tokenizer, tokens) for tokens in generated],
        answer_positions=[prompts.find_answer(tokenizer, tokens) for tokens in generated],
        rows=list(range(len(cases))),
        read=read,
        special_ids=prompts.find_special_ids(tokenizer),
    )


@pytest.fixture(scope="module")
def sequences(demo, cases):
    model, tokenizer = demo
    made = make_sequences(model, tokenizer, cases)
    assert max(map(len, made.answer_positions)) > 1
    return made


def spliced(demo, error_term):
    return forward.SplicedModel(demo[0].model, splice.Splice(demo[0].splice.sae, error_term))


def score_by_hand(plain, prompt, generated, inside):
    """m: the mean log probability of the answer's own tokens, from one forward pass of Transformers alone."""
    logits = plain(torch.tensor([prompt + generated])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    return torch.stack([log_probs[len(prompt) + place - 1, generated[place]] for place in inside]).mean()


def attribute_by_hand(plain, module, sae, prompt, generated, inside, error_term, reads):
    """Plain autograd of m through everything: the sum over positions of A * dm/dA."""
    kept = []

    def replace(x):
        acts = sae.encode(x).detach().requires_grad_()
        kept.append(acts)
        decoded = sae.decode(acts)
        return decoded + (x - decoded).detach() if error_term == "keep" else decoded

    def change_input(module, args):
        return replace(args[0]), *args[1:]

    def change_output(module, args, out):
        return (replace(out[0]), *out[1:]) if isinstance(out, tuple) else replace(out)

    if reads:
        handle = module.register_forward_pre_hook(change_input)
    else:
        handle = module.register_forward_hook(change_output)
    m = score_by_hand(plain, prompt, generated, inside)
    handle.remove()
    (gradient,) = torch.autograd.grad(m, kept)
    return (gradient * kept[0].detach())[0].sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Attribution


@pytest.mark.parametrize("error_term", ["drop", "keep"])
@pytest.mark.parametrize("size", [1, COUNT])
def test_attribution(demo, plain, sequences, error_term, size, monkeypatch):
    """In padded batches, the graph begun at the reconstruction, against plain autograd on Transformers."""
    model = spliced(demo, error_term)
    monkeypatch.setattr(rankings, "rows_at_once", lambda model, rows, width: size)
    scores = rankings.rank_by_attribution(model, sequences, 42)
    for n, row in enumerate(scores):
        case = sequences.prompts[n], sequences.generated[n], sequences.answer_positions[n]
        layer = plain.model.layers[LAYER]
        theirs = attribute_by_hand(plain, layer, model.splice.sae, *case, error_term, reads=False)
        assert (theirs > 0).sum() > 50 and (theirs < 0).sum() > 50
        torch.testing.assert_close(row, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def make_windowed_sequences(model, windowed):
    """Sequences of the tiny model: its own answers, of which some tokens are called the answer."""
    found, read = conftest.answer(model, windowed.prompts, windowed.contexts, 5)
    count = len(windowed.prompts)
    return Sequences(
        ids=[str(n) for n in range(count)],
        prompts=windowed.prompts,
        generated=[one.tokens for one in found],
        brackets=[1] * count,
        answer_positions=[[2], [2, 3], [], [2, 3, 4]][:count],
        rows=list(range(count)),
        read=read,
        special_ids=[windowed.tokenizer.bos_token_id],
    )


@pytest.mark.parametrize("hook_name", PLACES)
@pytest.mark.parametrize("error_term", ["drop", "keep"])
@pytest.mark.parametrize("windowed", [512], indirect=True)
def test_attribution_and_effects_at_other_places(hook_name, error_term, windowed):
    """Between two layers, inside one and behind the last; a sequence without an answer has no scores."""
    model = splice_into(windowed, hook_name, error_term)
    sae = model.splice.sae
    sequences = make_windowed_sequences(model, windowed)
    _, number, place = hook_name.split(".", 2)
    layer = get_layers(windowed.plain)[int(number)]
    name, _, direction = test_families.PLACES[place]
    module = layer.get_submodule(name)
    scores = rankings.rank_by_attribution(model, sequences, 0)
    candidates = effects.find_candidates(model, sequences, [], 10)
    measured = effects.measure(model, sequences, candidates, 400)
    for n, inside in enumerate(sequences.answer_positions):
        case = sequences.prompts[n], sequences.generated[n], inside
        if not inside:
            assert not scores[n].any() and candidates[n].latents == measured[n] == []
            assert candidates[n].left_out is None
            continue
        theirs = attribute_by_hand(windowed.plain, module, sae, *case, error_term, direction == "reads")
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(scores[n], theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
        latents = candidates[n].latents
        assert len(latents) == 10 and candidates[n].left_out > 0
        unmasked, *others = (
            measure_by_hand(windowed.plain, layer, place, sae, case, masked, error_term)
            for masked in ([], *([latent] for latent in latents))
        )
        expected = [unmasked - other for other in others]
        assert max(map(abs, expected)) > 1e-3
        assert measured[n] == pytest.approx(expected, abs=2e-5)


def measure_by_hand(plain, layer, place, sae, case, masked, error_term):
    handle = splice_by_hand(layer, place, True, sae, masked, error_term)
    with torch.no_grad():
        m = float(score_by_hand(plain, *case))
    handle.remove()
    return m


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_attribution_and_effects_in_half_precision(demo, sequences, cases, dtype):
    """About what they are in float32, and a small gradient does not vanish."""
    half, tokenizer = load("--dtype", dtype)
    ours = make_sequences(half, tokenizer, cases)
    scores = rankings.rank_by_attribution(half, ours, 42)
    exact = rankings.rank_by_attribution(demo[0], sequences, 42)
    few = take(ours, [0, 1])
    candidates = effects.find_candidates(half, few, [scores], 24)
    measured = effects.measure(half, few, candidates, 2048)
    of_same = effects.measure(demo[0], take(sequences, [0, 1]), candidates, 2048)
    tolerance = {"float16": 0.02, "bfloat16": 0.15}[dtype]
    for row, theirs in zip(scores, exact):
        assert torch.cosine_similarity(row, theirs, dim=0) > 0.95
    for n in range(2):
        largest = max(map(abs, of_same[n]))
        assert largest > 0.01
        assert measured[n] == pytest.approx(of_same[n], abs=tolerance * max(1, largest))


def test_attribution_of_a_sure_model(cases):
    """Where the answer's tokens are all but sure, single precision has no 1 - P left, nor has float16 the gradient."""
    for dtype in ("float32", "float16"):
        model, tokenizer = load("--dtype", dtype)
        sequences = make_sequences(model, tokenizer, cases)
        head = model.lm.lm_head
        handle = head.original_component.register_forward_hook(lambda module, arguments, output: output * 3)
        try:
            scores = rankings.rank_by_attribution(model, sequences, 42)
        finally:
            handle.remove()
        assert scores.isfinite().all()
        assert ((scores != 0).sum(1) > 100).all()


# ---------------------------------------------------------------------------------------------------------------------
# Single effects


@pytest.mark.parametrize("error_term", ["drop", "keep"])
def test_effects(demo, plain, sequences, error_term):
    """Each latent that is active at a token that is not special, against a loop over latents with a hook on
    Transformers' own layer; passes of several latents that end within a sequence, and one latent at a time."""
    model = spliced(demo, error_term)
    sae = model.splice.sae
    [prompt], [generated], [inside] = sequences.prompts[1:2], sequences.generated[1:2], sequences.answer_positions[1:2]
    one = take(sequences, [1])
    (candidates,) = effects.find_candidates(model, one, [], 10**6)
    told = []
    (measured,) = effects.measure(model, one, [candidates], 3000, told.append)
    assert told == [1]
    sequence = prompt + generated[: inside[-1]]
    acts = oracle.activations(model.model, sae, sequence)
    ordinary = torch.tensor([token not in sequences.special_ids for token in sequence])
    assert candidates.latents == acts[ordinary].any(0).nonzero().flatten().tolist()
    assert candidates.left_out == 0 and len(candidates.latents) > 150
    assert acts.any(0).sum() > len(candidates.latents)  # some are active at BOS alone
    case = plain.model.layers[LAYER], "hook_resid_post", sae, (prompt, generated, inside)
    unmasked = measure_by_hand(plain, *case, [], error_term)
    found = sorted(zip(measured, candidates.latents))
    for effect, latent in [*found[:3], *found[3:-3:12], *found[-3:]]:
        assert effect == pytest.approx(unmasked - measure_by_hand(plain, *case, [latent], error_term), abs=2e-5)
    assert found[-1][0] > 0.005 and found[0][0] < -1e-4
    (one_by_one,) = effects.measure(model, one, [effects.Candidates(candidates.latents[:9])], 1)
    assert one_by_one == pytest.approx(measured[:9], abs=2e-5)


def take(sequences, numbers):
    lists = {}
    for name in ("ids", "prompts", "generated", "brackets", "answer_positions", "rows"):
        lists[name] = [getattr(sequences, name)[n] for n in numbers]
    return dataclasses.replace(sequences, **lists)


def test_layers_below_run_once_per_sequence(demo, sequences, monkeypatch):
    """A pass holds as many latents as fit beside a row with nothing masked; `count_passes` tells how many there are."""
    model, _ = demo
    below, above = [], []
    run_below, run_above = model.forward_below, model.forward_above
    monkeypatch.setattr(model, "forward_below", lambda layout: below.append(1) or run_below(layout))
    monkeypatch.setattr(
        model,
        "forward_above",
        lambda batch, mask, outputs: above.append(tuple(batch.ids.shape)) or run_above(batch, mask, outputs),
    )
    few = take(sequences, [0, 1, 2])
    candidates = effects.find_candidates(model, few, [], 50)
    effects.measure(model, few, candidates, 2000)
    lengths = [len(few.tokens_until(n, few.answer_positions[n][-1])) for n in range(3)]
    assert len(below) == 3
    assert len(above) == effects.count_passes(lengths, 50, 2000)
    assert all(rows * width <= 2000 for rows, width in above)
    assert sum(rows - 1 for rows, _ in above) == 3 * 50
    assert effects.count_passes([100, 300], 10, 400) == 4 + 10  # three beside the unmasked row, and one at least
    assert effects.count_passes([], 10, 400) == 0


def test_which_latents_are_measured(demo, sequences):
    """Where there are too many: the other rankings' TopK at 50%, and then those that write most."""
    model, _ = demo
    names = ("baseline", "gradsae-answer")
    scores = [rankings.RANKINGS[name](model, sequences, 42) for name in names]
    everything = effects.find_candidates(model, sequences, [], 10**6)
    for most in (5, 40):
        candidates = effects.find_candidates(model, sequences, scores, most)
        for n, of_sequence in enumerate(candidates):
            sequence = sequences.tokens_until(n, sequences.answer_positions[n][-1])
            ordinary = torch.tensor([token not in sequences.special_ids for token in sequence])
            acts = oracle.activations(model.model, model.splice.sae, sequence)[ordinary]
            written = acts.sum(0) * model.splice.sae.W_dec.norm(dim=1)
            tops = set()
            for of_ranking in scores:
                tops |= {*of_ranking[n].topk(len(sequences.active[n]) // 2).indices.tolist()}
            order = sorted(everything[n].latents, key=lambda one: (one not in tops, -float(written[one])))
            assert of_sequence.latents == sorted(order[:most])
            assert of_sequence.left_out == len(order) - most
            assert most < 40 or tops < {*of_sequence.latents}


def test_memory_runs_out_within_a_sequence(demo, sequences, monkeypatch, capsys):
    """What does not fit is split, and says of what; the effects are the same."""
    model, _ = demo
    few = take(sequences, [0])
    candidates = effects.find_candidates(model, few, [], 12)
    expected = effects.measure(model, few, candidates, 10**6)
    run_above = model.forward_above

    def run(below, mask, outputs):
        if len(below.ids) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run_above(below, mask, outputs)

    monkeypatch.setattr(model, "forward_above", run)
    assert effects.measure(model, few, candidates, 10**6)[0] == pytest.approx(expected[0], abs=2e-5)
    assert "Out of memory with 12 masks in a batch" in capsys.readouterr().err
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


def test_all_rankings_with_effects(demo, sequences):
    """Every ranking has its own scores of the latents that were measured; lists by effect, highest and lowest first."""
    model, _ = demo
    few = dataclasses.replace(take(sequences, [0, 1, 2]), answer_positions=[*sequences.answer_positions[:2], []])
    settings = Settings(42, batch_tokens=4096, effects=30)
    names = ["baseline", "effect", "attribution"]
    ranked = ranked_lists.rank_all(model, names, few, settings)
    scores = {name: rankings.RANKINGS[name](model, few, 42) for name in ("baseline", "attribution")}
    candidates = effects.find_candidates(model, few, scores.values(), 30)
    measured = effects.measure(model, few, candidates, 4096)
    assert ranked.keys() == {*names}
    for n in range(3):
        latents = candidates[n].latents
        found = dict(zip(latents, measured[n]))
        by_effect = ranked["effect"][n]
        assert by_effect.measured == latents
        assert by_effect.effects == pytest.approx(measured[n], rel=1e-3, abs=1e-6)
        assert all(effect == float(f"{effect:.4g}") for effect in by_effect.effects)
        assert by_effect.unmeasured == candidates[n].left_out
        assert by_effect.scores is None
        assert by_effect.topk == sorted(latents, key=lambda one: (-found[one], one))
        assert by_effect.bottomk == sorted(latents, key=lambda one: (found[one], one))
        assert len(by_effect.removed_topk) == len(latents) == (30 if few.answer_positions[n] else 0)
        for name, rows in scores.items():
            of_ranking = ranked[name][n]
            assert of_ranking.measured == latents and of_ranking.effects is None and of_ranking.unmeasured is None
            assert of_ranking.scores == pytest.approx(rows[n][latents].tolist(), rel=1e-3)
            alone = ranked_lists.rank(model, name, few, 42)[n]
            assert dataclasses.replace(of_ranking, measured=None, scores=None) == alone
    # A ranking that is made later, in a command that has named effects all along.
    again = ranked_lists.rank_all(model, ["attribution"], few, settings, names)
    assert again == {"attribution": ranked["attribution"]}
    assert ranked_lists.rank_all(model, ["baseline"], few, settings)["baseline"][0].measured is None


def test_an_effect_of_zero_has_its_place():
    """Half precision has many: they stand between what the answer needs and what speaks against it."""
    scores = torch.tensor([0.0, 0.5, 0.0, -0.5, 0.0])
    assert rankings.top_and_bottom(scores, 3, among=[1, 2, 3]) == ([1, 2, 3], [3, 2, 1])
    assert rankings.top_and_bottom(scores, 3, among=[]) == ([], [])
    assert rankings.top_and_bottom(scores, 3) == ([1, 3], [3, 1])


# ---------------------------------------------------------------------------------------------------------------------
# Keep only


def draw_lists(count, size, seed, d_sae=512):
    rng = random.Random(seed)
    return [sorted(rng.sample(range(d_sae), size)) for _ in range(count)]


@pytest.mark.parametrize("error_term", ["drop", "keep"])
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_keep_only(demo, sequences, cases, error_term, ablation):
    """Everything but a list is masked, and of no list everything, as by hooks: answers, and log probabilities."""
    model = spliced(demo, error_term)
    sae = model.splice.sae
    means = 0.06 * torch.rand(512, generator=torch.Generator().manual_seed(2)) if ablation == "mean" else None
    kept = [*(sequences.active[n] for n in range(3)), [], [5]]
    given = sequences.prompts[: len(kept)]
    drafts = sequences.generated[: len(kept)]
    contexts = [case[0].context for case in cases[: len(kept)]]
    (found,) = conftest.answer_masked(model, given, contexts, drafts, [Ablation(kept, keep_only=True)], 12, means)
    for prompt, latents, answer in zip(given, kept, found):
        masked = [latent for latent in range(512) if latent not in latents]
        how = {"means": means, "error": error_term == "keep"}
        assert answer.tokens == oracle.generate(model.model, sae, demo[1], prompt, masked, 12, **how)
    assert found[3].tokens != drafts[3]


# ---------------------------------------------------------------------------------------------------------------------
# The same hole in a random direction


def turn_by_hand(x, without, seed):
    """What stands at positions: formula and draw written anew, in double precision. x, without: [pos, d_in]."""
    digest = hashlib.sha256(seed.encode()).digest()
    drawn = torch.empty(x.shape[-1])
    drawn.normal_(generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big")))
    out = []
    for at, left in zip(x.double(), without.double()):
        r = at - left
        unit = at / at.norm()
        c = float(r @ unit)
        u = drawn.double() - float(drawn.double() @ unit) * unit
        u = u / u.norm()
        size = max(0.0, float(r @ r) - c * c) ** 0.5
        out.append(at - c * unit - size * u)
    return torch.stack(out).to(x.dtype)


def generate_turned(model, tokenizer, prompt, latents, seed, longest, error_term, means=None):
    """Greedy answers, the whole sequence again for every token, the hole turned at every position."""
    sae = model.splice.sae

    def replace(residual, hook):
        whole = sae.decode(sae.encode(oracle.read(sae, residual)))
        acts = sae.encode(oracle.read(sae, residual)).clone()  # again: decoding may use up what encoding noted
        acts[:, :, latents] = 0 if means is None else means[latents]
        without = sae.decode(acts)
        if error_term == "keep":
            before = oracle.read(sae, residual).reshape(whole.shape)
            whole, without = before, before - (whole - without)
        turned = turn_by_hand(whole[0].flatten(1), without[0].flatten(1), seed)
        return turned.reshape(residual.shape).to(residual.dtype)

    ids = []
    with torch.no_grad(), model.model.hooks(fwd_hooks=[(model.hook_name, replace)]):
        while len(ids) < longest and not (ids and ids[-1] in model.end_ids):
            ids.append(int(model.model(torch.tensor([prompt + ids]))[0, -1].argmax()))
    return ids


@pytest.mark.parametrize(("error_term", "ablation"), [("drop", "zero"), ("keep", "zero"), ("drop", "mean")])
def test_directions(demo, sequences, cases, error_term, ablation):
    """Answers of a naive loop with hooks, in pools with other masks and alone, whatever the batch."""
    model = spliced(demo, error_term)
    means = 0.06 * torch.rand(512, generator=torch.Generator().manual_seed(2)) if ablation == "mean" else None
    count = 5
    given, drafts = sequences.prompts[:count], sequences.generated[:count]
    contexts = [case[0].context for case in cases[:count]]
    lists = draw_lists(count, 200 if error_term == "drop" else 400, 3)
    seeds = [f"42 baseline {n}" for n in range(count)]
    masks = [Ablation(lists), Ablation(lists, seeds=seeds), Ablation(sequences.active[:count], keep_only=True)]
    expected = []
    for prompt, latents, seed in zip(given, lists, seeds):
        expected.append(generate_turned(model, demo[1], prompt, latents, seed, 12, error_term, means))
    alone = conftest.answer_masked(model, given, contexts, drafts, masks[1:2], 12, means)[0]
    assert [answer.tokens for answer in alone] == expected
    found = conftest.answer_masked(model, given, contexts, drafts, masks, 12, means)
    for answer, other in zip(found[1], alone):
        assert answer.tokens == other.tokens
        assert answer.log_probs == pytest.approx(other.log_probs, abs=2e-4)
    for mask, answers in zip((masks[0], masks[2]), (found[0], found[2])):
        (by_itself,) = conftest.answer_masked(model, given, contexts, drafts, [mask], 12, means)
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in by_itself]
    went_on = sum(answer.tokens != draft for answer, draft in zip(found[1], drafts))
    assert went_on >= 2 and found[0] != found[1]


@pytest.mark.parametrize("error_term", ["drop", "keep"])
def test_size_and_part_along_x_at_every_position(demo, sequences, cases, error_term, monkeypatch):
    """Of the prompt and of what is generated, in the wide pass and in steps: what is taken away is as long as what the
    mask takes away, with the same part along what stands there unmasked; nothing at padding and where tokens bypass."""
    tokenizer = demo[1]
    bypass = prompts.find_special_ids(tokenizer)
    model = forward.SplicedModel(demo[0].model, splice.Splice(demo[0].splice.sae, error_term, bypass))
    sae = model.splice.sae
    real = model.splice.reconstruct
    widths = set()
    turned = plain = untouched = 0

    def watch(latents, rows=None, mask=None):
        nonlocal turned, plain, untouched
        out = real(latents, rows, mask)
        if mask is None:
            return out
        widths.add(len(latents.counts))
        acts = sae.encode(latents.residual)
        changed = acts.masked_fill(mask.masked[rows], 0)
        x, without = sae.decode(acts), sae.decode(changed)
        if error_term == "keep":
            x, without = latents.residual, latents.residual - (x - without)
        r, taken = (x - without).double(), (x - out).double()
        unit = x.double() / x.double().norm(dim=1, keepdim=True)
        has_direction = mask.directions is not None and mask.directions.any(1)[rows]
        for at in range(len(out)):
            if not latents.spliced[at]:
                assert torch.equal(out[at], latents.residual[at])
                untouched += 1
            elif mask.directions is None or not has_direction[at]:
                torch.testing.assert_close(out[at], without[at], rtol=1e-4, atol=1e-4)
                plain += 1
            else:
                size = float(r[at].norm())
                assert float(taken[at].norm()) == pytest.approx(size, rel=1e-3, abs=1e-4)
                assert float(taken[at] @ unit[at]) == pytest.approx(float(r[at] @ unit[at]), abs=1e-3 * size + 1e-4)
                turned += 1
                if size > 1:
                    cosine = float(taken[at] @ r[at]) / size**2
                    along = float(r[at] @ unit[at]) ** 2 / size**2
                    assert abs(cosine - along) < 0.6  # the rest points elsewhere
        return out

    monkeypatch.setattr(model.splice, "reconstruct", watch)
    count = 4
    given, drafts = sequences.prompts[:count], sequences.generated[:count]
    lists = draw_lists(count, 200, 3)
    masks = [Ablation(lists), Ablation(lists, seeds=[f"7 {n}" for n in range(count)])]
    conftest.answer_masked(model, given, [case[0].context for case in cases[:count]], drafts, masks, 12)
    assert min(widths) <= 2 * count < max(widths)  # steps, too
    assert turned > 300 and plain > 300 and untouched > 8


def test_directions_hang_on_their_seed_alone(demo):
    """Not on the batch; and every row of a mask keeps its own."""
    drawn = draw_directions(["42 a", "42 b", "42 2 a"], 128)
    assert torch.equal(drawn[1:2], draw_directions(["42 b"], 128))
    assert abs(torch.corrcoef(drawn)).fill_diagonal_(0).max() < 0.4
    assert abs(float(drawn.mean())) < 0.2 and float(drawn.std()) == pytest.approx(1, abs=0.1)
    model = demo[0]
    turned = model.splice.mask(Ablation([[1], [2]], seeds=["x", "y"]))
    usual = model.splice.mask(Ablation([[3]]))
    together = Mask.join([usual, turned, usual])
    assert not together.directions[[0, 3]].any()
    assert torch.equal(together.directions[1:3], draw_directions(["x", "y"], 128))
    assert torch.equal(together.take(torch.tensor([2])).directions[0], turned.directions[1])
    assert Mask.join([usual, usual]).directions is None
    assert Ablation([[1], [2]], seeds=["x", "y"]).take([1]) == Ablation([[2]], seeds=["y"])
    assert Ablation([[1], [2]], keep_only=True).take([0, 0]) == Ablation([[1], [1]], keep_only=True)


@pytest.mark.parametrize("hook_name", [*PLACES, "blocks.0.hook_resid_pre"])
@pytest.mark.parametrize("kind", [0, 4])  # decoded from entries, and whole (layer norm)
@pytest.mark.parametrize("windowed", [512], indirect=True)
def test_directions_and_keep_only_at_other_places(hook_name, kind, windowed, replayed, monkeypatch):
    if kind == 0:
        monkeypatch.setattr(splice, "DENSE", 1)  # the way of sparse activations, which these are not
    model = splice_into(windowed, hook_name, kind=kind)
    assert (model.splice.bias is None) == (kind == 4)
    lists = test_families.draw_masks(model.splice.d_sae)[1]
    seeds = [f"1 {n}" for n in range(len(lists))]
    masks = [Ablation(lists, seeds=seeds), Ablation(lists, keep_only=True)]
    unmasked, _ = conftest.answer(model, windowed.prompts, windowed.contexts, 5)
    drafts = [answer.tokens for answer in unmasked]
    turned, kept = conftest.answer_masked(model, windowed.prompts, windowed.contexts, drafts, masks, 5)
    changed = 0
    for n, prompt in enumerate(windowed.prompts):
        expected = generate_turned(model, windowed.tokenizer, prompt, lists[n], seeds[n], 5, "drop")
        assert turned[n].tokens == expected
        others = [latent for latent in range(model.splice.d_sae) if latent not in lists[n]]
        naive = oracle.generate(windowed.bridge, model.splice.sae, windowed.tokenizer, prompt, others, 5)
        assert kept[n].tokens == naive
        changed += expected != drafts[n]
    assert changed >= 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_directions_in_half_precision(sequences, cases, dtype):
    """The model in half precision, and the SAE too: about the same hole, and finite."""
    for more in ((), ("--sae-dtype", dtype)):
        half, _ = load("--dtype", dtype, *more)
        count = 4
        lists = [sequences.active[n] for n in range(count)]
        masks = [Ablation(lists, seeds=[f"7 {n}" for n in range(count)]), Ablation(lists)]
        contexts = [case[0].context for case in cases[:count]]
        drafts = sequences.generated[:count]
        turned, usual = conftest.answer_masked(half, sequences.prompts[:count], contexts, drafts, masks, 12)
        assert torch.tensor([answer.log_probs for answer in turned][0]).isfinite().all()
        assert turned != usual
        residual = half.splice.sae.W_dec[:40].to(half.lm.dtype) * 30
        latents = half.splice.encode(residual, torch.ones(40, dtype=torch.bool))
        rows = torch.zeros(40, dtype=torch.long)
        every = list(range(0, 512, 2))
        x = half.splice.reconstruct(latents).float()
        r = x - half.splice.reconstruct(latents, rows, half.splice.mask(Ablation([every]))).float()
        mask = half.splice.mask(Ablation([every], seeds=["s"]))
        taken = x - half.splice.reconstruct(latents, rows, mask).float()
        assert float(r.norm(dim=1).max()) > 10
        tolerance = {"float16": 0.02, "bfloat16": 0.15}[dtype]
        torch.testing.assert_close(taken.norm(dim=1), r.norm(dim=1), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Draws


def test_draws(demo, sequences):
    """The first is as ever; others are of seeds of their own; each measured and cut as the first, and stored."""
    model, _ = demo
    few = take(sequences, [0, 1])
    for name in ("random", "matched"):
        once = ranked_lists.rank(model, name, few, 42)
        drawn = ranked_lists.rank(model, name, few, 42, draws=3)
        for n, lists in enumerate(drawn):
            assert once[n].more_draws is None
            assert dataclasses.replace(lists, more_draws=None) == once[n]
            assert len(lists.more_draws) == 2
            for draw, other in zip((2, 3), lists.more_draws):
                (expected,) = (
                    one for number, one in enumerate(ranked_lists.rank(model, name, few, f"42 {draw}")) if number == n
                )
                assert other == dataclasses.replace(expected, target_topk=None, target_bottomk=None)
                assert other.topk != lists.topk and len(other.removed_topk) == len(other.topk)
            fields = lists.fields()
            assert fields["more_draws"][0].keys() == {"topk", "bottomk", "removed_topk", "removed_bottomk"}
            means = torch.rand(512, generator=torch.Generator().manual_seed(0))
            (again,) = ranked_lists.measure_again(model, name, take(few, [n]), [lists], means)
            for draw, before in zip(again.more_draws, lists.more_draws):
                (expected,) = ranked_lists.add_removed(model, take(few, [n]), [before], means)
                assert draw == expected and draw.removed_topk != before.removed_topk
    baseline = ranked_lists.rank(model, "baseline", few, 42, draws=3)
    assert baseline == ranked_lists.rank(model, "baseline", few, 42)
    # Of the seeds that are promised: 42 2 ID.
    scores = rankings.rank_at_random(model, few, "42 2")
    draw = random.Random(f"42 2 {few.ids[0]}")
    active = scores[0].nonzero().flatten()
    assert scores[0][active].tolist() == pytest.approx([1 + draw.random() for _ in active])


# ---------------------------------------------------------------------------------------------------------------------
# Round 1


def test_round_1_with_effects(tmp_path, monkeypatch, capsys):
    """What each file holds of the latents that were measured; how many passes that takes is said before."""
    given = ["--demo", "--limit", 8, "--output-dir", tmp_path, "--ranking", "baseline", "effect", "--effects", 20]
    code, out, err = run_script("baseline", given, monkeypatch, capsys)
    assert code == 0, err
    says = "up to 20 latents of each question that is kept are masked one by one: about 8 passes of 16384 tokens"
    assert f"--ranking effect: {says} at most" in err
    _, by_effect = read_activations(tmp_path / "activations_effect.json")
    _, baseline = read_activations(tmp_path / "activations_baseline.json")
    assert len(by_effect) == len(baseline) > 3
    for ours, theirs in zip(by_effect, baseline):
        assert ours["measured"] == theirs["measured"] and len(ours["measured"]) == len(ours["effects"]) == 20
        assert ours["unmeasured"] > 0 and len(theirs["scores"]) == 20
        found = dict(zip(ours["measured"], ours["effects"]))
        assert ours["topk"] == sorted(ours["topk"], key=lambda latent: -found[latent])
        assert {*theirs["topk"][: len(theirs["active"]) // 2]} < {*ours["measured"]}
        assert "effects" not in theirs and "scores" not in ours
    code, _, err = run_script("baseline_after_false", given[:-2], monkeypatch, capsys)
    assert code == 0, err
