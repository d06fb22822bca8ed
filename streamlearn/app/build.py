"""Makes the parts of the learning loop from the config: values flow down, and below here no config is known (D14)."""

from __future__ import annotations

from collections.abc import Callable

from streamlearn.app.adapters import Patience, read_back_from
from streamlearn.app.network import model_spec
from streamlearn.app.wiring import StatePaths
from streamlearn.config import Config
from streamlearn.judge.board import Scoreboard
from streamlearn.judge.election import Election
from streamlearn.judge.guard import GuardSettings
from streamlearn.learn.batching import MicroBatcher
from streamlearn.learn.learner import Learner
from streamlearn.learn.recent import RecentSamples
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.ledger.request_writer import RequestWriter
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec
from streamlearn.log.feed import PREFETCH_BYTES
from streamlearn.loop import Cadence
from streamlearn.loop.guarding import Guarding, WatchSettings
from streamlearn.records import Offsets

MOST_RECENT_BYTES = 64 << 20
"""Bound of the recent samples: they are saved with every checkpoint."""
TRUST_LABELS = 10
"""The consistency weight falls while the teacher is less often right on this many labels than on ten times as many."""
MOST_MEMORY_BYTES = 512 << 20
"""Bound of the replay buffer, for the same reason."""


def make_ledger(
    config: Config, paths: StatePaths, log: Log, codec: Codec, patience: Patience, *, may_write: Callable[[], None]
) -> Ledger:
    """The ledger in the state folder; payloads that left it are read back from the log."""
    labels, schema = config.labels, config.schema_.build()
    return Ledger(
        paths.store,
        schema=schema,
        read_back=read_back_from(log, codec, patience),
        payload_max_bytes=labels.payload_max_bytes,
        payload_max_age_s=labels.payload_max_age_s,
        horizon_s=labels.horizon_s,
        max_ids=labels.max_ids,
        corrections=labels.corrections,
        implied_class=None if labels.implied_class is None else schema.class_index(labels.implied_class),
        implied_after_s=labels.implied_after_s,
        max_held=labels.max_held,
        grow=labels.unknown_class == "grow",
        may_write=may_write,
    )


def make_batcher(config: Config, next_offsets: Offsets) -> MicroBatcher:
    """Cuts micro-batches from there on."""
    batch = config.batch
    return MicroBatcher(
        next_offsets,
        sample_topic=config.log.topics.samples,
        fresh=batch.fresh,
        wide=max(batch.fresh, config.schema_.build().rows_within(batch.prefetch_records, PREFETCH_BYTES)),
        max_labels=batch.max_labels,
        max_age_s=batch.max_age_s,
        merge_wait_s=batch.merge_wait_s,
    )


def make_learner(config: Config) -> Learner:
    """Student, teacher and twin at step 0."""
    return Learner(model_spec(config), config.learn)


def make_election(config: Config, learner: Learner) -> Election | None:
    """Who says which of the learner's candidates is served; None where there is no choice."""
    bank = config.bank
    if bank.serve == "teacher" or len(learner.candidates) == 1:
        return None
    return Election(learner.candidates, window=bank.window, alpha=bank.alpha)


def make_recent(config: Config) -> RecentSamples | None:
    """Samples to learn from once more; None where every step has records of its own, or learns from labels alone."""
    rows = recent_rows(config)
    return RecentSamples(rows, config.schema_.build(), config.learn.seed) if rows else None


def recent_rows(config: Config) -> int:
    """How many recent samples are held at most; 0 where none are."""
    batch = config.batch
    if (batch.steps == 1 and not batch.idle_steps) or config.learn.method == "supervised":
        return 0
    return config.schema_.build().rows_within(batch.recent_rows, MOST_RECENT_BYTES, least=batch.fresh)


def make_memory(config: Config) -> ReplayBuffer:
    """The replay buffer, empty."""
    return ReplayBuffer(memory_rows(config), config.schema_.build(), config.learn.seed)


def memory_rows(config: Config) -> int:
    """How many rows the replay buffer holds at most."""
    return config.schema_.build().rows_within(config.labels.memory_rows, MOST_MEMORY_BYTES, least=config.batch.labelled)


def make_board(config: Config) -> Scoreboard:
    """The scores, none yet."""
    schema, score = config.schema_.build(), config.score
    return Scoreboard(
        schema.classes,
        window=score.window,
        spare=schema.spare or 0,
        fading=score.fading,
        bins=score.calibration_bins,
    )


def make_guarding(config: Config, learner: Learner, memory: ReplayBuffer, board: Scoreboard) -> Guarding:
    """Who watches over that learner."""
    settings = WatchSettings(
        guard=GuardSettings(**config.guard.model_dump()),
        drift_delta=config.drift.delta,
        drift_reaction=config.drift.reaction,
        trust_labels=TRUST_LABELS if config.guard.on else 0,
    )
    return Guarding(learner, memory, board, settings)


def make_wanted(config: Config, paths: StatePaths) -> RequestWriter | None:
    """Where the samples stand whose labels would help most; None where that is off."""
    labels = config.labels
    return (
        RequestWriter(paths.wanted, labels.wanted_rows, keep_s=labels.payload_max_age_s) if labels.wanted_rows else None
    )


def make_cadence(config: Config) -> Cadence:
    """How batches are cut, and how often state is shown and saved."""
    batch, state = config.batch, config.state
    return Cadence(
        fresh=batch.fresh,
        labelled=batch.labelled,
        max_age_s=batch.max_age_s,
        publish_every_s=state.publish_every_s,
        checkpoint_every_s=state.checkpoint_every_s,
        checkpoint_every_steps=state.checkpoint_every_steps,
        steps=batch.steps,
        idle_steps=batch.idle_steps,
        thin_above=config.log.thin_above_records if config.log.overload == "thin" else None,
    )
