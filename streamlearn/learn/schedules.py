"""Schedules: functions of the step t, counted from 1, or of the number of labels. None ends, as a stream does not."""

from __future__ import annotations

import math


def consistency_weight(step: int, *, peak: float, rampup_steps: int) -> float:
    """w(t) = peak * exp(-5 (1 - t/T)^2) while t < T, then `peak` (Laine and Aila, 2017)."""
    if step >= rampup_steps:
        return peak
    return peak * math.exp(-5.0 * (1.0 - step / rampup_steps) ** 2)


def label_fading(labels: int, *, fade_labels: int) -> float:
    """min(1, n/labels): unlabelled rows weigh as much as n labels. Always 1 if n is 0.

    A cost over N labels is a mean, so each label weighs 1/N, while consistency of a fixed weight would weigh as all N.
    """
    return fade_labels / labels if 0 < fade_labels < labels else 1.0


def ema_decay(step: int, *, alpha: float, share: float = 1.0) -> float:
    """min(1 - c/(t+c), alpha) with c = 1/share: until alpha's horizon is reached, the horizon is `share` of all steps.

    A share of 1 is Mean Teacher's plain mean of all students so far, which lags behind one that learns fast. Smaller
    shares are polynomial-decay averaging (Shamir and Zhang, 2013) with eta = c - 1.
    """
    c = 1.0 / share
    return min(1.0 - c / (step + c), alpha)


def buffer_decay(step: int, *, alpha: float, share: float = 1.0) -> float:
    """min(1 - c/(t+c-1), alpha): as `ema_decay`, without the student's initial buffers.

    Initial weights are a network; initial buffers are zeros and ones that describe no data.
    """
    c = 1.0 / share
    return min(1.0 - c / (step + c - 1.0), alpha)
