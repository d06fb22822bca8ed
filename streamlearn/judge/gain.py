"""The gain from unlabelled samples: teacher against label-only twin, on the same samples.

Both predict when the label arrives and before it is learned, so the comparison is fair: the twin learns from labels
only, and neither has seen this one. The teacher has already seen the sample without its label; that is the effect to be
measured, and the reason why these accuracies are not prequential. Accuracy as users meet it is that of the first
prediction (Grzenda, Gomes, Bifet 2020; `judge/prequential.py`).

In a simulation the same comparison is made on all samples as they arrive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from streamlearn.judge import scores
from streamlearn.judge.window import Window
from streamlearn.records import Array

_NO_ANSWER = -1
"""In a window: no prediction; 0 is a wrong one and 1 a right one."""


@dataclass(frozen=True, slots=True)
class CumulativeGain:
    """Accuracies over all samples since the start that both networks answered."""

    paired: int
    teacher: float | None
    twin: float | None


@dataclass(frozen=True, slots=True)
class GainReport:
    """Accuracies over the window; None where there was no answer."""

    count: int
    """Labels in the window."""
    teacher: float | None
    paired: int
    """Labels that both answered."""
    twin: float | None
    gain: float | None
    """Teacher minus twin, on the labels that both answered."""
    interval: scores.Interval | None
    """95 % interval of `gain`."""
    cumulative: CumulativeGain


class TwinGain:
    """Accuracy of teacher and twin and their paired difference, over the last `window` labels and since the start."""

    def __init__(self, window: int) -> None:
        self._window = Window(window, dict.fromkeys(("teacher", "twin", "first", "served"), np.int8))
        self._paired = self._teacher_right = self._twin_right = 0

    def __len__(self) -> int:
        return len(self._window)

    def update(
        self,
        true_class: int,
        teacher_class: int,
        twin_class: int | None,
        *,
        first_class: int | None = None,
        served_class: int | None = None,
    ) -> None:
        """Add one label.

        Args:
            true_class: the label.
            teacher_class: the teacher's prediction now.
            twin_class: the twin's prediction now; None without a twin.
            first_class: the prediction when the sample arrived; None where there was none.
            served_class: the prediction now of the served candidate, which may be the twin.
        """
        answers = (teacher_class, twin_class, first_class, served_class)
        teacher, twin, first, served = (_right(answer, true_class) for answer in answers)
        self._window.append(teacher, twin, first, served)
        if twin != _NO_ANSWER:
            self._paired += 1
            self._teacher_right += teacher
            self._twin_right += twin

    def restart(self) -> None:
        """Empty the window, since the teacher has other weights now. Counts since the start stay."""
        self._window.clear()

    def report(self) -> GainReport:
        """The comparison over the window, and since the start."""
        teacher_W, twin_W = self._window.column("teacher"), self._window.column("twin")
        paired, gain, interval = _difference(teacher_W, twin_W)
        return GainReport(
            count=len(self),
            teacher=_accuracy(teacher_W),
            paired=paired,
            twin=_accuracy(twin_W),
            gain=gain,
            interval=interval,
            cumulative=CumulativeGain(
                paired=self._paired,
                teacher=scores.share(self._teacher_right, self._paired),
                twin=scores.share(self._twin_right, self._paired),
            ),
        )

    def first_minus_at_label(self) -> float | None:
        """Accuracy of the first predictions minus that of the served candidate at the label, on the same samples."""
        return _difference(self._window.column("first"), self._window.column("served"))[1]

    def state(self) -> dict[str, Array]:
        """Copies of all state; the window oldest first."""
        counts = np.array([self._paired, self._teacher_right, self._twin_right], np.int64)
        return {**self._window.state(), "counts": counts}

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved; of a longer window the newest rows."""
        self._window.load(state)
        self._paired, self._teacher_right, self._twin_right = state["counts"].tolist()


def _right(answer: int | None, true_class: int) -> int:
    return _NO_ANSWER if answer is None else int(answer == true_class)


def _accuracy(right_W: Array) -> float | None:
    return scores.share(int((right_W == 1).sum()), int((right_W != _NO_ANSWER).sum()))


def _difference(right_W: Array, other_W: Array) -> tuple[int, float | None, scores.Interval | None]:
    """Number of samples that both answered, the difference of their accuracies on these, and its interval."""
    count = int(((right_W != _NO_ANSWER) & (other_W != _NO_ANSWER)).sum())
    first_only = int(((right_W == 1) & (other_W == 0)).sum())
    second_only = int(((right_W == 0) & (other_W == 1)).sum())
    difference = scores.share(first_only - second_only, count)
    return count, difference, scores.paired_difference(first_only, second_only, count)
