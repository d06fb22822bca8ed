"""Counts hostile streams that end with a served teacher at chance, while the same labels alone teach more.

Each run is a whole learner on a whole stream. At the end the teacher that a server loads is compared with the twin,
which learned the same labelled rows without consistency. Chance is the share of the largest class among held-out
samples (of classes that had labels), plus three standard errors. 3 % of the samples get a label, 500 samples later.

    class-sorted    one class at a time, including its labels
    one-class       a usual quarter, then only one class
    wrong-labels    40 % of the labels are of another class
    biased-labels   samples of all classes, nine labels of ten of one class
    no-labels       labels end, then 50,000 samples without labels
    nan-burst       NaN in binary and null in JSON; must only cause dead letters
    wild-burst      floats of 1e19, near the maximum of a record, with labels
    drifted-units   floats of 1e15, with labels: finite, but plain running statistics overflow
    constant        a usual quarter, then one constant input with the labels of the true samples

Conditions: the recipe that fits; a consistency weight a hundred times too large (`heavy`, and `heavy-kl`, whose
gradient is unbounded); a learning rate thirty times too large (`hot`). The same streams without the guard show its
effect. Digits are sent as a table and, on streams without a burst, as images, since the recipes differ.

Run: python benchmarks/hostile.py [--quick] [--guarded] [--steps N] [--seeds N] [--first-seed N] [--jobs N]
    [--stream NAME ...]
Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from offline import Data, Event, Learning, accuracy, chance, in_pool, published, read, run
from rich.console import Console
from rich.table import Table

from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport

LABEL_SHARE, DELAY, WRONG_SHARE = 0.03, 500, 0.4
BURST, RUN_LENGTH = 500, 2000
LENGTH, DROUGHT = 30_000, 50_000
QUICK_LENGTH, QUICK_DROUGHT = 15_000, 20_000
LOOK_EVERY_STEPS = 25
"""Samples between two measurements of the served teacher."""

Rng = np.random.Generator


@dataclass(frozen=True)
class Lengths:
    """Lengths in samples."""

    whole: int
    drought: int


def _usual(data: Data, rng: Rng, count: int, *, share: float = LABEL_SHARE) -> Iterator[Event]:
    """Random samples, a share of them labelled."""
    for _ in range(count):
        row = int(rng.integers(len(data.y)))
        yield _event(data, rng, row, share=share)


def _event(data: Data, rng: Rng, row: int, *, share: float = LABEL_SHARE) -> Event:
    y = int(data.y[row])
    return Event(data.x[row], y, y if rng.random() < share else None, DELAY)


def class_sorted(data: Data, rng: Rng, lengths: Lengths) -> Iterator[Event]:
    """One class after the other, repeatedly."""
    for turn in range(max(lengths.whole // RUN_LENGTH, data.classes)):
        rows = np.flatnonzero(data.y == turn % data.classes)
        for row in rng.choice(rows, RUN_LENGTH):
            yield _event(data, rng, int(row))


def one_class(data: Data, rng: Rng, lengths: Lengths) -> Iterator[Event]:
    """After a quarter, only the last class."""
    yield from _usual(data, rng, lengths.whole // 4)
    rows = np.flatnonzero(data.y == data.classes - 1)
    for row in rng.choice(rows, lengths.whole - lengths.whole // 4):
        yield _event(data, rng, int(row))


def wrong_labels(data: Data, rng: Rng, lengths: Lengths) -> Iterator[Event]:
    """Usual samples with wrong labels."""
    for event in _usual(data, rng, lengths.whole):
        wrong = event.label is not None and rng.random() < WRONG_SHARE
        other = (event.true_class + int(rng.integers(1, data.classes))) % data.classes
        yield event._replace(label=other) if wrong else event


def biased_labels(data: Data, rng: Rng, lengths: Lengths) -> Iterator[Event]:
    """The usual number of labels, nine of ten of class 0."""
    of_one, of_others = 0.9 * data.classes * LABEL_SHARE, 0.1 * data.classes / (data.classes - 1) * LABEL_SHARE
    for row in rng.integers(len(data.y), size=lengths.whole).tolist():
        yield _event(data, rng, row, share=of_others if data.y[row] else of_one)


def no_labels(data: Data, rng: Rng, lengths: Lengths) -> Iterator[Event]:
    """Usual samples, then no label until the end."""
    yield from _usual(data, rng, QUICK_LENGTH // 2)
    yield from _usual(data, rng, lengths.drought, share=0.0)


def nan_burst(data: Data, rng: Rng, lengths: Lengths) -> Iterator[Event]:
    """Invalid records: NaN and infinity in binary, null in JSON."""
    width = data.x.shape[1]
    null = json.dumps({"x": [None] * width}).encode()
    kinds = (np.full(width, np.nan, "<f4").tobytes(), np.full(width, np.inf, "<f4").tobytes(), null)
    for number, event in enumerate(_usual(data, rng, lengths.whole)):
        yield event._replace(x=kinds[number % 3]) if _in_burst(number, lengths) else event


def wild_burst(data: Data, rng: Rng, lengths: Lengths) -> Iterator[Event]:
    """A burst with every feature at +-1e19."""
    return _with_burst(data, rng, lengths, 1e19)


def drifted_units(data: Data, rng: Rng, lengths: Lengths) -> Iterator[Event]:
    """A burst with every feature at +-1e15."""
    return _with_burst(data, rng, lengths, 1e15)


def _with_burst(data: Data, rng: Rng, lengths: Lengths, size: float) -> Iterator[Event]:
    for number, event in enumerate(_usual(data, rng, lengths.whole)):
        wild = (size * rng.choice([-1.0, 1.0], data.x.shape[1])).astype(np.float32)
        yield event._replace(x=wild) if _in_burst(number, lengths) else event


def _in_burst(number: int, lengths: Lengths) -> bool:
    return 0 <= number - lengths.whole // 2 < BURST


def constant(data: Data, rng: Rng, lengths: Lengths) -> Iterator[Event]:
    """Constant inputs with the labels of the true samples."""
    stuck = np.full(data.x.shape[1:], data.x.mean(), np.float32)
    for number, event in enumerate(_usual(data, rng, lengths.whole)):
        yield event if number < lengths.whole // 4 else event._replace(x=stuck)


Scenario = Callable[[Data, Rng, Lengths], Iterator[Event]]
STREAMS: Mapping[str, Scenario] = {
    "class-sorted": class_sorted,
    "one-class": one_class,
    "wrong-labels": wrong_labels,
    "biased-labels": biased_labels,
    "no-labels": no_labels,
    "nan-burst": nan_burst,
    "wild-burst": wild_burst,
    "drifted-units": drifted_units,
    "constant": constant,
}
CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "heavy": {"options": {"consistency": "mse", "consistency_weight": 500.0}},
    "heavy-kl": {"options": {"consistency": "kl", "consistency_weight": 300.0}},
    "hot": {"learning_rate": 0.1},
}
ELSEWHERE = {
    "moons": ("class-sorted", "wild-burst", "drifted-units"),
    "shuttle": ("no-labels", "constant"),
    "digit-images": ("class-sorted", "one-class", "wrong-labels", "biased-labels", "no-labels", "constant"),
}
"""Streams of data sets other than digits."""


@dataclass(frozen=True)
class Case:
    """One run."""

    data: str
    stream: str
    condition: str
    seed: int
    guard: bool
    lengths: Lengths
    steps: int = 1
    """Steps per micro-batch."""


@dataclass(frozen=True)
class Seen:
    """Accuracies on held-out samples of classes with labels."""

    served: float
    """0 if nothing was published yet."""
    twin: float
    chance: float
    served_step: int


@dataclass(frozen=True)
class Result:
    """The result of one run."""

    case: Case
    seen: Seen
    """Scores at the end."""
    step: int
    skipped_steps: int
    longest_at_chance: int
    """Longest sequence of samples with the served teacher at chance and the twin above."""
    actions: dict[str, int]
    """Of the guard."""

    @property
    def at_chance(self) -> bool:
        """Whether the served teacher ends at chance while the twin does not."""
        return self.seen.twin > self.seen.chance >= self.seen.served

    @property
    def remedied(self) -> bool:
        """Whether the guard has changed weights."""
        return bool(self.actions["roll_back"] or self.actions["adopt_twin"])


class Looking:
    """Scores the served teacher during the stream and at the end."""

    def __init__(self, data: Data, fresh: float) -> None:
        """`fresh`: mean samples per step."""
        self._data, self._fresh = data, fresh
        self._at_chance = self.longest_at_chance = 0.0
        self.skipped_steps = 0
        self._labelled: set[int] = set()

    def __call__(self, loop: TrainingLoop, report: StepReport, folder: Path) -> None:
        """Record one step."""
        self._labelled |= {arrival.class_index for arrival in report.arrivals if arrival.example is not None}
        self.skipped_steps += loop.learner.health().skipped_in_a_row > 0
        if report.step % LOOK_EVERY_STEPS or not self._labelled or published(folder, self._data.schema) is None:
            return
        seen = self.compare(loop, folder)
        behind = seen.twin > seen.chance >= seen.served
        self._at_chance = self._at_chance + LOOK_EVERY_STEPS * self._fresh if behind else 0.0
        self.longest_at_chance = max(self.longest_at_chance, self._at_chance)

    def compare(self, loop: TrainingLoop, folder: Path) -> Seen:
        """Score served teacher and twin on held-out samples of classes with labels."""
        data = self._data
        asked = np.isin(data.test_y, sorted(self._labelled))
        x, y = data.test_x[asked], data.test_y[asked]
        served, twin_B = published(folder, data.schema), loop.learner.classify(x).twin_B
        assert twin_B is not None
        right = 0.0 if served is None else accuracy(served.probabilities(x).argmax(axis=1), y)
        return Seen(right, accuracy(twin_B, y), chance(y), 0 if served is None else served.step)


def play(case: Case) -> Result:
    """One learner on one stream."""
    data, rng = read(case.data, case.seed), np.random.default_rng((case.seed, 11))
    settings = {"guard": {"on": case.guard}, "learn": CONDITIONS[case.condition], "batch": {"steps": case.steps}}
    learning = Learning(data, case.seed, settings=settings)
    looking = Looking(data, learning.fresh / case.steps)
    with run(learning, STREAMS[case.stream](data, rng, case.lengths), looking) as (loop, folder):
        accounts = loop.accounts
        if case.stream == "nan-burst":
            assert accounts.samples_dead_lettered == BURST, accounts
        return Result(
            case=case,
            seen=looking.compare(loop, folder),
            step=loop.learner.step,
            skipped_steps=looking.skipped_steps,
            longest_at_chance=round(looking.longest_at_chance),
            actions=loop.guarding.report().guard.actions,
        )


def cases(
    seeds: Sequence[int], lengths: Lengths, streams: Sequence[str], *, guards: Sequence[bool], steps: int
) -> list[Case]:
    """All runs."""
    sent = [("digits", stream) for stream in STREAMS]
    sent += [(data, stream) for data, some in ELSEWHERE.items() for stream in some]
    return [
        Case(data, stream, condition, seed, guard, lengths, steps)
        for guard, seed, (data, stream), condition in itertools.product(guards, seeds, sent, CONDITIONS)
        if stream in streams
    ]


def table(results: Sequence[Result]) -> Table:
    """One row per stream and condition: means over seeds with the guard; the last column without it."""
    shown = Table(
        "data", "stream", "condition", "chance", "served", "twin", "at chance", "longest", "skipped", "actions"
    )
    shown.add_column("served, no guard")
    grouped: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        case = result.case
        grouped.setdefault((case.data, case.stream, case.condition), []).append(result)
    for key in sorted(grouped):
        on = [result for result in grouped[key] if result.case.guard]
        off = [result for result in grouped[key] if not result.case.guard]
        actions = {name: sum(result.actions[name] for result in on) for name in on[0].actions if name != "keep_good"}
        shown.add_row(
            *key,
            f"{np.mean([result.seen.chance for result in on]):.3f}",
            f"{np.mean([result.seen.served for result in on]):.3f}",
            f"{np.mean([result.seen.twin for result in on]):.3f}",
            f"{sum(result.at_chance for result in on)} of {len(on)}",
            str(max(result.longest_at_chance for result in on)),
            f"{np.mean([result.skipped_steps / result.step for result in on]):.1%}",
            " ".join(f"{name} {count}" for name, count in actions.items() if count) or "-",
            f"{np.mean([result.seen.served for result in off]):.3f} ({sum(result.at_chance for result in off)})"
            if off
            else "-",
        )
    return shown


def summary(results: Sequence[Result], *, both: bool) -> dict[str, Any]:
    """The JSON of the last line."""
    on = [result for result in results if result.case.guard]
    off = [result for result in results if not result.case.guard]
    figures: dict[str, Any] = {
        "runs": len(on),
        "served_at_chance": sum(result.at_chance for result in on),
        "runs_remedied": sum(result.remedied for result in on),
        "twin_at_chance_too": sum(result.seen.twin <= result.seen.chance for result in on),
        "largest_loss_to_twin": round(max(result.seen.twin - result.seen.served for result in on), 4),
        "longest_at_chance_samples": max(result.longest_at_chance for result in on),
    }
    if both:
        figures["served_at_chance_without_guard"] = sum(result.at_chance for result in off)
        figures["largest_loss_to_twin_without_guard"] = round(
            max(result.seen.twin - result.seen.served for result in off), 4
        )
    return figures


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, shorter streams, no runs without the guard")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes with one thread each")
    parser.add_argument("--steps", type=int, default=1, help="steps per micro-batch; the default of the daemon is 4")
    parser.add_argument("--guarded", action="store_true", help="no runs without the guard")
    parser.add_argument("--stream", choices=sorted(STREAMS), action="append", help="default: all")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + (1 if options.quick else options.seeds))
    lengths = Lengths(QUICK_LENGTH, QUICK_DROUGHT) if options.quick else Lengths(LENGTH, DROUGHT)
    guards = [True] if options.quick or options.guarded else [True, False]

    chosen = cases(seeds, lengths, options.stream or list(STREAMS), guards=guards, steps=options.steps)
    results = list(in_pool(play, chosen, options.jobs))
    Console(width=180).print(table(results))
    for result in results:
        if result.at_chance and result.case.guard:
            print("at chance:", asdict(result))
    print(json.dumps(summary(results, both=len(guards) > 1)))


if __name__ == "__main__":
    main()
