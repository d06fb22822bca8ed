"""`streamlearn init`: a config for the user's topics, inferred from records that are there.

Records are parsed by the learner's `RecordReader`. The config that results then decodes the same records by the
learner's `Codec`, and the report says how many of them.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from streamlearn.app.check_records import RecordsReport, examine
from streamlearn.app.draft import ConfigDraft
from streamlearn.app.findings import Finding, Verdict
from streamlearn.app.init_topic import Topic, from_producers, parse_records, read_topic, tensor_shape
from streamlearn.app.log import log_exists, make_codec, open_log
from streamlearn.app.sampling import read_some
from streamlearn.config import Config
from streamlearn.errors import ConfigError
from streamlearn.log.base import Log
from streamlearn.records import Record
from streamlearn.schema.fields import text_of
from streamlearn.schema.infer import (
    Fields,
    choose_column,
    collect,
    column_names,
    event_times,
    shown,
)
from streamlearn.schema.infer_join import (
    Ids,
    Join,
    LabelChoice,
    choose_label,
    id_candidates,
    joins,
    leaks,
    plain_label,
    rivals,
    unjoined,
)
from streamlearn.schema.profile import profile
from streamlearn.schema.reader import RecordReader
from streamlearn.schema.registry import SchemaRegistry
from streamlearn.sources import explain, merged, read_layers
from streamlearn.state.paths import StatePaths

MORE_RECORDS: Final = 20_000
"""Samples that are read to find the ids of labels, if the first ones have none of them."""
_MOST_ERRORS: Final = 6
_HEAD = """\
Written by `streamlearn init` from {samples} records of {sample_topics} and {labels} of {label_topic}.
Comments say why. Lines that are commented out were not chosen: remove the # to use them.
Next: streamlearn check --config {path} --sample 500
Every setting: deploy/streamlearn.example.toml"""


@dataclass
class Inference:
    """A config file in the making, and what was decided for it."""

    draft: ConfigDraft
    findings: list[Finding] = field(default_factory=list)

    def say(self, verdict: Verdict, subject: str, text: str) -> None:
        """Report a decision."""
        self.findings.append(Finding(verdict, subject, text))


@dataclass(frozen=True)
class Written:
    """The result of `init`."""

    text: str
    config: Config
    findings: list[Finding]
    report: RecordsReport


def write_config(
    out: Path, config: Path | None, given: Mapping[str, Any], *, count: int, force: bool = False
) -> Written:
    """Infer a config and write it to `out`. `given` are settings by dotted keys, above those of the file `config`.

    Raises:
        ConfigError: `out` exists, the settings are wrong, or the records cannot be read.
        LogError: the log is away.
        RegistryUnavailableError: the schema registry is away.
    """
    if out.exists() and not force:
        msg = f"{out} exists: choose another --out, or overwrite it with --force"
        raise ConfigError(msg)
    tree = merged(read_layers(config, {}, given))
    tree.setdefault("log", {}).setdefault("kind", "kafka")
    base = validated(tree)
    if not log_exists(base):
        msg = f"{StatePaths(base.state.dir).log}: there is no log yet"
        raise ConfigError(msg)
    with contextlib.closing(open_log(base)) as log:
        written = infer(log, base, tree, count=count, path=out)
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.write_text(written.text, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        msg = f"{out} cannot be written: {error.strerror or error}; choose another --out"
        raise ConfigError(msg) from error
    return written


def infer(log: Log, base: Config, tree: Mapping[str, Any], *, count: int, path: Path) -> Written:
    """Infer a config from about `count` records of each side. `tree` has the user's own settings. Raises as above."""
    some_samples = read_some(log, base.source.samples.topics, count)
    some_labels = read_some(log, [base.source.labels.topic], count)
    registry = None if base.source.registry.url is None else SchemaRegistry(base.source.registry)
    samples = read_topic(base.source.samples, some_samples, registry, "format" in tree["source"]["samples"])
    labels = read_topic(base.source.labels, some_labels, registry, "format" in tree["source"]["labels"])
    head = _HEAD.format(
        samples=len(samples.records),
        sample_topics=", ".join(base.source.samples.topics),
        labels=len(labels.records),
        label_topic=base.source.labels.topic,
        path=path,
    )
    inference = Inference(ConfigDraft(tree, head=head))
    for name, topic in (("samples", samples), ("labels", labels)):
        _formats(inference, name, topic)
    join = _ids(inference, log, samples, labels)
    for name, topic in (("samples", samples), ("labels", labels)):
        _event_time(inference, name, topic)
    label = _label(inference, labels, join)
    if (shape := tensor_shape(samples)) is not None:
        inference.draft.set("schema", "shape", to=shape, why="of x")
        inference.say("ok", "schema", f"streamlearn's own records: x has the shape {shape}")
    elif samples.records:
        _columns(inference, samples, labels, join, label)
    _secrets(inference)
    config = validated(inference.draft.tree)
    report = examine(config, make_codec(config), some_samples, some_labels)
    return Written(inference.draft.text(), config, inference.findings, report)


