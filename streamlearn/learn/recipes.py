"""Recipes: defaults of [learn], searched on a few data sets. Evidence: docs/learning.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Recipe:
    """Defaults of [learn] under one value of `learn.recipe`."""

    method: str = "mean_teacher"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of that method."""
    ema_decay: float = 0.995
    ema_share: float = 0.1
    """Until the average reaches its horizon, the horizon is this share of the steps so far."""

    def options_for(self, method: str, known: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults of the options `known` to a method. Another method than the recipe's gets mixup alone.

        Mixup acts on labelled rows, whatever the method. A consistency weight found for one method fits no other.
        """
        applicable = self.options if method == self.method else {"mixup_beta"} & self.options.keys() & known.keys()
        return {name: self.options[name] for name in applicable}


RECIPES: Mapping[str, Recipe] = {
    "image": Recipe(
        method="ict",
        options={
            "consistency": "kl",
            "consistency_weight": 1.0,
            "align": "labels",
            "rampup_steps": 500,
            "rampup_labels": 50,
            "fade_labels": 50,
            "mixup_beta": 0.5,
            "contrast_weight": 0.3,
        },
    ),
    "table": Recipe(
        options={
            "consistency": "mse",
            "consistency_weight": 5.0,
            "rampup_steps": 0,
            "rampup_labels": 100,
            "mixup_beta": 0.2,
        },
        ema_decay=0.8,
    ),
    # The papers' average: the mean of all students until the horizon is reached.
    "none": Recipe(ema_share=1.0),
}
"""By `learn.recipe`; `auto` is image for 3-d shapes, else table."""


def resolve_auto(learn: Mapping[str, Any], *, images: bool) -> dict[str, str]:
    """Values for `recipe` and `noise` of a [learn] table where they are `auto` or missing."""
    found = "image" if images else "table"
    return {name: found for name in ("recipe", "noise") if learn.get(name, "auto") == "auto"}
