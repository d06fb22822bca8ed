"""Progress bars on stderr, one per task."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bars:
    """Shows a bar for each task. A context manager.

    Attributes:
        console: prints above the bars.
    """

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.console = Console(stderr=True, highlight=False)
        self._progress = Progress(*columns, console=self.console)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars, as it is."""
        self.console.print(text, markup=False, soft_wrap=True)

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Update the bar of the task `what`; without a total it shows the count."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done)
