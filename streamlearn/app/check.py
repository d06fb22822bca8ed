"""`streamlearn check`: would it run, and which settings will cause trouble later. Changes nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Literal

import torch

from streamlearn.app.build import make_learner, model_spec
from streamlearn.app.findings import Finding
from streamlearn.app.log import log_exists, make_codec, open_log, similar_topics, topics_of
from streamlearn.app.ports import expose, listen
from streamlearn.app.sizing import ID_BYTES, learner_parts, scorer_parts, server_parts
from streamlearn.app.startup import check_log_reaches, check_model, of_all
from streamlearn.config import Config
from streamlearn.errors import FROM_SCRATCH, ConfigError, LogError, LogUnavailableError, StateError
from streamlearn.learn.build import find_device
from streamlearn.learn.learner import Learner
from streamlearn.learn.methods.settings import ConsistencyOptions
from streamlearn.ledger.store_file import check_step
from streamlearn.ledger.store_view import StoreView
from streamlearn.log.base import Log
from streamlearn.log.retention import MAX_AGE_S
from streamlearn.metrics import LEARNER_METRICS, Metrics
from streamlearn.models.build import build
from streamlearn.records import Offsets
from streamlearn.state import journal
from streamlearn.state.checkpoint import Checkpoint, load_checkpoint, path_of, steps_in
from streamlearn.state.paths import StatePaths

_SHOWN_BYTES = 5 << 20
"""Smaller parts of the processes' memory are not listed."""


def check(config: Config) -> Iterator[Finding]:
    """Check everything that the config names."""
    yield from _reported("model", _model(config))
    yield from _reported("device", _device(config))
    yield from _retention(config)
    yield from _record_size(config)
    yield from _reported("log", _log(config))
    yield from _state(config)
    yield from _port(config)


