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
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from streamlearn.errors import ConfigError
from streamlearn.records import Schema
from streamlearn.section import Section
from streamlearn.serve.settings import MetricsConfig, ServeConfig
from streamlearn.sources import explain, merged, read_layers


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


class TwinConfig(Section):
    """[twin]: the label-only network beside the student, which says whether unlabelled samples help."""

    every: int = Field(1, ge=0, le=1000)
    """It learns every n-th step; 0 is off. It sees the labelled rows alone, averaged as the teacher is."""
    oracle: bool = False
    """In a simulation it answers each sample on arrival too, for the oracle's scores. `evaluate` sets it."""


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
    believe it until labels of new samples say that it is right (learn.trust_labels)."""
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
    bank: BankConfig = BankConfig()
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
        self._check_labels()
        self._check_method()
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
