"""Network for rows with columns: categories are embedded, then everything goes through fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from streamlearn.models.mlp import Mlp
from streamlearn.records import Column

EMBEDDING = 8
"""Dimensions of an embedding where the column does not say."""
EMBEDDING_STD = 0.01
"""Of initial embeddings. A category that was never learned is then almost nothing. With torch's 1.0 it is a random
direction as large as standardised numbers, and rare categories are learned more slowly."""


EMBEDDINGS, FIRST_WEIGHT = "embeddings.", "mlp.layers.1.weight"
"""In the names of parameters: those that columns add, and the one that they widen."""


class TableNetwork(nn.Module):
    """Embeddings of categories next to all other places, in the order of the columns; then `Mlp`.

    Bucket 0 of each embedding is for missing categories. Codes beyond the buckets are those of the nearest bucket.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        classes: int,
        *,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        norm: str = "none",
    ) -> None:
        super().__init__()
        if not columns:
            raise ValueError("it needs columns: set [columns], or take mlp")
        self._widths = [column.width for column in columns]
        self.embeddings = nn.ModuleDict()
        width = sum(self._widths)
        for number, column in enumerate(columns):
            if column.kind == "category":
                embedding = nn.Embedding(column.size + 1, column.embedding or EMBEDDING)
                nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
                self.embeddings[str(number)] = embedding
                width += embedding.embedding_dim - column.width
        self.mlp = Mlp((width,), classes, hidden=hidden, dropout=dropout, norm=norm)

    def embed(self, x_BW: Tensor) -> Tensor:
        """Prepared rows (B, W) with an embedding in place of each code."""
        parts = list(x_BW.split(self._widths, dim=1))
        for number, embedding in self.embeddings.items():
            assert isinstance(embedding, nn.Embedding)
            codes_B = parts[int(number)][:, 0].nan_to_num().clamp(0, embedding.num_embeddings - 1)
            parts[int(number)] = embedding(codes_B.to(torch.int64))
        return torch.cat(parts, dim=1)

    def forward(self, x_BW: Tensor) -> Tensor:
        """Logits (B, C) of prepared rows (B, W)."""
        logits_BC: Tensor = self.mlp(self.embed(x_BW))
        return logits_BC
