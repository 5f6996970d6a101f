"""The settings of a run: frozen dataclasses that check themselves, to and from JSON.

A notebook's `parameters` cell holds the same names in capitals with the same
defaults (a test compares them), which are those of the real run. `from_parameters`
reads them back and, where a profile is chosen, fills in what was left untouched.
"""

import ast
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
PROFILES = Path(__file__).resolve().parents[2] / "notebooks" / "profiles"


def read_profile(profile: str) -> dict[str, dict[str, Any]]:
    """Read a profile: papermill parameters, one section a notebook.

    Args:
        profile: a name in `notebooks/profiles`, e.g. "demo", or a path to a YAML file.

    Returns:
        Notebook name -> parameter name -> value.

    Raises:
        FileNotFoundError: no such profile; the message lists those there are.
        ValueError: the file is not a mapping of mappings.
    """
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not path.exists():
        names = sorted(file.stem for file in PROFILES.glob("*.yaml"))
        raise FileNotFoundError(f"profile {profile!r}: expected a YAML file or one of {names}")
    sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(sections, dict) or not all(
        isinstance(section, dict) for section in sections.values()
    ):
        raise ValueError(
            f"{path}: expected one section of parameters per notebook, got {sections!r:.100}"
        )
    return sections


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


@dataclass(frozen=True)
class Config:
    """What every settings class can do."""

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Any], notebook: str, profile: str = "none"
    ) -> Self:
        """Take the settings from a notebook's globals.

        Args:
            parameters: holds each field's name in capitals, e.g. `globals()`.
            notebook: section of the profile to read, e.g. "03_modernbert".
            profile: "none", or a profile whose values replace parameters that still have
                their default; a parameter that was changed by hand keeps its value.
        """
        chosen = {} if profile == "none" else read_profile(profile).get(notebook, {})
        values = {}
        for field in dataclasses.fields(cls):
            name = field.name.upper()
            value = parameters[name]
            default = (
                field.default
                if field.default is not dataclasses.MISSING
                else field.default_factory()
            )
            untouched = value == default or (isinstance(value, list) and tuple(value) == default)
            values[field.name] = chosen.get(name, value) if untouched else value
        return cls.from_json(values)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild from `to_json`.

        Raises:
            ValueError: a key is unknown (the nearest name is suggested), or a value is outside its range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in content:
            if key not in names:
                near = difflib.get_close_matches(key, names, 1)
                raise ValueError(
                    f"{cls.__name__}: unknown setting {key!r}"
                    + (f", did you mean {near[0]!r}?" if near else "")
                )
        return cls(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in content.items()
            }
        )

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {
            key: list(v) if isinstance(v, tuple) else v
            for key, v in dataclasses.asdict(self).items()
        }


@dataclass(frozen=True)
class EdaConfig(Config):
    """Settings of 01."""

    n_folds: int = 5
    min_battles: int = 30  # a chatbot with fewer is not ranked
    n_bootstrap: int = 200  # resamples of each band and interval
    tokenizers: tuple[
        str, ...
    ] = ()  # folders of tokenizers; none estimates four characters a token
    n_demo_battles: int = (
        12_000  # training battles of the demo arena, where no other data are found
    )
    n_demo_test: int = 600
    seed: int = 20240501  # of the demo arena and the folds

    def __post_init__(self) -> None:
        """Check ranges."""
        _expect(self.n_folds >= 2, "n_folds", "2 or more", self.n_folds)
        _expect(self.min_battles >= 1, "min_battles", "1 or more", self.min_battles)
        _expect(self.n_bootstrap >= 1, "n_bootstrap", "at least 1", self.n_bootstrap)
        _expect(self.n_demo_battles >= 1, "n_demo_battles", "1 or more", self.n_demo_battles)
        _expect(self.n_demo_test >= 1, "n_demo_test", "1 or more", self.n_demo_test)


