"""Measures how often the election promotes one of two equals, and how many labels it needs to promote a better one.

Compared with a z-test: a lead of more than 1.64 standard errors over the newest 500 labels, tested after each label.
Labels are simulated: exactly one candidate is right on a share `discordant` of them; `gap` is the mean difference in
accuracy between challenger and champion:

    equal       no difference: mean promotions per 10,000 labels
    from_start  the challenger is better from the first label on: labels until it is promoted
    reversal    the challenger was worse by the same gap for 10,000 labels: labels from then on

Run: python benchmarks/election.py [--quick] [--seeds N]. Prints median and 90th percentile over seeds, at most 20,000
labels; the last line is JSON. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from streamlearn.judge.election import LABELS, Election

MOST_LABELS = 20_000
EQUAL = (0.01, 0.1, 0.3)
"""Shares of discordant labels."""
BETTER = ((0.1, 0.02), (0.3, 0.02), (0.1, 0.05), (0.3, 0.05), (0.3, 0.1))
"""Shares of discordant labels, and gaps."""
Labels = npt.NDArray[np.bool_]
"""(N, 2): whether champion and challenger were right."""
Rule = Callable[[Labels], list[int]]
"""Returns the label numbers (from 1) after which the served candidate changes."""


def anytime(right_N2: Labels) -> list[int]:
    """The rule of `judge.election`."""
    election, champion, changes = Election(("a", "b"), window=10), 0, []
    for n, right in enumerate(right_N2, start=1):
        if (elected := election.update(champion, right)) != champion:
            champion = elected
            changes.append(n)
    return changes


def z_test(right_N2: Labels) -> list[int]:
    """A z-test over the newest 500 labels."""
    served, only, changes = 0, [0, 0], []
    window: deque[tuple[bool, bool]] = deque()
    for n, (first, second) in enumerate(right_N2.tolist(), start=1):
        window.append((first and not second, second and not first))
        only[0] += window[-1][0]
        only[1] += window[-1][1]
        if len(window) > 500:
            left = window.popleft()
            only[0] -= left[0]
            only[1] -= left[1]
        lead = only[1 - served] - only[served]
        variance = sum(only) - lead**2 / len(window)
        error = lead / math.sqrt(variance) if variance > 0.0 else math.inf
        if len(window) >= 30 and lead > 0 and error > 1.64:
            served = 1 - served
            changes.append(n)
    return changes


RULES: dict[str, Rule] = {"anytime": anytime, "z_test": z_test}


def labels(rng: np.random.Generator, count: int, discordant: float, gap: float) -> Labels:
    """`count` labels; where the candidates agree they are right in 8 of 10 cases."""
    alike = rng.random(count) >= discordant
    second = np.where(alike, rng.random(count) < 0.8, rng.random(count) < 0.5 + gap / (2 * discordant))
    return np.stack((np.where(alike, second, ~second), second), axis=1)


def promotions(rule: Rule, seeds: int, discordant: float) -> float:
    """Mean promotions per `LABELS` labels."""
    found = [len(rule(labels(np.random.default_rng(seed), LABELS, discordant, 0.0))) for seed in range(seeds)]
    return float(np.mean(found))


def delays(rule: Rule, seeds: int, discordant: float, gap: float, *, worse_before: int) -> tuple[int, int]:
    """Median and 90th percentile of the labels until the challenger is served."""
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        before = labels(rng, worse_before, discordant, -gap)
        after = labels(rng, MOST_LABELS, discordant, gap)
        changes = rule(np.concatenate((before, after)))
        early = sum(n <= worse_before for n in changes)
        served_before = early % 2  # the worse candidate was promoted by chance
        later = [n - worse_before for n in changes if n > worse_before]
        found.append(0 if served_before else later[0] if later else MOST_LABELS)
    return int(np.median(found)), int(np.quantile(found, 0.9))


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 seeds")
    parser.add_argument("--seeds", type=int, default=40)
    args = parser.parse_args()
    seeds = 4 if args.quick else args.seeds
    figures: dict[str, dict[str, object]] = {}
    table = Table("stream", *RULES, title=f"{seeds} seeds")
    for discordant in EQUAL:
        name = f"equal, {discordant:g} discordant: promotions per {LABELS:,} labels"
        figures[name] = {rule: promotions(run, seeds, discordant) for rule, run in RULES.items()}
    for discordant, gap in BETTER:
        for kind, worse_before in (("from_start", 0), ("reversal", 10_000)):
            name = f"{kind}, {discordant:g} discordant, gap {gap:g}: labels until promotion"
            figures[name] = {
                rule: delays(run, seeds, discordant, gap, worse_before=worse_before) for rule, run in RULES.items()
            }
    for name, found in figures.items():
        table.add_row(name, *(str(value) for value in found.values()))
    Console().print(table)
    print(json.dumps({"seeds": seeds, **figures}))


if __name__ == "__main__":
    main()
