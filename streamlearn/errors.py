"""Every error this package raises on purpose, as one tree.

StreamlearnError
├── ConfigError              the operator must change a setting; exit 2
├── RecordError              one record is bad; dead-letter it (or answer 422) and go on
├── LogError                 the log cannot do what was asked
│   ├── LogUnavailableError  it is away for now; retry, answer 503
│   └── OffsetOutOfRangeError  the offset was trimmed or never written; follow `log.on_trimmed`
├── StateError               saved state cannot be trusted or written; stop, exit 3
│   ├── CheckpointError
│   ├── CheckpointFormatError  it is whole, and of a format that this version does not read
│   ├── StoreError
│   └── StateLockedError     another learner owns this state folder
└── NotPublishedError        no teacher is published yet; answer 503

Anything outside the tree is a bug in this package and must reach the top.
"""

ANEW = "start from scratch: move everything but log/ out of state.dir; what the log still holds is learned again"
"""The way out if the state cannot be used. An embedded log is in state.dir too, and must stay."""


class StreamlearnError(Exception):
    """Root of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigError(StreamlearnError):
    """A setting is missing or wrong; the message names key, value, bound and source."""

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
)
"""Why a record can be bad: a closed set, since each is a Prometheus label value."""


class RecordError(StreamlearnError):
    """One record is bad. `reason` is one of `REASONS`, the message says what was found and what was wanted."""

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS, reason
        super().__init__(message)
        self.reason = reason


class LogError(StreamlearnError):
    """The log cannot do what was asked."""


class LogUnavailableError(LogError):
    """The log is away for now; nothing was acknowledged."""


class RecordsUnreadableError(LogError):
    """The log has records there that nobody can decode, now or later: it, or who wrote them, is to be mended."""


class OffsetOutOfRangeError(LogError):
    """The offset was trimmed by retention, or was never written."""


class StateError(StreamlearnError):
    """Saved state cannot be trusted or written."""

    exit_code = 3


class CheckpointError(StateError):
    """A checkpoint is torn, corrupt, or of another model."""


class CheckpointFormatError(StateError):
    """A checkpoint is whole, and of a format that this version does not read."""


class StoreError(StateError):
    """The sample store is behind the checkpoint, corrupt, or full."""


class StateLockedError(StateError):
    """Another learner owns this state folder."""


class NotPublishedError(StreamlearnError):
    """No teacher is published yet."""
