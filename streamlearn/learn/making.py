"""How to learn, as plain values, and what is made of them: networks, optimizer, method, device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamlearn.errors import ConfigError
from streamlearn.learn import losses
from streamlearn.learn.methods.mean_teacher import MeanTeacher
from streamlearn.learn.methods.supervised import Supervised
from streamlearn.learn.step import Method, Trainee, Undo
from streamlearn.learn.teacher import TeacherAverage, make_teacher
from streamlearn.models.build import Classifier, ModelSpec, build
from streamlearn.models.normalise import BatchNormWarmup

DISTANCES = {"mse": losses.mse_consistency, "kl": losses.kl_consistency}


@dataclass(frozen=True)
class LearnSettings:
    """How to learn; each field means what the key of its name in `[learn]` means."""

    method: str
    consistency: str
    consistency_weight: float
    rampup_steps: int
    ema_decay: float
    optimizer: str
    learning_rate: float
    warmup_steps: int
    momentum: float
    nesterov: bool
    weight_decay: float
    noise: str
    noise_std: float
    pixel_noise_std: float
    shift_pixels: int
    flip: bool
    seed: int
    device: str
    threads: int
    twin_every: int = 0
    """The label-only twin learns every n-th step; 0 is off."""


def make_trainee(spec: ModelSpec, settings: LearnSettings, device: torch.device) -> Trainee:
    """Student, teacher, optimizer, and what belongs to them.

    Raises:
        ConfigError: the network or the optimizer cannot be made.
    """
    student = build(spec, seed=settings.seed).to(device)
    teacher = Classifier(make_teacher(student.net), normalise=student.normalise, scale=student.scale).eval()
    return Trainee(
        student=student,
        teacher=teacher,
        optimizer=_make_optimizer(student, settings),
        average=TeacherAverage(teacher.net, student.net),
        warmup=BatchNormWarmup(student.net),
        undo=Undo(student),
        host_may_ask=device.type == "cpu",
    )


def make_method(settings: LearnSettings) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    if settings.consistency not in DISTANCES:
        raise ConfigError(f"learn.consistency: {settings.consistency!r} is none of {', '.join(DISTANCES)}")
    if settings.method == "mean_teacher":
        return MeanTeacher(DISTANCES[settings.consistency])
    if settings.method == "supervised":
        return Supervised()
    raise ConfigError(f"learn.method: {settings.method!r} is none of mean_teacher, supervised")


def _make_optimizer(student: Classifier, settings: LearnSettings) -> torch.optim.Optimizer:
    """Fused: it is a third of the cost of foreach on a CPU, and on a GPU it can leave out a step without being asked.

    Its state is made here, at zero, and not in the first step: so a checkpoint always has the same names, and a first
    step that is left out does not leave a momentum behind that was never written.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError(f"model.factory: {student.net.__class__.__name__} has no parameters to learn")
    lr, decay, momentum = settings.learning_rate, settings.weight_decay, settings.momentum
    if settings.optimizer == "adamw":
        adamw = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=True)
        for parameter in parameters:
            adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return adamw
    if settings.optimizer == "sgd":
        nesterov = settings.nesterov and momentum > 0.0
        sgd = torch.optim.SGD(parameters, lr=lr, weight_decay=decay, momentum=momentum, nesterov=nesterov, fused=True)
        for parameter in parameters if momentum > 0.0 else ():
            sgd.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        return sgd
    raise ConfigError(f"learn.optimizer: {settings.optimizer!r} is none of sgd, adamw")


def find_device(name: str) -> torch.device:
    """The device of that name; auto is a GPU where there is one.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"learn.device: {name}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device
