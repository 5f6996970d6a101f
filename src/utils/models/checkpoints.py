"""Models: load, quantise, put a head and LoRA on, save, load again, merge.

A base is a checkpoint of the hub (pinned revision), a folder, or a tiny checkpoint of
the same architecture, made here and loaded through the same classes. Weights that
are trained are always 32-bit; weights that are not take what the hardware is good
at. Only safetensors, never remote code.
"""

import contextlib
import dataclasses
import hashlib
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

# While it is imported (by peft), bitsandbytes asks on some CPUs for a package that it can do without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import torch  # noqa: E402
from peft import LoraConfig, PeftModel, TaskType, get_peft_model  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from src.utils.config import FinetuneConfig  # noqa: E402
from src.utils.models.hardware import choose_device, choose_dtype  # noqa: E402
from src.utils.models.heads import contrasting  # noqa: E402
from src.utils.models.template import TEMPLATE_VERSION, make_template
from src.utils.runs import atomic_folder, read_json, write_json  # noqa: E402
from src.utils.schema import LABELS  # noqa: E402

TINY = "tiny:"
# peft asks transformers by the old name of a property, once a model.
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)


# ---- tiny checkpoints --------------------------------------------------------


# ---- load --------------------------------------------------------------------


def load_classifier(
    config: FinetuneConfig, base: Path | None = None, device: torch.device | None = None
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Load a base with a new head of three classes, ready to train.

    Args:
        config: checkpoint, revision, quantisation, LoRA, gradient checkpointing and seed (of the head and LoRA).
        base: folder of the base, in place of what `config.checkpoint` names.
        device: where the model is to lie; None takes `choose_device()`.

    Returns:
        The model and its tokenizer. With LoRA only adapters and
        head are trainable, and they are 32-bit.

    Raises:
        FileNotFoundError: a tiny checkpoint has yet to be made.
        OSError: the checkpoint is neither in the cache nor within reach; says what to do.
    """
    torch.manual_seed(config.seed)
    model, tokenizer = _load_base(config, base, device)
    if config.lora_rank:
        model = _add_lora(model, config)
    if config.gradient_checkpointing:
        _checkpoint_activations(model)
    return model, tokenizer


def _checkpoint_activations(model: nn.Module) -> None:
    options = {
        "use_reentrant": False
    }  # a reentrant checkpoint would lose the gradient behind frozen embeddings
    # transformers 5.0, that of Kaggle's image, has the older name alone; the newest warns of it.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _load_base(
    config: FinetuneConfig, base: Path | None, place: torch.device | None = None
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    device = choose_device()
    source, revision = _locate(config, base)
    options = {}
    if config.quantization != "none":
        options["device_map"] = {"": device}
    with _naming_missing_checkpoint(source), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
        plan = _make_plan(source, revision, config.head)
        if config.quantization != "none":
            options["quantization_config"] = _quantization(
                config.quantization, choose_dtype(device), spared=head_names(plan)
            )
        auto = AutoModelForSequenceClassification if config.head == "joint" else type(plan)
        model, loading = auto.from_pretrained(
            source,
            revision=revision,
            num_labels=len(LABELS),
            # Left out, this would be the checkpoint's own dtype, and bf16 weights do not move in training.
            dtype=choose_dtype(device) if config.lora_rank else torch.float32,
            attn_implementation="sdpa" if plan._supports_sdpa else "eager",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # a reward model's head of one score gives way to a new one
            output_loading_info=True,
            **options,
        )
    _check_loaded(source, head_names(plan), loading)
    _renew_heads(model, plan)
    _finish_base(model, tokenizer)
    if config.head == "contrast":
        _finish_contrast(model, tokenizer, loading)
    return (model if "device_map" in options else model.to(place or device)), tokenizer


def _make_plan(source: str, revision: str, head: str) -> nn.Module:
    """The classifier without its weights, to ask what it is made of."""
    config = AutoConfig.from_pretrained(
        source, revision=revision, num_labels=len(LABELS), trust_remote_code=False
    )
    with torch.device("meta"):
        plan = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        return plan if head == "joint" else contrasting(type(plan))(config)


def _finish_contrast(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, loading: dict[str, Iterable]
) -> None:
    model.pieces = make_template(tokenizer).pieces
    if any(name.startswith("contrast.") for name in loading["missing_keys"]):
        nn.init.zeros_(model.contrast.weight)  # a new one starts as the joint head alone


def _check_loaded(source: str, heads: list[str], loading: dict[str, Iterable]) -> None:
    """Assert that only heads start anew: whatever else is missing would be left at random without a word."""
    names = {*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])}
    lost = sorted(
        name for name in names if not name.startswith(tuple(f"{head}." for head in heads))
    )
    if lost:
        raise ValueError(
            f"checkpoint {source}: expected every weight but those of the head ({', '.join(heads)}), "
            f"{len(lost)} are missing or have another shape: {', '.join(lost[:3])}"
        )


def _renew_heads(model: nn.Module, plan: nn.Module) -> None:
    # Beside quantised weights transformers 5.0, that of Kaggle's image, keeps a head of another shape without a word.
    for head in head_names(plan):
        for name, expected in plan.get_submodule(head).named_parameters(prefix=head):
            parameter = model.get_parameter(name)
            if parameter.shape != expected.shape:
                parameter.data = parameter.new_zeros(expected.shape)
                if expected.dim() > 1:
                    nn.init.normal_(parameter, std=model.config.get_text_config().initializer_range)


def _locate(config: FinetuneConfig, base: Path | None) -> tuple[str, str]:
    if base is not None or config.checkpoint.startswith(TINY):
        if base is None or not (Path(base) / "config.json").exists():
            raise FileNotFoundError(
                f"{base}: expected the folder of {config.checkpoint}; call prepare_base() first"
            )
        return str(base), "main"
    if Path(config.checkpoint).expanduser().is_dir():
        return str(Path(config.checkpoint).expanduser()), "main"
    return config.checkpoint, config.revision or "main"


@contextlib.contextmanager
def _naming_missing_checkpoint(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"checkpoint {source}: found neither on the hub nor in the cache ({str(error).splitlines()[0]}). "
            "With network: check the name. Without: set HF_HOME to a cache that holds it, set CHECKPOINT to a "
            "folder with its files, or use PROFILE=demo, which needs no download."
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars, and its notes on what we asked for (a new head), out of a notebook."""
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _quantization(kind: str, dtype: torch.dtype, spared: list[str]) -> BitsAndBytesConfig:
    # "inputs will be cast" on every call of every layer.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=spared)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=spared,  # goes for 4 bit, too
    )


