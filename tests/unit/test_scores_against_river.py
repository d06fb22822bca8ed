"""Our scores against river's on one sequence of events, for every score that both define.

River's metrics in three forms: plain (cumulative), in `utils.Rolling` (windowed), and with weights that grow by
1 / fading (faded). Run as a program, this file prints the table.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pytest
from river import metrics, utils

from streamlearn.judge.prequential import NETWORKS, Network, Prequential
from streamlearn.judge.scores import LEAST_PROBABILITY

CLASSES, EVENTS, WINDOW, FADING = 5, 3000, 500, 0.995
FORMS = ("windowed", "faded", "cumulative")
OURS = {
    "accuracy": metrics.Accuracy,
    "balanced_accuracy": metrics.BalancedAccuracy,
    "kappa": metrics.CohenKappa,
    "log_loss": metrics.CrossEntropy,
}
TOLERANCE = 1e-9


class Event(NamedTuple):
    """A label and the predictions on its sample's arrival; a baseline has none before the first label."""

    true: int
    probabilities_C: np.ndarray[Any, np.dtype[np.float32]]
    student: int
    majority: int | None
    no_change: int | None

    def answer(self, network: Network) -> int | None:
        """The class that a network predicted."""
        teacher = int(self.probabilities_C.argmax())
        return dict(zip(NETWORKS, (teacher, self.student, self.majority, self.no_change), strict=True))[network]


def events(seed: int = 11) -> list[Event]:
    """Classes in runs, some rare; a teacher with more errors after a drift half way; labels 20 samples late."""
    rng = np.random.default_rng(seed)
    shares_C, received = rng.dirichlet(np.full(CLASSES, 2.0)), np.zeros(CLASSES)
    true, made = 0, list[Event]()
    for n in range(EVENTS):
        true = int(rng.choice(CLASSES, p=shares_C)) if rng.random() < 0.4 else true
        signal = 2.5 if n < EVENTS // 2 else 1.2
        logits_C = rng.normal(size=CLASSES) + signal * np.eye(CLASSES)[true]
        p_C = np.maximum(np.exp(logits_C) / np.exp(logits_C).sum(), 2 * LEAST_PROBABILITY).astype(np.float32)
        student = true if rng.random() < 0.6 else int(rng.integers(CLASSES))
        late = made[n - 20].true if n >= 20 else None
        if late is not None:
            received[late] += 1
        made.append(Event(true, p_C, student, None if late is None else int(received.argmax()), late))
    return made


def judged(sequence: list[Event]) -> dict[str, Any]:
    judge = Prequential(CLASSES, WINDOW, fading=FADING)
    for event in sequence:
        judge.update(
            true_class=event.true,
            teacher_class=int(event.probabilities_C.argmax()),
            student_class=event.student,
            teacher_probabilities_C=event.probabilities_C,
            majority_class=event.majority,
            no_change_class=event.no_change,
        )
    return asdict(judge.report())


def of_river(
    metric: type[Any], form: str, sequence: list[Event], network: Network = "teacher", **settings: Any
) -> float:
    """River's value for one network, on the samples that it answered."""
    judge: Any = utils.Rolling(metric, window_size=WINDOW, **settings) if form == "windowed" else metric(**settings)
    for n, event in enumerate(sequence):
        answer = event.answer(network)
        if answer is None:
            continue
        said = dict(enumerate(event.probabilities_C.tolist())) if metric is metrics.CrossEntropy else answer
        weight = {"w": FADING**-n} if form == "faded" else {}
        judge.update(event.true, said, **weight)
    return float(judge.get())


def rows(sequence: list[Event]) -> Iterator[tuple[str, str, float, float]]:
    """Score, form, our value, river's."""
    report = judged(sequence)
    for form in FORMS:
        for network in NETWORKS:
            ours = report[form]["accuracy"][network]
            yield f"accuracy, {network}", form, ours, of_river(metrics.Accuracy, form, sequence, network)
        for name in ("balanced_accuracy", "kappa", "log_loss"):
            yield f"{name}, teacher", form, report[form][name], of_river(OURS[name], form, sequence)
    for c, recall in enumerate(report["windowed"]["recall"]):
        theirs = of_river(metrics.Recall, "windowed", [binary(event, c) for event in sequence])
        yield f"recall of class {c}, teacher", "windowed", recall, theirs


def binary(event: Event, c: int) -> Event:
    """The event as a binary question: is it of class c?"""
    answered = np.float32(event.probabilities_C.argmax() == c)
    return event._replace(true=int(event.true == c), probabilities_C=np.array([1 - answered, answered]))


@pytest.fixture(scope="module")
def sequence() -> list[Event]:
    return events()


def test_every_score_that_both_define_is_equal(sequence: list[Event]) -> None:
    """To nine digits: the two sum in different orders."""
    found = list(rows(sequence))

    assert len(found) == 26
    for name, form, ours, theirs in found:
        assert ours == pytest.approx(theirs, abs=TOLERANCE), (name, form)


@pytest.mark.parametrize("scored", [1, 2, 19, 20, 21, WINDOW - 1, WINDOW, WINDOW + 1])
def test_scores_are_equal_from_the_first_label_on(sequence: list[Event], scored: int) -> None:
    """While the window fills, and before baselines answer. River gives 0 where our kappa is None."""
    for name, form, ours, theirs in rows(sequence[:scored]):
        assert (0.0 if ours is None else ours) == pytest.approx(theirs, abs=TOLERANCE), (name, form)


def main() -> None:
    write = sys.stdout.write
    write("| score | form | ours | river's | difference |\n|---|---|---|---|---|\n")
    for name, form, ours, theirs in rows(events()):
        write(f"| {name.replace('_', ' ')} | {form} | {ours:.9f} | {theirs:.9f} | {abs(ours - theirs):.0e} |\n")


if __name__ == "__main__":
    main()
