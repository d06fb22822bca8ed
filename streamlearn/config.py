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
from streamlearn.learn.methods.settings import OPTIONS
from streamlearn.learn.noise.settings import NOISES
from streamlearn.learn.recipes import resolve_auto
from streamlearn.learn.settings import LearnConfig, unset
from streamlearn.models.settings import ModelConfig, SchemaConfig
from streamlearn.section import Section
from streamlearn.sources import explain, merged, read_layers

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


class TopicsConfig(Section):
    """[log.topics]: names of the topics."""

    samples: str = Field("samples", pattern=r"^[a-zA-Z0-9._-]{1,249}$")
    """Topic of samples, keyed by sample id."""
    labels: str = Field("labels", pattern=r"^[a-zA-Z0-9._-]{1,249}$")
    """Topic of labels, keyed by sample id, with as many partitions as samples."""
    dead_letters: str = Field("dead-letters", pattern=r"^[a-zA-Z0-9._-]{1,249}$")
    """Topic of records that could not be read, with the reason in their headers."""

    @model_validator(mode="after")
    def _check(self) -> TopicsConfig:
        if len({self.samples, self.labels, self.dead_letters}) < 3:
            msg = (
                f"samples = {self.samples!r}, labels = {self.labels!r} and dead_letters = {self.dead_letters!r} must be"
                " three topics: what is in one would be read as the other"
            )
            raise ValueError(msg)
        return self


class KafkaConfig(Section):
    """[log.kafka]: how to reach Kafka."""

    bootstrap_servers: str = "127.0.0.1:9092"
    """Comma-separated host:port."""
    group_id: str = Field("streamlearn", min_length=1)
    """Offsets are committed to this group for lag dashboards only; no group is joined."""
    replication_factor: int = Field(1, ge=1, le=10)
    """Of topics created here."""
    options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Passed to kafka-python as they are: security_protocol, sasl_mechanism, sasl_plain_username, ssl_cafile, …"""


class LogConfig(Section):
    """[log]: where records come from."""

    kind: Literal["embedded", "kafka"] = "embedded"
    """Where records come from: a log on this disk, or Kafka."""
    topics: TopicsConfig = TopicsConfig()
    kafka: KafkaConfig = KafkaConfig()
    partitions: int = Field(1, ge=1, le=1024)
    """Of samples and of labels, where they are created here."""
    create_topics: bool = True
    """Create missing topics. Off: a missing topic is an error."""
    start: Literal["earliest", "latest"] = "earliest"
    """Where a learner without a checkpoint begins."""
    on_trimmed: Literal["stop", "skip"] = "stop"
    """When the checkpoint's offset has left the log: stop, or go on at the oldest record and count the gap."""
    overload: Literal["keep", "thin"] = "keep"
    """Samples come faster than they are learned: let them wait, or pass by those without a label, evenly."""
    thin_above_records: int = Field(10_000, ge=1)
    """Samples that wait in the log, above which `thin` passes some by."""
    embedded_max_age_s: float = Field(30 * 86400.0, ge=1.0)
    """Embedded log: older records are trimmed once the learner has read them, and its checkpoint is past them."""
    embedded_max_bytes: int = Field(4 << 30, ge=1 << 20)
    """Embedded log: past this size the oldest records of a topic are trimmed, those the learner has read first."""
    max_record_bytes: int = Field(4 << 20, ge=64, le=64 << 20)
    """A larger record is a dead letter (and 413 over HTTP)."""


class BatchConfig(Section):
    """[batch]: how a micro-batch is formed."""

    fresh: int = Field(64, ge=1, le=65_536)
    """Fresh samples of a micro-batch."""
    labelled: int = Field(32, ge=1, le=65_536)
    """Labelled rows beside them: new labels first, then replay from the labelled memory."""
    steps: int = Field(4, ge=1, le=1000)
    """Steps for each micro-batch, as far as there is time: those after the first have no records, learn from labelled
    and recent samples once more, and are left out while another whole micro-batch waits."""
    idle_steps: int = Field(0, ge=0, le=100_000)
    """So many more at most while no record comes, as the clock allows. The journal knows how many there were."""
    recent_rows: int = Field(2048, ge=1, le=1_000_000)
    """Newest samples that are kept for these steps, in memory and in the checkpoint; of large ones 64 MiB, or a
    micro-batch where that is more."""
    max_age_s: float = Field(0.5, ge=0.001, le=3600.0)
    """Longest wait of the first record of a micro-batch before it is closed."""
    max_labels: int = Field(1024, ge=1, le=1_000_000)
    """Most label records taken into one step."""
    prefetch_records: int = Field(2048, ge=1, le=1_000_000)
    """Most decoded records waiting, for each partition; of large samples 256 MiB in all partitions together."""
    merge_wait_s: float = Field(1.0, ge=0.0, le=60.0)
    """How long the merge by time waits for a partition that is behind, before it goes on without it."""