def _finish_base(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = choose_pad_token(tokenizer)
    tokenizer.padding_side = "right"
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    for module in model.modules():
        # bitsandbytes 0.49 and 0.50 repack 4-bit weights at the first evaluation on CPUs with
        # AVX512-BF16, after which gradients are silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    _check_heads(model)


def _check_heads(model: nn.Module) -> None:
    for name in head_names(model):
        for child in model.get_submodule(name).modules():
            if isinstance(child, nn.Linear) and type(child) is not nn.Linear:
                raise TypeError(
                    f"head {name}: expected 16- or 32-bit weights, got {type(child).__name__}"
                )


def hidden_size(model: nn.Module) -> int | None:
    """Width of a model, wrapped or not; None where its config does not tell."""
    config = getattr(getattr(model, "module", model), "config", None)
    return (
        getattr(config.get_text_config(), "hidden_size", None)
        if hasattr(config, "get_text_config")
        else None
    )


def choose_pad_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """Choose what fills short rows: the tokenizer's own padding, else a token that it has and no battle ends with.

    A decoder's head reads the last token that is not padding, so a battle must not end with it.

    Raises:
        ValueError: it has no token to spare.
    """
    last = _last_token_id(tokenizer)
    marks = {tokenizer.cls_token, tokenizer.sep_token, tokenizer.bos_token, tokenizer.eos_token}
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    spare = [token for token in special if token not in marks]
    candidates = [
        tokenizer.pad_token,
        *(
            token
            for word in ("pad", "reserved", "unused")
            for token in spare
            if word in token.lower()
        ),
        tokenizer.unk_token,
        *spare,
        tokenizer.eos_token,
    ]
    for token in candidates:
        if token is not None and tokenizer.convert_tokens_to_ids(token) != last:
            return token
    raise ValueError(
        f"{tokenizer.name_or_path}: expected a token that can stand for padding, got none"
    )


def _last_token_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    message = {"role": "user", "content": "hi"}
    chat = tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return tokenizer(chat, add_special_tokens=False)["input_ids"][-1]


def head_names(model: nn.Module) -> list[str]:
    """The parts of a classifier that start anew: "score", or "head" and "classifier", or "bert.pooler" and so on.

    The pooler of a base counts as head: most checkpoints come without one, and one that
    was neither trained nor saved would be another after each load.
    """
    names = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    base = model.get_submodule(model.base_model_prefix)
    return names + [f"{model.base_model_prefix}.pooler"] * (
        getattr(base, "pooler", None) is not None
    )


def lora_names(model: nn.Module) -> list[str]:
    """The last names of all linear layers of the base: attention and MLP, whatever the architecture calls them."""
    base = model.get_submodule(model.base_model_prefix)
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear)
        }
    )


