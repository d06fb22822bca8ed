"""Records of one topic as `init` reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness.fakes import MemoryLog

from streamlearn.app.init_topic import Topic, read_topic, tensor_shape
from streamlearn.app.sampling import read_some
from streamlearn.errors import ConfigError
from streamlearn.records import NewRecord
from streamlearn.schema.reader import OWN_ID
from streamlearn.schema.settings import LabelSource, SampleSource


def topic_of(*records: Any, source: SampleSource | LabelSource | None = None) -> Topic:
    """Bytes and records as they are, other values as JSON."""
    log = MemoryLog()
    log.create_topics({"t": 1})
    log.append("t", [new(each) for each in records])
    return read_topic(source or SampleSource(), read_some(log, ["t"], 100), None, is_given=False)


def new(given: Any) -> NewRecord:
    if isinstance(given, NewRecord):
        return given
    return NewRecord(None, given if isinstance(given, bytes) else json.dumps(given).encode())


def test_records_that_cannot_be_parsed_are_counted_by_what_is_wrong() -> None:
    """Not by where the parser stopped. Null values are neither."""
    topic = topic_of({"a": 1}, b'{"a"', b'{"a": 1, "b"', NewRecord(b"k", None), {"a": 2})

    assert topic.fields.values == {"a": [1, 2]}
    assert sum(topic.unreadable.values()) == 2
    assert all("column" not in error for error in topic.unreadable)


def test_none_that_can_be_parsed_is_an_error_with_the_reason() -> None:
    """A format that `init` does not know looks like that."""
    with pytest.raises(ConfigError, match=r"t: none of 2 records could be read as json: .*JSON"):
        topic_of(b"{1", b"{2")


def test_records_of_our_own_servers_count_only_if_there_are_no_others() -> None:
    """They are read by their header, whatever the config says."""
    own = NewRecord(b"a", b'{"id": "a", "x": [1, 2]}', ((OWN_ID, b"a"),))

    assert topic_of(own, {"b": 1}).fields.row_paths == ["b"]
    assert topic_of(own).fields.row_paths == ["id", "x"]


def test_a_label_may_be_plain_text() -> None:
    """The class alone, with the id in the key."""
    assert topic_of(b"fraud", b"ok", source=LabelSource()).parsed == ["fraud", "ok"]


@pytest.mark.parametrize(
    ("records", "shape"),
    [
        ([{"id": "a", "x": [1, 2]}, {"id": "b", "x": [3, 4]}], [2]),
        ([{"id": "a", "x": [[1, 2], [3, 4]]}], [2, 2]),
        ([{"id": "a", "x": [1, 2]}, {"id": "b", "x": [3]}], None),
        ([{"id": "a", "x": [1, "b"]}], None),
        ([{"id": "a", "x": [1, 2], "amount": 3}], None),
        ([{"id": "a"}], None),
    ],
)
def test_the_shape_of_our_own_records(records: list[Any], shape: list[int] | None) -> None:
    """None if a field is the user's, or if shapes differ."""
    assert tensor_shape(topic_of(*records)) == shape