class LabelsConfig(Section):
    """[labels]: how long samples and labels are kept."""

    payload_max_bytes: int = Field(1 << 30, ge=1 << 16)
    """Payloads kept in the sample store; past it a late label's payload is read back from the log."""
    payload_max_age_s: float = Field(30 * 86400.0, ge=1.0)
    """The same by age."""
    horizon_s: float = Field(30 * 86400.0, ge=1.0)
    """How long a sample's id, and a label without a sample, are remembered."""
    max_ids: int = Field(10_000_000, ge=1000)
    """Most sample ids remembered, whatever their age."""
    memory_rows: int = Field(5000, ge=1, le=10_000_000)
    """Rows of the replay buffer, class-balanced; of large rows 512 MiB."""
    corrections: Literal["last", "first"] = "last"
    """Which label of a sample counts when two differ. A retraction is final under first, and undone by a later label
    under last."""
    unknown_class: Literal["hold", "refuse", "grow"] = "hold"
    """A label of a class that has no such name: hold and report it, refuse it (dead letter), or grow into a spare."""
    max_held: int = Field(10_000, ge=1, le=10_000_000)
    """Labels of unknown classes that are held, at most."""
    implied_class: str | None = None
    """The class of a sample that has no label after `implied_after_s`, as in "no click"."""
    implied_after_s: float | None = Field(None, gt=0.0)
    """When it is implied, after the sample. At most `horizon_s`."""
    wanted_rows: int = Field(1000, ge=0, le=20_000)
    """Samples that `GET /label/wanted` chooses from: those whose label would help most; 0 is off."""
    wanted_per_hour: int = Field(1000, ge=1, le=1_000_000)
    """The labelling budget: most samples that it hands out within an hour."""
    wanted_again_after_s: float = Field(86400.0, gt=0.0)
    """When a sample that was handed out, and got no label, may be handed out again."""


class ScoreConfig(Section):
    """[score]: how the model is judged."""

    window: int = Field(1000, ge=10, le=1_000_000)
    """Labelled predictions in the windowed accuracy."""
    fading: float = Field(0.999, ge=0.5, lt=1.0)
    """What an older prediction weighs against the next newer one in faded scores."""
    calibration_bins: int = Field(15, ge=2, le=1000)
    """Bins of confidence, of equal width, for the calibration error."""


class BankConfig(Section):
    """[bank]: which average of the student is served: the teacher's, one of another horizon, or the twin's."""

    serve: Literal["teacher", "elected"] = "elected"
    """teacher: always the one that the student learns from. elected: the one that labels show to be best."""
    decays: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], ...] = Field((), max_length=8)
    """alpha of further averages, each a pass over the weights a step. The twin is a candidate too, where it is on."""
    alpha: float = Field(0.05, gt=0.0, le=1.0)
    """Largest probability that one is promoted by chance within 10,000 labels. Smaller: fewer changes, made later."""
    window: int = Field(500, ge=10, le=100_000)
    """Newest labels in the accuracy that is reported of each candidate. It decides nothing."""

    @field_validator("decays")
    @classmethod
    def _differ(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{decay:g}" for decay in value}) != len(value):
            raise ValueError("decays: wanted each once")
        return tuple(sorted(value))  # in any order they are the same candidates


class GuardConfig(Section):
    """[guard]: what watches over the model, and mends it."""

    on: bool = True
    """Freeze, roll back, adopt the twin, lower the consistency weight. Off, it only watches for nothing."""
    look_every_steps: int = Field(20, ge=1, le=100_000)
    """Steps between two looks."""
    max_skipped: int = Field(3, ge=1, le=1000)
    """Steps in a row that are not finite, until the last good weights are put back."""
    patience: int = Field(3, ge=1, le=1000)
    """Looks in a row that are bad, until something is done."""
    entropy_ratio: float = Field(0.5, ge=0.0, le=1.0)
    """Collapse: the answers to the labelled memory have less than this share of its labels' entropy."""
    max_loss: float = Field(0.02, ge=0.0, le=1.0)
    """The guard acts where the 95 % interval of the teacher's gain over its twin is wholly below minus this share."""
    keep_good_every_steps: int = Field(200, ge=1, le=1_000_000)
    """Steps between two copies of good weights, kept to be rolled back to."""
    backoff_steps: int = Field(200, ge=1, le=1_000_000)
    """Steps of a lower learning rate after a rollback; doubles when it happens again."""


class DriftConfig(Section):
    """[drift]: what to do when the world changes."""

    reaction: Literal["alarm", "renew"] = "renew"
    """Say so only; or shorten the teacher's horizon and let it grow again, and after an alarm without labels do not
    believe it until labels of new samples say that it is right."""
    delta: float = Field(0.002, gt=0.0, lt=1.0)
    """Of the ADWIN that watches errors, at each label: smaller means fewer false alarms, and later ones."""


class StateConfig(Section):
    """[state]: where and how often state is saved."""

    dir: Path = Path("streamlearn-state")
    """Checkpoints, journal, sample store, published teachers, and the embedded log."""
    checkpoint_every_s: float = Field(30.0, gt=0.0)
    """Between two checkpoints, at most."""
    checkpoint_every_steps: int = Field(0, ge=0)
    """The same in steps; 0 is off."""
    keep_checkpoints: int = Field(3, ge=2, le=1000)
    """A corrupt newest falls back to the one before, so never fewer than two."""
    publish_every_s: float = Field(1.0, ge=0.01)
    """Between two published teachers, at least."""
    keep_published: int = Field(5, ge=2, le=10_000)
    """Published teachers kept on disk."""
    keep_history: int = Field(10, ge=0, le=10_000)
    """Older ones kept besides, further and further apart, to roll back to."""
    journal_max_bytes: int = Field(1 << 30, ge=1 << 16)
    """Past it, or 32 MB, the oldest part of the journal is removed, except what the oldest kept checkpoint needs. If
    that is more, checkpoints are saved sooner, and learning waits for them."""


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
    bank: BankConfig = BankConfig()
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
