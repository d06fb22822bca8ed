"""The settings of [source] and [columns]: where the user's records are, and which of their fields are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from streamlearn.models.settings import ImportPath
from streamlearn.records import Column, ColumnKind
from streamlearn.schema.paths import Path
from streamlearn.section import Section

TimeUnit: TypeAlias = Literal["s", "ms", "us", "ns"]
MAX_BUCKETS = 1 << 20
"""A float32 holds every integer up to 2^24."""
MAX_SIZE = 1 << 16
"""Numbers of a vector or a text."""
MAX_COLUMNS = 4096
MAX_PLACES = 1 << 20
"""Of a row."""


def _checked_path(text: str) -> str:
    Path.parse(text)
    return text


PathText = Annotated[str, AfterValidator(_checked_path)]
"""A path into the record (`a.b.c`), `key`, `key.a.b`, or `header:NAME`."""

_OPTIONS: dict[ColumnKind, tuple[str, ...]] = {
    "number": (),
    "boolean": (),
    "category": ("buckets", "embedding"),
    "timestamp": ("unit",),
    "vector": ("size",),
    "text": ("size", "encoder"),
}
"""The settings that a kind has besides `kind` and `from`."""


class ColumnConfig(Section):
    """[columns.NAME]: one column. `NAME = "number"` is short for `NAME = { kind = "number" }`."""

    model_config = ConfigDict(populate_by_name=True)

    kind: ColumnKind
    """What the column holds."""
    from_: PathText | None = Field(None, alias="from")
    """Path to the value; by default the column's name."""
    buckets: int = Field(1024, ge=2, le=MAX_BUCKETS)
    """Category: number of hash buckets. Twice the number of values keeps most of them apart."""
    embedding: int = Field(8, ge=1, le=256)
    """Category: dimensions of its embedding."""
    unit: TimeUnit = "s"
    """Timestamp: unit of a number since 1970. ISO 8601 text and logical types need none."""
    size: int = Field(256, ge=1, le=MAX_SIZE)
    """Vector and text: how many numbers."""
    encoder: ImportPath | None = None
    """Text: package.module:function from a text to `size` numbers. Not set: hashed n-grams."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given

    @field_validator("encoder")
    @classmethod
    def _import_path(cls, value: str | None) -> str | None:
        if value is not None and ":" not in value:
            raise ValueError("expected package.module:function")
        return value

    @model_validator(mode="after")
    def _check(self) -> ColumnConfig:
        foreign = self.model_fields_set - {"kind", "from_", *_OPTIONS[self.kind]}
        if foreign:
            msg = f"a {self.kind} column has no {', '.join(sorted(foreign))}"
            raise ValueError(msg)
        if self.kind == "vector" and "size" not in self.model_fields_set:
            raise ValueError("a vector column needs size, its number of numbers")
        return self

    def column(self, name: str) -> Column:
        """The places of this column."""
        if self.kind == "category":
            return Column(name, self.kind, self.buckets, self.embedding)
        return Column(name, self.kind, self.size if self.kind in ("vector", "text") else 1)


def layout(columns: Mapping[str, ColumnConfig]) -> tuple[Column, ...]:
    """The columns of a row, in order.

    Raises:
        ValueError: they are too many, or too wide.
    """
    found = tuple(config.column(name) for name, config in columns.items())
    if len(found) > MAX_COLUMNS or sum(column.width for column in found) > MAX_PLACES:
        msg = f"expected at most {MAX_COLUMNS} columns of {MAX_PLACES} places in all"
        raise ValueError(msg)
    if "" in columns:
        raise ValueError("expected a name for every column")
    return found
