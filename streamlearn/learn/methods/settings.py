"""Options of each method, read from `[learn.options]`. Without torch, since the supervisor reads the config too.

Each method has a section of its own, so an option of another method is an unknown key, and an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, field_validator, model_validator

from streamlearn.section import Section


class MethodOptions(Section):
    """Options of one method."""


class MixupOptions(MethodOptions):
    """Of methods that take mixed labelled rows."""

    mixup_beta: float = Field(0.0, ge=0.0, le=100.0)
    """Mix labelled rows, and their labels, in pairs with shares from Beta(b, b). 0: off."""


class ConsistencyOptions(MethodOptions):
    """Of methods with a consistency cost."""

    consistency: Literal["mse", "kl"] = "mse"
    """Distance between student and target: mean squared error of the probabilities, or KL(target || student)."""
    consistency_weight: float = Field(3.0, ge=0.0, le=10_000.0)
    """Peak of w(t). The classification cost is summed over labelled rows and divided by all rows."""
    rampup_steps: int = Field(500, ge=0)
    """Steps until w(t) is at its peak: w(t) = peak * exp(-5 (1 - t/T)^2)."""
    rampup_labels: int = Field(0, ge=0)
    """The same ramp, counted in labels. The lower of both holds. 0: by steps alone."""
    fade_labels: int = Field(0, ge=0)
    """After this many labels w(t) falls as 1/labels: unlabelled samples teach less as labels come in. 0: never."""


class TargetOptions(ConsistencyOptions):
    """Of methods that make their targets from a network's answers."""

    align: Literal["none", "uniform", "labels"] = "none"
    """Distribution alignment: move the class distribution of targets towards the uniform one, or towards the one
    estimated from labels. That estimate stays uniform while the difference may be chance or selection bias."""
    gate: Literal["none", "fixed", "freematch", "softmatch"] = "none"
    """Rows that enter the consistency cost: all; those above a fixed or an adaptive (FreeMatch) confidence threshold;
    or all, weighted by confidence (SoftMatch)."""
    gate_threshold: float = Field(0.95, gt=0.0, lt=1.0)
    """Confidence threshold of the fixed gate."""
    temperature: float = Field(1.0, gt=0.0, le=10.0)
    """Below 1, targets are sharpened: p^(1/T)."""
    target_momentum: float = Field(0.99, ge=0.0, lt=1.0)
    """Per step, of the moving averages of alignment and gate."""

    @model_validator(mode="after")
    def _check_threshold(self) -> TargetOptions:
        default = type(self).model_fields["gate_threshold"].default
        if self.gate != "fixed" and self.gate_threshold != default:
            msg = f'gate_threshold = {self.gate_threshold} has no effect with gate = "{self.gate}", only with "fixed"'
            raise ValueError(msg)
        return self


class TeacherOptions(TargetOptions):
    """Of methods that make their targets from the teacher's answers."""

    teacher_mode: Literal["eval", "train"] = "eval"
    """How the teacher answers for targets: as it is served, or, as in the papers, with dropout and batch statistics."""


class ContrastOptions(TeacherOptions):
    """Of methods that can learn features without labels."""

    contrast_weight: float = Field(0.0, ge=0.0, le=1000.0)
    """Weight of a cost that teaches features without labels: to recognise a sample among those of its micro-batch. It
    needs a network that ends with a linear layer. 0: off."""


class MeanTeacherOptions(MixupOptions, ContrastOptions):
    """Of mean_teacher."""


class InterpolationOptions(MixupOptions, ContrastOptions):
    """Of ict."""

    interpolation_beta: float = Field(0.5, gt=0.0, le=100.0)
    """Unlabelled rows are mixed with shares from Beta(b, b)."""


class PiOptions(MixupOptions, TargetOptions):
    """Of pi."""


class TemporalEnsemblingOptions(ConsistencyOptions):
    """Of temporal_ensembling."""

    ensemble_momentum: float = Field(0.6, ge=0.0, lt=1.0)
    """a in Z <- a Z + (1 - a) z, applied each time a sample is seen."""
    ensemble_slots: int = Field(65_536, ge=1, le=16_777_216)
    """Samples whose average answer is kept, in memory and in the checkpoint."""


class DSneOptions(TeacherOptions):
    """Of dsne."""

    source_path: str = ""
    """The labelled source domain: an .npz with x (N, *shape) and integer y (N,)."""
    source_rows: int = Field(32, ge=2, le=65_536)
    """Source rows per step."""
    source_weight: float = Field(0.1, ge=0.0, le=1.0)
    """Share of the d-SNE loss, against cross-entropy."""
    source_margin: float = Field(1.0, ge=0.0, le=1000.0)
    """Margin by which the farthest row of the same class must be nearer than the nearest row of another class."""

    @field_validator("source_path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        if not path:
            raise ValueError("dsne needs the .npz file of its source domain (x, y)")
        return path


class SupervisedOptions(MixupOptions):
    """Of supervised."""


OPTIONS: Mapping[str, type[MethodOptions]] = {
    "mean_teacher": MeanTeacherOptions,
    "ict": InterpolationOptions,
    "pi": PiOptions,
    "temporal_ensembling": TemporalEnsemblingOptions,
    "dsne": DSneOptions,
    "supervised": SupervisedOptions,
}
"""By `learn.method`."""
