"""Predict each sample before it is learned, and score the prediction when its label arrives (D10)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from streamlearn.judge.election import Election
from streamlearn.judge.prequential import Prequential
from streamlearn.judge.scoreboard import Scoreboard
from streamlearn.learn.learner import Learner
from streamlearn.ledger import Arrival, Scored
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.request_writer import RequestWriter
from streamlearn.loop.guarding import Guarding
from streamlearn.models.answer import Thresholds, corrected
from streamlearn.records import UNLABELLED, Item, Prediction, PublishedAnswer, Sample

Answers = dict[str, tuple[Prediction, int]]
"""By sample id: the prediction to be scored, and the student's class."""
Baselines = tuple[int | None, int | None]
"""What the majority and the no-change baseline answer."""


class Scoring:
    """Feeds scoreboard, guard, election and label requests. Letters: B rows, C classes, K candidates."""

    def __init__(
        self,
        learner: Learner,
        ledger: Ledger,
        board: Scoreboard,
        *,
        guarding: Guarding,
        election: Election,
        requests: RequestWriter,
        thresholds: Thresholds,
        classes: int,
        twin_on_arrival: bool = False,
    ) -> None:
        """`classes` counts outputs, spare ones included. `twin_on_arrival`: in a simulation the twin answers too."""
        self._learner, self._ledger, self._board = learner, ledger, board
        self._guarding, self._election, self._requests = guarding, election, requests
        self._thresholds, self._twin_on_arrival = thresholds, twin_on_arrival
        self._no_answer = Prediction(UNLABELLED, np.zeros(classes, np.float32), 0)
        self._named = 0

    def predict(self, fresh: Sequence[Sample], now_s: float) -> Answers:
        """Answer samples as a server would. Where a client was given an answer, that answer is scored instead.

        A published answer is scored instead of both: `take_published`.

        An answer is corrected for the class prior, and its class is chosen by thresholds. Networks are compared with
        each other, and watched by guard, drift monitor and label requests, without that: it is fitted to one network.
        """
        if not fresh:
            return {}
        x = np.stack([sample.x for sample in fresh])
        predictions = self._learner.predict(x)
        baselines = self._ledger.baselines
        given_BC = corrected(predictions.teacher_probs_BC, self._learner.log_offsets)
        teacher_B = self._thresholds.choose(given_BC).tolist()
        finite_B = np.isfinite(predictions.student_probs_BC.sum(axis=1))
        student_B = np.where(finite_B, predictions.student_probs_BC.argmax(axis=1), UNLABELLED).tolist()
        # A server refuses to answer where the network overflows; here too such a sample has no answer.
        answered_B = np.isfinite(predictions.teacher_probs_BC.sum(axis=1)).tolist()
        twin_B = self._learner.classify(x).twin_B if self._twin_on_arrival else None
        answers: Answers = {}
        for n, sample in enumerate(fresh):
            own = Prediction(teacher_B[n], given_BC[n], self._learner.step)
            answers[sample.sample_id] = sample.answer or (own if answered_B[n] else self._no_answer), student_B[n]
            if sample.true_label is not None and answered_B[n]:  # in a simulation
                _update(self._board.oracle, sample.true_label, own, student_B[n], baselines)
                if twin_B is not None:
                    served = int(predictions.teacher_probs_BC[n].argmax())
                    self._board.oracle_gain.update(sample.true_label, served, int(twin_B[n]))
        self._learner.prior.arrived(predictions.teacher_probs_BC)
        self._board.traffic.arrived([answer for answer, _ in answers.values() if answer.class_index != UNLABELLED])
        self._guarding.arrived(x, predictions)
        self._requests.offer(
            [sample.sample_id for sample in fresh],
            [sample.position for sample in fresh],
            predictions.teacher_probs_BC,
            predictions.student_probs_BC,
            now_s,
        )
        return answers

    def unanswered(self, shed: Sequence[Sample]) -> Answers:
        """Samples that were shed have no answer, so their labels score nothing."""
        return {sample.sample_id: (self._no_answer, UNLABELLED) for sample in shed}

    def take_published(
        self, records: Sequence[Item], samples: Sequence[Sample]
    ) -> tuple[dict[str, Prediction], Counter[str]]:
        """Take the step's records of the predictions topic, before its labels: no answer came from their teacher.

        Returns the answers to the new `samples` by id, and the number of answers by outcome.
        """
        arrived = {sample.position: sample.sample_id for sample in samples}
        fresh: dict[str, Prediction] = {}
        others: list[PublishedAnswer] = []
        outcomes: Counter[str] = Counter()
        for answer in records:
            if not isinstance(answer, PublishedAnswer):
                continue
            if arrived.get(answer.sample) != answer.sample_id:
                others.append(answer)
            elif answer.sample_id in fresh:
                outcomes["late"] += 1
            else:
                fresh[answer.sample_id] = answer.prediction
                outcomes["taken"] += 1
        outcomes.update(self._ledger.answers_published(others))
        return fresh, outcomes

    def take_labels(self, arrivals: Sequence[Arrival]) -> None:
        """Score what can be scored. Called before the labels are learned."""
        self._admit_classes()
        self._compare_candidates(arrivals)
        for arrival in arrivals:
            if arrival.scored is not None:
                self._score(arrival.scored)
        self._requests.labelled([arrival.sample_id for arrival in arrivals])

    def _admit_classes(self) -> None:
        """Learn classes that got a name, from a label or from the config."""
        names = self._ledger.class_names
        if len(names) > self._named:
            self._learner.admit(len(names))
            self._board.name(names)
            self._named = len(names)

    def _compare_candidates(self, arrivals: Sequence[Arrival]) -> None:
        """Ask every candidate again, now that the label is known and not yet learned."""
        compared = [(a, a.example, a.scored) for a in arrivals if a.scored is not None and a.example is not None]
        if not compared:
            return
        found, prior = self._learner.classify(np.stack([example.x for _, example, _ in compared])), self._learner.prior
        given_NC = corrected(found.served_probs_BC, self._learner.log_offsets)
        given_N = np.where(np.isfinite(given_NC).all(axis=1), given_NC.argmax(axis=1), UNLABELLED)
        corrected_NC = corrected(found.served_probs_BC, prior.log_offsets)
        labels_N = np.array([arrival.class_index for arrival, _, _ in compared], np.int64)
        prior.labelled(found.served_probs_BC, labels_N)
        self._board.calibration.update(labels_N, found.served_probs_BC, corrected_NC)
        champion, candidates = self._learner.served, len(self._election.candidates)
        for n, (arrival, _, scored) in enumerate(compared):
            self._board.gain.update(
                arrival.class_index,
                int(found.teacher_B[n]),
                None if found.twin_B is None else int(found.twin_B[n]),
                # Both by the most probable class: a threshold may have changed in between.
                first_class=int(scored.prediction.probabilities_C.argmax()),
                served_class=int(given_N[n]),
            )
            self._guarding.compared(
                right=bool(found.teacher_B[n] == arrival.class_index), version=scored.prediction.model_version
            )
            right_K: npt.NDArray[np.bool_] = found.candidates_KB[:candidates, n] == arrival.class_index
            champion = self._election.update(champion, right_K)
        if champion != self._learner.served:
            self._learner.serve(champion)
            self._guarding.another_answers()

    def _score(self, scored: Scored) -> None:
        prediction, baselines = scored.prediction, (scored.majority_class, scored.no_change_class)
        _update(self._board.prequential, scored.class_index, prediction, scored.student_class, baselines)
        if scored.at_arrival.class_index != UNLABELLED:  # as in `predict`, else other answers than on arrival compare
            self._board.traffic.labelled(scored.at_arrival, scored.delay_s)
        # Without thresholds: a changed one is no drift.
        self._guarding.scored(wrong=int(prediction.probabilities_C.argmax()) != scored.class_index)


def _update(
    scores: Prequential, true_class: int, prediction: Prediction, student_class: int, baselines: Baselines
) -> None:
    majority_class, no_change_class = baselines
    scores.update(
        true_class=true_class,
        teacher_class=prediction.class_index,
        student_class=student_class,
        teacher_probabilities_C=prediction.probabilities_C,
        majority_class=majority_class,
        no_change_class=no_change_class,
    )