def validated(tree: Mapping[str, Any]) -> Config:
    """The config of these settings and the environment. Raises ConfigError."""
    layers = [("settings", copy.deepcopy(dict(tree))), *read_layers(None, os.environ, {})]
    try:
        return Config.model_validate(merged(layers))
    except ValidationError as error:
        raise ConfigError(explain(error, layers)) from error


def _formats(inference: Inference, name: str, topic: Topic) -> None:
    some, draft = topic.some, inference.draft
    text = f"{', '.join(some.topics)}: {topic.format}, {some.partitions} partitions, {some.held:,} records"
    text += ", in Debezium's envelope" if topic.fields.root else ""
    inference.say("ok" if topic.records else "warning", name, f"{text}, {len(some.records)} read")
    if topic.format != "json":
        draft.set("source", name, "format", to=topic.format)
    if not topic.records:
        draft.note(f"source.{name}", "no record was there: nothing could be inferred from it")
    for error, count in topic.unreadable.most_common(_MOST_ERRORS):
        inference.say("warning", name, f"{count} records cannot be read: {error}")
    if rest := sum(count for _, count in topic.unreadable.most_common()[_MOST_ERRORS:]):
        inference.say("warning", name, f"{rest} records cannot be read for other reasons")


# Ids


def _ids(inference: Inference, log: Log, samples: Topic, labels: Topic) -> Join | None:
    """Decide on the ids; the pair that joins, if one was found."""
    draft = inference.draft
    of_samples = _chosen(draft, "samples", samples.reader, samples.records, samples.parsed)
    of_labels = _chosen(draft, "labels", labels.reader, labels.records, labels.parsed)
    found, read = joins(of_samples, of_labels), len(samples.records)
    if not found and of_labels and not samples.some.is_whole:
        more = read_some(log, samples.some.topics, MORE_RECORDS)
        records, parsed, _ = parse_records(samples.reader, from_producers(more.records), samples.format)
        found, read = joins(_chosen(draft, "samples", samples.reader, records, parsed), of_labels), len(records)
    if found:
        _joined(inference, samples, found, read)
        return found[0]
    _not_joined(inference, of_samples, of_labels, read)
    return None


def _chosen(draft: ConfigDraft, name: str, reader: RecordReader, records: list[Record], parsed: list[object]) -> Ids:
    """The candidates of one side: the user's path alone, if it is set."""
    found = id_candidates(reader, records, parsed, collect(parsed))
    if not draft.has("source", name, "id"):
        return found
    path = draft.tree["source"][name]["id"]
    return {path: found[path]} if path in found else {}


def _joined(inference: Inference, samples: Topic, found: Sequence[Join], read: int) -> None:
    draft, join = inference.draft, found[0]
    why = f"{join.joined} of {join.of} ids of labels are among {read} samples"
    doubts = []
    if not join.is_unique:
        doubts += [text for share, text in _repeats(join) if share > 0.0]
    elif join.is_dense:
        doubts.append("both are integers without gaps, which always meet: check that they mean the same")
    others = [f"{other.samples} = {other.labels} ({other.joined})" for other in rivals(found)[:4]]
    if others:
        doubts.append(f"these fit as well: {', '.join(others)}")
    own = tensor_shape(samples) is not None and join.samples == "id"
    if not own:
        draft.set("source", "samples", "id", to=join.samples, why="; ".join([why, *doubts]))
    draft.set("source", "labels", "id", to=join.labels, why=why)
    text = f"{join.samples} of samples is {join.labels} of labels: {why}"
    inference.say("warning" if doubts else "ok", "id", "; ".join([text, *doubts]))


