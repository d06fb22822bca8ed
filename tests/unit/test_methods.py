"""Each method's costs against independent formulas, and its state across restarts."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn

from streamlearn.errors import ConfigError
from streamlearn.learn.build import make_trainee
from streamlearn.learn.contrast import Contrast
from streamlearn.learn.embedding import Embedding
from streamlearn.learn.learner import Learner
from streamlearn.learn.methods.dsne import DSne, dsne_loss
from streamlearn.learn.methods.ict import InterpolationConsistency, make_ict
from streamlearn.learn.methods.mean_teacher import MeanTeacher, make_mean_teacher
from streamlearn.learn.methods.pi import Pi
from streamlearn.learn.methods.settings import (
    DSneOptions,
    InterpolationOptions,
    MeanTeacherOptions,
    PiOptions,
    TargetOptions,
    TemporalEnsemblingOptions,
)
from streamlearn.learn.methods.temporal_ensembling import TemporalEnsembling
from streamlearn.learn.noise.build import gaussian, no_noise
from streamlearn.learn.rows import Augment, Rows, draw_mix
from streamlearn.learn.settings import unset
from streamlearn.learn.step import Trainee
from streamlearn.learn.targets import TargetMethod
from streamlearn.models.build import Classifier, ModelSpec, build
from streamlearn.records import UNLABELLED, MicroBatch
from tests.unit.test_step import settings

MLP = ModelSpec("mlp", {"hidden": [8], "dropout": 0.0}, (5,), 3, normalise=False, scale=1.0)
CPU = torch.device("cpu")
NO, YES = torch.tensor(False), torch.tensor(True)


def rows(*, fresh: int = 6, labelled: int = 3, seed: int = 0, augment: Augment | None = None, **more: object) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    labels_B = torch.full((fresh + labelled,), UNLABELLED)
    labels_B[fresh:] = torch.arange(labelled) % 3
    x_B = torch.randn((fresh + labelled, 5), generator=generator)
    return Rows(
        x_B, labels_B, labelled, augment or Augment(no_noise, no_noise), generator, torch.full((3,), 1 / 3), **more
    )


def targets_of(**options: object) -> TargetMethod:
    return TargetMethod(TargetOptions(**options), MLP, build(MLP))


def pair(**changed: object) -> Trainee:
    """A student and a teacher that differ."""
    made = make_trainee(MLP, settings(**changed), CPU)
    with torch.no_grad():
        for parameter in made.teacher.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return made


def probs(network: nn.Module, x: Tensor) -> np.ndarray:
    network.eval()  # no dropout, no batch statistics in this network: the same as in training
    with torch.no_grad():
        return network.net(x).softmax(1).double().numpy()


class TestMixup:
    def test_a_mix_of_rows_has_the_mix_of_their_labels(self):
        """View and target have the same share and partner."""
        of = rows(fresh=0, labelled=40, augment=Augment(no_noise, no_noise, mixup_beta=0.5))

        view_L, targets_LC = of.labelled_view()

        mix = draw_mix(40, 0.5, torch.Generator().manual_seed(0))  # another stream of chance: only the shape is used
        assert mix.share_B.shape == mix.partner_B.shape == (40,)
        assert not torch.equal(view_L, of.x_B)
        # Every mixed row lies on a line between two rows, at the share that its target says.
        hot_LC = torch.eye(3)[of.labels_B]
        for view, target in zip(view_L, targets_LC, strict=True):
            ends = ((i, j) for i in range(40) for j in range(40))
            assert any(
                torch.allclose(s * of.x_B[i] + (1 - s) * of.x_B[j], view, atol=1e-4)
                and torch.allclose(s * hot_LC[i] + (1 - s) * hot_LC[j], target, atol=1e-4)
                for i, j in ends
                if (s := _share(of.x_B[i], of.x_B[j], view)) is not None
            )

    def test_a_mixed_row_takes_each_code_from_one_of_its_two_rows(self):
        """By their shares: between two codes is a third category. Numbers next to codes are mixed as others."""
        is_code_W = torch.tensor([False, True, True, False, False])
        of = rows(fresh=0, labelled=4000, augment=Augment(no_noise, no_noise, is_code_W=is_code_W))
        of.x_B[:, 1:3] = torch.arange(8000.0).view(4000, 2)  # each code once
        mix = draw_mix(4000, 0.5, torch.Generator().manual_seed(1))

        mixed_B, partner_B = of.mixed(of.x_B, mix), of.x_B[mix.partner_B]

        is_own_BK = mixed_B[:, 1:3] == of.x_B[:, 1:3]
        assert torch.equal(mixed_B[:, [0, 3, 4]], mix.of(of.x_B)[:, [0, 3, 4]])
        assert torch.all(is_own_BK | (mixed_B[:, 1:3] == partner_B[:, 1:3]))
        assert torch.any(is_own_BK[:, 0] != is_own_BK[:, 1])  # each for itself
        for low, high in ((0.0, 0.1), (0.45, 0.55), (0.9, 1.0)):
            of_share_B = (mix.share_B >= low) & (mix.share_B <= high)
            shares = is_own_BK[of_share_B].double().mean().item(), mix.share_B[of_share_B].mean().item()
            assert shares[0] == pytest.approx(shares[1], abs=0.05)

    def test_partners_are_within_blocks(self):
        """Every row is a partner once."""
        partner_B = draw_mix(600, 0.5, torch.Generator().manual_seed(1)).partner_B

        assert sorted(partner_B.tolist()) == list(range(600))
        assert torch.equal(partner_B // 256, torch.arange(600) // 256)

    def test_shares_are_of_the_beta_distribution(self):
        """Mean 1/2 and variance 1 / (4 (2 b + 1)), for small b and large."""
        for beta in (0.1, 0.5, 2.0):
            share_B = draw_mix(40_000, beta, torch.Generator().manual_seed(1)).share_B
            assert torch.isfinite(share_B).all()
            assert share_B.mean().item() == pytest.approx(0.5, abs=0.01)
            assert share_B.var().item() == pytest.approx(1 / (4 * (2 * beta + 1)), rel=0.05)

    def test_mixed_rows_are_not_compared_with_the_teacher(self):
        """Their target is a mix of labels; only fresh rows are compared."""
        of = rows(augment=Augment(no_noise, no_noise, mixup_beta=0.5))

        view = of.student_view()

        assert view.compared == of.fresh_count == 6
        assert torch.equal(view.x_B[:6], of.x_B[:6])
        assert not torch.equal(view.x_B[6:], of.x_B[6:])

    def test_the_strong_view_is_of_fresh_rows_only(self):
        """Labelled rows get weak noise: strong noise on the few of them costs accuracy."""
        of = rows(augment=Augment(no_noise, lambda x, _: x + 100.0))

        view = of.student_view()

        assert torch.equal(view.x_B[:6], of.x_B[:6] + 100.0)
        assert torch.equal(view.x_B[6:], of.x_B[6:])
        assert view.compared == 9


def _share(one: Tensor, other: Tensor, mixed: Tensor) -> float | None:
    """S of mixed = s one + (1 - s) other, by the coordinate that differs most; None if they are equal."""
    along = (one - other).abs().argmax()
    length = (one - other)[along].item()
    return None if abs(length) < 1e-6 else ((mixed - other)[along] / length).item()


class TestClassWeights:
    def of(self, weights: list[float], **more: object) -> np.ndarray:
        """Targets of labelled rows of the classes 0, 1, 2, 0."""
        weighted = replace(rows(labelled=4, **more), weights_C=torch.tensor(weights))
        return weighted.student_view().targets_LC.numpy()

    def test_a_row_counts_by_its_class_and_the_mean_stays_1(self) -> None:
        """Weights 1, 2, 5 and 1 have the mean 9/4."""
        expected = np.eye(3)[[0, 1, 2, 0]] * (np.array([1, 2, 5, 1]) / 2.25)[:, None]
        np.testing.assert_allclose(self.of([1.0, 2.0, 5.0]), expected, rtol=1e-6)

    def test_balanced_gives_each_class_of_the_step_the_same_sum(self) -> None:
        """The mean weight is 1 here too."""
        targets_LC = self.of([0.0, 0.0, 0.0])
        np.testing.assert_allclose(targets_LC.sum(axis=0), [4 / 3] * 3, rtol=1e-6)

    def test_mixed_rows_have_mixed_weights(self) -> None:
        """Of both of their classes."""
        augment = Augment(no_noise, no_noise, mixup_beta=1.0)
        plain_LC = rows(labelled=4, augment=augment).student_view().targets_LC.numpy()
        expected_LC = plain_LC * [1.0, 2.0, 5.0]
        found_LC = self.of([1.0, 2.0, 5.0], augment=augment)
        np.testing.assert_allclose(found_LC, expected_LC * 4 / expected_LC.sum(), rtol=1e-5)

    def test_rows_without_labels_cost_nothing(self) -> None:
        """No 0/0."""
        weighted = replace(rows(labelled=0), weights_C=torch.tensor([1.0, 2.0, 3.0]))
        assert weighted.student_view().targets_LC.shape == (0, 3)

    def test_reach_student_and_twin_by_name(self) -> None:
        """The cost of a step is the weighted one."""
        costs = {}
        for name, given in (("none", {}), ("even", {"a": 2.0, "b": 2.0, "c": 2.0}), ("rare", {"c": 50.0})):
            learner = Learner(MLP, settings(class_weights=given, twin="measure"), classes=("a", "b", "c"))
            x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
            learner.learn(MicroBatch(x, 4, x, np.array([0, 1, 2, 0]), 4, ["1", "2", "3", "4"]))
            costs[name] = learner.read_costs().classification
        assert costs["none"] == pytest.approx(costs["even"])
        assert costs["none"] != pytest.approx(costs["rare"])


class TestTargets:
    LOGITS = torch.tensor([[2.0, 0.0, 0.0], [3.0, 1.0, 0.0], [0.0, 1.0, 0.2], [0.1, 0.0, 0.0]])

    def made(self, **options: object) -> tuple[np.ndarray, np.ndarray | None, TargetMethod]:
        targets = targets_of(**options)
        of = rows(fresh=3, labelled=1)
        made, weights = targets.make_targets(self.LOGITS, of)
        return made.numpy(), None if weights is None else weights.numpy(), targets

    def test_are_the_teachers_probabilities_by_default(self):
        """And all rows have the same weight."""
        made, weights, targets = self.made()

        np.testing.assert_allclose(made, _softmax(self.LOGITS.numpy()), rtol=1e-6)
        assert weights is None
        assert targets.tensors() == {}

    def test_uniform_alignment_divides_by_the_teachers_class_shares(self):
        """The teacher's shares are a moving average over fresh rows, from uniform shares."""
        made, _, _ = self.made(align="uniform", target_momentum=0.9)

        p = _softmax(self.LOGITS.numpy().astype(float))
        model = 0.9 / 3 + 0.1 * p[:3].mean(axis=0)
        expected = p * (1 / 3) / model
        np.testing.assert_allclose(made, expected / expected.sum(1, keepdims=True), rtol=1e-5)

    @pytest.mark.parametrize("steps", [1, 60])
    def test_alignment_to_labels_is_a_ratio_estimate_shrunk_by_what_chance_would_do(self, steps):
        """Against the same formulas, with each label's weight computed from its age."""
        targets = targets_of(align="labels", target_momentum=0.9)
        rng = np.random.default_rng(1)
        y_N = rng.choice(3, steps * 2, p=[0.7, 0.2, 0.1])
        said_N3 = rng.dirichlet([1.0, 1.0, 1.0], len(y_N)) * 0.3 + 0.7 * np.eye(3)[y_N]
        fresh_SF3 = rng.dirichlet([2.8, 0.8, 0.4], (steps, 5))
        teacher_SF3 = rng.dirichlet([1.0, 1.0, 2.0], (steps, 5))

        for step in range(steps):
            new = slice(2 * step, 2 * step + 2)
            of = rows(
                fresh=5, labelled=3, witness_BC=torch.from_numpy(np.vstack((fresh_SF3[step], said_N3[new]))).float()
            )
            of.labels_B[5:7] = torch.from_numpy(y_N[new])  # the third is learned again
            made, _ = targets.make_targets(torch.from_numpy(teacher_SF3[step]).float().log(), of)
            targets.settle(NO)

        age_N = 2 * (steps - 1 - np.arange(len(y_N)) // 2)
        weight_N1 = (0.99**age_N)[:, None]
        model, witness, variance, z_N3 = np.full(3, 1 / 3), np.full(3, 1 / 3), np.ones(3), np.zeros_like(said_N3)
        mean = np.log(witness)
        for step, fresh in enumerate(fresh_SF3):
            model = 0.9 * model + 0.1 * teacher_SF3[step].mean(0)
            witness = 0.9 * witness + 0.1 * fresh.mean(0)
            mean = (5 * np.log(fresh).mean(0) + 11 * mean) / 16  # of sixteen rows or more it would be theirs alone
            variance = 0.9 * variance + 0.1 * ((np.log(fresh) - mean) ** 2).mean(0)
            new = slice(2 * step, 2 * step + 2)
            z_N3[new] = (np.log(said_N3[new]) - mean) / np.sqrt(variance)
        y, said = (weight_N1 * np.eye(3)[y_N]).sum(0), (weight_N1 * said_N3).sum(0)
        ratio = witness * (y + 1) / (said + 1)
        spread = ((ratio / ratio.sum() - 1 / 3) ** 2).sum()
        errors = (weight_N1**2 * (np.eye(3)[y_N] - said_N3) ** 2).sum(0)
        chance = ((witness / (said + 1) / ratio.sum()) ** 2 * (errors + 1)).sum()
        selection = ((weight_N1 * z_N3).sum(0) ** 2 / (weight_N1**2).sum()).mean()
        trust = max(0.0, 1 - chance * max(1.0, selection / 2) / spread)
        so_far = np.bincount(y_N, minlength=3)
        trust_3 = trust * so_far / (so_far + 5)
        estimate_3 = trust_3 * ratio / ratio.sum() + (1 - trust_3) / 3
        estimate_3 /= estimate_3.sum()
        expected = teacher_SF3[-1] * estimate_3 / model
        np.testing.assert_allclose(made.numpy(), expected / expected.sum(1, keepdims=True), rtol=2e-4)
        assert (trust > 0.5) == (steps > 1), "a case that is to show both"

    SHARES = np.array([0.6, 0.3, 0.1])

    def classes_found(
        self, *, labelled_shares: object, steps: int, accuracy: float, favoured: float = 1.0, batch: int = 64
    ) -> np.ndarray:
        """The class distribution that targets are aligned to, for samples of `SHARES`."""
        rng = np.random.default_rng(0)
        says_CC = torch.full((3, 3), (1 - accuracy) / 2) + (1.5 * accuracy - 0.5) * torch.eye(3)  # of each true class
        says_CC[:, 0] *= favoured
        says_CC /= says_CC.sum(1, keepdim=True)
        targets = targets_of(align="labels", target_momentum=0.99)
        for step in range(steps):
            labelled = batch if step % (64 // batch) == 0 else 0
            y_F, y_L = (
                torch.from_numpy(rng.choice(3, n, p=p)) for n, p in ((batch, self.SHARES), (labelled, labelled_shares))
            )
            of = rows(fresh=batch, labelled=labelled, witness_BC=says_CC[torch.cat((y_F, y_L))])
            of.labels_B[batch:] = y_L
            made, _ = targets.make_targets(says_CC[y_F].log(), of)
            targets.settle(NO)
        towards = (made / says_CC[y_F]).mean(0) * targets.tensors()["model_C"]  # up to a factor
        return (towards / towards.sum()).numpy()

    @pytest.mark.parametrize("favoured", [1.0, 2.0])
    def test_alignment_finds_the_class_distribution_without_selection_bias(self, favoured):
        """Also if the teacher predicts one class too often."""
        found = self.classes_found(labelled_shares=self.SHARES, steps=500, accuracy=0.9, favoured=favoured)

        assert np.abs(found - self.SHARES).max() < 0.05

    def test_alignment_finds_it_in_steps_of_one_sample(self):
        """A slow stream has such steps; a single row has no variance."""
        found = self.classes_found(labelled_shares=self.SHARES, steps=6400, accuracy=0.9, batch=1)

        assert np.abs(found - self.SHARES).max() < 0.15

    def test_alignment_is_uniform_under_selection_bias(self):
        """If 9 of 10 labels are of one class, samples need not be."""
        found = self.classes_found(labelled_shares=[0.05, 0.05, 0.9], steps=500, accuracy=0.5, favoured=1.0)

        assert np.abs(found - 1 / 3).max() < 0.02

    def test_alignment_is_uniform_before_the_first_label(self):
        """Whatever an untrained teacher predicts."""
        targets = targets_of(align="labels", target_momentum=0.5)

        made, _ = targets.make_targets(self.LOGITS, rows(fresh=3, labelled=1))

        p = _softmax(self.LOGITS.numpy().astype(float))
        expected = p / (0.5 / 3 + 0.5 * p[:3].mean(axis=0))
        np.testing.assert_allclose(made.numpy(), expected / expected.sum(1, keepdims=True), rtol=1e-5)

    def test_forget_resets_all_averages(self):
        """After a rollback or drift."""
        targets = targets_of(align="labels", gate="softmatch", target_momentum=0.9)
        first = {name: tensor.clone() for name, tensor in targets.tensors().items()}
        witness_BC = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.6, 0.1, 0.3]])
        targets.make_targets(self.LOGITS, rows(fresh=3, labelled=3, witness_BC=witness_BC))
        targets.settle(NO)
        assert not any(torch.equal(tensor, first[name]) for name, tensor in targets.tensors().items())

        targets.forget()

        assert all(torch.equal(tensor, first[name]) for name, tensor in targets.tensors().items())

    def test_sharpening_is_a_power_of_the_probabilities(self):
        """q^(1/T), normalised: the softmax of logits/T."""
        made, _, _ = self.made(temperature=0.5)

        np.testing.assert_allclose(made, _softmax(self.LOGITS.numpy() / 0.5), rtol=1e-5)

    def test_the_fixed_gate_passes_confident_rows(self):
        """Max p >= threshold, by row."""
        _, weights, _ = self.made(gate="fixed", gate_threshold=0.7)

        assert weights.tolist() == (_softmax(self.LOGITS.numpy()).max(1) >= 0.7).astype(float).tolist()

    def test_freematch_thresholds_follow_confidence_and_class(self):
        """Tau times the class's share of the most common one."""
        _, weights, targets = self.made(gate="freematch", target_momentum=0.5)

        p = _softmax(self.LOGITS.numpy().astype(float))
        tau = 0.5 / 3 + 0.5 * p[:3].max(1).mean()
        share = 0.5 / 3 + 0.5 * p[:3].mean(0)
        threshold_C = tau * share / share.max()
        assert weights.tolist() == (p.max(1) >= threshold_C[p.argmax(1)]).astype(float).tolist()
        targets.settle(NO)
        assert targets.tensors()["confidence"].item() == pytest.approx(tau, rel=1e-5)

    def test_softmatch_weighs_by_a_bell_below_the_mean(self):
        """exp(-(c - mu)^2 * 4 / (2 var)) below mu and 1 above."""
        _, weights, _ = self.made(gate="softmatch", target_momentum=0.5)

        c = _softmax(self.LOGITS.numpy().astype(float)).max(1)
        mu = 0.5 / 3 + 0.5 * c[:3].mean()
        var = 0.5 + 0.5 * c[:3].var(ddof=1)
        expected = np.where(c >= mu, 1.0, np.exp(-((c - mu) ** 2) * 4 / (2 * var)))
        np.testing.assert_allclose(weights, expected, rtol=1e-5)

    @pytest.mark.parametrize("options", [{"align": "labels"}, {"gate": "freematch"}, {"gate": "softmatch"}])
    def test_a_skipped_step_leaves_the_averages_unchanged(self, options):
        """I4 for the state of targets."""
        _, _, targets = self.made(**options)
        before = {name: tensor.clone() for name, tensor in targets.tensors().items()}

        targets.settle(YES)

        assert all(torch.equal(tensor, before[name]) for name, tensor in targets.tensors().items())

    @pytest.mark.parametrize("gate", ["none", "fixed", "freematch", "softmatch"])
    def test_of_labelled_rows_alone_are_finite(self, gate):
        """Without fresh rows nothing is averaged."""
        targets = targets_of(align="labels", gate=gate)

        made, weights = targets.make_targets(self.LOGITS, rows(fresh=0, labelled=4))
        targets.settle(NO)

        assert torch.isfinite(made).all()
        assert weights is None or torch.isfinite(weights).all()
        assert all(torch.isfinite(tensor).all() for tensor in targets.tensors().values())


