"""The guard: looks at what is being learned, says when to stop showing it, and what to go back to.

Pure state machine: no weights, no disk, no clock. Steps come in, so it is a fold over the log like everything else.
The learner holds the copies that it speaks of, at most two: KEEP_GOOD puts the teacher of now beside the one before and
drops the oldest, ROLL_BACK goes back to the older one and drops the newer. A collapse is noticed late, and what it
began from may have been kept already; the older copy has stayed healthy for a whole stretch after it was taken.

What it goes by, and why it does not cry wolf:

nonfinite
    Skipped steps leave everything untouched, so a burst that has ended is forgotten. One that has not may be a place
    in weight space from which no step is finite. A teacher whose weights, buffers or answers to the probe are not
    finite is not published, whatever the steps are.
collapsed
    The teacher gives few classes to a probe that holds many. A teacher that has just begun, or just met new classes,
    does so too. So its entropy must have *fallen*: below a share of the probe's own and of the highest that it has had.
    Where there is a twin, the twin, which has the same labels, must tell the classes apart in place of that. A twin
    that cannot says that labels or inputs are the cause, and no other weights would help; one that tells a few apart is
    taken only where no copy was kept. What is suspected is over at 1.5 times the bound, so that a teacher that wavers
    about it (learning rate 0.1, one class after the other) is not shown at every second look.
exploded
    Teacher and student are almost as far apart as the student is from zero, and twice as far as they use to be. Not
    "many times the usual": a student that is ten times too large is no further away than .9 of itself, while one that
    follows a drift went from .01 to .35 and was well.
stuck
    They are the same while the student learns. It is only said: an `ema_decay` of 0 does that too.
worse_than_twin
    The same network without consistency is better on the labels: the whole 95 % interval of the gain is below
    -`max_loss`. The interval is that of one look and looks repeat, so over a long run a teacher that is just `max_loss`
    worse is found to be worse. For one that is as good as its twin, `max_loss` is the margin.

One unhealthy look freezes publication, and `patience` of them in a row get a remedy; skipped steps and the twin's lead
get it at once, since they were counted long enough. The second remedy in a row brakes fully, and what it does not
change either is accepted as the new normal: at full brake the weights hardly move, so those looks show the copy itself,
and it is the probe that has changed. So a freeze ends, save while no step is finite, or no weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from streamlearn.judge.brake import Brake
from streamlearn.records import Array

Reason: TypeAlias = Literal["nonfinite", "collapsed", "exploded", "stuck", "worse_than_twin"]
REASONS: tuple[Reason, ...] = ("nonfinite", "collapsed", "exploded", "stuck", "worse_than_twin")
"""Why a look is not plain: a closed set, since each is a Prometheus label value."""

LEAST_GAIN_PAIRS = 100
"""Scored pairs before `gain_high` is believed: its normal approximation needs some."""

_WEIGHT_PAUSE = 5
"""The consistency weight comes back so many times more slowly than the learning rate, which all learning needs."""
_WELL_AGAIN = 1.5
"""A suspected collapse is over at so many times the entropy at which it began, so that noise does not end it."""
_REMEDIES = 2
"""Remedies in a row before what they do not change is accepted."""
_FAR, _FAR_BEYOND_USUAL = 0.7, 2.0
"""An exploded distance: as such, and in terms of the usual one."""
_USUAL_RATE = 0.1
"""Weight of one look in the running mean of the distance."""
_NEVER = -1


class Action(StrEnum):
    """What the caller must do. After ROLL_BACK and ADOPT_TWIN it also forgets the window of `gain`.

    What it has right after one of these two is known to be good. It should be published then, frozen or not, since the
    teacher that is served may have been ill for longer than the guard knows.
    """

    NONE = "none"
    KEEP_GOOD = "keep_good"
    """Copy the teacher of now, beside the copy before; the oldest of three goes."""
    ROLL_BACK = "roll_back"
    """Student and teacher become the older copy; the newer one is dropped."""
    ADOPT_TWIN = "adopt_twin"
    """Student and teacher become the twin."""
    ACCEPT = "accept"
    """Nothing, but say so: remedies did not help, and how it is now counts as healthy from here on."""


class State(StrEnum):
    """How things stand."""

    OFF = "off"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """The last look was unhealthy, and nothing was done yet."""
    TREATED = "treated"
    """Something was done, and no look since was healthy."""


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """When to act; each field means what the key of its name in `[guard]` means."""

    on: bool
    look_every_steps: int
    max_skipped: int
    patience: int
    entropy_ratio: float
    max_loss: float
    keep_good_every_steps: int
    backoff_steps: int


@dataclass(frozen=True, slots=True)
class Signals:
    """What there is to see after a step. A probe is drawn class-balanced from the labelled memory; entropy in nats."""

    updates: int
    """Of the student, so far."""
    skipped_in_a_row: int
    """Steps up to now that were not finite."""
    finite: bool
    """The teacher's weights, buffers and answers to the probe."""
    distance: float
    """||theta' - theta|| / ||theta||, teacher to student."""
    probe_entropy: float | None
    """Of the classes that the teacher gives to the probe; None where there are too few rows or classes for a probe."""
    probe_label_entropy: float | None
    """Of the probe's own labels."""
    twin_probe_entropy: float | None
    """Of the classes that the twin gives to it; None without a twin, or if its answers are not finite."""
    gain: float | None
    """Teacher's accuracy minus the twin's, over the window."""
    gain_high: float | None
    """Upper end of its 95 % interval."""
    gain_count: int
    """Pairs in the window."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one look has found, and what to do now."""

    healthy: bool
    reasons: tuple[Reason, ...]
    """Why not; or `stuck`, or what was accepted, which are healthy."""
    action: Action


