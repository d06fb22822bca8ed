"""Every setting, its default and its bound. How file and environment are read and merged is in `sources.py`.

Sources, the later wins: defaults here, the TOML file, the environment (`STREAMLEARN_SERVE__PORT=8000` sets
`serve.port`), then what the command line names. All errors are reported at once, each with key, value, bound and
source, before anything is opened. Below the wiring nobody knows that a config exists: parts get plain values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from streamlearn.errors import ConfigError
from streamlearn.judge.settings import DriftConfig, GuardConfig, ScoreConfig
from streamlearn.learn.methods.settings import OPTIONS
from streamlearn.learn.noise.settings import NOISES
from streamlearn.learn.recipes import resolve_auto
from streamlearn.learn.settings import LearnConfig, unset
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.log.settings import LogConfig
from streamlearn.loop.settings import BatchConfig
from streamlearn.models.settings import ModelConfig, SchemaConfig
from streamlearn.section import Section
from streamlearn.sources import explain, merged, read_layers
from streamlearn.state.settings import StateConfig

TOKENS = ("token", "predict_token", "label_token", "admin_token")
"""Settings of [serve] that are secrets, each with a `_file` beside it."""
MAX_TOKEN_BYTES = 4096
TokenFile = Annotated[Path | None, BeforeValidator(lambda given: given or None)]
"""A path; an empty text, which is how compose passes on a variable that is not set, is none."""


def _read_token(path: Path) -> str:
    """The one line in a file, without the white space around it.

    Raises:
        ValueError: it cannot be read, is empty, too long, or more than a line. What it holds is never shown.
    """
    try:
        if not path.is_file():
            msg = f"{path}: there is no such file, or it is none that can be read"
            raise ValueError(msg)
        with path.open("rb") as file:
            token = file.read(MAX_TOKEN_BYTES + 1).decode().strip()
    except OSError as error:
        msg = f"{path}: {error.strerror or error}"
        raise ValueError(msg) from None
    except UnicodeDecodeError:
        msg = f"{path}: wanted UTF-8 text"
        raise ValueError(msg) from None
    if not token:
        msg = f"{path} is empty: write a token into it, or unset the setting"
        raise ValueError(msg)
    if len(token.encode()) > MAX_TOKEN_BYTES or not token.isprintable():
        msg = f"{path}: wanted one line of at most {MAX_TOKEN_BYTES} bytes"
        raise ValueError(msg)
    return token


class ServeConfig(Section):
    """[serve]: the HTTP side."""

    host: str = "127.0.0.1"
    """Address to bind. Other machines are refused unless a token is set, or `insecure` says that it is meant."""
    port: int = Field(8080, ge=0, le=65_535)
    """0 takes a free one and prints it."""
    processes: int = Field(2, ge=1, le=256)
    """Server processes behind the port."""
    threads: int = Field(1, ge=1, le=256)
    """Intra-op CPU threads of each server."""
    token_file: TokenFile = None
    """File that holds `token`, in its place: a secret of Docker or Kubernetes. Read once, at the start."""
    predict_token_file: TokenFile = None
    """The same for `predict_token`."""
    label_token_file: TokenFile = None
    """The same for `label_token`."""
    admin_token_file: TokenFile = None
    """The same for `admin_token`."""
    token: SecretStr | None = None
    """Bearer token; all routes but health and admin want it when set. Better from the environment than from a file."""
    predict_token: SecretStr | None = None
    """Opens predictions only."""
    label_token: SecretStr | None = None
    """Opens labels and samples only."""
    admin_token: SecretStr | None = None
    """Opens everything, and alone the routes that change what is served."""
    insecure: bool = False
    """Without a token: allow a public address, and any Host and Origin header."""
    max_body_bytes: int = Field(16 << 20, ge=1024, le=1 << 30)
    """Larger bodies get 413."""
    max_instances: int = Field(1024, ge=1, le=100_000)
    """Most samples or labels in one request."""
    queue: int = Field(256, ge=1, le=100_000)
    """Requests waiting for the model; more get 429 with Retry-After."""
    batch: int = Field(64, ge=1, le=65_536)
    """Most rows of one forward pass."""
    timeout_s: float = Field(10.0, gt=0.0, le=600.0)
    """Longest wait of a request for the model or the log."""
    stale_after_s: float = Field(120.0, gt=0.0)
    """/health/ready says no when the learner has not been seen for so long."""

    @field_validator(*TOKENS, mode="before")
    @classmethod
    def _from_file(cls, given: Any, info: ValidationInfo) -> Any:
        """A token by itself or from its file, which stands above it and is validated first."""
        path = info.data.get(f"{info.field_name}_file")
        if path is None:
            return given
        if given:
            msg = f"serve.{info.field_name} and serve.{info.field_name}_file are both set: keep one"
            raise ValueError(msg)
        return _read_token(path)

    def open_token_files(self) -> list[Path]:
        """Those that others than their owner and group may read, or others than their owner may write."""
        paths = [path for name in TOKENS if (path := getattr(self, f"{name}_file")) is not None]
        return [path for path in paths if path.stat().st_mode & 0o027]


class MetricsConfig(Section):
    """[metrics]: the learner's own /metrics."""

    host: str = "127.0.0.1"
    """Address of the learner's own /metrics."""
    port: int = Field(9109, ge=0, le=65_535)
    """Port of the learner's own /metrics; under `run` the servers' /metrics shows it as well. 0 takes a free one."""


