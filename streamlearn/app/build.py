"""Build the learner from the config. Below this module parts get plain values and their own section (D14)."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from streamlearn import __version__
from streamlearn.app.log import make_codec
from streamlearn.config import Config
from streamlearn.judge.election import Election
from streamlearn.judge.guard import Guard
from streamlearn.judge.scoreboard import Scoreboard
from streamlearn.learn.batching import MERGE_WAIT_S, MicroBatcher
from streamlearn.learn.learner import Learner
from streamlearn.learn.recent import RECENT_BYTES, RECENT_ROWS, RecentSamples
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.ledger.request_writer import POOL_ROWS, RequestWriter
from streamlearn.log.base import Log
from streamlearn.log.feed import PREFETCH_BYTES, PREFETCH_RECORDS, Feed
from streamlearn.loop.guarding import Guarding
from streamlearn.loop.log_access import LogAccess
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import Observer
from streamlearn.models.answer import Thresholds
from streamlearn.models.build import ModelSpec
from streamlearn.models.settings import ROW_NETWORKS
from streamlearn.records import Offsets
from streamlearn.state.checkpoint import Saved, Saver
from streamlearn.state.files import DISK, Files
from streamlearn.state.journal import Journal
from streamlearn.state.kill_points import reached
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import Publisher

TRUST_LABELS = 10
"""The consistency weight falls while the teacher is less often right on this many labels than on ten times as many."""
REPLAY_BYTES = 512 << 20
"""Bound of the replay buffer: it is in each checkpoint."""
_BACKLOG_TIMES = 8
"""How far micro-batches of `ROW_NETWORKS` grow by default, in micro-batches."""
MERGE_WAIT_TO_END_S = 60.0
"""`learn.batching.MERGE_WAIT_S` with --until-end: so long that the result does not depend on time."""


def model_spec(config: Config) -> ModelSpec:
    """The network that the config names. Published with its weights."""
    schema = config.schema_.build()
    return ModelSpec(
        factory=config.model.factory,
        options=config.model.options,
        shape=schema.shape,
        classes=schema.capacity,
        spare=schema.spare,
        normalise=config.model.normalise,
        scale=config.schema_.scale,
        columns=schema.columns,
    )


def identity(config: Config) -> dict[str, Any]:
    """The settings that saved weights and offsets depend on. Saved in each checkpoint, and compared at each start."""
    model = json.loads(model_spec(config).to_json())
    model["spare"] = model["spare"] is not None  # their number does not matter: it falls when a class gets its name
    return {
        "model": model,
        "classes": list(config.schema_.build().classes),
        "dtype": config.schema_.dtype,
        "method": config.learn.method,
        "optimizer": config.learn.optimizer,
        "topics": list(config.source.topics),
    }


def make_learner(config: Config) -> Learner:
    """Student, teacher and twin at step 0."""
    return Learner(model_spec(config), config.learn, classes=config.schema_.build().classes)


def recent_rows(config: Config) -> int:
    """Capacity for recent samples; 0 if no step is without records, or the method uses only labels."""
    batch = config.batch
    if batch.steps == 1 or config.learn.method == "supervised":
        return 0
    return config.schema_.build().rows_within(RECENT_ROWS, RECENT_BYTES, least=batch.fresh)


def replay_rows(config: Config) -> int:
    """Capacity of the replay buffer."""
    return config.schema_.build().rows_within(config.labels.replay_rows, REPLAY_BYTES, least=config.batch.labelled)


def wide_rows(config: Config) -> int:
    """Samples of a micro-batch of which some are shed: all that may be read ahead."""
    return max(config.batch.fresh, config.schema_.build().rows_within(PREFETCH_RECORDS, PREFETCH_BYTES))


def backlog_rows(config: Config) -> int:
    """Samples of the largest micro-batch of which none is shed."""
    fresh = config.batch.fresh
    wanted = config.batch.backlog or (_BACKLOG_TIMES * fresh if config.model.factory in ROW_NETWORKS else fresh)
    return max(fresh, min(wanted, wide_rows(config)))


def build_loop(
    config: Config,
    log: Log,
    next_offsets: Offsets,
    *,
    stopping: threading.Event,
    until_end: bool = False,
    fence: Files = DISK,
    observer: Observer | None = None,
    ask_twin: bool = False,
) -> TrainingLoop:
    """The loop with all its parts, at step 0. It does not read yet: see `Feed.start`.

    `next_offsets` is where each partition is read from. `stopping` ends the retries of calls of the log. `until_end` is
    for a run that ends with the log. With `ask_twin` the twin answers fresh samples too, for a simulation's scores.
    """
    observer = observer or Observer()
    paths, schema, codec = StatePaths(config.state.dir), config.schema_.build(), make_codec(config)
    sample_topics = config.source.samples.topics
    access = LogAccess(log, codec, dead_letters=config.log.dead_letters, stopping=stopping)
    learner = make_learner(config)
    election = Election(learner.candidates if config.learn.twin == "elect" else learner.candidates[:1])
    replay = ReplayBuffer(replay_rows(config), schema, config.learn.seed)
    score = config.score
    board = Scoreboard(
        schema.classes,
        window=score.window,
        spare=schema.spare or 0,
        named=[schema.classes.index(name) for name in (*score.classes, *score.thresholds)],
        top_k=score.top_k,
    )
    return TrainingLoop(
        schema=schema,
        batch=config.batch,
        state=config.state,
        log=access,
        feed=Feed(log, next_offsets, codec, sample_topics=sample_topics, on_trimmed=config.log.on_trimmed),
        batcher=MicroBatcher(
            next_offsets,
            sample_topics=sample_topics,
            predictions_topic=config.source.predictions.topic,
            fresh=config.batch.fresh,
            wide=wide_rows(config),
            max_age_s=config.batch.max_age_s,
            merge_wait_s=MERGE_WAIT_TO_END_S if until_end else MERGE_WAIT_S,
        ),
        ledger=_make_ledger(config, access, fence),
        learner=learner,
        replay=replay,
        recent=RecentSamples(recent_rows(config), schema, config.learn.seed),
        board=board,
        election=election,
        guarding=Guarding(
            learner,
            replay,
            board,
            election,
            guard=Guard(config.guard.on),
            reaction=config.drift.reaction,
            trust_labels=TRUST_LABELS if config.guard.on else 0,
            columns=schema.columns,
        ),
        requests=RequestWriter(
            paths.label_requests,
            POOL_ROWS if config.labels.requests_per_hour else 0,
            keep_s=config.labels.horizon_s,
        ),
        journal=Journal(paths.journal, files=fence),
        saver=_make_saver(config, access, fence, observer),
        publisher=Publisher(paths.published, metadata=_metadata(config), files=fence),
        observer=observer,
        identity=identity(config),
        shed_above=config.log.shed_above_records,
        backlog_rows=backlog_rows(config),
        thresholds=Thresholds(schema, config.score.thresholds),
        twin_on_arrival=ask_twin,
    )


def _make_ledger(config: Config, access: LogAccess, fence: Files) -> Ledger:
    def may_write() -> None:
        reached("ledger-flush", "begin")
        fence.check()

    folder, schema = StatePaths(config.state.dir).store, config.schema_.build()
    return Ledger(folder, schema, config.labels, read_back=access.read_back, may_write=may_write)


def _make_saver(config: Config, access: LogAccess, fence: Files, observer: Observer) -> Saver:
    def on_saved(saved: Saved) -> None:
        """A checkpoint is durable: only now its offsets are committed (I2)."""
        observer.saved(saved)
        reached("offsets-commit", "begin")
        access.commit(saved.step, saved.next_offsets)
        reached("offsets-commit", "end")

    folder = StatePaths(config.state.dir).checkpoints
    return Saver(folder, keep=config.state.keep_checkpoints, on_saved=on_saved, files=fence)


def _metadata(config: Config) -> Mapping[str, str]:
    """In the header of each published teacher: what servers need to rebuild the network."""
    return {
        "model_spec": model_spec(config).to_json(),
        "dtype": config.schema_.dtype,
        "streamlearn": __version__,
    }
