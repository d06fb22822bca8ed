"""Every setting, its default and its bound. How file and environment are read and merged is in `sources.py`.

Sources, the later wins: defaults here, the TOML file, the environment (`STREAMLEARN_SERVE__PORT=8000` sets
`serve.port`), then what the command line names. All errors are reported at once, each with key, value, bound and
source, before anything is opened. Below the wiring nobody knows that a config exists: parts get plain values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from streamlearn.errors import ConfigError
from streamlearn.judge.settings import DriftConfig, GuardConfig, ScoreConfig
from streamlearn.learn.recipes import resolve_auto
from streamlearn.learn.settings import LearnConfig, unset
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.log.settings import LogConfig
from streamlearn.loop.settings import BatchConfig
from streamlearn.models.settings import ModelConfig, SchemaConfig
from streamlearn.section import Section
from streamlearn.serve.settings import MetricsConfig, ServeConfig
from streamlearn.sources import CHOICES, explain, merged, read_layers
from streamlearn.state.settings import StateConfig


class RunConfig(Section):
    """[run]: the process itself."""

    shutdown_s: float = Field(30.0, gt=0.0, le=3600.0)
    """Time for a clean stop: finish the step, save, publish, commit, close."""


class Config(Section):
    """Every setting. Immutable once built."""

    log: LogConfig = LogConfig()
    schema_: SchemaConfig = Field(SchemaConfig(), alias="schema")
    model: ModelConfig = ModelConfig()
    learn: LearnConfig = LearnConfig()
    batch: BatchConfig = BatchConfig()
    labels: LabelsConfig = LabelsConfig()
    score: ScoreConfig = ScoreConfig()
    guard: GuardConfig = GuardConfig()
    drift: DriftConfig = DriftConfig()
    state: StateConfig = StateConfig()
    serve: ServeConfig = ServeConfig()
    metrics: MetricsConfig = MetricsConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="wrap")
    @classmethod
    def _resolve_auto(cls, tables: Any, build: ModelWrapValidatorHandler[Config]) -> Config:
        """Resolve `auto` in [learn] by the schema, before the options that depend on it are validated."""
        learn = tables.get("learn", {}) if isinstance(tables, Mapping) else None
        if not isinstance(learn, Mapping):
            return build(tables)
        schema = tables.get("schema", {})
        shape = schema.get("shape", ()) if isinstance(schema, Mapping) else ()
        resolved = resolve_auto(learn, images=isinstance(shape, list | tuple) and len(shape) == 3)
        config = build({**tables, "learn": {**learn, **resolved}})
        unset(config.learn, resolved)
        unset(config, {"learn"} - tables.keys())
        return config

    @model_validator(mode="after")
    def _check_classes(self) -> Config:
        """Check that settings name classes of the schema."""
        names = self.schema_.build().classes
        weights = self.learn.class_weights
        for key, given in (
            ("score.thresholds", self.score.thresholds),
            ("score.classes", self.score.classes),
            ("learn.class_weights", weights if isinstance(weights, Mapping) else ()),
        ):
            if unknown := [name for name in given if name not in names]:
                msg = f"{key}: {unknown[0]!r:.80} is none of schema.classes"
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> Config:
        """Check settings of [labels] that depend on others."""
        labels, names = self.labels, self.schema_.build().classes
        if labels.implied_class is not None and labels.implied_class not in names:
            msg = f"labels.implied_class = {labels.implied_class!r} is none of schema.classes"
            raise ValueError(msg)
        if labels.unknown_class == "grow" and not self.schema_.max_classes:
            msg = 'labels.unknown_class = "grow" wants schema.max_classes, the room to grow into'
            raise ValueError(msg)
        return self


def load_config(
    path: Path | None = None, *, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Config:
    """Build the config from file, environment and overrides (dotted keys, such as `serve.port`), the later wins.

    Raises:
        ConfigError: with every error there is, each naming its key, value, bound and source.
    """
    layers = read_layers(path, os.environ if environ is None else environ, overrides or {})
    try:
        return Config.model_validate(merged(layers))
    except ValidationError as error:
        raise ConfigError(explain(error, layers)) from error


def settings() -> dict[str, tuple[Any, str]]:
    """Every setting as (default, description), by dotted key: for the example file and its test."""
    found: dict[str, tuple[Any, str]] = {}

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            key = prefix + (field.alias or name)
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                for kind in (field.annotation, *CHOICES.get(key, {}).values()):
                    walk(kind, key + ".")
            else:
                found[key] = (field.get_default(call_default_factory=True), field.description or "")

    walk(Config, "")
    return found