def _repeats(join: Join) -> list[tuple[float, str]]:
    """The share of records that repeat an id, and what the learner does with them."""
    of_samples, of_labels = join.repeated_samples, join.repeated_labels
    return [
        (of_samples, f"{of_samples:.1%} of samples repeat an id, and only the first of an id is learned"),
        (of_labels, f"{of_labels:.1%} of labels repeat an id, and a later one corrects an earlier one"),
    ]


def _not_joined(inference: Inference, samples: Ids, labels: Ids, read: int) -> None:
    """No id is in both topics: say which fields may be it. The one of equal name in both is taken, with a word."""
    draft, named = inference.draft, unjoined(samples, labels)
    unique = [path for path, ids in samples.items() if len({*ids}) >= 0.98 * len(ids)]
    head = f"not verified: no id of a label is among {read} samples"
    text = (
        f"{head}; unique in samples: {', '.join(unique[:8]) or 'none'}; in labels: {', '.join([*labels][:8]) or 'none'}"
    )
    if named:
        for side, path in zip(("samples", "labels"), named[0], strict=True):
            draft.set("source", side, "id", to=path, why=f"{head}; the name is in both topics")
        inference.say("warning", "id", f"{named[0][0]}, {text}")
        return
    for side, paths in (("samples", unique or [*samples]), ("labels", [*labels])):
        for path in paths[:8]:
            draft.suggest("source", side, "id", to=path, why=head)
    inference.say("warning", "id", f"not decided: {text}. Set source.samples.id and source.labels.id")


# Event times


def _event_time(inference: Inference, name: str, topic: Topic) -> None:
    draft = inference.draft
    if draft.has("source", name, "time") or not topic.records:
        return
    in_row = [found for path, found in topic.times.items() if path.startswith(topic.fields.root)]
    envelope = f"{topic.fields.root.removesuffix('after.')}source.ts_ms"
    ranked = event_times(in_row) or ([topic.times[envelope]] if envelope in topic.times else [])
    if not ranked:
        inference.say("ok", f"time of {name}", "no field is a time in all records: the log's time counts")
        return
    chosen, others = ranked[0], [found.path for found in ranked[1:5]]
    also = f"; also possible: {', '.join(others)}" if others else ""
    draft.set("source", name, "time", to=chosen.path, why=f"{chosen.kind}{also}")
    if chosen.unit not in (None, "s"):
        draft.set("source", name, "time_unit", to=chosen.unit)
    inference.say("ok", f"time of {name}", f"{chosen.path}: {chosen.kind}{also}")


# The label


def _label(inference: Inference, labels: Topic, join: Join | None) -> LabelChoice:
    draft = inference.draft
    if labels.parsed and not any(isinstance(value, dict) for value in labels.parsed):
        label = plain_label(profile(labels.parsed))
    else:
        rows = {path: labels.profiles[path] for path in labels.fields.row_paths}
        fixed = draft.tree["source"]["labels"].get("label")
        left_out = [*labels.times, *([join.labels] if join else [])]
        label = choose_label(rows, left_out, fixed=fixed)
    if not label.classes:
        head = "not decided: set source.labels.label and schema.classes"
        for path in label.others:
            values = ", ".join(map(shown, labels.profiles[path].most_common(6)))
            draft.suggest("source", "labels", "label", to=path, why=f"values: {values}")
        if labels.records:
            draft.note("source.labels", head)
        text = ", ".join(label.others) or "no field has a few values that repeat"
        inference.say("warning", "label", f"{head}; candidates: {text}")
        return label
    counts = ", ".join(f"{shown(value)} {count}" for value, count in list(label.counts.items())[:8])
    others = f"; also possible: {', '.join(label.others)}" if label.others else ""
    if label.path is not None:
        draft.set("source", "labels", "label", to=label.path, why=f"{counts}{others}")
    known = draft.tree["schema"]["classes"] if draft.has("schema", "classes") else label.classes
    for value, name in label.values.items():
        if isinstance(known, list | tuple) and value in known:
            continue  # a class of the user's own
        if isinstance(known, list | tuple) and name in known:
            draft.set("source", "labels", "values", value, to=name)
        else:
            draft.suggest("source", "labels", "values", value, to=name, why="which of your classes is it?")
    draft.set("schema", "classes", to=list(label.classes), why="the order is part of a saved model: keep it")
    for note in label.notes:
        draft.note("schema", note)
        inference.say("warning", "label", note)
    names = ", ".join(map(shown, label.classes[:8])) + (", …" if len(label.classes) > 8 else "")
    inference.say("ok", "label", f"{label.path or 'the record'}: {counts}{others}; classes {names}")
    return label


