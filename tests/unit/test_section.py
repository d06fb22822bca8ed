"""The base of a config section."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from streamlearn.section import Section


class Sink(Section):
    """A section."""

    depth: int = 1
    """How deep."""


def test_an_unknown_key_is_an_error():
    """A misspelt setting is not ignored."""
    with pytest.raises(ValidationError, match="depht"):
        Sink(depht=2)


def test_does_not_change_once_built():
    """Parts share one section."""
    with pytest.raises(ValidationError, match="frozen"):
        Sink().depth = 2


def test_the_text_under_a_field_describes_it():
    """The example file and the documentation are generated from it."""
    assert Sink.model_fields["depth"].description == "How deep."
