"""[schema] and [model]: what a sample is, and the network that reads it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from streamlearn.records import Column, Schema
from streamlearn.section import Section


def _check_import_path(value: str) -> str:
    if ":" in value:
        module, _, attribute = value.partition(":")
        if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
            raise ValueError("expected a built-in name or an import path such as package.module:factory")
    return value


ImportPath = Annotated[str, AfterValidator(_check_import_path)]
"""A built-in name, or `package.module:attribute`."""


ROW_NETWORKS = ("mlp", "table")
"""Built-in networks of rows: a step is mostly overhead, so it costs little more with more rows, and threads wait."""


class SchemaConfig(Section):
    """[schema]: what a sample is. With [columns], shape and dtype follow from them."""

    _columns: tuple[Column, ...] = PrivateAttr(())

    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field((64,), min_length=1, max_length=4)
    """Of one sample: (features,) for a table, (channels, height, width) for an image."""
    dtype: Literal["uint8", "int8", "int16", "int32", "float16", "float32", "float64"] = "float32"
    """Of one sample, as it is stored and sent."""
    classes: int | tuple[str, ...] = 10
    """Number of classes, or their names."""
    max_classes: int = Field(0, ge=0, le=10_000)
    """Number of outputs, with spare ones for classes that are named later. 0: as many as `classes`."""
    scale: float = 1.0
    """The network sees x * scale: 1/255 = 0.00392156862745098 for uint8 images."""

    @model_validator(mode="after")
    def _check(self) -> SchemaConfig:
        names = self._names
        if not 2 <= len(names) <= 10_000:
            raise ValueError("classes: expected 2 to 10000 classes")
        if 0 < self.max_classes < len(names):
            msg = f"max_classes: expected 0, or at least the {len(names)} of classes"
            raise ValueError(msg)
        if len(set(names)) != len(names):
            raise ValueError("classes: names must differ")
        return self

    @property
    def _names(self) -> tuple[str, ...]:
        return self.classes if isinstance(self.classes, tuple) else tuple(str(i) for i in range(self.classes))

    def set_columns(self, columns: tuple[Column, ...]) -> None:
        """Set the columns of [columns]; called once, by `Config`."""
        self._columns = columns

    def build(self) -> Schema:
        """The schema that the rest of the program uses."""
        return Schema(
            shape=self.shape,
            dtype=np.dtype(self.dtype),
            classes=self._names,
            spare=self.max_classes - len(self._names) if self.max_classes else None,
            scale=self.scale,
            columns=self._columns,
        )


class ModelConfig(Section):
    """[model]: which network."""

    factory: ImportPath = "mlp"
    """mlp, convnet, conv13, wide_resnet, or package.module:factory that returns an nn.Module from inputs to logits."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory. Built-in ones also get shape and classes. docs/networks.md lists theirs."""
    normalise: bool = True
    """Standardise inputs by running median and scale, kept in the checkpoint. For tables; usually off for images.
    If off, inputs (after schema.scale) are clipped at 1e6, and labelled samples beyond that are not replayed."""
