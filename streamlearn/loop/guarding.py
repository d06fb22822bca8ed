"""Guard, drift monitor and trust in the loop: what they are shown, and what they do to the model.

The guard checks the model at fixed step numbers, and depends only on state that a restart restores. So a restart makes
the same checks with the same results (I3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import structlog

from streamlearn.judge.drift import DriftMonitor, DriftReport, Source
from streamlearn.judge.election import Election
from streamlearn.judge.guard import Action, Factors, Guard, GuardReport, Signals
from streamlearn.judge.scoreboard import Scoreboard
from streamlearn.judge.trust import Trust, TrustReport
from streamlearn.judge.window import group_of, joined
from streamlearn.learn.learner import Learner, Predictions
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.records import UNLABELLED, Array

REACTED_TO: tuple[Source, ...] = ("inputs", "uncertainty", "error")
"""Not disagreement: student and teacher may disagree for many reasons."""
REACTION_RESTS_STEPS = 500
"""A change raises several alarms, one per source and more as the model learns it. An average that restarted at each
would stay short."""
PROBE_ROWS = 64
"""Rows of the replay buffer that the networks classify at each check."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GuardingReport:
    """What guard and drift monitor have seen and done, and the trust in the teacher."""

    guard: GuardReport
    drift: DriftReport
    trust: TrustReport


