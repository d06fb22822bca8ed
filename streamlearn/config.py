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

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from streamlearn.errors import ConfigError
from streamlearn.judge.settings import DriftConfig, GuardConfig, ScoreConfig
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.log.settings import LogConfig
from streamlearn.loop.settings import BatchConfig
from streamlearn.records import Schema
from streamlearn.section import Section
from streamlearn.sources import explain, merged, read_layers
from streamlearn.state.settings import StateConfig


def _import_path_or_name(value: str) -> str:
    """A built-in name, or `package.module:attribute`."""
    if ":" in value:
        module, _, attribute = value.partition(":")
        parts = [*module.split("."), *attribute.split(".")]
        if not all(part.isidentifier() for part in parts):
            msg = "wanted a built-in name or an import path such as package.module:factory"
            raise ValueError(msg)
    return value


ImportPath = Annotated[str, AfterValidator(_import_path_or_name)]


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


class SchemaConfig(Section):
    """[schema]: what a sample is."""

    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field((64,), min_length=1, max_length=4)
    """Of one sample: (features,) for a table, (channels, height, width) for an image."""
    dtype: Literal["uint8", "int8", "int16", "int32", "float16", "float32", "float64"] = "float32"
    """Of one sample as it is kept and sent."""
    classes: int | tuple[str, ...] = 10
    """How many classes, or their names."""
    max_classes: int = Field(0, ge=0, le=10_000)
    """Room for so many classes in all: outputs that answer nothing until they have a name. 0: for `classes` alone."""
    payload: Literal["json", "raw", "npy", "image"] = "json"
    """Format of a sample record without a content-type header."""
    scale: float = 1.0
    """The network sees x * scale: 1/255 = 0.00392156862745098 for uint8 images."""

    @model_validator(mode="after")
    def _check(self) -> SchemaConfig:
        names = self.classes if isinstance(self.classes, tuple) else tuple(range(self.classes))
        if not 2 <= len(names) <= 10_000:
            msg = "classes: wanted 2 to 10000 of them"
            raise ValueError(msg)
        if 0 < self.max_classes < len(names):
            msg = f"max_classes: wanted 0, or at least the {len(names)} of classes"
            raise ValueError(msg)
        if len(set(names)) != len(names):
            msg = "classes: names must differ"
            raise ValueError(msg)
        if self.payload == "image" and (len(self.shape) != 3 or self.shape[0] not in (1, 3) or self.dtype != "uint8"):
            msg = 'payload = "image" wants dtype uint8 and shape [1 or 3, height, width]'
            raise ValueError(msg)
        return self

    def build(self) -> Schema:
        """The value that the rest of the program knows."""
        names = self.classes if isinstance(self.classes, tuple) else tuple(str(i) for i in range(self.classes))
        spare = self.max_classes - len(names) if self.max_classes else None
        return Schema(shape=self.shape, dtype=np.dtype(self.dtype), classes=names, spare=spare, scale=self.scale)


class ModelConfig(Section):
    """[model]: which network."""

    factory: ImportPath = "mlp"
    """mlp, convnet, conv13, wide_resnet, or package.module:factory that returns an nn.Module from inputs to logits."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory. Built-in ones also get shape and classes."""
    norm: Literal["auto", "batch", "robust_batch", "group", "layer", "none"] = "auto"
    """Norm layers of a built-in network; auto is none for mlp, batch for the others. docs/networks.md compares them."""
    normalise: bool = True
    """Standardise inputs by running mean and variance, kept in the checkpoint. For tables; usually off for images.
    If off, inputs (after schema.scale) are clipped at 1e6, and labelled samples beyond that are not replayed."""

    @model_validator(mode="after")
    def _check_norm(self) -> ModelConfig:
        if self.norm != "auto" and (":" in self.factory or "norm" in self.options):
            msg = 'norm: is of built-in networks, and stands in one place: leave it "auto" and use options'
            raise ValueError(msg)
        return self

    def build_options(self) -> dict[str, Any]:
        """Keyword arguments of the factory."""
        return self.options if self.norm == "auto" else {**self.options, "norm": self.norm}


