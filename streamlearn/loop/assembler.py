"""The rows of a micro-batch: fresh samples or recent ones, and labelled rows from the replay buffer (D7)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import structlog

from streamlearn.learn.learner import Learner
from streamlearn.learn.recent import RecentSamples
from streamlearn.ledger import Arrival
from streamlearn.ledger.replay_buffer import ReplayBuffer
from streamlearn.loop.settings import BatchConfig
from streamlearn.records import ERASED, RETRACTED, UNLABELLED, MicroBatch, Sample, Schema, sample_key

_log = structlog.get_logger(__name__)


class BatchAssembler:
    """Keeps the replay buffer in step with the labels, and draws from it. Letters: U unlabelled, L labelled rows."""

    def __init__(
        self, schema: Schema, batch: BatchConfig, learner: Learner, replay: ReplayBuffer, recent: RecentSamples
    ) -> None:
        self._schema, self._batch, self._learner = schema, batch, learner
        self._replay, self._recent = replay, recent

    def take_labels(self, arrivals: Sequence[Arrival]) -> None:
        """Add, relabel and remove rows of the replay buffer."""
        for arrival in arrivals:
            if arrival.example is not None and self._learner.clips(arrival.example.x):
                # As a fresh sample it was learned once. Replayed, it would dominate the batch statistics each time.
                _log.warning("labelled_rows_evicted", step=self._learner.step + 1, ids=[arrival.sample_id])
            elif arrival.example is not None:
                self._replay.add(arrival.example)
            elif arrival.class_index in (RETRACTED, ERASED):
                self._replay.remove(arrival.sample_id)
            elif arrival.correction or arrival.labelled_at_s is not None:
                self._replay.relabel(arrival.sample_id, arrival.class_index, arrival.labelled_at_s)

    def assemble(self, fresh: Sequence[Sample], step: int, *, again: bool) -> MicroBatch:
        """A batch of fixed shape. With `again` (a step without records) recent samples stand in for fresh ones.

        A batch that has grown has as many times the labelled rows, so that both costs keep their proportion.
        """
        schema, sizes, recent = self._schema, self._batch, self._recent
        times = max(1, math.ceil(len(fresh) / sizes.fresh))
        labelled = times * sizes.labelled
        fresh_x = np.zeros((times * sizes.fresh, *schema.shape), schema.dtype)
        for n, sample in enumerate(fresh):
            fresh_x[n] = sample.x
        labelled_x = np.zeros((labelled, *schema.shape), schema.dtype)
        labelled_y = np.full(labelled, UNLABELLED, np.int64)
        new_ids = self._replay.draw_into(labelled_x, labelled_y, step)
        drawn = labelled if len(self._replay) else 0
        count, wants_keys = len(fresh), self._learner.wants_keys
        # Recent samples are kept when the method changes, and the next method may want their keys.
        keyed = wants_keys or recent.capacity > 0
        keys_U = np.array([sample_key(s.sample_id) for s in fresh] if keyed else [0] * count, np.int64)
        if again and len(recent):
            keys_U = recent.draw_into(fresh_x, step)
            count = len(keys_U)
        elif count:
            recent.add(fresh_x[:count], keys_U)
        keys = None
        if wants_keys:
            keys_L = np.array([sample_key(sample_id) for sample_id in self._replay.drawn_ids], np.int64)
            keys = np.concatenate((keys_U, keys_L))
        return MicroBatch(fresh_x, count, labelled_x, labelled_y, drawn, new_ids, keys, seen_before=again)

    def erase(self, arrivals: Sequence[Arrival]) -> None:
        """Remove erased samples from the recent ones. Called after `assemble`, which adds those of this step."""
        for arrival in arrivals:
            if arrival.class_index == ERASED:
                self._recent.remove(sample_key(arrival.sample_id))
