"""Audits a learner: recomputes from the log alone what it must have learned, and compares with its state.

Shares only the codec with the learner. Assumes corrections = "last" and horizons that never expire. Records that
retention trimmed before they were learned must be counted as trimmed; for all others:

    each sample id is learned once; its further records count as duplicates; undecodable records are dead letters
    each label record is counted once; the last label of a sample, by log time and position, is learned
    each record is in exactly one step: the journal's offsets never fall, start at the log's beginning, reach its end
    each acknowledgement that a producer noted is in the log, at its position, with its content
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from harness.retention import Trimmed, records_of
from streamlearn.app.log import make_codec, open_log
from streamlearn.config import Config
from streamlearn.errors import RecordError, SkippedError
from streamlearn.ledger import LabelState, LabelStatus
from streamlearn.ledger.view import LedgerView
from streamlearn.log.base import Log
from streamlearn.log.dead_letters import read_dead_letter
from streamlearn.records import Label, Offsets, Position, Record, Sample
from streamlearn.state.checkpoint import Checkpoint, load_newest
from streamlearn.state.journal import read_journal
from streamlearn.state.paths import StatePaths
from streamlearn.state.status import read_status

NEVER = -1
_MOST_PROBLEMS = 20


@dataclass
class Logged:
    """What a log holds."""

    ends: Offsets = field(default_factory=dict)
    samples: dict[str, Position] = field(default_factory=dict)
    """Position of the first record of each id."""
    sample_records: int = 0
    labels: dict[str, list[Label]] = field(default_factory=lambda: defaultdict(list))
    """All label records by sample id; the last one counts."""
    unreadable: set[str] = field(default_factory=set)
    dead_letters: Counter[str] = field(default_factory=Counter)
    """Number of dead letters by the position of the bad record."""
    tombstones: Counter[bool] = field(default_factory=Counter)
    """Records that have nothing to learn, of samples (True) and of labels."""
    everything: dict[Position, tuple[str, int]] = field(default_factory=dict)
    """Id and class (-1 for a sample) of each decodable record, including lost ones."""
    trimmed: Trimmed = field(default_factory=Trimmed)

    @property
    def label_records(self) -> int:
        """Number of decodable label records."""
        return sum(map(len, self.labels.values()))


def read_log(config: Config, trimmed: Trimmed | None = None) -> Logged:
    """Read all samples, labels and dead letters, including those that retention trimmed."""
    source, codec, found = config.source, make_codec(config), Logged(trimmed=trimmed or Trimmed())
    lost = found.trimmed.lost
    with closing(open_log(config)) as log:
        found.ends = {tp: end for topic in source.topics for tp, end in log.end_offsets(topic).items()}
        for record in itertools.chain.from_iterable(_records(log, topic, found.trimmed) for topic in source.topics):
            position, is_sample = record.position, record.position.topic in source.samples.topics
            found.sample_records += is_sample and position not in lost
            try:
                item = codec.decode_sample(record) if is_sample else codec.labels.decode(record)
            except SkippedError:
                found.tombstones[is_sample] += position not in lost
                continue
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
        for record in _records(log, config.log.dead_letters, found.trimmed):
            found.dead_letters[str(read_dead_letter(record).record.position)] += 1
    for of_one in found.labels.values():
        of_one.sort(key=lambda label: (label.timestamp_s, label.position))
    return found


def _records(log: Log, topic: str, trimmed: Trimmed) -> Iterator[Record]:
    beginnings = log.beginning_offsets(topic)
    for partition, end in sorted(log.end_offsets(topic).items()):
        taken = trimmed.records[partition]
        assert len(taken) >= beginnings[partition], f"{partition} was trimmed, and its records are unknown"
        yield from taken
        yield from records_of(log, partition, len(taken), end)


@dataclass
class Audit:
    """The result: everything is right if all counts except `acknowledged` are 0."""

    acknowledged: int = 0
    """Notes of producers that were checked."""
    labels_lost: int = 0
    """Labels that are acknowledged but not in the log, or in the log but not learned as the log says."""
    samples_lost: int = 0
    learned_twice: int = 0
    """Records, samples or labels that were counted or learned more often than the log holds them."""
    dead_letters_lost: int = 0
    dead_letters_twice: int = 0
    """Allowed: a dead letter is written at least once."""
    problems: list[str] = field(default_factory=list)
    """Descriptions of the first problems."""

    @property
    def good(self) -> bool:
        """Nothing was lost, nothing was learned twice."""
        return not (self.labels_lost or self.samples_lost or self.learned_twice or self.dead_letters_lost)

    def add(self, what: str, count: int, description: str) -> None:
        """Add `count` problems of the kind `what`."""
        if count > 0:
            setattr(self, what, getattr(self, what) + count)
            if len(self.problems) < _MOST_PROBLEMS:
                self.problems.append(f"{what} {count}: {description}")

    def include(self, other: Audit) -> None:
        """Add the problems of another audit."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


def verify(config: Config, notes: Iterable[Path], trimmed: Trimmed | None = None) -> Audit:
    """Compare the state folder of a learner that has read everything with the log."""
    logged, audit, paths = read_log(config, trimmed), Audit(), StatePaths(config.state.dir)
    _check_notes(logged, notes, audit, config)
    _check_journal(logged, paths, audit, config.source.labels.topic)
    checkpoint, status = load_newest(paths.checkpoints), read_status(paths.heartbeat)
    assert checkpoint is not None, "there is no checkpoint"
    assert status is not None, "there is no heartbeat"
    _check_accounts(logged, checkpoint, status["ledger"], audit, config.source.samples.topics)
    _check_labels(logged, LedgerView(paths.store, config.schema_.build()), checkpoint.step, audit)
    audit.add("dead_letters_lost", len(logged.unreadable - logged.dead_letters.keys()), "they have no dead letter")
    good = {str(position) for position in logged.everything}
    audit.add("learned_twice", len(logged.dead_letters.keys() & good), "dead letters of valid records")
    audit.dead_letters_twice = sum(count - 1 for count in logged.dead_letters.values())
    return audit


