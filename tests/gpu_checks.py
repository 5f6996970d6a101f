"""What must hold on a GPU: checks on random weights of the real shapes, in about five minutes.

    make gpu-check                  # python -m tests.gpu_checks, prints one table
    make gpu-check WRITE=file.json

Each check is a function of shapes and a folder, which is the same for all. It returns what it saw
in one line; it raises AssertionError for what should not be, SkipTest where the machine cannot say.
`test_gpu.py` runs them on a GPU at the real shapes, and anywhere at tiny ones, so that they are
known to run. At the real shapes they need 30 GB of disk for temporary files (TMPDIR).

A memory limit is for what torch allocates; the context of CUDA, some 0.3 GiB, comes on top.
"""

import argparse
import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest, mock

import pandas as pd
import torch
from accelerate.utils import release_memory
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, ModernBertConfig, PreTrainedConfig, Qwen3Config

from benchmarks.training import SETUPS, write_checkpoint
from src.utils.battles.demo import make_battles
from src.utils.battles.readers import add_groups_and_folds
from src.utils.config import DecoderConfig, FinetuneConfig
from src.utils.delivery.publish import publish_model
from src.utils.models import packing
from src.utils.models.bases import prepare_base
from src.utils.models.batches import collate
from src.utils.models.checkpoints import load_classifier, save_model
from src.utils.models.hardware import choose_device, choose_dtype
from src.utils.models.packing import Documents, attend_by_document, collate_packed, enable_packing
from src.utils.paths import ROOT
from src.utils.runs import atomic_folder, measure_versions, write_json
from src.utils.schema import probs_table
from src.utils.training.heldout import Member
from src.utils.training.processes import join_world, leave_world, rank
from src.utils.training.trainer import FoldTrainer, list_checkpoints

GIB = 2**30
T4_GIB, CARD_GIB = 14.6, 22.5  # what torch can have of a T4, and of a card with 24 GB

# ---- settings of training, which follow `FinetuneConfig` ------------------------------------

# Every check: steps that are not all warm-up, and nothing random but the data.
COMMON = {"warmup_share": 0.0, "lora_dropout": 0.0, "both_orders": True}
# One step of the size that the notebooks have, and no validation.
ONE_STEP = {"n_epochs": 1.0}
# Many passes over few battles, scored at the end of each.
LEARN = {"n_epochs": 20.0, "n_evals": 1}
# A checkpoint before the training is killed, and a step or more after it.
RESUME = {"n_epochs": 2.0, "n_evals": 1}
TWO_PROCESSES = {"n_epochs": 1.0}


@dataclass(frozen=True)
class Shapes:
    """Shapes of the models, and how much they read."""

    name: str
    encoder: PreTrainedConfig
    decoder: PreTrainedConfig
    n_shallow: int  # layers of the decoder where depth does not matter
    lengths: tuple[int, ...]  # of documents, in tokens
    window: int  # of a local layer: keys at least this far away are not seen
    max_tokens: int
    tokens_per_step: int
    n_pairs: int  # of a check that is not about memory


