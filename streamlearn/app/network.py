"""Which network the config names; apart from `wiring`, since it takes torch to say so."""

from __future__ import annotations

from streamlearn.config import Config
from streamlearn.models.build import ModelSpec


def model_spec(config: Config) -> ModelSpec:
    """The network that the config names; published with its weights."""
    schema = config.schema_.build()
    return ModelSpec(
        factory=config.model.factory,
        options=config.model.options,
        shape=schema.shape,
        classes=schema.capacity,
        spare=schema.spare,
        normalise=config.model.normalise,
        scale=config.schema_.scale,
    )