def _check_notes(logged: Logged, notes: Iterable[Path], audit: Audit, config: Config) -> None:
    """Each acknowledged record is in the log as it was sent, or was until retention trimmed it."""
    for line in whole_lines(notes):
        topic, partition, offset, sample_id, class_index = line.split(" ")
        there = logged.everything.get(Position(topic, int(partition), int(offset)))
        audit.acknowledged += 1
        lost = "labels_lost" if topic == config.source.labels.topic else "samples_lost"
        same = there == (sample_id, int(class_index))
        audit.add(lost, not same, f"{line} was acknowledged; the log holds {there}")


def whole_lines(notes: Iterable[Path]) -> Iterator[str]:
    """Whole lines of the notes; the last line of a killed producer may be torn."""
    for path in notes:
        text = path.read_text() if path.exists() else ""
        yield from text[: text.rfind("\n") + 1].splitlines()


def _check_journal(logged: Logged, paths: StatePaths, audit: Audit, labels_topic: str) -> None:
    """Every record is in one step: offsets never fall, and the last step ends at the end of the log."""
    before = dict.fromkeys(logged.ends, 0)
    for step, next_offsets in read_journal(paths.journal, 0):
        for partition, offset in next_offsets.items():
            audit.add("learned_twice", before[partition] - offset, f"step {step} went back in {partition}")
            before[partition] = offset
    for partition, end in logged.ends.items():
        what = "labels_lost" if partition.topic == labels_topic else "samples_lost"
        audit.add(what, end - before[partition], f"no step reaches the end of {partition}")


def _check_accounts(
    logged: Logged, checkpoint: Checkpoint, ledger: dict[str, int], audit: Audit, sample_topics: Collection[str]
) -> None:
    """Compare the totals of the checkpoint and the ledger with the log."""
    accounts = checkpoint.extra["accounts"]
    repeated = [
        earlier.class_index != later.class_index
        for labels in logged.labels.values()
        for earlier, later in itertools.pairwise(labels)
    ]
    joined = logged.labels.keys() & logged.samples.keys()
    samples_lost = sum(position.topic in sample_topics for position in logged.trimmed.lost)
    expected: list[tuple[str, int, int]] = [
        ("samples_read", accounts["samples_read"], logged.sample_records),
        ("samples_learned", accounts["samples_learned"], len(logged.samples)),
        ("samples_dead_lettered", accounts["samples_dead_lettered"], len(logged.unreadable)),
        ("samples_trimmed", accounts["samples_trimmed"], samples_lost),
        ("labels_trimmed", accounts["labels_trimmed"], len(logged.trimmed.lost) - samples_lost),
        ("samples_tombstone", accounts["samples_tombstone"], logged.tombstones[True]),
        ("labels_tombstone", accounts["labels_tombstone"], logged.tombstones[False]),
        ("labels_read", accounts["labels_read"], logged.label_records + logged.tombstones[False]),
        ("ledger.read", ledger["read"], logged.label_records),
        ("ledger.samples_read", ledger["samples_read"], len(logged.samples)),
        ("ledger.joined", ledger["joined"] + ledger["expired"], len(joined)),
        ("ledger.trained", ledger["trained"], len(joined)),
        ("ledger.waiting", ledger["waiting"], len(logged.labels.keys() - logged.samples.keys())),
        ("ledger.duplicate", ledger["duplicate"], len(repeated) - sum(repeated)),
        ("ledger.corrected", ledger["corrected"], sum(repeated)),
    ]
    for name, found, right in expected:
        lost = "labels_lost" if name.startswith(("labels", "ledger")) else "samples_lost"
        audit.add(lost, right - found, f"{name} is {found}, the log has {right}")
        audit.add("learned_twice", found - right, f"{name} is {found}, the log has {right}")


def _check_labels(logged: Logged, view: LedgerView, last_step: int, audit: Audit) -> None:
    """Each sample is known to the ledger, and the label that counts is learned."""
    with closing(view):
        for sample_id, position in logged.samples.items():
            status = view.get(sample_id)
            same = status is not None and status.sample_position == position
            audit.add("samples_lost", not same, f"{sample_id} at {position} is known as {status}")
        for sample_id, labels in logged.labels.items():
            status, sample = view.get(sample_id), logged.samples.get(sample_id)
            taken = sample is not None and sample.offset < logged.trimmed.beginnings.get(sample.topic_partition, 0)
            problem = f"{sample_id} at {sample}: the log says {labels[-1]}, the ledger {status}"
            good = _is_learned(status, labels, last_step, known=sample is not None, may_expire=taken)
            audit.add("labels_lost", not good, problem)


def _is_learned(
    status: LabelStatus | None, labels: list[Label], last_step: int, *, known: bool, may_expire: bool
) -> bool:
    """Whether the label that counts is learned; it may be expired if retention trimmed the payload of its sample."""
    last = labels[-1]
    if status is None or (status.class_index, status.label_position) != (last.class_index, last.position):
        return False
    if not known:
        return status.state is LabelState.WAITING
    if may_expire and status.state is LabelState.EXPIRED:
        return True
    return 1 <= (status.first_trained_step or NEVER) <= last_step


def differences(config: Config, other: Config, trimmed: Trimmed | None = None) -> list[str]:
    """Differences between two learners of the same log: names of arrays, accounts, offsets and labels."""
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
    return found[:_MOST_PROBLEMS]


def _bits(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, array.tobytes()
