"""The learner: a student, its teacher, and everything they need to go on after a restart as if there had been none.

Used by one thread. All randomness of step t (input noise, dropout) comes from generators seeded anew from (seed, t), so
no random state is saved; torch's global generator of the device is one of them. Bit-equal continuation holds on a CPU
with the same number of threads. Padding is cut off before anything sees it, so it reaches neither costs nor statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from streamlearn.errors import CheckpointError
from streamlearn.learn import schedules
from streamlearn.learn.build import LearnSettings, find_device, make_trainee
from streamlearn.learn.noise import make_noises, mixed_seed
from streamlearn.learn.rows import Augment, Rows
from streamlearn.learn.step import StepCosts, Trainee, set_training, train_step
from streamlearn.learn.twin import Twin
from streamlearn.models.build import Classifier, ModelSpec
from streamlearn.models.normalise import LARGEST_INPUT, InputBound, RunningNorm
from streamlearn.models.spare import SpareClasses
from streamlearn.records import UNLABELLED, Array, MicroBatch, Probabilities

_NOISE, _DROPOUT = 1, 2


@dataclass(frozen=True, slots=True)
class Predictions:
    """What both networks say of n samples before they are learned."""

    teacher_probs_BC: Probabilities
    student_probs_BC: Probabilities


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes that each network gives to the same samples; UNLABELLED where its answer is not finite."""

    candidates_KB: npt.NDArray[np.int64]
    """Of each that could be served, in the order of `Learner.candidates`."""
    twin_B: npt.NDArray[np.int64] | None
    """None where it is off."""

    @property
    def teacher_B(self) -> npt.NDArray[np.int64]:  # noqa: N802
        """Of the teacher that the student learns from."""
        first_B: npt.NDArray[np.int64] = self.candidates_KB[0]
        return first_B


