"""Reads the log alone, recomputes what must have been learned of it, and holds that against what a learner left behind.

It shares nothing with the learner but the codec. With corrections = "last" and horizons that never pass, of all records
but those that retention took before they were learned, which are counted as trimmed:

    each sample id once, its further records counted as duplicate ids, what cannot be decoded dead-lettered
    each label record once; of a sample the last by log time and position counts, and it is learned
    each record in one step: the journal's offsets never fall, begin at the log's beginning and end at its end
    each acknowledgement that a producer noted is in the log, at its position, with its content
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from harness.retention import Trimmed, records_of
from streamlearn.app.log import make_codec, open_log
from streamlearn.config import Config
from streamlearn.errors import RecordError
from streamlearn.ledger import LabelState, LabelStatus
from streamlearn.ledger.view import LedgerView
from streamlearn.log.base import Log
from streamlearn.log.codec import read_dead_letter
from streamlearn.records import Label, Offsets, Position, Record, Sample
from streamlearn.state.checkpoint import Checkpoint, load_newest
from streamlearn.state.journal import read_journal
from streamlearn.state.paths import StatePaths
from streamlearn.state.status import read_status

NEVER = -1
_MOST_TOLD = 20


@dataclass
class Logged:
    """What a log holds."""

    ends: Offsets = field(default_factory=dict)
    samples: dict[str, Position] = field(default_factory=dict)
    """By id, the first record of each."""
    sample_records: int = 0
    labels: dict[str, list[Label]] = field(default_factory=lambda: defaultdict(list))
    """By sample id, all records in the order in which they count."""
    unreadable: set[str] = field(default_factory=set)
    dead_letters: Counter[str] = field(default_factory=Counter)
    """By the position of the bad record."""
    everything: dict[Position, tuple[str, int]] = field(default_factory=dict)
    """Id and class (-1 of a sample) of each record that could be decoded, lost ones too."""
    trimmed: Trimmed = field(default_factory=Trimmed)

    @property
    def label_records(self) -> int:
        """All that could be decoded."""
        return sum(map(len, self.labels.values()))


def read_log(config: Config, trimmed: Trimmed | None = None) -> Logged:
    """Read all of samples, labels and dead letters, and what retention took of the first two."""
    topics, codec, found = config.log.topics, make_codec(config), Logged(trimmed=trimmed or Trimmed())
    lost = found.trimmed.lost
    with closing(open_log(config)) as log:
        samples, labels = _records(log, topics.samples, found), _records(log, topics.labels, found)
        for record in itertools.chain(samples, labels):
            position, is_sample = record.position, record.position.topic == topics.samples
            found.sample_records += is_sample and position not in lost
            try:
                item = codec.decode_sample(record) if is_sample else codec.decode_label(record)
            except RecordError:
                if position not in lost:
                    found.unreadable.add(str(position))
                continue
            found.everything[position] = item.sample_id, NEVER if isinstance(item, Sample) else item.class_index
            if position in lost:
                continue
            if isinstance(item, Sample):
                found.samples.setdefault(item.sample_id, position)
            else:
                found.labels[item.sample_id].append(item)
        for partition, end in log.end_offsets(topics.dead_letters).items():
            for record in records_of(log, partition, 0, end):
                found.dead_letters[str(read_dead_letter(record).record.position)] += 1
    for of_one in found.labels.values():
        of_one.sort(key=lambda label: (label.timestamp_s, label.position))
    return found


def _records(log: Log, topic: str, found: Logged) -> Iterator[Record]:
    beginnings = log.beginning_offsets(topic)
    for partition, end in sorted(log.end_offsets(topic).items()):
        found.ends[partition] = end
        taken = found.trimmed.records[partition]
        assert len(taken) >= beginnings[partition], f"{partition} was trimmed, and nobody can say what was in it"
        yield from taken
        yield from records_of(log, partition, len(taken), end)


@dataclass
class Verdict:
    """What is wrong: nothing, where all numbers are 0."""

    acknowledged: int = 0
    """Notes of producers that were checked."""
    labels_lost: int = 0
    """Not in the log though acknowledged, or in the log and not learned as it says."""
    samples_lost: int = 0
    learned_twice: int = 0
    """Records, samples or labels that were counted or learned more often than the log holds them."""
    dead_letters_lost: int = 0
    dead_letters_twice: int = 0
    """Allowed: a dead letter is written at least once."""
    told: list[str] = field(default_factory=list)
    """The first of what is wrong, in words."""

    @property
    def good(self) -> bool:
        """Nothing was lost, nothing was learned twice."""
        return not (self.labels_lost or self.samples_lost or self.learned_twice or self.dead_letters_lost)

    def add(self, what: str, count: int, told: str) -> None:
        """Count something that is wrong."""
        if count > 0:
            setattr(self, what, getattr(self, what) + count)
            if len(self.told) < _MOST_TOLD:
                self.told.append(f"{what} {count}: {told}")

    def include(self, other: Verdict) -> None:
        """Add what is wrong with another log."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


