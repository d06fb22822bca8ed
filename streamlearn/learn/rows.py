"""The rows of a step on the device, and the views that the networks see.

Letters: B rows of a step, F of them fresh, then L labelled ones; C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from streamlearn.learn.noise.build import Noise

MIX_BLOCK = 256
"""Number of rows, in their order, that are partners of each other."""


@dataclass(frozen=True, slots=True)
class Augment:
    """How views are made; the same for student and twin, so that their comparison is fair."""

    weak: Noise
    """For the teacher, and for labelled rows."""
    strong: Noise
    """For the student on fresh rows; `weak` itself if there is no stronger one."""
    mixup_beta: float = 0.0
    """Labelled rows are mixed with shares from Beta(b, b). 0: not at all."""
    is_code_W: Tensor | None = None
    """Places of a row that are codes of categories; None if there are none."""


class Mix(NamedTuple):
    """For each row, the row that is mixed into it, and the share of its own."""

    share_B: Tensor
    partner_B: Tensor

    def first_block(self) -> Mix:
        """Of the first rows, which are partners of each other."""
        return Mix(self.share_B[:MIX_BLOCK], self.partner_B[:MIX_BLOCK])

    def of(self, values_B: Tensor) -> Tensor:
        """The mixed values, share * v + (1 - share) * v[partner], for each row (mixup: Zhang et al., 2018)."""
        share = self.share_B.view(-1, *(1 for _ in values_B.shape[1:]))
        # Along dimension 0, so that a channels-last batch keeps its layout.
        return torch.lerp(values_B.index_select(0, self.partner_B), values_B, share)


def draw_mix(count: int, beta: float, generator: Generator) -> Mix:
    """Shares from Beta(beta, beta), as a ratio of two Gammas, and partners by a random permutation of each block."""
    # torch.distributions takes no generator, and a step's randomness must be a function of (seed, step).
    gammas_2B = torch._standard_gamma(  # noqa: SLF001
        torch.full((2, count), beta, device=generator.device), generator=generator
    ).clamp_min(1e-30)  # small betas give exact zeros, and 0/0 is NaN
    partner_B = torch.randperm(min(count, MIX_BLOCK), generator=generator, device=generator.device)
    for first in range(MIX_BLOCK, count, MIX_BLOCK):
        block = torch.randperm(min(count - first, MIX_BLOCK), generator=generator, device=generator.device)
        partner_B = torch.cat((partner_B, first + block))
    return Mix(gammas_2B[0] / gammas_2B.sum(0), partner_B)


def one_hot(labels_L: Tensor, classes: int) -> Tensor:
    """(L, C) in float32. Torch's own checks the values first, which makes the host wait on some devices."""
    return (labels_L[:, None] == torch.arange(classes, device=labels_L.device)).to(torch.float32)


class StudentView(NamedTuple):
    """What the student sees in one forward: fresh rows first, then the labelled."""

    x_B: Tensor
    targets_LC: Tensor
    """What labels say of the labelled rows: probabilities, times the weights of their classes."""
    compared: int
    """How many of the first rows can be compared with a teacher: all, or the fresh ones if labelled rows are mixed."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The valid rows of a micro-batch on the device, without padding: fresh ones first, then the labelled."""

    x_B: Tensor
    """(B, *shape), prepared: float, scaled, normalised, clean."""
    labels_B: Tensor
    """UNLABELLED for fresh rows."""
    labelled_count: int
    augment: Augment
    generator: Generator
    uniform_C: Tensor
    """1/n for each of the n named classes, 0 for spare ones."""
    weights_C: Tensor | None = None
    """Weights of classes in the classification cost; 0 for all: balanced by the rows of the step. None: all are 1."""
    witness_BC: Tensor | None = None
    """Probabilities of the first rows by the twin, or else by the teacher: all fresh rows, and the labelled rows that
    are learned for the first time. None if there are none, or if targets do not need them."""
    labels_so_far: int = 0
    """Labels that were learned for the first time, in this step too."""
    keys_B: Tensor | None = None
    """int64, a key per sample; None unless the method needs them."""

    @property
    def fresh_count(self) -> int:
        """F."""
        return len(self.x_B) - self.labelled_count

    def view(self, count: int | None = None) -> Tensor:
        """The first `count` rows, or all, under new weak noise: eta on one call, eta' on the next."""
        return self.augment.weak(self.x_B[:count], self.generator)

    def strong_view(self) -> Tensor:
        """Fresh rows under strong noise."""
        return self.augment.strong(self.x_B[: self.fresh_count], self.generator)

    def labelled_view(self) -> tuple[Tensor, Tensor]:
        """The labelled rows alone, under weak noise and mixed: x (L, *shape), targets (L, C)."""
        view_L = self.augment.weak(self.x_B[self.fresh_count :], self.generator)
        return self._label(view_L)

    def student_view(self) -> StudentView:
        """All rows in one batch: labelled ones under weak noise and mixed, fresh ones under strong noise."""
        augment, fresh = self.augment, self.fresh_count
        if augment.strong is augment.weak and not augment.mixup_beta:
            view_B = self.view()
            _, targets_LC = self._label(view_B[fresh:])
            return StudentView(view_B, targets_LC, len(view_B))
        labelled_L, targets_LC = self.labelled_view()
        view_B = torch.cat((self.strong_view(), labelled_L))
        return StudentView(view_B, targets_LC, fresh if augment.mixup_beta else len(view_B))

    def mixed(self, view_B: Tensor, mix: Mix) -> Tensor:
        """Views of samples, mixed. A code is the row's own with probability `share`, else its partner's.

        A code between two others has no meaning.
        """
        mixed_B, is_code_W = mix.of(view_B), self.augment.is_code_W
        if is_code_W is None:
            return mixed_B
        drawn_BW = torch.rand(view_B.shape, generator=self.generator, device=view_B.device)
        is_own_BW = drawn_BW < mix.share_B[:, None]
        codes_BW = torch.where(is_own_BW, view_B, view_B.index_select(0, mix.partner_B))
        return torch.where(is_code_W, codes_BW, mixed_B)

    def _label(self, view_L: Tensor) -> tuple[Tensor, Tensor]:
        augment, count = self.augment, len(view_L)
        targets_LC = one_hot(self.labels_B[self.fresh_count :], len(self.uniform_C))
        if augment.mixup_beta and count:
            mix = draw_mix(count, augment.mixup_beta, self.generator)
            view_L, targets_LC = self.mixed(view_L, mix), mix.of(targets_LC)
        if self.weights_C is not None and count:
            targets_LC = _weighted(targets_LC, self.weights_C)
        return view_L, targets_LC


def _weighted(targets_LC: Tensor, weights_C: Tensor) -> Tensor:
    """Targets times class weights, with a mean weight of 1, so that the learning rate keeps its meaning.

    The cost is linear in the targets, so this is sum_l w_l CE_l, the weighted likelihood of King and Zeng (2001,
    section 4.2), with w_c / (mean of w over the rows). Balanced is w_c = L / (K n_c), where n_c of the L rows are of
    one of K classes.
    """
    counts_C = targets_LC.sum(dim=0)
    balanced_C = torch.where(counts_C > 0, 1.0 / counts_C, 0.0)
    weighted_LC = targets_LC * torch.where(weights_C.any(), weights_C, balanced_C)
    return weighted_LC * (len(targets_LC) / weighted_LC.sum())
