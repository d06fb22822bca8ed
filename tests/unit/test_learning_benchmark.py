"""benchmarks/learning.py: the planned runs, existing results, and the report."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
CHANCES = {"moons": 0.5, "shuttle": 0.9}


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    """The benchmark and its report, which are not in the package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("learning"), importlib.import_module("learning_report")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def bench(modules: tuple[ModuleType, ModuleType]) -> ModuleType:
    return modules[0]


@pytest.fixture(scope="module")
def report(modules: tuple[ModuleType, ModuleType]) -> ModuleType:
    return modules[1]


def line(cell: str, run: str, seed: int, teacher: float, twin: float | None = None, **changes: Any) -> dict[str, Any]:
    """A result whose student is 0.01 below its teacher, with equal scores on all and on the last samples."""
    accuracy = {"teacher": teacher, "student": teacher - 0.01, "majority": 0.5, "no_change": 0.4}
    accuracy |= {} if twin is None else {"twin": twin}
    curve = {"teacher": [teacher] * 2, "twin": [twin] * 2}
    same = {"prequential": accuracy, "last": accuracy, "test": None, "samples": 5000, "curve": curve}
    return {"cell": cell, "run": run, "seed": seed, "recipe": "r", **same, **changes}


LINES = [
    line("moons/0.01/0", "default", 0, 0.90, 0.88),
    line("moons/0.01/0", "default", 1, 0.80, 0.81),
    line("moons/0.01/0", "plain", 0, 0.86),
    line("moons/0.01/0", "plain", 1, 0.76),
    line("moons/0.01/0", "four", 0, 0.87),
    line("moons/0.1/0", "four", 0, 0.91),
    line("moons/0.1/0", "default", 0, 0.90, 0.93),
    line("moons/1/0", "full", 0, 0.97),
]


class TestSummary:
    def test_gains_are_paired_by_seed_in_points(self, report: ModuleType) -> None:
        """+2 and -1 over the twin: mean 0.5, one win of two; the rival in `plain` is its student."""
        row = report.summary(LINES, CHANCES)["table"]["moons/0.01/0"]

        gain = row["gain_over_twin"]["prequential"]
        assert (gain["mean"], gain["by_seed"], gain["wins"], gain["of"]) == (0.5, [2.0, -1.0], 1, 2)
        assert gain["std"] == pytest.approx(4.5**0.5, abs=1e-3)
        assert row["gain_over_plain"]["prequential"]["by_seed"] == [5.0, 5.0]

    def test_the_gain_of_time_is_over_the_teacher_with_four_steps(self, report: ModuleType) -> None:
        """+3 and -1 points: the mean of the cells."""
        found = report.summary(LINES, CHANCES)

        assert (found["gain_of_time_points"], found["gain_of_time_points_last"]) == (1.0, 1.0)

    def test_other_seeds_are_not_compared(self, report: ModuleType) -> None:
        """They saw other streams."""
        lines = [line("moons/0.01/0", "default", 0, 0.9, 0.8), line("moons/0.01/0", "plain", 1, 0.5)]

        row = report.summary(lines, CHANCES)["table"]["moons/0.01/0"]

        assert (row["gain_over_plain"]["prequential"]["mean"], row["gain_over_plain"]["prequential"]["of"]) == (None, 0)

    def test_the_summary_has_the_worst_cell_and_mean_gains_with_few_labels(self, report: ModuleType) -> None:
        """The cell with 10 % labels is the worst, and is not in the mean gains."""
        found = report.summary(LINES, CHANCES)

        assert (found["cells"], found["worst_cell"], found["worst_cell_points"]) == (2, "moons/0.1/0", -3.0)
        assert (found["gain_over_twin_le_1pct"], found["gain_over_plain_le_1pct"]) == (0.5, 5.0)

    def test_the_upper_bound_applies_to_all_cells_of_its_data(self, report: ModuleType) -> None:
        """One run with all labels per data set and seed."""
        table = report.summary(LINES, CHANCES)["table"]

        assert [table[cell]["prequential"]["full"]["mean"] for cell in table] == [0.97, 0.97]

    @pytest.mark.parametrize(
        ("cell", "teacher", "expected"),
        [("moons/0.1/0", 0.52, 1), ("moons/0.1/0", 0.522, 0), ("shuttle/0.1/0", 0.91, 1), ("shuttle/0.1/0", 0.92, 0)],
    )
    def test_chance_is_the_largest_class_plus_three_standard_errors(
        self, report: ModuleType, cell: str, teacher: float, expected: int
    ) -> None:
        """With 5,000 samples: 0.5 + 0.0212, and 0.9 + 0.0127."""
        assert report.summary([line(cell, "default", 0, teacher, 0.9)], CHANCES)["runs_at_chance"] == expected

    def test_a_summary_without_runs_is_empty(self, report: ModuleType) -> None:
        """Before the first run."""
        found = report.summary([], CHANCES)

        assert (found["cells"], found["worst_cell_points"], found["gain_over_twin_le_1pct"]) == (0, None, None)


