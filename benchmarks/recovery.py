"""Measures the samples after an abrupt change until 95 % of the earlier accuracy is back, for several reactions.

Each run is a whole learner on a stream of `drift.py` that changes once (`permute`, `labels`, and `rotate` for images),
with 5 % of late labels and one step per micro-batch. Contenders:

    constant  one teacher with a constant horizon (100 steps from step 1,000 on), always served; no guard, no reaction
    shipped   the default: guard, election between teacher and twin, and after an alarm a short horizon and new trust
    alarm     as shipped, but an alarm is only reported
    reset     as constant, but every 1,000 steps the learner returns to its state after the first 1,000
    restart   as constant, but every 1,000 steps the learner returns to its initial weights

`reset` and `restart` are the baseline of Press et al. (2023, "RDumb: A simple approach that questions our progress in
continual test-time adaptation"), who reset to pre-trained weights every 1,000 steps. A stream has no pre-trained
weights, hence two variants. All of the learner is reset: student, teacher, optimizer, input statistics, ramps; the
replay buffer and the step number stay. The change comes halfway between two resets; two whole periods follow.

Accuracies are prequential on all samples, of the network in office. `before`: the 1,000 samples up to the change;
`lowest`: the worst 1,000 consecutive samples after it; `after`: all samples after it. `until back`: samples from the
change to the end of the first window of 1,000 with 95 % of the contender's own `before`; the next column with 95 % of
that of `constant`. A stream that ends earlier counts with all its samples. Differences to `constant` are paired by
stream, with the standard error over seeds.

Run: python benchmarks/recovery.py [--quick] [--seeds N] [--first-seed N] [--jobs N]. Prints a line of JSON per run and
two tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from drift import FRESH, Change, Stream, events
from offline import Learning, in_pool, read, run
from rich.console import Console
from rich.table import Table

from streamlearn.app.build import make_learner
from streamlearn.judge.prequential import Prequential
from streamlearn.learn.learner import Learner
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport
from streamlearn.records import Array

DELAY = "geometric:9600"
"""Label delay in samples: 300 steps on average."""
BACK_AT, WINDOW = 0.95, 1000
WHOLE_STEPS = -(-WINDOW // FRESH)
"""Steps from the change to the first window wholly after it."""
CHANGES: Mapping[str, Sequence[Change]] = {"digits": ("permute", "labels", "rotate"), "segments": ("permute", "labels")}
"""Changes by data set."""

Settings = Mapping[str, Mapping[str, Any]]
PLAIN: Settings = {
    "guard": {"on": False},
    "drift": {"reaction": "alarm"},
    "learn": {"twin": "measure"},
}
CONTENDERS: Mapping[str, Settings] = {
    "constant": PLAIN,
    "shipped": {},
    "alarm": {"drift": {"reaction": "alarm"}},
    "reset": PLAIN,
    "restart": PLAIN,
}
"""Settings that differ from the default, by name."""
REFERENCE = "constant"


@dataclass(frozen=True)
class Lengths:
    """Lengths in steps."""

    reset_every: int
    change_step: int
    steps: int


LENGTHS, QUICK_LENGTHS = Lengths(1000, 1500, 3500), Lengths(120, 180, 420)


@dataclass(frozen=True)
class Case:
    """One run."""

    stream: Stream
    contender: str
    reset_every: int
    """In steps; only for contenders that reset."""


@dataclass(frozen=True)
class Result:
    """The result of one run."""

    case: Case
    before: float
    """Accuracy over the window that ends with the change."""
    windows: tuple[float, ...]
    """Accuracy over each window wholly after the change, one per step."""
    after: float
    """Accuracy over all samples after the change."""

    @property
    def lowest(self) -> float:
        """Accuracy over the worst window."""
        return min(self.windows)

    def back_after(self, earlier: float) -> int | None:
        """Samples from the change until a window has 95 % of `earlier`; None if never."""
        for number, accuracy in enumerate(self.windows):
            if accuracy >= BACK_AT * earlier:
                return (WHOLE_STEPS + number) * FRESH
        return None

    def until_back(self, earlier: float) -> int:
        """The same; all samples after the change if never."""
        stream, found = self.case.stream, self.back_after(earlier)
        return (stream.steps - stream.change_step) * FRESH if found is None else found


class Following:
    """Collects accuracies of the served network."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._before = 0.0
        self._windows: list[float] = []
        self._right_at_change = self._scored_at_change = 0
        self._right = self._scored = 0

    def __call__(self, oracle: Prequential, step: int) -> None:
        """Record a step with fresh samples."""
        since = step - self._case.stream.change_step
        if since < 0:
            return
        accuracy = oracle.windowed("teacher") or 0.0
        cumulative = oracle.report().cumulative.accuracy["teacher"] or 0.0
        self._scored, self._right = oracle.scored, round(cumulative * oracle.scored)
        if since == 0:
            self._before = accuracy
            self._right_at_change, self._scored_at_change = self._right, self._scored
        elif since >= WHOLE_STEPS:
            self._windows.append(accuracy)

    def result(self) -> Result:
        """The result of the whole stream."""
        right, scored = self._right - self._right_at_change, self._scored - self._scored_at_change
        return Result(self._case, self._before, tuple(self._windows), right / scored)


