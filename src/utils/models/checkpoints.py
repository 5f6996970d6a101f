"""Load, quantise, save and merge classifiers, with a new head and LoRA.

A base is a checkpoint of the hub at a pinned revision, a folder, or made by `bases`.
Trained weights are always 32-bit; frozen ones have the dtype that suits the hardware. Only
safetensors are read, and no remote code is run.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from src.utils.config import FinetuneConfig
from src.utils.models.frozen import DavidsonHead, FrozenClassifier, load_head, save_head
from src.utils.models.hardware import choose_device, choose_dtype
from src.utils.models.heads import add_contrast
from src.utils.models.template import TEMPLATE_VERSION, make_pieces
from src.utils.paths import find_checkpoints
from src.utils.runs import atomic_folder, read_json, write_json
from src.utils.schema import LABELS

MAX_LOGIT = 2.0  # standard deviation of a random head's first logits, above which it starts at 0
SHARD = "4GB"  # of one file of weights: a download that breaks is resumed file by file
Classifier = tuple[nn.Module, PreTrainedTokenizerBase]


def load_classifier(config: FinetuneConfig, base: Path | None = None) -> Classifier:
    """Load a base with a new head of three classes, ready to train, on `choose_device()`.

    The joint head is transformers' own. It reads of ModernBERT the mean of all tokens or [CLS],
    as the checkpoint's `classifier_pooling` says; of BERT, RoBERTa and DeBERTa [CLS]; of decoders
    the last token, the template's own. With LoRA only adapters and head are trainable;
    `config.seed` is the seed of both. `base` is a folder in place of `config.checkpoint`.

    Raises:
        OSError: the checkpoint is neither in the cache nor reachable, or `bases` did not make it.
        ValueError: the checkpoint lacks weights besides those of the head.
    """
    torch.manual_seed(config.seed)
    model, tokenizer = _load_base(config, base)
    if config.uses_lora:
        model = _add_lora(model, config)
    if config.gradient_checkpointing:
        # A reentrant checkpoint would lose the gradient behind frozen embeddings.
        options = {"use_reentrant": False}
        # transformers 5.0 (Kaggle's image) has only the old name; the newest warns about it.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model, tokenizer


def load_frozen(
    config: FinetuneConfig, base: Path | None = None
) -> tuple[FrozenClassifier, PreTrainedTokenizerBase]:
    """Load a base to read its states; arguments and errors as for `load_classifier`."""
    # Its own head is not used, whatever HEAD says.
    model, tokenizer = _load_base(dataclasses.replace(config, head="joint"), base)
    frozen = FrozenClassifier(model, make_pieces(tokenizer), config.state_layers)
    return frozen.eval(), tokenizer


def find_base_folder(config: FinetuneConfig, base: Path | None = None) -> Path:
    """Find the folder of a base's weights, downloaded if need be."""
    source, revision = _locate(config, base)
    if Path(source, "config.json").exists():
        return Path(source)
    with _naming(source):
        files = ["*.safetensors", "*.json"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=files))


def _load_base(config: FinetuneConfig, base: Path | None, dtype: str = "") -> Classifier:
    device = choose_device()
    source, revision = _locate(config, base)
    options: dict[str, Any] = {}
    safely: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    tokenizer = load_base_tokenizer(config, base)
    skeleton = make_skeleton(read_architecture(config, base), config.head)
    # With dropout inside attention the fused kernels cannot be used, and a pass of BERT takes
    # several times as long (notebooks/LOG.md).
    for name in ("attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(skeleton.config, name):
            options[name] = 0.0
    with _naming(source):
        if config.quantization != "none":
            options["device_map"] = {"": device}
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=config.quantization == "8bit",
                load_in_4bit=config.quantization == "4bit",
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=choose_dtype(device),
                llm_int8_skip_modules=head_names(skeleton),  # is read for 4 bit, too
            )
        loader = AutoModelForSequenceClassification if config.head == "joint" else type(skeleton)
        model, loading = loader.from_pretrained(
            source,
            num_labels=len(LABELS),
            # The default is the checkpoint's dtype, and bf16 weights do not move in training.
            dtype=dtype or (choose_dtype(device) if config.is_frozen else torch.float32),
            attn_implementation="sdpa" if skeleton._supports_sdpa else "eager",
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # a reward model's head of one score is replaced
            output_loading_info=True,
            **safely,
            **options,
        )
    new = {*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])}
    _check_loaded(source, head_names(skeleton), new)
    _replace_mismatched_heads(model, skeleton)
    _zero_new_heads(model, head_names(skeleton), new)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    if hasattr(model.config, "reference_compile"):
        # transformers 5.0 (Kaggle's image) would compile ModernBERT on a GPU, in each process.
        model.config.reference_compile = False
    for module in model.modules():
        # bitsandbytes 0.49 and 0.50 repack 4-bit weights at the first evaluation on CPUs with
        # AVX512-BF16, after which gradients are silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if config.head == "contrast":
        model.pieces = make_pieces(tokenizer)
    return (model if config.quantization != "none" else model.to(device)), tokenizer


