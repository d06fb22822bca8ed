"""After an abrupt change: how many samples until 95 % of the earlier accuracy is back, and what brings it sooner?

Each run is a whole learner on a stream of `drift.py` that changes once (`permute`, `labels`, and `rotate` where there
are pixels), with 5 % of late labels. The contenders learn the same stream, in one step a micro-batch:

    constant  one teacher of a constant horizon (100 steps, since step 1,000), always served; no guard, no reaction
    shipped   as by default: the guard is on, labels elect who is served, the teacher or its label-only twin, and an
              alarm makes the teacher's horizon short, and its targets earn their trust anew
    alarm     as shipped, but an alarm is only told
    bank      as shipped, and averages of 10 and 33 steps stand for election too
    reset     as constant, but every 1,000 steps the learner goes back to what it was after the first 1,000
    restart   as constant, but every 1,000 steps the learner goes back to its random weights of the beginning

The last two are the rival of Press et al. (2023, "RDumb: A simple approach that questions our progress in continual
test-time adaptation"), who reset to pre-trained weights every 1,000 steps. A stream has none, so there are both things
that could stand for them: what a first stretch as long as a period has taught, which after a change is of the world
before, as theirs is; and nothing at all, which owes no world anything but has to be taught again by the labelled
memory. All that the learner holds goes back: student, teacher, optimizer, input statistics, its place in the ramps.
The labelled memory and the number of the step stay. The change comes halfway between two resets, as it would in the
mean; two whole periods follow, with two resets, so that the accuracy over all of them has its due share of both.

Accuracies are of all samples, as they come, by whoever is in office in the learner at that step; a server would have
answered by an older teacher while the guard holds publication back. `before` is that of the 1,000 samples up to the
change, `lowest` that of the worst 1,000 in a row wholly after it, `after` that of all samples after it. `until back`
counts samples from the change to the end of the first 1,000 with 95 % of the contender's own `before`; one that was
worse before has less to come back to, so the next column is the same for 95 % of what `constant` had. A stream that
ended before counts with all of its samples. Differences to `constant` are paired by stream, with the standard error of
the means of the seeds.

Prediction, written before the first run, when what is `alarm` now was shipped, and its reaction now was a contender
of its own: `constant` is back after 24,000 samples in the mean (half of them wait for labels), later where the labels
change, since the memory contradicts them. The horizon is short beside the labels' delay, so it matters little: `bank`
and `shipped` are back 10 % sooner than `constant`, `alarm` 5 % (by its twin). `reset` is back 15 % later, `restart`
10 %. `after` is .01 to .02 above `constant` for `shipped`, `bank` and `alarm`, and .03 below it for both resets.

Run: python benchmarks/recovery.py [--quick] [--seeds N] [--first-seed N] [--jobs N]. A line of JSON for each run as it
ends, so that one that is cut short is not lost; two tables; the last line is JSON.
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
from streamlearn.loop import Parts, StepReport
from streamlearn.records import Array

DELAY = "geometric:9600"
"""Of labels, in samples: 300 steps in the mean."""
BACK_AT, WINDOW = 0.95, 1000
WHOLE_STEPS = -(-WINDOW // FRESH)
"""From the change to the first window that is wholly after it."""
CHANGES: Mapping[str, Sequence[Change]] = {"digits": ("permute", "labels", "rotate"), "segments": ("permute", "labels")}
"""By data set."""

Settings = Mapping[str, Mapping[str, Any]]
PLAIN: Settings = {
    "bank": {"serve": "teacher"},
    "guard": {"on": False},
    "drift": {"reaction": "alarm"},
}
CONTENDERS: Mapping[str, Settings] = {
    "constant": PLAIN,
    "shipped": {},
    "alarm": {"drift": {"reaction": "alarm"}},
    "bank": {"bank": {"decays": [0.9, 0.97]}},
    "reset": PLAIN,
    "restart": PLAIN,
}
"""By name, what is not as by default."""
REFERENCE = "constant"


@dataclass(frozen=True)
class Lengths:
    """In steps."""

    reset_every: int
    change_step: int
    steps: int


LENGTHS, QUICK_LENGTHS = Lengths(1000, 1500, 3500), Lengths(120, 180, 420)


@dataclass(frozen=True)
class Case:
    """One run to make."""

    stream: Stream
    contender: str
    reset_every: int
    """In steps, where the contender is one that goes back."""


@dataclass(frozen=True)
class Result:
    """What one run has come to."""

    case: Case
    before: float
    """Accuracy over the window that ends with the change."""
    windows: tuple[float, ...]
    """Accuracy over each window that is wholly after it, one a step."""
    after: float
    """Accuracy over all samples since the change."""

    @property
    def lowest(self) -> float:
        """Accuracy over the worst window."""
        return min(self.windows)

    def back_after(self, earlier: float) -> int | None:
        """Samples from the change until a window has 95 % of `earlier`; None: not until the end."""
        for number, accuracy in enumerate(self.windows):
            if accuracy >= BACK_AT * earlier:
                return (WHOLE_STEPS + number) * FRESH
        return None

    def until_back(self, earlier: float) -> int:
        """The same, and all samples since the change where it is never."""
        stream, found = self.case.stream, self.back_after(earlier)
        return (stream.steps - stream.change_step) * FRESH if found is None else found


class Following:
    """Collects accuracies of whoever is served, while the stream runs."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._before = 0.0
        self._windows: list[float] = []
        self._right_at_change = self._scored_at_change = 0
        self._right = self._scored = 0

    def __call__(self, oracle: Prequential, step: int) -> None:
        """After each step that had fresh samples."""
        since = step - self._case.stream.change_step
        if since < 0:
            return
        accuracy = oracle.windowed("teacher") or 0.0
        self._scored, self._right = oracle.scored, round((oracle.cumulative("teacher") or 0.0) * oracle.scored)
        if since == 0:
            self._before = accuracy
            self._right_at_change, self._scored_at_change = self._right, self._scored
        elif since >= WHOLE_STEPS:
            self._windows.append(accuracy)

    def result(self) -> Result:
        """Of the whole stream."""
        right, scored = self._right - self._right_at_change, self._scored - self._scored_at_change
        return Result(self._case, self._before, tuple(self._windows), right / scored)


