"""One step: against torch's optimizers, and I4: a failed step leaves everything untouched.

Both code paths, in which the host may or may not read from the device, are tested on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from streamlearn.learn.build import make_trainee
from streamlearn.learn.losses import mse_consistency
from streamlearn.learn.methods.mean_teacher import MeanTeacher
from streamlearn.learn.methods.settings import MeanTeacherOptions
from streamlearn.learn.methods.supervised import Supervised
from streamlearn.learn.noise.build import gaussian, no_noise
from streamlearn.learn.rows import Augment, Rows
from streamlearn.learn.settings import LearnConfig
from streamlearn.learn.step import Method, StepCosts, Trainee, answer, train_step
from streamlearn.models.build import ModelSpec, build
from streamlearn.records import UNLABELLED
from tests.support import learn_config

MLP = ModelSpec("mlp", {"hidden": [8]}, (5,), 3, normalise=True, scale=1.0)
CONVNET = ModelSpec("convnet", {"widths": [4, 6]}, (2, 6, 6), 3, normalise=False, scale=1.0)
CPU = torch.device("cpu")


def settings(**changed: object) -> LearnConfig:
    base = {
        "method": "mean_teacher", "consistency_weight": 4.0, "rampup_steps": 0, "ema_decay": 0.9, "optimizer": "sgd",
        "learning_rate": 0.1, "weight_decay": 0.01, "noise": "none", "device": "cpu",
    }  # fmt: skip
    return learn_config(base, **changed)


def make(spec: ModelSpec = MLP, *, host_may_ask: bool = True, **changed: object) -> Trainee:
    made = make_trainee(spec, settings(**changed), CPU)
    return replace(made, host_may_ask=host_may_ask)


def rows(spec: ModelSpec = MLP, *, fresh: int = 6, labelled: int = 3, seed: int = 0, noise=no_noise) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    labels_B = torch.full((fresh + labelled,), UNLABELLED)
    labels_B[fresh:] = torch.arange(labelled) % spec.classes
    x_B = torch.randn((fresh + labelled, *spec.shape), generator=generator)
    uniform_C = torch.full((spec.classes,), 1 / spec.classes)
    return Rows(x_B, labels_B, labelled, Augment(noise, noise), generator, uniform_C)


def mean_teacher() -> MeanTeacher:
    return MeanTeacher(MeanTeacherOptions(), MLP, build(MLP))


def step(trainee: Trainee, of: Rows, *, t: int = 1, method=None) -> Tensor:
    """Take one step and return whether it was skipped."""
    trainee.undo.remember()
    trainee = replace(trainee, method=method or mean_teacher())
    outcome = train_step(trainee, of, step=t, consistency_weight=4.0, alpha=0.9)
    assert outcome is not None
    return outcome[1]


def everything(trainee: Trainee) -> dict[str, Tensor]:
    found = {f"student.{name}": tensor.clone() for name, tensor in trainee.student.state_dict().items()}
    found |= {f"teacher.{name}": tensor.clone() for name, tensor in trainee.teacher.state_dict().items()}
    for i, state in enumerate(trainee.optimizer.state.values()):
        found |= {f"optimizer.{i}.{key}": tensor.clone() for key, tensor in state.items()}
    return found


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


class NanLoss(Method):
    """A method whose loss and gradient are NaN."""

    def costs(self, student, teacher, rows):
        logits_BC = answer(student, rows.view())
        return StepCosts(logits_BC.sum() * math.nan, logits_BC.sum())


class NanLossWithFiniteGradient(Method):
    """A loss that is NaN by a term without gradient."""

    def costs(self, student, teacher, rows):
        logits_BC = answer(student, rows.view())
        return StepCosts(logits_BC.square().mean(), logits_BC.new_tensor(math.nan))


class InfiniteGradient(Method):
    """A finite loss whose gradient is not: sqrt at zero."""

    def costs(self, student, teacher, rows):
        logits_BC = answer(student, rows.view())
        return StepCosts((logits_BC - logits_BC.detach()).square().sum().sqrt(), logits_BC.sum())


FAILING = [NanLoss(), NanLossWithFiniteGradient(), InfiniteGradient()]


class TestAgainstTorch:
    @pytest.mark.parametrize("spec", [MLP, CONVNET], ids=["mlp", "convnet"])
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_the_student_moves_as_under_torchs_plain_loop(self, spec, optimizer):
        """Five steps of the fused optimizer with prepared state equal five of the unfused one."""
        trainee = make(spec, optimizer=optimizer)
        reference = make(spec, optimizer=optimizer)
        student, teacher = reference.student.net.train(), reference.teacher.net
        if optimizer == "sgd":
            plain = torch.optim.SGD(
                student.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=False, fused=False
            )
        else:
            plain = torch.optim.AdamW(student.parameters(), 0.1, weight_decay=0.01, foreach=False, fused=False)

        for t in range(1, 6):
            of = rows(spec, seed=t)
            step(trainee, of, t=t)

            reference.warmup.set(ask=True)
            logits_BC, targets_BC = student(of.x_B), teacher(of.x_B)
            plain.zero_grad()
            cross_entropy = nn.functional.cross_entropy(logits_BC[6:], of.labels_B[6:], reduction="sum") / 9
            squares_BC = (logits_BC.softmax(1) - targets_BC.detach().softmax(1)) ** 2
            loss = cross_entropy + 4.0 * squares_BC.mean()
            loss.backward()
            plain.step()
            reference.average.update(t, alpha=0.9)

        found, expected = everything(trainee), dict(reference.student.named_parameters())
        for name, parameter in expected.items():
            torch.testing.assert_close(found[f"student.{name}"], parameter.detach(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_both_paths_take_the_same_step(self, optimizer):
        """Whether or not the host may read from the device."""
        asking, not_asking = make(CONVNET, optimizer=optimizer), make(CONVNET, optimizer=optimizer, host_may_ask=False)

        for t in range(1, 4):
            assert not step(asking, rows(CONVNET, seed=t), t=t)
            assert not step(not_asking, rows(CONVNET, seed=t), t=t)

        one, other = everything(asking), everything(not_asking)
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], msg=name)


class TestFailedStep:
    """I4."""

    @pytest.mark.parametrize("host_may_ask", [True, False])
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    @pytest.mark.parametrize("method", FAILING, ids=lambda method: type(method).__name__)
    @pytest.mark.parametrize("steps_before", [0, 2])
    def test_leaves_student_teacher_optimizer_and_statistics_untouched(
        self, host_may_ask, optimizer, method, steps_before
    ):
        """Also as the first step, in which an optimizer would create its state."""
        trainee = make(CONVNET, optimizer=optimizer, host_may_ask=host_may_ask)
        for t in range(1, 1 + steps_before):
            step(trainee, rows(CONVNET, seed=t), t=t)
        before = everything(trainee)

        skipped = step(trainee, rows(CONVNET, seed=9), t=steps_before + 1, method=method)

        assert skipped
        assert differing(before, everything(trainee)) == []

    @pytest.mark.parametrize("host_may_ask", [True, False])
    @pytest.mark.parametrize("steps_before", [0, 2])
    def test_is_one_with_infinite_batch_statistics_and_a_finite_loss(self, host_may_ask, steps_before):
        """One row of 3e19: the squares of its convolution overflow, and running_var would stay infinite."""
        trainee = make(CONVNET, host_may_ask=host_may_ask)
        for t in range(1, 1 + steps_before):
            step(trainee, rows(CONVNET, seed=t), t=t)
        before, outlier = everything(trainee), rows(CONVNET, seed=9)
        outlier.x_B[0] = 3e19
        trainee.undo.remember()

        outcome = train_step(
            replace(trainee, method=mean_teacher()), outlier, step=steps_before + 1, consistency_weight=0.0, alpha=0.9
        )

        assert outcome is not None
        costs, skipped = outcome
        assert torch.isfinite(costs.classification)
        assert skipped
        assert differing(before, everything(trainee)) == []

    @pytest.mark.parametrize("host_may_ask", [True, False])
    def test_is_followed_by_a_good_one(self, host_may_ask):
        """A failure has no effect on the next step."""
        trainee, never_failed = make(CONVNET, host_may_ask=host_may_ask), make(CONVNET, host_may_ask=host_may_ask)

        step(trainee, rows(CONVNET, seed=9), t=1, method=NanLoss())
        for one in (trainee, never_failed):
            assert not step(one, rows(CONVNET, seed=1), t=2)

        assert differing(everything(trainee), everything(never_failed)) == []

    def test_restores_the_input_statistics(self):
        """The learner observes after `remember` and before the step."""
        trainee = make(MLP)
        before = everything(trainee)
        trainee.undo.remember()
        trainee.student.normalise.observe(torch.full((4, 5), 9.0))

        train_step(replace(trainee, method=NanLoss()), rows(), step=1, consistency_weight=1.0, alpha=0.9)

        assert differing(before, everything(trainee)) == []


class TestMeanTeacher:
    def test_draws_independent_noise_for_both_views(self):
        """Equal networks disagree under noise, and agree without."""
        trainee = make()

        noisy = mean_teacher().costs(trainee.student, trainee.teacher, rows(noise=partial(gaussian, std=1.0)))
        clean = mean_teacher().costs(trainee.student, trainee.teacher, rows())

        assert noisy.consistency.item() > 1e-4
        assert clean.consistency.item() == pytest.approx(0.0, abs=1e-9)

    def test_draws_one_view_for_each_network(self):
        """The student gets the first view, the teacher the second, neither the clean rows."""
        trainee, seen = make(), []

        def noise(x, _generator):
            seen.append(x + len(seen) + 1.0)
            return seen[-1]

        costs = mean_teacher().costs(trainee.student, trainee.teacher, rows(noise=noise))

        student_logits_BC, teacher_logits_BC = trainee.student.net(seen[0]), trainee.teacher.net(seen[1])
        assert len(seen) == 2
        torch.testing.assert_close(costs.consistency, mse_consistency(student_logits_BC, teacher_logits_BC.softmax(1)))

    def test_moves_the_student_without_labels(self):
        """Consistency alone has a gradient; the classification cost is exactly zero."""
        trainee = make()
        before = everything(trainee)

        costs = mean_teacher().costs(trainee.student, trainee.teacher, rows(labelled=0))
        step(trainee, rows(labelled=0, noise=partial(gaussian, std=1.0)))

        assert costs.classification.item() == 0.0
        assert "student.net.layers.1.weight" in differing(before, everything(trainee))

    @pytest.mark.parametrize(("fresh", "labelled"), [(1, 0), (0, 1)])
    @pytest.mark.parametrize("spec", [MLP, CONVNET], ids=["mlp", "convnet"])
    def test_learns_from_one_row_alone(self, spec, fresh, labelled):
        """Batch normalisation has no statistics of one row, so the student answers in eval mode."""
        trainee = make(spec)
        before = everything(trainee)

        step(trainee, rows(spec, fresh=fresh, labelled=labelled, noise=partial(gaussian, std=1.0)))

        changed = differing(before, everything(trainee))
        assert any(name.startswith("student.") for name in changed)
        assert not any("running" in name for name in changed if name.startswith("student."))

    def test_leaves_the_teachers_own_statistics_to_the_average(self):
        """It answers in eval mode, so its forward pass changes no buffer."""
        trainee = make(CONVNET)
        before = everything(trainee)

        mean_teacher().costs(trainee.student, trainee.teacher, rows(CONVNET))

        changed = differing(before, everything(trainee))
        assert changed
        assert not any(name.startswith("teacher.") for name in changed)


class TestSupervised:
    def test_sees_nothing_of_fresh_rows(self):
        """Other fresh rows, same costs, same batch statistics."""
        one, other = make(CONVNET), make(CONVNET)
        of = rows(CONVNET)
        changed = replace(of, x_B=of.x_B.clone())
        changed.x_B[:6] = 77.0

        step(one, of, method=Supervised())
        step(other, changed, method=Supervised())

        assert differing(everything(one), everything(other)) == []

    def test_divides_by_all_rows_as_mean_teacher_does(self):
        """One learning rate means the same for both."""
        trainee, of = make(), rows()

        alone = Supervised().costs(trainee.student, trainee.teacher, of)
        both = mean_teacher().costs(trainee.student, trainee.teacher, of)

        torch.testing.assert_close(alone.classification, both.classification)
        assert alone.consistency.item() == 0.0

    def test_without_labels_finds_nothing_to_learn(self):
        """No update, so no weight decay and no momentum either."""
        trainee = make()
        before = everything(trainee)

        labels_only = replace(trainee, method=Supervised())
        outcome = train_step(labels_only, rows(labelled=0), step=1, consistency_weight=1.0, alpha=0.9)

        assert outcome is None
        assert differing(before, everything(trainee)) == []


def test_dropout_and_batch_statistics_are_on_for_two_rows():
    """The student learns in train mode if it can."""
    trainee = make(CONVNET)

    answer(trainee.student, torch.randn((2, *CONVNET.shape)))

    assert all(layer.training for layer in trainee.student.modules() if isinstance(layer, nn.BatchNorm2d))