def _reported(subject: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings; an error that ends them is the last one."""
    try:
        yield from findings
    except (ConfigError, LogError, StateError) as error:
        yield Finding("error", subject, str(error))


def _model(config: Config) -> Iterator[Finding]:
    make_codec(config)  # what [source] and [columns] import
    spec = model_spec(config)
    parameters = sum(p.numel() for p in build(spec, seed=config.learn.seed).parameters())
    shape = "x".join(map(str, spec.shape))
    yield Finding("ok", "model", f"{spec.factory}: {shape} to {spec.classes} classes, {parameters:,} parameters")
    yield from _reported("method", _method(config))


def _device(config: Config) -> Iterator[Finding]:
    device = find_device(config.learn.device)
    yield Finding("ok", "device", f"{device.type}, torch {torch.__version__}, {os.cpu_count()} CPU cores")


def _method(config: Config) -> Iterator[Finding]:
    learn = config.learn
    # On the CPU: a running learner may fill the GPU.
    learner = make_learner(config.model_copy(update={"learn": learn.model_copy(update={"device": "cpu"})}))
    options, weight = learn.options, ""
    if isinstance(options, ConsistencyOptions):
        weight = f", {options.consistency} with weight {options.consistency_weight:g}"
    of_which = "" if learn.follows_recipe else ", of labelled rows alone"
    yield Finding("ok", "method", f"{learn.method}{weight}; defaults by recipe {learn.recipe}{of_which}")
    yield from _memory(config, learner)


def _memory(config: Config, learner: Learner) -> Iterator[Finding]:
    """Approximate memory of the processes with every buffer full, largest part first."""
    predictions = config.source.predictions
    kinds = [
        ("learner memory", 1, learner_parts(config, learner)),
        ("server memory", servers := config.serve.processes, server_parts(config, learner)),
    ]
    if predictions.topic:
        kinds.append(("scorer memory", predictions.scorers, scorer_parts(config, learner)))
    total = sum(count * sum(part.size_bytes for part in parts) for _, count, parts in kinds)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for subject, _, parts in kinds:
        size = sum(part.size_bytes for part in parts) / 2**30
        shown = [p for p in sorted(parts, key=lambda p: -p.size_bytes) if p.size_bytes >= _SHOWN_BYTES]
        text = ", ".join(f"{part.name} {part.size_bytes / 2**30:.2f}" for part in shown)
        yield Finding("ok", subject, f"about {size:.1f} GiB at most: {text}")
    verdict: Literal["ok", "warning"] = "ok" if total < installed else "warning"
    processes = f"a learner and {servers} servers"
    if predictions.topic:
        processes = f"a learner, {servers} servers and {predictions.scorers} scorers"
    text = f"about {total / 2**30:.1f} GiB for {processes}, this machine has {installed / 2**30:.1f}"
    yield Finding(verdict, "memory", text)


def _log(config: Config) -> Iterator[Finding]:
    if not log_exists(config):
        paths = StatePaths(config.state.dir)
        if steps := steps_in(paths.checkpoints):
            text = (
                f"{paths.log} does not exist, and step {steps[-1]} was learned from it; restore it, or {FROM_SCRATCH}"
            )
            yield Finding("error", "log", text)
        else:
            yield Finding("ok", "log", f"{paths.log} does not exist yet; will be created")
        return
    with contextlib.closing(open_log(config)) as log:
        yield from _topics(config, log)
        yield from _reported("checkpoint", _reach(config, log))


def _topics(config: Config, log: Log) -> Iterator[Finding]:
    for name in topics_of(config):
        if count := log.partition_count(name):
            ends, begins = log.end_offsets(name), log.beginning_offsets(name)
            held = sum(ends[tp] - begins[tp] for tp in ends)
            yield Finding("ok", f"topic {name}", f"{count} partitions, {held:,} records")
            yield from _access(log, name, begins, read=name != config.log.dead_letters)
        elif config.log.partitions:
            is_read = name in config.source.topics
            near = similar_topics(log, name, topics_of(config)) if is_read else []
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            yield Finding("warning" if near else "ok", f"topic {name}", f"missing; will be created{meant}")
        else:
            yield Finding("error", f"topic {name}", "missing, and log.partitions = 0 creates none")


def _access(log: Log, topic: str, begins: Offsets, *, read: bool) -> Iterator[Finding]:
    """Whether the log lets this client append to a topic, and read it."""
    try:
        log.append(topic, [])
        if read:
            log.reader(begins).close()
    except LogUnavailableError:
        raise
    except LogError as error:
        yield Finding("error", f"topic {topic}", str(error))


def _record_size(config: Config) -> Iterator[Finding]:
    payload, sample_bytes, most = (
        config.source.samples.format,
        config.schema_.build().nbytes,
        config.log.max_record_bytes,
    )
    if sample_bytes > most and payload != "image" and not config.columns:
        text = f"a sample has {sample_bytes} bytes, more than log.max_record_bytes = {most}: such records are refused"
        yield Finding("warning" if payload == "json" else "error", "record size", text)


def _retention(config: Config) -> Iterator[Finding]:
    if config.log.kind == "embedded" and config.labels.horizon_s > MAX_AGE_S:
        text = (
            f"the log keeps {MAX_AGE_S / 86400:.3g} days, labels are awaited for "
            f"{config.labels.horizon_s / 86400:.3g}: later ones cannot be replayed or read back from the log"
        )
        yield Finding("warning", "retention", text)


def _reach(config: Config, log: Log) -> Iterator[Finding]:
    """Whether the log still holds the records after the newest checkpoint."""
    paths = StatePaths(config.state.dir)
    steps = steps_in(paths.checkpoints)
    if not steps:
        yield Finding("ok", "checkpoint", f"none yet; learning starts at the log's {config.log.start} record")
        return
    checkpoint = load_checkpoint(path_of(paths.checkpoints, steps[-1]))
    yield Finding("ok", "checkpoint", f"step {checkpoint.step}, {len(steps)} kept, digest matches")
    yield from _trimmed(config, log, checkpoint)
    yield from _reported("journal", _journal(paths, checkpoint))
    yield from _reported("store", _store(paths, checkpoint))
    check_model(config, checkpoint)
    check_log_reaches(log, config, checkpoint.next_offsets)


def _journal(paths: StatePaths, checkpoint: Checkpoint) -> Iterator[Finding]:
    steps = sum(1 for _ in journal.read_journal(paths.journal, checkpoint.step))
    text = f"{steps} steps after the checkpoint, which a start repeats" if steps else "no step after the checkpoint"
    yield Finding("ok", "journal", text)


def _store(paths: StatePaths, checkpoint: Checkpoint) -> Iterator[Finding]:
    view = StoreView(paths.store)
    try:
        check_step(step := view.step(), checkpoint.step)
    finally:
        view.close()
    yield Finding("ok", "store", f"ends at step {step}")


def _trimmed(config: Config, log: Log, checkpoint: Checkpoint) -> Iterator[Finding]:
    for tp, beginning in of_all(config.source.topics, log.beginning_offsets).items():
        gap = beginning - checkpoint.next_offsets.get(tp, beginning)
        if gap > 0:
            text = f"{tp.topic}[{tp.partition}]: {gap:,} records after the checkpoint were trimmed (log.on_trimmed)"
            yield Finding("error" if config.log.on_trimmed == "stop" else "warning", "retention", text)


def _state(config: Config) -> Iterator[Finding]:
    folder = config.state.dir.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        yield Finding("error", "state", f"{existing} is not a folder that can be written")
        return
    free = shutil.disk_usage(existing).free
    bound = config.labels.payload_max_bytes + journal.MAX_BYTES + config.labels.max_ids * ID_BYTES
    if config.log.kind == "embedded":
        bound += 3 * config.log.max_bytes
    verdict: Literal["ok", "warning"] = "ok" if free > bound else "warning"
    yield Finding(
        verdict, "disk", f"{free / 2**30:.1f} GiB free; logs, store and journal may grow to {bound / 2**30:.1f}"
    )


def _port(config: Config) -> Iterator[Finding]:
    serve = config.serve
    if serve.port == config.metrics.port != 0:
        yield Finding("error", "port", f"serve.port and metrics.port are both {serve.port}; choose two ports")
        return
    try:
        listen(config).close()
    except ConfigError as error:
        yield Finding("warning", "port", f"{error} (or it is already running)")
    else:
        token = "with a token" if serve.tokens else "without a token"
        yield Finding("ok", "port", f"{serve.host}:{serve.port} is free, {token}")
    try:
        expose(config, Metrics(LEARNER_METRICS, version="check")).close()
    except ConfigError as error:
        yield Finding("warning", "metrics port", f"{error} (or it is already running)")