class Resetting:
    """Makes a learner what it was, every so many steps: what `kept` is, or else what it is when first asked."""

    def __init__(self, every: int, kept: Mapping[str, Array] | None = None) -> None:
        self._every, self._kept = every, kept

    def __call__(self, learner: Learner, step: int) -> None:
        """After each step. The learner's own count of steps goes on, since the loop and its journal go by it."""
        if step % self._every:
            return
        if self._kept is None:
            self._kept = learner.state()
        else:
            learner.load_state({**self._kept, "learner.step": np.array(step, np.int64)})


def make_resetting(case: Case, learning: Learning) -> Resetting | None:
    """Of the contenders that go back."""
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

    def hook(parts: Parts, report: StepReport, _folder: Path) -> None:
        if not report.fresh:
            return  # labels that were left at the end
        following(parts.board.oracle, report.step)
        if resetting is not None:
            resetting(parts.learner, report.step)

    with run(learning, events(stream, data), hook):
        return following.result()


def cases(seeds: Sequence[int], lengths: Lengths, *, quick: bool) -> list[Case]:
    """All runs, seed by seed."""
    assert lengths.change_step % lengths.reset_every, "a reset at the change itself would be a coincidence, or luck"
    changed = [(data, change) for data, changes in CHANGES.items() for change in changes]
    return [
        Case(Stream(data, change, DELAY, seed, lengths.change_step, lengths.steps), contender, lengths.reset_every)
        for seed, (data, change), contender in itertools.product(seeds, changed[:1] if quick else changed, CONTENDERS)
    ]


def line(result: Result) -> dict[str, Any]:
    """One run, ready for JSON."""
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
    """A row for each change and contender: means over seeds."""
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
    """A row for each contender: means over all streams, and differences to `constant` on the same ones."""
    shown = Table("contender", "until back", "difference", "never", "after", "difference", title="All streams")
    for contender in CONTENDERS:
        some = _of(results, contender)
        back = _difference(results, contender, lambda result: result.until_back(result.before))
        after = _difference(results, contender, lambda result: result.after)
        shown.add_row(
            contender,
            f"{_until_back(some):.0f}",
            _told(*back, digits=0),
            f"{_never(some)} of {len(some)}",
            f"{np.mean([result.after for result in some]):.3f}",
            _told(*after, digits=3),
        )
    return shown


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """The last line."""
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
    """Of data sets and changes."""
    streams = [result.case.stream for result in results]
    return sorted({stream.data for stream in streams}), sorted({stream.change for stream in streams})


def _earlier(results: Sequence[Result]) -> dict[Stream, float]:
    """What the contender that all are held against had before the change, by stream."""
    return {result.case.stream: result.before for result in _of(results, REFERENCE)}


def _back(results: Sequence[Result], earlier: Sequence[float]) -> str:
    """Mean, and how many were never back."""
    pairs = list(zip(results, earlier, strict=True))
    mean = np.mean([result.until_back(accuracy) for result, accuracy in pairs])
    never = sum(result.back_after(accuracy) is None for result, accuracy in pairs)
    return f"{mean:.0f}" + (f" ({never} never)" if never else "")


def _until_back(results: Sequence[Result]) -> float:
    """Mean, each to its own accuracy before."""
    return float(np.mean([result.until_back(result.before) for result in results]))


def _never(results: Sequence[Result]) -> int:
    return sum(result.back_after(result.before) is None for result in results)


def _difference(
    results: Sequence[Result], contender: str, value: Callable[[Result], float]
) -> tuple[float, float | None]:
    """Of a contender to the one that all are held against: mean, and standard error over seeds where there are two."""
    of_reference = {result.case.stream: value(result) for result in _of(results, REFERENCE)}
    by_seed: dict[int, list[float]] = {}
    for result in _of(results, contender):
        stream = result.case.stream
        by_seed.setdefault(stream.seed, []).append(value(result) - of_reference[stream])
    means = [float(np.mean(differences)) for differences in by_seed.values()]
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else None
    return float(np.mean(means)), error


def _told(mean: float, error: float | None, *, digits: int) -> str:
    return f"{mean:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def main() -> None:
    """Print a line of JSON for each run, two tables, and one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed of one change of digits, much shorter")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
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
