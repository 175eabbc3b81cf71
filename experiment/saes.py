"""SAEs: where their files lie, what their configuration says, and which of them can be masked here at all.

The configuration comes first, so that an SAE that cannot be used costs no download of weights. SAELens reads what it
trained, and what its table leads to. Beside that, SAEs in the format of EleutherAI's sparsify are read, from a folder
or from a repository on the Hub.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import Tensor

from experiment import UserError, catalogue
from experiment.demo import bundled
from experiment.hub import hub_errors
from experiment.options import Options

if TYPE_CHECKING:  # importing SAELens takes seconds
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEConfig

CONFIG = "cfg.json"
SAELENS_WEIGHTS = "sae_weights.safetensors"
SPARSIFY_WEIGHTS = "sae.safetensors"
GEMMA_SCOPE_WEIGHTS = ("params.npz", "params.safetensors")  # of Gemma Scope, and of Gemma Scope 2
FORMATS = f"{CONFIG} with {SAELENS_WEIGHTS} (SAELens) or {SPARSIFY_WEIGHTS} (sparsify) would make it one"
# Not hook_resid_mid: TransformerLens replaces what the MLP reads there, but not what is added to the MLP's output.
PLACES = r"blocks\.[0-9]+\.(?:hook_resid_pre|hook_resid_post|hook_mlp_out|hook_attn_out|attn\.hook_z)"
# sparsify names an SAE's folder after the module of Transformers whose output it was trained on.
SPARSIFY_FOLDER = re.compile(r"layers[._](?P<layer>[0-9]+)(?:[._](?P<module>mlp|self_attn|attention))?")
SPARSIFY_PLACES = {
    None: "hook_resid_post",
    "mlp": "hook_mlp_out",
    "self_attn": "hook_attn_out",
    "attention": "hook_attn_out",
}
# What sparsify can do beside a TopK SAE, by the names of its settings. SAELens' loader does not look at them.
SPARSIFY_VARIANTS = ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed")


def name_of(options: Options) -> str:
    """What an SAE is called in messages."""
    return f"{options.sae_release} {options.sae_id}".strip()


# ---------------------------------------------------------------------------------------------------------------------
# Files


def find_folder(options: Options) -> Path | None:
    """The folder that holds an SAE's files. None for a release in SAELens' table: SAELens knows where those lie.

    A local folder has been looked into: what is returned has all files of an SAE. Of a repository on the Hub only the
    configuration has been downloaded.
    """
    release = Path(bundled(options.sae_release))
    if release.is_dir():
        folder = release / options.sae_id
        _check_files(folder, options)
        return folder
    if options.sae_release in catalogue.sae_table():
        return None
    return Path(_download(options, CONFIG)).parent


def _download(options: Options, file: str) -> str:
    """Downloads a file of an SAE from a repository on the Hub that is not in SAELens' table; returns its path."""
    path = f"{options.sae_id}/{file}" if options.sae_id else file
    try:
        return huggingface_hub.hf_hub_download(options.sae_release, path)
    except RemoteEntryNotFoundError:
        raise UserError(f"{name_of(options)}: no SAE, for the repository has no {path}: {FORMATS}") from None


def _check_files(folder: Path, options: Options) -> None:
    """Raises UserError for a folder that lacks files of an SAE. Says what would help, where that can be seen."""
    if not folder.is_dir():
        raise UserError(f"--sae-id {options.sae_id}: no such folder in {options.sae_release}{_name_folders(options)}")
    missing = _find_missing(folder)
    if missing is None:
        return
    no_sae = f"{name_of(options)}: no SAE that SAELens can read"
    for file in GEMMA_SCOPE_WEIGHTS:
        if (folder / file).is_file():
            instead = _name_release(folder)
            raise UserError(f"{no_sae}, but Gemma Scope's own download: give {instead} instead of the folder")
    others = _name_folders(options) if missing == CONFIG else ""
    raise UserError(f"{no_sae}, for it has no {missing}: {FORMATS}{others}")


def _find_missing(folder: Path) -> str | None:
    """The name of the file that a folder lacks to hold an SAE; None where it lacks none."""
    if not (folder / CONFIG).is_file():
        return CONFIG
    weights = _weights_of(folder)
    return None if (folder / weights).is_file() else weights


def _name_release(folder: Path) -> str:
    """What to give instead of a folder of Gemma Scope's own download."""
    advice = []
    for name, sae_id in catalogue.names_of_files(folder):
        advice.append(f"--sae-release {name} --sae-id {sae_id}")
    return " or ".join(advice[:4]) or "a release's name (--list-saes gemma-scope)"


def _name_folders(options: Options) -> str:
    """The end of a message: what --sae-id may be in a folder that holds SAEs in folders of their own, or nothing."""
    release = Path(bundled(options.sae_release))
    ids = []
    for depth in ("*", "*/*", "*/*/*"):  # no further: the folder may be somebody's home
        for config in sorted(release.glob(f"{depth}/{CONFIG}")):
            ids.append(config.parent.relative_to(release).as_posix())
    if not ids:
        return ""
    return f" (--sae-id may be {catalogue.enumerate_briefly(ids)})"


# ---------------------------------------------------------------------------------------------------------------------
# sparsify


def _read_json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError(f"{file.name} holds no object")
    return content


def _is_sparsify(folder: Path) -> bool:
    """Whether an SAE is in sparsify's format: it has a k, but neither says its size nor its architecture."""
    config = _read_json(folder / CONFIG)
    is_saelens = "d_sae" in config or "architecture" in config
    return "k" in config and "d_in" in config and not is_saelens


