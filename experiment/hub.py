"""What is asked of libraries before a model is there: devices, tokens, errors in one line, what fits together."""

import contextlib
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from experiment import UserError, catalogue, os_errors, say
from experiment.demo import ROOT, bundled
from experiment.options import TOKEN_FILE, Options

if TYPE_CHECKING:  # importing SAELens takes seconds
    from sae_lens.saes.sae import SAEConfig

TOKEN = "(token.txt, HF_TOKEN or `hf auth login`)"
REFUSED = f"the Hub refused the token, or the name: check both {TOKEN}"
NOWHERE = "there is no such repository on the Hub, or it is private and the token is not allowed in"
OWN_CODE = "needs Python code of its own to be loaded, and code of models is never run here"
NO_TOKENIZER = "has no tokenizer files that can be read: it needs tokenizer.json, or what its tokenizer is made from"
UNREACHABLE = "is not on this machine and the Hub cannot be reached: check the network (and HF_HUB_OFFLINE)"
# What to do about an error, by the first of these that stands in the names of its classes, in its text, or in those of
# its causes. A gated repository is a kind of one that is not found, and a refused token is reported as one.
ADVICE = {
    "GatedRepoError": f"is gated: accept its licence on its Hub page, then give a token of that account {TOKEN}",
    "401 Client Error": REFUSED,
    "401 Unauthorized": REFUSED,
    "RepositoryNotFoundError": NOWHERE,
    "DatasetNotFoundError": NOWHERE,
    "LocalEntryNotFoundError": UNREACHABLE,
    "OfflineModeIsEnabled": UNREACHABLE,
    "ConnectionError": UNREACHABLE,
    "HTTPError": UNREACHABLE,  # of the HTTP library, which the Hub's libraries do not always wrap
    "trust_remote_code=True": OWN_CODE,
    "Couldn't instantiate the backend tokenizer": NO_TOKENIZER,
}
LONG = 400  # characters of an error of a library: a longer one is a list of everything that is wrong


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what libraries raise while they load `name` into one line that says what to do."""
    try:
        yield
    except Exception as error:
        # OSError: the Hub's own errors, ConnectionError, a file that is not there. RuntimeError: too little memory.
        # ImportError: a package that this model needs and no other one does.
        kinds = (OSError, ValueError, RuntimeError, SafetensorError, ImportError)
        # The HTTP library's own errors are of no common kind, and come through where they are not wrapped.
        expected = isinstance(error, kinds) or type(error).__module__.startswith(("datasets", "httpx"))
        if not expected or not _passed_a_library(error):
            raise  # a bug of ours
        raise UserError(f"{name}: {_advise(error)}") from error


def _passed_a_library(error: BaseException) -> bool:
    """Whether code that is not this project's had a part in an error."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        folder = Path(frame.f_code.co_filename).parent
        if folder != ROOT and not folder.is_relative_to(ROOT / "experiment"):
            return True
    return False


def _advise(error: BaseException) -> str:
    """What to do about an error of the Hub's libraries, in one line: advice of our own, or what they say themselves."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    seen = " ".join(f"{link} {type(link).__mro__}" for link in chain)
    for sign, advice in ADVICE.items():
        if sign in seen:
            return advice
    is_silent = type(error).__name__ == "DatasetGenerationError"  # its cause says what is wrong
    speaks = chain[1] if is_silent else error
    text = str(speaks).strip()
    whole = " ".join(text.split())
    if len(whole) <= LONG or isinstance(error, ImportError):
        return whole
    return text.split("\n")[0]


def prepare_libraries(options: Options) -> None:
    """Before any library is asked for anything: device there, token in place, their progress and warnings off."""
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device here: add --demo for the bundled model, or --device cpu to run this model on the CPU (slow)"
        )
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {options.device}: PyTorch has no such device here") from None
    torch.backends.cuda.matmul.allow_tf32 = options.sae_dtype == "tf32"  # of float32 products: the SAE's
    if options.token_file:
        _use_token(options.token_file, options.demo)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # the line above hides downloads too: those a person waits for


def _use_token(file: Path, demo: bool) -> None:
    """Gives the Hub's libraries the token of --token-file, or of a token.txt that is there.

    The demo needs none: a token.txt that holds something else stops everything but the demo.
    """
    with os_errors(f"{file}: cannot be read"):
        token = file.read_text(encoding="utf-8", errors="replace").strip()
    if re.fullmatch(r"hf_[A-Za-z0-9]{8,}", token):
        os.environ["HF_TOKEN"] = token
    elif not (demo and file == ROOT / TOKEN_FILE):
        raise UserError(f"{file}: holds no Hugging Face token (hf_...): put yours in, or remove it")


def warn_of_base_model(options: Options, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Warns where a model does not look instruction-tuned: by its name, or in a local folder by its chat template."""
    folder = bundled(options.model)
    if folder != options.model:
        return  # the demo's has no chat template, but was tuned
    if Path(folder).is_dir():
        is_tuned = bool(tokenizer.chat_template)
    else:
        is_tuned = catalogue.INSTRUCTION_TUNED.search(options.model) is not None
    if not is_tuned:
        say(f"Warning: {options.model} looks like a base model: such a model was not trained to follow the prompt.")


