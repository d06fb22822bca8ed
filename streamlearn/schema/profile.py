"""Profiles: what the values of one field look like, for `streamlearn init` and `streamlearn check --sample`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from datetime import time as time_of_day
from decimal import Decimal
from typing import Final, Literal, TypeAlias

from streamlearn.schema.fields import seconds_of, text_of
from streamlearn.schema.paths import MISSING

MAX_TEXT_CHARACTERS: Final = 256
"""Longer texts that begin alike count as one value."""
MAX_DISTINCT: Final = 100_000
"""Further values are counted, and not told apart."""
NO_VALUE: Final = frozenset({"n/a", "na", "nan", "none", "null", "nil", "unknown", "undefined", "missing", "-", "?"})
"""Texts, in lower case, that producers write where a number is missing."""

ValueKind: TypeAlias = Literal[
    "boolean", "integer", "number", "number_text", "no_value", "time", "time_text", "text", "vector", "list", "object",
    "other",
]  # fmt: skip
"""Of one value. `number_text` is a number as text, `no_value` a text of `NO_VALUE`, `time` a date of a logical type,
`time_text` ISO 8601, `vector` a list of numbers."""


@dataclass(slots=True)
class Profile:
    """The values of one field in some records."""

    count: int = 0
    """Records."""
    missing: int = 0
    """Absent, null or empty text."""
    kinds: Counter[ValueKind] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    """How often each scalar occurs, by its text."""
    numbers: list[float] = field(default_factory=list)
    """Those that are numbers, also as text; sorted."""
    seconds: list[float] = field(default_factory=list)
    """Those that are dates, since 1970; sorted."""
    sizes: Counter[int] = field(default_factory=Counter)
    """Lengths of vectors."""
    words: int = 0
    """Of all texts together."""

    @property
    def present(self) -> int:
        """Number of values that are not missing."""
        return self.count - self.missing

    @property
    def distinct(self) -> int:
        """Number of different scalars in these records."""
        return len(self.texts)

    @property
    def distinct_estimate(self) -> int:
        """Number of different scalars in the whole topic: a lower bound, from how many were seen once and twice.

        Bias-corrected Chao1 (Chao 1984; Colwell & Coddington 1994).
        """
        seen = Counter(self.texts.values())
        return self.distinct + seen[1] * (seen[1] - 1) // (2 * (seen[2] + 1))

    @property
    def coverage(self) -> float:
        """How likely the next scalar is one that was seen (Good 1953); 1 without scalars."""
        total = self.texts.total()
        return 1.0 - sum(count == 1 for count in self.texts.values()) / total if total else 1.0

    @property
    def is_unique(self) -> bool:
        """Whether every value is a scalar that occurs once."""
        return self.present == self.distinct > 0

    @property
    def is_whole(self) -> bool:
        """Whether all numbers are whole."""
        return all(number.is_integer() for number in self.numbers)

    def share(self, *kinds: ValueKind) -> float:
        """Share of values of these kinds in those that are present; 0 if none is."""
        return sum(self.kinds[kind] for kind in kinds) / self.present if self.present else 0.0

    def most_common(self, count: int) -> list[str]:
        """The most frequent scalars; equally frequent ones in the order of their texts."""
        return sorted(self.texts, key=lambda text: (-self.texts[text], text))[:count]


def profile(values: Iterable[object]) -> Profile:
    """Return the profile of a field: its value in each record, `MISSING` where it is absent."""
    found = Profile()
    for value in values:
        found.count += 1
        if value is None or value is MISSING or (isinstance(value, str) and not value.strip()):
            found.missing += 1
            continue
        found.kinds[_add(found, value)] += 1
    found.numbers.sort()
    found.seconds.sort()
    return found


def _add(found: Profile, value: object) -> ValueKind:
    """Add what is known of a value that is present, and return its kind."""
    if isinstance(value, list | tuple):
        if not all(isinstance(each, int | float | Decimal) and not isinstance(each, bool) for each in value):
            return "list"
        found.sizes[len(value)] += 1
        return "vector"
    text = None if isinstance(value, bytes) else text_of(value)
    if text is None:
        return "object" if isinstance(value, dict) else "other"
    text = text[:MAX_TEXT_CHARACTERS]
    if text in found.texts or len(found.texts) < MAX_DISTINCT:
        found.texts[text] += 1
    return _add_scalar(found, value, text.strip())


def _add_scalar(found: Profile, value: object, text: str) -> ValueKind:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float | Decimal):
        return _add_number(found, value)
    if isinstance(value, time_of_day):
        return _add_number(found, value.hour * 3600.0 + value.minute * 60.0 + value.second)
    if isinstance(value, date):
        found.seconds.append(seconds_of(value, 1.0) or 0.0)
        return "time"
    return _add_text(found, text)


def _add_number(found: Profile, value: float | Decimal) -> ValueKind:
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return "other"
    if not math.isfinite(number):
        return "no_value"
    found.numbers.append(number)
    return "integer" if isinstance(value, int) else "number"


def _add_text(found: Profile, text: str) -> ValueKind:
    found.words += len(text.split())
    if text.lower() in NO_VALUE:
        return "no_value"
    if (number := number_in(text)) is not None:
        found.numbers.append(number)
        return "number_text"
    if (seconds := seconds_of(text, 1.0)) is not None and not text.isdigit():
        found.seconds.append(seconds)
        return "time_text"
    return "text"


def number_in(text: str) -> float | None:
    """Return the number that a text is; None if it is none, or a code such as `007`."""
    digits = text.lstrip("+-")
    if "_" in text or (digits[:1] == "0" and digits[1:2].isdigit()):
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