class TestPi:
    def test_compares_two_views_of_one_network_and_both_get_gradient(self):
        """The squared error between the answers to eta and eta', whose gradient is that of both branches."""
        made, noise = pair(), partial(gaussian, std=0.5)
        of = rows(augment=Augment(noise, noise))
        views = [noise(of.x_B, g := torch.Generator().manual_seed(0)) for _ in range(1)]
        of.generator.manual_seed(0)

        costs = Pi(PiOptions(), MLP, made.student).costs(made.student, made.teacher, of)
        costs.consistency.backward()

        g.manual_seed(0)
        views = [noise(of.x_B, g), noise(of.x_B, g)]
        found = made.student.net.layers[-1].weight.grad.clone()
        made.student.zero_grad()
        first, second = (made.student.net(view).softmax(1) for view in views)
        expected = ((first - second) ** 2).mean()
        expected.backward()
        assert costs.consistency.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(found, made.student.net.layers[-1].weight.grad)

    def test_with_kl_the_second_branch_is_a_target(self):
        """Gradient flows into the first only."""
        made, noise = pair(), partial(gaussian, std=0.5)
        of = rows(augment=Augment(noise, noise))
        of.generator.manual_seed(0)

        costs = Pi(PiOptions(consistency="kl"), MLP, made.student).costs(made.student, made.teacher, of)
        costs.consistency.backward()

        found = made.student.net.layers[-1].weight.grad.clone()
        made.student.zero_grad()
        g = torch.Generator().manual_seed(0)
        first, second = made.student.net(noise(of.x_B, g)), made.student.net(noise(of.x_B, g)).detach()
        nn.functional.kl_div(first.log_softmax(1), second.softmax(1), reduction="batchmean").backward()
        torch.testing.assert_close(found, made.student.net.layers[-1].weight.grad)


