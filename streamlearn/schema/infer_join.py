"""Inference over two topics: the ids that join them, the label and its classes, and what leaks the label."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import orjson

from streamlearn.errors import RecordError
from streamlearn.records import Record
from streamlearn.schema.fields import checked_id, text_of
from streamlearn.schema.infer import FEW_RECORDS, Fields, collect, in_record, shown, words_of
from streamlearn.schema.paths import MISSING, Path
from streamlearn.schema.profile import NO_VALUE, Profile
from streamlearn.schema.reader import RecordReader

MAX_CLASSES: Final = 100
"""A label field has at most as many values."""
_ID_COVERAGE, _UNIQUE, _SAME = 0.9, 0.98, 0.5
_LEAST_LABELLED, _LEAST_OF_CLASS = 20, 5
"""With fewer labelled samples a perfect prediction may be chance."""
_GENERIC = frozenset({"label", "class", "target", "y", "value", "outcome", "result", "category", "verdict", "decision"})
_LABEL_WORDS = _GENERIC | {
    "fraud", "fraudulent", "chargeback", "churn", "churned", "spam", "click", "clicked", "converted", "conversion",
    "default", "defaulted", "status", "anomaly", "abuse", "response", "truth", "positive", "disposition",
}  # fmt: skip
_PREFIXES = frozenset({"is", "has", "was", "did", "will"})
_TRUE, _FALSE = frozenset({"true", "1", "yes", "y", "t"}), frozenset({"false", "0", "no", "n", "f"})

_WHOLE = re.compile(r"-?[0-9]{1,18}", re.ASCII)

Ids = Mapping[str, Sequence[str | None]]
"""By path, the id in each record; None where there is none."""


def id_candidates(reader: RecordReader, records: Sequence[Record], parsed: Sequence[object], fields: Fields) -> Ids:
    """The ids that each field, the key and each header would give."""
    found = {path: [_id(value) for value in values] for path, values in fields.values.items() if in_record(path)}
    found |= _of_keys(reader, records, parsed)
    names = {name.lower(): None for record in records for name, _ in record.headers}
    for name in names:
        values = [{each.lower(): content for each, content in record.headers}.get(name) for record in records]
        found[f"header:{name}"] = [_id(_text(value)) for value in values]
    return {path: ids for path, ids in found.items() if _filled(ids) >= _ID_COVERAGE * len(records) > 0}


def _of_keys(reader: RecordReader, records: Sequence[Record], parsed: Sequence[object]) -> dict[str, list[str | None]]:
    keys: list[object] = []
    for record, value in zip(records, parsed, strict=True):
        try:
            key = reader.find(Path.parse("key"), record, value, {})
        except RecordError:
            key = MISSING
        if isinstance(key, str) and key.startswith("{"):
            try:
                key = orjson.loads(key)
            except orjson.JSONDecodeError:
                key = MISSING
        keys.append(key)
    found = {"key": [_id(key) for key in keys]}
    inside = collect(keys)
    return found | {f"key.{path}": [_id(value) for value in values] for path, values in inside.values.items()}


def _id(value: object) -> str | None:
    if value is MISSING or value is None or isinstance(value, float | bool | dict | list):
        return None
    try:
        return checked_id(value)
    except RecordError:
        return None


def _text(content: bytes | None) -> str | None:
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError:
        return None


def _filled(ids: Sequence[str | None]) -> int:
    return len(ids) - ids.count(None)


@dataclass(frozen=True)
class Join:
    """A pair of paths whose values are in both topics."""

    samples: str
    labels: str
    joined: int
    """Ids that are in both."""
    of: int
    """Different ids among the labels."""
    is_unique: bool
    """Whether neither topic has an id twice, or nearly so."""
    is_dense: bool
    """Whether the ids are integers without large gaps: any two such fields have values in common."""
    score: float
    repeated_samples: float
    """Share of samples whose id an earlier one has."""
    repeated_labels: float


def joins(samples: Ids, labels: Ids) -> list[Join]:
    """The pairs of paths that join labels with samples, the likeliest first.

    An id differs between records, and the ids of labels are found among those of samples. A customer's number is found
    too, but repeats. Among equals, a field comes before the key and a header, then equal names.
    """
    found = []
    sides = [{path: {i for i in ids if i is not None} for path, ids in side.items()} for side in (samples, labels)]
    unique = [
        {path: len(sides[n][path]) / _filled(ids) for path, ids in side.items()}
        for n, side in enumerate((samples, labels))
    ]
    for of_sample, sample_ids in sides[0].items():
        for of_label, label_ids in sides[1].items():
            joined, least = len(sample_ids & label_ids), min(len(sample_ids), len(label_ids))
            shares = (unique[0][of_sample], unique[1][of_label])
            if joined < min(2, least) or min(shares) < _SAME:
                continue
            is_dense = _is_dense(sample_ids) and _is_dense(label_ids)
            score = joined / least * shares[0] * shares[1]
            is_unique, repeated = min(shares) >= _UNIQUE, (1.0 - shares[0], 1.0 - shares[1])
            found.append(Join(of_sample, of_label, joined, len(label_ids), is_unique, is_dense, score, *repeated))
    return sorted(found, key=_rank, reverse=True)


def _rank(join: Join) -> tuple[object, ...]:
    same_name = _last(join.samples) == _last(join.labels)
    places = _place(join.samples) + _place(join.labels)
    return join.is_unique and not join.is_dense, join.is_unique, round(join.score, 1), places, same_name, join.score


def _last(path: str) -> str:
    return "".join(words_of(path))


def _place(path: str) -> int:
    return 0 if path.startswith("header:") else 1 if path == "key" else 2 if path.startswith("key.") else 3


def _is_dense(ids: set[str]) -> bool:
    """Whether they are integers of which at least one in ten occurs."""
    if not all(i.isascii() and i.isdigit() and len(i) <= 18 for i in ids):
        return False
    numbers = [int(i) for i in ids]
    return max(numbers) - min(numbers) < 10 * len(numbers)


def rivals(found: Sequence[Join]) -> list[Join]:
    """The pairs that are nearly as likely as the first, by other fields."""
    return [
        join
        for join in found[1:]
        if join.is_unique == found[0].is_unique
        and join.is_dense == found[0].is_dense
        and join.score >= _SAME * found[0].score
        and _place(join.samples) == _place(join.labels) == 3
    ]


def unjoined(samples: Ids, labels: Ids) -> list[tuple[str, str]]:
    """Pairs of paths that may be ids although no id was found in both topics: unique, and of equal names."""
    sides = []
    for side in (samples, labels):
        unique = [path for path, ids in side.items() if len({*ids} - {None}) >= _UNIQUE * _filled(ids)]
        sides.append({_last(path): path for path in reversed(unique)})
    named = [(path, sides[1][name]) for name, path in sides[0].items() if name in sides[1]]
    return sorted(named, key=lambda pair: (-_place(pair[0]), _last(pair[0]) != "id", pair))


# The label


@dataclass(frozen=True)
class LabelChoice:
    """The field that is the class, and the classes."""

    path: str | None
    """None if it is not decided, or the record is nothing but its class."""
    classes: tuple[str, ...]
    """Names, in the order of their outputs. Empty if it is not decided."""
    values: Mapping[str, str]
    """Class names by the value's text, where they differ."""
    counts: Mapping[str, int]
    """How often each value occurs."""
    others: tuple[str, ...] = ()
    """Other fields that may be the class."""
    notes: tuple[str, ...] = ()
    """What the user should look at."""

    def class_of(self, value: object) -> str | None:
        """The class of a value; None for null, or if it is none."""
        text = None if value is None or value is MISSING else text_of(value)
        name = None if text is None else self.values.get(text, text)
        return name if name in self.classes else None