def find_context_length(options: Options) -> int | None:
    """How many tokens the model can read, prompt and answer together; None where its configuration does not say."""
    with hub_errors(options.model):
        config = _read_config(options)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _read_config(options: Options) -> transformers.PretrainedConfig:
    """The model's configuration, without its weights."""
    name = catalogue.official_name(bundled(options.model))
    return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)


# ---------------------------------------------------------------------------------------------------------------------
# Whether a model can be taken apart, and whether an SAE fits it


def check_fit(options: Options, sae: "SAEConfig") -> None:
    """Refuses a model that cannot be run here, and an SAE of another model.

    By their configurations alone, before any weights are downloaded or loaded.
    """
    made_for = sae.metadata.model_name
    if made_for in catalogue.aliases() and not catalogue.same_model(bundled(options.model), made_for):
        raise UserError(
            f"{options.sae_release}: its configuration says that it is for {made_for}, not for {options.model}: if "
            "that is meant, give the model as a local folder"
        )
    with hub_errors(options.model):
        config = _read_config(options)
        _refuse_for(options, _find_obstacle(config))
        skeleton = _build_without_weights(options, config)
        _refuse_for(options, _find_obstacle_in_layers(skeleton))
    _check_place(options, sae, config.get_text_config())
    _check_module(options, sae, skeleton)


def _refuse_for(options: Options, obstacle: str | None) -> None:
    """Raises UserError where there is an obstacle to running the model."""
    if obstacle is not None:
        raise UserError(f"{options.model}: cannot be run here: {obstacle}")


def _find_obstacle(config: transformers.PretrainedConfig) -> str | None:
    """Why a model of this configuration cannot be run in two parts with a mask between them; None where it can."""
    text_config = config.get_text_config()
    quantization = getattr(config, "quantization_config", None) or getattr(text_config, "quantization_config", None)
    if quantization:
        fields = quantization if isinstance(quantization, dict) else vars(quantization)
        method = fields.get("quant_method")
        return f"its weights are quantised ({method}): give them in float16, bfloat16 or float32"
    if config.is_encoder_decoder:
        return "it has an encoder beside its decoder"
    if getattr(text_config, "num_kv_shared_layers", 0):
        return "some of its layers use the keys and values of others"
    for layer in transformers.DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return "some of its layers keep a state in place of keys and values (linear attention)"
    return None


def _build_without_weights(options: Options, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """The model that TransformerLens would load, as a skeleton: modules in their places, no memory for weights."""
    # Here, for it takes seconds, and what is wrong with the SAE should show before.
    from transformer_lens.model_bridge.sources import transformers as bridge

    try:
        architecture = bridge.determine_architecture_from_hf_config(config)
    except ValueError:
        raise UserError(f"{options.model}: TransformerLens knows no model of its kind ({config.model_type})") from None
    model_class = bridge.get_hf_model_class_for_architecture(architecture)
    with torch.device("meta"):
        return model_class.from_config(config, attn_implementation="eager", trust_remote_code=False)


def _find_obstacle_in_layers(model: transformers.PreTrainedModel) -> str | None:
    """What in a model's modules keeps it from being run in two parts; None where nothing does."""
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), torch.nn.ModuleList):
        return f"its {type(decoder).__name__} has no list of layers by that name, as Gemma's and Llama's have"
    sizes = set()
    for module in decoder.layers.modules():
        if hasattr(module, "head_dim"):
            sizes.add(module.head_dim)
    if len(sizes) > 1:
        named = ", ".join(str(size) for size in sorted(sizes))
        return f"its attention heads are of several sizes ({named})"
    return None


def _check_place(options: Options, sae: "SAEConfig", config: transformers.PretrainedConfig) -> None:
    """Raises UserError where the place that an SAE is for is not in the model, or of another width."""
    hook_name = sae.metadata.hook_name
    layer = int(hook_name.split(".")[1])
    layers = config.num_hidden_layers
    if layer >= layers:
        raise UserError(f"{options.sae_release}: is for {hook_name}, but {options.model} has {layers} layers")
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.hidden_size
    if hook_name.endswith("attn.hook_z"):
        width = config.num_attention_heads * d_head
    if sae.d_in != width:
        raise UserError(
            f"{options.sae_release}: reads {sae.d_in} dimensions, but {options.model} has {width}: "
            "this SAE belongs to another model"
        )


def _check_module(options: Options, sae: "SAEConfig", skeleton: transformers.PreTrainedModel) -> None:
    """Raises UserError where sparsify and TransformerLens mean different places by a module's output: in models that
    norm it before it is added to the residual stream, hook_mlp_out and hook_attn_out come after that norm."""
    module = sae.metadata.hf_hook_name
    if not re.fullmatch(r"layers[._][0-9]+[._](mlp|self_attn|attention)", module or ""):
        return
    if hasattr(skeleton.get_decoder().layers[0], "post_feedforward_layernorm"):
        raise UserError(
            f"{options.sae_release}: is for what {module} gives, but {options.model} norms that before it is added to "
            "the residual stream, and only what is added can be replaced: give an SAE of a layer's output"
        )
