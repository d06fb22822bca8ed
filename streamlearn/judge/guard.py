"""The guard: checks the model at intervals, freezes publication while it looks wrong, and decides on a remedy.

A pure state machine without weights, disk or clock. Steps are its input, so its state is a fold over the log. The
caller keeps the copies that it decides about, at most two. KEEP_GOOD adds a copy of the current teacher and drops the
oldest. ROLL_BACK restores the older copy and drops the newer: a collapse is detected late, and the newer copy may
already contain its start, while the older one stayed healthy for a whole stretch afterwards.

What a look can find, and how it avoids false alarms:

nonfinite
    `_MAX_SKIPPED` steps in a row were skipped, or weights, buffers or probe answers of the teacher are not finite.
    Skipped steps change nothing, so a burst that has ended needs no remedy. One that goes on may be a region of weight
    space without finite steps.
collapsed
    The teacher predicts few classes for a probe of labelled rows with many. A new teacher, or one that meets new
    classes, does so too, so the entropy of its predictions must have fallen: below `_ENTROPY_RATIO` of the entropy of
    the labels, and of the highest entropy so far. With a twin, the twin's entropy replaces the latter: it has the same
    labels. A twin that fails too means that labels or inputs are the cause, and other weights would not help. A twin
    that does only somewhat better is adopted only where there is no copy. Hysteresis: a suspected collapse clears at
    `_CLEAR_RATIO` times its threshold, so that a teacher that oscillates around it is not published at every second
    look.
exploded
    The distance of teacher and student is almost the norm of the student, and twice its usual value. Not "many times
    the usual": a student that is ten times too large has a relative distance of only .9, while one that followed a
    drift went from .01 to .35 and was healthy.
stuck
    Teacher and student are equal while the student learns. Reported only: `ema_decay` = 0 has the same effect.
worse_than_twin
    The same network without consistency is better on the labels: the 95 % interval of the gain is wholly below
    -`_MAX_LOSS`. The interval is that of one look, and looks repeat, so in a long run a teacher that is worse by just
    `_MAX_LOSS` will be found. For a teacher as good as its twin, `_MAX_LOSS` is the margin.

One unhealthy look freezes publication, and `_PATIENCE` of them in a row lead to a remedy; skipped steps and the twin's
lead lead to it at once, since they are counts already. The second remedy in a row reduces both factors to their
minimum. What it does not change either is accepted as the new normal: with minimal factors the weights hardly move, so
these looks show the restored weights, and the probe has changed. So every freeze ends, except while no step is finite
or no weights are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Literal, TypeAlias

import numpy as np

from streamlearn.judge.backoff import LEVELS, Backoff
from streamlearn.records import Array

Reason: TypeAlias = Literal["nonfinite", "collapsed", "exploded", "stuck", "worse_than_twin"]
REASONS: tuple[Reason, ...] = ("nonfinite", "collapsed", "exploded", "stuck", "worse_than_twin")

LOOK_EVERY_STEPS = 20
KEEP_GOOD_EVERY_STEPS = 200
"""Healthy steps between two copies of the teacher."""
BACKOFF_STEPS = 200
"""First pause of the lowered learning rate; it doubles with each failure."""
LEAST_GAIN_PAIRS = 100
"""Scored pairs that the normal approximation of `gain_high` needs."""

_MAX_SKIPPED = 3
_PATIENCE = 3
"""Unhealthy looks in a row before a remedy."""
_ENTROPY_RATIO = 0.5
_CLEAR_RATIO = 1.5
_MAX_LOSS = 0.02
"""In accuracy."""
_WEIGHT_PAUSE = 5
"""The consistency weight recovers this many times more slowly than the learning rate, which all learning needs."""
_REMEDIES = 2
"""Remedies in a row before what they do not change is accepted."""
_FAR, _FAR_BEYOND_USUAL = 0.7, 2.0
"""Thresholds of an exploded distance: absolute, and relative to its usual value."""
_USUAL_RATE = 0.1
"""Weight of one look in the running mean of the distance."""
_NEVER = -1


class Action(StrEnum):
    """What the caller must do. After ROLL_BACK and ADOPT_TWIN it also empties the window of the gain.

    The teacher right after one of these two is known to be good. It should be published at once, although publication
    is frozen: the served teacher may have been unhealthy for longer than the guard knows.
    """

    NONE = "none"
    KEEP_GOOD = "keep_good"
    """Copy the current teacher, next to the copy before; drop the oldest of three."""
    ROLL_BACK = "roll_back"
    """Restore student and teacher from the older copy; drop the newer one."""
    ADOPT_TWIN = "adopt_twin"
    """Replace student and teacher with the twin."""
    ACCEPT = "accept"
    """Nothing but a log line: remedies did not help, and the present state counts as healthy from here on."""


class State(StrEnum):
    """State of the guard."""

    OFF = "off"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """The last look was unhealthy; no remedy yet."""
    TREATED = "treated"
    """There was a remedy, and no healthy look since."""


@dataclass(frozen=True, slots=True)
class Signals:
    """Observations after a step. The probe is drawn class-balanced from the replay buffer; entropies in nats."""

    updates: int
    """Updates of the student so far."""
    skipped_in_a_row: int
    """The last steps that were not finite, in a row."""
    finite: bool
    """Of the teacher's weights, buffers and probe answers."""
    distance: float
    """||theta' - theta|| / ||theta||, teacher to student."""
    probe_entropy: float | None
    """Of the classes that the teacher predicts for the probe; None where too few rows or classes make a probe."""
    probe_label_entropy: float | None
    """Of the labels of the probe."""
    twin_probe_entropy: float | None
    """Of the classes that the twin predicts for it; None without a twin, or if its answers are not finite."""
    gain_high: float | None
    """Upper end of the 95 % interval of the gain: the teacher's accuracy minus the twin's, over the window."""
    gain_count: int
    """Pairs in the window."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Factors of the schedules, each from 1/64 to 1."""

    consistency_weight: float
    learning_rate: float


