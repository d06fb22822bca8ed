"""The outcome of every record that was read (I7)."""

from __future__ import annotations

import numpy as np
import pytest

from streamlearn.errors import RecordError
from streamlearn.loop.accounts import Accounts, accounts_of, accounts_of_predictions
from streamlearn.records import (
    BadRecord,
    Gap,
    Label,
    Position,
    Prediction,
    PublishedAnswer,
    Record,
    Sample,
    Skipped,
)

PREDICTION = Prediction(0, np.ones(1, np.float32), 1)

SOUND = {
    "samples_read": 16,
    "samples_learned": 6,
    "samples_thinned": 2,
    "samples_duplicate_id": 3,
    "samples_dead_lettered": 1,
    "labels_read": 6,
    "labels_taken": 4,
    "labels_dead_lettered": 1,
    "labels_inline": 2,
    "samples_trimmed": 7,
    "labels_trimmed": 8,
    "samples_tombstone": 4,
    "labels_tombstone": 1,
    "predictions_read": 10,
    "predictions_taken": 4,
    "predictions_late": 2,
    "predictions_unknown": 1,
    "predictions_skipped": 3,
    "predictions_trimmed": 5,
}


def test_new_accounts_are_zero_and_add_up() -> None:
    """Nothing was read."""
    accounts = Accounts()

    accounts.check()

    assert set(accounts.as_dict().values()) == {0}


def test_a_step_adds_each_record_to_one_outcome() -> None:
    """Bad records, tombstones and gaps by their topic."""
    bad = [BadRecord(Record(Position(topic, 0, 1), 0, b"k", b"v"), RecordError("not_json", "")) for topic in ("s", "l")]
    gaps = [Gap(Position("s", 0, 9), missing=7), Gap(Position("l", 0, 9), missing=8)]
    skipped = [Skipped(Position(topic, 0, 2), 0.0) for topic in ("s", "s", "t", "t", "l")]
    samples = [Sample(Position("s", 0, n), 1.0, str(n), np.zeros(1), label=0 if n < 2 else None) for n in range(11)]
    labels = [Label(Position("l", 0, n), 1.0, str(n), 0) for n in range(4)]
    step = accounts_of([*bad, *gaps, *skipped, *samples, *labels], ("s", "t"), learned=6, thinned=2, duplicate_ids=3)
    answers = [PublishedAnswer(Position("p", 0, n), 1.0, "1", Position("s", 0, 1), PREDICTION) for n in range(7)]
    others = [*(Skipped(Position("p", 0, 7 + n), 0.0) for n in range(3)), Gap(Position("p", 0, 20), missing=5)]
    step.add(accounts_of_predictions([*answers, *others], {"taken": 4, "late": 2, "unknown": 1}))
    accounts = Accounts()

    accounts.add(step)

    assert accounts.as_dict() == SOUND
    accounts.add(step)
    assert accounts.as_dict() == {name: 2 * count for name, count in SOUND.items()}
    accounts.check()


def test_accounts_are_restored_from_a_checkpoint() -> None:
    """Every total is saved under its own name; one that an older version did not save is 0."""
    accounts = Accounts(**SOUND)

    assert accounts.as_dict() == SOUND
    assert Accounts(**accounts.as_dict()) == accounts
    assert Accounts(samples_read=1, samples_learned=1).samples_tombstone == 0
    accounts.check()


@pytest.mark.parametrize(
    "outcome",
    ["samples_learned", "samples_thinned", "samples_duplicate_id", "samples_dead_lettered", "samples_tombstone"],
)
def test_a_sample_without_an_outcome_is_a_bug(outcome: str) -> None:
    """Read = learned + shed + duplicate id + dead-lettered + tombstones."""
    with pytest.raises(AssertionError, match="samples do not add up"):
        Accounts(**SOUND | {outcome: SOUND[outcome] - 1}).check()


@pytest.mark.parametrize("outcome", ["labels_taken", "labels_dead_lettered", "labels_tombstone"])
def test_a_label_without_an_outcome_is_a_bug(outcome: str) -> None:
    """Read = taken by the ledger + dead-lettered + tombstones."""
    with pytest.raises(AssertionError, match="labels do not add up"):
        Accounts(**SOUND | {outcome: SOUND[outcome] + 1}).check()


@pytest.mark.parametrize("outcome", ["taken", "late", "unknown", "skipped"])
def test_a_published_answer_without_an_outcome_is_a_bug(outcome: str) -> None:
    """Read = taken by the ledger + late + of no known sample + unreadable."""
    with pytest.raises(AssertionError, match="predictions do not add up"):
        Accounts(**SOUND | {(name := f"predictions_{outcome}"): SOUND[name] - 1}).check()


def test_trimmed_records_are_not_part_of_the_identities() -> None:
    """They were never read."""
    Accounts(**SOUND | {"samples_trimmed": 1_000, "labels_trimmed": 0, "labels_inline": 9}).check()