class TestInterpolationConsistency:
    def test_compares_the_answer_to_a_mix_with_the_mix_of_answers(self):
        """E || f(s u + (1-s) u', theta) - (s f(u, theta') + (1-s) f(u', theta')) ||^2, row by row."""
        made, of = pair(), rows()
        of.generator.manual_seed(5)

        method = InterpolationConsistency(InterpolationOptions(), MLP, made.student)
        costs = method.costs(made.student, made.teacher, of)

        share, partner = draw_mix(6, 0.5, torch.Generator().manual_seed(5))
        u = of.x_B[:6]
        mixed = share[:, None] * u + (1 - share[:, None]) * u[partner]
        answers, s = probs(made.teacher, u), share.double().numpy()[:, None]
        expected = (probs(made.student, mixed) - (s * answers + (1 - s) * answers[partner.numpy()])) ** 2
        assert costs.consistency.item() == pytest.approx(expected.mean(), rel=1e-4)
        cross_entropy = -np.log(probs(made.student, of.x_B[6:])[np.arange(3), of.labels_B[6:].numpy()]).sum() / 9
        assert costs.classification.item() == pytest.approx(cross_entropy, rel=1e-4)


class TestTeacherMode:
    """The papers' teachers answer in train mode; ours answers as it is served by default."""

    SPEC: ClassVar[ModelSpec] = replace(MLP, options={"hidden": [8], "dropout": 0.5, "norm": "batch"})

    @pytest.mark.parametrize("method", [{"method": "mean_teacher"}, {"method": "ict"}], ids=lambda c: c["method"])
    @pytest.mark.parametrize("mode", ["eval", "train"])
    def test_the_teacher_answers_in_the_mode_that_is_set(self, method, mode):
        """In train mode with dropout and batch statistics, in eval mode without."""
        made = make_trainee(self.SPEC, settings(teacher_mode=mode, noise="none", **method), CPU)
        with torch.no_grad():
            for name, buffer in made.teacher.net.named_buffers():
                if name.endswith("running_mean"):
                    buffer.add_(3.0)
        before = {name: buffer.clone() for name, buffer in made.teacher.net.named_buffers()}
        of = rows()

        asked = [made.method._ask(made.teacher, of, 6)[0] for _ in range(2)]

        served = made.teacher.net(of.view(6)).softmax(1)
        assert torch.equal(asked[0], asked[1]) == (mode == "eval")
        assert torch.equal(asked[0], served) == (mode == "eval")
        assert not any(module.training for module in made.teacher.modules())
        assert before
        for name, buffer in made.teacher.net.named_buffers():
            assert torch.equal(buffer, before[name]), name

    def test_in_train_mode_batch_statistics_are_those_of_the_rows(self):
        """Without dropout, the answer is that of the same network in train mode."""
        spec = replace(MLP, options={"hidden": [8], "dropout": 0.0, "norm": "batch"})
        made = make_trainee(spec, settings(teacher_mode="train", noise="none"), CPU)
        of = rows()
        with torch.no_grad():
            for name, buffer in made.teacher.net.named_buffers():
                if name.endswith("running_mean"):
                    buffer.add_(3.0)

        asked = made.method._ask(made.teacher, of, 6)[0]

        copied = copy.deepcopy(made.teacher.net).train()
        assert torch.allclose(asked, copied(of.x_B[:6]).softmax(1))

    def test_one_row_alone_is_answered_in_eval_mode(self):
        """It has no batch statistics."""
        made = make_trainee(self.SPEC, settings(teacher_mode="train", noise="none"), CPU)
        of = rows(fresh=1, labelled=0)

        assert torch.equal(made.method._ask(made.teacher, of, 1)[0], made.teacher.net(of.view(1)).softmax(1))


