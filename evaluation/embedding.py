"""Embeddings of sentences by the embedded MiniLM encoder, for rivals that compare responses by meaning. Imports torch; no Ray, no files.

Shapes: B texts of a batch, L tokens, H size of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cluster import models
from training.scorer import quiet

_BATCH = 64
_TOKENS = 256


class SentenceEncoder:
    """An encoder whose mean over the tokens is the embedding of a text, as sentence-transformers computes it for all-MiniLM-L6-v2."""

    def __init__(self, name: str) -> None:
        """Load the encoder `name`: an embedded name, a hub name or a folder."""
        from transformers import AutoModel, AutoTokenizer

        folder = models.resolve(name, "embedding")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with models.one_line_errors(name, "embedding"), quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(self._device).eval()
        self.tokens = 0
        """Tokens read so far."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the embeddings of texts, (texts, H), each of length 1. A text is cut to 256 tokens."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found = np.zeros((len(texts), int(self._model.config.hidden_size)))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            inputs = self._tokenizer([texts[row] for row in rows], padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt")
            mask_BL1 = inputs["attention_mask"][..., None].to(self._device)
            self.tokens += int(mask_BL1.sum())
            with torch.inference_mode():
                states_BLH = self._model(**inputs.to(self._device)).last_hidden_state
            means_BH = (states_BLH * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)
            found[rows] = torch.nn.functional.normalize(means_BH).double().cpu().numpy()
        return found
