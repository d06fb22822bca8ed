"""Paths into a record."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.schema.paths import MISSING, Path

RECORD = {"a": {"b": [10, {"c": 20}], "n": None}, "key": 3, "0": "zero"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b.0", 10),
        ("a.b.1.c", 20),
        ("a.n", None),
        ("0", "zero"),
        ("a.b.2", MISSING),
        ("a.b.x", MISSING),
        ("a.b.-1", MISSING),
        ("a.n.x", MISSING),
        ("a.b.0.c", MISSING),
        ("x", MISSING),
        ("a.b.99999999999999999999", MISSING),
    ],
)
def test_a_path_finds_a_value_or_nothing(text: str, expected: object) -> None:
    """Null is a value."""
    assert Path.parse(text).find(RECORD) is expected or Path.parse(text).find(RECORD) == expected


@pytest.mark.parametrize(
    ("text", "root", "parts"),
    [
        ("a.b", "value", ("a", "b")),
        ("key", "key", ()),
        ("key.a.b", "key", ("a", "b")),
        ("keys", "value", ("keys",)),
        ("header:Trace-ID", "header", ("trace-id",)),
    ],
)
def test_a_path_starts_in_the_value_the_key_or_a_header(text: str, root: str, parts: tuple[str, ...]) -> None:
    """Names of headers ignore case."""
    path = Path.parse(text)

    assert (path.root, path.parts) == (root, parts)


def test_a_path_of_a_column_is_always_in_the_value() -> None:
    """So a column may be called `key`."""
    assert Path.in_value("key").find(RECORD) == 3


@pytest.mark.parametrize("text", ["", ".", "a.", ".a", "a..b", "header:", "header: ", ".".join("a" * 17)])
def test_what_is_no_path_is_an_error(text: str) -> None:
    """With what was expected."""
    with pytest.raises(ValueError, match="expected"):
        Path.parse(text)


def test_the_envelope_of_debezium_is_found_in_a_path() -> None:
    """`after` is null in the record of a delete; `before` has the row."""
    path = Path.parse("payload.after.id")

    assert path.after is not None
    assert path.after.parts == ("payload", "after")
    assert path.before.parts == ("payload", "before", "id")
    assert Path.parse("after").after is None
    assert Path.parse("id").after is None


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("ab0"), inner),
    ),
    st.lists(st.sampled_from(["a", "b", "0", "1", "²"]), min_size=1, max_size=5),
)
def test_any_path_in_any_value_raises_nothing(value: Any, parts: list[str]) -> None:
    """Digits of other scripts are names."""
    Path.parse(".".join(parts)).find(value)
