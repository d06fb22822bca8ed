"""Settings of [score], [guard] and [drift]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from streamlearn.section import Section


class ScoreConfig(Section):
    """[score]: how the model is scored."""

    window: int = Field(1000, ge=10, le=1_000_000)
    """Scored samples, or labels, in each windowed score."""
    thresholds: dict[str, Annotated[float, Field(gt=0.0, le=1.0)]] = Field(default_factory=dict)
    """By class, such as {fraud = 0.8}: answered where its probability is at least this; of several, the one with the
    largest ratio; else the most probable of the other classes. For /predict and the scores. Needs no retraining."""
    classes: tuple[str, ...] = Field((), max_length=20)
    """Classes with metrics of their own. Empty: those with a threshold."""
    top_k: int = Field(100, ge=1, le=1_000_000)
    """Scores of precision and recall among the k samples of the window with the highest probability of a class."""


class GuardConfig(Section):
    """[guard]: protection against a model that has gone wrong."""

    on: bool = True
    """Freeze publication, roll back, adopt the twin, lower consistency weight and learning rate. Off: no checks."""


class DriftConfig(Section):
    """[drift]: the reaction to drift."""

    reaction: Literal["alarm", "renew"] = "renew"
    """alarm: only report it. renew: also shorten the teacher's horizon and let it grow again; after an alarm without
    labels, consistency stays off until labels of newer samples confirm the teacher."""