class TestTemporalEnsembling:
    def method(self, slots: int = 64) -> TemporalEnsembling:
        return TemporalEnsembling(TemporalEnsemblingOptions(ensemble_slots=slots), MLP, build(MLP))

    def test_compares_a_row_with_the_average_of_its_past_answers(self):
        """Z <- .6 Z + .4 z, target Z / sum Z; no cost for a new row."""
        made, method = pair(), self.method()
        of = rows(keys_B=torch.arange(9))
        past = np.zeros((9, 3))
        for n in range(3):
            now = probs(made.student, of.x_B)
            target = past / past.sum(1, keepdims=True) if n else now
            costs = method.costs(made.student, made.teacher, of)
            method.settle(NO)

            assert costs.consistency.item() == pytest.approx(((now - target) ** 2).mean(), abs=1e-7)
            past = 0.6 * past + 0.4 * now
            with torch.no_grad():
                made.student.net.layers[-1].weight.add_(0.5)  # another answer next time
                made.student.net.layers[-1].bias.mul_(-2.0).add_(torch.tensor([0.3, -0.2, 0.1]))

    def test_a_slot_belongs_to_the_last_key_that_came(self):
        """Another sample's past is never a target; of rows that share a slot, the last wins."""
        made, method = pair(), self.method(slots=4)
        method.costs(made.student, made.teacher, rows(keys_B=torch.tensor([0, 4, 1, 2, 3, 8, 5, 6, 7])))
        method.settle(NO)

        kept = method.tensors()["keys_N"]

        assert kept.tolist() == [8, 5, 6, 7]
        unknown = method.costs(made.student, made.teacher, rows(keys_B=torch.arange(100, 109)))
        assert unknown.consistency.item() == 0.0

    def test_without_rows_to_compare_is_zero(self):
        """Mixed labelled rows alone."""
        made, method = pair(), self.method()
        of = rows(fresh=0, augment=Augment(no_noise, no_noise, mixup_beta=0.5), keys_B=torch.arange(3))

        costs = method.costs(made.student, made.teacher, of)
        method.settle(NO)

        assert costs.consistency.item() == 0.0
        assert (method.tensors()["keys_N"] == -1).all()

    def test_a_skipped_step_is_not_stored(self):
        """I4."""
        made, method = pair(), self.method()

        method.costs(made.student, made.teacher, rows(keys_B=torch.arange(9)))
        method.settle(YES)

        assert (method.tensors()["keys_N"] == -1).all()
        assert (method.tensors()["sums_NC"] == 0).all()


