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


def ema_decay(step: int, *, alpha: float) -> float:
    """min(1 - 1/(t+1), alpha): a plain mean of all students so far until the window is full."""
    return min(1.0 - 1.0 / (step + 1), alpha)


def buffer_decay(step: int, *, alpha: float) -> float:
    """min(1 - 1/t, alpha): as `ema_decay`, but without the student's first buffers.

    Before the first step they are zeros and ones that describe no data, while its first weights are a network.
    """
    return min(1.0 - 1.0 / step, alpha)


def learning_rate(step: int, *, peak: float, warmup_steps: int) -> float:
    """Linear from peak/T to `peak` at t = T, then constant (the warm-up of Goyal et al., 2017)."""
    return peak if step >= warmup_steps else peak * step / warmup_steps
