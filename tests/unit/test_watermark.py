"""The watermark: what moves it, what must be confirmed, and that it is saved."""

from __future__ import annotations

import json

import numpy as np
import pytest

from streamlearn.loop.watermark import CONFIRMING_SAMPLES, JUMP_S, Watermark
from streamlearn.records import Item, Label, Position, Sample

X = np.zeros(1, np.float32)
YEAR_S = 365 * 86_400.0


def samples(*times_s: float) -> list[Item]:
    return [Sample(Position("samples", 0, n), time_s, f"id-{n}", X) for n, time_s in enumerate(times_s)]


def labels(*times_s: float) -> list[Item]:
    return [Label(Position("labels", 0, n), time_s, f"id-{n}", 0) for n, time_s in enumerate(times_s)]


def after(*steps: list[Item]) -> Watermark:
    watermark = Watermark()
    for items in steps:
        watermark.advance(items)
    return watermark


class TestAdvance:
    def test_is_the_median_of_a_step(self):
        """One clock that is ahead, and one that is behind, change nothing."""
        assert after(samples(100.0, 101.0, YEAR_S)).time_s == 101.0

    def test_never_decreases(self):
        """Old records do not move it back."""
        assert after(samples(100.0), samples(50.0)).time_s == 100.0

    def test_a_step_without_records_changes_nothing(self):
        """Further steps have none."""
        assert after(samples(100.0), []).time_s == 100.0

    def test_the_first_step_is_believed(self):
        """There is nothing to compare it with."""
        assert after(samples(YEAR_S)).time_s == YEAR_S

    def test_a_day_is_no_jump(self):
        """Up to `JUMP_S` one sample is enough."""
        assert after(samples(100.0), samples(100.0 + JUMP_S)).time_s == 100.0 + JUMP_S


class TestJump:
    FAR = 100.0 + YEAR_S

    def test_needs_two_consecutive_steps(self):
        """Eight samples of one step are not enough; a second step with one more confirms."""
        many = samples(*[self.FAR] * CONFIRMING_SAMPLES)

        assert after(samples(100.0), many).time_s == 100.0
        assert after(samples(100.0), many, samples(self.FAR)).time_s == self.FAR

    def test_needs_eight_samples(self):
        """Seven steps of one sample each are not enough, the eighth is."""
        steps = [samples(self.FAR)] * (CONFIRMING_SAMPLES - 1)

        assert after(samples(100.0), *steps).time_s == 100.0
        assert after(samples(100.0), *steps, samples(self.FAR)).time_s == self.FAR

    def test_a_step_of_the_present_resets_the_count(self):
        """The steps must be consecutive."""
        many = samples(*[self.FAR] * CONFIRMING_SAMPLES)

        assert after(samples(100.0), many, samples(101.0), many).time_s == 101.0

    def test_labels_do_not_confirm(self):
        """One labeller may send hundreds at once."""
        many = labels(*[self.FAR] * 100)

        assert after(samples(100.0), many, many, many).time_s == 100.0

    def test_goes_to_the_earlier_of_the_last_two_times(self):
        """Two wrong clocks do not move it further than the nearer one."""
        many = samples(*[self.FAR] * CONFIRMING_SAMPLES)

        assert after(samples(100.0), many, samples(self.FAR + YEAR_S)).time_s == self.FAR


class TestSaving:
    @pytest.mark.parametrize("at", range(4))
    def test_continues_after_load_as_if_never_stopped(self, at):
        """Saved before any of four steps, in the middle of a jump too."""
        steps = [samples(100.0), *[samples(*[100.0 + YEAR_S] * 4)] * 2, samples(100.0 + YEAR_S)]
        saved = after(*steps[:at]).as_json()

        loaded = Watermark()
        loaded.load(json.loads(json.dumps(saved)))
        for items in steps[at:]:
            loaded.advance(items)

        assert loaded.as_json() == after(*steps).as_json()

    def test_a_checkpoint_without_a_jump_loads(self):
        """The first version did not save one."""
        loaded = Watermark()

        loaded.load({"stream_time_s": 5.0})

        assert loaded.time_s == 5.0