def embeddings(net: nn.Module, x_BF: Tensor) -> Tensor:
    """What the last layer of an `Mlp` takes."""
    taken = []
    hook = net.layers[-1].register_forward_hook(lambda _, given, __: taken.append(given[0]))
    net(x_BF)
    hook.remove()
    return taken[0]


class TestDSne:
    @pytest.mark.parametrize("seed", range(5))
    def test_loss_is_the_farthest_of_its_class_less_the_nearest_of_others(self, seed):
        """Computed pair by pair."""
        rng = np.random.default_rng(seed)
        anchors, others = rng.normal(size=(4, 2)), rng.normal(size=(9, 2))
        y, y_others = rng.integers(0, 3, 4), rng.integers(0, 3, 9)

        found = dsne_loss(
            torch.tensor(anchors), torch.tensor(y), torch.tensor(others), torch.tensor(y_others), margin=1.0
        )

        for a, label, loss in zip(anchors, y, found.tolist(), strict=True):
            squared = ((others - a) ** 2).sum(1)
            same, other = squared[y_others == label], squared[y_others != label]
            expected = max(0.0, same.max() - other.min() + 1.0) if len(same) and len(other) else 0.0
            assert loss == pytest.approx(expected, rel=1e-6)

    def test_an_anchor_without_partners_costs_nothing_and_has_a_finite_gradient(self):
        """No source row of its class, or none of another; no anchors at all."""
        anchors = torch.randn((2, 3), requires_grad=True)
        for y_others in (torch.tensor([1, 1]), torch.tensor([0, 0])):
            loss = dsne_loss(anchors, torch.tensor([0, 0]), torch.randn((2, 3)), y_others, margin=1.0).sum()
            loss.backward()
            assert loss.item() == 0.0
            assert torch.isfinite(anchors.grad).all()
        none = dsne_loss(
            anchors[:0], torch.zeros(0, dtype=torch.long), torch.randn((2, 3)), torch.tensor([0, 1]), margin=1.0
        )
        assert none.shape == (0,)

    def method(self, folder: Path, x: Tensor, of: Trainee) -> DSne:
        np.savez(folder / "source.npz", x=x.numpy(), y=np.arange(len(x)) % 3)
        options = DSneOptions(source_path=str(folder / "source.npz"), source_weight=0.25, source_rows=8)
        return DSne(options, MLP, of.student)

    def test_costs_are_those_of_both_domains(self, tmp_path):
        """(1 - w)(CE of source + CE of target) + w d-SNE + Mean Teacher's consistency on the target."""
        made, of, source = pair(), rows(), torch.randn((20, 5))
        method = self.method(tmp_path, source, made)
        of.generator.manual_seed(2)

        costs = method.costs(made.student, made.teacher, of)

        drawn = torch.randint(20, (8,), generator=torch.Generator().manual_seed(2))
        x_S, y_S = source[drawn], drawn % 3
        net = made.student.net
        e_S, e_L = embeddings(net, x_S), embeddings(net, of.x_B[6:])
        ce = nn.functional.cross_entropy(net(x_S), y_S)
        ce = ce + nn.functional.cross_entropy(net(of.x_B[6:]), of.labels_B[6:], reduction="sum") / 9
        apart = dsne_loss(e_L, of.labels_B[6:], e_S, y_S, margin=1.0).sum() / 9
        alone = MeanTeacher(MeanTeacherOptions(), MLP, made.student).costs(made.student, made.teacher, of)
        assert costs.classification.item() == pytest.approx((0.75 * ce).item(), rel=1e-4)
        assert costs.auxiliary.item() == pytest.approx((0.25 * apart).item(), rel=1e-4)
        assert costs.consistency.item() == pytest.approx(alone.consistency.item(), rel=1e-4)

    def test_running_statistics_are_those_of_the_target_domain(self, tmp_path):
        """The source's statistics serve its own rows and are not kept; both domains have gradients."""
        spec = replace(MLP, options={"hidden": [8], "dropout": 0.0, "norm": "batch"})
        of = rows()
        trainees = [make_trainee(spec, settings(), CPU) for _ in range(2)]
        dsne = self.method(tmp_path, 100.0 + torch.randn((20, 5)), trainees[0])

        costs = dsne.costs(trainees[0].student, trainees[0].teacher, of)
        plain = MeanTeacher(MeanTeacherOptions(), spec, trainees[1].student)
        plain.costs(trainees[1].student, trainees[1].teacher, of)
        (costs.classification + costs.consistency + costs.auxiliary).backward()

        kept, expected = (dict(trainee.student.net.named_buffers()) for trainee in trainees)
        assert kept
        for name, buffer in kept.items():
            assert torch.equal(buffer, expected[name]), name
        assert all(torch.isfinite(p.grad).all() for p in trainees[0].student.net.parameters())

    @pytest.mark.parametrize(
        ("arrays", "said"),
        [
            (None, "learn.options.source_path"),
            ({"x": np.zeros((4, 5))}, "expected an .npz with x and y"),
            ({"x": np.zeros((4, 6)), "y": np.zeros(4, int)}, "got float64 (4, 6)"),
            ({"x": np.zeros((4, 5)), "y": np.full(4, 3)}, "from 0 to 2"),
            ({"x": np.zeros((4, 5)), "y": np.zeros(4)}, "integers"),
        ],
    )
    def test_a_source_that_does_not_fit_is_a_config_error(self, tmp_path, arrays, said):
        """With the key, the file and what was found."""
        path = tmp_path / "source.npz"
        if arrays is not None:
            np.savez(path, **arrays)

        with pytest.raises(ConfigError) as raised:
            make_trainee(MLP, settings(method="dsne", source_path=str(path)), CPU)

        assert said in str(raised.value)


