"""`streamlearn simulate`: sends a labelled data set, or a file of records, as a stream to the log of the config."""

from __future__ import annotations

import contextlib
import threading
import zlib
from typing import cast

from streamlearn.app.bars import Bars
from streamlearn.app.log import make_topics, open_log
from streamlearn.config import Config
from streamlearn.lab.delays import parse_delay
from streamlearn.lab.drift import parse_drift
from streamlearn.lab.files import open_dataset
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
    label_share: float = 1.0,
    passes: int = 1,
    id_prefix: str | None = None,
    label: str | None = None,
) -> Counts:
    """Send the stream until it ends or `stopping` is set; print the counts.

    Records of a file are sent unchanged, but for their class at the path `label`, which follows in the form of
    [source.labels]. Other arguments: see `StreamPlan`.
    """
    with Bars() as bars:
        loaded = open_dataset(config, dataset, stopping, label=label, limit=limit, report=bars.say, progress=bars)
    stream = StreamPlan(
        dataset=loaded,
        schema=config.schema_.build(),
        delay=parse_delay(label_delay),
        drifts=parse_drift(drift),
        order=cast(Order, order),  # StreamPlan checks it
        seed=seed,
        id_prefix=_default_prefix(loaded.name, order, drift, seed) if id_prefix is None else id_prefix,
        label_share=label_share,
        passes=passes,
        send_records=True,
    )
    total = len(loaded.y) * passes
    task = f"{dataset} to the {config.log.kind} log"
    with contextlib.closing(open_log(config)) as log, Bars() as bars:
        make_topics(log, config)
        samples = config.source.samples.topics[0]
        if held := sum(log.end_offsets(samples).values()) - sum(log.beginning_offsets(samples).values()):
            with_ids = stream.records is not None and stream.records.with_ids
            bars.console.print(
                f"{samples} holds {held} records already. Samples with an id that it holds"
                f"{'' if with_ids else f' ({stream.id_prefix}0, …)'} are not learned again, and labels join the first"
                f" sample of the id{'' if with_ids else '; --id-prefix gives other ids'}"
            )
        bars(task, 0, total)
        counts = simulate(
            log,
            stream,
            samples_topic=samples,
            labels_topic=config.source.labels.topic,
            rate=rate,
            stop=stopping.is_set,
            progress=lambda sent, _: bars(task, sent, total),
        )
    bars.console.print(
        f"{counts.samples} samples, {counts.labels} labels sent; {counts.labels_pending} labels were not due yet"
    )
    return counts


def _default_prefix(name: str, order: str, drift: str, seed: int) -> str:
    """Prefix of the ids, which number the samples. It differs if seed, order or drift assign other rows to them."""
    changed = [f"seed{seed}"] if seed else []
    if (order, drift) != ("shuffle", "none"):
        changed.append(f"{zlib.crc32(f'{order} {drift}'.encode()):08x}")
    return "".join(f"{part}-" for part in (name, *changed))