def longest_row(model: nn.Module) -> int | None:
    """Most tokens that a classifier can read in one row; None where positions are relative and know no end."""
    base = model.get_submodule(model.base_model_prefix)
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from behind the one of padding.
            return module.num_embeddings - (
                0 if module.padding_idx is None else module.padding_idx + 1
            )
    config = model.config.get_text_config()
    if getattr(config, "relative_attention", False):
        return None
    return getattr(config, "max_position_embeddings", None)


def _add_lora(model: nn.Module, config: FinetuneConfig) -> PeftModel:
    heads = head_names(model)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_names(model),
        exclude_modules=rf"({'|'.join(map(re.escape, heads))})\..*",
        modules_to_save=heads,
    )
    model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


# ---- save, load again, merge --------------------------------------------------


def write_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write weights (with LoRA: adapters and head alone), tokenizer and `origin.json` into an existing folder.

    Args:
        model: and `tokenizer`: from `load_classifier`.
        folder: exists.
        weights: those of the model in one piece, where several processes hold parts of it.
    """
    config = (model.get_base_model() if isinstance(model, PeftModel) else model).config
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    origin = {
        # Of a folder only its name: where it lay is nobody's business once the model is published.
        "base": Path(config.name_or_path).name
        if Path(config.name_or_path).is_dir()
        else config.name_or_path,
        "commit": getattr(config, "_commit_hash", None),
        "template_version": TEMPLATE_VERSION,
    }
    if isinstance(model, PeftModel):
        origin["base_hash"] = hash_base(_folder_of(config))
    write_json(folder / "origin.json", origin)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def hash_base(folder: Path) -> str:
    """Tell a base by its vectors and the first row of each matrix, 16 hex digits; reads little of the weights.

    Training moves some of them. How the weights are parted into files changes nothing.

    Raises:
        FileNotFoundError: the folder holds no safetensors.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: expected a checkpoint with *.safetensors, found none")
    samples = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 it is no dictionary
                tensor = weights.get_slice(name)
                sample = tensor[:1] if len(tensor.get_shape()) > 1 else weights.get_tensor(name)
                samples[name] = sample.float().numpy().tobytes()
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return digest.hexdigest()


