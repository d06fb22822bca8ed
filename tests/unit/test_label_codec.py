"""Labels: bytes to `Label` and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest

from streamlearn.errors import RecordError
from streamlearn.log.codec import Codec
from streamlearn.log.envelope import as_read
from streamlearn.records import (
    ERASED,
    RETRACTED,
    UNLABELLED,
    Headers,
    Position,
    Record,
    Schema,
)

POSITION = Position("labels", 3, 1042)
CLASSES = ("cat", "dog", "3", "0")
TABLE = Schema((4,), np.dtype("float32"), CLASSES)
NAMED = Schema((4,), np.dtype("float32"), ("cat", "dog", "owl", "elk"))


def record(value: bytes | None, key: bytes | None = b"a", headers: Headers = ()) -> Record:
    return Record(POSITION, 1_700_000_000_500, key, value, headers)


def reason_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(RecordError) as caught:
        call(*arguments)
    return caught.value.reason


class TestLabel:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (b'{"id": "a", "label": "dog"}', 1),
            (b'{"id": "a", "class": "dog"}', 1),
            (b'{"label": "dog", "class": 1}', 1),
            (b' {"label": 1}', 1),
            (b'{"label": "1"}', 1),
            (b"dog", 1),
            (b"dog\n", 1),
            (b'"dog"', 1),
            (b"1", 1),
        ],
    )
    def test_takes_a_class_by_name_or_by_index(self, value: bytes, expected: int) -> None:
        """In an object or as plain text."""
        label = Codec(NAMED).labels.decode(record(value))

        assert (label.sample_id, label.class_index) == ("a", expected)

    @pytest.mark.parametrize(
        ("value", "expected"),
        [(b'{"label": "3"}', 2), (b'{"label": 3}', 2), (b"3", 2), (b'{"class": 0}', 3), (b"cat", 0)],
    )
    def test_a_number_is_a_name_if_classes_are_numbered(self, value: bytes, expected: int) -> None:
        """As text or as a JSON number: the y column of a table means the class of that name."""
        assert Codec(TABLE).labels.decode(record(value)).class_index == expected

    @pytest.mark.parametrize("value", [b"7", b'{"label": 7}', b'{"label": "7"}'])
    def test_a_number_may_be_an_unknown_class_if_classes_are_numbered(self, value: bytes) -> None:
        """It is held by its name, like any unknown class."""
        label = Codec(TABLE, unknown_class="hold").labels.decode(record(value))

        assert (label.class_index, label.class_name) == (UNLABELLED, "7")

    @pytest.mark.parametrize("value", [b"1", b'{"label": 1}', b'{"label": "2"}'])
    def test_a_number_is_not_an_index_if_classes_are_numbered(self, value: bytes) -> None:
        """It may be a name, and would be learned as another class."""
        assert reason_of(Codec(TABLE).labels.decode, record(value)) == "unknown_class"

    @pytest.mark.parametrize(
        ("key", "value", "reason"),
        [
            (b"a", None, "no_value"),
            (b"a", b"", "no_class"),
            (b"a", b"null", "no_class"),
            (b"a", b"{}", "no_class"),
            (b"a", b'{"source": null}', "no_class"),
            (b"a", b'{"label": "cat", "class": "dog"}', "no_class"),
            (b"a", b'{"label": "cow"}', "unknown_class"),
            (b"a", b'{"label": [["dog"]]}', "unknown_class"),
            (b"a", b"cow", "unknown_class"),
            (b"a", b"true", "unknown_class"),
            (b"a", b"99999999999999999999999", "unknown_class"),
            (b"a", b"[1]", "unknown_class"),
            (b"a", b"\xff", "bad_dtype"),
            (b"a", b'{"label"', "not_json"),
            (b"a", b'"dog', "not_json"),
            (None, b"dog", "no_id"),
            (b"b", b'{"id": "a", "label": "dog"}', "no_id"),
            (None, b'{"label": "dog"}', "no_id"),
            (b"a", b'{"label": "dog", "source": {}}', "bad_dtype"),
            (b"a", b'{"label": "dog", "time": "now"}', "bad_time"),
            (b"a", b'{"erase": 1}', "bad_dtype"),
            (b"a", b'{"label": "dog", "erase": true}', "bad_dtype"),
            (b"a", b'{"erase": false}', "no_class"),
        ],
    )
    def test_names_what_is_wrong(self, key: bytes | None, value: bytes | None, reason: str) -> None:
        """Each kind of bad label has its reason, and its position in the message."""
        with pytest.raises(RecordError, match=r"^labels\[3\]@1042: ") as caught:
            Codec(TABLE).labels.decode(record(value, key))

        assert caught.value.reason == reason

    @pytest.mark.parametrize("value", [b'{"erase": true}', b'{"id": "a", "label": null, "erase": true}'])
    def test_may_erase_its_sample(self, value: bytes) -> None:
        """It encodes to what was decoded."""
        label = Codec(TABLE).labels.decode(record(value))
        again = Codec(TABLE).labels.decode(as_read(Codec(TABLE).labels.encode_erasure("a")))

        assert (label.sample_id, label.class_index) == ("a", ERASED)
        assert (again.sample_id, again.class_index) == ("a", ERASED)

    @pytest.mark.parametrize("value", [b'{"label": null}', b'{"class": null}', b'{"label": null, "class": null}'])
    def test_a_null_class_is_a_retraction(self, value: bytes) -> None:
        """It encodes to what was decoded. A null next to a class is ignored."""
        label = Codec(TABLE).labels.decode(record(value))
        again = Codec(TABLE).labels.decode(as_read(Codec(TABLE).labels.encode("a", RETRACTED, source="audit")))

        assert (label.class_index, label.class_name) == (RETRACTED, None)
        assert (again.class_index, again.sample_id, again.source) == (RETRACTED, "a", "audit")
        assert Codec(TABLE).labels.decode(record(b'{"label": null, "class": "dog"}')).class_index >= 0

    @pytest.mark.parametrize(
        ("value", "name"),
        [(b'{"label": "cow"}', "cow"), (b" cow ", "cow"), (b'{"class": "gl\xc3\xbchbirne"}', "glühbirne")],
    )
    def test_of_an_unknown_class_keeps_its_name_if_held(self, value: bytes, name: str) -> None:
        """The ledger holds it until a class has the name. It encodes to what was decoded."""
        codec = Codec(TABLE, unknown_class="hold")

        label = codec.labels.decode(record(value))
        again = codec.labels.decode(as_read(codec.labels.encode("a", UNLABELLED, class_name=name)))

        assert (label.class_index, label.class_name) == (UNLABELLED, name)
        assert (again.class_index, again.class_name) == (UNLABELLED, name)

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (b'{"label": "-1"}', "unknown_class"),
            (b'{"label": "1.5"}', "unknown_class"),
            (b'{"label": "nan"}', "unknown_class"),
            (b'{"label": " "}', "unknown_class"),
            (b'{"label": true}', "unknown_class"),
            (b'{"label": ["cow"]}', "unknown_class"),
            (b'{"label": "cow", "class": "elk"}', "no_class"),
            (b'{"label": "' + b"c" * 257 + b'"}', "too_large"),
        ],
    )
    def test_without_a_usable_name_is_refused_even_if_unknown_ones_are_held(self, value: bytes, reason: str) -> None:
        """A number that is not an index is not a name either, unless classes are numbered."""
        assert reason_of(Codec(TABLE, unknown_class="hold").labels.decode, record(value)) == reason
        assert reason_of(Codec(NAMED, unknown_class="hold").labels.decode, record(b"4")) == "unknown_class"

    @pytest.mark.parametrize(
        ("time", "expected"),
        [
            (0, 0.0),
            (1.5, 1.5),
            ("1970-01-01T00:00:01Z", 1.0),
            ("1970-01-01T01:00:00.25+01:00", 0.25),
            ("19700101T000002+0000", 2.0),
            (None, None),
        ],
    )
    def test_time_is_seconds_or_iso_8601_with_a_zone(self, time: object, expected: float | None) -> None:
        """Both become seconds since the epoch."""
        value = orjson.dumps({"label": 0, "time": time})

        assert Codec(TABLE).labels.decode(record(value)).event_time_s == expected

    @pytest.mark.parametrize(
        "time",
        [-1, -0.001, 1e11, 1_700_000_000_000, "1970-01-01T00:00:01", "1", "", True, [], {}, "1969-12-31T23:59:59Z"],
    )
    def test_an_ambiguous_time_is_refused(self, time: object) -> None:
        """Milliseconds, local times and numbers in quotes are not guessed."""
        value = orjson.dumps({"label": 0, "time": time})

        assert reason_of(Codec(TABLE).labels.decode, record(value)) == "bad_time"
