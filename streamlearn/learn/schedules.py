"""What changes with the step t, counted from 1: each curve one function, none of them with an end.

A stream has no last step, so nothing here is annealed.
"""

from __future__ import annotations

import math


def consistency_weight(step: int, *, peak: float, rampup_steps: int) -> float:
    """w(t) = peak * exp(-5 (1 - t/T)^2) while t < T, then `peak` (Laine and Aila, 2017)."""
    if step >= rampup_steps:
        return peak
    return peak * math.exp(-5.0 * (1.0 - step / rampup_steps) ** 2)


def label_fading(labels: int, *, fade_labels: int) -> float:
    """min(1, n/labels): unlabelled rows weigh as n labels do, however many there are; 1 always where n is 0.

    A cost of N labels is a mean, so each weighs 1/N in it, and consistency of a fixed weight as many labels as came.
    """
    return fade_labels / labels if 0 < fade_labels < labels else 1.0


def ema_decay(step: int, *, alpha: float, share: float = 1.0) -> float:
    """min(1 - c/(t+c), alpha) with c = 1/share: until the window is full, the horizon is that share of all steps.

    With a share of 1 this is Mean Teacher's plain mean of all students so far, which lags behind one that learns fast.
    Smaller shares are polynomial-decay averaging (Shamir and Zhang, 2013) with eta = c - 1.
    """
    c = 1.0 / share
    return min(1.0 - c / (step + c), alpha)


def buffer_decay(step: int, *, alpha: float, share: float = 1.0) -> float:
    """min(1 - c/(t+c-1), alpha): as `ema_decay`, but without the student's first buffers.

    Before the first step they are zeros and ones that describe no data, while its first weights are a network.
    """
    c = 1.0 / share
    return min(1.0 - c / (step + c - 1.0), alpha)


def learning_rate(step: int, *, peak: float, warmup_steps: int) -> float:
    """Linear from peak/T to `peak` at t = T, then constant (the warm-up of Goyal et al., 2017)."""
    return peak if step >= warmup_steps else peak * step / warmup_steps
