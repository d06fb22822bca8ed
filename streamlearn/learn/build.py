"""Build what is trained from [learn]: networks, method, optimizer, on one device."""

from __future__ import annotations

import torch

from streamlearn.errors import ConfigError
from streamlearn.learn.embedding import Embedding
from streamlearn.learn.methods.dsne import DSne, read_source
from streamlearn.learn.methods.ict import InterpolationConsistency
from streamlearn.learn.methods.mean_teacher import DualHeadMeanTeacher, MeanTeacher
from streamlearn.learn.methods.pi import Pi
from streamlearn.learn.methods.settings import (
    DSneOptions,
    InterpolationOptions,
    MeanTeacherOptions,
    PiOptions,
    SupervisedOptions,
    TargetOptions,
    TemporalEnsemblingOptions,
)
from streamlearn.learn.methods.supervised import Supervised
from streamlearn.learn.methods.temporal_ensembling import TemporalEnsembling
from streamlearn.learn.optimizers import SGD, AdamW
from streamlearn.learn.settings import LearnConfig
from streamlearn.learn.step import Method, Trainee, Undo
from streamlearn.learn.targets import Targets
from streamlearn.learn.teacher import TeacherAverage, make_teacher
from streamlearn.models.build import Classifier, ModelSpec, build
from streamlearn.models.column_norm import ColumnNorm
from streamlearn.models.normalise import BatchNormWarmup

MOMENTUM = 0.9
"""Of sgd, with Nesterov's correction."""


def make_trainee(
    spec: ModelSpec, config: LearnConfig, device: torch.device, *, host_may_ask: bool | None = None
) -> Trainee:
    """Student, teacher, method and optimizer. The host may read values in a step only on a CPU, unless overridden.

    Raises:
        ConfigError: the network or the method cannot be built.
    """
    student = build(spec, seed=config.seed).to(device)
    host_may_ask = device.type == "cpu" if host_may_ask is None else host_may_ask
    if isinstance(student.normalise, ColumnNorm):
        student.normalise.sample.host_may_ask = host_may_ask
    teacher = Classifier(make_teacher(student.net), normalise=student.normalise, scale=student.scale).eval()
    method = make_method(spec, config, student)
    return Trainee(
        method=method,
        student=student,
        teacher=teacher,
        optimizer=_make_optimizer(student, method, config),
        average=TeacherAverage(teacher.net, student.net, share=config.ema_share),
        warmup=BatchNormWarmup(student.net),
        undo=Undo(student),
        host_may_ask=host_may_ask,
    )


def make_method(spec: ModelSpec, config: LearnConfig, student: Classifier) -> Method:
    """The method that the options belong to, for this student.

    Raises:
        ConfigError: the network does not suit the method, or the source set cannot be read.
    """
    options = config.options
    if spec.has_categories and (isinstance(options, InterpolationOptions) or config.mixup_beta > 0.0):
        mixing = "learn.options.mixup_beta" if config.mixup_beta > 0.0 else f"learn.method: {config.method}"
        raise ConfigError(f"{mixing} mixes samples, and categories cannot be mixed: use mean_teacher or pi, unmixed")
    device = next(student.parameters(), torch.zeros(0)).device
    if isinstance(options, SupervisedOptions):
        return Supervised()
    if isinstance(options, TemporalEnsemblingOptions):
        return TemporalEnsembling(options, classes=spec.classes, device=device)
    assert isinstance(options, TargetOptions), options
    targets = Targets(options, classes=spec.classes, device=device)
    if isinstance(options, PiOptions):
        return Pi(options, targets)
    if isinstance(options, InterpolationOptions):
        return InterpolationConsistency(options, targets)
    if isinstance(options, MeanTeacherOptions) and options.logit_distance is None:
        return MeanTeacher(options, targets)
    return _make_embedded(spec, config, student, targets)


def _make_embedded(spec: ModelSpec, config: LearnConfig, student: Classifier, targets: Targets) -> Method:
    """Methods that need the student's embedding."""
    options, embedding = config.options, Embedding(student.net, classes=spec.classes, method=config.method)
    if isinstance(options, DSneOptions):
        source = read_source(options, spec, device=next(student.parameters()).device)
        return DSne(options, targets, embedding, source)
    assert isinstance(options, MeanTeacherOptions), options
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return DualHeadMeanTeacher(options, targets, embedding)


def _make_optimizer(student: Classifier, method: Method, config: LearnConfig) -> torch.optim.Optimizer:
    """A fused optimizer: a third of the cost of foreach on a CPU, and on a GPU it can skip a step by `found_inf`.

    Its state is created here, at zero, and not in the first step. A checkpoint then always has the same names, and a
    skipped first step leaves no uninitialised momentum behind.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError(f"model.factory: {student.net.__class__.__name__} has no trainable parameters")
    parameters += method.parameters().values()
    lr, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adamw":
        adamw = AdamW(parameters, lr=lr, weight_decay=decay, fused=True)
        for parameter in parameters:
            adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return adamw
    sgd = SGD(parameters, lr=lr, weight_decay=decay, momentum=MOMENTUM, nesterov=True, fused=True)
    for parameter in parameters:
        sgd.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    return sgd


def find_device(name: str) -> torch.device:
    """The device of that name; auto is a GPU if there is one.

    Raises:
        ConfigError: the device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"learn.device: {name}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device