def verify(config: Config, notes: Iterable[Path], trimmed: Trimmed | None = None) -> Verdict:
    """Hold what a learner that has read all left in the state folder against the log."""
    logged, verdict, paths = read_log(config, trimmed), Verdict(), StatePaths(config.state.dir)
    _check_notes(logged, notes, verdict, config)
    _check_journal(logged, paths, verdict, config.log.topics.labels)
    checkpoint, status = load_newest(paths.checkpoints), read_status(paths.heartbeat)
    assert checkpoint is not None, "there is no checkpoint"
    assert status is not None, "there is no heartbeat"
    _check_accounts(logged, checkpoint, status["ledger"], verdict, config.log.topics.samples)
    _check_labels(logged, LedgerView(paths.store, config.schema_.build()), checkpoint.step, verdict)
    verdict.add("dead_letters_lost", len(logged.unreadable - logged.dead_letters.keys()), "no dead letter of them")
    good = {str(position) for position in logged.everything}
    verdict.add("learned_twice", len(logged.dead_letters.keys() & good), "dead letters of good records")
    verdict.dead_letters_twice = sum(count - 1 for count in logged.dead_letters.values())
    return verdict


def _check_notes(logged: Logged, notes: Iterable[Path], verdict: Verdict, config: Config) -> None:
    """What was acknowledged is in the log, or was until retention took it, as it was sent."""
    for line in whole_lines(notes):
        topic, partition, offset, sample_id, class_index = line.split(" ")
        there = logged.everything.get(Position(topic, int(partition), int(offset)))
        verdict.acknowledged += 1
        lost = "labels_lost" if topic == config.log.topics.labels else "samples_lost"
        same = there == (sample_id, int(class_index))
        verdict.add(lost, not same, f"{line} was acknowledged; the log holds {there}")


def whole_lines(notes: Iterable[Path]) -> Iterator[str]:
    """Lines of the notes; the last of a producer that was killed may be torn."""
    for path in notes:
        text = path.read_text() if path.exists() else ""
        yield from text[: text.rfind("\n") + 1].splitlines()


def _check_journal(logged: Logged, paths: StatePaths, verdict: Verdict, labels_topic: str) -> None:
    """Every record is in one step: offsets never fall, and the last step ends where the log does."""
    before = dict.fromkeys(logged.ends, 0)
    for step, next_offsets in read_journal(paths.journal, 0):
        for partition, offset in next_offsets.items():
            verdict.add("learned_twice", before[partition] - offset, f"step {step} went back in {partition}")
            before[partition] = offset
    for partition, end in logged.ends.items():
        what = "labels_lost" if partition.topic == labels_topic else "samples_lost"
        verdict.add(what, end - before[partition], f"no step has the end of {partition}")


