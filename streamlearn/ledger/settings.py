"""[labels] of the config file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from streamlearn.section import Section


class LabelsConfig(Section):
    """[labels]: how long samples and labels are kept, and which labels count."""

    payload_max_bytes: int = Field(1 << 30, ge=1 << 16)
    """Most bytes of payloads in the sample store. An evicted payload is read back from the log for a late label."""
    horizon_s: float = Field(30 * 86400.0, ge=1.0)
    """How long samples are kept, and labels whose sample has not come."""
    max_ids: int = Field(10_000_000, ge=1000)
    """Most sample ids that are kept, whatever their age."""
    replay_rows: int = Field(5000, ge=1, le=10_000_000)
    """Rows of the replay buffer, balanced by class. Large rows: as many as fit in 512 MiB."""
    corrections: Literal["last", "first"] = "last"
    """Which label counts when two labels of a sample differ, by log time. With first, a retraction is final; with
    last, a later label undoes it."""
    unknown_class: Literal["hold", "refuse", "grow"] = "hold"
    """What to do with a label whose class is not in the schema: hold it until the schema has the class, refuse it (dead
    letter), or grow: give the class a spare output."""
    implied_class: str | None = None
    """The class of a sample that has no label `implied_after_s` after it arrived, such as "no click"."""
    implied_after_s: float | None = Field(None, gt=0.0)
    """Set together with `implied_class`; at most `horizon_s`."""
    requests_per_hour: int = Field(1000, ge=0, le=1_000_000)
    """The labelling budget: how many samples `GET /label/requests` hands out within an hour. 0: active learning is
    off."""

    @model_validator(mode="after")
    def _check(self) -> LabelsConfig:
        if (self.implied_class is None) != (self.implied_after_s is None):
            msg = "implied_class and implied_after_s: set both or neither"
            raise ValueError(msg)
        if self.implied_after_s is not None and self.implied_after_s > self.horizon_s:
            msg = f"implied_after_s = {self.implied_after_s} exceeds horizon_s = {self.horizon_s}"
            raise ValueError(msg)
        return self
