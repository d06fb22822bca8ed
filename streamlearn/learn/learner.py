"""The learner: student, teacher and label-only twin. It predicts, learns a micro-batch at a time, and saves itself.

Used by one thread. All randomness of step t comes from generators that are seeded from (seed, t), one of them torch's
global generator, so no random state is saved. A restart is bit-equal on a CPU with the same number of threads. Padding
is cut off first, so it reaches neither costs nor statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from streamlearn.learn.build import find_device, make_trainee, make_twin, threads_for
from streamlearn.learn.costs import Costs, CostSums
from streamlearn.learn.health import Health, breaking_rows, measure_health
from streamlearn.learn.methods.settings import TargetOptions
from streamlearn.learn.noise.build import make_noises
from streamlearn.learn.prior import PriorCorrection
from streamlearn.learn.progress import Progress, Updates
from streamlearn.learn.randomness import seed_step
from streamlearn.learn.rows import Augment, Rows
from streamlearn.learn.settings import LearnConfig
from streamlearn.learn.state import (
    fits,
    good_tensors,
    input_tensors,
    method_tensors,
    restore,
    to_array,
    trainee_tensors,
    twin_as_student,
    twin_tensors,
    with_added_columns,
)
from streamlearn.learn.step import set_training, take_step
from streamlearn.models.build import Classifier, ModelSpec
from streamlearn.models.mlp import completed
from streamlearn.models.normalise import InputBound, RunningNorm, as_centre_and_scale
from streamlearn.models.places import places_of
from streamlearn.models.settings import ROW_NETWORKS
from streamlearn.models.spare import SpareClasses
from streamlearn.records import UNLABELLED, Array, MicroBatch, Probabilities


@dataclass(frozen=True, slots=True)
class Predictions:
    """Probabilities of n samples before they are learned."""

    teacher_probs_BC: Probabilities
    """Of the network that is served."""
    student_probs_BC: Probabilities


@dataclass(frozen=True, slots=True)
class Classes:
    """Classes that each network predicts for the same samples; UNLABELLED if its output is not finite."""

    candidates_KB: npt.NDArray[np.int64]
    """In the order of `Learner.candidates`."""
    teacher_B: npt.NDArray[np.int64]
    """Of the teacher that the student learns from."""
    twin_B: npt.NDArray[np.int64] | None
    """None without a twin."""
    served_probs_BC: Probabilities
    """Probabilities of the network that is served, not corrected."""


class Learner:
    """The only owner of weights that change.

    `host_may_ask` overrides whether steps read values from the device; by default only on a CPU. `classes` are the
    names that `learn.class_weights` uses.

    Raises:
        ConfigError: the network, the noise, the device or the method cannot be built.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: LearnConfig,
        *,
        classes: Sequence[str] = (),
        host_may_ask: bool | None = None,
    ) -> None:
        self.spec, self.config = spec, config
        torch.set_num_threads(config.threads or threads_for(spec))
        self._device = find_device(config.device)
        weak, strong = make_noises(config, shape=spec.shape, columns=spec.columns, device=self._device)
        self._augment = Augment(weak, strong, config.mixup_beta, _codes(spec, self._device))
        self._uniform_C = torch.zeros(spec.classes, device=self._device)
        named = spec.classes - (spec.spare or 0)
        self.prior = PriorCorrection(spec.classes, named)
        """Correction of answered probabilities. The caller tells it what was predicted and labelled."""
        self._weights_C = _class_weights(config, classes, spec.classes, self._device)
        self._name(named)
        self._generator = torch.Generator(self._device)
        self.trainee = make_trainee(spec, config, self._device, host_may_ask=host_may_ask)
        self.twin = make_twin(spec, config, self.trainee)
        self.served = 0
        """Index of the candidate that answers and is published."""
        self._progress, self._twin_counts = Progress(), Updates()
        self._sums, self._steps_read = CostSums(self._device), 0
        self._factors = (1.0, 1.0)
        self._good: list[dict[str, Tensor]] = []

    @property
    def step(self) -> int:
        """The last step taken, skipped and empty ones included."""
        return self._progress.step

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the networks that may be served."""
        return ("teacher",) if self.twin is None else ("teacher", "twin")

    @property
    def wants_keys(self) -> bool:
        """Whether the method recognises samples by their keys."""
        return self.config.method == "temporal_ensembling"

    @property
    def log_offsets(self) -> Probabilities:
        """Offsets (C,) of the logarithms of answered probabilities; 0 without `learn.correct_prior`."""
        offsets_C = self.prior.log_offsets
        return offsets_C if self.config.correct_prior else np.zeros_like(offsets_C)

    def predict(self, x: Array) -> Predictions:
        """Probabilities of both networks, not corrected, of (n, *shape) clean samples in the schema's dtype.

        Changes nothing.
        """
        if len(x) == 0:
            none = np.zeros((0, self.spec.classes), np.float32)
            return Predictions(none, none)
        student, teacher = self.trainee.student, self._networks()[self.served]
        set_training(student, training=False)
        with torch.inference_mode():
            # Both share one normaliser. The teacher's answer is the one that a server gives, so it is float32.
            prepared = student.prepare(_to_device(x, self._device))
            probs_2BC = torch.stack([teacher.net(prepared), student.logits(prepared)]).softmax(dim=2)
            return Predictions(*probs_2BC.numpy(force=True))

    def classify(self, x: Array) -> Classes:
        """Classes that all candidates predict for (n, *shape) clean samples, n >= 1. Changes nothing."""
        with torch.inference_mode():
            prepared = self.trainee.student.prepare(_to_device(x, self._device))
            logits_KBC = torch.stack([network.net(prepared) for network in self._networks()])
            finite_KB = torch.isfinite(logits_KBC).all(dim=2)
            answers_KB = torch.where(finite_KB, logits_KBC.argmax(dim=2), UNLABELLED).numpy(force=True)
            served_BC = logits_KBC[self.served].softmax(dim=1).numpy(force=True)
        return Classes(answers_KB, answers_KB[0], None if self.twin is None else answers_KB[-1], served_BC)

    def serve(self, candidate: int) -> None:
        """From now on this candidate answers and is published."""
        assert 0 <= candidate < len(self.candidates), candidate
        if candidate != self.served:
            self.prior.forget()
        self.served = candidate

    def learn(self, batch: MicroBatch, *, weight_factor: float = 1.0, learning_rate_factor: float = 1.0) -> None:
        """Take step `self.step + 1`. Any count of rows may be zero; without rows the step only counts.

        The factors scale the consistency weight and the learning rate.
        """
        y_L = batch.labelled_y[: batch.labelled_count]
        assert np.all((y_L >= 0) & (y_L < self.spec.classes)), "labels out of range"
        progress, options, alpha = self._progress, self.config.options, self.config.ema_decay
        progress.step += 1
        count = batch.fresh_count + batch.labelled_count
        if count == 0:
            return
        seed_step(self._generator, self.config.seed, progress.step)
        self.trainee.undo.remember()
        progress.count_labels(len(batch.trained_ids), options)
        rows = self._make_rows(batch)
        self._factors = (weight_factor, learning_rate_factor)
        outcome = take_step(
            self.trainee,
            rows,
            progress,
            learning_rate=self.config.learning_rate * learning_rate_factor,
            consistency_weight=progress.consistency_weight(progress.updates + 1, options) * weight_factor,
            alpha=alpha,
        )
        if outcome is not None:
            self._sums.add(*outcome, count)
        if self.twin is not None and rows.labelled_count:
            self.twin.undo.remember()
            rate = self.config.learning_rate
            take_step(self.twin, rows, self._twin_counts, learning_rate=rate, consistency_weight=0.0, alpha=alpha)

    def read_costs(self) -> Costs:
        """Means since the last reading. Waits for the device."""
        steps, self._steps_read = self.step - self._steps_read, self.step
        weight = self._progress.consistency_weight(self._progress.updates, self.config.options)
        return self._sums.read(
            steps=steps,
            consistency_weight=weight * self._factors[0],
            learning_rate=self.config.learning_rate * self._factors[1],
        )

    def health(self) -> Health:
        """State of the weights. Waits for the device, so ask rarely, and after a restart at the same steps."""
        skipped_in_a_row = self._sums.skipped_in_a_row
        return measure_health(self.trainee, updates=self._progress.updates, skipped_in_a_row=skipped_in_a_row)

    def clips(self, x: Array) -> bool:
        """Whether a value of this sample (*shape) is clipped, where no input statistics bound it."""
        normalise = self.trainee.student.normalise
        largest = float(np.abs(x.astype(np.float64)).max(initial=0.0)) * self.spec.scale
        return isinstance(normalise, InputBound) and largest > normalise.largest

    def breaking_rows(self, x: Array, y: Array) -> list[int]:
        """Labelled rows x (n, *shape), each alone, whose loss or gradient is not finite; empty if all are such."""
        return breaking_rows(self.trainee.student, _to_device(x, self._device), _to_device(y, self._device))

    def keep_good(self) -> None:
        """Keep a copy of the teacher to roll back to, and the copy before it."""
        self._good = [*self._good[-1:], self._copy_teacher()]

    def roll_back(self) -> bool:
        """Set student and teacher to the older good teacher, and reset the optimizer. False: there is none.

        The older copy has been known to be good for longer. The newer one is dropped.
        """
        if not self._good:
            return False
        self._good = self._good[:1]
        for network in (self.trainee.student, self.trainee.teacher):
            network.net.load_state_dict(self._good[0])
        with torch.no_grad():
            for state in self.trainee.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
        self._follow_new_weights()
        return True

    def adopt_twin(self) -> bool:
        """Set student, teacher and optimizer to the twin's. False: there is no twin."""
        if self.twin is None:
            return False
        self.trainee.copy_from(self.twin)
        self._follow_new_weights()
        return True

    def restart_average(self) -> None:
        """Restart teacher and twin as means of few students, with a short horizon that grows; reset the targets."""
        for counts in (self._progress, self._twin_counts):
            counts.averaged_at = counts.updates
        self.trainee.method.forget()

    def another_method(self) -> None:
        """Reset the targets: the loaded state was learned by another method."""
        self.trainee.method.forget()

    def admit(self, classes: int) -> None:
        """Enable the first `classes` outputs: spare ones among them have names now, and are answered and learned."""
        assert classes <= self.spec.classes, (classes, self.spec.classes)
        trainees = [self.trainee] if self.twin is None else [self.trainee, self.twin]
        for trainee in trainees:
            for network in (trainee.student.net, trainee.teacher.net):
                if isinstance(network, SpareClasses):
                    network.admit(classes)
        for copy in self._good if self.spec.spare is not None else ():
            copy["offset_C"][:classes] = 0.0
        self._name(classes)

    def state(self) -> dict[str, Array]:
        """Copies of all that step t+1 depends on: `student.*`, `teacher.*`, `optimizer.*`, `learner.*` and others."""
        tensors = trainee_tensors(self.trainee) | good_tensors(self._good) | method_tensors(self.trainee)
        tensors |= input_tensors(self.trainee.student.normalise)
        tensors |= {} if self.twin is None else twin_tensors(self.twin)
        arrays = {name: to_array(tensor) for name, tensor in tensors.items()}
        arrays |= {f"prior.{name}": array for name, array in self.prior.state().items()}
        return arrays | {f"learner.{name}": np.array(count, dtype=np.int64) for name, count in self._counts().items()}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Continue from what `state` returned.

        A twin that was not saved starts as a copy of the student. What another method kept is dropped if it does not
        fit; see `another_method` if it does. `supervised` continues from the saved twin. Columns that were added since
        get weights of zero, in a learner at step 0.

        Raises:
            CheckpointError: names, shapes or dtypes differ from this model and optimizer. Nothing was changed.
        """
        arrays: Mapping[str, Array] = as_centre_and_scale(state)
        arrays = twin_as_student(arrays) if self.config.method == "supervised" else arrays
        groups = {name.split(".")[0] for name in arrays}
        good = [self._copy_teacher() for _ in {name.split(".")[1] for name in arrays if name.startswith("good.")}]
        tensors = trainee_tensors(self.trainee) | good_tensors(good)
        if self.twin is not None and "twin" in groups:
            tensors |= twin_tensors(self.twin)
        method, inputs = method_tensors(self.trainee), input_tensors(self.trainee.student.normalise)
        if self.spec.factory in ROW_NETWORKS:
            arrays = completed(arrays, tensors)
        if self.spec.columns:
            arrays = with_added_columns(arrays, tensors | inputs)
        tensors |= method if fits(arrays, method, "method.") else {}
        has_inputs = fits(arrays, inputs, "inputs.")
        tensors |= inputs if has_inputs else {}
        counts = restore(arrays, tensors, self._counts())
        self.prior.load({name[6:]: array for name, array in arrays.items() if name.startswith("prior.")})
        self._good = good
        self._progress = Progress(**{field.name: counts[field.name] for field in fields(Progress)})
        self._sums = CostSums(self._device, skipped_in_a_row=counts["skipped_in_a_row"])
        self._steps_read = self.step
        if self.twin is not None and "twin" in groups:
            self._twin_counts = Updates(counts["twin_updates"], counts["twin_averaged_at"])
        elif self.twin is not None:
            self.twin.copy_from(self.trainee)
            self._twin_counts = Updates(self._progress.updates, self._progress.averaged_at)
        normalise = self.trainee.student.normalise
        if isinstance(normalise, RunningNorm) and not has_inputs:
            normalise.sample.begin(normalise.centre, normalise.scale)
        served = counts["served"]
        self.served = served if served < len(self.candidates) and "bank" not in groups else 0

    def teacher_state(self) -> dict[str, Array]:
        """Copies of what a server loads, of the candidate that is served: the state_dict of `build(spec)`."""
        return {name: to_array(tensor) for name, tensor in self._networks()[self.served].state_dict().items()}

    def describe(self) -> dict[str, Any]:
        """What was built, for the log and `inspect`."""
        return {
            "factory": self.spec.factory,
            "parameters": sum(parameter.numel() for parameter in self.trainee.student.parameters()),
            "method": self.config.method,
            "optimizer": self.config.optimizer,
            "device": str(self._device),
            "threads": torch.get_num_threads(),
            "precision": str(self.trainee.student.precision).removeprefix("torch."),
        }

    def _counts(self) -> dict[str, int]:
        """All whole numbers of the state, by name in a checkpoint."""
        return {
            **asdict(self._progress),
            "served": self.served,
            "skipped_in_a_row": round(self._sums.skipped_in_a_row.item()),
            "twin_updates": self._twin_counts.updates,
            "twin_averaged_at": self._twin_counts.averaged_at,
        }

    def _networks(self) -> list[Classifier]:
        """Of the candidates."""
        teacher = self.trainee.teacher
        return [teacher] if self.twin is None else [teacher, self.twin.teacher]

    def _copy_teacher(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.trainee.teacher.net.state_dict().items()}

    def _make_rows(self, batch: MicroBatch) -> Rows:
        """The valid rows on the device. Fresh rows enter the input statistics here, after they were predicted."""
        fresh, labelled = batch.fresh_count, batch.labelled_count
        labels_B = np.full(fresh + labelled, UNLABELLED, dtype=np.int64)
        labels_B[fresh:] = batch.labelled_y[:labelled]
        raw = _to_device(np.concatenate((batch.fresh_x[:fresh], batch.labelled_x[:labelled])), self._device)
        student = self.trainee.student
        x_B = student.to_float(raw)
        if fresh and not batch.seen_before and isinstance(student.normalise, RunningNorm):
            student.normalise.observe(x_B[:fresh])
        with torch.no_grad():
            x_B = student.normalise(x_B)
        return Rows(
            x_B=x_B,
            labels_B=_to_device(labels_B, self._device),
            labelled_count=labelled,
            augment=self._augment,
            generator=self._generator,
            uniform_C=self._uniform_C,
            weights_C=self._weights_C,
            witness_BC=self._ask_witness(x_B[: fresh + len(batch.trained_ids)]),
            labels_so_far=self._progress.labels,
            keys_B=None if batch.keys is None else _to_device(batch.keys, self._device),
        )

    def _ask_witness(self, x_B: Tensor) -> Tensor | None:
        """Probabilities (B, C) for clean rows by the twin, which no target has influenced, else by the teacher.

        None where alignment to labels does not ask.
        """
        options = self.config.options
        if not (isinstance(options, TargetOptions) and options.align == "labels" and len(x_B)):
            return None
        witness = (self.twin or self.trainee).teacher
        with torch.no_grad():
            return witness.logits(x_B).softmax(dim=1)

    def _follow_new_weights(self) -> None:
        """Reset what was measured and averaged with the replaced weights."""
        self._sums.skipped_in_a_row.zero_()
        self.prior.forget()
        method, optimizer = self.trainee.method, self.trainee.optimizer
        method.forget()
        for parameter in method.parameters().values():
            for tensor in optimizer.state.get(parameter, {}).values():
                tensor.zero_()
        self.served = 0

    def _name(self, classes: int) -> None:
        """The first `classes` outputs have names."""
        self.prior.name(classes)
        self._uniform_C.zero_()
        self._uniform_C[:classes] = 1.0 / classes


def _codes(spec: ModelSpec, device: torch.device) -> Tensor | None:
    """`Augment.is_code_W` of the columns."""
    if not spec.has_categories:
        return None
    return torch.from_numpy(places_of(spec.columns).is_code_W).to(device)


def _class_weights(config: LearnConfig, names: Sequence[str], classes: int, device: torch.device) -> Tensor | None:
    """`Rows.weights_C` of `learn.class_weights`."""
    given = config.class_weights
    if not given:
        return None
    if given == "balanced":
        return torch.zeros(classes, device=device)
    assert set(given) <= set(names), (given, names)
    return torch.tensor([given.get(name, 1.0) for name in names] + [1.0] * (classes - len(names)), device=device)


def _to_device(array: Array, device: torch.device) -> Tensor:
    """The array on the device, without making the host wait.

    On a CPU it may share memory with a writable, contiguous array.
    """
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
