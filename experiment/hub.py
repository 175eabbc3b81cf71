"""What is asked of libraries before a model is there: devices, tokens, errors in one line, whether an SAE fits."""

import contextlib
import os
import re
import traceback
import warnings
from pathlib import Path

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError

from experiment import UserError, catalogue
from experiment.options import ROOT, bundled

TOKEN = "(token.txt, HF_TOKEN or `hf auth login`)"
REFUSED = f"the Hub refused the token, or the name: check both {TOKEN}"
NOWHERE = "there is no such repository on the Hub, or it is private and the token is not allowed in"
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
}


@contextlib.contextmanager
def hub_errors(name):
    """Turns what libraries raise while they load `name` into one line that says what to do."""
    try:
        yield
    except Exception as error:
        # OSError: the Hub's own errors, ConnectionError, a file that is not there. RuntimeError: too little memory.
        kinds = (OSError, ValueError, RuntimeError, SafetensorError)
        folders = {Path(frame.f_code.co_filename).parent for frame, _ in traceback.walk_tb(error.__traceback__)}
        expected = isinstance(error, kinds) or type(error).__module__.startswith("datasets")
        if not expected or folders <= {ROOT, ROOT / "experiment"}:  # no library has a part in it
            raise  # a bug of ours
        raise UserError(f"{name}: {_advise(error)}") from error


def _advise(error):
    """What to do about an error of the Hub's libraries."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    seen = " ".join(f"{link} {type(link).__mro__}" for link in chain)
    for sign, advice in ADVICE.items():
        if sign in seen:
            return advice
    silent = type(error).__name__ == "DatasetGenerationError"  # says nothing itself
    return str(chain[1] if silent else error).strip().split("\n")[0]


def prepare_libraries(options):
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
        token = options.token_file.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"hf_[A-Za-z0-9]{8,}", token):
            raise UserError(f"{options.token_file}: holds no Hugging Face token (hf_...): put yours in, or remove it")
        os.environ["HF_TOKEN"] = token
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # the line above hides downloads too: those a person waits for


def check_fit(options, sae):
    """Refuses an SAE of another model, before the model's weights are downloaded or loaded."""
    hook_name, made_for = sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name
    if made_for in catalogue.aliases() and not catalogue.same_model(bundled(options.model), made_for):
        raise UserError(
            f"{options.sae_release}: its cfg.json says that it is for {made_for}, not for {options.model}: if that is "
            "meant, give the model as a local folder"
        )
    with hub_errors(options.model):
        name = catalogue.official_name(bundled(options.model))
        config = transformers.AutoConfig.from_pretrained(name).get_text_config()
    if int(hook_name.split(".")[1]) >= config.num_hidden_layers:
        layers = config.num_hidden_layers
        raise UserError(f"{options.sae_release}: is for {hook_name}, but {options.model} has {layers} layers")
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * d_head if hook_name.endswith("attn.hook_z") else config.hidden_size
    if sae.cfg.d_in != width:
        raise UserError(
            f"{options.sae_release}: reads {sae.cfg.d_in} dimensions, but {options.model} has {width}: "
            "this SAE belongs to another model"
        )
