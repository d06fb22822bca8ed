"""The errors that this package raises, as one tree.

StreamlearnError
├── ConfigError                 a setting must change; exit code 2
├── RecordError                 one record is bad; dead-letter it (or answer 422) and continue
│   └── SkippedError            one record has nothing to learn; count it and continue
├── LogError                    the log refuses permanently
│   ├── LogUnavailableError     the log is away; retry, answer 503
│   ├── WriterFencedError       another process writes under the same name; stop
│   ├── RecordsUnreadableError  the log holds records that cannot be decoded
│   └── OffsetOutOfRangeError   the offset was trimmed or never written; apply `log.on_trimmed`
├── StateError                  saved state cannot be trusted or written; stop, exit code 3
│   ├── CheckpointError
│   ├── CheckpointFormatError   intact, but of a format that this version does not read
│   ├── StoreError
│   └── StateLockedError        another learner owns this state folder
├── RegistryUnavailableError    the schema registry is away; retry, refuse no record
└── NotPublishedError           no teacher is published yet; answer 503

Any other exception is a bug in this package and must not be handled.
"""

FROM_SCRATCH = "start from scratch: move all but log/ out of state.dir; what the log still holds is learned again"
"""The last resort for unusable state. An embedded log is in state.dir too, and must stay."""


class StreamlearnError(Exception):
    """Root of the tree. The command line exits with `exit_code`."""

    exit_code = 1


class ConfigError(StreamlearnError):
    """A setting is missing or wrong. The message names key, value, bound and source."""

    exit_code = 2


REASONS = (
    "no_value",
    "no_id",
    "not_json",
    "bad_content_type",
    "bad_shape",
    "bad_dtype",
    "bad_image",
    "bad_time",
    "not_finite",
    "unknown_class",
    "no_class",
    "too_large",
    "not_avro",
    "not_protobuf",
    "unknown_schema",
)
"""Why a record can be bad. The set is closed: each is a Prometheus label value."""


class RecordError(StreamlearnError):
    """One record is bad. `reason` is one of `REASONS`; the message says what was expected and what was found."""

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS, reason
        super().__init__(message)
        self.reason = reason


class SkippedError(RecordError):
    """A record that is valid and has nothing to learn: the tombstone of a compacted topic, or a deleted row."""

    def __init__(self, message: str) -> None:
        super().__init__("no_value", message)


class RegistryUnavailableError(StreamlearnError):
    """The schema registry did not answer, or not with a schema. A retry may succeed; no record is at fault."""


class LogError(StreamlearnError):
    """The log refuses permanently: a retry fails too."""


class LogUnavailableError(LogError):
    """The log is away: nothing was acknowledged, and a retry may succeed."""


class WriterFencedError(LogError):
    """Another process has opened a writer of the same name. Nothing of this transaction is in the log."""


class RecordsUnreadableError(LogError):
    """The log holds records that cannot be decoded. The log, or the producer that wrote them, must be fixed."""


class OffsetOutOfRangeError(LogError):
    """The offset was trimmed by retention, or was never written."""


class StateError(StreamlearnError):
    """Saved state cannot be trusted or written."""

    exit_code = 3


class CheckpointError(StateError):
    """A checkpoint is incomplete, corrupt, or of another model."""


class CheckpointFormatError(StateError):
    """A checkpoint is intact, but of a format that this version does not read."""


class StoreError(StateError):
    """The sample store is behind the checkpoint, corrupt, or full."""


class StateLockedError(StateError):
    """Another learner owns this state folder."""


class NotPublishedError(StreamlearnError):
    """No teacher is published yet."""
