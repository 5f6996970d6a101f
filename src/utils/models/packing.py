"""Packing: several documents read as one row, without padding tokens.

Restarting `position_ids` alone would let documents attend to one another, and a mask of
the whole row would grow with the square of its length. Here attention itself knows where
documents end. A global layer attends document by document. A local layer cuts the row into
chunks of queries, each of which sees the keys within its window and document only, so that
memory grows linearly with the tokens, on any hardware.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ModernBertForSequenceClassification,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from src.utils.models.heads import Contrasting

ATTENTION = "sdpa_by_document"
# Causal, read at the last token, without soft caps or biases.
_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
_MIN_CHUNK = 64  # queries per chunk at least: below, overhead outweighs the products
_LONGEST_PLAIN = 2048  # tokens; beyond, the scores that plain products keep take too much memory


@dataclass
class Documents:
    """Where the documents of a packed row begin and end."""

    cu_seq_lens: torch.Tensor  # (documents + 1,) int32, tokens before each, and all of them last
    lengths: list[int] = field(init=False)
    _biases: dict[tuple, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Fetch the lengths once: every layer needs them on the host, too."""
        self.lengths = [end - start for start, end in pairwise(self.cu_seq_lens.tolist())]

    def window_bias(self, left: int, right: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """What to add to the scores: 0 where a query sees a key, else minus infinity.

        A query sees `left` tokens before it and `right` after it. The bias of chunks of `size`
        queries is (chunks, 1, size, 3 size), for the keys of the chunk and its neighbours.
        """
        kind = (left, right, size, dtype)  # the same for many layers
        if kind not in self._biases:
            device = self.cu_seq_lens.device
            n_tok = sum(self.lengths)
            document = torch.arange(len(self.lengths), device=device)
            document = document.repeat_interleave(self.cu_seq_lens.diff(), output_size=n_tok)
            rest = -n_tok % size
            # The row is padded with a document of its own (-1). Its queries see each other: a
            # query that sees no key at all would be NaN.
            queries = F.pad(document, (0, rest), value=-1).view(-1, size, 1)
            keys = F.pad(document, (size, rest + size), value=-1).unfold(0, 3 * size, size)
            query_position = torch.arange(size, device=device)[:, None]
            offset = torch.arange(-size, 2 * size, device=device) - query_position
            is_seen = (queries == keys[:, None]) & (offset >= -left) & (offset <= right)
            self._biases[kind] = torch.where(is_seen, 0.0, -torch.inf).to(dtype)[:, None]
        return self._biases[kind]


def attend_by_document(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    documents: Documents | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    """Attend within documents; without `documents` like the "sdpa" of transformers.

    The query is (1, heads, T, width), key and value (1, key heads, T, width). Of a packed row no
    mask is read. `options` are scaling, dropout and sliding_window (keys at least this far away
    are not seen).

    Returns:
        (1, T, heads, width), and None in place of attention weights.
    """
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    attention = _Attention(
        # Autocast leaves a normed query and key in 32 bit.
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        documents,
        bool(module.is_causal),
        options.get("scaling"),
        options.get("dropout", 0.0),
        options.get("sliding_window"),
    )
    if attention.dropout == 0 and _has_kernel(attention.query):
        return attention.with_kernel(), None
    if attention.window is None or attention.window > max(documents.lengths):
        return attention.in_documents().transpose(1, 2), None
    return attention.in_window(attention.window - 1).transpose(1, 2), None


@dataclass
class _Attention:
    """One attention layer over a packed row, in three ways."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    documents: Documents
    is_causal: bool
    scale: float | None
    dropout: float
    window: int | None

    def in_documents(self) -> torch.Tensor:
        # Slices would each send back a gradient of the whole row; `split` sends one.
        states = (self.query, self.key, self.value)
        parts = zip(*(x.split(self.documents.lengths, dim=2) for x in states), strict=True)
        return torch.cat([self._attend(*part) for part in parts], dim=2)

    def in_window(self, reach: int) -> torch.Tensor:
        """Attend chunk by chunk to keys at most `reach` tokens away."""
        # Larger chunks see more keys in vain, smaller ones copy keys more often.
        size = max(_MIN_CHUNK, reach)
        n_tok = self.query.shape[2]
        padded = F.pad(self.query[0], (0, 0, 0, -n_tok % size))
        queries = padded.unflatten(1, (-1, size)).transpose(0, 1)
        keys = _split_with_neighbours(self.key[0], size)
        values = _split_with_neighbours(self.value[0], size)
        right = 0 if self.is_causal else reach
        bias = self.documents.window_bias(reach, right, size, queries.dtype)
        attended = self._attend(queries, keys, values, bias)
        return attended.transpose(0, 1).flatten(1, 2)[None, :, :n_tok]

    def with_kernel(self) -> torch.Tensor:
        reach = -1 if self.window is None else self.window - 1
        longest = max(self.documents.lengths)
        attended = varlen_attn(
            *(x[0].transpose(0, 1).contiguous() for x in (self.query, self.key, self.value)),
            cu_seq_q=self.documents.cu_seq_lens,
            cu_seq_k=self.documents.cu_seq_lens,
            max_q=longest,
            max_k=longest,
            window_size=(reach, 0 if self.is_causal else reach),
            scale=self.scale,
            enable_gqa=self.query.shape[1] != self.key.shape[1],
            # In a prediction attention must not depend on the other documents.
            num_splits=None if torch.is_grad_enabled() else 1,
        )
        return attended.unsqueeze(0)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        is_causal = self.is_causal and bias is None
        n_groups = query.shape[1] // key.shape[1]
        if n_groups > 1 and not _groups_heads(query, bias):
            key = repeat_kv(key, n_groups)
            value = repeat_kv(value, n_groups)
        is_gqa = query.shape[1] != key.shape[1]
        needs_fused = is_causal or is_gqa or self.dropout or query.shape[2] > _LONGEST_PLAIN
        # On CPUs the fused attention of torch takes 2.5 times as long in bf16 as plain products.
        is_slow = query.device.type == "cpu" and query.dtype == torch.bfloat16
        if is_slow and not needs_fused and self.scale is not None:
            scores = (query * self.scale) @ key.transpose(-1, -2)
            return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ value
        return F.scaled_dot_product_attention(
            query, key, value, bias, self.dropout, is_causal, scale=self.scale, enable_gqa=is_gqa
        )


def _split_with_neighbours(states: torch.Tensor, size: int) -> torch.Tensor:
    """Chunks beside their neighbours, (heads, T, width) -> (chunks, heads, 3 size, width)."""
    chunks = F.pad(states, (0, 0, size, size + -states.shape[1] % size)).unflatten(1, (-1, size))
    # `unfold` would join them in one call, but adds its gradients up one by one.
    return torch.cat([chunks[:, :-2], chunks[:, 1:-1], chunks[:, 2:]], dim=2).transpose(0, 1)


def _has_flash(query: torch.Tensor) -> bool:
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _has_kernel(query: torch.Tensor) -> bool:
    # torch 2.10, as on Kaggle, has neither windows nor a scale, torch 2.11 no grouped heads.
    parameters = inspect.signature(varlen_attn).parameters
    needed = {"window_size", "scale", "enable_gqa", "num_splits"}
    return needed <= parameters.keys() and _has_flash(query)


def _groups_heads(query: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a fused kernel takes fewer key heads than query heads.

    On a GPU only flash attention does, which takes no bias. Elsewhere `enable_gqa` would choose
    the MATH kernel: 32 bit, and the scores of a whole document in memory.
    """
    return not query.is_cuda or (bias is None and _has_flash(query))


# Registered at import, because transformers finds an attention by its name in the model's config.
AttentionInterface.register(ATTENTION, attend_by_document)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for padded batches


def collate_packed(rows: Sequence[Sequence[int] | np.ndarray]) -> dict[str, torch.Tensor]:
    """Join documents into one row.

    Returns:
        input_ids and position_ids, both (1, T) int64, and cu_seq_lens, (documents + 1,) int32.

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
    """Whether `enable_packing` knows this classifier's architecture, also under peft."""
    classifier = _unwrap(model)
    config = getattr(classifier, "config", None)
    if config is None or config._attn_implementation not in ("sdpa", ATTENTION):
        return False
    if isinstance(classifier, ModernBertForSequenceClassification):
        # In older transformers it has its own attention, and no such setting.
        return hasattr(config, "sliding_window") and classifier._supports_attention_backend
    is_generic = isinstance(classifier, GenericForSequenceClassification)
    return is_generic and config.model_type in _DECODERS


def enable_packing(model: nn.Module) -> nn.Module:
    """Let a classifier, changed in place, read packed rows as well as padded batches.

    `model(**collate_packed(rows))` then gives logits of (documents, C). TypeError if `can_pack`
    does not know the architecture.
    """
    classifier = _unwrap(model)
    if not can_pack(model):
        raise TypeError(f"expected a model that can_pack() knows, got {type(classifier).__name__}")
    if classifier.config._attn_implementation != ATTENTION:
        classifier.config._attn_implementation = ATTENTION
        # On the object and not by a subclass: saving and peft look at the class.
        classifier.forward = MethodType(_forward, classifier)
    return model


def _unwrap(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _forward(
    classifier: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    **kwargs,
):
    """The forward pass of a classifier that reads packed rows where `cu_seq_lens` is given."""
    if cu_seq_lens is None or input_ids is None:
        kwargs["position_ids"] = position_ids
        return type(classifier).forward(classifier, input_ids, attention_mask, **kwargs)
    is_encoder = isinstance(classifier, ModernBertForSequenceClassification)
    documents = Documents(cu_seq_lens)
    hidden = classifier.base_model(
        input_ids=input_ids,
        # A mask of four dimensions is taken as it is; without one, that of the whole row is built.
        attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=input_ids.device),
        position_ids=position_ids,
        documents=documents,
        **({} if is_encoder else {"use_cache": False}),
    ).last_hidden_state[0]
    if is_encoder:
        pooled = hidden[cu_seq_lens[:-1].long()]
        if classifier.config.classifier_pooling == "mean":
            means = [part.mean(dim=0) for part in hidden.split(documents.lengths)]
            pooled = torch.stack(means)
        logits = classifier.classifier(classifier.drop(classifier.head(pooled)))
    else:
        logits = classifier.score(hidden[cu_seq_lens[1:].long() - 1])
    if isinstance(classifier, Contrasting):
        rows = input_ids[0].cpu().split(documents.lengths)
        logits = logits + classifier.read_contrast(rows, hidden.split(documents.lengths))
    return SequenceClassifierOutput(logits=logits)