EVERY = [
    {"method": "mean_teacher", "align": "labels", "gate": "softmatch"},
    {"method": "mean_teacher", "optimizer": "adamw"},
    {"method": "ict", "align": "uniform", "gate": "freematch", "temperature": 0.5, "mixup_beta": 0.5},
    {"method": "ict", "contrast_weight": 0.3, "optimizer": "adamw"},
    {"method": "mean_teacher", "contrast_weight": 0.3, "mixup_beta": 0.2, "gate": "freematch", "align": "labels"},
    {"method": "mean_teacher", "teacher_mode": "train"},
    {"method": "pi"},
    {"method": "temporal_ensembling", "ensemble_slots": 32},
    {"method": "supervised", "mixup_beta": 0.5},
]


class TestInTheLearner:
    def learner(self, changed: dict[str, object]) -> Learner:
        options = {"noise": "table", "std": 0.1, "twin": "measure"} | changed
        if changed["method"] != "supervised":
            options = {"rampup_labels": 6} | options
        return Learner(MLP, settings(**options))

    def batch(self, step: int, *, nan: bool = False) -> MicroBatch:
        rng = np.random.default_rng(step)
        x = rng.normal(size=(12, 5)).astype(np.float32)
        if nan:
            x[0] = np.nan
        y = np.arange(4) % 3
        keys = np.concatenate((rng.permutation(20)[:8], np.arange(30, 34)))
        return MicroBatch(x[:8], 8, x[8:], y, 4, [f"{step}"], keys)

    @pytest.mark.parametrize("changed", EVERY, ids=lambda c: f"{c['method']}-{len(c)}")
    def test_a_restart_equals_no_restart(self, changed):
        """I3, also across a skipped step: no state of a method is lost or half-written."""
        without, with_one = self.learner(changed), self.learner(changed)
        for step in range(1, 5):
            for learner in (without, with_one):
                learner.learn(self.batch(step, nan=step == 3))
        again = self.learner(changed)
        again.load_state({name: array.copy() for name, array in with_one.state().items()})

        for step in range(5, 9):
            for learner in (without, again):
                learner.learn(self.batch(step))

        one, other = without.state(), again.state()
        assert one.keys() == other.keys()
        assert [name for name in one if not np.array_equal(one[name], other[name])] == []
        assert all(np.isfinite(array).all() for array in one.values())

    def test_state_of_another_method_is_dropped(self):
        """After a change of `learn.method`, learning continues from the weights."""
        first = self.learner(EVERY[2])
        first.learn(self.batch(1))
        for changed in EVERY:
            then = self.learner(changed | {"optimizer": "sgd"})
            then.load_state(first.state())
            then.learn(self.batch(2))
            assert math.isfinite(then.read_costs().classification)

    def test_the_weight_is_ramped_by_labels(self):
        """Six labels to the peak, one per step."""
        learner = self.learner({"method": "mean_teacher", "consistency_weight": 2.0})
        weights = []
        for step in range(1, 8):
            learner.learn(self.batch(step))
            weights.append(learner.read_costs().consistency_weight)

        assert weights[0] == pytest.approx(2.0 * math.exp(-5 * (1 - 1 / 6) ** 2))
        assert weights[-1] == 2.0
        assert weights == sorted(weights)

    def test_weight_fades_as_labels_come(self):
        """One new label per step, from the third on."""
        learner = self.learner({"method": "mean_teacher", "consistency_weight": 2.0, "rampup_labels": 1})
        fading = self.learner(
            {"method": "mean_teacher", "consistency_weight": 2.0, "rampup_labels": 1, "fade_labels": 2}
        )
        found = []
        for step in range(1, 5):
            for one in (learner, fading):
                one.learn(self.batch(step))
            found.append(fading.read_costs().consistency_weight / learner.read_costs().consistency_weight)

        assert found == pytest.approx([1.0, 1.0, 2 / 3, 2 / 4])

    def test_the_ramp_by_steps_starts_with_the_first_label(self):
        """The teacher cannot become good without labels."""
        options = {"method": "mean_teacher", "consistency_weight": 2.0, "rampup_labels": 1, "rampup_steps": 10}
        learner = self.learner(options)
        for step in range(1, 9):
            batch = self.batch(step)
            learner.learn(batch if step > 5 else replace(batch, labelled_count=0, trained_ids=[]))

        assert learner.read_costs().consistency_weight == pytest.approx(2.0 * math.exp(-5 * (1 - 3 / 10) ** 2))

    def test_before_the_first_label_there_is_no_consistency(self):
        """And earlier students are no part of the teacher or the twin."""
        learner = self.learner({"method": "mean_teacher", "consistency_weight": 2.0})
        weights = []
        for step in range(1, 9):
            batch = self.batch(step)
            learner.learn(batch if step > 5 else replace(batch, labelled_count=0, trained_ids=[]))
            weights.append(learner.read_costs().consistency_weight)

        assert weights[:5] == [0.0] * 5
        assert min(weights[5:]) > 0.0
        state = learner.state()
        assert (state["learner.averaged_at"], state["learner.updates"]) == (5, 8)


