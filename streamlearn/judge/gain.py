"""Does it pay to learn from unlabelled samples? Teacher against label-only twin, on the same samples.

The same comparison serves the oracle of a simulation, which has both answers to every sample as it arrives. Elsewhere
both answer when the label comes and before it is learned, so the comparison is fair: the twin learns only what labels
say, and neither has seen this one. The teacher has met the sample itself, unlabelled, when it came. That is the very
thing that is judged here, and it is why these numbers are not prequential: accuracy as users meet it is that of the
first prediction (Grzenda, Gomes, Bifet 2020), and stands in `judge/prequential.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from streamlearn.judge import scores
from streamlearn.judge.window import Window
from streamlearn.records import Array

_NO_ANSWER = -1
"""Of a network that did not answer; 0 is wrong and 1 is right."""


class TwinGain:
    """Accuracy over the last `window` labels, teacher, twin, and their paired difference; both since the beginning."""

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
        """One label that came.

        Args:
            true_class: what the label says.
            teacher_class: the teacher's answer now.
            twin_class: the twin's answer now; None while there is no twin.
            first_class: what was answered when the sample came; None where nothing was.
            served_class: the answer now of the candidate that is served, which may be another than the teacher.
        """
        answers = (teacher_class, twin_class, first_class, served_class)
        teacher, twin, first, served = (_right(answer, true_class) for answer in answers)
        self._window.append(teacher, twin, first, served)
        if twin != _NO_ANSWER:
            self._paired += 1
            self._teacher_right += teacher
            self._twin_right += twin

    def restart(self) -> None:
        """Forget the window: what came before a change of the teacher says nothing about the teacher now.

        What is counted since the beginning stays.
        """
        self._window.clear()

    def report(self) -> dict[str, Any]:
        """Ready for JSON; None where there was no answer.

        `gain` is teacher minus twin on the samples that both answered (`paired` of them), `interval` its 95 %
        interval; `first_minus_at_label` is the first prediction minus the served candidate's answer at the label.
        `cumulative` has the accuracies of both on all samples that both answered since the beginning.
        """
        right = self._window.state()
        teacher_W, twin_W = right["teacher"], right["twin"]
        paired, gain, interval = _difference(teacher_W, twin_W)
        _, first_minus_at_label, _ = _difference(right["first"], right["served"])
        return {
            "count": len(self),
            "teacher": _accuracy(teacher_W),
            "paired": paired,
            "twin": _accuracy(twin_W),
            "gain": gain,
            "interval": interval,
            "first_minus_at_label": first_minus_at_label,
            "cumulative": {
                "paired": self._paired,
                "teacher": scores.share(self._teacher_right, self._paired),
                "twin": scores.share(self._twin_right, self._paired),
            },
        }

    def state(self) -> dict[str, Array]:
        """All of it, as copies; the window oldest first."""
        counts = np.array([self._paired, self._teacher_right, self._twin_right], np.int64)
        return {**self._window.state(), "counts": counts}

    def load(self, state: Mapping[str, Array]) -> None:
        """Become what `state` saved; of a longer window the newest stay."""
        self._window.load(state)
        self._paired, self._teacher_right, self._twin_right = state["counts"].tolist()


def _right(answer: int | None, true_class: int) -> int:
    return _NO_ANSWER if answer is None else int(answer == true_class)


def _accuracy(right_W: Array) -> float | None:
    return scores.share(int((right_W == 1).sum()), int((right_W != _NO_ANSWER).sum()))


def _difference(right_W: Array, other_W: Array) -> tuple[int, float | None, scores.Interval | None]:
    """How many samples both answered, the difference of their accuracies on these, and its interval."""
    count = int(((right_W != _NO_ANSWER) & (other_W != _NO_ANSWER)).sum())
    first_only = int(((right_W == 1) & (other_W == 0)).sum())
    second_only = int(((right_W == 0) & (other_W == 1)).sum())
    difference = scores.share(first_only - second_only, count)
    return count, difference, scores.paired_difference(first_only, second_only, count)
