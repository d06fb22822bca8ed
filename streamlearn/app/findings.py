"""One line of what `streamlearn check` and `streamlearn init` report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Verdict: TypeAlias = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    verdict: Verdict
    subject: str
    text: str
