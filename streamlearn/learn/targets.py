"""What the student is held against: a teacher's probabilities, aligned, sharpened, and weighted row by row.

In this order:

    align    q ~ p * wanted / p(teacher): the classes that the teacher says too often count for less (distribution
             alignment of ReMixMatch, Berthelot et al., 2020; with moving averages as in SoftMatch)
             uniform    wanted is even
             labels     wanted ~ w_c r_c + (1 - w_c) even: classes as they are in all samples, so far as labels say it.
                        A witness that no aligned target has pulled (`Rows.said_BC`) says of all samples p, of the
                        labelled ones before it learns them s, and the labels themselves y, all sums over classes:
                        r ~ p (y + k)/(s + k), the ratio estimate (Cochran, Sampling Techniques, 1977, chapter 6).
                        w = max(0, 1 - max(1, R/2) V / D) shrinks it to even classes by as much as it could be
                        uneven by chance (positive-part James and Stein, 1961): D = |r - even|^2, and V is what D
                        would be of even classes, the sum over classes of (p / (s + k))^2 (e + k), e the squared
                        errors of s. R is how far the labelled samples are from being drawn as all are, about 1 if
                        they are, and few beside the fresh ones: the mean over classes of z^2, z the deviation of their
                        mean log p from that of fresh ones in standard errors. Whoever labels one class more often than
                        others so says little of how common it is.
                        w_c = w n_c / (n_c + h), of n_c labels that came so far: of a class that nobody has shown yet,
                        a network says nothing, however common it is
    gate     a weight for each row, by the confidence max q:
             fixed      1 where it is above the threshold, else 0 (FixMatch, Sohn et al., 2020)
             freematch  1 where it is above tau * p_c / max p, for the row's class c; tau and p are moving averages of
                        confidence and of q (FreeMatch, Wang et al., 2023, without its fairness term)
             softmatch  exp(-(max q - mu)^2 n^2 / (2 var)) below mu, 1 above it; mu and var are moving averages of
                        confidence, n = 2 (SoftMatch, Chen et al., 2023)
    sharpen  q ~ q^(1/T)

All that is remembered is moving averages over the fresh rows, of the size of a class histogram: it suits a stream. They
are part of the checkpoint, and a step that is skipped leaves them as they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamlearn.learn.methods.settings import TargetOptions
from streamlearn.learn.rows import Rows, one_hot

_SOFTMATCH_N = 2.0
_LEAST_SHARE = 1e-4
"""No class is taken to be said more rarely, or one that a network has not said yet would weigh thousands."""
_PRIOR_LABELS = 1.0
"""k: labels of each class that are taken to have come before the first, and that the witness was right about."""
_HALF_KNOWN_LABELS = 5.0
"""h: labels of a class with which it is half believed to be as rare, or as common, as they say."""
_USUAL_SELECTION = 2.0
"""R that is no sign yet of labels that are drawn otherwise than samples."""
_LEAST_SAID = 1e-6
"""No probability is taken for smaller than this in its logarithm: one answer would outweigh all others."""
_ENOUGH_ROWS = 16
"""Fresh rows whose mean log p needs no rows of earlier steps; those are of a network that knew less."""
_LABEL_FADING = 0.99
"""Of the class counts of labels, for each new label: a horizon of a hundred of them."""


class Targets:
    """Makes targets from logits, and keeps the moving averages that this takes."""

    def __init__(self, options: TargetOptions, *, classes: int, device: torch.device) -> None:
        self._options = options
        align, gate = options.align, options.gate
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
        """Begin anew: what was seen is of a teacher that is gone."""
        for name, tensor in self._kept.items():
            tensor.copy_(self._at_first[name])

    def make(self, teacher_logits_BC: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Targets (B, C) and the weights (B,) of their rows, None where all weigh 1.

        Of all rows of the step or of its first ones only; fresh rows stand first.
        """
        q_BC = teacher_logits_BC.softmax(dim=1)
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
        """The averages are what the last step made of them, unless it was `skipped`, a 0-d bool on the device."""
        for name, value in self._next.items():
            kept = self._kept[name]
            kept.copy_(torch.where(skipped, kept, value))
        self._next = {}

    def tensors(self) -> dict[str, Tensor]:
        """The live averages, by name."""
        return self._kept

    def _aligned(self, q_BC: Tensor, rows: Rows) -> Tensor:
        fresh = rows.fresh_count
        model_C = self._moved("model_C", q_BC[:fresh].detach().mean(dim=0) if fresh else None)
        wanted_C = rows.uniform_C if self._options.align == "uniform" else self._classes_of_all(rows)
        q_BC = q_BC * (wanted_C / model_C.clamp_min(_LEAST_SHARE))
        return q_BC / q_BC.sum(dim=1, keepdim=True)

    def _classes_of_all(self, rows: Rows) -> Tensor:
        if rows.said_BC is not None:
            said_FC, said_NC = rows.said_BC[: rows.fresh_count], rows.said_BC[rows.fresh_count :]
            if len(said_FC):
                self._moved("witness_C", said_FC.mean(dim=0))
                log_FC = said_FC.clamp_min(_LEAST_SAID).log()
                kept = max(0.0, 1.0 - len(log_FC) / _ENOUGH_ROWS)
                mean_C = torch.lerp(log_FC.mean(dim=0), self._kept["log_mean_C"], kept)
                self._next["log_mean_C"] = mean_C
                self._moved("log_variance_C", (log_FC - mean_C).square().mean(dim=0))
            if len(said_NC):
                self._count_labels(said_NC, rows.labels_B[rows.fresh_count :][: len(said_NC)])
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
        wanted_C = torch.lerp(even_C, ratio_C / total, trust * so_far_C / (so_far_C + _HALF_KNOWN_LABELS))
        return wanted_C / wanted_C.sum()

    def _count_labels(self, said_NC: Tensor, labels_N: Tensor) -> None:
        """Add what was said of new labelled rows, and what they are, to the sums, in which older ones fade."""
        fading = _LABEL_FADING ** len(labels_N)
        one_hot_NC = one_hot(labels_N, said_NC.shape[1])
        deviations_NC = said_NC.clamp_min(_LEAST_SAID).log() - self._now("log_mean_C")
        scale_C = self._now("log_variance_C").sqrt().clamp_min(_LEAST_SAID)
        for name, value, fade in (
            ("label_counts_C", one_hot_NC.sum(dim=0), fading),
            ("labels_so_far_C", one_hot_NC.sum(dim=0), 1.0),
            ("said_counts_C", said_NC.sum(dim=0), fading),
            ("deviations_C", deviations_NC.sum(dim=0) / scale_C, fading),
            ("squared_errors_C", (one_hot_NC - said_NC).square().sum(dim=0), fading**2),
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
        """What is kept under a name, as this step has made it."""
        return self._next.get(name, self._kept[name])

    def _moved(self, name: str, towards: Tensor | None) -> Tensor:
        """The average one step on; as it is where nothing was seen."""
        kept = self._kept[name]
        if towards is None:
            return kept
        self._next[name] = torch.lerp(towards, kept, self._options.target_momentum)
        return self._next[name]