def load_base_tokenizer(
    config: FinetuneConfig, base: Path | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base alone; arguments and errors as for `load_classifier`."""
    source, revision = _locate(config, base)
    with _naming(source):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
    tokenizer.pad_token = choose_pad_token(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


@contextlib.contextmanager
def _naming(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"checkpoint {source}: not found on the hub or in the cache "
            f"({str(error).splitlines()[0]}). Check the name; without network set HF_HOME to a "
            "cache or CHECKPOINT to a folder that has it, or use PROFILE=demo."
        ) from error


def _locate(config: FinetuneConfig, base: Path | None) -> tuple[str, str]:
    """Name and revision for `from_pretrained`."""
    folder = Path(base or config.checkpoint).expanduser()
    if (folder / "config.json").exists():
        return str(folder), "main"
    if base is not None or config.has_own_base:
        raise FileNotFoundError(
            f"{base}: expected the folder of {config.checkpoint}; call prepare_base() first"
        )
    if attached := find_checkpoints(config.checkpoint):  # in a Kaggle kernel there is no hub
        return str(attached[0]), "main"
    return config.checkpoint, config.revision or "main"


def read_architecture(config: FinetuneConfig, base: Path | None = None) -> PreTrainedConfig:
    """Read the `config.json` of a base; arguments and errors as for `load_classifier`."""
    source, revision = _locate(config, base)
    with _naming(source):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)


def make_skeleton(architecture: PreTrainedConfig, head: str) -> Any:
    """Make a classifier without weights, to ask for its class, its modules and their shapes."""
    architecture.num_labels = len(LABELS)
    with torch.device("meta"):
        joint = AutoModelForSequenceClassification.from_config(
            architecture, trust_remote_code=False
        )
        if head == "joint":
            return joint
        return add_contrast(type(joint))(architecture)  # type: ignore[arg-type]  # is hashable


def _check_loaded(source: str, heads: list[str], new: set[str]) -> None:
    """Check that only heads are new: any other missing weight would silently stay random."""
    prefixes = tuple(f"{head}." for head in heads)
    missing = sorted(name for name in new if not name.startswith(prefixes))
    if missing:
        raise ValueError(
            f"checkpoint {source}: expected every weight except the head's ({', '.join(heads)}), "
            f"{len(missing)} are missing or have another shape: {', '.join(missing[:3])}"
        )


def _replace_mismatched_heads(model: Any, skeleton: nn.Module) -> None:
    # transformers 5.0 (Kaggle's image) silently keeps a head of another shape if it quantises.
    for head in head_names(skeleton):
        for name, expected in skeleton.get_submodule(head).named_parameters(prefix=head):
            parameter = model.get_parameter(name)
            if parameter.shape != expected.shape:
                parameter.data = parameter.new_zeros(expected.shape)


def _zero_new_heads(model: Any, heads: list[str], new: set[str]) -> None:
    """Start a new contrast, and a new joint head on large states, at zero: a loss of ln 3.

    A decoder's joint head is one layer behind the last norm. Where that norm is large, random
    weights cost nats in the first steps; elsewhere they learn faster (notebooks/LOG.md).
    """
    zeroed = [head for head in heads if head == "contrast"]
    norm = getattr(model.base_model, "norm", None)
    if len(heads) - len(zeroed) == 1 and norm is not None:
        spread = model.config.get_text_config().initializer_range * norm.weight.float().norm()
        zeroed = heads if spread > MAX_LOGIT else zeroed
    for head in zeroed:
        module = model.get_submodule(head)
        if isinstance(module, nn.Linear) and f"{head}.weight" in new:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Choose the padding: the tokenizer's own, else a special token that no battle ends with.

    A decoder's head reads the last token that is not padding, so a battle must not end with it.
    """
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    used = {tokenizer.cls_token, tokenizer.sep_token, tokenizer.bos_token, tokenizer.eos_token}
    spare = [token for token in special if token not in used]
    candidates = [tokenizer.pad_token]
    for word in ("pad", "reserved", "unused"):
        candidates += [token for token in spare if word in token.lower()]
    candidates += [tokenizer.unk_token, *spare, tokenizer.eos_token]
    last = make_pieces(tokenizer)[-1][-1]
    for token in candidates:
        if token is not None and tokenizer.convert_tokens_to_ids(token) != last:
            return token
    raise ValueError(f"{tokenizer.name_or_path}: expected a token to use as padding, got none")


def head_names(model: Any) -> list[str]:
    """List the modules that start untrained: "score", or "head" and "classifier", and so on.

    A base's pooler is one: most checkpoints lack it, and unsaved it would differ in each load.
    """
    prefix = model.base_model_prefix
    children = [(name, child) for name, child in model.named_children() if name != prefix]
    names = [name for name, child in children if list(child.parameters())]
    if getattr(model.get_submodule(prefix), "pooler", None) is not None:
        names.append(f"{prefix}.pooler")
    return names


def hidden_size(model: Any) -> int | None:
    """Return the width of a model; None if its config has none."""
    config: Any = getattr(model, "config", None)
    return getattr(config.get_text_config(), "hidden_size", None) if config else None


def longest_row(model: Any) -> int | None:
    """Return the most tokens a classifier can read in one row; None for relative positions."""
    for name, module in model.get_submodule(model.base_model_prefix).named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from the one after padding's.
            n_unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - n_unused
    config = model.config.get_text_config()
    if getattr(config, "relative_attention", False):
        return None
    return getattr(config, "max_position_embeddings", None)


def _add_lora(model: Any, config: FinetuneConfig) -> PeftModel:
    """Put LoRA on every linear layer of the base: attention and MLP of any architecture."""
    heads = head_names(model)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        exclude_modules=rf"({'|'.join(map(re.escape, heads))})\..*",
        modules_to_save=heads,
    )
    adapted = get_peft_model(model, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def write_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (with LoRA: adapters and head), tokenizer and `origin.json` into a folder."""
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    config = (model.get_base_model() if isinstance(model, PeftModel) else model).config
    source = Path(config.name_or_path)
    origin = {
        # Of a folder only the name: a published model must not tell where it was.
        "base": source.name if source.is_dir() else config.name_or_path,
        "commit": getattr(config, "_commit_hash", None),
        "template_version": TEMPLATE_VERSION,
    }
    if isinstance(model, PeftModel):
        if not source.is_dir():
            revision = config._commit_hash
            source = Path(cached_file(config.name_or_path, "config.json", revision=revision)).parent
        origin["base_hash"] = hash_base(source)
    write_json(folder / "origin.json", origin)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def write_head(
    head: DavidsonHead,
    config: FinetuneConfig,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write a head on the states of a frozen base: its weights, tokenizer and `origin.json`.

    `base` is from `find_base_folder`; `load_finetuned` puts the head onto it again.
    """
    save_head(head, folder)
    tokenizer.save_pretrained(folder)
    is_hub = not Path(config.checkpoint).expanduser().is_dir() and not config.has_own_base
    origin = {
        "base": config.checkpoint if is_hub else base.name,
        "commit": base.name if is_hub else None,  # the cache names its folders so
        "template_version": TEMPLATE_VERSION,
        "base_hash": hash_base(base),
        "state_layers": list(config.state_layers),
    }
    write_json(folder / "origin.json", origin)


def hash_base(folder: Path) -> str:
    """Hash a base's vectors and the first row of each matrix, in 16 hex digits.

    Training changes some of them; the number of files that hold the weights changes nothing.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: expected a checkpoint with *.safetensors, found none")
    samples = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 safe_open is not a dictionary
                tensor = weights.get_slice(name)
                sample = tensor[:1] if len(tensor.get_shape()) > 1 else weights.get_tensor(name)
                samples[name] = sample.float().numpy().tobytes()
    content = b"".join(name.encode() + samples[name] for name in sorted(samples))
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Save a fine-tuned model atomically: with LoRA adapters and head, else every weight."""
    with atomic_folder(folder) as tmp:
        write_model(model, tokenizer, tmp)
    return folder


def load_finetuned(folder: Path, config: FinetuneConfig, base: Path | None = None) -> Classifier:
    """Load what `save_model` saved, e.g. `run_dir / "model" / "fold_0"`, to predict with.

    A model without LoRA gets the dtype that it was saved in. Adapters and heads on a frozen base go
    onto `base`; without it onto `run_dir / "base"` if the suite made it, else on what
    `config.checkpoint` names, at the commit of training.

    Raises:
        FileNotFoundError: the folder has no model.
        ValueError: it was trained with another template, or on another base than `base`.
    """
    origin = _read_origin(folder)
    if not config.is_frozen:
        # Complete, whatever its base was; a merged decoder would take twice the memory in 32 bit.
        model, tokenizer = _load_base(config, folder, dtype="auto")
        return model.eval(), tokenizer
    if base is not None:
        check_base(folder, base)
    elif config.has_own_base:
        base = Path(folder).parents[1] / "base"
    if origin["commit"]:
        config = dataclasses.replace(config, revision=origin["commit"])
    if config.train == "head":
        frozen, tokenizer = load_frozen(config, base)
        frozen.head = load_head(folder, *frozen.head_shape).to(choose_device())
        return frozen.eval(), tokenizer
    model, tokenizer = _load_base(config, base)
    adapted = PeftModel.from_pretrained(model, folder, is_trainable=False)
    return adapted.eval(), tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `save_model` saved with a model."""
    _read_origin(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.padding_side = "right"
    return tokenizer


def merge(folder: Path, config: FinetuneConfig, base: Path | None = None) -> Classifier:
    """Merge LoRA, if there is any, into a base in 16 bit (32 bit on a CPU): a plain model.

    Merging into a quantised base would change probabilities by up to one half.
    """
    config = dataclasses.replace(config, quantization="none")
    model, tokenizer = load_finetuned(folder, config, base)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(safe_merge=True)
    return model.eval(), tokenizer


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
    """Return a base if the adapter in `folder` was trained on it; else raise ValueError."""
    origin = _read_origin(folder)
    expected = origin.get("base_hash")
    got = hash_base(base)
    if expected not in (None, got):
        raise ValueError(
            f"{base}: expected the weights of {origin['base']} (hash {expected}) that "
            f"{Path(folder).name} was trained on, got others (hash {got}). Attach that checkpoint "
            "or an exact copy of it."
        )
    return base


def find_base(folder: Path, config: FinetuneConfig) -> Path | None:
    """Find the attached base that an adapter was trained on; None if none is needed or attached.

    Raises:
        ValueError: checkpoints of its name are attached, and all have other weights.
    """
    if not config.is_frozen or config.has_own_base:
        return None
    attached = find_checkpoints(config.checkpoint)
    for base in attached:
        with contextlib.suppress(ValueError):
            return check_base(folder, base)
    return check_base(folder, attached[0]) if attached else None  # raises: says what differs


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[nn.Module]:
    """Use 32 bit temporarily, after half precision overflowed; quantised weights do not change.

    A 4-bit layer then computes in 32 bit; one of 8 bit casts its input to fp16 whatever is asked.
    """
    half = (torch.float16, torch.bfloat16)
    dtypes = {p: p.dtype for p in model.parameters() if p.dtype in half}
    modules = [m for m in model.modules() if getattr(m, "compute_dtype", None) in half]
    compute_dtypes = [module.compute_dtype for module in modules]
    try:
        for parameter in dtypes:
            parameter.data = parameter.data.float()
        for module in modules:
            module.compute_dtype = torch.float32
        yield model
    finally:
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
        for module, dtype in zip(modules, compute_dtypes, strict=True):
            module.compute_dtype = dtype