@dataclass(frozen=True)
class BaselineConfig(Config):
    """Settings of 02, the CPU baseline."""

    n_hashed: int = 131_072  # width of each hashed text block
    ridge: float = (
        1.0  # strength of the linear models' penalty; doubling it halves every prior variance
    )
    n_trees: int = 200  # boosting rounds at most; one for every 15 battles where these are few
    learning_rate: float = 0.05  # shrinkage of each tree
    embeddings: str = ""  # none, or a frozen checkpoint: a folder, or a hub id, also id@commit
    embeddings_tokens: int = 512  # of each text at most
    n_bootstrap: int = 1000  # resamples of each interval
    seed: int = 20240501

    def __post_init__(self) -> None:
        """Check ranges."""
        _expect(self.n_hashed >= 16, "n_hashed", "at least 16", self.n_hashed)
        _expect(self.ridge > 0, "ridge", "above 0", self.ridge)
        _expect(self.n_trees >= 1, "n_trees", "at least 1", self.n_trees)
        _expect(0 < self.learning_rate <= 1, "learning_rate", "in (0, 1]", self.learning_rate)
        _expect(
            self.embeddings_tokens >= 8, "embeddings_tokens", "at least 8", self.embeddings_tokens
        )
        _expect(self.n_bootstrap >= 1, "n_bootstrap", "at least 1", self.n_bootstrap)


@dataclass(frozen=True)
class EnsembleConfig(Config):
    """Settings of 05."""

    n_folds: int = 5  # parts in which the blend is fitted and scored in turn
    seed: int = 20240501
    n_bootstrap: int = 1000  # resamples of each interval
    write_soft_labels: bool = (
        False  # the blend's held-out probabilities, for SOFT_LABELS of 03 and 04
    )
    members: tuple[str, ...] = ("02_baseline", "03_modernbert", "04_qwen")

    def __post_init__(self) -> None:
        """Check ranges."""
        _expect(self.n_folds >= 2, "n_folds", "2 or more", self.n_folds)
        _expect(self.n_bootstrap >= 1, "n_bootstrap", "at least 1", self.n_bootstrap)
        _expect(len(self.members) > 0, "members", "at least one notebook", self.members)


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """Settings of 03 (an encoder, every weight trained); `DecoderConfig` has those of 04."""

    checkpoint: str = (
        "answerdotai/ModernBERT-base"  # hub id, a folder, or tiny:modernbert / tiny:qwen3
    )
    revision: str = (
        "8949b909ec900327062f0ebf497f51aef5e6f0c8"  # commit on the hub; empty resolves main
    )
    head: str = "joint"  # joint reads one state, contrast also the mean state of A less that of B
    quantization: str = "none"  # none, 8bit or 4bit (NF4, double quantisation)
    lora_rank: int = 0  # 0 trains every weight
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    max_tokens: int = 2048  # budget of one battle in training
    predict_tokens: int = 3072  # budget of one battle in prediction
    tokens_per_batch: int = 16384  # tokens of one forward pass at most
    batches_per_step: int = 2  # gradient accumulation
    packing: bool = True  # no padding, for the architectures that can do without
    gradient_checkpointing: bool = False  # computes activations twice instead of keeping them
    n_epochs: float = 2.0
    both_orders: bool = (
        True  # an epoch has each battle in both orders, side by side; else in one, by turns
    )
    consistency: float = 0.0  # weight of the divergence between the two orders; wants both_orders
    learning_rate: float = 5e-5  # peak
    layer_decay: float = 1.0  # learning rate of a layer as a multiple of that of the layer above
    warmup_share: float = 0.1  # share of the steps
    weight_decay: float = 0.01
    optimizer: str = "adamw"  # adamw, adamw_8bit or paged_adamw_8bit
    n_evals: int = 4  # validations an epoch
    patience: int = 0  # validations without a better loss before training stops; 0 goes to the end
    folds: tuple[int, ...] = (0,)  # folds held out, one model each
    n_seeds: int = 1  # models a fold, whose probabilities are averaged
    refit: bool = (
        False  # one more model, on every battle, for as many steps as served the folds best
    )
    max_pairs: int = 0  # training battles at most, 0 takes all
    extra_battles: tuple[
        str, ...
    ] = ()  # files of further training battles in the competition's layout
    soft_labels: str = (
        ""  # none, or probabilities to learn from: a soft_labels.parquet of 05, or a submission.csv
    )
    soft_weight: float = 0.5  # share of the soft labels where there is a vote, too
    n_processes: int = 0  # that train together; 0 takes one a GPU, 1 trains in this one
    sharding: str = (
        "none"  # none gives each process the whole model (DDP), full parts it over them (FSDP)
    )
    seed: int = 20240501

    def __post_init__(self) -> None:
        """Check ranges."""
        _expect(bool(self.checkpoint), "checkpoint", "a hub id or a folder", self.checkpoint)
        _expect(self.head in ("joint", "contrast"), "head", "joint or contrast", self.head)
        _expect(
            self.quantization in ("none", "8bit", "4bit"),
            "quantization",
            "none, 8bit or 4bit",
            self.quantization,
        )
        self._check_lora()
        self._check_batches()
        self._check_processes()
        _expect(self.n_epochs > 0, "n_epochs", "above 0", self.n_epochs)
        _expect(self.consistency >= 0, "consistency", "0 or more", self.consistency)
        _expect(
            self.both_orders or not self.consistency,
            "consistency",
            "0 without both_orders, which brings the two orders together",
            self.consistency,
        )
        _expect(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)
        _expect(0 < self.layer_decay <= 1, "layer_decay", "in (0, 1]", self.layer_decay)
        _expect(0 <= self.warmup_share < 1, "warmup_share", "in [0, 1)", self.warmup_share)
        _expect(self.optimizer in OPTIMIZERS, "optimizer", f"one of {OPTIMIZERS}", self.optimizer)
        _expect(self.n_evals >= 1, "n_evals", "at least 1", self.n_evals)
        _expect(self.patience >= 0, "patience", "0 or more", self.patience)
        _expect(len(self.folds) > 0, "folds", "at least one fold", self.folds)
        _expect(self.n_seeds >= 1, "n_seeds", "at least 1", self.n_seeds)
        _expect(0 <= self.soft_weight <= 1, "soft_weight", "in [0, 1]", self.soft_weight)

    def _check_lora(self) -> None:
        _expect(self.lora_rank >= 0, "lora_rank", "0 or more", self.lora_rank)
        _expect(
            self.lora_rank > 0 or self.quantization == "none",
            "lora_rank",
            "above 0 for a quantised base, whose weights cannot be trained",
            self.lora_rank,
        )

    def _check_batches(self) -> None:
        _expect(self.max_tokens >= 32, "max_tokens", "at least 32", self.max_tokens)
        _expect(self.predict_tokens >= 32, "predict_tokens", "at least 32", self.predict_tokens)
        longest = max(self.max_tokens * (2 if self.both_orders else 1), self.predict_tokens)
        _expect(
            self.tokens_per_batch >= longest,
            "tokens_per_batch",
            f"at least {longest}, for the longest battle (predict_tokens, or max_tokens in both_orders)",
            self.tokens_per_batch,
        )
        _expect(self.batches_per_step >= 1, "batches_per_step", "at least 1", self.batches_per_step)

    def _check_processes(self) -> None:
        _expect(self.n_processes >= 0, "n_processes", "0 or more", self.n_processes)
        _expect(self.sharding in ("none", "full"), "sharding", "none or full", self.sharding)
        is_whole = self.sharding == "none"
        _expect(
            is_whole or self.n_processes != 1, "sharding", "none for one process", self.sharding
        )
        _expect(
            is_whole or self.quantization == "none",
            "sharding",
            "none for a quantised base: it is small, and its packed weights can not be parted",
            self.sharding,
        )
        _expect(
            is_whole or self.optimizer == "adamw",
            "optimizer",
            "adamw for parted weights",
            self.optimizer,
        )


