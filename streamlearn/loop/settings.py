"""[batch]: how a micro-batch is formed."""

from __future__ import annotations

from pydantic import Field

from streamlearn.section import Section


class BatchConfig(Section):
    """[batch]: how a micro-batch is formed."""

    fresh: int = Field(64, ge=1, le=65_536)
    """Fresh samples of a micro-batch."""
    backlog: int = Field(0, ge=0, le=65_536)
    """Samples of the largest micro-batch, where many wait: batches grow while the learner is far behind. The labelled
    rows grow alike, and there are fewer steps per sample. 0: eight times `fresh` for the networks mlp and table, whose
    step costs little more with more rows; `fresh` for others."""
    labelled: int = Field(32, ge=1, le=65_536)
    """Labelled rows of a micro-batch: new labels first, then rows of the replay buffer."""
    steps: int = Field(32, ge=1, le=1000)
    """Steps per `fresh` samples, or per four labels, as far as the time allows: see learn.cpu_share. All but the first
    have no new records: they repeat labelled and recent samples. New records are learned first, always."""
    max_age_s: float = Field(0.5, ge=0.001, le=3600.0)
    """A micro-batch that is not full is closed this long after its first record."""
