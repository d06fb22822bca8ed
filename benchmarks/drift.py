"""Measures the lead of the label-free drift alarms over the error alarm when labels are late, and their false alarms.

Each run is a whole learner with default settings, except for one step per micro-batch, on one stream of small tables
that changes once, in the middle:

    permute     permute the features
    rotate      rotate images by 90 degrees
    noise       add as much noise as there is signal
    prior       nine samples of ten are of one class
    labels      permute the classes; inputs stay the same, so no label-free alarm can detect it
    stationary  no change: every alarm is false

5 % of the samples get a label, 5,000 or 9,600 samples later (156 or 300 steps), constant or geometric. Alarms are given
as steps from the change to the first alarm. The lead is that of `error` minus the first label-free one; negative if the
errors came first. A source without an alarm until the end missed the change. `recovery.py` measures what follows.

Run: python benchmarks/drift.py [--quick] [--seeds N] [--first-seed N] [--jobs N]. Prints a table; the last line is
JSON. The constants of `judge/cusum.py` and `judge/inputs.py` were chosen on seeds 0 to 2: report on others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from offline import Data, Event, Floats, Learning, in_pool, median, read, run
from rich.console import Console
from rich.table import Table

from streamlearn.judge.drift import SOURCES, Source
from streamlearn.lab.delays import parse_delay
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport

FRESH, LABEL_SHARE = 32, 0.05
CHANGE_STEP, STEPS = 1000, 1800
QUICK_CHANGE_STEP, QUICK_STEPS = 800, 1400
POLL_STEPS = 20
LABEL_FREE: tuple[Source, ...] = ("inputs", "disagreement", "uncertainty")
PRIOR = 0.9
DATA = ("digits", "segments", "moons")
DELAYS = ("5000", "geometric:5000", "9600", "geometric:9600")
Change = Literal["permute", "rotate", "noise", "prior", "labels", "stationary"]
INPUTS_CHANGE: tuple[Change, ...] = ("permute", "rotate", "noise")
"""Changes that a label-free alarm can detect."""
Rng = np.random.Generator


@dataclass(frozen=True)
class Stream:
    """A stream that changes once."""

    data: str
    change: Change
    delay: str
    """Label delay in samples."""
    seed: int
    change_step: int
    steps: int


@dataclass(frozen=True)
class Result:
    """The result of one run."""

    stream: Stream
    alarms: dict[Source, list[int]]
    """Steps of all alarms."""

    def after(self, sources: Iterable[Source]) -> int | None:
        """Steps from the change to the first alarm of `sources`."""
        steps = [step for source in sources for step in self.alarms[source] if step > self.stream.change_step]
        return min(steps) - self.stream.change_step if steps else None

    @property
    def lead(self) -> int | None:
        """Steps from the first label-free alarm to the error alarm; None if one of them missed."""
        error, free = self.after(["error"]), self.after(LABEL_FREE)
        return None if error is None or free is None else error - free


def events(stream: Stream, data: Data) -> Iterator[Event]:
    """The events of a stream."""
    rng = np.random.default_rng((stream.seed, 12, DELAYS.index(stream.delay)))
    change, rename = _change(stream.change, data, rng)
    count, at = stream.steps * FRESH, stream.change_step * FRESH
    delays = parse_delay(stream.delay).draw(count, rng).tolist()
    usual, of_one = rng.integers(0, len(data.y), count), np.flatnonzero(data.y == int(rng.integers(data.classes)))
    for number in range(count):
        changed = number >= at
        row = int(usual[number])
        if changed and stream.change == "prior" and rng.random() < PRIOR:
            row = int(rng.choice(of_one))
        x, y = data.x[row], int(data.y[row])
        if changed:
            x, y = change(x), int(rename[y])
        yield Event(x, y, y if rng.random() < LABEL_SHARE else None, delays[number])


def _change(kind: Change, data: Data, rng: Rng) -> tuple[Callable[[Floats], Floats], list[int]]:
    """The change of the features, and the new index of each class."""
    width, classes = data.x.shape[1], list(range(data.classes))
    if kind == "permute":
        order = np.roll(np.arange(width), 1) if width == 2 else rng.permutation(width)
        return lambda x: x[order], classes
    if kind == "rotate":
        side = round(width**0.5)
        return lambda x: np.rot90(x.reshape(side, side)).reshape(-1).copy(), classes
    if kind == "noise":
        # Constant pixels get noise as well.
        std = data.x.std() if data.name == "digits" else data.x.std(axis=0)
        return lambda x: (x + rng.normal(0.0, 1.0, width) * std).astype(np.float32), classes
    if kind == "labels":
        return lambda x: x, classes[1:] + classes[:1]
    return lambda x: x, classes


class Following:
    """Collects alarms while the stream runs."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._alarms: dict[Source, set[int]] = {source: set() for source in SOURCES}

    def __call__(self, loop: TrainingLoop, report: StepReport, _folder: Path) -> None:
        """Record the alarms of one step."""
        if report.step % POLL_STEPS == 0 or report.step == self._stream.steps:
            reports = loop.guarding.report().drift
            for source, alarms in self._alarms.items():
                alarms.update(reports[source].last_alarm_steps)

    def result(self) -> Result:
        """The result of the whole stream."""
        return Result(self._stream, {source: sorted(steps) for source, steps in self._alarms.items()})