@dataclass(frozen=True)
class DecoderConfig(FinetuneConfig):
    """Settings of 04: a quantised decoder with LoRA; same fields, other defaults."""

    checkpoint: str = "Qwen/Qwen3-4B-Instruct-2507"
    revision: str = "cdbee75f17c01a7cc42f958dc650907174af0554"
    quantization: str = "4bit"
    lora_rank: int = 32
    lora_alpha: float = 4.0  # goes with learning_rate 2e-4
    gradient_checkpointing: bool = True
    n_epochs: float = 1.0
    learning_rate: float = 2e-4


class SuiteError(Exception):
    """The suite cannot start or go on; the text says why and what to do."""


def _unknown(kind: str, name: str, known: Sequence[str]) -> SuiteError:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    return SuiteError(f"unknown {kind} {name!r}: {hint}")


def find_name(text: str, names: Sequence[str]) -> str:
    """Find a notebook by its name or its number; an unknown one is an error with the nearest name."""
    if text in names:
        return text
    matches = [name for name in names if text.isdigit() and int(name.split("_")[0]) == int(text)]
    if not matches:
        raise _unknown("notebook", text, names)
    return matches[0]


def read_parameters(notebook: Path) -> dict[str, Any]:
    """Read the defaults of a notebook's `parameters` cell.

    Returns:
        Parameter name -> default value.

    Raises:
        SuiteError: the notebook is missing, or a line is not `NAME: type = literal`.
    """
    if not notebook.exists():
        raise SuiteError(f"{notebook}: no such notebook")
    cells = _read_cells(notebook)
    source = next(
        (cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), ""
    )
    defaults = {}
    for node in ast.parse(source).body:
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        try:
            defaults[target.id] = ast.literal_eval(node.value)
        except ValueError as error:
            line = ast.unparse(node)
            raise SuiteError(
                f"{notebook}: parameters: expected NAME: type = literal, got {line}"
            ) from error
    return defaults


