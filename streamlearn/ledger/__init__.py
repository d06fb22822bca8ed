"""Labels with a life: what was seen (`store`), what became of each label (`ledger`), what is learned again (`memory`).

Here stands the vocabulary of the three. What is made for each label is a named tuple: a frozen dataclass sets its
fields one by one through `object.__setattr__`, and with those a join took a twentieth longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from streamlearn.records import Example, Position, Prediction


class LabelState(StrEnum):
    """How far a label has come, or what was wrong with it."""

    UNLABELLED = "unlabelled"
    """The sample is known and has no label."""
    WAITING = "waiting"
    """For its sample."""
    JOINED = "joined"
    SCORED = "scored"
    TRAINED = "trained"
    DUPLICATE = "duplicate"
    """The same class again, in another record."""
    CORRECTED = "corrected"
    """Another class than before."""
    EXPIRED = "expired"
    """The sample is known, its payload is nowhere any more."""
    ORPHAN = "orphan"
    """Its sample did not come within the horizon."""
    HELD = "held"
    """It names a class that the schema does not have."""
    RETRACTED = "retracted"
    """Withdrawn by a record without a class: the sample has no label."""
    ERASED = "erased"
    """The sample was erased on request: it has no payload, and labels of it are not learned."""


class Scored(NamedTuple):
    """The class that counted when a sample got its first label in time, and what was said about the sample before."""

    prediction: Prediction
    student_class: int
    class_index: int
    delay_s: float
    """From the sample to its label, by the log's clock."""
    majority_class: int | None
    """What the baselines would have said of the sample when it came, from the labels received until then."""
    no_change_class: int | None


class Arrival(NamedTuple):
    """What one label record did."""

    state: LabelState
    sample_id: str
    class_index: int
    """The class that counts now; UNLABELLED where the record is held, RETRACTED or ERASED where no class counts."""
    example: Example | None = None
    """To be learned. Its `x` is read-only."""
    scored: Scored | None = None
    correction: bool = False
    """The class that counts has changed: the memory must change too, even where no payload is left for an example."""
    labelled_at_s: float | None = None
    """When the label that counts was given, where another record counts than before: what the memory sorts by."""
    implied: bool = False
    """Not a record's doing: the time for a label has passed (`Ledger.implied`)."""


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """Label records by what became of them, since the beginning; and what is kept now.

    A record that arrives late between others changes what those are, so `duplicate` and `corrected` may also fall.
    """

    read: int = 0
    joined: int = 0
    scored: int = 0
    trained: int = 0
    duplicate: int = 0
    corrected: int = 0
    expired: int = 0
    orphan: int = 0
    waiting: int = 0
    """Now."""
    implied: int = 0
    """Samples that have the implied class, and no record that says so."""
    held: int = 0
    """Now, for a class that is not known."""
    held_dropped: int = 0
    """Were held too long, or were too many."""
    retracted: int = 0
    """Records that withdraw labels."""
    erased: int = 0
    """Records that erase samples."""
    samples_read: int = 0
    samples: int = 0
    """Known now."""
    payload_bytes: int = 0
    """Kept now."""


@dataclass(frozen=True, slots=True)
class LabelStatus:
    """All that is known of one sample's label, for whoever asks."""

    state: LabelState
    class_index: int | None = None
    label_position: Position | None = None
    """Of the label that counts."""
    label_time_s: float | None = None
    corrected: bool = False
    """Not all that was said of this sample is the same class."""
    scored: bool = False
    first_trained_step: int | None = None
    """The step that first learned the class that counts: a teacher of this version or later knows it."""
    sample_position: Position | None = None
    sample_time_s: float | None = None
    predicted_class: int | None = None
    model_version: int | None = None
    implied: bool = False
    """No record said the class: the time for one has passed."""
    class_name: str | None = None
    """Of a held label: the class that is not known."""