class Resetting:
    """Resets a learner every `every` steps: to `kept`, or to its state at the first call."""

    def __init__(self, every: int, kept: Mapping[str, Array] | None = None) -> None:
        self._every, self._kept = every, kept

    def __call__(self, learner: Learner, step: int) -> None:
        """Called after each step. The step number is not reset, since the loop and the journal depend on it."""
        if step % self._every:
            return
        if self._kept is None:
            self._kept = learner.state()
        else:
            learner.load_state({**self._kept, "learner.step": np.array(step, np.int64)})


def make_resetting(case: Case, learning: Learning) -> Resetting | None:
    """For contenders that reset."""
    if case.contender == "restart":
        unlearned = make_learner(learning.config(Path()))
        return Resetting(case.reset_every, unlearned.state())
    return Resetting(case.reset_every) if case.contender == "reset" else None


def play(case: Case) -> Result:
    """One learner on one stream."""
    stream, following = case.stream, Following(case)
    data = read(stream.data, stream.seed)
    settings = {"score": {"window": WINDOW}, **CONTENDERS[case.contender]}
    learning = Learning(data, stream.seed, fresh=FRESH, settings=settings)
    resetting = make_resetting(case, learning)

    def hook(loop: TrainingLoop, report: StepReport, _folder: Path) -> None:
        if not report.counts.samples_learned:
            return  # only labels are left at the end
        following(loop.board.oracle, report.step)
        if resetting is not None:
            resetting(loop.learner, report.step)

    with run(learning, events(stream, data), hook):
        return following.result()


def cases(seeds: Sequence[int], lengths: Lengths, *, quick: bool) -> list[Case]:
    """All runs, seed by seed."""
    assert lengths.change_step % lengths.reset_every, "the change must not coincide with a reset"
    changed = [(data, change) for data, changes in CHANGES.items() for change in changes]
    return [
        Case(Stream(data, change, DELAY, seed, lengths.change_step, lengths.steps), contender, lengths.reset_every)
        for seed, (data, change), contender in itertools.product(seeds, changed[:1] if quick else changed, CONTENDERS)
    ]


def line(result: Result) -> dict[str, Any]:
    """One run as JSON."""
    stream = result.case.stream
    return {
        "data": stream.data,
        "change": stream.change,
        "seed": stream.seed,
        "contender": result.case.contender,
        "before": round(result.before, 4),
        "lowest": round(result.lowest, 4),
        "after": round(result.after, 4),
        "back_after": result.back_after(result.before),
    }


def table(results: Sequence[Result]) -> Table:
    """One row per change and contender: means over seeds."""
    columns = ("data", "change", "contender", "before", "lowest", "after", "until back", f"until {REFERENCE}'s")
    shown = Table(*columns, title="Accuracies, and samples until 95 % is back")
    earlier = _earlier(results)
    for data, change, contender in itertools.product(*_names(results), CONTENDERS):
        key = (data, change, contender)
        some = [r for r in results if (r.case.stream.data, r.case.stream.change, r.case.contender) == key]
        if not some:
            continue
        means = [np.mean([getattr(result, name) for result in some]) for name in ("before", "lowest", "after")]
        of_reference = [earlier[result.case.stream] for result in some]
        back = (_back(some, [result.before for result in some]), _back(some, of_reference))
        shown.add_row(*key, *[f"{mean:.3f}" for mean in means], *back)
    return shown