class LearnConfig(Section):
    """[learn]: method, costs, optimizer, noise."""

    recipe: Literal["auto", "image", "table", "none"] = "auto"
    """Defaults that were found to fit: those of images for 3-d shapes, else of tables. Each gives way to a setting that
    is set; with another `method` than its own, those of labelled rows alone hold. docs/learning.md has the evidence."""
    method: Literal["mean_teacher", "ict", "pi", "temporal_ensembling", "dsne", "supervised"] = "mean_teacher"
    """mean_teacher; ict (interpolation consistency: its noise is a mix of samples); pi (the student is its own
    teacher); temporal_ensembling (its past is); dsne (a labelled source domain beside the stream); supervised."""
    consistency: Literal["mse", "kl"] = "mse"
    """Distance between student and teacher: mean squared error of the softmaxes, or KL(teacher || student)."""
    consistency_weight: float = Field(3.0, ge=0.0, le=10_000.0)
    """Peak of w(t), against a classification cost that is summed over labelled rows and divided by all rows."""
    rampup_steps: int = Field(500, ge=0)
    """Steps until w(t) is at its peak: w(t) = peak * exp(-5 (1 - t/T)^2)."""
    rampup_labels: int = Field(0, ge=0)
    """The same by labels that have come: the lower of both is taken. 0: by steps alone."""
    fade_labels: int = Field(0, ge=0)
    """Past so many labels w(t) falls again, as 1 over their number: the more labels, the less is gained from samples
    without. 0: it stays."""
    serve: Literal["teacher", "elected"] = "elected"
    """What is published: the teacher; or the teacher or the label-only twin, whichever labels show to be better."""
    trust_labels: int = Field(10, ge=0, le=10_000)
    """w(t) falls while the teacher is less often right on so many labels than it was on ten times as many. 0: never."""
    ema_decay: float = Field(0.995, ge=0.0, lt=1.0)
    """alpha: the teacher keeps min(1 - c/(t+c), alpha) of itself, c = 1/ema_share. Its horizon is 1/(1-alpha) steps."""
    ema_share: float = Field(1.0, gt=0.0, le=1.0)
    """Until that horizon is reached, it is this share of the steps so far. 1: the plain mean of all students."""
    teacher_mode: Literal["eval", "train"] = "eval"
    """How the teacher answers the student: as it is served; or as the student does, with dropout and the statistics of
    the batch (the papers' way). Not of pi and temporal_ensembling, which ask no teacher."""
    mixup_beta: float = Field(0.0, ge=0.0, le=100.0)
    """Labelled rows are mixed in pairs, and their labels with them, with shares from Beta(b, b); 0 is off."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """So much of a label's weight goes to all classes alike."""
    align: Literal["none", "uniform", "labels"] = "none"
    """Move the teacher's answers towards even classes; or towards those that labels, held against what the twin says of
    the same samples, let expect of all: even ones while that may be chance, or labels are not drawn as samples are."""
    gate: Literal["none", "fixed", "freematch", "softmatch"] = "none"
    """Which rows the student is held against the teacher on: all, or those that it is sure of (0 or 1 by a fixed or a
    moving threshold, or a weight between)."""
    gate_threshold: float = Field(0.95, gt=0.0, lt=1.0)
    """Of the fixed gate."""
    temperature: float = Field(1.0, gt=0.0, le=10.0)
    """Below 1 the teacher's answers are sharpened: p^(1/T)."""
    target_momentum: float = Field(0.99, ge=0.0, lt=1.0)
    """Of the moving averages of alignment and gate, a step."""
    interpolation_beta: float = Field(0.5, gt=0.0, le=100.0)
    """Of ict: shares from Beta(b, b)."""
    logit_distance: float | None = Field(None, ge=0.0, le=1000.0)
    """Of mean_teacher: a second head for consistency, tied to the first by this weight. Not set: one head."""
    ensemble_momentum: float = Field(0.6, ge=0.0, lt=1.0)
    """Of temporal_ensembling: Z <- a Z + (1 - a) z each time that a sample comes."""
    ensemble_slots: int = Field(65_536, ge=1, le=16_777_216)
    """Of temporal_ensembling: so many samples' past is kept, in the checkpoint too."""
    source_path: str = ""
    """Of dsne: the labelled source domain, an .npz of x (N, *shape) and whole-number y (N,)."""
    source_rows: int = Field(32, ge=2, le=65_536)
    """Of dsne: source rows of a step."""
    source_weight: float = Field(0.1, ge=0.0, le=1.0)
    """Of dsne: share of the d-SNE loss, against cross-entropy."""
    source_margin: float = Field(1.0, ge=0.0, le=1000.0)
    """Of dsne: so much nearer than the nearest of another class must the farthest of its own class be."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """sgd (momentum, optionally Nesterov) or adamw."""
    learning_rate: float = Field(3e-3, gt=0.0, le=10.0)
    """Constant after the warm-up: a stream has no end to anneal towards."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear learning-rate warm-up."""
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """Of sgd."""
    nesterov: bool = True
    """Of sgd with momentum."""
    weight_decay: float = Field(1e-4, ge=0.0, le=1.0)
    """Decoupled with adamw; L2 with sgd."""
    noise: ImportPath = "auto"
    """auto (image for 3-d shapes, else table), image, table, none, or package.module:factory."""
    feature_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """In strong views of inputs that are no images: share of the features that take another row's value; 0 is off."""
    noise_std: float = Field(0.15, ge=0.0, le=10.0)
    """Of Gaussian noise on inputs that are no images, after normalisation or scaling."""
    pixel_noise_std: float = Field(0.0, ge=0.0, le=10.0)
    """The same on images. The paper's 0.15 is for inputs of unit variance; pixels from 0 to 1 want none or little."""
    shift_pixels: int = Field(2, ge=0, le=64)
    """Largest random shift of an image, in pixels, by reflection."""
    flip: bool = False
    """Mirror images left to right at random. Off for digits and text."""
    crop_scale: float = Field(1.0, gt=0.0, le=1.0)
    """In strong views of images: least share of the area that is cut out and stretched to the whole; 1 is off."""
    colour: float = Field(0.0, ge=0.0, le=1.0)
    """In strong views of images: largest change of brightness, contrast and saturation, as a share."""
    cutout_pixels: int = Field(0, ge=0, le=1024)
    """In strong views of images: side of the square that is covered; 0 is off."""
    seed: int = Field(0, ge=0, lt=2**32)
    """All randomness is a function of (seed, step)."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu, cuda or cuda:N."""
    threads: int = Field(0, ge=0, le=1024)
    """Intra-op CPU threads of the learner; 0 leaves torch's own choice. Bit-equal restarts need the same number."""