class RunConfig(Section):
    """[run]: the process itself."""

    shutdown_s: float = Field(30.0, gt=0.0, le=3600.0)
    """Time for a clean stop: finish the step, save, publish, commit, close."""
    log_format: Literal["auto", "console", "json"] = "auto"
    """Of the program's own log lines: console on a terminal, JSON elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is printed."""


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
    def _check(self) -> Config:
        serve = self.serve
        loopback = serve.host in ("127.0.0.1", "::1", "localhost")
        tokens = (serve.token, serve.predict_token, serve.label_token, serve.admin_token)
        if not (loopback or any(tokens) or serve.insecure):
            msg = (
                f"serve.host = {serve.host!r} is open to other machines: set serve.token "
                "(STREAMLEARN_SERVE__TOKEN), or serve.insecure = true if that is meant"
            )
            raise ValueError(msg)
        self._check_labels()
        return self

    def _check_labels(self) -> None:
        """Settings of [labels] that hang together with others."""
        labels, names = self.labels, self.schema_.build().classes
        if (labels.implied_class is None) != (labels.implied_after_s is None):
            msg = "labels.implied_class and labels.implied_after_s: set both or neither"
            raise ValueError(msg)
        if labels.implied_class is not None and labels.implied_class not in names:
            msg = f"labels.implied_class = {labels.implied_class!r} is none of schema.classes"
            raise ValueError(msg)
        if labels.implied_after_s is not None and labels.implied_after_s > labels.horizon_s:
            msg = f"labels.implied_after_s = {labels.implied_after_s} is past labels.horizon_s = {labels.horizon_s}"
            raise ValueError(msg)
        if labels.unknown_class == "grow" and not self.schema_.max_classes:
            msg = 'labels.unknown_class = "grow" wants schema.max_classes, the room to grow into'
            raise ValueError(msg)


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


_CHOICES: Mapping[str, Mapping[str, type[Section]]] = {"learn.options": OPTIONS, "learn.noise_options": NOISES}
"""Tables whose keys depend on another setting."""


def settings() -> dict[str, tuple[Any, str]]:
    """Every setting as (default, description), by dotted key: for the example file and its test."""
    found: dict[str, tuple[Any, str]] = {}

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            key = prefix + (field.alias or name)
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                for kind in (field.annotation, *_CHOICES.get(key, {}).values()):
                    walk(kind, key + ".")
            else:
                found[key] = (field.get_default(call_default_factory=True), field.description or "")

    walk(Config, "")
    return found