@dataclass(frozen=True, slots=True)
class Health:
    """What the weights say of themselves."""

    updates: int
    """Steps that had something to learn and were not skipped."""
    skipped_in_a_row: int
    """Steps up to now that were not finite."""
    distance: float
    """||theta' - theta|| / ||theta||, over all parameters of teacher and student."""
    finite: bool
    """Whether the teacher's parameters and float buffers are."""


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
    skipped_rows: int
    """Of those steps, fresh and labelled. Accounts and label states have them as learned: a step must not wait to know.
    Labelled ones stay in the memory and are drawn again, so `trained` is early of them; fresh ones are gone."""


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
        # The t of every schedule: steps that changed the weights. Where labels come late, a method that knows
        # labels only has counted many steps before its first; its average must not have run ahead of it.
        self._updates = 0
        if settings.threads > 0:
            torch.set_num_threads(settings.threads)
        self._device = find_device(settings.device)
        weak, strong = make_noises(settings, shape=spec.shape)
        self._augment = Augment(weak, strong, settings.mixup_beta, settings.label_smoothing)
        self._uniform_C = torch.zeros(spec.classes, device=self._device)
        self._name(spec.classes - (spec.spare or 0))
        self._generator = torch.Generator(self._device)
        self._trainee = make_trainee(spec, settings, self._device)
        self._twin = _make_twin(spec, settings, self._device, self._trainee)
        self.served = 0
        """Which candidate answers and is published, by index."""
        self._sums = torch.zeros(5, device=self._device)
        self._skipped_in_a_row = torch.zeros((), device=self._device)
        self._steps_read = 0
        # The updates at which the ramp and the average began anew: after another method, and the average after drift.
        self._ramped_at = self._averaged_at = 0
        # Labels learned for the first time, and how many there were when the ramp began anew.
        self._labels = self._ramped_at_label = 0
        self._factors = (1.0, 1.0)
        # Teachers that were healthy; the older one has been so for longer.
        self._good: list[dict[str, Tensor]] = []

    def predict(self, x: Array) -> Predictions:
        """Both networks' answers to (n, *shape) clean samples in the schema's dtype. Changes nothing."""
        return self.ask(x)()

    def ask(self, x: Array) -> Callable[[], Predictions]:
        """Start `predict`, and return what waits for the answers."""
        if len(x) == 0:
            none = np.zeros((0, self.spec.classes), np.float32)
            return lambda: Predictions(none, none)
        student, teacher = self._trainee.student, self._networks()[self.served]
        set_training(student, training=False)
        with torch.inference_mode():
            # Both share one normaliser.
            prepared = student.prepare(self._to_device(np.require(x, requirements=["C", "W"])))
            teacher_probs_BC = teacher.net(prepared).softmax(dim=1)
            student_probs_BC = student.net(prepared).softmax(dim=1)
            read = self._start_reading(torch.stack((teacher_probs_BC, student_probs_BC)))
        return lambda: Predictions(*read())

    def classify(self, x: Array) -> Classes:
        """What all that could be served say of (n, *shape) clean samples, n >= 1. Changes nothing."""
        with torch.inference_mode():
            prepared = self._trainee.student.prepare(self._to_device(np.require(x, requirements=["C", "W"])))
            logits_KBC = torch.stack([network.net(prepared) for network in self._networks()])
            finite_KB = torch.isfinite(logits_KBC).all(dim=2)
            answers_KB = self._start_reading(torch.where(finite_KB, logits_KBC.argmax(dim=2), UNLABELLED))()
            return Classes(answers_KB, None if self._twin is None else answers_KB[-1])

    @property
    def candidates(self) -> tuple[str, ...]:
        """What could be served: the teacher, and the twin's average where there is a twin."""
        return ("teacher",) if self._twin is None else ("teacher", "twin")

    @property
    def wants_keys(self) -> bool:
        """The method knows its rows again by their keys."""
        return self.settings.method == "temporal_ensembling"

    def serve(self, candidate: int) -> None:
        """From here on this one answers and is published."""
        assert 0 <= candidate < len(self.candidates), candidate
        self.served = candidate

    def learn(self, batch: MicroBatch, *, weight_factor: float = 1.0, learning_rate_factor: float = 1.0) -> None:
        """Take step `self.step + 1`. Any of the counts may be zero; without rows it only counts.

        The factors lower the consistency weight and the learning rate while the guard wants it.
        """
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
        x_B = self._observe_and_prepare(raw, 0 if batch.seen_before else fresh)
        rows = Rows(
            x_B=x_B,
            labels_B=self._to_device(labels_B),
            labelled_count=labelled,
            augment=self._augment,
            generator=self._generator,
            uniform_C=self._uniform_C,
            said_BC=self._said(x_B[: fresh + len(batch.trained_ids)]) if self.settings.align == "labels" else None,
            keys_B=None if batch.keys is None else self._to_device(batch.keys),
        )
        if self._labels == 0 and batch.trained_ids:
            # What students said before the first label is no part of a teacher; nor has the twin any of it.
            self._averaged_at = self._updates
            if self.settings.rampup_labels:
                self._ramped_at = self._updates
        self._labels += len(batch.trained_ids)
        t, alpha = self._updates + 1, self.settings.ema_decay
        self._factors = (weight_factor, learning_rate_factor)
        for group in self._trainee.optimizer.param_groups:
            group["lr"] = self._learning_rate(t) * learning_rate_factor
        outcome = train_step(
            self._trainee,
            rows,
            step=t,
            consistency_weight=self._consistency_weight(t) * weight_factor,
            alpha=alpha,
            averaged_steps=t - self._averaged_at,
        )
        if outcome is not None:
            self._updates += 0 if self._trainee.knows_at_once(t) and outcome[1] else 1
            self._add_up(*outcome, fresh + labelled)
        if self._twin is not None:
            self._twin.learn(
                rows, step=self.step, learning_rate=self._learning_rate(self._twin.updates + 1), alpha=alpha
            )

    def health(self) -> Health:
        """How the weights are. Waits for the device: to be asked now and then, at steps that a restart asks at too."""
        with torch.no_grad():
            student: list[Tensor] = list(self._trainee.student.net.parameters())
            teacher: list[Tensor] = list(self._trainee.teacher.net.parameters())
            moved = nn.utils.get_total_norm(torch._foreach_sub(teacher, student))  # noqa: SLF001
            distance = moved / nn.utils.get_total_norm(student).clamp_min(1e-12)
            buffers, _ = self._trainee.average.float_buffers()
            largest = nn.utils.get_total_norm([*teacher, *buffers], norm_type=math.inf)
            skipped, relative, largest_value = torch.stack((self._skipped_in_a_row, distance, largest)).tolist()
        return Health(self._updates, round(skipped), relative, math.isfinite(largest_value))

    def clips(self, x: Array) -> bool:
        """Whether a value of this sample (*shape) is clipped for want of input statistics that would bound it."""
        normalise = self._trainee.student.normalise
        largest = float(np.abs(x.astype(np.float64)).max(initial=0.0)) * self.spec.scale
        return isinstance(normalise, InputBound) and largest > LARGEST_INPUT

    def breaking_rows(self, x: Array, y: Array) -> list[int]:
        """Which of the labelled rows x (n, *shape), each alone, have a loss or gradient that is not finite.

        Empty where all of them do: then the weights are the cause. For steps that were skipped; changes nothing.
        """
        student = self._trainee.student
        with torch.no_grad():
            x_B = student.prepare(self._to_device(np.require(x, requirements=["C", "W"])))
        labels_B = self._to_device(np.require(y, requirements=["C", "W"]))
        parameters = [parameter for parameter in student.net.parameters() if parameter.requires_grad]
        set_training(student, training=False)
        found = []
        for row in range(len(x_B)):
            loss = nn.functional.cross_entropy(student.net(x_B[row : row + 1]), labels_B[row : row + 1])
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
            if not torch.isfinite(loss + norm):
                found.append(row)
        return found if len(found) < len(x_B) else []

    def keep_good(self) -> None:
        """Keep a copy of the teacher as one to go back to, beside the one before it."""
        self._good = [*self._good[-1:], self._copy_of_teacher()]

    def roll_back(self) -> bool:
        """Student and teacher become the older of the good teachers; the optimizer forgets. False: there is none."""
        if not self._good:
            return False
        self._good = self._good[:1]
        for network in (self._trainee.student, self._trainee.teacher):
            network.net.load_state_dict(self._good[0])
        with torch.no_grad():
            for state in self._trainee.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
        self._mended()
        return True

    def adopt_twin(self) -> bool:
        """Student, teacher and optimizer become the twin's. False: there is no twin."""
        if self._twin is None:
            return False
        self._twin.lend_to(self._trainee)
        self._mended()
        return True

    def restart_average(self) -> None:
        """The teacher is again the mean of few students: a short horizon, which grows to its length.

        What its targets were made by begins anew as well.
        """
        self._averaged_at = self._updates
        self._trainee.method.forget()
        if self._twin is not None:
            self._twin.averaged_at = self._twin.updates

    def another_method(self) -> None:
        """What was loaded was learned by another method: what its targets were made by is not for this one."""
        self._trainee.method.forget()

    def admit(self, classes: int) -> None:
        """The first so many classes have names now; what was spare among them is answered and learned from here on."""
        assert classes <= self.spec.classes, (classes, self.spec.classes)
        trainees = [self._trainee] if self._twin is None else [self._trainee, self._twin.trainee]
        for trainee in trainees:
            for network in (trainee.student.net, trainee.teacher.net):
                if isinstance(network, SpareClasses):
                    network.admit(classes)
        self._name(classes)
        for kept in self._good:
            if self.spec.spare is not None:
                kept["offset_C"][:classes] = 0.0

    def read_costs(self) -> Costs:
        """Means since the last reading. The only place where the host waits for the device."""
        classification, consistency, taken, skipped, skipped_rows = self._sums.tolist()
        steps = self.step - self._steps_read
        self._sums.zero_()
        self._steps_read = self.step
        return Costs(
            classification=classification / max(taken, 1.0),
            consistency=consistency / max(taken, 1.0),
            consistency_weight=self._consistency_weight(self._updates) * self._factors[0],
            learning_rate=self._learning_rate(self._updates) * self._factors[1],
            steps=steps,
            skipped_steps=round(skipped),
            skipped_rows=round(skipped_rows),
        )

    def state(self) -> dict[str, Array]:
        """Copies of all that step t+1 depends on: `student.*`, `teacher.*`, `optimizer.*`, `learner.*` and others."""
        tensors = self._tensors() | self._twin_tensors() | self._good_tensors()
        tensors |= self._method_tensors() | self._input_tensors()
        arrays = {name: _to_array(tensor) for name, tensor in tensors.items()}
        counts = {
            "step": self.step,
            "updates": self._updates,
            "ramped_at": self._ramped_at,
            "averaged_at": self._averaged_at,
            "labels": self._labels,
            "ramped_at_label": self._ramped_at_label,
            "served": self.served,
            "skipped_in_a_row": round(self._skipped_in_a_row.item()),
            "twin_updates": 0 if self._twin is None else self._twin.updates,
            "twin_averaged_at": 0 if self._twin is None else self._twin.averaged_at,
        }
        return arrays | {f"learner.{name}": np.array(count, dtype=np.int64) for name, count in counts.items()}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state` returned.

        A twin that was not there before begins as the student is now. What another method remembered is left behind
        where it does not fit; see `another_method` for where it does. So are further averages of earlier versions.
        `supervised` is what the twin was all along, and goes on from it.

        Raises:
            CheckpointError: names, shapes or dtypes are not those of this model and optimizer; nothing was changed.
        """
        state = _seen_by(self.settings.method, state)
        generations = {int(name.split(".")[1]) for name in state if name.startswith("good.")}
        has_twin = any(name.startswith("twin.") for name in state)
        self._good = [self._copy_of_teacher() for _ in generations]
        tensors = self._tensors() | self._good_tensors()
        if has_twin:
            tensors |= self._twin_tensors()
        # What other settings had and these have not is left behind, and the other way round it begins anew.
        optional = {"method.": self._method_tensors(), "inputs.": self._input_tensors()}
        left_behind = ["bank."] if self._twin else ["bank.", "twin."]
        for prefix, named in optional.items():
            if {n: _signature(t) for n, t in named.items()} == _signatures(state, prefix):
                tensors |= named
            else:
                left_behind.append(prefix)
        wanted = {name: _signature(tensor) for name, tensor in tensors.items()}
        wanted |= {f"learner.{name}": "int64[]" for name in _COUNTS}
        used = {name: array for name, array in state.items() if not name.startswith(tuple(left_behind))}
        found = _signatures(used)
        if wanted != found:
            raise CheckpointError(f"learner state does not fit: {_difference(wanted, found)}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(torch.from_numpy(np.require(used[name], requirements=["C", "W"])))
        counts = {name: int(state[f"learner.{name}"]) for name in _COUNTS}
        self.step, self._updates = counts["step"], counts["updates"]
        self._ramped_at, self._averaged_at = counts["ramped_at"], counts["averaged_at"]
        self._labels, self._ramped_at_label = counts["labels"], counts["ramped_at_label"]
        self._skipped_in_a_row.fill_(counts["skipped_in_a_row"])
        if self._twin is not None:
            self._twin.updates, self._twin.averaged_at = counts["twin_updates"], counts["twin_averaged_at"]
            if not has_twin:
                self._twin.begin_as(self._trainee, updates=self._updates, averaged_at=self._averaged_at)
        self.served = counts["served"]
        self._refresh_inputs(loaded="inputs." not in left_behind)
        if self.served >= len(self.candidates) or any(name.startswith("bank.") for name in state):
            self.served = 0
        self._sums.zero_()
        self._steps_read = self.step

    def teacher_state(self) -> dict[str, Array]:
        """Copies of what a server loads, of the one that is served: the state_dict of `build(spec)`."""
        return {name: _to_array(tensor) for name, tensor in self._networks()[self.served].state_dict().items()}

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

    def _mended(self) -> None:
        """What was measured and averaged before is not of these weights."""
        self._skipped_in_a_row.zero_()
        method, optimizer = self._trainee.method, self._trainee.optimizer
        method.forget()
        method.follow_student()
        for parameter in method.parameters().values():
            for tensor in optimizer.state.get(parameter, {}).values():
                tensor.zero_()
        self.served = 0

    def _name(self, classes: int) -> None:
        self._uniform_C.zero_()
        self._uniform_C[:classes] = 1.0 / classes

    def _consistency_weight(self, update: int) -> float:
        peak, ramp = self.settings.consistency_weight, schedules.consistency_weight
        by_steps = ramp(update - self._ramped_at, peak=peak, rampup_steps=self.settings.rampup_steps)
        labels = self._labels - self._ramped_at_label
        by_labels = ramp(labels, peak=peak, rampup_steps=self.settings.rampup_labels)
        if self._labels == 0 and self.settings.rampup_labels:
            return 0.0  # before the first label a teacher knows nothing to be held against
        return min(by_steps, by_labels) * schedules.label_fading(labels, fade_labels=self.settings.fade_labels)

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
        if fresh and isinstance(student.normalise, RunningNorm):
            student.normalise.observe(x_B, fresh)
        with torch.no_grad():
            prepared: Tensor = student.normalise(x_B)
        return prepared

    def _said(self, x_B: Tensor) -> Tensor | None:
        """Probabilities (B, C) for clean rows by who knows labels alone, the twin, or else by the teacher."""
        witness = (self._trainee if self._twin is None else self._twin.trainee).teacher
        with torch.no_grad():
            return witness.net(x_B).softmax(dim=1) if len(x_B) else None

    def _to_device(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _start_reading(self, tensor: Tensor) -> Callable[[], npt.NDArray[Any]]:
        """Start to copy a tensor from the device, and return what waits for the copy."""
        if self._device.type == "cpu":
            return tensor.numpy
        with torch.cuda.device(self._device):
            copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copied.copy_(tensor, non_blocking=True)
            done = torch.cuda.Event()
            done.record()

        def wait() -> npt.NDArray[Any]:
            done.synchronize()
            return copied.numpy()

        return wait

    def _add_up(self, costs: StepCosts, skipped: Tensor, rows: int) -> None:
        """On the device: a mean that is read rarely must not make every step wait."""
        one = torch.ones((), device=self._device)
        values = torch.stack((costs.classification.detach(), costs.consistency.detach(), one))
        self._sums[:3] += torch.where(skipped, 0.0, values)
        self._sums[3] += skipped
        self._sums[4] += skipped * rows
        self._skipped_in_a_row = torch.where(skipped, self._skipped_in_a_row + 1.0, 0.0)

    def _tensors(self) -> dict[str, Tensor]:
        """Live tensors by name; writing to them is writing to the learner."""
        return _named(self._trainee)

    def _twin_tensors(self) -> dict[str, Tensor]:
        """The same of the twin. Its normaliser is the student's, and is not named twice."""
        if self._twin is None:
            return {}
        named = _named(self._twin.trainee)
        return {f"twin.{name}": tensor for name, tensor in named.items() if ".normalise." not in name}

    def _method_tensors(self) -> dict[str, Tensor]:
        """What the method remembers, and what it learns with the state that the optimizer has of it."""
        method, optimizer = self._trainee.method, self._trainee.optimizer
        named = {f"method.{name}": tensor for name, tensor in method.tensors().items()}
        for name, parameter in method.parameters().items():
            named[f"method.learned.{name}"] = parameter
            for key, tensor in optimizer.state.get(parameter, {}).items():
                named[f"method.optimizer.{name}.{key}"] = tensor
        return named

    def _networks(self) -> list[Classifier]:
        """Of the candidates."""
        twin = [] if self._twin is None else [self._twin.trainee.teacher]
        return [self._trainee.teacher, *twin]

    def _input_tensors(self) -> dict[str, Tensor]:
        """What the normaliser keeps of inputs next to its statistics."""
        normalise = self._trainee.student.normalise
        kept = normalise.sample.tensors() if isinstance(normalise, RunningNorm) else {}
        return {f"inputs.{name}": tensor for name, tensor in kept.items()}

    def _refresh_inputs(self, *, loaded: bool) -> None:
        """After tensors were written to. A checkpoint of an earlier version has no sample of inputs: it is empty."""
        normalise = self._trainee.student.normalise
        if isinstance(normalise, RunningNorm):
            if not loaded:
                normalise.sample.begin(int(normalise.count))
            normalise.sample.refresh()

    def _good_tensors(self) -> dict[str, Tensor]:
        return {f"good.{n}.{name}": tensor for n, kept in enumerate(self._good) for name, tensor in kept.items()}

    def _copy_of_teacher(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._trainee.teacher.net.state_dict().items()}


_COUNTS = (
    "step", "updates", "ramped_at", "averaged_at", "labels", "ramped_at_label", "served", "skipped_in_a_row",
    "twin_updates", "twin_averaged_at",
)  # fmt: skip


def _named(trainee: Trainee) -> dict[str, Tensor]:
    named = {f"student.{name}": tensor for name, tensor in trainee.student.state_dict().items()}
    named |= {f"teacher.{name}": tensor for name, tensor in trainee.teacher.state_dict().items()}
    for name, parameter in trainee.student.named_parameters():
        for key, tensor in trainee.optimizer.state.get(parameter, {}).items():
            named[f"optimizer.{name}.{key}"] = tensor
    return named


def _make_twin(spec: ModelSpec, settings: LearnSettings, device: torch.device, trainee: Trainee) -> Twin | None:
    """None where it is off, and where the student itself knows labels only."""
    if not settings.twin_every or settings.method == "supervised":
        return None
    twin = make_trainee(spec, replace(settings, method="supervised"), device)
    for network in (twin.student, twin.teacher):
        network.normalise = trainee.student.normalise
    return Twin(twin, every=settings.twin_every)


def _seen_by(method: str, state: Mapping[str, Array]) -> Mapping[str, Array]:
    """The state as it is; for `supervised` with the twin, where there is one, as student and teacher."""
    twin = {name.removeprefix("twin."): array for name, array in state.items() if name.startswith("twin.")}
    if method != "supervised" or not twin:
        return state
    others = {name: array for name, array in state.items() if not name.startswith(("twin.", "bank.", "method."))}
    updates, averaged_at = state["learner.twin_updates"], state["learner.twin_averaged_at"]
    # The ramp begins anew where another method comes back: it is counted by updates, of which these are others.
    counts = {"updates": updates, "averaged_at": averaged_at, "ramped_at": updates}
    counts |= {"ramped_at_label": state["learner.labels"], "served": np.array(0, dtype=np.int64)}
    return others | twin | {f"learner.{name}": array for name, array in counts.items()}


def _to_array(tensor: Tensor) -> Array:
    copied: Array = np.array(tensor.detach().cpu().numpy(), order="C", copy=True)
    return copied


def _signatures(arrays: Mapping[str, Array], prefix: str = "") -> dict[str, str]:
    return {name: f"{a.dtype}{list(a.shape)}" for name, a in arrays.items() if name.startswith(prefix)}


def _signature(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _difference(wanted: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The first few names that differ, as `name: wanted …, found …`."""
    names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    shown = [f"{name}: wanted {wanted.get(name, 'nothing')}, found {found.get(name, 'nothing')}" for name in names[:8]]
    return "; ".join(shown) + (f"; and {len(names) - 8} more" if len(names) > 8 else "")