def _check_accounts(
    logged: Logged, checkpoint: Checkpoint, ledger: dict[str, int], verdict: Verdict, samples_topic: str
) -> None:
    """Totals, against those of the log."""
    accounts = checkpoint.extra["accounts"]
    repeated = [
        earlier.class_index != later.class_index
        for labels in logged.labels.values()
        for earlier, later in itertools.pairwise(labels)
    ]
    joined = logged.labels.keys() & logged.samples.keys()
    samples_lost = sum(position.topic == samples_topic for position in logged.trimmed.lost)
    wanted: list[tuple[str, int, int]] = [
        ("samples_read", accounts["samples_read"], logged.sample_records),
        ("samples_learned", accounts["samples_learned"], len(logged.samples)),
        ("samples_dead_lettered", accounts["samples_dead_lettered"], len(logged.unreadable)),
        ("samples_trimmed", accounts["samples_trimmed"], samples_lost),
        ("labels_trimmed", accounts["labels_trimmed"], len(logged.trimmed.lost) - samples_lost),
        ("labels_read", accounts["labels_read"], logged.label_records),
        ("ledger.read", ledger["read"], logged.label_records),
        ("ledger.samples_read", ledger["samples_read"], len(logged.samples)),
        ("ledger.joined", ledger["joined"] + ledger["expired"], len(joined)),
        ("ledger.trained", ledger["trained"], len(joined)),
        ("ledger.waiting", ledger["waiting"], len(logged.labels.keys() - logged.samples.keys())),
        ("ledger.duplicate", ledger["duplicate"], len(repeated) - sum(repeated)),
        ("ledger.corrected", ledger["corrected"], sum(repeated)),
    ]
    for name, found, right in wanted:
        lost = "labels_lost" if name.startswith(("labels", "ledger")) else "samples_lost"
        verdict.add(lost, right - found, f"{name} is {found}, the log has {right}")
        verdict.add("learned_twice", found - right, f"{name} is {found}, the log has {right}")


def _check_labels(logged: Logged, view: LedgerView, last_step: int, verdict: Verdict) -> None:
    """Of each sample: known, and its label the one that counts, learned."""
    with closing(view):
        for sample_id, position in logged.samples.items():
            status = view.get(sample_id)
            same = status is not None and status.sample_position == position
            verdict.add("samples_lost", not same, f"{sample_id} at {position} is known as {status}")
        for sample_id, labels in logged.labels.items():
            status, sample = view.get(sample_id), logged.samples.get(sample_id)
            taken = sample is not None and sample.offset < logged.trimmed.beginnings.get(sample.topic_partition, 0)
            told = f"{sample_id} at {sample}: the log says {labels[-1]}, the ledger {status}"
            good = _is_learned(status, labels, last_step, known=sample is not None, may_expire=taken)
            verdict.add("labels_lost", not good, told)


def _is_learned(
    status: LabelStatus | None, labels: list[Label], last_step: int, *, known: bool, may_expire: bool
) -> bool:
    """The label that counts is learned; where retention took the sample's payload before it came, it may be expired."""
    last = labels[-1]
    if status is None or (status.class_index, status.label_position) != (last.class_index, last.position):
        return False
    if not known:
        return status.state is LabelState.WAITING
    if may_expire and status.state is LabelState.EXPIRED:
        return True
    return 1 <= (status.first_trained_step or NEVER) <= last_step


def differences(config: Config, other: Config, trimmed: Trimmed | None = None) -> list[str]:
    """In what two learners of the same log ended apart: the name of each array, account, offset or label."""
    a, b = (load_newest(StatePaths(each.state.dir).checkpoints) for each in (config, other))
    assert a is not None, config.state.dir
    assert b is not None, other.state.dir
    found = [
        f"{name}: {left!r:.200} and {right!r:.200}"
        for name, left, right in (
            ("step", a.step, b.step),
            ("next_offsets", a.next_offsets, b.next_offsets),
            ("extra", a.extra, b.extra),
            ("arrays", sorted(a.arrays), sorted(b.arrays)),
        )
        if left != right
    ]
    found += [name for name in a.arrays.keys() & b.arrays.keys() if _bits(a.arrays[name]) != _bits(b.arrays[name])]
    logged, schema = read_log(config, trimmed), config.schema_.build()
    with (
        closing(LedgerView(StatePaths(config.state.dir).store, schema)) as one,
        closing(LedgerView(StatePaths(other.state.dir).store, schema)) as two,
    ):
        ids = logged.samples.keys() | logged.labels.keys()
        found += [f"label of {name}" for name in sorted(ids) if one.get(name) != two.get(name)]
    return found[:_MOST_TOLD]


def _bits(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, array.tobytes()
