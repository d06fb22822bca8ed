"""One scorer process: predictions as a stream. It follows the published teacher, and needs no learner that runs.

It can be killed and started again: what it wrote last is in the log together with its offsets. At SIGTERM the write in
progress is finished.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import structlog
import torch

from streamlearn import __version__
from streamlearn.app.garbage import short_pauses
from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.config import Config
from streamlearn.errors import ConfigError
from streamlearn.log.codec import Codec
from streamlearn.log.predictions import avro
from streamlearn.metrics import MetricsServer, ScorerMetrics
from streamlearn.models.answer import Thresholds
from streamlearn.serve.predictor import Predictor
from streamlearn.serve.scorer import Scorer
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import PublishedDir
from streamlearn.state.status import write_status

_log = structlog.get_logger(__name__)
_THREADS = 1
"""torch's intra-op threads, as in a server."""
_HEARTBEAT_EVERY_S = 1.0


def score(config: Config, stopping: threading.Event, *, instance: int = 0, of: int | None = None) -> None:
    """Score until `stopping` is set. `of` is the number of instances, `source.predictions.scorers` by default.

    Raises:
        ConfigError: no topic of predictions is set, there is no such instance, or a topic cannot be used.
        WriterFencedError: another process scores as this instance.
    """
    topic = config.source.predictions.topic
    of = config.source.predictions.scorers if of is None else of
    if topic is None:
        raise ConfigError("source.predictions.topic is not set: expected the topic to write predictions to")
    if not 0 <= instance < of:
        raise ConfigError(f"--instance {instance} of {of}: expected a number from 0 to {of - 1}")
    if config.log.kind == "embedded" and of > 1:
        raise ConfigError(f"--of {of}: the embedded log has one scorer")
    torch.set_num_threads(_THREADS)
    paths, name, schema, metrics = (
        StatePaths(config.state.dir),
        f"scorer-{instance}",
        config.schema_.build(),
        ScorerMetrics(version=__version__),
    )
    with short_pauses(), contextlib.ExitStack() as ends:
        log = ends.enter_context(contextlib.closing(open_log(config)))
        predictor = Predictor(
            PublishedDir(paths.published), schema, metrics, factory=config.model.factory, loaded=gc.freeze
        )
        exposed = ends.enter_context(contextlib.closing(MetricsServer(metrics.registry, 0)))
        codec = make_codec(config)
        scorer = Scorer(
            log,
            codec,
            predictor,
            metrics,
            topic=topic,
            thresholds=Thresholds(config.schema_.build(), config.score.thresholds),
            instance=instance,
            of=of,
            start=config.log.start,
            on_trimmed=config.log.on_trimmed,
            prepare=lambda: make_topics(log, config),
            register=_registration(codec, topic) if config.source.predictions.format == "avro" else None,
        )
        predictor.start()
        ends.callback(predictor.close)
        fixed = {"pid": os.getpid(), "metrics_port": exposed.port}
        with _heartbeat(paths.processes / f"{name}.json", lambda: fixed | scorer.status()):
            _log.info("scorer_started", name=name, of=of, topic=topic)
            try:
                scorer.run(stopping)
            except Exception as error:
                scorer.ended(f"failed: {error}")
                raise
            scorer.ended("stopped")
            _log.info("scorer_stopped", name=name, **scorer.status()["records"])


def _registration(codec: Codec, topic: str) -> Callable[[], int]:
    """Registers the schema of answers; its id."""
    registry = codec.registry
    assert registry is not None, "Avro needs source.registry.url"
    return lambda: registry.register(f"{topic}-value", avro().text)


@contextlib.contextmanager
def _heartbeat(path: Path, status: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Write the status about once a second; it also tells servers the port of the metrics. It stays after the end."""
    ended = threading.Event()

    def beat() -> None:
        failed = False
        while True:
            last = ended.is_set()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_status(path, {**status(), "time_s": time.time()})
                failed = False
            except OSError as error:
                if not failed:
                    _log.error("heartbeat_failed", error=str(error))
                failed = True
            if last:
                return
            ended.wait(_HEARTBEAT_EVERY_S)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5.0)