def _weights_of(folder: Path) -> str:
    """The name of the file of weights that belongs to a folder's configuration."""
    return SPARSIFY_WEIGHTS if _is_sparsify(folder) else SAELENS_WEIGHTS


def _describe_sparsify(folder: Path) -> dict[str, Any]:
    """What SAELens' loader of sparsify's format has to be told: as it is, it would take any module's output for the
    layer's, 0 for the number of latents where `num_latents` is not set, and would leave out b_dec before encoding,
    which sparsify always subtracts. Raises UserError for what is no TopK SAE, or does not say where it belongs."""
    config = _read_json(folder / CONFIG)
    for variant in SPARSIFY_VARIANTS:
        if config.get(variant):
            raise UserError(f"{folder.name}: has sparsify's {variant}: of its formats only plain TopK SAEs can be read")
    if config.get("activation", "topk") != "topk":
        raise UserError(f"{folder.name}: has sparsify's activation {config['activation']}: only topk can be read")
    match = SPARSIFY_FOLDER.fullmatch(folder.name)
    if not match:
        raise UserError(
            f"{folder.name}: sparsify's format says where an SAE belongs in the name of its folder alone: layers.N, "
            "layers.N.mlp or layers.N.self_attn"
        )
    beside = folder.parent / "config.json"  # of the training; without it SAELens takes the name of the folder above
    model_name = _read_json(beside).get("model") if beside.is_file() else None
    return {
        "d_sae": config.get("num_latents") or config["d_in"] * config["expansion_factor"],
        "hook_name": f"blocks.{match['layer']}.{SPARSIFY_PLACES[match['module']]}",
        "hf_hook_name": folder.name,
        "apply_b_dec_to_input": True,
        "model_name": model_name,
    }


def _read_sparsify(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A converter for SAE.load_from_disk: SAELens' own for sparsify's format, told what it does not see itself."""
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    folder = Path(path)
    overrides = cfg_overrides or {}
    overrides = overrides | _describe_sparsify(folder)
    config, state = sparsify_disk_loader(path, device, overrides)
    # It turns sparsify's own W_dec, which is [d_sae, d_in] as SAELens' is, into [d_in, d_sae].
    decoder = state["W_dec"]
    encoder = state["W_enc"]
    if decoder.shape != encoder.T.shape:
        state["W_dec"] = decoder.T
    return config, state


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and weights


def read_config(options: Options) -> "SAEConfig":
    """An SAE's configuration, without its weights. Raises UserError where it is none, or one that cannot be masked."""
    from sae_lens.saes.sae import SAEConfig

    name = name_of(options)
    with hub_errors(name):
        try:
            settings = _read_settings(options, find_folder(options))
            if settings["architecture"] == "temporal":
                raise UserError(
                    f"{name}: a temporal SAE, which encodes a position with those before it in view: only "
                    "SAEs that encode each position by itself can be masked here"
                )
            config = SAEConfig.from_dict(settings)
        except (KeyError, TypeError, AttributeError) as error:  # a folder that holds something else than an SAE
            raise UserError(f"{name}: SAELens cannot read it ({error!r})") from error
    _check_config(name, config)
    return config


def _read_settings(options: Options, folder: Path | None) -> dict[str, Any]:
    """What an SAE's configuration file says, as this version of SAELens would write it."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    if folder is None:
        return loaders.load_sae_config_from_huggingface(options.sae_release, options.sae_id)
    if _is_sparsify(folder):
        settings = loaders.get_sparsify_config_from_disk(folder, cfg_overrides=_describe_sparsify(folder))
    else:
        settings = _read_json(folder / CONFIG)
    return loaders.handle_config_defaulting(settings)


def _check_config(name: str, config: "SAEConfig") -> None:
    """Raises UserError for an SAE that cannot stand in any model here."""
    metadata = config.metadata
    writes = metadata.hook_name_out or metadata.hook_name
    if "transcoder" in config.architecture() or writes != metadata.hook_name:
        raise UserError(f"{name}: a transcoder, which reconstructs another place than it reads: give an SAE")
    if not re.fullmatch(PLACES, metadata.hook_name or ""):
        raise UserError(
            f"{name}: is for {metadata.hook_name}, but only a layer's hook_resid_pre, hook_resid_post, hook_mlp_out, "
            "hook_attn_out or attn.hook_z can be replaced"
        )
    if (metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights"):
        raise UserError(
            f"{name}: was trained on a model whose writing weights were centred, and reads another residual stream "
            "than the model's own, which is what runs here: give another SAE"
        )


def load(options: Options) -> "SAE":
    """The SAE with its weights, in --sae-dtype on --device."""
    from sae_lens import SAE

    where = {"device": options.device, "dtype": options.sae_dtype.replace("tf32", "float32")}
    name = name_of(options)
    with hub_errors(name):
        try:
            folder = find_folder(options)
            if folder is None:
                return SAE.from_pretrained(options.sae_release, options.sae_id, **where)
            weights = _weights_of(folder)
            if not (folder / weights).is_file():  # a folder of the Hub's cache: a local one is whole
                _download(options, weights)
            if weights == SPARSIFY_WEIGHTS:
                return SAE.load_from_disk(folder, converter=_read_sparsify, **where)
            return SAE.load_from_disk(folder, **where)
        except (KeyError, TypeError, RuntimeError) as error:  # weights that are not of this configuration
            raise UserError(f"{name}: SAELens cannot read it ({error!r})") from error
