"""Targets of the consistency cost: a network's probabilities, aligned, weighted row by row, and sharpened.

In this order:

    align    q ~ p * a / p(teacher): classes that the teacher predicts too often count for less (distribution alignment
             of ReMixMatch, Berthelot et al., 2020; with moving averages as in SoftMatch), where a is
             uniform    1 / C
             labels     the class distribution of all samples, as estimated from labels; formulas below
    gate     a weight for each row, by its confidence max q:
             fixed      1 above the threshold, else 0 (FixMatch, Sohn et al., 2020)
             freematch  1 above tau * p_c / max p, for the row's class c; tau and p are moving averages of confidence
                        and of q (FreeMatch, Wang et al., 2023, without its fairness term)
             softmatch  exp(-(max q - mu)^2 n^2 / (2 var)) below mu, 1 above it; mu and var are moving averages of
                        confidence, n = 2 (SoftMatch, Chen et al., 2023)
    sharpen  q ~ q^(1/T)

Alignment to labels. The estimate r and its weight w are those of `learn/class_shares.py`, where the witness is a
network that no aligned target has influenced (`Rows.witness_BC`: the twin, else the teacher) and the reference is the
uniform distribution e. Classes with many labels are shrunk less:

    a ~ w_c r_c + (1 - w_c) e_c      w_c = w n_c / (n_c + h)

n_c counts the labels of class c so far: about a class without labels the witness knows nothing.

All state is moving averages over fresh rows, of the size of a class histogram. It is part of the checkpoint, and a
skipped step leaves it unchanged.

The papers' teachers answer in train mode, ours in eval mode with averaged batch statistics. So the target is the
network that is served, one row is enough for it, and the statistics of a correlated batch do not enter it. Dropout is
then noise of the student alone. With `teacher_mode = "train"` it is as in the papers: the teacher's dropout is on, its
batch statistics are those of the rows it is asked about, and it keeps none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamlearn.learn import class_shares
from streamlearn.learn.losses import DISTANCES
from streamlearn.learn.methods.settings import TargetOptions, TeacherOptions
from streamlearn.learn.rows import Rows
from streamlearn.learn.step import Method, answer_apart
from streamlearn.models.build import Classifier, ModelSpec

_SOFTMATCH_N = 2.0
_HALF_KNOWN_LABELS = 5.0
"""h: number of labels of a class at which its estimated share has half its weight."""
_LABEL_FADING = 0.99
"""Decay of the class counts per new label: a horizon of 100 labels."""


class TargetMethod(Method):
    """A method that compares the student with targets. It makes them from logits, and keeps the moving averages."""

    def __init__(self, options: TargetOptions, spec: ModelSpec, student: Classifier) -> None:
        self._options, self._distance = options, DISTANCES[options.consistency]
        align, gate, classes, device = options.align, options.gate, spec.classes, student.device
        uniform = torch.full((classes,), 1.0 / classes, device=device)
        self._kept: dict[str, Tensor] = {}
        if align != "none":
            self._kept["model_C"] = uniform.clone()
        if align == "labels":
            self._kept |= class_shares.no_labels(uniform)
            self._kept["witness_C"] = uniform.clone()
        if gate == "freematch":
            self._kept["gated_C"] = uniform.clone()
        if gate in {"freematch", "softmatch"}:
            self._kept["confidence"] = torch.tensor(1.0 / classes, device=device)
        if gate == "softmatch":
            self._kept["variance"] = torch.ones((), device=device)
        self._at_first = {name: tensor.clone() for name, tensor in self._kept.items()}
        self._next: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Reset the averages: they came from a teacher that is gone."""
        for name, tensor in self._kept.items():
            tensor.copy_(self._at_first[name])

    def make_targets(self, logits_BC: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Targets (B, C) and weights (B,) of their rows, None if all are 1.

        For all rows of the step or for its first ones; fresh rows come first.
        """
        q_BC = logits_BC.softmax(dim=1)
        self._next = {}
        if self._options.align != "none":
            q_BC = self._aligned(q_BC, rows)
        weights_B = None if self._options.gate == "none" else self._weights(q_BC.detach(), rows.fresh_count)
        if self._options.temperature != 1.0:
            q_BC = q_BC.pow(1.0 / self._options.temperature)
            q_BC = q_BC / q_BC.sum(dim=1, keepdim=True)
        return q_BC, weights_B

    @torch.no_grad()
    def settle(self, skipped: Tensor) -> None:
        """Store the averages of the last step unless it was `skipped`, a 0-d bool on the device."""
        for name, value in self._next.items():
            kept = self._kept[name]
            kept.copy_(torch.where(skipped, kept, value))
        self._next = {}

    def tensors(self) -> dict[str, Tensor]:
        """The averages as live tensors, by name."""
        return self._kept

    def _aligned(self, q_BC: Tensor, rows: Rows) -> Tensor:
        fresh = rows.fresh_count
        model_C = self._moved("model_C", q_BC[:fresh].detach().mean(dim=0) if fresh else None)
        aligned_C = rows.uniform_C if self._options.align == "uniform" else self._estimate_classes(rows)
        q_BC = q_BC * (aligned_C / model_C.clamp_min(class_shares.LEAST_SHARE))
        return q_BC / q_BC.sum(dim=1, keepdim=True)

    def _estimate_classes(self, rows: Rows) -> Tensor:
        if rows.witness_BC is not None:
            fresh_FC, new_NC = rows.witness_BC[: rows.fresh_count], rows.witness_BC[rows.fresh_count :]
            if len(fresh_FC):
                self._moved("witness_C", fresh_FC.mean(dim=0))
                self._next |= class_shares.with_fresh(self._kept, fresh_FC, self._options.target_momentum)
            if len(new_NC):
                labels_N = rows.labels_B[rows.fresh_count :][: len(new_NC)]
                self._next |= class_shares.with_labels(self._kept | self._next, new_NC, labels_N, _LABEL_FADING)
        now, even_C = self._kept | self._next, rows.uniform_C
        estimated_C, weight = class_shares.estimate(now, now["witness_C"], even_C, even_C > 0)
        so_far_C = now["labels_so_far_C"]
        aligned_C = torch.lerp(even_C, estimated_C, weight * so_far_C / (so_far_C + _HALF_KNOWN_LABELS))
        return aligned_C / aligned_C.sum()

    def _weights(self, q_BC: Tensor, fresh: int) -> Tensor:
        confidence_B, class_B = q_BC.max(dim=1)
        if self._options.gate == "fixed":
            return (confidence_B >= self._options.gate_threshold).to(q_BC.dtype)
        seen_F = confidence_B[:fresh]
        mean = self._moved("confidence", seen_F.mean() if fresh else None)
        if self._options.gate == "freematch":
            share_C = self._moved("gated_C", q_BC[:fresh].mean(dim=0) if fresh else None)
            return (confidence_B >= mean * (share_C / share_C.max())[class_B]).to(q_BC.dtype)
        variance = self._moved("variance", seen_F.var(unbiased=fresh > 1) if fresh else None)
        below_B = (confidence_B - mean).clamp_max(0.0)
        return torch.exp(-(below_B**2) * _SOFTMATCH_N**2 / (2.0 * variance.clamp_min(1e-12)))

    def _moved(self, name: str, towards: Tensor | None) -> Tensor:
        """Move an average; without a new value it stays."""
        kept = self._kept[name]
        if towards is None:
            return kept
        self._next[name] = torch.lerp(towards, kept, self._options.target_momentum)
        return self._next[name]


class TeacherMethod(TargetMethod):
    """A method that makes its targets from the teacher's answers."""

    def __init__(self, options: TeacherOptions, spec: ModelSpec, student: Classifier) -> None:
        super().__init__(options, spec, student)
        self._teacher_mode = options.teacher_mode

    @torch.no_grad()
    def _ask(self, teacher: Classifier, rows: Rows, count: int) -> tuple[Tensor, Tensor | None]:
        """Targets (count, C) from the teacher's answers to weak views of the first rows; weights (count,) of a gate."""
        view_B = rows.view(count)
        if self._teacher_mode == "eval":
            logits_BC = teacher.logits(view_B)
        else:
            logits_BC = answer_apart(teacher, view_B)
            teacher.eval()
        return self.make_targets(logits_BC, rows)
