"""Frozen embeddings: what a checkpoint that nobody trained here makes of prompts and answers.

Each text is read alone. An encoder's token vectors are averaged; of a decoder the last
token is taken, the only one that has seen the whole text. Vectors have length one. They
are kept on disk under a key of everything they depend on.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from src.utils.models.hardware import choose_device, choose_dtype
from src.utils.models.template import TEMPLATE_VERSION, TURN_TEXT, text_of
from src.utils.runs import atomic_path, hash_file, hash_json, hash_pairs
from src.utils.schema import TEXTS, Turns

_TOKENS_PER_BATCH = 8192  # padded
_WEIGHTS = ("*.safetensors", "config.json", "tokenizer.json")


@dataclass(frozen=True)
class Embedder:
    """A frozen checkpoint, ready to read."""

    model: nn.Module
    tokenizer: object
    max_tokens: int  # of one text; what is longer loses its end

    def embed(self, pairs: pd.DataFrame) -> np.ndarray:
        """Read every text once.

        Args:
            pairs: N battles with `prompt`, `response_a`, `response_b` as tuples of turns.

        Returns:
            (N, 3, H) float32, of prompt, answer A and answer B; each of length one.
        """
        texts = [_join(turns) for name in TEXTS for turns in pairs[name]]
        distinct = list(dict.fromkeys(texts))
        places = {text: place for place, text in enumerate(distinct)}
        vectors = self._embed_texts(distinct)[[places[text] for text in texts]]
        return vectors.reshape(len(TEXTS), len(pairs), -1).transpose(1, 0, 2)

    def _embed_texts(self, texts: list[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        # Longest first: rows of like length waste little, and the largest batch comes at once.
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        with tqdm(
            total=len(texts), desc="embeddings", unit="text", disable=len(texts) < 1000
        ) as bar:
            while order:
                n_chars = max(len(texts[order[0]]), 1)
                n_rows = max(1, _TOKENS_PER_BATCH // min(n_chars // 2 + 8, self.max_tokens))
                batch, order = order[:n_rows], order[n_rows:]
                vectors[batch] = self._read([texts[place] for place in batch])
                bar.update(len(batch))
        return vectors

    @torch.inference_mode()
    def _read(self, texts: list[str]) -> np.ndarray:
        inputs = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_tokens,
            padding=True,
            return_token_type_ids=False,
            return_tensors="pt",
        ).to(self.model.device)
        if not inputs["input_ids"].shape[
            1
        ]:  # nothing but empty texts, and a tokenizer that adds no token
            return np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        hidden = self.model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"]
        if is_decoder(self.model):
            last = mask.sum(dim=1).sub(1).clamp(min=0)
            pooled = hidden[torch.arange(len(texts), device=hidden.device), last]
        else:
            pooled = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(
                min=1
            )
        pooled = pooled * (mask.sum(dim=1, keepdim=True) > 0)
        return nn.functional.normalize(pooled, dim=1).cpu().numpy()


def is_decoder(model: nn.Module) -> bool:
    """Whether a token sees only what stands before it."""
    return any(name.endswith("ForCausalLM") for name in model.config.architectures or ())


def _join(turns: Turns) -> str:
    return TURN_TEXT.join(map(text_of, turns))


def load_embedder(checkpoint: str, max_tokens: int) -> Embedder:
    """Load a frozen checkpoint.

    Args:
        checkpoint: a folder, or a hub id, which may name a commit: "org/name@commit".
        max_tokens: of one text at most; lowered to what the checkpoint reads.

    Raises:
        OSError: the checkpoint is neither a folder nor in the cache nor within reach.
    """
    device = choose_device()
    source, revision = split_revision(checkpoint)
    logging.getLogger("transformers.modeling_utils").setLevel(
        logging.ERROR
    )  # a head that is left out is no news
    options = {"revision": revision, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model = AutoModel.from_pretrained(
        source, dtype=choose_dtype(device), use_safetensors=True, **options
    )
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    limit = getattr(model.config, "max_position_embeddings", None) or max_tokens
    return Embedder(model.eval().to(device), tokenizer, min(max_tokens, limit))


def split_revision(checkpoint: str) -> tuple[str, str]:
    """The folder or hub id of a checkpoint, and its commit or "main"."""
    if Path(checkpoint).expanduser().is_dir():
        return str(Path(checkpoint).expanduser()), "main"
    name, _, revision = checkpoint.partition("@")
    return name, revision or "main"


def embed_pairs(pairs: pd.DataFrame, checkpoint: str, max_tokens: int, cache: Path) -> np.ndarray:
    """Read every text once, or take what was read before.

    Args:
        pairs: N battles.
        checkpoint: as for `load_embedder`.
        max_tokens: of one text at most.
        cache: folder of the files; one a key, made of the battles, the checkpoint, the version of
            our text templates, the precision and `max_tokens`.

    Returns:
        (N, 3, H) float32, as from `Embedder.embed`.
    """
    precision = str(choose_dtype(choose_device())).removeprefix("torch.")
    facts = {
        "pairs": hash_pairs(pairs[["id", *TEXTS]]),
        "checkpoint": _name_checkpoint(checkpoint),
        "template_version": TEMPLATE_VERSION,
        "precision": precision,
        "max_tokens": max_tokens,
    }
    path = Path(cache) / f"{hash_json(facts)}.safetensors"
    if not path.exists():
        vectors = load_embedder(checkpoint, max_tokens).embed(pairs)
        with atomic_path(path) as tmp:
            tmp.write_bytes(
                save({"embeddings": np.ascontiguousarray(vectors)}, {"facts": json.dumps(facts)})
            )
    return load_file(path)["embeddings"]


def _name_checkpoint(checkpoint: str) -> list[str]:
    """What tells a checkpoint from others: its id and commit, or the content of its folder."""
    source, revision = split_revision(checkpoint)
    if not Path(source).is_dir():
        return [source, revision]
    return [hash_file(path) for pattern in _WEIGHTS for path in sorted(Path(source).glob(pattern))]
