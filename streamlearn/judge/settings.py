"""Settings of [score], [guard] and [drift]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streamlearn.section import Section


class ScoreConfig(Section):
    """[score]: how the model is scored."""

    window: int = Field(1000, ge=10, le=1_000_000)
    """Scored samples, or labels, in each windowed score."""


class GuardConfig(Section):
    """[guard]: protection against a model that has gone wrong."""

    on: bool = True
    """Freeze publication, roll back, adopt the twin, lower consistency weight and learning rate. Off: no checks."""


class DriftConfig(Section):
    """[drift]: the reaction to drift."""

    reaction: Literal["alarm", "renew"] = "renew"
    """alarm: only report it. renew: also shorten the teacher's horizon and let it grow again; after an alarm without
    labels, consistency stays off until labels of newer samples confirm the teacher."""
