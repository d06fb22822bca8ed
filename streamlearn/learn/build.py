"""Build what is trained from [learn]: networks, method, optimizer, on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog
import torch
from torch import nn

from streamlearn.errors import ConfigError
from streamlearn.learn.methods.dsne import DSne
from streamlearn.learn.methods.ict import make_ict
from streamlearn.learn.methods.mean_teacher import make_mean_teacher
from streamlearn.learn.methods.pi import Pi
from streamlearn.learn.methods.settings import SupervisedOptions
from streamlearn.learn.methods.supervised import Supervised
from streamlearn.learn.methods.temporal_ensembling import TemporalEnsembling
from streamlearn.learn.optimizers import SGD, AdamW
from streamlearn.learn.settings import LearnConfig
from streamlearn.learn.step import Method, Trainee, Undo
from streamlearn.learn.teacher import TeacherAverage, make_teacher
from streamlearn.models.build import FOREIGN_ERRORS, Classifier, ModelSpec, build
from streamlearn.models.column_norm import ColumnNorm
from streamlearn.models.normalise import BatchNormWarmup
from streamlearn.models.settings import ROW_NETWORKS

_log = structlog.get_logger(__name__)
MOMENTUM = 0.9
"""Of sgd, with Nesterov's correction."""
_THREADS = torch.get_num_threads()
"""Torch's own choice: as many as there are cores."""
METHODS: Mapping[str, Callable[[Any, ModelSpec, Classifier], Method]] = {
    "mean_teacher": make_mean_teacher,
    "ict": make_ict,
    "pi": Pi,
    "temporal_ensembling": TemporalEnsembling,
    "dsne": DSne,
    "supervised": lambda *_: Supervised(),
}
"""By `learn.method`: makes it from its own options, for one student."""


def make_trainee(
    spec: ModelSpec, config: LearnConfig, device: torch.device, *, host_may_ask: bool | None = None
) -> Trainee:
    """Student, teacher, method and optimizer. The host may read values in a step only on a CPU, unless overridden.

    Raises:
        ConfigError: the network or the method cannot be built.
    """
    student = build(spec, seed=config.seed).to(device)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ConfigError(f"model.factory: {student.net.__class__.__name__} has no trainable parameters")
    host_may_ask = device.type == "cpu" if host_may_ask is None else host_may_ask
    if isinstance(student.normalise, ColumnNorm):
        student.normalise.sample.host_may_ask = host_may_ask
    teacher = Classifier(make_teacher(student.net), normalise=student.normalise, scale=student.scale).eval()
    student.precision = teacher.precision = find_precision(config.precision, student, spec)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        method = METHODS[config.method](config.options, spec, student)
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


def make_twin(spec: ModelSpec, config: LearnConfig, trainee: Trainee) -> Trainee | None:
    """The label-only twin of the student: it shows whether the student gains anything from unlabelled samples.

    It is the same network, averaged as the teacher is, and learns from the labelled rows alone, with the same replay,
    noise, mixup, optimizer and schedules. A twin without average or noise would flatter the teacher. It shares the
    student's normaliser, since input statistics are measured, not learned. None where it is off, and where the student
    itself learns from labels only.
    """
    if config.twin == "off" or config.method == "supervised":
        return None
    labels_only = config.model_copy(update={"method": "supervised", "options": SupervisedOptions()})
    twin = make_trainee(spec, labels_only, trainee.student.device, host_may_ask=trainee.host_may_ask)
    for network in (twin.student, twin.teacher):
        network.normalise = trainee.student.normalise
    return twin


def _make_optimizer(student: Classifier, method: Method, config: LearnConfig) -> torch.optim.Optimizer:
    """A fused optimizer: a third of the cost of foreach on a CPU, and on a GPU it can skip a step by `found_inf`.

    Its state is created here, at zero, and not in the first step. A checkpoint then always has the same names, and a
    skipped first step leaves no uninitialised momentum behind.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
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


def threads_for(spec: ModelSpec) -> int:
    """Threads of a learner whose config names none.

    Half of torch's own choice: on two idle cores a second thread takes a step of the conv net to .8 of its time, for
    half as much CPU again, and the other cores read, decode and answer. Steps of the networks for rows are too small
    for two.
    """
    return 1 if spec.factory in ROW_NETWORKS else max(1, _THREADS // 2)


def find_precision(name: str, network: Classifier, spec: ModelSpec) -> torch.dtype:
    """The precision of that name; auto is bfloat16 for images where it is faster and the network works in it.

    Tables gain nothing: their steps are many small operations. Torch's group normalisation is slower in bfloat16 on a
    CPU.

    Raises:
        ConfigError: bfloat16 is asked for, and the network fails in it.
    """
    if name == "auto":
        if network.device.type == "cuda":
            is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_groups = any(isinstance(layer, nn.GroupNorm) for layer in network.modules())
            # There is no public question.
            is_faster = torch.cpu._is_amx_tile_supported() and not has_groups  # noqa: SLF001
        if not is_faster or len(spec.shape) != 3:
            return torch.float32
    elif name == "float32":
        return torch.float32
    try:
        _try_in_bfloat16(network, spec)
    except FOREIGN_ERRORS as error:  # such as an operation without it, in a network of the user's
        kind = type(network.net).__name__
        if name == "bfloat16":
            raise ConfigError(f"learn.precision: {kind} fails in bfloat16, take float32: {error}") from error
        _log.warning("network_needs_float32", network=kind, error=str(error))
        return torch.float32
    return torch.bfloat16


def _try_in_bfloat16(network: Classifier, spec: ModelSpec) -> None:
    """One pass forward and backward of two rows, which changes nothing."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.eval()
    network.precision = torch.bfloat16
    logits_BC = network.logits(network.prepare(torch.zeros((2, *spec.shape), device=network.device)))
    torch.autograd.grad(logits_BC.sum(), parameters, allow_unused=True)