RECIPES: Mapping[str, Mapping[str, Any]] = {
    "image": {
        "method": "ict",
        "consistency": "kl",
        "consistency_weight": 1.0,
        "align": "labels",
        "rampup_steps": 500,
        "rampup_labels": 50,
        "fade_labels": 50,
        "ema_share": 0.1,
        "mixup_beta": 0.5,
    },
    "table": {
        "method": "mean_teacher",
        "consistency": "mse",
        "consistency_weight": 5.0,
        "rampup_steps": 0,
        "rampup_labels": 100,
        "ema_decay": 0.8,
        "ema_share": 0.1,
    },
    "none": {},
}
"""Settings of [learn] by recipe, searched on a few data sets (docs/learning.md)."""
OF_LABELLED_ROWS = ("mixup_beta", "ema_decay", "ema_share")
"""Settings of a recipe that fit every method, but for mixup with the two that do not take mixed rows."""
_NO_MIXUP = ("dsne", "temporal_ensembling")
_ONLY_WITH: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (("align", "gate", "temperature", "target_momentum"), "method", ("mean_teacher", "ict", "pi", "dsne")),
    (("teacher_mode",), "method", ("mean_teacher", "ict", "dsne")),
    (("logit_distance",), "method", ("mean_teacher",)),
    (("interpolation_beta",), "method", ("ict",)),
    (("ensemble_momentum", "ensemble_slots"), "method", ("temporal_ensembling",)),
    (("source_path", "source_rows", "source_weight", "source_margin"), "method", ("dsne",)),
    (("gate_threshold",), "gate", ("fixed",)),
    (("momentum", "nesterov"), "optimizer", ("sgd",)),
)
"""Settings of [learn] that have an effect with some values of another one alone: names, that setting, its values."""