def choose_label(profiles: Mapping[str, Profile], left_out: Sequence[str], *, fixed: str | None = None) -> LabelChoice:
    """Return the field that is the class. Not decided if two are equally likely.

    `left_out` are ids and times; `fixed` is the user's choice.
    """
    if fixed is not None:
        return _classes(fixed, profiles[fixed]) if fixed in profiles else _undecided(())
    scores = {path: _label_score(path, found) for path, found in profiles.items() if path not in left_out}
    ranked = sorted((path for path, score in scores.items() if score > 0), key=lambda path: -scores[path])
    if not ranked or (len(ranked) > 1 and scores[ranked[0]] == scores[ranked[1]]):
        return _undecided(tuple(ranked))
    chosen = _classes(ranked[0], profiles[ranked[0]])
    return LabelChoice(chosen.path, chosen.classes, chosen.values, chosen.counts, tuple(ranked[1:6]), chosen.notes)


def plain_label(found: Profile) -> LabelChoice:
    """The classes of records that are nothing but their class."""
    chosen = _classes("label", found)
    return LabelChoice(None, chosen.classes, chosen.values, chosen.counts, notes=chosen.notes)


def _undecided(others: tuple[str, ...]) -> LabelChoice:
    return LabelChoice(None, (), {}, {}, others[:12])


