"""The class that a label names: an index of the schema's, or the name of a class that it does not have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import orjson

from streamlearn.errors import RecordError
from streamlearn.records import RETRACTED, UNLABELLED, Schema, is_whole
from streamlearn.schema.fields import is_number, json_type, short_text, text_of, utf8
from streamlearn.schema.paths import MISSING


class LabelClasses:
    """Reads and writes the classes of one schema. Immutable."""

    def __init__(self, schema: Schema, values: Mapping[str, str], *, takes_any_name: bool) -> None:
        """`values` are those of `source.labels.values`; without `takes_any_name` an unknown class is refused."""
        self._schema, self._values, self._takes_any_name = schema, dict(values), takes_any_name
        self.names = {name: index for index, name in enumerate(schema.classes)}
        """Index by name."""
        self.translates = bool(values)
        """Whether some values stand for a class."""
        self._numbered = schema.numbered

    def of_value(self, value: object) -> tuple[int, str | None]:
        """Return the index of the class that a label names, and None; for an unknown class UNLABELLED and its name.

        A value of `source.labels.values` names the class that is set there.

        Raises:
            RecordError: `unknown_class` if unknown names are refused, or if it is not a name.
        """
        if type(value) is not str or self._values:
            text = text_of(value)
            named = None if text is None else self._values.get(text)
            if named is not None:
                value = named
            elif text is not None and (type(value) is not bool or text in self.names) and type(value) is not int:
                value = text
        return self.of_name(value)

    def is_none(self, value: object) -> bool:
        """Whether the label field of a sample has no label: it is absent, null, or text that is empty.

        Producers that know no null, as those of CSV, write empty text. A value that is set stands for its class.
        """
        if isinstance(value, str):
            return not value.strip() and value not in self._values
        return value is None or value is MISSING

    def of_name(self, value: object) -> tuple[int, str | None]:
        """As `of_value`, for a name as streamlearn writes it."""
        try:
            return self.index(value), None
        except RecordError:
            name = str(value) if type(value) is int and self._numbered else value
            if not self._takes_any_name or not isinstance(name, str) or not name.strip():
                raise
            if is_number(name) and not (self._numbered and is_whole(name)):
                raise
            return UNLABELLED, short_text(name, "label")

    def of_label(self, fields: Mapping[str, Any], *, translate: bool = True) -> tuple[int, str | None]:
        """Return the class in a label's JSON, as `of_value` does; RETRACTED if it is null.

        Without `translate` it is a name as streamlearn writes it.

        Raises:
            RecordError: as `of_value`; `no_class` if the field is missing, or "label" and "class" differ.
        """
        read = self.of_value if translate else self.of_name
        given = [fields[name] for name in ("label", "class") if name in fields]
        found = {read(value) for value in given if value is not None}
        if given and not found:
            return RETRACTED, None
        if len(found) != 1:
            got = "two that differ" if found else "none"
            raise RecordError("no_class", f'expected a class in "label" (or its alias "class"), got {got}')
        return found.pop()

    def index(self, value: object) -> int:
        """Return the index of a class. Raises `unknown_class`."""
        # Same result as `Schema.class_index`, which scans all names.
        if type(value) is int and not self._numbered and 0 <= value < len(self.names):
            return value
        if isinstance(value, str) and (index := self.names.get(value)) is not None:
            return index
        if not isinstance(value, (str, int)):
            # Schema.class_index formats what it got, and formatting a deeply nested list recurses.
            raise RecordError("unknown_class", f"expected a class name or index, got a JSON {json_type(value)}")
        return self._schema.class_index(value)

    def name_to_write(self, class_index: int, class_name: str | None) -> str:
        """Return the name to write: of the class, or `class_name` if no class has it."""
        if class_name is None:
            return self.name(class_index)
        assert self.of_name(class_name) == (class_index, class_name), class_name
        return class_name

    def name(self, class_index: int) -> str:
        """Return the name of a class. Raises `unknown_class`."""
        if not 0 <= class_index < len(self._schema.classes):
            raise RecordError("unknown_class", f"class {class_index} is not one of {len(self._schema.classes)}")
        return self._schema.classes[class_index]


def plain_class(value: bytes, names: Collection[str] = ()) -> dict[str, Any]:
    """Return the fields of a label that is plain text or a JSON scalar; a class of exactly that name comes first.

    Empty text or null has no class. It does not retract: only JSON with a null in "label" does.

    Raises:
        RecordError: it is no text, or begins like JSON text and is none.
    """
    text = utf8(value, "label")
    if text in names:
        return {"label": text}
    text = text.strip()
    if not text or text == "null":
        return {}
    if text[0] != '"':
        return {"label": text}
    try:
        return {"label": orjson.loads(text)}
    except orjson.JSONDecodeError as error:
        raise RecordError("not_json", f"expected a class name, with or without JSON quotes: {error}") from None
