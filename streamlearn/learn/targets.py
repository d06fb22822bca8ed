"""What the student is held against: a teacher's probabilities, aligned, sharpened, and weighted row by row.

In this order:

    align    q ~ p * wanted / p(teacher): the classes that the teacher says too often count for less (distribution
             alignment of ReMixMatch, Berthelot et al., 2020; with moving averages as in SoftMatch)
             uniform    wanted is even
             labels     wanted = (n r + k C even) / (n + k C), of n labels and C classes; r ~ p(teacher) (y + k)/(s + k)
                        with y the labels of a class, and s what the teacher said of these very samples before it
                        learned them. It is the ratio estimate of the classes of all samples (Cochran, Sampling
                        Techniques, 1977, chapter 6): a teacher that favours a class hardly moves it, nor does
                        whoever labels some classes more often than others. Few labels say little: even classes hold
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

from streamlearn.learn.rows import Rows

_SOFTMATCH_N = 2.0
_LEAST_SHARE = 1e-4
"""No class of the teacher is taken for rarer than this, or a class that it has not said yet would weigh thousands."""
_PRIOR_LABELS = 10.0
"""k: labels of each class that are taken to have come before the first, and that the teacher was right about."""
_LABEL_FADING = 0.99
"""Of the class counts of labels, for each new label: a horizon of a hundred of them."""


class Targets:
    """Makes targets of a teacher's logits, and keeps the averages that this takes."""

    def __init__(
        self,
        *,
        classes: int,
        device: torch.device,
        align: str = "none",
        gate: str = "none",
        threshold: float = 0.95,
        temperature: float = 1.0,
        momentum: float = 0.99,
    ) -> None:
        self._align, self._gate = align, gate
        self._threshold, self._temperature, self._momentum = threshold, temperature, momentum
        uniform = torch.full((classes,), 1.0 / classes, device=device)
        self._kept: dict[str, Tensor] = {}
        if align != "none":
            self._kept["model_C"] = uniform.clone()
        if align == "labels":
            self._kept |= {"label_counts_C": torch.zeros_like(uniform), "said_counts_C": torch.zeros_like(uniform)}
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
        if self._align != "none":
            q_BC = self._aligned(q_BC, rows)
        weights_B = None if self._gate == "none" else self._weights(q_BC.detach(), rows.fresh_count)
        if self._temperature != 1.0:
            q_BC = q_BC.pow(1.0 / self._temperature)
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
        model_C = model_C.clamp_min(_LEAST_SHARE)
        wanted_C = rows.uniform_C if self._align == "uniform" else self._classes_of_all(model_C, rows)
        q_BC = q_BC * (wanted_C / model_C)
        return q_BC / q_BC.sum(dim=1, keepdim=True)

    def _classes_of_all(self, model_C: Tensor, rows: Rows) -> Tensor:
        labels_C, said_C = self._kept["label_counts_C"], self._kept["said_counts_C"]
        if rows.said_NC is not None:
            new_N = rows.labels_B[rows.fresh_count :][: len(rows.said_NC)]
            fading = _LABEL_FADING ** len(new_N)
            labels_C = labels_C * fading + torch.nn.functional.one_hot(new_N, len(labels_C)).sum(dim=0)
            said_C = said_C * fading + rows.said_NC.sum(dim=0)
            self._next |= {"label_counts_C": labels_C, "said_counts_C": said_C}
        even_C = rows.uniform_C
        ratio_C = model_C * (labels_C + _PRIOR_LABELS) / (said_C + _PRIOR_LABELS) * (even_C > 0)
        labels, prior_labels = labels_C.sum(), _PRIOR_LABELS * (even_C > 0).sum()
        return (labels * ratio_C / ratio_C.sum() + prior_labels * even_C) / (labels + prior_labels)

    def _weights(self, q_BC: Tensor, fresh: int) -> Tensor:
        confidence_B, class_B = q_BC.max(dim=1)
        if self._gate == "fixed":
            return (confidence_B >= self._threshold).to(q_BC.dtype)
        seen_F = confidence_B[:fresh]
        mean = self._moved("confidence", seen_F.mean() if fresh else None)
        if self._gate == "freematch":
            share_C = self._moved("gated_C", q_BC[:fresh].mean(dim=0) if fresh else None)
            return (confidence_B >= mean * (share_C / share_C.max())[class_B]).to(q_BC.dtype)
        variance = self._moved("variance", seen_F.var(unbiased=fresh > 1) if fresh else None)
        below_B = (confidence_B - mean).clamp_max(0.0)
        return torch.exp(-(below_B**2) * _SOFTMATCH_N**2 / (2.0 * variance.clamp_min(1e-12)))

    def _moved(self, name: str, towards: Tensor | None) -> Tensor:
        """The average one step on; as it is where nothing was seen."""
        kept = self._kept[name]
        if towards is None:
            return kept
        self._next[name] = torch.lerp(towards, kept, self._momentum)
        return self._next[name]