# Columns


def _columns(inference: Inference, samples: Topic, labels: Topic, join: Join | None, label: LabelChoice) -> None:
    draft, fields = inference.draft, samples.fields
    names, classes = column_names(fields), _classes_of(samples, labels, join, label)
    taken = {str(_from(name, column)) for name, column in draft.tree.get("columns", {}).items()}
    kinds: Counter[str] = Counter()
    leaking = leaks(fields, fields.row_paths, classes)
    if join is not None:
        leaking.pop(join.samples, None)
    left_out: list[str] = []
    for path in fields.row_paths:
        if path in taken or names[path] in draft.tree.get("columns", {}):
            continue
        if not samples.profiles[path].present and any(other.startswith(f"{path}.") for other in fields.row_paths):
            continue  # an object that is null in some records: its fields are columns
        choice = choose_column(path, samples.profiles[path], samples.times.get(path))
        setting: Any = dict(choice.setting)
        if names[path] != path:
            setting["from"] = path
        setting = setting["kind"] if len(setting) == 1 else setting
        reason = _reason_to_leave_out(path, join, label, fields, classes)
        if reason is None and choice.used:
            leak = leaking.get(path)
            why = f"WARNING: may leak the label: {leak}. {choice.why}" if leak else choice.why
            draft.set("columns", names[path], to=setting, why=why)
            kinds[choice.setting["kind"]] += 1
            if leak:
                text = f"{path}: {leak}. Remove it if it is known only after the label"
                inference.say("warning", "leak", text)
        else:
            draft.suggest("columns", names[path], to=setting, why=reason or choice.why)
            left_out.append(f"{path} ({reason or choice.why})")
    for name in fields.unreachable:
        draft.note("columns", f"{name}: a name with a dot, or an empty one, cannot be named by a path")
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    inference.say("ok" if kinds else "error", "columns", f"{kinds.total()}: {counts or 'no field can be a column'}")
    if left_out:
        inference.say("ok", "left out", "; ".join(left_out[:20]))


def _from(name: str, column: object) -> object:
    return column.get("from", name) if isinstance(column, Mapping) else name


def _reason_to_leave_out(
    path: str, join: Join | None, label: LabelChoice, fields: Fields, classes: Sequence[str | None]
) -> str | None:
    """Why a field is no input, whatever its values are."""
    if join is not None and path == join.samples:
        return "the id"
    values, last = fields.values[path], path.rpartition(".")[2]
    pairs = [(value, name) for value, name in zip(values, classes, strict=True) if name is not None]
    if label.path is not None and last == label.path.rpartition(".")[2]:
        return "the label: set source.samples.label to learn from it"
    if pairs and len({text_of(value) for value, _ in pairs}) > 1 and all(label.class_of(v) == c for v, c in pairs):
        return "equal to the label"
    return None


def _classes_of(samples: Topic, labels: Topic, join: Join | None, label: LabelChoice) -> list[str | None]:
    """The class of each sample that was read, as far as its label was read too."""
    if join is None or not label.classes:
        return [None] * len(samples.records)
    of_labels = id_candidates(labels.reader, labels.records, labels.parsed, labels.fields)[join.labels]
    of_samples = id_candidates(samples.reader, samples.records, samples.parsed, samples.fields)
    if label.path is None:
        names = [label.class_of(value) for value in labels.parsed]
    else:
        names = [label.class_of(value) for value in labels.fields.values[label.path]]
    known = {i: name for i, name in zip(of_labels, names, strict=True) if i is not None}
    return [None if i is None else known.get(i) for i in of_samples.get(join.samples, [None] * len(samples.records))]


def _secrets(inference: Inference) -> None:
    for variable in inference.draft.unwritten:
        inference.say("warning", "secret", f"not written to the file: set {variable}, or use file:PATH")
