"""[state]: where and how often state is saved."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from streamlearn.section import Section


class StateConfig(Section):
    """[state]: where and how often state is saved."""

    dir: Path = Path("streamlearn-state")
    """Checkpoints, journal, sample store, published teachers, and the embedded log."""
    checkpoint_every_s: float = Field(30.0, gt=0.0)
    """Longest time between two checkpoints, while steps are taken."""
    keep_checkpoints: int = Field(3, ge=2, le=1000)
    """Checkpoints on disk. If the newest is corrupt, the one before it is loaded; so at least two."""
    publish_every_s: float = Field(1.0, ge=0.01)
    """Shortest time between two published teachers; a quarter of it for new labels, unless records wait."""
