"""The learner: a student, its teacher, and everything they need to go on after a restart as if there had been none.

Used by one thread. All randomness of step t (input noise, dropout) comes from generators seeded anew from (seed, t), so
no random state is saved; torch's global generator of the device is one of them. Bit-equal continuation holds on a CPU
with the same number of threads. Padding is cut off before anything sees it, so it reaches neither costs nor statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from streamlearn.errors import CheckpointError, ConfigError
from streamlearn.learn import losses, schedules
from streamlearn.learn.methods.mean_teacher import MeanTeacher
from streamlearn.learn.methods.supervised import Supervised
from streamlearn.learn.noise import make_noise, mixed_seed
from streamlearn.learn.step import Method, Rows, StepCosts, Trainee, Undo, set_training, train_step
from streamlearn.learn.teacher import TeacherAverage, make_teacher
from streamlearn.models.build import Classifier, ModelSpec, build
from streamlearn.models.normalise import BatchNormWarmup, RunningNorm
from streamlearn.records import UNLABELLED, Array, MicroBatch, Probabilities

DISTANCES = {"mse": losses.mse_consistency, "kl": losses.kl_consistency}
_NOISE, _DROPOUT = 1, 2


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


@dataclass(frozen=True, slots=True)
class Predictions:
    """What both networks say of n samples before they are learned."""

    teacher_probs_BC: Probabilities
    student_classes_B: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Costs:
    """Means over the steps since the last reading; skipped steps are in no mean."""

    classification: float
    consistency: float
    """Before its weight."""
    consistency_weight: float
    """w(t) of the last step."""
    learning_rate: float
    """Of the last step."""
    steps: int
    """All of them, skipped and empty ones too."""
    skipped_steps: int
    """Not finite, and therefore not taken."""


class Learner:
    """Predicts, learns one micro-batch at a time, and turns itself into arrays and back.

    Raises:
        ConfigError: the network, the noise, the device or the method cannot be made.
    """

    def __init__(self, spec: ModelSpec, settings: LearnSettings) -> None:
        self.spec = spec
        self.settings = settings
        self.step = 0
        """The last step taken; one that was skipped or had no rows counts."""
        # The t of every schedule: steps that had something to learn. Where labels come late, a method that knows
        # labels only has counted many steps before its first; its average must not have run ahead of it.
        self._updates = 0
        if settings.threads > 0:
            torch.set_num_threads(settings.threads)
        self._device = _find_device(settings.device)
        self._method = _make_method(settings)
        self._noise = make_noise(
            settings.noise,
            shape=spec.shape,
            std=settings.noise_std,
            pixel_std=settings.pixel_noise_std,
            shift_pixels=settings.shift_pixels,
            flip=settings.flip,
        )
        self._generator = torch.Generator(self._device)
        self._trainee = _make_trainee(spec, settings, self._device)
        self._sums = torch.zeros(4, device=self._device)
        self._steps_read = 0

    def predict(self, x: Array) -> Predictions:
        """Both networks' answers to (n, *shape) clean samples in the schema's dtype. Changes nothing."""
        if len(x) == 0:
            return Predictions(np.zeros((0, self.spec.classes), np.float32), np.zeros(0, np.int64))
        student, teacher = self._trainee.student, self._trainee.teacher
        set_training(student, training=False)
        with torch.inference_mode():
            # Both share one normaliser.
            prepared = student.prepare(self._to_device(np.require(x, requirements=["C", "W"])))
            teacher_probs_BC = teacher.net(prepared).softmax(dim=1)
            student_classes_B = student.net(prepared).argmax(dim=1)
            return Predictions(teacher_probs_BC.cpu().numpy(), student_classes_B.cpu().numpy())

    def learn(self, batch: MicroBatch) -> None:
        """Take step `self.step + 1`. Any of the counts may be zero; without rows it only counts."""
        fresh, labelled = batch.fresh_count, batch.labelled_count
        labels_B = np.full(fresh + labelled, UNLABELLED, dtype=np.int64)
        labels_B[fresh:] = batch.labelled_y[:labelled]
        assert np.all((labels_B[fresh:] >= 0) & (labels_B[fresh:] < self.spec.classes)), "labels out of range"
        self.step += 1
        if fresh + labelled == 0:
            return

        self._reseed()
        self._trainee.undo.remember()
        raw = self._to_device(np.concatenate((batch.fresh_x[:fresh], batch.labelled_x[:labelled])))
        rows = Rows(
            x_B=self._observe_and_prepare(raw, fresh),
            labels_B=self._to_device(labels_B),
            labelled_count=labelled,
            noise=self._noise,
            generator=self._generator,
        )
        for group in self._trainee.optimizer.param_groups:
            group["lr"] = self._learning_rate(self._updates + 1)
        outcome = train_step(
            self._trainee,
            self._method,
            rows,
            step=self._updates + 1,
            consistency_weight=self._consistency_weight(self._updates + 1),
            alpha=self.settings.ema_decay,
        )
        if outcome is not None:
            self._updates += 1
            self._add_up(*outcome)

    def read_costs(self) -> Costs:
        """Means since the last reading. The only place where the host waits for the device."""
        classification, consistency, taken, skipped = self._sums.tolist()
        steps = self.step - self._steps_read
        self._sums.zero_()
        self._steps_read = self.step
        return Costs(
            classification=classification / max(taken, 1.0),
            consistency=consistency / max(taken, 1.0),
            consistency_weight=self._consistency_weight(self._updates),
            learning_rate=self._learning_rate(self._updates),
            steps=steps,
            skipped_steps=round(skipped),
        )

    def state(self) -> dict[str, Array]:
        """Copies of everything that step t+1 depends on: `student.*`, `teacher.*`, `optimizer.*`, `learner.*`."""
        arrays = {name: _to_array(tensor) for name, tensor in self._tensors().items()}
        counts = {"learner.step": self.step, "learner.updates": self._updates}
        return arrays | {name: np.array(count, dtype=np.int64) for name, count in counts.items()}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state` returned.

        Raises:
            CheckpointError: names, shapes or dtypes are not those of this model and optimizer; nothing was changed.
        """
        tensors = self._tensors()
        wanted = {name: _signature(tensor) for name, tensor in tensors.items()}
        wanted |= {"learner.step": "int64[]", "learner.updates": "int64[]"}
        found = {name: f"{array.dtype}{list(array.shape)}" for name, array in state.items()}
        if wanted != found:
            raise CheckpointError(f"learner state does not fit: {_difference(wanted, found)}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(torch.from_numpy(np.require(state[name], requirements=["C", "W"])))
        self.step, self._updates = int(state["learner.step"]), int(state["learner.updates"])
        self._sums.zero_()
        self._steps_read = self.step

    def teacher_state(self) -> dict[str, Array]:
        """Copies of what a server loads: the state_dict of `build(spec)`."""
        return {name: _to_array(tensor) for name, tensor in self._trainee.teacher.state_dict().items()}

    def describe(self) -> dict[str, Any]:
        """What was built, for the log and `inspect`."""
        return {
            "factory": self.spec.factory,
            "parameters": sum(parameter.numel() for parameter in self._trainee.student.parameters()),
            "method": self.settings.method,
            "optimizer": self.settings.optimizer,
            "device": str(self._device),
            "threads": torch.get_num_threads(),
        }

    def _consistency_weight(self, update: int) -> float:
        peak, rampup_steps = self.settings.consistency_weight, self.settings.rampup_steps
        return schedules.consistency_weight(update, peak=peak, rampup_steps=rampup_steps)

    def _learning_rate(self, update: int) -> float:
        peak, warmup_steps = self.settings.learning_rate, self.settings.warmup_steps
        return schedules.learning_rate(update, peak=peak, warmup_steps=warmup_steps)

    def _reseed(self) -> None:
        """Noise and dropout are drawn from streams of their own, or they would be the same numbers."""
        self._generator.manual_seed(mixed_seed(self.settings.seed, self.step, _NOISE))
        dropout_seed = mixed_seed(self.settings.seed, self.step, _DROPOUT)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(dropout_seed)
        torch.default_generator.manual_seed(dropout_seed)

    def _observe_and_prepare(self, raw: Tensor, fresh: int) -> Tensor:
        """Fresh rows enter the input statistics once, after they were predicted and before they are learned."""
        student = self._trainee.student
        x_B = student.to_float(raw)
        if isinstance(student.normalise, RunningNorm):
            student.normalise.observe(x_B, fresh)
        with torch.no_grad():
            prepared: Tensor = student.normalise(x_B)
        return prepared

    def _to_device(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _add_up(self, costs: StepCosts, skipped: Tensor) -> None:
        """On the device: a mean that is read rarely must not make every step wait."""
        one = torch.ones((), device=self._device)
        values = torch.stack((costs.classification.detach(), costs.consistency.detach(), one))
        self._sums[:3] += torch.where(skipped, 0.0, values)
        self._sums[3] += skipped

    def _tensors(self) -> dict[str, Tensor]:
        """Live tensors by name; writing to them is writing to the learner."""
        student, teacher, optimizer = self._trainee.student, self._trainee.teacher, self._trainee.optimizer
        named = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
        named |= {f"teacher.{name}": tensor for name, tensor in teacher.state_dict().items()}
        for name, parameter in student.named_parameters():
            for key, tensor in optimizer.state.get(parameter, {}).items():
                named[f"optimizer.{name}.{key}"] = tensor
        return named


def _make_trainee(spec: ModelSpec, settings: LearnSettings, device: torch.device) -> Trainee:
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


def _make_method(settings: LearnSettings) -> Method:
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


def _find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"learn.device: {name}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _to_array(tensor: Tensor) -> Array:
    copied: Array = np.array(tensor.detach().cpu().numpy(), order="C", copy=True)
    return copied


def _signature(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _difference(wanted: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The first few names that differ, as `name: wanted …, found …`."""
    names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    shown = [f"{name}: wanted {wanted.get(name, 'nothing')}, found {found.get(name, 'nothing')}" for name in names[:8]]
    return "; ".join(shown) + (f"; and {len(names) - 8} more" if len(names) > 8 else "")
