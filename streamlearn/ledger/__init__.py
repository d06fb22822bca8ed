"""Labels and their samples: the ledger, the replay buffer and the active-learning queue.

Here are the types that the other folders see. What is made for each label is a NamedTuple: with frozen dataclasses, a
join took a twentieth longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, TypeAlias

from streamlearn.records import Example, Position, Prediction

PublishedOutcome: TypeAlias = Literal["taken", "late", "unknown"]
"""What becomes of a published answer. taken: it is scored once a label comes. late: its sample is scored, or erased, or
has an answer. unknown: no such sample is known, or it has expired."""


class LabelState(StrEnum):
    """The state of a label; docs/label-states.md has the transitions."""

    UNLABELLED = "unlabelled"
    """The sample is known and has no label."""
    WAITING = "waiting"
    """The sample has not come."""
    JOINED = "joined"
    SCORED = "scored"
    TRAINED = "trained"
    DUPLICATE = "duplicate"
    """Another record of the same class."""
    CORRECTED = "corrected"
    """Another record of another class."""
    EXPIRED = "expired"
    """The sample is known, but neither store nor log holds its payload."""
    ORPHAN = "orphan"
    """The sample did not come within the horizon."""
    HELD = "held"
    """The schema does not have the class."""
    RETRACTED = "retracted"
    """A record without a class has withdrawn the label."""
    ERASED = "erased"
    """The sample was erased on request: its payload is gone, and its labels are not learned."""


class Scored(NamedTuple):
    """A prediction and the label it is compared with. Each sample is scored once, by its first label in time."""

    prediction: Prediction
    """The published answer, if it came before the label; else `at_arrival`."""
    student_class: int
    class_index: int
    delay_s: float
    """From the sample to its label, in log time."""
    majority_class: int | None
    """The prediction of this baseline when the sample arrived; None before the first label."""
    no_change_class: int | None
    at_arrival: Prediction
    """The learner's own prediction, or the answer that a client got with the sample; UNLABELLED if there was none."""


class Arrival(NamedTuple):
    """What one label record did."""

    state: LabelState
    sample_id: str
    class_index: int
    """The class that counts now; RETRACTED or ERASED if none does, UNLABELLED if the record is held."""
    example: Example | None = None
    """To learn. Its `x` is read-only."""
    scored: Scored | None = None
    correction: bool = False
    """The class that counts has changed. The replay buffer must follow, even if there is no payload for an example."""
    labelled_at_s: float | None = None
    """Log time of the record that counts, if it is another record than before. The replay buffer sorts by it."""
    implied: bool = False
    """There is no record: the class is implied (`Ledger.implied`)."""


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """Label records by disposition, in total, and present sizes.

    `duplicate` and `corrected` can fall: a record that lands between two others changes what the later one is.
    """

    read: int = 0
    joined: int = 0
    scored: int = 0
    scored_published: int = 0
    """Of `scored`: by the answer in the predictions topic."""
    trained: int = 0
    duplicate: int = 0
    corrected: int = 0
    expired: int = 0
    orphan: int = 0
    waiting: int = 0
    """Present."""
    implied: int = 0
    """Samples that have the implied class, without a record. Present."""
    held: int = 0
    """Present."""
    held_dropped: int = 0
    """Held for too long, or too many."""
    retracted: int = 0
    """Records that withdraw labels."""
    erased: int = 0
    """Records that erase samples."""
    samples_read: int = 0
    samples: int = 0
    """Present."""
    payload_bytes: int = 0
    """In the store at present."""


@dataclass(frozen=True, slots=True)
class LabelStatus:
    """What is known about the label of one sample."""

    state: LabelState
    class_index: int | None = None
    label_position: Position | None = None
    """Of the record that counts."""
    label_time_s: float | None = None
    corrected: bool = False
    """The records of this sample are not all of one class."""
    scored: bool = False
    first_trained_step: int | None = None
    """The step that first learned the class that counts. A teacher of this version or later has learned it."""
    sample_position: Position | None = None
    sample_time_s: float | None = None
    predicted_class: int | None = None
    model_version: int | None = None
    implied: bool = False
    """There is no record: the class is implied."""
    class_name: str | None = None
    """The unknown class of a held label."""
