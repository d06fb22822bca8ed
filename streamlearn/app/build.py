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
from streamlearn.learn.build import LearnSettings
from streamlearn.learn.learner import Learner
from streamlearn.learn.recent import RecentSamples
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.ledger.request_writer import POOL_ROWS, RequestWriter
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec
from streamlearn.log.feed import PREFETCH_BYTES
from streamlearn.loop import Cadence
from streamlearn.loop.guarding import Guarding, WatchSettings
from streamlearn.records import Offsets

MOST_RECENT_BYTES = 64 << 20
"""Bound of the recent samples: they are saved with every checkpoint."""
MOST_MEMORY_BYTES = 512 << 20
"""Bound of the replay buffer, for the same reason."""


def make_ledger(
    config: Config, paths: StatePaths, log: Log, codec: Codec, patience: Patience, *, may_write: Callable[[], None]
) -> Ledger:
    """The ledger in the state folder; payloads that left it are read back from the log."""
    read_back = read_back_from(log, codec, patience)
    return Ledger(paths.store, config.schema_.build(), config.labels, read_back=read_back, may_write=may_write)


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


def learn_settings(config: Config) -> LearnSettings:
    """How to learn, as [learn], [bank] and [twin] have it."""
    learn = config.learn.model_dump(exclude={"recipe", "trust_labels"})
    decays = config.bank.decays if config.bank.serve == "elected" else ()
    return LearnSettings(**learn, twin_every=config.twin.every, bank_decays=decays)


def make_learner(config: Config) -> Learner:
    """Student, teacher, bank and twin at step 0."""
    return Learner(model_spec(config), learn_settings(config))


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
    return config.schema_.build().rows_within(config.labels.replay_rows, MOST_MEMORY_BYTES, least=config.batch.labelled)


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
        trust_labels=config.learn.trust_labels,
    )
    return Guarding(learner, memory, board, settings)


def make_requests(config: Config, paths: StatePaths) -> RequestWriter:
    """The learner's side of the active-learning queue."""
    rows = POOL_ROWS if config.labels.requests_per_hour else 0
    return RequestWriter(paths.label_requests, rows, keep_s=config.labels.horizon_s)


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
