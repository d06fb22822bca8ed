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

Alignment to labels. A witness that no aligned target has influenced (`Rows.witness_BC`: the twin, else the teacher)
predicts p for all samples and s for labelled ones before they are learned; y are the labels. All are sums over classes.
The ratio estimate (Cochran, Sampling Techniques, 1977, chapter 6) of the class distribution is

    r ~ p (y + k) / (s + k)

It is shrunk towards the uniform distribution e by as much as it could differ from it by chance (positive-part James and
Stein, 1961), and less so for classes with many labels:

    a ~ w_c r_c + (1 - w_c) e_c      w_c = w n_c / (n_c + h)      w = max(0, 1 - max(1, R/2) V / D)

D = |r - e|^2, and V is what D would be for uniform classes: the sum over classes of (p / (s + k))^2 (v + k), with v the
squared errors of s. n_c counts the labels of class c so far: about a class without labels the witness knows nothing.
R measures selection bias: the mean over classes of z^2, where z is the deviation of the mean log p of labelled samples
from that of fresh ones, in standard errors. It is about 1 if labelled samples are drawn as all are.

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

from streamlearn.learn.losses import DISTANCES
from streamlearn.learn.methods.settings import TargetOptions, TeacherOptions
from streamlearn.learn.rows import Rows, one_hot
from streamlearn.learn.step import Method, answer_apart
from streamlearn.models.build import Classifier, ModelSpec

_SOFTMATCH_N = 2.0
_LEAST_SHARE = 1e-4
"""Lower bound of a class's share: a class that was never predicted would get a huge weight."""
_PRIOR_LABELS = 1.0
"""k: a prior of this many labels per class, all predicted correctly by the witness."""
_HALF_KNOWN_LABELS = 5.0
"""h: number of labels of a class at which its estimated share has half its weight."""
_USUAL_SELECTION = 2.0
"""R up to here is no sign of selection bias."""
_LEAST_PROBABILITY = 1e-6
"""Lower bound of probabilities in a logarithm: one prediction must not outweigh all others."""
_ENOUGH_ROWS = 16
"""With this many fresh rows, their mean log p needs no rows of earlier steps, which came from an older network."""
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
            sums = ("label_counts_C", "said_counts_C", "squared_errors_C", "deviations_C", "labels_so_far_C")
            self._kept |= {name: torch.zeros_like(uniform) for name in sums}
            self._kept["squared_weights"] = torch.zeros((), device=device)
            self._kept["witness_C"] = uniform.clone()
            self._kept |= {"log_mean_C": uniform.log(), "log_variance_C": torch.ones_like(uniform)}
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
        q_BC = q_BC * (aligned_C / model_C.clamp_min(_LEAST_SHARE))
        return q_BC / q_BC.sum(dim=1, keepdim=True)

    def _estimate_classes(self, rows: Rows) -> Tensor:
        if rows.witness_BC is not None:
            fresh_FC, new_NC = rows.witness_BC[: rows.fresh_count], rows.witness_BC[rows.fresh_count :]
            if len(fresh_FC):
                self._moved("witness_C", fresh_FC.mean(dim=0))
                log_FC = fresh_FC.clamp_min(_LEAST_PROBABILITY).log()
                kept = max(0.0, 1.0 - len(log_FC) / _ENOUGH_ROWS)
                mean_C = torch.lerp(log_FC.mean(dim=0), self._kept["log_mean_C"], kept)
                self._next["log_mean_C"] = mean_C
                self._moved("log_variance_C", (log_FC - mean_C).square().mean(dim=0))
            if len(new_NC):
                self._count_labels(new_NC, rows.labels_B[rows.fresh_count :][: len(new_NC)])
        labels_C, said_C, errors_C = (self._now(f"{of}_C") for of in ("label_counts", "said_counts", "squared_errors"))
        even_C, k = rows.uniform_C, _PRIOR_LABELS
        named_C = even_C > 0
        share_C = self._now("witness_C").clamp_min(_LEAST_SHARE) / (said_C + k) * named_C
        ratio_C = share_C * (labels_C + k)
        total = ratio_C.sum()
        spread = (ratio_C / total - even_C).square().sum()
        by_chance = (share_C / total).square() @ (errors_C + k)
        weights = self._now("squared_weights").clamp_min(1.0)
        selection = (self._now("deviations_C").square() * named_C).sum() / named_C.sum() / weights
        by_chance = by_chance * (selection / _USUAL_SELECTION).clamp_min(1.0)
        trust = (1.0 - by_chance / spread.clamp_min(1e-12)).clamp_min(0.0)
        so_far_C = self._now("labels_so_far_C")
        aligned_C = torch.lerp(even_C, ratio_C / total, trust * so_far_C / (so_far_C + _HALF_KNOWN_LABELS))
        return aligned_C / aligned_C.sum()

    def _count_labels(self, new_NC: Tensor, labels_N: Tensor) -> None:
        """Add predictions and labels of new labelled rows to the sums, in which older ones fade."""
        fading = _LABEL_FADING ** len(labels_N)
        one_hot_NC = one_hot(labels_N, new_NC.shape[1])
        deviations_NC = new_NC.clamp_min(_LEAST_PROBABILITY).log() - self._now("log_mean_C")
        scale_C = self._now("log_variance_C").sqrt().clamp_min(_LEAST_PROBABILITY)
        for name, value, fade in (
            ("label_counts_C", one_hot_NC.sum(dim=0), fading),
            ("labels_so_far_C", one_hot_NC.sum(dim=0), 1.0),
            ("said_counts_C", new_NC.sum(dim=0), fading),
            ("deviations_C", deviations_NC.sum(dim=0) / scale_C, fading),
            ("squared_errors_C", (one_hot_NC - new_NC).square().sum(dim=0), fading**2),
            ("squared_weights", torch.full_like(self._kept["squared_weights"], len(labels_N)), fading**2),
        ):
            self._next[name] = self._kept[name] * fade + value

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

    def _now(self, name: str) -> Tensor:
        """An average after this step."""
        return self._next.get(name, self._kept[name])

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
            logits_BC = teacher.net(view_B)
        else:
            logits_BC = answer_apart(teacher, view_B)
            teacher.eval()
        return self.make_targets(logits_BC, rows)