def _folder_of(config) -> Path:
    """The folder that a loaded base came from."""
    source = Path(config.name_or_path)
    if source.is_dir():
        return source
    return Path(
        cached_file(config.name_or_path, "config.json", revision=config._commit_hash)
    ).parent


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Save a fine-tuned model, whole or not at all: with LoRA the adapters and the head, else every weight."""
    with atomic_folder(folder) as tmp:
        write_model(model, tokenizer, tmp)
    return folder


def load_finetuned(
    folder: Path, config: FinetuneConfig, base: Path | None = None
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Load what `save_model` saved, for prediction.

    Args:
        folder: e.g. `run_dir / "model" / "fold_0"`.
        config: settings that it was trained with.
        base: folder of the base that adapters sit on; None takes `run_dir / "base"` for a
            tiny checkpoint, else what `config.checkpoint` names, at the commit of training.

    Returns:
        The model in evaluation mode on `choose_device()`, and its tokenizer.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: it was trained with another template of the battles, or `base` is not
            the base that it was trained on.
    """
    origin = _read_origin(folder)
    if config.lora_rank:
        if base is not None:
            check_base(folder, base)
        model, tokenizer = _load_base(
            _at_commit(config, origin), _base_folder(folder, config, base)
        )
        model = PeftModel.from_pretrained(model, folder, is_trainable=False)
    else:
        # The folder is complete, whatever base it once came from.
        model, tokenizer = _load_base(config, folder)
    return model.eval(), tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer that `save_model` saved beside a model."""
    _read_origin(folder)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.padding_side = "right"
    return tokenizer


def merge(
    folder: Path, config: FinetuneConfig, base: Path | None = None
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Fold LoRA into a base that is not quantised: a plain model that needs no peft.

    Merging into a quantised base changes probabilities by up to one half; here the base
    is loaded again in 16 bit (32 bit on CPU).

    Args:
        folder: what `save_model` saved.
        config: settings that it was trained with.
        base: as for `load_finetuned`.

    Returns:
        The merged model in evaluation mode, and its tokenizer. Without LoRA: the model itself.
    """
    if not config.lora_rank:
        return load_finetuned(folder, config, base)
    model, tokenizer = load_unquantized(folder, config, base)
    return model.merge_and_unload(safe_merge=True).eval(), tokenizer


def load_unquantized(
    folder: Path, config: FinetuneConfig, base: Path | None = None
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Load a fine-tuned model on a base that is not quantised: what `merge` must reproduce."""
    plain = dataclasses.replace(config, quantization="none")
    return load_finetuned(folder, plain, base)


def _read_origin(folder: Path) -> dict:
    path = Path(folder) / "origin.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; expected a model that save_model() wrote")
    origin = read_json(path)
    if origin["template_version"] != TEMPLATE_VERSION:
        raise ValueError(
            f"{folder}: trained with battle template {origin['template_version']}, "
            f"this code writes template {TEMPLATE_VERSION}; train it again"
        )
    return origin


def check_base(folder: Path, base: Path) -> Path:
    """Assert that a base is the one that an adapter was trained on, and hand it back.

    Args:
        folder: of the adapter, which recorded its base when it was saved.
        base: folder of a checkpoint.

    Raises:
        ValueError: its weights are others.
    """
    origin = _read_origin(folder)
    expected, got = origin.get("base_hash"), hash_base(base)
    if expected not in (None, got):
        raise ValueError(
            f"{base}: expected the weights of {origin['base']} (hash {expected}) that {Path(folder).name} was trained "
            f"on, got others (hash {got}). Attach that checkpoint or a faithful mirror of it."
        )
    return base


def _at_commit(config: FinetuneConfig, origin: dict) -> FinetuneConfig:
    return dataclasses.replace(config, revision=origin["commit"]) if origin["commit"] else config


def _base_folder(folder: Path, config: FinetuneConfig, base: Path | None) -> Path | None:
    if base is None and config.checkpoint.startswith(TINY):
        return Path(folder).parents[1] / "base"
    return base


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[nn.Module]:
    """Hold a model in 32 bit for a while, where half precision overflowed; quantised weights stay as they are."""
    halves = [
        (p, p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)
    ]
    try:
        for parameter, _ in halves:
            parameter.data = parameter.data.float()
        yield model
    finally:
        for parameter, dtype in halves:
            parameter.data = parameter.data.to(dtype)
