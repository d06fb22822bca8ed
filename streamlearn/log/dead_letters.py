"""Dead letters: a bad record with its original bytes, and in six more headers its reason and where it was."""

from __future__ import annotations

import re
from dataclasses import dataclass

from streamlearn.errors import RecordError
from streamlearn.records import NewRecord, Position, Record

_HEADERS = (
    "dead-letter-reason",
    "dead-letter-message",
    "dead-letter-topic",
    "dead-letter-partition",
    "dead-letter-offset",
    "dead-letter-timestamp-ms",
)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A bad record as it was, and why it is bad."""

    reason: str
    message: str
    record: Record


def dead_letter(record: Record, error: RecordError) -> NewRecord:
    """Return the record to append to the dead-letter topic.

    If it has neither key nor value, which our logs refuse, its value becomes empty.
    """
    contents = (error.reason, str(error)[:1000], *record.position, record.timestamp_ms)
    added = zip(_HEADERS, (str(content).encode("utf-8", "replace") for content in contents), strict=True)
    value = b"" if record.key is None and record.value is None else record.value
    return NewRecord(record.key, value, (*record.headers, *added))


def read_dead_letter(record: Record) -> DeadLetter:
    """Invert `dead_letter`. A record that was dead-lettered twice returns as the first dead letter.

    Raises:
        RecordError: the record does not end in the headers of a dead letter.
    """
    added = record.headers[-len(_HEADERS) :]
    if tuple(name for name, _ in added) != _HEADERS:
        raise RecordError("no_value", f"{record.position}: expected the headers of a dead letter")
    reason, message, topic, *numbers = (content.decode("utf-8", "replace") for _, content in added)
    if not all(re.fullmatch(r"-?[0-9]{1,19}", number, re.ASCII) for number in numbers):
        raise RecordError("bad_dtype", f"{record.position}: expected partition, offset and time as integers")
    partition, offset, timestamp_ms = (int(number) for number in numbers)
    kept = record.headers[: -len(_HEADERS)]
    original = Record(Position(topic, partition, offset), timestamp_ms, record.key, record.value, kept)
    return DeadLetter(reason, message, original)
