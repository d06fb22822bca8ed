"""`streamlearn simulate`: a labelled data set into the log that the config names, with a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from streamlearn.config import Config
from streamlearn.daemon.wiring import make_topics, open_log
from streamlearn.simulate.datasets import load
from streamlearn.simulate.delays import parse_delay
from streamlearn.simulate.drift import parse_drift
from streamlearn.simulate.stream import Counts, StreamPlan, simulate


def run_simulation(
    config: Config,
    dataset: str,
    stopping: threading.Event,
    *,
    rate: float | None,
    label_delay: str,
    drift: str,
    limit: int | None,
    **plan: Any,
) -> Counts:
    """Stream until the data set ends or the event is set; what was appended is printed."""
    schema = config.schema_.build()
    loaded = load(dataset, limit=limit)
    stream = StreamPlan(
        dataset=loaded,
        schema=schema,
        delay=parse_delay(label_delay),
        drifts=parse_drift(drift),
        **plan,
    )
    console = Console(stderr=True)
    total = len(loaded.y) * stream.passes or None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with contextlib.closing(open_log(config)) as log, Progress(*columns, console=console) as bar:
        make_topics(log, config)
        task = bar.add_task(f"{dataset} to the {config.log.kind} log", total=total)
        counts = simulate(
            log,
            stream,
            topics=config.log.topics,
            rate=rate,
            stop=stopping.is_set,
            progress=lambda samples, _: bar.update(task, completed=samples),
        )
    console.print(
        f"{counts.samples} samples, {counts.labels} labels sent; {counts.labels_pending} labels were not due yet",
        highlight=False,
    )
    return counts
