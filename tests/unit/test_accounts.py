"""What became of every record that was read (I7)."""

from __future__ import annotations

import pytest

from streamlearn.loop.accounts import Accounts

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


def test_new_accounts_are_empty_and_add_up() -> None:
    """Nothing was read, nothing is missing."""
    accounts = Accounts()

    accounts.check()

    assert set(accounts.as_dict().values()) == {0}


def test_accounts_come_back_whole_from_a_checkpoint() -> None:
    """Every total is saved, and restored under its own name."""
    accounts = Accounts(**SOUND)

    assert accounts.as_dict() == SOUND
    assert Accounts(**accounts.as_dict()) == accounts
    accounts.check()


@pytest.mark.parametrize(
    "outcome", ["samples_learned", "samples_thinned", "samples_duplicate_id", "samples_dead_lettered"]
)
def test_a_sample_in_no_class_is_a_bug(outcome: str) -> None:
    """Read = learned + thinned + duplicate id + dead-lettered, and each of the four counts."""
    with pytest.raises(AssertionError, match="samples do not add up"):
        Accounts(**SOUND | {outcome: SOUND[outcome] - 1}).check()


@pytest.mark.parametrize("outcome", ["labels_taken", "labels_dead_lettered"])
def test_a_label_in_no_class_is_a_bug(outcome: str) -> None:
    """Read = taken by the ledger + dead-lettered."""
    with pytest.raises(AssertionError, match="labels do not add up"):
        Accounts(**SOUND | {outcome: SOUND[outcome] + 1}).check()


def test_records_trimmed_unread_stand_beside_the_identities() -> None:
    """They were never read, so no class of what was read holds them."""
    Accounts(**SOUND | {"samples_trimmed": 1_000, "labels_trimmed": 0, "labels_inline": 9}).check()
