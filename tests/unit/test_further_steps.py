"""Steps without records after a micro-batch."""

from __future__ import annotations

from streamlearn.loop.further_steps import FurtherSteps


def test_a_micro_batch_is_followed_by_its_own_steps_and_then_by_idle_ones():
    """Two of its own, then one idle, then none."""
    further = FurtherSteps(per_batch=2, idle=1)
    further.step_done(with_records=True)

    left = []
    while further:
        left.append((further.of_batch, further.idle))
        further.step_done(with_records=False)

    assert left == [(2, 1), (1, 1), (0, 1)]


def test_a_step_with_records_starts_over():
    """The next micro-batch has its own."""
    further = FurtherSteps(per_batch=2, idle=1)
    further.step_done(with_records=True)
    further.step_done(with_records=False)

    further.step_done(with_records=True)

    assert (further.of_batch, further.idle) == (2, 1)


def test_there_are_none_before_the_first_micro_batch():
    """Nothing is known yet."""
    further = FurtherSteps(per_batch=2, idle=1)

    further.step_done(with_records=False)

    assert not further


def test_is_loaded_as_it_was_saved_until_the_settings_apply():
    """A replay needs what the checkpoint had; afterwards lower settings hold."""
    saved = FurtherSteps(per_batch=7, idle=9)
    saved.step_done(with_records=True)
    loaded = FurtherSteps(per_batch=3, idle=2)

    loaded.load(saved.as_json())
    assert (loaded.of_batch, loaded.idle) == (7, 9)

    loaded.apply_settings()
    assert (loaded.of_batch, loaded.idle) == (3, 2)


def test_an_old_checkpoint_has_none():
    """The first version did not save them."""
    loaded = FurtherSteps(per_batch=3, idle=2)

    loaded.load({})

    assert not loaded