REAL = Shapes(
    "real",
    SETUPS["base"].shape,
    SETUPS["qwen3-4b"].shape,
    4,
    (1, 700, 63, 64, 65, 900, 7),
    65,
    SETUPS["base"].config.max_tokens,
    SETUPS["base"].config.tokens_per_step,
    16,
)
_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_TINY |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size": 3072}
_TINY |= {"num_attention_heads": 4, "initializer_range": 0.1}
TINY = Shapes(
    "tiny",
    ModernBertConfig(
        **_TINY, local_attention=16, classifier_pooling="mean", cls_token_id=1, sep_token_id=2
    ),
    Qwen3Config(**_TINY, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    1,
    (1, 40, 8, 9, 70),
    9,
    160,
    640,
    8,
)

# ---- models and battles ----------------------------------------------------------------------


def make_pairs(n_pairs: int, max_tokens: int = 0) -> pd.DataFrame:
    """Make demo battles; with `max_tokens` each is longer than that and will be cut to it."""
    pairs, _ = make_battles(max(n_pairs, 50), seed=3)
    pairs = add_groups_and_folds(pairs, seed=3)[:n_pairs].reset_index(drop=True)
    for name in ("response_a", "response_b") if max_tokens else ():
        pairs[name] = [(" ".join([turns[0] or "-"] * (max_tokens // 4)),) for turns in pairs[name]]
    return pairs


def make_base(shapes: Shapes, kind: str, folder: Path) -> Path:
    """Make a checkpoint with random weights once: "encoder", "decoder" or "shallow"."""
    base = folder / kind
    if base.exists():
        return base
    shape = shapes.encoder if kind == "encoder" else shapes.decoder
    n_layers = shapes.n_shallow if kind == "shallow" else shape.num_hidden_layers
    changes: dict = {"num_hidden_layers": n_layers}
    if kind == "shallow":
        changes["layer_types"] = None
    tiny = FinetuneConfig(checkpoint=f"tiny:{shape.model_type}", revision="")
    learned = prepare_base(tiny, make_pairs(200), folder / f"tokenizer_{shape.model_type}", 0)
    config = type(shape)(**shape.to_dict() | changes)
    setup = SimpleNamespace(shape=config, config=config_of(shapes, kind))
    with atomic_folder(base) as tmp:
        write_checkpoint(setup, AutoTokenizer.from_pretrained(learned), tmp)
    return base


def config_of(shapes: Shapes, kind: str, **changes) -> FinetuneConfig:
    """Make the settings with which notebook 03 or 04 trains such a model."""
    settings: type[FinetuneConfig] = FinetuneConfig if kind == "encoder" else DecoderConfig
    budgets = {"max_tokens": shapes.max_tokens, "predict_tokens": shapes.max_tokens}
    # A pass is as large as memory holds; on a CPU, a step in one pass.
    n_tok = 0 if shapes.name == "real" else shapes.tokens_per_step
    budgets |= {"tokens_per_step": shapes.tokens_per_step, "tokens_per_batch": n_tok}
    if kind != "encoder" and shapes.name == "tiny":
        budgets |= {"lora_rank": 4}
    return settings(**budgets | COMMON | changes)


def make_trainer(
    shapes: Shapes, kind: str, folder: Path, run: str, pairs: pd.DataFrame, **changes
) -> FoldTrainer:
    """Make a trainer of battles whose fold is not 0; the others are held out."""
    config = config_of(shapes, kind, **changes)
    model, tokenizer = load_classifier(config, make_base(shapes, kind, folder))
    is_heldout = pairs["fold"].to_numpy() == 0
    train_pairs = pairs[~is_heldout].reset_index(drop=True)
    heldout = pairs[is_heldout].reset_index(drop=True)
    member = Member("fold_0", 0, config)
    return FoldTrainer(model, tokenizer, train_pairs, heldout, member, folder / run)


@contextlib.contextmanager
def like_a_t4() -> Iterator[None]:
    """Compute as on a T4: in fp16, without flash attention."""
    fp16 = (torch.float16, "as on a T4")
    with contextlib.ExitStack() as stack:
        for module in ("models.hardware", "training.trainer"):
            patch = mock.patch(f"src.utils.{module}.choose_precision", return_value=fp16)
            stack.enter_context(patch)
        stack.enter_context(mock.patch.object(packing, "_has_flash", return_value=False))
        if choose_device().type == "cuda":
            fallbacks = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            stack.enter_context(sdpa_kernel(fallbacks))
        yield


def copy_weights(trainer: FoldTrainer) -> torch.Tensor:
    """Copy the trained weights to the CPU, as one vector."""
    return torch.cat([weight.detach().flatten().cpu() for weight in trainer.weights])


def measure_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Measure a relative distance."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def step_until_it_counts(trainer: FoldTrainer) -> torch.Tensor:
    """Take a step, or more where fp16 overflows at the first scale of the loss: the change."""
    before = copy_weights(trainer)
    change = torch.zeros_like(before)
    while trainer.step < trainer.schedule.last_step and not change.any():
        trainer.take_step()
        change = copy_weights(trainer) - before
    assert torch.isfinite(change).all() and change.any(), f"no change after {trainer.step} steps"
    return change


# ---- attention -------------------------------------------------------------------------------


def _read_layer(attend: Callable, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return what a layer gives, and the gradients of query, key and value."""
    inputs = [state.detach().requires_grad_() for state in states]
    attended = attend(*inputs)
    signs = torch.linspace(-1, 1, attended.numel(), device=attended.device).view_as(attended)
    return [attended.detach(), *torch.autograd.grad((attended.float() * signs).sum(), inputs)]


def _attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_seen: torch.Tensor
) -> torch.Tensor:
    """Attend by products of matrices under a mask of the whole row."""
    n_groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(n_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = torch.softmax(scores.masked_fill(~is_seen, -torch.inf), dim=-1)
    return (weights @ value).transpose(1, 2)


def _make_mask(lengths: tuple[int, ...], is_causal: bool, window: int | None) -> torch.Tensor:
    place = torch.arange(sum(lengths), device=choose_device())
    owner = torch.repeat_interleave(torch.tensor(lengths, device=place.device))
    offset = place[None] - place[:, None]
    is_seen = owner[:, None] == owner[None]
    if is_causal:
        is_seen &= offset <= 0
    return is_seen if window is None else is_seen & (offset.abs() < window)


def packed_attention_is_exact(shapes: Shapes, folder: Path) -> str:
    """Compare each way to attend, forward and backward, with plain products in 32 bit.

    In 16 bit an error may be twice that of plain products in 16 bit.
    """
    device, encoder, decoder = choose_device(), shapes.encoder, shapes.decoder
    dtype = choose_dtype(device) if device.type == "cuda" else torch.bfloat16
    wide = (encoder.num_attention_heads, encoder.num_attention_heads)
    width = encoder.hidden_size // encoder.num_attention_heads
    grouped = (decoder.num_attention_heads, decoder.num_key_value_heads)
    layers = {
        "causal, grouped": (*grouped, decoder.head_dim, True, None),
        "causal, grouped, local": (*grouped, decoder.head_dim, True, shapes.window),
        "global": (*wide, width, False, None),
        "local": (*wide, width, False, shapes.window),
    }
    kernels = set()
    ends = torch.tensor([0, *shapes.lengths]).cumsum(0).to(device, torch.int32)
    worst = 0.0
    for name, (n_heads, n_key_heads, width, is_causal, window) in layers.items():
        torch.manual_seed(0)
        sizes = (n_heads, n_key_heads, n_key_heads)
        shape = (sum(shapes.lengths), width)
        states = [torch.randn(1, n, *shape, device=device).to(dtype) for n in sizes]
        is_seen = _make_mask(shapes.lengths, is_causal, window)
        layer = SimpleNamespace(is_causal=is_causal)

        def plainly(*inputs, is_seen=is_seen):
            return _attend_plainly(*inputs, is_seen)

        def packed(*inputs, layer=layer, window=window, width=width):
            options = {"scaling": width**-0.5, "sliding_window": window}
            return attend_by_document(layer, *inputs, None, documents=Documents(ends), **options)[0]

        exact = _read_layer(plainly, [state.float() for state in states])
        rough = _read_layer(plainly, states)
        for way in ("as this card does", "like a T4"):
            is_own = way == "as this card does"
            kernels.add(packing._has_kernel(states[0]))
            with contextlib.nullcontext() if is_own else like_a_t4():
                found = _read_layer(packed, states)
            parts = zip(("output", "query", "key", "value"), found, rough, exact, strict=True)
            for part, tensor, in_16_bit, in_32_bit in parts:
                error, allowed = (measure_error(x, in_32_bit) for x in (tensor, in_16_bit))
                worst = max(worst, error / max(allowed, 1e-4))
                assert error <= 2 * allowed + 1e-4, (
                    f"{name}, {way}, {part}: relative error {error:.1e}, plain products in "
                    f"{dtype} have {allowed:.1e}"
                )
    kernel = "varlen_attn" if any(kernels) else "no varlen_attn"
    return f"{str(dtype).removeprefix('torch.')}, {kernel}, error {worst:.2f} of plain products"


def _read_model(model: nn.Module, batch: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    device = choose_device()
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    model.zero_grad()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(**batch).logits.float()
    (logits * torch.linspace(-1, 1, logits.numel(), device=device).view_as(logits)).sum().backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return [logits.detach(), torch.cat(gradients)]


def _make_rows(shapes: Shapes) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(10, 500, (length,), generator=generator) for length in shapes.lengths]
    return [row.tolist() for row in rows]


def packed_models_are_padded_models(shapes: Shapes, folder: Path) -> str:
    """Compare logits and gradients of a packed row with those of a padded batch in 32 bit."""
    rows, notes = _make_rows(shapes), []
    device = choose_device()
    dtype = choose_dtype(device) if device.type == "cuda" else torch.bfloat16
    for kind in ("encoder", "shallow"):
        config = config_of(shapes, kind, quantization="none", gradient_checkpointing=False)
        model, tokenizer = load_classifier(config, make_base(shapes, kind, folder))
        model = model.float().eval()
        padded = collate(rows, tokenizer.pad_token_id)
        exact = _read_model(model, padded, torch.float32)
        rough = _read_model(model, padded, dtype)
        found = _read_model(enable_packing(model), collate_packed(rows), dtype)
        for part, *tensors in zip(("logits", "gradients"), found, rough, exact, strict=True):
            error, allowed = (measure_error(x, tensors[-1]) for x in tensors[:2])
            # Few logits, so their error varies more than that of a whole layer.
            assert error <= 3 * allowed + 1e-3, (
                f"{kind}, {part}: relative error {error:.1e}, a padded batch in {dtype} has "
                f"{allowed:.1e}"
            )
            notes.append(f"{error:.1e} (padded {allowed:.1e})")
        del model
        release_memory()
    return ", ".join(notes)


def efficient_attention_suffices(shapes: Shapes, folder: Path) -> str:
    """Read and learn from packed rows with the memory-efficient kernel alone, as on a T4.

    Before key heads were repeated this raised: only the MATH kernel was left.
    """
    is_cuda = choose_device().type == "cuda"
    backend = SDPBackend.EFFICIENT_ATTENTION if is_cuda else SDPBackend.MATH
    rows = _make_rows(shapes)
    for kind in ("encoder", "shallow"):
        config = config_of(shapes, kind, quantization="none", gradient_checkpointing=False)
        with like_a_t4(), sdpa_kernel([backend]):
            model, _ = load_classifier(config, make_base(shapes, kind, folder))
            enable_packing(model).train()
            for dtype in (torch.float16, torch.float32):  # 32 bit: read again after an overflow
                logits, gradients = _read_model(model.float(), collate_packed(rows), dtype)
                assert torch.isfinite(logits).all() and torch.isfinite(gradients).all(), dtype
        del model
        release_memory()
    return backend.name


# ---- training --------------------------------------------------------------------------------


def _take_step(shapes: Shapes, kind: str, folder: Path) -> str:
    """Take an optimizer step over battles that are all as long as they may be."""
    pairs = make_pairs(24, shapes.max_tokens).assign(fold=1)
    trainer = make_trainer(shapes, kind, folder, f"step_{kind}", pairs, **ONE_STEP)
    step_until_it_counts(trainer)
    dtype = str(trainer.dtype).removeprefix("torch.")
    return f"{dtype}, {trainer.step} taken, in passes of {trainer.tokens_per_batch:,} tokens"


def step_of_03(shapes: Shapes, folder: Path) -> str:
    """Take a step of notebook 03."""
    return _take_step(shapes, "encoder", folder)


def step_of_03_on_a_t4(shapes: Shapes, folder: Path) -> str:
    """Take a step of notebook 03 as on a T4."""
    with like_a_t4():
        return _take_step(shapes, "encoder", folder)


def step_of_04(shapes: Shapes, folder: Path) -> str:
    """Take a step of notebook 04."""
    return _take_step(shapes, "decoder", folder)


def step_of_04_on_a_t4(shapes: Shapes, folder: Path) -> str:
    """Take a step of notebook 04 as on a T4."""
    with like_a_t4():
        return _take_step(shapes, "decoder", folder)


def _learn(shapes: Shapes, folder: Path, quantization: str) -> str:
    """Learn few battles by heart in fp16 with a scaled loss, on a quantised base."""
    pairs = make_pairs(shapes.n_pairs)
    pairs["fold"] = [0, 0, *[1] * (len(pairs) - 2)]
    # A weight moves by the rate in each step, and the head sums as many as the states are wide.
    rate = {"learning_rate": 0.2 / shapes.decoder.hidden_size, "quantization": quantization}
    with like_a_t4():
        trainer = make_trainer(
            shapes, "shallow", folder, f"learn_{quantization}", pairs, **LEARN | rate
        )
        gradients = []
        for weight in trainer.weights:
            weight.register_post_accumulate_grad_hook(
                lambda weight: gradients.append(bool(torch.isfinite(weight.grad).all()))
            )
        trainer.train()
    assert trainer.scaler.is_enabled() and trainer.dtype == torch.float16
    share = sum(gradients) / len(gradients)
    assert share > 0.5, f"only {share:.0%} of the gradients are finite"
    first, last = (trainer.history[place]["train_loss"] for place in (0, -1))
    assert last < first - 0.05, f"the loss was {first:.3f} and is {last:.3f}"
    return f"loss {first:.3f} to {last:.3f}, {share:.0%} of the gradients finite"


def lora_on_nf4_learns(shapes: Shapes, folder: Path) -> str:
    """Train LoRA on a 4-bit base."""
    return _learn(shapes, folder, "4bit")


def lora_on_8_bit_learns(shapes: Shapes, folder: Path) -> str:
    """Train LoRA on an 8-bit base."""
    return _learn(shapes, folder, "8bit")


# ---- publishing ------------------------------------------------------------------------------


def publishing_fits(shapes: Shapes, folder: Path) -> str:
    """Merge, save, and compare a model whose adapters change something."""
    config = config_of(shapes, "decoder")
    base = make_base(shapes, "decoder", folder)
    pairs = make_pairs(6, shapes.max_tokens)
    model, tokenizer = load_classifier(config, base)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    source = save_model(model, tokenizer, folder / "to_publish" / "model" / "fold_0")
    del model
    release_memory()
    oof = probs_table(pairs["id"], torch.full((len(pairs), 3), 1 / 3).numpy())
    parity = publish_model(source, config, pairs, oof, folder / "published", base)
    shutil.rmtree(folder / "published")
    difference, tolerance = parity["max_abs_difference"], parity["tolerance"]
    assert parity["passed"], f"probabilities differ by {difference:.1e}, allowed {tolerance:.1e}"
    return f"probabilities within {difference:.1e} (allowed {tolerance:.1e})"


def publishing_fits_a_t4(shapes: Shapes, folder: Path) -> str:
    """Publish as on a T4."""
    with like_a_t4():
        return publishing_fits(shapes, folder)


# ---- several processes, killed processes, memory ---------------------------------------------

_SLOW_STEPS = {"learning_rate": 0.1}


def _make_pair_of_processes_trainer(shapes: Shapes, folder: Path, run: str) -> FoldTrainer:
    pairs = make_pairs(6 * shapes.n_pairs).assign(fold=1)
    settings = TWO_PROCESSES | _SLOW_STEPS | {"tokens_per_batch": 4 * shapes.max_tokens}
    settings |= {"tokens_per_step": 8 * shapes.max_tokens}
    trainer = make_trainer(shapes, "encoder", folder, run, pairs, **settings)
    # Adam would make much of the last bit of a small gradient.
    trainer.optimizer = torch.optim.SGD(trainer.weights)
    return trainer


def _train_in_pair(shapes: Shapes, folder: Path) -> None:
    """Be one of two processes, of which the second runs out of memory."""
    if torch.cuda.is_available() and torch.cuda.device_count() == 1:
        # NCCL refuses two processes on one GPU; gloo copies through the host.
        torch.distributed.init_process_group("gloo")
    else:
        join_world()
    trainer = _make_pair_of_processes_trainer(shapes, folder, "pair")
    n_rows = []

    def refuse(module: nn.Module, args: tuple, inputs: dict) -> None:
        n_rows.append(len(inputs["cu_seq_lens"]) - 1)
        if rank() == 1 and n_rows[-1] > 0.7 * n_rows[0]:
            raise torch.OutOfMemoryError("forced")

    trainer.model.register_forward_pre_hook(refuse, with_kwargs=True)
    change = step_until_it_counts(trainer)
    is_split = trainer.tokens_per_batch < 4 * shapes.max_tokens
    assert is_split is (rank() == 1), (rank(), trainer.tokens_per_batch, n_rows)
    torch.save(change, folder / f"pair_{rank()}.pt")
    leave_world()


def two_processes_split_apart(shapes: Shapes, folder: Path) -> str:
    """Compare two processes, one of which splits its batches, with one process."""
    make_base(shapes, "encoder", folder)
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 -m tests.gpu_checks --pair"
    command = [sys.executable, *launch.split(), shapes.name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"torchrun failed:\n{(done.stdout + done.stderr)[-3000:]}"
    trainer = _make_pair_of_processes_trainer(shapes, folder, "alone")
    expected = step_until_it_counts(trainer)
    first, second = (torch.load(folder / f"pair_{number}.pt") for number in range(2))
    assert torch.equal(first, second), "the two processes have other weights"
    error = measure_error(first, expected)
    # Smaller parts round otherwise. Without the other process's gradient this would be about 1.
    allowed = 1e-3 if trainer.dtype == torch.float32 else 0.1
    assert error < allowed, f"changes differ by {error:.1e} from one process, allowed {allowed}"
    n_gpus = torch.cuda.device_count()
    return f"{min(n_gpus, 2)} GPUs, changes within {error:.1e} of one process"


def _make_resumable(shapes: Shapes, folder: Path, run: str) -> FoldTrainer:
    pairs = make_pairs(2 * shapes.n_pairs)
    pairs["fold"] = [0, 0, *[1] * (len(pairs) - 2)]
    settings = RESUME | {"tokens_per_step": 2 * shapes.max_tokens, "learning_rate": 1e-4}
    settings |= {"tokens_per_batch": 2 * shapes.max_tokens}
    return make_trainer(shapes, "encoder", folder, run, pairs, **settings)


def _train_until_killed(shapes: Shapes, folder: Path) -> None:
    """Die in the middle of a step, as soon as there is a checkpoint."""
    trainer = _make_resumable(shapes, folder, "killed")
    checkpoints = folder / "killed" / "checkpoints" / "fold_0"

    def kill(module: nn.Module, args: tuple) -> None:
        if module.training and list_checkpoints(checkpoints):
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.model.register_forward_pre_hook(kill)
    trainer.train()


def a_killed_training_resumes(shapes: Shapes, folder: Path) -> str:
    """Kill a training, resume it, and compare it with one that nobody disturbed."""
    make_base(shapes, "encoder", folder)
    process = get_context("spawn").Process(target=_train_until_killed, args=(shapes, folder))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, f"expected to be killed, got {process.exitcode}"
    checkpoint = list_checkpoints(folder / "killed" / "checkpoints" / "fold_0")[0]
    resumed = _make_resumable(shapes, folder, "killed")
    before = copy_weights(resumed)
    with mock.patch.object(resumed, "take_step", wraps=resumed.take_step) as steps:
        resumed.train(checkpoint)
    undisturbed = _make_resumable(shapes, folder, "undisturbed")
    undisturbed.train()
    assert len(resumed.history) == len(undisturbed.history)
    changes = [copy_weights(trainer) - before for trainer in (resumed, undisturbed)]
    error = measure_error(*changes)
    # On a GPU sums differ in their last bit from run to run, of which Adam makes much.
    allowed = 1e-6 if resumed.device.type == "cpu" else 0.3
    assert error <= allowed, f"changes differ by {error:.1e} from an undisturbed run"
    losses = [trainer.history[-1]["train_loss"] for trainer in (resumed, undisturbed)]
    assert abs(losses[0] - losses[1]) < 0.02, f"training losses {losses}"
    n_steps = int(checkpoint.name.rpartition("-")[2])
    assert steps.call_count == undisturbed.step - n_steps, f"{steps.call_count} steps repeated"
    return f"killed after step {n_steps} of {undisturbed.step}, changes within {error:.1e}"


def memory_grows_in_place(shapes: Shapes, folder: Path) -> str:
    """Look whether the allocator follows what `hardware` asks for."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    asked = " ".join(os.environ.get(name, "") for name in names).strip()
    if asked != "expandable_segments:True":
        raise SkipTest(f"the environment asks for {asked!r}")
    kept = torch.zeros(2**24, device=choose_device())
    segments = torch.cuda.memory_snapshot() if kept.is_cuda else []
    is_expandable = [segment["is_expandable"] for segment in segments]
    assert all(is_expandable), f"{is_expandable.count(False)} segments are not expandable"
    return f"{len(segments)} expandable segments"


# ---- all of them -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A check, and the memory that it may take, in GiB; 0: all there is."""

    run: Callable[[Shapes, Path], str]
    limit_gib: float = 0.0


def prepare(shapes: Shapes, folder: Path) -> str:
    """Make the models that all checks share."""
    for kind in ("encoder", "decoder", "shallow"):
        make_base(shapes, kind, folder)
    return "random weights written"


CHECKS = {
    "models with random weights": Check(prepare),
    "memory grows in place": Check(memory_grows_in_place),
    "packed attention is exact": Check(packed_attention_is_exact),
    "packed models are the padded ones": Check(packed_models_are_padded_models),
    "efficient attention suffices": Check(efficient_attention_suffices),
    "a step of 03, 24 GB": Check(step_of_03, CARD_GIB),
    "a step of 03, like a T4": Check(step_of_03_on_a_t4, T4_GIB),
    "a step of 04, 24 GB": Check(step_of_04, CARD_GIB),
    "a step of 04, like a T4": Check(step_of_04_on_a_t4, T4_GIB),
    "LoRA on NF4 in fp16 learns": Check(lora_on_nf4_learns),
    "LoRA on 8 bit in fp16 learns": Check(lora_on_8_bit_learns),
    "publishing, 24 GB": Check(publishing_fits, CARD_GIB),
    "publishing, like a T4": Check(publishing_fits_a_t4, T4_GIB),
    "two processes, one out of memory": Check(two_processes_split_apart),
    "a killed training resumes": Check(a_killed_training_resumes),
}


def why_not() -> str:
    """Say why nothing can be checked here; "" where there is a GPU."""
    if choose_device().type == "cuda":
        return ""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    return "no GPU that this torch has kernels for; see nvidia-smi and CUDA_VISIBLE_DEVICES"


def measure(name: str, shapes: Shapes, folder: Path) -> dict:
    """Run a check: its name, seconds, peak_gib (None without a GPU), limit_gib, result."""
    check, start = CHECKS[name], time.perf_counter()
    is_cuda = choose_device().type == "cuda"
    try:
        limit_memory(check.limit_gib)
        # What models print on their way would hide the table.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = f"passed: {check.run(shapes, folder)}"
    except SkipTest as reason:
        result = f"skipped: {reason}"
    except Exception as error:  # the table shows it, and the other checks go on
        result = f"failed: {error}\n{''.join(traceback.format_exception(error, limit=-3))}"
    return {
        "check": name,
        "seconds": time.perf_counter() - start,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if is_cuda else None,
        "limit_gib": check.limit_gib,
        "result": result,
    }


def limit_memory(limit_gib: float) -> None:
    """Free what earlier checks left; let torch have so much; SkipTest where the card has less."""
    release_memory()
    if choose_device().type != "cuda":
        return
    torch.cuda.reset_peak_memory_stats()
    total_gib = torch.cuda.get_device_properties().total_memory / GIB
    if limit_gib > total_gib:
        raise SkipTest(f"the card has {total_gib:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction((limit_gib or total_gib) / total_gib)


class Worker:
    """A process for checks, which a new one replaces once a check has failed in it."""

    def __init__(self) -> None:
        self._executor: ProcessPoolExecutor | None = None

    def run(self, name: str, shapes: Shapes, folder: Path) -> dict:
        """Run a check there; losing the process is a failure, too."""
        if self._executor is None:
            self._executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        row = {"check": name, "seconds": 0.0, "peak_gib": None, "limit_gib": CHECKS[name].limit_gib}
        try:
            row = self._executor.submit(measure, name, shapes, folder).result()
        except Exception as error:
            row["result"] = f"failed: {type(error).__name__}: {error}"
        if row["result"].startswith("failed"):  # after an error of CUDA nothing works any more
            self.close()
        return row

    def close(self) -> None:
        """End the process."""
        if self._executor:
            self._executor.shutdown()
            self._executor = None


def show(row: dict) -> str:
    """Write a line of the table."""
    peak = "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    limit = f"{row['limit_gib']:.1f}" if row["limit_gib"] else "–"
    result = row["result"].replace("\n", "\n" + " " * 8)
    return f"{row['check']:34} {row['seconds']:7.1f} {peak:>8} {limit:>6}  {result}"


def main(arguments: list[str] | None = None) -> int:
    """Run every check and print the table; returns 0 when none failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="file for the table, JSON")
    parser.add_argument("--pair", nargs=2, metavar=("SHAPES", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.pair:
        _train_in_pair({"real": REAL, "tiny": TINY}[options.pair[0]], Path(options.pair[1]))
    if reason := why_not():
        print(f"nothing was checked: {reason}")
        return 1
    properties = torch.cuda.get_device_properties()
    card = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"
    print(f"{card}, capability {properties.major}.{properties.minor}, torch {torch.__version__}")
    print(f"{'check':34} {'seconds':>7} {'peak GiB':>8} {'limit':>6}  result", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker()
        for name in CHECKS:
            rows.append(worker.run(name, REAL, Path(folder)))
            print(show(rows[-1]), flush=True)
        worker.close()
    if options.write:
        write_json(options.write, {"card": card, "versions": measure_versions(), "checks": rows})
    n_failed = sum(row["result"].startswith("failed") for row in rows)
    print(f"{n_failed} of {len(rows)} failed")
    return int(n_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