def _label_score(path: str, found: Profile) -> int:
    """How likely a field is the class; 0 if it cannot be."""
    scalars = found.kinds["boolean"] + found.kinds["integer"] + found.kinds["text"] + found.kinds["number_text"]
    scalars += found.kinds["no_value"] + (found.kinds["number"] if found.is_whole else 0)
    if not in_record(path):
        return 0
    few = found.distinct <= min(MAX_CLASSES, max(3, found.present // 2))
    if not found.present or scalars < found.present or not few or found.words > 4 * found.present:
        return 0
    words = words_of(path)
    score = 2 + 8 * (words[-1:] == ["label"] or words == ["y"]) + 4 * bool(_LABEL_WORDS & {*words})
    score += 2 * (words[:1] != [] and words[0] in _PREFIXES) + 2 * (found.share("boolean") == 1.0)
    return score - (found.distinct == 1 and found.present >= FEW_RECORDS)


def _classes(path: str, found: Profile) -> LabelChoice:
    counts = {text: found.texts[text] for text in found.most_common(MAX_CLASSES)}
    notes: list[str] = []
    if found.distinct > MAX_CLASSES:
        notes.append(f"{found.distinct} values were seen; the {MAX_CLASSES} most frequent are classes")
    low = {text: text.strip().lower() for text in counts}
    truths = [text for text in counts if low[text] in _TRUE | _FALSE]
    is_truth = bool(found.kinds["boolean"]) or ({*low.values()} <= _TRUE | _FALSE and _positive(path) is not None)
    if is_truth and truths:
        positive = _positive(path)
        yes, no = (positive, f"not_{positive}") if positive else ("true", "false")
        values = {text: yes if low[text] in _TRUE else no for text in truths}
        seen = {*values.values()}
        values |= {word: name for word, name in (("true", yes), ("false", no)) if name not in seen}
        rest = [text for text in counts if text not in truths and text not in (yes, no)]
        if rest:
            more = ", ".join(shown(text) for text in rest[:6])
            notes.append(f"{more}: a class of its own; if it means {yes}, map it to that name")
        names, missing = [no, yes, *rest], [name for name in (no, yes) if name not in seen]
        if missing and not rest:
            notes.append(_one_class(yes if missing[0] == no else no, missing[0]))
    else:
        values = _spellings(counts)
        names = _ordered({text: count for text, count in counts.items() if text not in values})
        if values:
            more = ", ".join(f"{shown(text)} as {shown(name)}" for text, name in list(values.items())[:6])
            notes.append(f"taken as one class, as only the case differs: {more}; else change [source.labels.values]")
        if unclear := [text for text in names if low[text] in NO_VALUE]:
            more = ", ".join(map(shown, unclear))
            notes.append(f"{more}: taken as a class; remove it from schema.classes if it means that nothing is known")
        if len(names) == 1:
            names = [f"not_{names[0]}", *names]
            notes.append(_one_class(names[1], names[0]))
    return LabelChoice(path, tuple(names), {k: v for k, v in values.items() if k != v}, counts, notes=tuple(notes))


def _spellings(counts: Mapping[str, int]) -> dict[str, str]:
    """The most frequent spelling of each value that is written in another case elsewhere; `counts` descend."""
    first: dict[str, str] = {}
    found = {text: first.setdefault(text.casefold(), text) for text in counts}
    return {text: name for text, name in found.items() if text != name}


def _one_class(seen: str, other: str) -> str:
    """The advice for topics that hold one class only, such as chargebacks."""
    return (
        f"only {shown(seen)} was seen: if samples without a label are {shown(other)}, set labels.implied_class and "
        "labels.implied_after_s"
    )


def _positive(path: str) -> str | None:
    """What `true` means by the name of its field: `is_fraud` is fraud. None if the name says nothing."""
    words = words_of(path)
    if words[:1] != [] and words[0] in _PREFIXES:
        words = words[1:]
    return None if not words or {*words} <= _GENERIC else "_".join(words)


def _ordered(counts: Mapping[str, int]) -> list[str]:
    """Numbers in their order; names by frequency, the rarest last."""
    if all(_WHOLE.fullmatch(text) for text in counts):
        return sorted(counts, key=int)
    return list(counts)


# Leaks


def leaks(fields: Fields, paths: Sequence[str], classes: Sequence[str | None]) -> dict[str, str]:
    """The fields that predict the label perfectly, and how; `classes` has the class of each record, or None.

    Such a field may have been written after the label was known.
    """
    labelled = [number for number, name in enumerate(classes) if name is not None]
    counts = Counter(name for name in classes if name is not None)
    if len(labelled) < _LEAST_LABELLED or len(counts) < 2 or min(counts.values()) < _LEAST_OF_CLASS:
        return {}
    found = {}
    for path in paths:
        pairs = [(fields.values[path][number], str(classes[number])) for number in labelled]
        if how := _predicts(pairs, len(counts)):
            found[path] = f"{how} in all {len(labelled)} labelled samples that were read"
    return found


def _predicts(pairs: Sequence[tuple[object, str]], classes: int) -> str | None:
    groups: dict[str | None, set[str]] = {}
    sizes: Counter[str | None] = Counter()
    for value, name in pairs:
        text = None if value is None or value is MISSING else text_of(value)
        groups.setdefault(text, set()).add(name)
        sizes[text] += 1
    repeated = sum(count for count in sizes.values() if count > 1)
    if (
        all(len(names) == 1 for names in groups.values())
        and repeated >= len(pairs) - 1
        and 4 * len(groups) < len(pairs)
    ):
        return "each value has one class"
    presence = {(value is None or value is MISSING, name) for value, name in pairs}
    if len(presence) == len({there for there, _ in presence}) == classes == 2:
        return "whether it is there has one class"
    numbers = sorted(_numbers(pairs))
    if len(numbers) == len(pairs) and _changes(numbers) == classes - 1:
        return "thresholds separate the classes"
    return None


def _numbers(pairs: Sequence[tuple[object, str]]) -> Iterator[tuple[float, str]]:
    for value, name in pairs:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield value, name


def _changes(numbers: Sequence[tuple[float, str]]) -> int:
    """How often the class changes along the sorted numbers; equal numbers of two classes count as many."""
    changes = 0
    for (low, before), (high, after) in itertools.pairwise(numbers):
        if before != after:
            changes += 1 if low < high else len(numbers)
    return changes