class _Net(nn.Module):
    """Does not run its last layer, or runs it in parts; in training another number of times."""

    def __init__(self, classes: int, *, runs: int, in_training: int | None = None) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(5, 4), nn.Linear(4, classes)
        self.of_mode = {False: runs, True: runs if in_training is None else in_training}

    @property
    def runs(self) -> int:
        return self.of_mode[self.training]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        if not self.runs:
            return hidden @ self.last.weight.T
        return torch.cat([self.last(part) for part in hidden.chunk(self.runs)])


class TestEmbedding:
    """For methods that need one: errors when they are built."""

    @pytest.mark.parametrize(
        ("net", "said"),
        [
            (nn.Sequential(nn.Linear(5, 6)), "ends with a linear layer of 3 outputs, and Sequential has none"),
            (_Net(3, runs=0), "_Net does not run last once for all rows"),
            (_Net(3, runs=2), "_Net does not run last once for all rows"),
            (_Net(3, runs=1, in_training=2), "_Net does not run last once for all rows"),
        ],
    )
    def test_a_network_without_one_is_a_config_error(self, net: nn.Module, said: str):
        student = Classifier(net, normalise=nn.Identity(), scale=1.0)

        with pytest.raises(ConfigError, match=said):
            Embedding(student, MLP, needed_by="learn.method: dsne")

    def test_trying_it_changes_no_buffer(self):
        student = build(replace(MLP, options={"hidden": [8], "norm": "batch"}))
        before = {name: buffer.clone() for name, buffer in student.named_buffers()}

        Embedding(student, MLP, needed_by="learn.method: dsne")

        assert before
        assert all(torch.equal(before[name], buffer) for name, buffer in student.named_buffers())

    def test_it_is_what_the_last_layer_takes_in_either_network(self):
        made, x_BF = pair(), torch.randn((4, 5))

        embedding = Embedding(made.student, MLP, needed_by="learn.method: dsne")

        assert embedding.width == 8
        for network in (made.student, made.teacher):
            logits_BC, embedded_BD = embedding.read(network.net, lambda of=network: of.net(x_BF))
            assert torch.equal(embedded_BD, embeddings(network.net, x_BF))
            assert torch.equal(logits_BC, network.net(x_BF))