@dataclass(frozen=True, slots=True)
class GuardReport:
    """State after the last look, and counts since the start."""

    state: str
    """A value of `State`."""
    since_step: int
    """The step at which `state` began."""
    frozen: bool
    reasons: tuple[Reason, ...]
    looks: dict[Reason, int]
    """Looks with each reason."""
    actions: dict[str, int]
    """By value of `Action`, without `none`."""
    factors: Factors


@dataclass(slots=True)
class _Memory:
    """State of the next look, except back-offs and counts. The names of the fields are those in a checkpoint."""

    step: int = 0
    since_step: int = 0
    unhealthy_looks: int = 0
    """In a row, since the last remedy."""
    remedies: int = 0
    """Since the last healthy look."""
    remedy_step: int = _NEVER
    back_off_until: int = 0
    """No further remedy for nonfinite before this step."""
    healthy_since: int = _NEVER
    """Or since the last KEEP_GOOD; `_NEVER`: the next healthy look begins a stretch."""
    probed_since: int = _NEVER
    still_looks: int = 0
    """In a row, with teacher and student equal."""
    seen_updates: int = 0
    best_entropy: float = 0.0
    """Highest probe entropy of the teacher; 0 until it was probed for a whole stretch."""
    accepted_entropy: float = math.inf
    """Probe entropy of a collapse that was accepted, or the highest since."""
    usual_distance: float = 0.0
    """Running mean over healthy looks; 0 before the first."""


