"""`streamlearn simulate`: a labelled data set into the log that the config names, with a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import threading
import zlib
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from streamlearn.app.log import make_topics, open_log
from streamlearn.config import Config
from streamlearn.lab.datasets import load
from streamlearn.lab.delays import parse_delay
from streamlearn.lab.drift import parse_drift
from streamlearn.lab.stream import Counts, Order, StreamPlan, simulate


def run_simulation(
    config: Config,
    dataset: str,
    stopping: threading.Event,
    *,
    rate: float | None,
    label_delay: str,
    drift: str,
    limit: int | None,
    order: str,
    seed: int,
    id_prefix: str | None = None,
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
        order=cast(Order, order),  # the plan checks it
        seed=seed,
        id_prefix=_prefix(loaded.name, order, drift, seed) if id_prefix is None else id_prefix,
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
        samples = config.log.topics.samples
        if there := sum(log.end_offsets(samples).values()) - sum(log.beginning_offsets(samples).values()):
            console.print(
                f"{samples} holds {there} records already: where one has the same id "
                f"({stream.id_prefix}0, …) it is not learned again, and labels are of it; --id-prefix gives others",
                highlight=False,
            )
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


def _prefix(name: str, order: str, drift: str, seed: int) -> str:
    """Of ids, which are the numbers of samples: another seed, order or drift sends other rows under each number."""
    changed = [f"seed{seed}"] if seed else []
    if (order, drift) != ("shuffle", "none"):
        changed.append(f"{zlib.crc32(f'{order} {drift}'.encode()):08x}")
    return "".join(f"{part}-" for part in (name, *changed))