class TestContrast:
    """Of `ict` and `mean_teacher`: mixed rows are recognised by their embeddings."""

    @pytest.mark.parametrize("method", ["ict", "mean_teacher"])
    @pytest.mark.parametrize("labels", [0, 20, 180])
    def test_each_mix_is_told_from_the_others(self, labels: int, method: str):
        """Pair by pair: the identity at first, then the probability that both are of one class. Other costs stay."""
        made, of = pair(method=method, contrast_weight=0.7), rows(labels_so_far=labels)
        plain, same = pair(method=method), rows()
        for rows_of in (of, same):
            rows_of.generator.manual_seed(5)

        costs = made.method.costs(made.student, made.teacher, of)
        without = plain.method.costs(plain.student, plain.teacher, same)

        share, partner = (array.double().numpy() for array in draw_mix(6, 0.5, torch.Generator().manual_seed(5)))
        u, partner = of.x_B[:6].double().numpy(), partner.astype(int)
        mixed = torch.from_numpy(share[:, None] * u + (1 - share[:, None]) * u[partner]).float()
        z, k = (
            self.projected(made, embeddings(network.net, x))
            for network, x in ((made.student, mixed), (made.teacher, of.x_B[:6]))
        )
        p, w = probs(made.teacher, of.x_B[:6]), labels / (labels + 20)
        alike = (1 - w) * np.eye(6) + w * np.array(
            [[p[a] @ p[b] / (p @ p[a]).sum() for b in range(6)] for a in range(6)]
        )
        expected = 0.0
        for i in range(6):
            scores = np.exp(k @ z[i] / 0.5)
            target = share[i] * alike[i] + (1 - share[i]) * alike[partner[i]]
            expected -= (target * np.log(scores / scores.sum())).sum() / 6
        assert costs.auxiliary.item() == pytest.approx(0.7 * expected, rel=1e-4)
        assert costs.classification.item() == pytest.approx(without.classification.item(), rel=1e-5)
        assert costs.consistency.item() == pytest.approx(without.consistency.item(), rel=1e-5)

    def projected(self, made: Trainee, embedded_BD: Tensor) -> np.ndarray:
        weights = {name: value.detach().double().numpy() for name, value in made.method.parameters().items()}
        hidden = np.maximum(
            embedded_BD.detach().double().numpy() @ weights["projector_0_weight"].T + weights["projector_0_bias"], 0
        )
        out = hidden @ weights["projector_2_weight"].T + weights["projector_2_bias"]
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    def test_it_teaches_the_student_and_the_projector_but_not_the_teacher(self):
        made = pair(method="ict", contrast_weight=0.7)
        optimised = {id(p) for group in made.optimizer.param_groups for p in group["params"]}

        made.method.costs(made.student, made.teacher, rows(labelled=0)).auxiliary.backward()

        learned = [*made.method.parameters().values(), made.student.net.layers[1].weight]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)
        assert all(p.grad is None for p in made.teacher.parameters())
        assert {id(p) for p in learned} <= optimised

    def test_it_is_read_apart_from_the_cost_of_labels(self):
        """The mean over steps."""
        read = {}
        for weight in (0.0, 0.3, 0.6):
            learner = Learner(MLP, settings(method="ict", contrast_weight=weight, learning_rate=1e-9))
            rng = np.random.default_rng(0)
            x, y = rng.normal(size=(12, 5)).astype(np.float32), np.arange(4) % 3
            for step in range(3):
                learner.learn(MicroBatch(x[:8], 8, x[8:], y, 4, [f"{step}"], None))
            read[weight] = learner.read_costs()

        assert read[0.0].auxiliary == 0.0
        assert read[0.6].auxiliary == pytest.approx(2 * read[0.3].auxiliary, rel=1e-3)
        assert read[0.6].classification == pytest.approx(read[0.0].classification, rel=1e-3)

    @pytest.mark.parametrize("method", ["ict", "mean_teacher"])
    def test_of_a_large_micro_batch_a_block_is_compared(self, method: str, monkeypatch):
        """The cost grows with the square of the rows, and a learner that is behind takes thousands at once."""
        made, seen, cost = pair(method=method, contrast_weight=0.7), [], Contrast.cost

        def keep(of: Contrast, *given: object, labels: int) -> Tensor:
            seen.append(given)
            return cost(of, *given, labels=labels)

        monkeypatch.setattr(Contrast, "cost", keep)

        costs = made.method.costs(made.student, made.teacher, rows(fresh=600))

        ((*values, mix),) = seen
        assert {len(value) for value in (*values, *mix)} == {256}
        assert sorted(mix.partner_B.tolist()) == list(range(256))
        assert torch.isfinite(costs.auxiliary)

    def test_it_learns_before_the_first_label(self):
        """Consistency does not."""
        changed = {}
        for weight in (0.0, 0.3):
            learner = Learner(MLP, settings(method="ict", contrast_weight=weight, rampup_labels=5, weight_decay=0.0))
            before = learner.state()
            learner.learn(
                MicroBatch(np.eye(5, dtype=np.float32), 5, np.zeros((0, 5), np.float32), np.zeros(0), 0, [], None)
            )
            changed[weight] = not np.array_equal(
                before["student.net.layers.1.weight"], learner.state()["student.net.layers.1.weight"]
            )

        assert changed == {0.0: False, 0.3: True}

    def test_labels_are_counted_when_they_are_learned_first(self, monkeypatch):
        learner, counted = Learner(MLP, settings(method="ict", contrast_weight=0.3)), []
        costs_of = learner.trainee.method.costs
        monkeypatch.setattr(
            learner.trainee.method,
            "costs",
            lambda student, teacher, of: (counted.append(of.labels_so_far), costs_of(student, teacher, of))[1],
        )
        x, y = np.eye(5, dtype=np.float32), np.arange(2)

        for new in ([], ["a", "b"], [], ["c"]):
            learner.learn(MicroBatch(x[:3], 3, x[3:], y, 2, new, None))

        assert counted == [0, 2, 2, 3]

    @pytest.mark.parametrize("method", ["ict", "mean_teacher"])
    @pytest.mark.parametrize("fresh", [0, 1])
    def test_a_row_alone_is_not_compared(self, fresh: int, method: str):
        made = pair(method=method, contrast_weight=0.7)

        costs = made.method.costs(made.student, made.teacher, rows(fresh=fresh))

        assert costs.auxiliary.item() == 0.0

    def test_a_network_without_embedding_learns_without_it(self):
        """By a recipe: a line in the log. If it was set: an error."""
        student = Classifier(_Net(3, runs=0), normalise=nn.Identity(), scale=1.0)
        of_recipe = InterpolationOptions(contrast_weight=0.3)
        unset(of_recipe, ["contrast_weight"])

        with capture_logs() as logs:
            method = make_ict(of_recipe, MLP, student)

        assert type(method) is InterpolationConsistency
        assert type(make_mean_teacher(MeanTeacherOptions(), MLP, student)) is MeanTeacher
        assert [(log["event"], log["log_level"]) for log in logs] == [("network_without_contrast", "warning")]
        with pytest.raises(ConfigError, match="contrast_weight needs a network that ends with a linear layer"):
            make_ict(InterpolationOptions(contrast_weight=0.3), MLP, student)


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)