def totals(results: Sequence[Result]) -> Table:
    """One row per contender: means over all streams, and paired differences to `constant`."""
    shown = Table("contender", "until back", "difference", "never", "after", "difference", title="All streams")
    for contender in CONTENDERS:
        some = _of(results, contender)
        back = _difference(results, contender, lambda result: result.until_back(result.before))
        after = _difference(results, contender, lambda result: result.after)
        shown.add_row(
            contender,
            f"{_until_back(some):.0f}",
            _with_error(*back, digits=0),
            f"{_never(some)} of {len(some)}",
            f"{np.mean([result.after for result in some]):.3f}",
            _with_error(*after, digits=3),
        )
    return shown


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """The JSON of the last line."""
    by_name = {contender: _of(results, contender) for contender in CONTENDERS}
    earlier = _earlier(results)
    return {
        "seeds": sorted({result.case.stream.seed for result in results}),
        "streams": len(earlier),
        "samples_until_back": {name: round(_until_back(some)) for name, some in by_name.items()},
        f"samples_until_back_to_{REFERENCE}": {
            name: round(float(np.mean([result.until_back(earlier[result.case.stream]) for result in some])))
            for name, some in by_name.items()
        },
        "never": {name: _never(some) for name, some in by_name.items()},
        "accuracy_after": {
            name: round(float(np.mean([result.after for result in some])), 4) for name, some in by_name.items()
        },
    }


def _of(results: Sequence[Result], contender: str) -> list[Result]:
    return [result for result in results if result.case.contender == contender]


def _names(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """Names of data sets and changes."""
    streams = [result.case.stream for result in results]
    return sorted({stream.data for stream in streams}), sorted({stream.change for stream in streams})


def _earlier(results: Sequence[Result]) -> dict[Stream, float]:
    """Accuracy of `constant` before the change, by stream."""
    return {result.case.stream: result.before for result in _of(results, REFERENCE)}


def _back(results: Sequence[Result], earlier: Sequence[float]) -> str:
    """Mean, and the number of runs that never recovered."""
    pairs = list(zip(results, earlier, strict=True))
    mean = np.mean([result.until_back(accuracy) for result, accuracy in pairs])
    never = sum(result.back_after(accuracy) is None for result, accuracy in pairs)
    return f"{mean:.0f}" + (f" ({never} never)" if never else "")


def _until_back(results: Sequence[Result]) -> float:
    """Mean over runs, each relative to its own `before`."""
    return float(np.mean([result.until_back(result.before) for result in results]))


def _never(results: Sequence[Result]) -> int:
    return sum(result.back_after(result.before) is None for result in results)


def _difference(
    results: Sequence[Result], contender: str, value: Callable[[Result], float]
) -> tuple[float, float | None]:
    """Difference to `constant`: mean, and standard error over seeds if there are at least two."""
    of_reference = {result.case.stream: value(result) for result in _of(results, REFERENCE)}
    by_seed: dict[int, list[float]] = {}
    for result in _of(results, contender):
        stream = result.case.stream
        by_seed.setdefault(stream.seed, []).append(value(result) - of_reference[stream])
    means = [float(np.mean(differences)) for differences in by_seed.values()]
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else None
    return float(np.mean(means)), error


def _with_error(mean: float, error: float | None, *, digits: int) -> str:
    return f"{mean:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def main() -> None:
    """Print a JSON line per run, two tables, and a JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed of one change of digits, shorter")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2, help="processes with one thread each")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + (1 if options.quick else options.seeds))
    lengths = QUICK_LENGTHS if options.quick else LENGTHS

    results = []
    for result in in_pool(play, cases(seeds, lengths, quick=options.quick), options.jobs):
        results.append(result)
        print(json.dumps(line(result)), flush=True)
    console = Console(width=160)
    console.print(table(results))
    console.print(totals(results))
    print(json.dumps(summary(results)))


if __name__ == "__main__":
    main()
