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

from pydantic import (
    BaseModel,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from streamlearn.errors import ConfigError
from streamlearn.judge.settings import DriftConfig, GuardConfig, ScoreConfig
from streamlearn.learn.recipes import resolve_auto
from streamlearn.learn.settings import LearnConfig, unset
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.log.settings import LogConfig
from streamlearn.loop.settings import BatchConfig
from streamlearn.models.settings import ModelConfig, SchemaConfig
from streamlearn.records import Column
from streamlearn.schema.settings import TENSORS, ColumnConfig, SourceConfig, layout
from streamlearn.section import Section
from streamlearn.serve.settings import MetricsConfig, ServeConfig
from streamlearn.sources import CHOICES, explain, merged, read_layers
from streamlearn.state.settings import StateConfig


class RunConfig(Section):
    """[run]: the process itself."""

    shutdown_s: float = Field(30.0, gt=0.0, le=3600.0)
    """Time for a clean stop: finish the step, save, publish, commit, close."""


_COLUMNS = TypeAdapter(dict[str, ColumnConfig])
_SCALE = "schema.scale: numbers of [columns] are standardised by model.normalise; remove it"
_SHAPE = "schema.shape and schema.dtype follow from [columns]; remove them"


class Config(Section):
    """Every setting. Immutable once built."""

    log: LogConfig = LogConfig()
    source: SourceConfig = SourceConfig()
    columns: dict[str, ColumnConfig] = Field(default_factory=dict)
    """[columns]: the columns of a row, from fields of the user's records. A column that is added later goes last."""
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
        """Resolve what follows from other sections, before the options that depend on it are validated.

        The row of [columns] gives the schema its shape, and the schema resolves `auto` in [learn].
        """
        if not isinstance(tables, Mapping):
            return build(tables)
        learn, schema, model = (tables.get(name, {}) for name in ("learn", "schema", "model"))
        if not all(isinstance(table, Mapping) for table in (learn, schema, model)):
            return build(tables)
        columns = _columns(tables)
        if columns and schema.keys() & {"shape", "dtype"}:
            raise ValueError(_SHAPE)
        row = {"shape": (sum(column.width for column in columns),), "dtype": "float32"} if columns else {}
        network = {"factory": "table"} if columns and "factory" not in model else {}
        shape = schema.get("shape", ())
        resolved = resolve_auto(learn, images=isinstance(shape, list | tuple) and len(shape) == 3)
        config = build(
            {**tables, "learn": {**learn, **resolved}, "schema": {**schema, **row}, "model": {**model, **network}}
        )
        config.schema_.set_columns(columns)
        unset(config.learn, resolved)
        unset(config.schema_, row)
        unset(config.model, network)
        unset(config, {"learn", "model"} - tables.keys())
        unset(config, set() if "schema" in tables else {"schema_"})
        return config

    @model_validator(mode="after")
    def _check_columns(self) -> Config:
        if self.columns and self.schema_.scale != 1.0:
            raise ValueError(_SCALE)
        if self.columns and self.source.samples.format in TENSORS:
            msg = f'source.samples.format = "{self.source.samples.format}" has no fields for [columns]'
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _check_source(self) -> Config:
        """Check settings of [source] that depend on others."""
        predictions = self.source.predictions
        topics = (*self.source.all_topics, self.log.dead_letters)
        if len(set(topics)) < len(topics):
            also = f", source.predictions.topic = {predictions.topic!r}" if predictions.topic else ""
            msg = (
                f"source.samples.topic = {list(self.source.samples.topics)}, source.labels.topic = "
                f"{self.source.labels.topic!r}{also} and log.dead_letters = {self.log.dead_letters!r} must be "
                "different topics: records of one would be read as records of another"
            )
            raise ValueError(msg)
        if self.log.kind == "embedded" and predictions.scorers > 1:
            msg = f"source.predictions.scorers = {predictions.scorers}: the embedded log has one scorer"
            raise ValueError(msg)
        shape = self.schema_.shape
        is_image = len(shape) == 3 and shape[0] in (1, 3) and self.schema_.dtype == "uint8"
        if self.source.samples.format == "image" and not is_image:
            msg = 'source.samples.format = "image" needs schema.dtype uint8 and schema.shape [1 or 3, height, width]'
            raise ValueError(msg)
        names = self.schema_.build().classes
        unknown = [name for name in self.source.labels.values.values() if name not in names]
        if unknown and self.labels.unknown_class == "refuse":
            msg = f"source.labels.values names {unknown[0]!r}, which is none of schema.classes"
            raise ValueError(msg)
        return self

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


def _columns(tables: Mapping[str, Any]) -> tuple[Column, ...]:
    """The layout of [columns]; empty if it is not valid, which validation then reports.

    Raises:
        ValueError: there are too many columns.
    """
    try:
        columns = _COLUMNS.validate_python(tables.get("columns", {}))
    except ValidationError:
        return ()
    return layout(columns)


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
            if key == "columns":
                continue  # its keys are the user's
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                for kind in (field.annotation, *CHOICES.get(key, {}).values()):
                    walk(kind, key + ".")
            else:
                found[key] = (field.get_default(call_default_factory=True), field.description or "")

    walk(Config, "")
    return found
