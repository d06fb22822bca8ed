"""Schedules against values worked by hand."""

from __future__ import annotations

import math

import pytest

from streamlearn.learn.schedules import (
    buffer_decay,
    consistency_weight,
    ema_decay,
    label_fading,
)


@pytest.mark.parametrize(
    ("step", "weight"),
    [(0, 10 * math.exp(-5)), (25, 0.6005), (50, 2.8650), (75, 7.3162), (99, 9.9950), (100, 10.0), (10**9, 10.0)],
)
def test_consistency_weight_rises_along_the_bell_and_stays(step, weight):
    """Peak 10 and T = 100: the paper's curve, with no ramp-down."""
    assert consistency_weight(step, peak=10.0, rampup_steps=100) == pytest.approx(weight, abs=1e-4)


def test_consistency_weight_without_a_rampup_is_at_its_peak_at_once():
    """T = 0 divides by nothing."""
    assert consistency_weight(0, peak=3.0, rampup_steps=0) == 3.0


@pytest.mark.parametrize(("labels", "share"), [(0, 1.0), (99, 1.0), (100, 1.0), (200, 0.5), (1000, 0.1)])
def test_label_fading_gives_unlabelled_rows_the_weight_of_that_many_labels(labels, share):
    """With 100: the first hundred labels take nothing, then each takes its part."""
    assert label_fading(labels, fade_labels=100) == pytest.approx(share)


def test_label_fading_is_off_at_zero():
    """The default of `fade_labels`."""
    assert label_fading(10**9, fade_labels=0) == 1.0


@pytest.mark.parametrize(
    ("step", "decay"), [(1, 0.5), (2, 2 / 3), (9, 0.9), (198, 1 - 1 / 199), (199, 0.995), (9999, 0.995)]
)
def test_ema_decay_is_a_plain_mean_until_the_window_is_full(step, decay):
    """1 - 1/(t+1), the initial student counted, then alpha."""
    assert ema_decay(step, alpha=0.995) == pytest.approx(decay)


@pytest.mark.parametrize(("step", "decay"), [(1, 0.0), (2, 0.5), (10, 0.9), (200, 0.995), (9999, 0.995)])
def test_buffer_decay_leaves_the_first_buffers_out(step, decay):
    """At t = 1 the teacher takes the student's statistics as they are."""
    assert buffer_decay(step, alpha=0.995) == pytest.approx(decay)


@pytest.mark.parametrize(("step", "decay"), [(1, 1 / 11), (10, 0.5), (990, 0.99), (9999, 0.995)])
def test_ema_horizon_grows_with_a_share_of_the_steps(step, decay):
    """Share .1: t / (t + 10), so that the mean is over a tenth of the steps so far."""
    assert ema_decay(step, alpha=0.995, share=0.1) == pytest.approx(decay)


@pytest.mark.parametrize(("step", "decay"), [(1, 0.0), (2, 1 / 11), (11, 0.5), (9999, 0.995)])
def test_buffers_follow_the_same_horizon_from_the_first_step_on(step, decay):
    """(t-1) / (t+9): Shamir and Zhang's average with eta = 9."""
    assert buffer_decay(step, alpha=0.995, share=0.1) == pytest.approx(decay)
