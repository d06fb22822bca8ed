"""How to learn, as plain values, and what is made of them: networks, optimizer, method, device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamlearn.errors import ConfigError
from streamlearn.learn import losses
from streamlearn.learn.embedding import Embedding
from streamlearn.learn.methods.dsne import DSne, read_source
from streamlearn.learn.methods.ict import InterpolationConsistency
from streamlearn.learn.methods.mean_teacher import DualHeadMeanTeacher, MeanTeacher
from streamlearn.learn.methods.pi import Pi
from streamlearn.learn.methods.supervised import Supervised
from streamlearn.learn.methods.temporal_ensembling import TemporalEnsembling
from streamlearn.learn.noise import NoiseSettings
from streamlearn.learn.optimizers import SGD, AdamW
from streamlearn.learn.step import Method, Trainee, Undo
from streamlearn.learn.targets import Targets
from streamlearn.learn.teacher import TeacherAverage, make_teacher
from streamlearn.models.build import Classifier, ModelSpec, build
from streamlearn.models.normalise import BatchNormWarmup

DISTANCES: dict[str, losses.Distance] = {"mse": losses.mse_consistency, "kl": losses.kl_consistency}
METHODS = ("mean_teacher", "ict", "pi", "temporal_ensembling", "dsne", "supervised")


@dataclass(frozen=True)
class LearnSettings(NoiseSettings):
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
    seed: int
    device: str
    threads: int
    ema_share: float = 1.0
    teacher_mode: str = "eval"
    rampup_labels: int = 0
    fade_labels: int = 0
    mixup_beta: float = 0.0
    label_smoothing: float = 0.0
    interpolation_beta: float = 0.5
    logit_distance: float | None = None
    align: str = "none"
    gate: str = "none"
    gate_threshold: float = 0.95
    temperature: float = 1.0
    target_momentum: float = 0.99
    ensemble_momentum: float = 0.6
    ensemble_slots: int = 65_536
    source_path: str = ""
    source_rows: int = 32
    source_weight: float = 0.1
    source_margin: float = 1.0
    twin_every: int = 0
    """The label-only twin learns every n-th step; 0 is off."""


def make_trainee(spec: ModelSpec, settings: LearnSettings, device: torch.device) -> Trainee:
    """Student, teacher, method, optimizer, and what belongs to them.

    Raises:
        ConfigError: the network, the method or the optimizer cannot be made.
    """
    student = build(spec, seed=settings.seed).to(device)
    teacher = Classifier(make_teacher(student.net), normalise=student.normalise, scale=student.scale).eval()
    method = make_method(spec, settings, student)
    return Trainee(
        method=method,
        student=student,
        teacher=teacher,
        optimizer=_make_optimizer(student, method, settings),
        average=TeacherAverage(teacher.net, student.net, share=settings.ema_share),
        warmup=BatchNormWarmup(student.net),
        undo=Undo(student),
        host_may_ask=device.type == "cpu",
    )


def make_method(spec: ModelSpec, settings: LearnSettings, student: Classifier) -> Method:
    """The method of that name, for this student.

    Raises:
        ConfigError: there is none, the network does not suit it, or the source set cannot be read.
    """
    if settings.consistency not in DISTANCES:
        raise ConfigError(f"learn.consistency: {settings.consistency!r} is none of {', '.join(DISTANCES)}")
    name, distance, apart = settings.method, DISTANCES[settings.consistency], settings.logit_distance
    device = next(student.parameters(), torch.zeros(0)).device
    targets = Targets(
        classes=spec.classes,
        device=device,
        align=settings.align,
        gate=settings.gate,
        threshold=settings.gate_threshold,
        temperature=settings.temperature,
        momentum=settings.target_momentum,
        teacher_mode=settings.teacher_mode,
    )
    made: Method
    match name:
        case "supervised":
            made = Supervised()
        case "mean_teacher" if apart is None:
            made = MeanTeacher(distance, targets)
        case "mean_teacher":
            assert apart is not None
            embedding = Embedding(student.net, classes=spec.classes, method=name)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(settings.seed)
                made = DualHeadMeanTeacher(distance, targets, embedding, logit_distance=apart)
        case "ict":
            made = InterpolationConsistency(distance, targets, beta=settings.interpolation_beta)
        case "pi":
            made = Pi(distance, targets, both_branches=settings.consistency == "mse")
        case "temporal_ensembling":
            slots, momentum = settings.ensemble_slots, settings.ensemble_momentum
            made = TemporalEnsembling(distance, slots=slots, classes=spec.classes, momentum=momentum, device=device)
        case "dsne":
            embedding = Embedding(student.net, classes=spec.classes, method=name)
            source = read_source(settings.source_path, spec, rows=settings.source_rows, device=device)
            weight, margin = settings.source_weight, settings.source_margin
            made = DSne(distance, targets, embedding, source, weight=weight, margin=margin)
        case _:
            raise ConfigError(f"learn.method: {name!r} is none of {', '.join(METHODS)}")
    return made


def _make_optimizer(student: Classifier, method: Method, settings: LearnSettings) -> torch.optim.Optimizer:
    """Fused: it is a third of the cost of foreach on a CPU, and on a GPU it can leave out a step without being asked.

    Its state is made here, at zero, and not in the first step: so a checkpoint always has the same names, and a first
    step that is left out does not leave a momentum behind that was never written.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError(f"model.factory: {student.net.__class__.__name__} has no parameters to learn")
    parameters += method.parameters().values()
    lr, decay, momentum = settings.learning_rate, settings.weight_decay, settings.momentum
    if settings.optimizer == "adamw":
        adamw = AdamW(parameters, lr=lr, weight_decay=decay, fused=True)
        for parameter in parameters:
            adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return adamw
    if settings.optimizer == "sgd":
        nesterov = settings.nesterov and momentum > 0.0
        sgd = SGD(parameters, lr=lr, weight_decay=decay, momentum=momentum, nesterov=nesterov, fused=True)
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
