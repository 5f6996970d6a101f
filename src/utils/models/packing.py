"""Packing: several documents read as one row, without a token of padding.

Restarting `position_ids` alone would let documents read one another, and a mask of
the whole row would cost its square. Here attention itself knows where documents end.
A global layer attends document by document. A local layer cuts the row into chunks of
queries, each of which sees the keys within its window and document alone, so that
memory grows with the tokens and not with their square, on any hardware.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ModernBertForSequenceClassification,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from src.utils.models.heads import Contrasting

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

ATTENTION = "sdpa_by_document"
_DECODERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # causal, read at the last token, without soft caps or biases
_LEAST_CHUNK = 64  # queries of one chunk at least: below, overhead outweighs products
_LONGEST_PLAIN = 2048  # tokens of a document; beyond, what plain products keep of it is too much


@dataclass
class Documents:
    """Where the documents of a packed row begin and end.

    Args:
        cu_seq_lens: (documents + 1,) int32, tokens before each document, and all of them last.
        read: (documents,) int64, places of the only tokens whose last states are read, one a
            document; None where all of them are.
    """

    cu_seq_lens: torch.Tensor
    read: torch.Tensor | None = None
    lengths: list[int] = field(init=False)
    _masks: dict[tuple[int, int, int], torch.Tensor] = field(init=False, default_factory=dict)
    _biases: dict[tuple[int, int, int], torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Fetch the lengths once: every layer needs them on the host, too."""
        self.lengths = [end - start for start, end in pairwise(self.cu_seq_lens.tolist())]

    def chunk_mask(self, left: int, right: int, size: int) -> torch.Tensor:
        """What each chunk of `size` queries may see of itself and its neighbours: (chunks, 1, size, keys) bool.

        The chunk after stands among the keys where `right` is above 0.
        """
        key = (left, right, size)
        if key not in self._masks:
            self._masks[key] = self._make_chunk_mask(left, right, size)
        return self._masks[key]

    def chunk_bias(self, left: int, right: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """The same as something to add to the scores: 0 where a query may see a key, else minus infinity."""
        key = (left, right, size)
        if key not in self._biases:
            mask = self.chunk_mask(left, right, size)
            self._biases[key] = torch.zeros(
                mask.shape, dtype=dtype, device=mask.device
            ).masked_fill(~mask, -torch.inf)
        return self._biases[key]

    def _make_chunk_mask(self, left: int, right: int, size: int) -> torch.Tensor:
        device = self.cu_seq_lens.device
        n_tok = sum(self.lengths)
        rest = -n_tok % size
        owner = torch.repeat_interleave(
            torch.arange(len(self.lengths), device=device),
            self.cu_seq_lens.diff(),
            output_size=n_tok,
        )
        queries = F.pad(owner, (0, rest), value=-1).view(-1, size, 1)
        after = size if right else 0
        # Outside the row lies a document of its own, the one that the queries past its end are of.
        keys = (
            F.pad(owner, (size, rest + after), value=-1)
            .unfold(0, 2 * size + after, size)
            .unsqueeze(1)
        )
        offset = (
            torch.arange(-size, size + after, device=device)
            - torch.arange(size, device=device)[:, None]
        )
        return ((queries == keys) & (offset >= -left) & (offset <= right)).unsqueeze(1)


# ---- attention ---------------------------------------------------------------


def attend_by_document(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attend within documents; without `documents` as transformers' own "sdpa" does. For `AttentionInterface`.

    Args:
        module: an attention layer; `is_causal` is read.
        query: (1, heads, T, width).
        key: and `value`: (1, key heads, T, width); heads are a multiple of key heads.
        attention_mask: of a padded batch; a packed row needs none.
        scaling: of the products.
        dropout: share of the attention weights.
        sliding_window: keys at least this far away are not seen; None sees the whole document.
        documents: of a packed row.

    Returns:
        (1, T, heads, width), and None in place of attention weights.
    """
    if documents is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **kwargs,
        )
    query, key = (
        query.to(value.dtype),
        key.to(value.dtype),
    )  # autocast leaves a normed query in 32 bit
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if dropout == 0 and _has_kernel(query):
        return _attend_with_kernel(
            module.is_causal, query, key, value, sliding_window, documents, options
        ), None
    options["dropout_p"] = dropout
    if documents.read is not None and module.layer_idx == module.config.num_hidden_layers - 1:
        attended = _attend_where_read(
            module.is_causal, query, key, value, sliding_window, documents, options
        )
    elif sliding_window is None or sliding_window > max(documents.lengths):
        attended = _attend_whole(module.is_causal, query, key, value, documents, options)
    else:
        attended = _attend_in_window(
            module.is_causal, query, key, value, sliding_window - 1, documents, options
        )
    return attended.transpose(1, 2), None


def _has_kernel(query: torch.Tensor) -> bool:
    return (
        _takes_windows(varlen_attn)
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@functools.cache
def _takes_windows(kernel: Callable | None) -> bool:
    # That of torch 2.10, of Kaggle's image, knows no window and no scale, that of 2.11 no grouped heads.
    return (
        kernel is not None
        and {"window_size", "scale", "enable_gqa"} <= inspect.signature(kernel).parameters.keys()
    )


def _attend_with_kernel(
    is_causal, query, key, value, sliding_window, documents, options
) -> torch.Tensor:
    reach = -1 if sliding_window is None else sliding_window - 1
    longest = max(documents.lengths)
    attended = varlen_attn(
        *(states[0].transpose(0, 1).contiguous() for states in (query, key, value)),
        cu_seq_q=documents.cu_seq_lens,
        cu_seq_k=documents.cu_seq_lens,
        max_q=longest,
        max_k=longest,
        window_size=(reach, 0 if is_causal else reach),
        **options,
    )
    return attended.unsqueeze(0)


def _attend_whole(is_causal, query, key, value, documents, options) -> torch.Tensor:
    # Slices would each send back a gradient of the whole row; `split` sends one.
    parts = zip(
        *(states.split(documents.lengths, dim=2) for states in (query, key, value)), strict=True
    )
    is_plain = not is_causal and _is_plain_faster(query, options)
    attended = [
        _multiply(*part, options["scale"])
        if is_plain and part[0].shape[2] <= _LONGEST_PLAIN
        else F.scaled_dot_product_attention(*part, is_causal=is_causal, **options)
        for part in parts
    ]
    return torch.cat(attended, dim=2)


def _attend_where_read(
    is_causal, query, key, value, sliding_window, documents, options
) -> torch.Tensor:
    # A causal model is read at the last token of a document, another one at the first.
    seen = (
        slice(sliding_window)
        if not is_causal
        else slice(-sliding_window if sliding_window else None, None)
    )
    queries = query[:, :, documents.read].split(1, dim=2)
    keys, values = (states.split(documents.lengths, dim=2) for states in (key, value))
    attended = [
        F.scaled_dot_product_attention(one, its_keys[:, :, seen], its_values[:, :, seen], **options)
        for one, its_keys, its_values in zip(queries, keys, values, strict=True)
    ]
    return torch.zeros_like(query).index_copy(2, documents.read, torch.cat(attended, dim=2))


def _is_plain_faster(query: torch.Tensor, options: dict[str, object]) -> bool:
    # On CPUs torch's fused attention takes 2.5 times as long in bf16 as plain products do, whose scores are bf16.
    is_plain = (
        not options["enable_gqa"] and not options["dropout_p"] and options["scale"] is not None
    )
    return is_plain and query.device.type == "cpu" and query.dtype == torch.bfloat16


def _multiply(query, key, value, scale: float, bias: torch.Tensor | None = None) -> torch.Tensor:
    scores = (query * scale) @ key.transpose(-1, -2)
    return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ value


def _attend_in_window(is_causal, query, key, value, reach, documents, options) -> torch.Tensor:
    left, right = reach, 0 if is_causal else reach
    size = max(
        _LEAST_CHUNK, reach
    )  # larger chunks see more keys in vain, smaller ones copy keys more often
    n_tok = query.shape[2]
    rest = -n_tok % size
    queries = F.pad(query[0], (0, 0, 0, rest)).unflatten(1, (-1, size)).transpose(0, 1)
    windows = [_beside_neighbours(states[0], size, rest, right > 0) for states in (key, value)]
    # A query past the end of the row sees the other ones there: a row without any key would be NaN.
    if _is_plain_faster(query, options):
        attended = _multiply(
            queries,
            *windows,
            options["scale"],
            documents.chunk_bias(left, right, size, query.dtype),
        )
    else:
        attended = F.scaled_dot_product_attention(
            queries, *windows, attn_mask=documents.chunk_mask(left, right, size), **options
        )
    return attended.transpose(0, 1).flatten(1, 2)[None, :, :n_tok]


def _beside_neighbours(states: torch.Tensor, size: int, rest: int, sees_next: bool) -> torch.Tensor:
    """Each chunk of (heads, T, width) behind the one before it, and before the next: (chunks, heads, keys, width)."""
    # `unfold` would do it in one call, and add its gradients up one by one.
    chunks = F.pad(states, (0, 0, size, rest + (size if sees_next else 0))).unflatten(1, (-1, size))
    n_beside = 2 if sees_next else 1
    n_chunks = chunks.shape[1] - n_beside
    return torch.cat(
        [chunks[:, place : place + n_chunks] for place in range(n_beside + 1)], dim=2
    ).transpose(0, 1)


AttentionInterface.register(ATTENTION, attend_by_document)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for padded batches


# ---- models ------------------------------------------------------------------


def collate_packed(rows: Sequence[Sequence[int] | np.ndarray]) -> dict[str, torch.Tensor]:
    """Set documents one behind the other in one row.

    Returns:
        `input_ids` and `position_ids`, both (1, T) int64, and `cu_seq_lens`, (documents + 1,) int32.

    Example:
        rows of 3 and 2 tokens -> position_ids [[0, 1, 2, 0, 1]], cu_seq_lens [0, 3, 5]
    """
    lengths = [len(row) for row in rows]
    return {
        "input_ids": torch.from_numpy(np.concatenate(rows).astype(np.int64))[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
    }


def can_pack(model: nn.Module) -> bool:
    """Tell whether `enable_packing` knows this classifier's architecture, also under peft or DDP."""
    classifier = _unwrap(model)
    config = getattr(classifier, "config", None)
    if getattr(config, "_attn_implementation", None) not in ("sdpa", ATTENTION):
        return False
    if isinstance(classifier, ModernBertForSequenceClassification):
        # An older one has attention of its own, and no such setting.
        return hasattr(config, "sliding_window") and classifier._supports_attention_backend
    return (
        isinstance(classifier, GenericForSequenceClassification) and config.model_type in _DECODERS
    )


def enable_packing(model: nn.Module) -> nn.Module:
    """Let a classifier read packed rows as well as padded batches.

    It becomes one of a subclass with the name of its own class, so that saving, peft,
    DDP and FSDP see what they saw. `model(**collate_packed(rows))` then gives logits of
    (documents, C).

    Args:
        model: changed in place; one that was changed before stays as it is.

    Raises:
        TypeError: an architecture that `can_pack` does not know.
    """
    if not can_pack(model):
        raise TypeError(
            f"expected a classifier that can_pack() knows, got {type(_unwrap(model)).__name__}; pad it"
        )
    classifier = _unwrap(model)
    if not isinstance(classifier, _Packable):
        classifier.__class__ = _packable(type(classifier))
        _last_mlp(classifier).register_forward_pre_hook(_pass_read)
        _last_mlp(classifier).register_forward_hook(_put_back)
        classifier.config._attn_implementation = ATTENTION
    return model


def _unwrap(model: nn.Module) -> nn.Module:
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _Packable:
    """Reads packed rows, where it is given `cu_seq_lens`."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cu_seq_lens=None, **kwargs
    ):
        if cu_seq_lens is None:
            _last_mlp(self).read = None
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs,
            )
        places = _find_read(self, cu_seq_lens)
        documents = Documents(cu_seq_lens, None if isinstance(self, Contrasting) else places)
        _last_mlp(self).read = documents.read
        options = (
            {} if isinstance(self, ModernBertForSequenceClassification) else {"use_cache": False}
        )
        hidden = self.base_model(
            input_ids=input_ids,
            # Masks of four dimensions are taken as they are; without one, that of the whole row would be built.
            attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=input_ids.device),
            position_ids=position_ids,
            documents=documents,
            **options,
        ).last_hidden_state[0]
        logits = _read_head(self, hidden, documents, places)
        if isinstance(self, Contrasting):
            rows = input_ids[0].cpu().split(documents.lengths)
            logits = logits + self.read_contrast(rows, hidden.split(documents.lengths))
        return SequenceClassifierOutput(logits=logits)


@functools.cache
def _packable(cls: type[nn.Module]) -> type[nn.Module]:
    return type(
        cls.__name__, (_Packable, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__}
    )


# What the last layer makes of tokens whose states nobody reads reaches no logit. Its MLP alone is half of its work.
# Hooks that stay, because a gradient checkpoint runs the layer a second time in the backward pass.


def _last_mlp(classifier: nn.Module) -> nn.Module:
    return classifier.base_model.layers[-1].mlp


def _find_read(classifier: nn.Module, cu_seq_lens: torch.Tensor) -> torch.Tensor | None:
    """Places of the one token a document that the classifier's own head reads; None where it reads their mean."""
    if not isinstance(classifier, ModernBertForSequenceClassification):
        return cu_seq_lens[1:].long() - 1
    return cu_seq_lens[:-1].long() if classifier.config.classifier_pooling == "cls" else None


def _pass_read(mlp: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
    if mlp.read is None:
        return None
    mlp.n_tok = args[0].shape[1]
    return (args[0][:, mlp.read],)


def _put_back(mlp: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    if mlp.read is None:
        return output
    return output.new_zeros(1, mlp.n_tok, output.shape[2]).index_copy(1, mlp.read, output)


def _read_head(
    classifier: nn.Module, hidden: torch.Tensor, documents: Documents, places: torch.Tensor | None
) -> torch.Tensor:
    if places is None:
        pooled = torch.stack([part.mean(dim=0) for part in hidden.split(documents.lengths)])
    else:
        pooled = hidden[places]
    if not isinstance(classifier, ModernBertForSequenceClassification):
        return classifier.score(pooled)
    return classifier.classifier(classifier.drop(classifier.head(pooled)))
