"""The text of a config file: what was set comes back, whatever names and values are."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.app.draft import ConfigDraft, toml

SCALARS = st.text() | st.integers(-(2**60), 2**60) | st.booleans() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(), SCALARS, max_size=3)


@given(VALUES)
def test_any_value_comes_back(value: Any) -> None:
    """Quotes, line ends, control characters, tables."""
    assert tomllib.loads(f"x = {toml(value)}") == {"x": value}


@given(st.dictionaries(st.text(), SCALARS, max_size=4), st.text())
def test_any_text_comes_back_with_any_comment(columns: dict[str, Any], why: str) -> None:
    """No name, value or comment adds a setting."""
    draft = ConfigDraft({}, head=why)
    for name, value in columns.items():
        draft.set("columns", name, to=value, why=why)
        draft.suggest("columns", name, to=value, why=why)
    draft.note("serve", why)

    found = tomllib.loads(draft.text())

    assert found.get("columns", {}) == columns == draft.tree.get("columns", {})
    assert found.get("serve", {}) == {}


def test_lone_surrogates_are_replaced() -> None:
    """UTF-8 has none."""
    assert tomllib.loads(f"x = {toml(chr(0xD800))}")["x"] == "\ufffd"


def test_what_the_user_has_set_stays() -> None:
    """And is written."""
    given_ = {"log": {"kind": "kafka"}, "columns": {"a": {"kind": "vector", "size": 3}}}
    draft = ConfigDraft(given_, head="head")
    draft.set("log", "kind", to="embedded")
    draft.set("columns", "a", to="number")
    draft.suggest("columns", "a", to="number", why="")

    assert tomllib.loads(draft.text()) == given_ == draft.tree
    assert draft.has("log", "kind")
    assert "number" not in draft.text()


@pytest.mark.parametrize("name", ["sasl_plain_password", "token", "client_secret"])
def test_a_secret_is_not_written(name: str) -> None:
    """It stays in the tree; the file names the variable to set."""
    draft = ConfigDraft({"log": {"kafka": {"options": {name: "hunter2", "security_protocol": "SASL_SSL"}}}}, head="")

    assert "hunter2" not in draft.text()
    assert draft.unwritten == [f"STREAMLEARN_LOG__KAFKA__OPTIONS__{name.upper()}"]
    assert draft.unwritten[0] in draft.text()
    assert draft.tree["log"]["kafka"]["options"][name] == "hunter2"
    assert tomllib.loads(draft.text())["log"]["kafka"]["options"] == {"security_protocol": "SASL_SSL"}


def test_a_secret_in_a_file_is_named() -> None:
    """The path is no secret."""
    assert 'password = "file:/run/secret"' in ConfigDraft({"a": {"password": "file:/run/secret"}}, head="").text()
