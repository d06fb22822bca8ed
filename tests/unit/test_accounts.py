"""The outcome of every record that was read (I7)."""

from __future__ import annotations

import numpy as np
import pytest

from streamlearn.errors import RecordError
from streamlearn.loop.accounts import Accounts, accounts_of
from streamlearn.records import BadRecord, Gap, Label, Position, Record, Sample

SOUND = {
    "samples_read": 12,
    "samples_learned": 6,
    "samples_thinned": 2,
    "samples_duplicate_id": 3,
    "samples_dead_lettered": 1,
    "labels_read": 5,
    "labels_taken": 4,
    "labels_dead_lettered": 1,
    "labels_inline": 2,
    "samples_trimmed": 7,
    "labels_trimmed": 8,
}


def test_new_accounts_are_zero_and_add_up() -> None:
    """Nothing was read."""
    accounts = Accounts()

    accounts.check()

    assert set(accounts.as_dict().values()) == {0}


def test_a_step_adds_each_record_to_one_outcome() -> None:
    """Bad records and gaps by their topic."""
    bad = [BadRecord(Record(Position(topic, 0, 1), 0, b"k", b"v"), RecordError("not_json", "")) for topic in ("s", "l")]
    gaps = [Gap(Position("s", 0, 9), missing=7), Gap(Position("l", 0, 9), missing=8)]
    samples = [Sample(Position("s", 0, n), 1.0, str(n), np.zeros(1), label=0 if n < 2 else None) for n in range(11)]
    labels = [Label(Position("l", 0, n), 1.0, str(n), 0) for n in range(4)]
    step = accounts_of([*bad, *gaps, *samples, *labels], "s", learned=6, thinned=2, duplicate_ids=3)
    accounts = Accounts()

    accounts.add(step)

    assert accounts.as_dict() == SOUND
    accounts.add(step)
    assert accounts.as_dict() == {name: 2 * count for name, count in SOUND.items()}
    accounts.check()


def test_accounts_are_restored_from_a_checkpoint() -> None:
    """Every total is saved under its own name."""
    accounts = Accounts(**SOUND)

    assert accounts.as_dict() == SOUND
    assert Accounts(**accounts.as_dict()) == accounts
    accounts.check()


@pytest.mark.parametrize(
    "outcome", ["samples_learned", "samples_thinned", "samples_duplicate_id", "samples_dead_lettered"]
)
def test_a_sample_without_an_outcome_is_a_bug(outcome: str) -> None:
    """Read = learned + shed + duplicate id + dead-lettered."""
    with pytest.raises(AssertionError, match="samples do not add up"):
        Accounts(**SOUND | {outcome: SOUND[outcome] - 1}).check()


@pytest.mark.parametrize("outcome", ["labels_taken", "labels_dead_lettered"])
def test_a_label_without_an_outcome_is_a_bug(outcome: str) -> None:
    """Read = taken by the ledger + dead-lettered."""
    with pytest.raises(AssertionError, match="labels do not add up"):
        Accounts(**SOUND | {outcome: SOUND[outcome] + 1}).check()


def test_trimmed_records_are_not_part_of_the_identities() -> None:
    """They were never read."""
    Accounts(**SOUND | {"samples_trimmed": 1_000, "labels_trimmed": 0, "labels_inline": 9}).check()