def check_parameter(notebook: str, name: str, value: Any, defaults: Mapping[str, Any]) -> Any:
    """Assert that a notebook has a parameter and that a value has its type, and hand the value back.

    Raises:
        SuiteError: the name is unknown (the nearest is suggested) or the type is another.
    """
    if name not in defaults:
        raise (
            _unknown("parameter", name, list(defaults))
            if defaults
            else SuiteError(f"{notebook} has no parameters")
        )
    kind = type(defaults[name])
    if kind is float and type(value) is int:
        return float(value)
    if kind in (tuple, list) and isinstance(value, list):
        return value
    if type(value) is not kind:
        raise SuiteError(
            f"{notebook}.{name}: expected {kind.__name__}, got {value!r} ({type(value).__name__})"
        )
    return value


def split_settings(text: str) -> list[str]:
    """Split several settings in one text at the spaces before a name.

    Example:
        "03.FOLDS=[0, 1] SEED=2" -> ["03.FOLDS=[0, 1]", "SEED=2"]
    """
    return re.split(r"\s+(?=[\w.]+=)", text.strip())


def _parse_setting(text: str) -> tuple[str, str, str]:
    name, separator, value = text.partition("=")
    notebook, _, parameter = name.strip().rpartition(".")
    if not separator or not parameter:
        raise SuiteError(f"setting {text!r}: expected NOTEBOOK.NAME=value or NAME=value")
    return notebook, parameter, value


def _parse_value(text: str, default: Any) -> Any:
    value = yaml.safe_load(text)
    # A text needs no quotes, also where YAML would see a number, a truth value or nothing.
    return text.strip() if isinstance(default, str) and not isinstance(value, str) else value


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
        defaults: notebook -> its parameters' defaults, of every notebook in the river.
        profile: notebook -> parameter -> value.
        data: `DATA` for the notebooks that have it.
        test: `TEST` for the notebooks that have it.
        settings: `NOTEBOOK.NAME=value`, or `NAME=value` for every notebook that has it.

    Returns:
        Notebook -> parameter -> value. `PROFILE` is "none", so that a kernel sees only
        what its executed notebook shows.

    Raises:
        SuiteError: an unknown notebook or parameter, or a value of another type.
    """
    given = (
        {"PROFILE": "none"} | ({"DATA": data} if data else {}) | ({"TEST": test} if test else {})
    )
    chosen = {
        notebook: {name: value for name, value in given.items() if name in known}
        for notebook, known in defaults.items()
    }
    for section, values in profile.items():
        notebook = find_name(section, list(defaults))
        for name, value in values.items():
            chosen[notebook][name] = check_parameter(notebook, name, value, defaults[notebook])
    for notebook, name, text in map(_parse_setting, settings):
        targets = (
            [find_name(notebook, list(defaults))]
            if notebook
            else [n for n in defaults if name in defaults[n]]
        )
        if not targets:
            raise _unknown(
                "parameter", name, sorted({known for names in defaults.values() for known in names})
            )
        for target in targets:
            value = _parse_value(text, defaults[target].get(name))
            chosen[target][name] = check_parameter(target, name, value, defaults[target])
    return chosen


def _read_cells(notebook: Path) -> list[Any]:
    import nbformat  # slow to import, and each process of a training would

    return nbformat.read(notebook, as_version=4).cells