class Guarding:
    """One per learner, used in its thread."""

    def __init__(
        self,
        learner: Learner,
        replay: ReplayBuffer,
        board: Scoreboard,
        election: Election,
        *,
        guard: Guard,
        reaction: Literal["alarm", "renew"],
        trust_labels: int,
    ) -> None:
        self._learner, self._replay, self._board, self._election = learner, replay, board, election
        self._guard, self._reaction = guard, reaction
        self._drift = DriftMonitor()
        self._trust = Trust(trust_labels)
        self._repaired_step = -1
        self._reacted_step: int | None = None

    @property
    def may_publish(self) -> bool:
        """Whether the teacher may be published. If not, servers keep serving the last healthy one."""
        return not self._guard.frozen or self.just_repaired

    @property
    def just_repaired(self) -> bool:
        """Whether the teacher was replaced in this step: it is known to be better than the served one."""
        return self._repaired_step == self._learner.step > 0

    def factors(self, step: int) -> Factors:
        """Factors of the consistency weight (0 while the teacher is not trusted) and of the learning rate."""
        factors = self._guard.factors(step)
        return Factors(factors.consistency_weight * self._trust.factor, factors.learning_rate)

    def arrived(self, x: Array, answers: Predictions) -> None:
        """Watch fresh samples x (B, *shape), and what both networks answer."""
        teacher_BC, student_BC = answers.teacher_probs_BC, answers.student_probs_BC
        # A NaN answer counts as full disagreement and full uncertainty, so that no mean becomes NaN.
        apart_B = np.nan_to_num(0.5 * np.abs(teacher_BC - student_BC).sum(axis=1, dtype=np.float64), nan=1.0)
        unsure_B = np.nan_to_num(1.0 - teacher_BC.max(axis=1).astype(np.float64), nan=1.0)
        step = self._learner.step + 1
        if self._drift.inputs(x, step):
            self._drifted("inputs", step)
        if self._drift.update("disagreement", float(apart_B.mean()), step):
            self._drifted("disagreement", step)
        if self._drift.update("uncertainty", float(unsure_B.mean()), step):
            self._drifted("uncertainty", step)

    def scored(self, *, wrong: bool) -> None:
        """Watch the error of a prediction that its label has scored."""
        step = self._learner.step + 1
        if self._drift.update("error", float(wrong), step):
            self._drifted("error", step)

    def compared(self, *, right: bool, version: int) -> None:
        """Take a label: whether the teacher is right now, and the version that answered its sample."""
        self._trust.update(right=right, version=version)

    def check(self, step: int) -> None:
        """Check the model after the steps at which a check is due, and repair it if necessary."""
        if step % self._guard.look_every_steps == 0:
            self._evict_breaking(step)
        if not self._guard.due(step):
            return
        was_frozen, action = self._guard.frozen, self._guard.look(step, self._signals(step))
        self._act(action)
        if action not in (Action.NONE, Action.KEEP_GOOD):
            _log.warning("guard_acted", step=step, action=action.value, reasons=list(self._guard.reasons))
        if self._guard.frozen != was_frozen:
            event = "publication_frozen" if self._guard.frozen else "publication_resumed"
            _log.warning(event, step=step, reasons=list(self._guard.reasons))

    def another_method(self) -> None:
        """Reset what compares networks: another method learns from here on, or other weights."""
        self._board.gain.restart()
        self._drift.forget_answers()
        self._election.restart()

    def another_answers(self) -> None:
        """Reset what compares answers: another network is served from here on."""
        self._drift.forget_answers()

    def report(self) -> GuardingReport:
        """What was seen and done so far."""
        return GuardingReport(self._guard.report(), self._drift.report(), self._trust.report())

    def state(self) -> dict[str, Array]:
        """Copies of all state."""
        reacted = {} if self._reacted_step is None else {"reacted_step": np.array(self._reacted_step)}
        return reacted | joined({name: part.state() for name, part in self._parts.items()})

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` returned."""
        self._reacted_step = int(state["reacted_step"]) if "reacted_step" in state else None
        for name, part in self._parts.items():
            part.load(group_of(state, name))

    @property
    def _parts(self) -> dict[str, Guard | DriftMonitor | Trust]:
        return {"guard": self._guard, "drift": self._drift, "trust": self._trust}

    def _act(self, action: Action) -> None:
        if action is Action.KEEP_GOOD:
            self._learner.keep_good()
            return
        repair = {Action.ROLL_BACK: self._learner.roll_back, Action.ADOPT_TWIN: self._learner.adopt_twin}.get(action)
        if repair is None:
            return
        assert repair(), f"{action}: the learner has nothing to repair the teacher with"
        self.another_method()
        self._trust.distrust(self._learner.step)
        self._repaired_step = self._learner.step

    def _evict_breaking(self, step: int) -> None:
        """If this step was skipped, remove those of its labelled rows that fail alone, if others do not.

        Replay would make every step fail that draws them. The decision depends on this step only, so a restart removes
        the same rows (I3).
        """
        drawn = sorted(set(self._replay.drawn_ids))
        if not drawn or not self._learner.health().skipped_in_a_row:
            return
        x, y = self._replay.rows(drawn)
        breaking = [drawn[row] for row in self._learner.breaking_rows(x, y)]
        for sample_id in breaking:
            self._replay.remove(sample_id)
        if breaking:
            _log.warning("labelled_rows_evicted", step=step, ids=breaking)

    def _signals(self, step: int) -> Signals:
        health, gain = self._learner.health(), self._board.gain.report()
        finite, probe, label, twin = health.finite, None, None, None
        x_P, y_P = self._replay.probe(PROBE_ROWS, step)
        if len(np.unique(y_P)) >= 2:
            found = self._learner.classify(x_P)
            finite = finite and UNLABELLED not in found.teacher_B
            probe, label = _entropy(found.teacher_B), _entropy(y_P)
            if found.twin_B is not None and UNLABELLED not in found.twin_B:
                twin = _entropy(found.twin_B)
        return Signals(
            updates=health.updates,
            skipped_in_a_row=health.skipped_in_a_row,
            finite=finite,
            distance=health.distance,
            probe_entropy=probe,
            probe_label_entropy=label,
            twin_probe_entropy=twin,
            gain_high=None if gain.interval is None else gain.interval[1],
            gain_count=gain.paired,
        )

    def _drifted(self, source: Source, step: int) -> None:
        reaction = self._reaction if source in REACTED_TO else "alarm"
        _log.warning("drift_detected", source=source, reaction=reaction, step=step)
        if reaction == "alarm":
            return
        if source != "error":  # errors come from labels, which trust follows by itself
            self._trust.distrust(step)
        if self._reacted_step is None or step - self._reacted_step >= REACTION_RESTS_STEPS:
            self._learner.restart_average()
            self._reacted_step = step


def _entropy(classes_P: npt.NDArray[np.int64]) -> float:
    """Of the classes' shares, in nats."""
    shares = np.unique(classes_P, return_counts=True)[1] / len(classes_P)
    return float(-(shares * np.log(shares)).sum())
