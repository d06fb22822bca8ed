"""The plan of faults: deterministic by seed, with every kind of fault and every kill point."""

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
    """Another seed gives other faults."""
    assert faults(1, 50) == faults(1, 50)
    assert faults(1, 50) != faults(2, 50)


def test_every_kill_point_occurs_before_any_occurs_twice() -> None:
    """They come in shuffled rounds."""
    points = [fault.point for fault in faults(1, 200) if fault.how == "point"][: len(POINTS)]

    assert sorted(points) == sorted(POINTS)


def test_only_a_dead_learner_is_damaged() -> None:
    """Files that change under a live process are not covered."""
    damaged = [fault for fault in faults(1, 1000) if fault.damage]

    assert {fault.damage for fault in damaged} == {*KINDS, TRIM}
    assert all(fault.victim == "learner" and fault.how in ("kill", "point") for fault in damaged)


def test_a_broker_is_killed_only_if_there_is_one() -> None:
    """An embedded log has none."""
    assert not any(fault.victim == "broker" for fault in faults(1, 300))
    assert any(fault.victim == "broker" for fault in faults(1, 300, broker=True))


def test_the_log_of_a_broker_is_not_trimmed() -> None:
    """The harness cannot know which records a broker trims."""
    assert any(fault.damage == TRIM for fault in faults(1, 300))
    assert not any(fault.damage == TRIM for fault in faults(1, 1000, broker=True))


def test_a_disk_is_filled_only_if_there_is_a_small_one() -> None:
    """Never the disk of the machine that runs the tests."""
    assert not any(fault.victim == "disk" for fault in faults(1, 300))
    assert any(fault.victim == "disk" for fault in faults(1, 300, disk=True))


def test_bursts_kill_every_command_in_every_phase() -> None:
    """With and without checkpoints by steps; the first two deaths of learners are fixed (see `draw_bursts`)."""
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
    for learner in bursts[0::3]:
        assert learner.starts[0].point in FLUSHED
        assert learner.starts[1].point in REWOUND
    assert {start.point for start in starts if start.phase == "point"} == {*STARTING, *FLUSHED}
    assert {*STARTING, *FLUSHED} <= set(POINTS)
