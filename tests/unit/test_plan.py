"""Which faults come: the same for a seed, of every kind, at every place."""

from __future__ import annotations

from itertools import islice

from harness.damage import KINDS
from harness.plan import (
    BURST,
    FLUSHED,
    REWOUND,
    SAVE_OFTEN_S,
    SAVE_SELDOM_S,
    STARTING,
    TRIM,
    Fault,
    draw_bursts,
    draw_faults,
)

from streamlearn.state.kill_points import POINTS


def faults(seed: int, count: int, *, broker: bool = False, disk: bool = False) -> list[Fault]:
    return list(islice(draw_faults(seed, broker=broker, disk=disk), count))


def test_a_seed_gives_the_same_faults() -> None:
    """And another one gives others."""
    assert faults(1, 50) == faults(1, 50)
    assert faults(1, 50) != faults(2, 50)


def test_every_place_is_met_before_any_is_met_twice() -> None:
    """A shuffled round."""
    points = [fault.point for fault in faults(1, 200) if fault.how == "point"][: len(POINTS)]

    assert sorted(points) == sorted(POINTS)


def test_only_a_dead_learner_is_damaged() -> None:
    """A file that changes under a live process is another promise."""
    damaged = [fault for fault in faults(1, 1000) if fault.damage]

    assert {fault.damage for fault in damaged} == {*KINDS, TRIM}
    assert all(fault.victim == "learner" and fault.how in ("kill", "point") for fault in damaged)


def test_a_broker_is_struck_only_where_there_is_one() -> None:
    """An embedded log has none."""
    assert not any(fault.victim == "broker" for fault in faults(1, 300))
    assert any(fault.victim == "broker" for fault in faults(1, 300, broker=True))


def test_the_log_of_a_broker_is_not_trimmed() -> None:
    """Nobody but the broker can say what was in it."""
    assert any(fault.damage == TRIM for fault in faults(1, 300))
    assert not any(fault.damage == TRIM for fault in faults(1, 1000, broker=True))


def test_a_disk_is_filled_only_where_there_is_a_small_one() -> None:
    """Not that of whoever runs the tests."""
    assert not any(fault.victim == "disk" for fault in faults(1, 300))
    assert any(fault.victim == "disk" for fault in faults(1, 300, disk=True))


def test_bursts_kill_every_command_in_every_phase() -> None:
    """Before the first checkpoint, and after it."""
    bursts = list(islice(draw_bursts(1), 60))
    starts = [start for burst in bursts for start in burst.starts]

    assert bursts[:10] == list(islice(draw_bursts(1), 10))
    assert bursts[:10] != list(islice(draw_bursts(2), 10))
    assert all(len(burst.starts) == BURST for burst in bursts)
    assert {burst.checkpoint_every_s for burst in bursts[0::6]} == {SAVE_SELDOM_S}
    assert {burst.checkpoint_every_s for burst in bursts[3::6]} == {SAVE_OFTEN_S}
    killed = {(start.command, start.phase) for burst in bursts[:6] for start in burst.starts}  # by `make soak`
    assert killed == {(each, phase) for each in ("learn", "run", "serve") for phase in ("import", "steps")} | {
        ("learn", "point")
    }
    for learner in bursts[0::3]:  # see draw_bursts
        assert learner.starts[0].point in FLUSHED
        assert learner.starts[1].point in REWOUND
    assert {start.point for start in starts if start.phase == "point"} == {*STARTING, *FLUSHED}
    assert {*STARTING, *FLUSHED} <= set(POINTS)