class Factors(NamedTuple):
    """What the caller multiplies its schedules by, each from 1/64 to 1."""

    consistency_weight: float
    learning_rate: float


@dataclass(slots=True)
class _Memory:
    """Everything that the next look depends on, but for brakes and counts."""

    step: int = 0
    since_step: int = 0
    """Of the state of things."""
    unhealthy_looks: int = 0
    """In a row, since the last remedy."""
    remedies: int = 0
    """Since the last healthy look."""
    remedy_step: int = _NEVER
    back_off_until: int = 0
    """No second remedy for steps that are not finite before."""
    healthy_since: int = _NEVER
    """Or since the last KEEP_GOOD; never: the next healthy look begins a stretch."""
    probed_since: int = _NEVER
    still_looks: int = 0
    """In a row, at which teacher and student were the same."""
    seen_updates: int = 0
    best_entropy: float = 0.0
    """Highest of the teacher's probe; 0 until it was probed for a whole stretch."""
    accepted_entropy: float = math.inf
    """Of the teacher's probe where a collapse was accepted beside a twin, and what it has risen to since."""
    usual_distance: float = 0.0
    """Running mean over healthy looks; 0 before the first."""


class Guard:
    """Judges looks, one at a time, at steps that grow; `due` says which.

    All of its state is saved: continuing after `load` equals never having stopped.
    """

    def __init__(self, settings: GuardSettings) -> None:
        assert min(settings.look_every_steps, settings.max_skipped, settings.patience, settings.backoff_steps) >= 1
        self._settings = settings
        self._memory = _Memory()
        self._weight = Brake(settings.backoff_steps * _WEIGHT_PAUSE)
        self._rate = Brake(settings.backoff_steps)
        self._counts: Counter[str] = Counter()
        self._reasons: tuple[Reason, ...] = ()

    @property
    def frozen(self) -> bool:
        """Whether a new teacher must not be shown: from an unhealthy look until the next healthy one."""
        return self._state in {State.SUSPECT, State.TREATED}

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Of the last look."""
        return self._reasons

    def due(self, step: int) -> bool:
        """Whether to look after this step: a function of the step alone, so a replay looks where the run did."""
        return self._settings.on and step % self._settings.look_every_steps == 0

    def factors(self, step: int) -> Factors:
        """For learning step `step`, which comes after the last look."""
        return Factors(self._weight.factor(step), self._rate.factor(step)) if self._settings.on else Factors(1.0, 1.0)

    def look(self, step: int, signals: Signals) -> Verdict:
        """Judge what is seen after step `step`."""
        if not self._settings.on:
            return Verdict(healthy=True, reasons=(), action=Action.NONE)
        memory, before = self._memory, self._state
        assert step > memory.step, (step, memory.step)
        memory.step = step
        if signals.probe_entropy is not None and memory.probed_since == _NEVER:
            memory.probed_since = step
        self._reasons = self._find(signals)
        unhealthy = any(reason != "stuck" for reason in self._reasons)
        action = self._treat(signals) if unhealthy else Action.NONE
        if unhealthy and action is not Action.ACCEPT:
            memory.healthy_since = _NEVER
            self._weight.hold(step)
            self._rate.hold(step)
        else:
            memory.unhealthy_looks = memory.remedies = 0
            self._learn_what_is_usual(signals)
            action = action if unhealthy else self._keep()
        if self._state is not before:
            memory.since_step = step
        self._counts.update((*self._reasons, action))
        return Verdict(not self.frozen, self._reasons, action)

    def report(self) -> dict[str, Any]:
        """How things stand after the last look, as JSON."""
        return {
            "state": self._state.value,
            "since_step": self._memory.since_step,
            "frozen": self.frozen,
            "reasons": list(self._reasons),
            "looks": {reason: self._counts[reason] for reason in REASONS},
            "actions": {action.value: self._counts[action] for action in Action if action is not Action.NONE},
            "factors": self.factors(self._memory.step + 1)._asdict(),
        }

    def state(self) -> dict[str, Array]:
        """All that the next look and the report depend on, each a 0-d array."""
        saved: dict[str, int | float] = asdict(self._memory)
        for name, brake in (("weight", self._weight), ("rate", self._rate)):
            saved |= {f"{name}_level": brake.level, f"{name}_since_step": brake.since_step}
        saved |= {f"count.{name}": self._counts[name] for name in (*REASONS, *Action)}
        saved |= {f"reason.{name}": int(name in self._reasons) for name in REASONS}
        return {name: np.array(value) for name, value in saved.items()}

    def load(self, state: Mapping[str, Array]) -> None:
        """Become what `state` saved."""
        saved: dict[str, Any] = {name: array.item() for name, array in state.items()}
        self._memory = _Memory(**{field.name: saved[field.name] for field in fields(_Memory)})
        for name, brake in (("weight", self._weight), ("rate", self._rate)):
            brake.level, brake.since_step = saved[f"{name}_level"], saved[f"{name}_since_step"]
        self._counts = Counter({name: saved[f"count.{name}"] for name in (*REASONS, *Action)})
        self._reasons = tuple(name for name in REASONS if saved[f"reason.{name}"])

    @property
    def _state(self) -> State:
        if not self._settings.on:
            return State.OFF
        if self._memory.remedies:
            return State.TREATED
        return State.SUSPECT if self._memory.unhealthy_looks else State.HEALTHY

    @property
    def _has_copy(self) -> bool:
        return self._counts[Action.KEEP_GOOD] > 0

    @property
    def _resting(self) -> bool:
        """A remedy was taken a moment ago; distances and scores are not yet what they use to be."""
        rest_steps = self._settings.patience * self._settings.look_every_steps
        return self._memory.remedy_step != _NEVER and self._memory.step - self._memory.remedy_step <= rest_steps

    def _find(self, signals: Signals) -> tuple[Reason, ...]:
        found: dict[Reason, bool] = {
            "nonfinite": signals.skipped_in_a_row >= self._settings.max_skipped or not signals.finite,
            "collapsed": self._collapsed(signals),
            "exploded": self._exploded(signals),
            "stuck": self._stuck(signals),
            "worse_than_twin": self._worse_than_twin(signals),
        }
        return tuple(reason for reason in REASONS if found[reason])

    def _collapsed(self, signals: Signals) -> bool:
        entropy, of_labels, of_twin = signals.probe_entropy, signals.probe_label_entropy, signals.twin_probe_entropy
        if entropy is None or of_labels is None or signals.updates < self._settings.keep_good_every_steps:
            return False
        possible = self._memory.best_entropy if of_twin is None else of_twin
        if not self._twin_is_well(signals):
            possible = min(possible, self._memory.accepted_entropy)
        ratio = self._settings.entropy_ratio
        if self._state is State.SUSPECT:
            ratio = min(1.0, _WELL_AGAIN * ratio)
        return entropy < ratio * min(of_labels, possible)

    def _exploded(self, signals: Signals) -> bool:
        """Not before the first copy: until then the distance has no usual value, it grows from zero."""
        if not math.isfinite(signals.distance):
            return True
        usual = self._memory.usual_distance
        return self._has_copy and signals.distance > max(_FAR, _FAR_BEYOND_USUAL * usual)

    def _stuck(self, signals: Signals) -> bool:
        memory = self._memory
        still = signals.distance == 0.0 and signals.updates > memory.seen_updates
        memory.seen_updates = signals.updates
        memory.still_looks = memory.still_looks + 1 if still else 0
        return memory.still_looks >= self._settings.patience

    def _worse_than_twin(self, signals: Signals) -> bool:
        """Not right after a remedy: the same labels would be used twice, had the caller not forgotten them.

        Nor without a twin now: the window outlives it where a restart has switched it off.
        """
        if signals.gain_high is None or signals.twin_probe_entropy is None or self._resting:
            return False
        return signals.gain_count >= LEAST_GAIN_PAIRS and signals.gain_high < -self._settings.max_loss

    def _treat(self, signals: Signals) -> Action:
        """What to do about the reasons of this look, if it is time to do something."""
        memory = self._memory
        memory.unhealthy_looks += 1
        if "nonfinite" in self._reasons:
            return self._treat_nonfinite(signals) if memory.step >= memory.back_off_until else Action.NONE
        if "worse_than_twin" in self._reasons:
            self._weight.halve(memory.step)
            return self._take(Action.ADOPT_TWIN)
        if memory.unhealthy_looks >= self._settings.patience and {"collapsed", "exploded"} & set(self._reasons):
            return self._treat_lasting(signals)
        return Action.NONE

    def _treat_nonfinite(self, signals: Signals) -> Action:
        """At once, but again only after a pause that doubles, and then not from the same copy if there is a twin."""
        self._rate.halve(self._memory.step)
        self._memory.back_off_until = self._memory.step + self._rate.pause_steps
        return self._take(self._choose(signals, twin_first=self._memory.remedies > 0))

    def _treat_lasting(self, signals: Signals) -> Action:
        """Of a collapse or an explosion that is no passing thing."""
        collapsed, again, step = "collapsed" in self._reasons, self._memory.remedies > 0, self._memory.step
        action = self._choose(signals, twin_first=collapsed)
        tried = action is Action.NONE or self._memory.remedies >= _REMEDIES
        # A twin that is well proves that better weights exist; a distance that is no number proves these are none.
        proven = action is Action.ADOPT_TWIN and self._twin_is_well(signals)
        if tried and not proven and math.isfinite(signals.distance):
            return self._accept(signals)
        blamed = [self._weight] if collapsed else []
        # Where the twin is well, the learning rate that it shares is not to blame at first.
        blamed += [self._rate] if again or action is not Action.ADOPT_TWIN else []
        for brake in blamed:
            if again:
                brake.press(step)
            else:
                brake.halve(step)
        return self._take(action)

    def _accept(self, signals: Signals) -> Action:
        """It is not the weights' doing. The brakes did not help, so they are let go."""
        if "collapsed" in self._reasons and signals.probe_entropy is not None:
            self._memory.best_entropy = self._memory.accepted_entropy = signals.probe_entropy
        if "exploded" in self._reasons:
            self._memory.usual_distance = signals.distance
        self._weight.release()
        self._rate.release()
        return Action.ACCEPT

    def _choose(self, signals: Signals, *, twin_first: bool) -> Action:
        """The twin knows the newest labels; a copy is a teacher that was seen to be well."""
        if self._twin_is_well(signals) and (twin_first or not self._has_copy):
            return Action.ADOPT_TWIN
        if self._has_copy:
            return Action.ROLL_BACK
        # A collapse is one beside the twin: where there is nothing else, an ill twin is still the better of the two.
        beside_twin = "collapsed" in self._reasons and signals.twin_probe_entropy is not None
        return Action.ADOPT_TWIN if beside_twin else Action.NONE

    def _twin_is_well(self, signals: Signals) -> bool:
        of_twin, of_labels = signals.twin_probe_entropy, signals.probe_label_entropy
        if of_twin is None or of_labels is None:
            return False
        return of_twin >= self._settings.entropy_ratio * of_labels

    def _take(self, action: Action) -> Action:
        if action is not Action.NONE:
            self._memory.remedies += 1
            self._memory.remedy_step = self._memory.step
            self._memory.unhealthy_looks = 0
        return action

    def _learn_what_is_usual(self, signals: Signals) -> None:
        """From a healthy look. What an untrained network says means nothing: a probe's first stretch is left out."""
        memory, entropy = self._memory, signals.probe_entropy
        if entropy is not None and memory.step - memory.probed_since >= self._settings.keep_good_every_steps:
            memory.best_entropy = max(memory.best_entropy, entropy)
            memory.accepted_entropy = max(memory.accepted_entropy, entropy)
        if signals.distance > 0.0 and not self._resting:
            usual = memory.usual_distance or signals.distance
            memory.usual_distance = usual + _USUAL_RATE * (signals.distance - usual)

    def _keep(self) -> Action:
        memory = self._memory
        if memory.healthy_since == _NEVER:
            memory.healthy_since = memory.step
        if memory.step - memory.healthy_since < self._settings.keep_good_every_steps:
            return Action.NONE
        memory.healthy_since = memory.step
        return Action.KEEP_GOOD