def play(stream: Stream) -> Result:
    """One learner on one stream."""
    data, following = read(stream.data, stream.seed), Following(stream)
    learning = Learning(data, stream.seed, fresh=FRESH)
    with run(learning, events(stream, data), following):
        return following.result()


def streams(seeds: Sequence[int], change_step: int, steps: int, *, quick: bool) -> list[Stream]:
    """All runs."""
    found: list[Stream] = []
    for seed in seeds:
        for data in DATA[:1] if quick else DATA:
            changes: list[Change] = ["permute", "noise", "prior", "labels", "stationary"]
            changes += ["rotate"] if data == "digits" else []
            for change in changes:
                delays = DELAYS[:2] if quick else DELAYS
                found += [Stream(data, change, delay, seed, change_step, steps) for delay in delays]
    return found


def lead_table(results: Sequence[Result]) -> Table:
    """One row per change and delay: median steps from the change to the first alarm of each source."""
    shown = Table("data", "change", "labels after", *SOURCES, "lead, steps", "lead, samples", title="First alarms")
    for key, some in _grouped(results).items():
        if key[1] == "stationary":
            continue
        lead = median([result.lead for result in some])
        cells = [_cell([result.after([source]) for result in some]) for source in SOURCES]
        leads = ("-", "-") if lead is None else (f"{lead:.0f}", f"{lead * FRESH:.0f}")
        shown.add_row(*key, *cells, *leads)
    return shown


def _cell(steps: Sequence[int | None]) -> str:
    """Median, and the number of missed changes."""
    missed = sum(step is None for step in steps)
    middle = median(steps)
    return " ".join(
        ["-" if middle is None else f"{middle:.0f}", *([f"({missed} of {len(steps)} missed)"] if missed else [])]
    )


def _grouped(results: Sequence[Result]) -> dict[tuple[str, str, str], list[Result]]:
    grouped: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        stream = result.stream
        grouped.setdefault((stream.data, stream.change, stream.delay), []).append(result)
    return dict(sorted(grouped.items()))


def summary(results: Sequence[Result]) -> dict[str, object]:
    """The JSON of the last line."""
    still = [result for result in results if result.stream.change == "stationary"]
    moved = [result for result in results if result.stream.change != "stationary"]
    steps = sum(result.stream.steps for result in still)
    seen: dict[str, tuple[Source, ...]] = {source: (source,) for source in SOURCES}
    seen["label_free"] = LABEL_FREE
    leads = [result.lead for result in moved]
    return {
        "changes": len(moved),
        "median_lead_steps": median(leads),
        "median_lead_steps_by_delay": {
            delay: median([result.lead for result in moved if result.stream.delay == delay]) for delay in DELAYS
        },
        "median_lead_steps_where_inputs_change": median([r.lead for r in moved if r.stream.change in INPUTS_CHANGE]),
        "label_free_first": sum(lead is not None and lead > 0 for lead in leads),
        "label_free_only": sum(r.after(LABEL_FREE) is not None and r.after(["error"]) is None for r in moved),
        "error_first_or_only": sum(
            (lead is not None and lead <= 0) or (r.after(["error"]) is not None and r.after(LABEL_FREE) is None)
            for r, lead in zip(moved, leads, strict=True)
        ),
        "missed": {name: sum(r.after(sources) is None for r in moved) for name, sources in seen.items()},
        "control_steps": steps,
        "false_alarms": {source: sum(len(result.alarms[source]) for result in still) for source in SOURCES},
    }


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed of digits, shorter, with two delays")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="processes with one thread each")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + (1 if options.quick else options.seeds))
    change_step, steps = (QUICK_CHANGE_STEP, QUICK_STEPS) if options.quick else (CHANGE_STEP, STEPS)

    results = list(in_pool(play, streams(seeds, change_step, steps, quick=options.quick), options.jobs))
    Console(width=160).print(lead_table(results))
    print(json.dumps(summary(results)))


if __name__ == "__main__":
    main()