class TestReport:
    def test_text_around_the_table_is_kept(self, report: ModuleType, tmp_path: Path) -> None:
        """Also when it is written again."""
        page = tmp_path / "learning.md"
        page.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")

        report.write_report(LINES, CHANCES, tmp_path)
        once = page.read_text()
        report.write_report(LINES, CHANCES, tmp_path)

        assert page.read_text() == once
        assert (once.startswith("before\n"), once.endswith("after\n"), "old" in once) == (True, True, False)
        assert "| moons/0.01/0 | 85.0 | " in once
        assert json.loads((tmp_path / "learning.json").read_text()) == report.summary(LINES, CHANCES)
        assert "<svg" in (tmp_path / "learning-gain.svg").read_text()

    def test_a_page_without_markers_is_refused(self, report: ModuleType, tmp_path: Path) -> None:
        """Its text is not overwritten."""
        (tmp_path / "learning.md").write_text("mine\n")

        with pytest.raises(ValueError, match="wanted the lines"):
            report.write_report(LINES, CHANCES, tmp_path)

        assert (tmp_path / "learning.md").read_text() == "mine\n"


class TestResults:
    def test_an_existing_run_is_not_repeated(self, bench: ModuleType, tmp_path: Path) -> None:
        """Runs are identified by cell, run, seed and settings."""
        case = bench.Case("moons", 0.01, "0", "plain", 3)
        results = bench.Results(tmp_path / "made" / "results.jsonl")

        results.append(case, line(case.cell, "plain", 3, 0.9, recipe=case.recipe_hash))

        again = bench.Results(results.path)
        assert again.has(case)
        assert again.of([case]) == results.lines
        assert not again.has(bench.Case("moons", 0.01, "0", "plain", 4))
        assert not again.has(bench.Case("moons", 0.01, "0", "default", 3))
        assert not again.has(bench.Case("moons", 0.01, "0", "plain", 3, {"learn.ema_decay": 0.9}))

    def test_a_report_uses_the_newest_line_whatever_its_settings(self, bench: ModuleType, tmp_path: Path) -> None:
        """A change of a setting must not empty the report."""
        case = bench.Case("moons", 0.01, "0", "plain", 3)
        results = bench.Results(tmp_path / "results.jsonl")
        for teacher in (0.8, 0.9):
            results.append(case, line(case.cell, "plain", 3, teacher, recipe="earlier"))

        assert results.of([case]) == []
        assert [found["prequential"]["teacher"] for found in results.newest([case])] == [0.9]

    def test_a_recipe_is_written_once_in_full(self, bench: ModuleType, tmp_path: Path) -> None:
        """It resolves the hash, and lines stay short."""
        results = bench.Results(tmp_path / "results.jsonl")
        for seed in range(2):
            case = bench.Case("moons", 0.01, "0", "default", seed)
            results.append(case, line(case.cell, "default", seed, 0.9, recipe=case.recipe_hash))

        lines = [json.loads(text) for text in results.path.read_text().splitlines()]

        assert ["settings" in found for found in lines] == [True, False, False]
        assert lines[0]["settings"]["model"]["options"] == {"hidden": [64, 64]}

    def test_seed_threads_and_intervals_are_not_part_of_a_recipe(self, bench: ModuleType) -> None:
        """They do not affect the comparison."""
        one, other = (bench.Case("moons", 0.01, "0", "default", seed) for seed in (0, 1))

        assert one.recipe_hash == other.recipe_hash
        assert "seed" not in one.recipe["settings"]["learn"]

    def test_a_newer_setting_is_part_of_a_recipe_only_if_it_is_not_the_default(self, bench: ModuleType) -> None:
        """Older results keep their recipe."""
        plain, same, other = (
            bench.Case("moons", 0.01, "0", "default", 0, overrides)
            for overrides in ({}, {"learn.options.teacher_mode": "eval"}, {"learn.options.teacher_mode": "train"})
        )

        assert "teacher_mode" not in plain.recipe["settings"]["learn"]
        assert plain.recipe_hash == same.recipe_hash != other.recipe_hash

    def test_the_whole_table_is_665_runs_seed_by_seed(self, bench: ModuleType) -> None:
        """7 data sets, 3 rates, 2 delays and 5 seeds, three runs each; and the upper bounds."""
        cases = bench.all_cases(5, [])

        assert len(cases) == 7 * 3 * 2 * 5 * 3 + 7 * 5
        assert [case.seed for case in cases] == sorted(case.seed for case in cases)
        assert len({(case.cell, case.run, case.seed) for case in cases}) == len(cases)

    def test_a_search_uses_only_the_data_for_choosing_settings(self, bench: ModuleType) -> None:
        """With two seeds of Fashion-MNIST."""
        cases = bench.searched_cases(bench.grid("learn.options.consistency=kl learn.ema_decay=0.9|0.99"), [])

        assert {case.source for case in cases} == {"digits", "moons", "shuttle", "fashion"}
        assert {case.seed for case in cases if case.source == "fashion"} == {0, 1}
        assert cases[0].overrides == {"learn.options.consistency": "kl", "learn.ema_decay": 0.9}
        assert cases[1].overrides == {"learn.options.consistency": "kl", "learn.ema_decay": 0.99}

    def test_an_empty_recipe_is_the_shipped_one(self, bench: ModuleType) -> None:
        """It is the baseline of a search."""
        assert list(bench.grid("")) == [{}]