class Guard:
    """Judges one look at a time, at increasing steps for which `due` is true.

    All state is saved: continuing after `load` equals an uninterrupted run.
    """

    def __init__(
        self,
        on: bool,
        *,
        look_every_steps: int = LOOK_EVERY_STEPS,
        keep_good_every_steps: int = KEEP_GOOD_EVERY_STEPS,
        backoff_steps: int = BACKOFF_STEPS,
    ) -> None:
        """Off, it never is due, and its factors are 1."""
        assert min(look_every_steps, keep_good_every_steps, backoff_steps) >= 1
        self.look_every_steps = look_every_steps
        self._on, self._keep_every = on, keep_good_every_steps
        self._memory = _Memory()
        self._weight = Backoff(backoff_steps * _WEIGHT_PAUSE)
        self._rate = Backoff(backoff_steps)
        self._counts: Counter[str] = Counter()
        self.reasons: tuple[Reason, ...] = ()
        """Findings of the last look. `stuck` and accepted findings are healthy."""

    @property
    def frozen(self) -> bool:
        """Whether no new teacher may be published: from an unhealthy look until the next healthy one."""
        return self._state in {State.SUSPECT, State.TREATED}

    def due(self, step: int) -> bool:
        """Whether to look after this step. A function of the step alone, so a replay looks at the same steps."""
        return self._on and step % self.look_every_steps == 0

    def factors(self, step: int) -> Factors:
        """For learning step `step`, which is after the last look."""
        return Factors(self._weight.factor(step), self._rate.factor(step)) if self._on else Factors(1.0, 1.0)

    def look(self, step: int, signals: Signals) -> Action:
        """Judge the observations after step `step`, at which a look is due."""
        memory, before = self._memory, self._state
        assert step > memory.step, (step, memory.step)
        memory.step = step
        if signals.probe_entropy is not None and memory.probed_since == _NEVER:
            memory.probed_since = step
        self.reasons = self._find(signals)
        unhealthy = any(reason != "stuck" for reason in self.reasons)
        action = self._treat(signals) if unhealthy else Action.NONE
        if unhealthy and action is not Action.ACCEPT:
            memory.healthy_since = _NEVER
            self._weight.halve(step, times=0)
            self._rate.halve(step, times=0)
        else:
            memory.unhealthy_looks = memory.remedies = 0
            self._update_usual(signals)
            action = action if unhealthy else self._keep()
        if self._state is not before:
            memory.since_step = step
        self._counts.update((*self.reasons, action))
        return action

    def report(self) -> GuardReport:
        """State after the last look."""
        return GuardReport(
            state=self._state.value,
            since_step=self._memory.since_step,
            frozen=self.frozen,
            reasons=self.reasons,
            looks={reason: self._counts[reason] for reason in REASONS},
            actions={action.value: self._counts[action] for action in Action if action is not Action.NONE},
            factors=self.factors(self._memory.step + 1),
        )

    def state(self) -> dict[str, Array]:
        """All state, each value a 0-d array."""
        saved: dict[str, int | float] = asdict(self._memory)
        for name, backoff in (("weight", self._weight), ("rate", self._rate)):
            saved |= {f"{name}_level": backoff.level, f"{name}_since_step": backoff.since_step}
        saved |= {f"count.{name}": self._counts[name] for name in (*REASONS, *Action)}
        saved |= {f"reason.{name}": int(name in self.reasons) for name in REASONS}
        return {name: np.array(value) for name, value in saved.items()}

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved."""
        saved: dict[str, Any] = {name: array.item() for name, array in state.items()}
        self._memory = _Memory(**{field.name: saved[field.name] for field in fields(_Memory)})
        for name, backoff in (("weight", self._weight), ("rate", self._rate)):
            backoff.level, backoff.since_step = saved[f"{name}_level"], saved[f"{name}_since_step"]
        self._counts = Counter({name: saved[f"count.{name}"] for name in (*REASONS, *Action)})
        self.reasons = tuple(name for name in REASONS if saved[f"reason.{name}"])

    @property
    def _state(self) -> State:
        if not self._on:
            return State.OFF
        if self._memory.remedies:
            return State.TREATED
        return State.SUSPECT if self._memory.unhealthy_looks else State.HEALTHY

    @property
    def _has_copy(self) -> bool:
        return self._counts[Action.KEEP_GOOD] > 0

    @property
    def _resting(self) -> bool:
        """Soon after a remedy, when distances and scores do not have their usual values."""
        rest_steps = _PATIENCE * self.look_every_steps
        return self._memory.remedy_step != _NEVER and self._memory.step - self._memory.remedy_step <= rest_steps

    def _find(self, signals: Signals) -> tuple[Reason, ...]:
        found: dict[Reason, bool] = {
            "nonfinite": signals.skipped_in_a_row >= _MAX_SKIPPED or not signals.finite,
            "collapsed": self._collapsed(signals),
            "exploded": self._exploded(signals),
            "stuck": self._stuck(signals),
            "worse_than_twin": self._worse_than_twin(signals),
        }
        return tuple(reason for reason in REASONS if found[reason])

    def _collapsed(self, signals: Signals) -> bool:
        entropy, of_labels, of_twin = signals.probe_entropy, signals.probe_label_entropy, signals.twin_probe_entropy
        if entropy is None or of_labels is None or signals.updates < self._keep_every:
            return False
        possible = self._memory.best_entropy if of_twin is None else of_twin
        if not _twin_is_healthy(signals):
            possible = min(possible, self._memory.accepted_entropy)
        ratio = _ENTROPY_RATIO
        if self._state is State.SUSPECT:
            ratio = min(1.0, _CLEAR_RATIO * ratio)
        return entropy < ratio * min(of_labels, possible)

    def _exploded(self, signals: Signals) -> bool:
        """Not before the first copy: until then the distance grows from 0 and has no usual value."""
        if not math.isfinite(signals.distance):
            return True
        usual = self._memory.usual_distance
        return self._has_copy and signals.distance > max(_FAR, _FAR_BEYOND_USUAL * usual)

    def _stuck(self, signals: Signals) -> bool:
        memory = self._memory
        still = signals.distance == 0.0 and signals.updates > memory.seen_updates
        memory.seen_updates = signals.updates
        memory.still_looks = memory.still_looks + 1 if still else 0
        return memory.still_looks >= _PATIENCE

    def _worse_than_twin(self, signals: Signals) -> bool:
        """Not soon after a remedy, when the same labels could count twice. Not without a twin now.

        The window outlives a twin that was switched off at a restart.
        """
        if signals.gain_high is None or signals.twin_probe_entropy is None or self._resting:
            return False
        return signals.gain_count >= LEAST_GAIN_PAIRS and signals.gain_high < -_MAX_LOSS

    def _treat(self, signals: Signals) -> Action:
        """The remedy for the findings of this look, if one is due."""
        memory = self._memory
        memory.unhealthy_looks += 1
        if "nonfinite" in self.reasons:
            return self._treat_nonfinite(signals) if memory.step >= memory.back_off_until else Action.NONE
        if "worse_than_twin" in self.reasons:
            self._weight.halve(memory.step)
            return self._take(Action.ADOPT_TWIN)
        if memory.unhealthy_looks >= _PATIENCE and {"collapsed", "exploded"} & set(self.reasons):
            return self._treat_lasting(signals)
        return Action.NONE

    def _treat_nonfinite(self, signals: Signals) -> Action:
        """At once; again after a pause that doubles, and then with the twin before the same copy."""
        self._rate.halve(self._memory.step)
        self._memory.back_off_until = self._memory.step + self._rate.pause_steps
        return self._take(self._choose(signals, twin_first=self._memory.remedies > 0))

    def _treat_lasting(self, signals: Signals) -> Action:
        """For a collapse or an explosion that lasts."""
        collapsed, again, step = "collapsed" in self.reasons, self._memory.remedies > 0, self._memory.step
        action = self._choose(signals, twin_first=collapsed)
        tried = action is Action.NONE or self._memory.remedies >= _REMEDIES
        # A healthy twin proves that better weights exist; a distance that is not finite proves that these are bad.
        proven = action is Action.ADOPT_TWIN and _twin_is_healthy(signals)
        if tried and not proven and math.isfinite(signals.distance):
            return self._accept(signals)
        blamed = [self._weight] if collapsed else []
        # With a healthy twin the learning rate, which it shares, is not the cause at first.
        blamed += [self._rate] if again or action is not Action.ADOPT_TWIN else []
        for backoff in blamed:
            backoff.halve(step, times=LEVELS if again else 1)
        return self._take(action)

    def _accept(self, signals: Signals) -> Action:
        """The weights are not the cause. Lower factors did not help, so they are reset."""
        if "collapsed" in self.reasons and signals.probe_entropy is not None:
            self._memory.best_entropy = self._memory.accepted_entropy = signals.probe_entropy
        if "exploded" in self.reasons:
            self._memory.usual_distance = signals.distance
        self._weight.reset()
        self._rate.reset()
        return Action.ACCEPT

    def _choose(self, signals: Signals, *, twin_first: bool) -> Action:
        """The twin has learned the newest labels; a copy is a teacher that was healthy."""
        if _twin_is_healthy(signals) and (twin_first or not self._has_copy):
            return Action.ADOPT_TWIN
        if self._has_copy:
            return Action.ROLL_BACK
        # The twin has more entropy than a collapsed teacher; without a copy even an unhealthy twin is the better one.
        has_twin = "collapsed" in self.reasons and signals.twin_probe_entropy is not None
        return Action.ADOPT_TWIN if has_twin else Action.NONE

    def _take(self, action: Action) -> Action:
        if action is not Action.NONE:
            self._memory.remedies += 1
            self._memory.remedy_step = self._memory.step
            self._memory.unhealthy_looks = 0
        return action

    def _update_usual(self, signals: Signals) -> None:
        """From a healthy look. The first stretch of probes is left out: predictions of an untrained network."""
        memory, entropy = self._memory, signals.probe_entropy
        if entropy is not None and memory.step - memory.probed_since >= self._keep_every:
            memory.best_entropy = max(memory.best_entropy, entropy)
            memory.accepted_entropy = max(memory.accepted_entropy, entropy)
        if signals.distance > 0.0 and not self._resting:
            usual = memory.usual_distance or signals.distance
            memory.usual_distance = usual + _USUAL_RATE * (signals.distance - usual)

    def _keep(self) -> Action:
        memory = self._memory
        if memory.healthy_since == _NEVER:
            memory.healthy_since = memory.step
        if memory.step - memory.healthy_since < self._keep_every:
            return Action.NONE
        memory.healthy_since = memory.step
        return Action.KEEP_GOOD


def _twin_is_healthy(signals: Signals) -> bool:
    of_twin, of_labels = signals.twin_probe_entropy, signals.probe_label_entropy
    if of_twin is None or of_labels is None:
        return False
    return of_twin >= _ENTROPY_RATIO * of_labels
