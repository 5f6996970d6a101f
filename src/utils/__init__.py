"""Predict which of two chatbot answers a person prefers: the package behind the notebooks."""

import logging
import os
import warnings

# transformers reads these when it is first imported: no notes on what was asked for (a new head),
# no bar for every load of a model.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# On some CPUs bitsandbytes, which peft imports, logs that an optional package is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# With LoRA it logs "inputs will be cast" at every call of every layer.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
# peft asks transformers by the old name of a property, once per model with LoRA.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