class TwinConfig(Section):
    """[twin]: the label-only network beside the student, which says whether unlabelled samples help."""

    every: int = Field(1, ge=0, le=1000)
    """It learns every n-th step; 0 is off. It sees the labelled rows alone, averaged as the teacher is."""
    oracle: bool = False
    """In a simulation it answers each sample on arrival too, for the oracle's scores. `evaluate` sets it."""


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
    twin: TwinConfig = TwinConfig()
    guard: GuardConfig = GuardConfig()
    drift: DriftConfig = DriftConfig()
    state: StateConfig = StateConfig()
    serve: ServeConfig = ServeConfig()
    metrics: MetricsConfig = MetricsConfig()
    run: RunConfig = RunConfig()

    @property
    def learn_recipe(self) -> str:
        """Whose defaults [learn] has: a name of `RECIPES`."""
        if self.learn.recipe != "auto":
            return self.learn.recipe
        return "image" if len(self.schema_.shape) == 3 else "table"

    @property
    def is_whole_recipe(self) -> bool:
        """Whether all of its settings hold, or those of labelled rows alone: the method is another."""
        return bool(self.learn.method == RECIPES[self.learn_recipe].get("method", self.learn.method))

    @model_validator(mode="after")
    def _follow_recipe(self) -> Config:
        """What is not set in [learn] is as the recipe has it; it still counts as not set."""
        learn, recipe = self.learn, dict(RECIPES[self.learn_recipe])
        if "method" in learn.model_fields_set and not self.is_whole_recipe:
            recipe = {name: recipe[name] for name in OF_LABELLED_ROWS if name in recipe}
            if learn.method in _NO_MIXUP:
                recipe.pop("mixup_beta", None)
        values = {**dict(learn), **recipe, **learn.model_dump(exclude_unset=True)}
        followed = LearnConfig.model_construct(_fields_set=learn.model_fields_set, **values)
        object.__setattr__(self, "learn", followed)  # frozen, but not built yet
        return self

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
        self._check_method()
        return self

    def _check_labels(self) -> None:
        """Check [labels] against [schema]."""
        labels, names = self.labels, self.schema_.build().classes
        if labels.implied_class is not None and labels.implied_class not in names:
            msg = f"labels.implied_class = {labels.implied_class!r} is none of schema.classes"
            raise ValueError(msg)
        if labels.unknown_class == "grow" and not self.schema_.max_classes:
            msg = 'labels.unknown_class = "grow" wants schema.max_classes, the room to grow into'
            raise ValueError(msg)

    def _check_method(self) -> None:
        """Settings that have no effect, or under which a method would hold the student against nothing."""
        learn, batch = self.learn, self.batch
        # As they are by default they may stand there, as in a copy of the example. So may those of samples without a
        # label with "supervised", which has no use for any, and is what one changes to for a night.
        fields, idle = LearnConfig.model_fields, []
        for names, setting, values in _ONLY_WITH:
            found = getattr(learn, setting)
            if found in values or (learn.method == "supervised" and setting != "optimizer"):
                continue
            if changed := [f"learn.{name}" for name in names if getattr(learn, name) != fields[name].default]:
                wanted = " or ".join(f'"{value}"' for value in values)
                idle.append(f'{", ".join(changed)}: no effect with learn.{setting} = "{found}", only with {wanted}')
        if idle:
            msg = "; ".join(idle) + "; leave it out"
            raise ValueError(msg)
        if learn.method == "dsne" and (not learn.source_path or learn.mixup_beta):
            msg = 'learn.method = "dsne" wants learn.source_path, and learn.mixup_beta = 0: a mixed row has no class'
            raise ValueError(msg)
        if learn.method == "temporal_ensembling" and learn.mixup_beta and batch.steps == 1 and not batch.idle_steps:
            msg = (
                'learn.method = "temporal_ensembling" compares rows that come again: labelled ones are left out with '
                "learn.mixup_beta, so it wants batch.steps > 1 or batch.idle_steps"
            )
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


def settings() -> dict[str, tuple[Any, str]]:
    """Every setting as (default, description), by dotted key: for the example file and its test."""
    found: dict[str, tuple[Any, str]] = {}

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            key = prefix + (field.alias or name)
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                walk(field.annotation, key + ".")
            else:
                found[key] = (field.get_default(call_default_factory=True), field.description or "")

    walk(Config, "")
    return found
