"""What a learner refuses to start from, with the way out; and which older versions it reads."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_learner
from harness.fakes import MemoryLog
from safetensors.numpy import save
from small_learner import empty_log, learn
from structlog.testing import capture_logs

from streamlearn.app.build import identity
from streamlearn.app.check import check
from streamlearn.app.learner import learn as run_learner
from streamlearn.app.log import make_codec
from streamlearn.app.startup import check_model
from streamlearn.config import Config, load_config
from streamlearn.errors import FROM_SCRATCH, CheckpointError, CheckpointFormatError, ConfigError
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport
from streamlearn.models.build import ModelSpec
from streamlearn.records import Array, NewRecord
from streamlearn.state.checkpoint import Checkpoint, load_newest, path_of
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import PublishedDir


def config_in(folder: Path, **overrides: Any) -> Config:
    return small_learner.config_in(folder, **{"batch.steps": 4, **overrides})


def more(log: MemoryLog, config: Config, count: int = 16) -> None:
    codec, rng, begin = make_codec(config), np.random.default_rng(0), len(log.records("samples"))
    for n in range(begin, begin + count):
        log.append("samples", [codec.encode_sample(f"s{n}", rng.normal(size=4).astype(np.float32))])
        log.append("labels", [codec.labels.encode(f"s{n}", n % 3)])


@pytest.fixture
def log(tmp_path: Path) -> MemoryLog:
    """A log that a learner in `tmp_path` has learned completely."""
    made = empty_log()
    config = config_in(tmp_path)
    more(made, config)
    learn(config, made)
    return made


def write_by_hand(
    folder: Path, checkpoint: Checkpoint, *, arrays: Mapping[str, Array], extra: Mapping[str, Any], format_: int = 1
) -> Path:
    """A checkpoint file as the first version wrote it: no epoch. All others are removed."""
    for path in folder.glob("*.ckpt"):
        path.unlink()
    offsets = [[tp.topic, tp.partition, offset] for tp, offset in checkpoint.next_offsets.items()]
    meta = {"step": checkpoint.step, "next_offsets": offsets, "extra": extra}
    payload = save(
        {name: np.asarray(array, order="C") for name, array in arrays.items()}, {"streamlearn": json.dumps(meta)}
    )
    path = path_of(folder, checkpoint.step)
    path.write_bytes(b"SLCKPT\x00" + bytes([format_]) + hashlib.sha256(payload).digest() + payload)
    return path


class TestOtherSettings:
    def test_are_refused_with_each_difference_and_the_way_out(self, tmp_path: Path, log: MemoryLog) -> None:
        """By the names of the settings, with both values."""
        other = config_in(
            tmp_path,
            **{
                "model.options": {"hidden": [16]},
                "learn.optimizer": "sgd",
                "schema.dtype": "uint8",
                "schema.scale": 0.5,
            },
        )

        with pytest.raises(ConfigError) as caught:
            learn(other, log)

        head, *lines, way_out = str(caught.value).splitlines()
        assert re.fullmatch(r"the checkpoint of step \d+ was made with other settings:", head)
        assert sorted(lines) == [
            '  learn.optimizer: checkpoint "adamw" → config "sgd"',
            "  model.options.hidden: checkpoint [8] → config [16]",
            '  schema.dtype: checkpoint "float32" → config "uint8"',
            "  schema.scale: checkpoint 1.0 → config 0.5",
        ]
        assert way_out == f"set them back; or {FROM_SCRATCH}"

    @pytest.mark.parametrize("method", ["supervised", "ict", "pi"])
    def test_another_method_continues_with_the_weights(self, tmp_path: Path, log: MemoryLog, method: str) -> None:
        """And back again, as the runbook has it for emergencies."""
        before = load_newest(StatePaths(tmp_path).checkpoints)
        assert before is not None
        extra = {**before.extra, "identity": before.extra["identity"] | {"method": "mean_teacher"}}
        write_by_hand(StatePaths(tmp_path).checkpoints, before, arrays=before.arrays, extra=extra)

        found = [before]
        for settings in ({"learn.method": method}, {}):
            more(log, config_in(tmp_path))
            found.append(learn(config_in(tmp_path, **settings), log))

        names = [name for name in before.arrays if name.startswith("learner.teacher.net.")]
        assert [c.step for c in found] == sorted({c.step for c in found})
        for earlier, later in itertools.pairwise(found):
            moved = max(np.abs(later.arrays[name] - earlier.arrays[name]).max() for name in names)
            assert 0.0 < moved < 0.1, "a few steps on from the weights before"

    def test_further_steps_follow_the_current_settings(self, tmp_path: Path, log: MemoryLog) -> None:
        """Even if the checkpoint was saved with many of them left."""
        before = load_newest(StatePaths(tmp_path).checkpoints)
        assert before is not None
        extra = before.extra | {"further_steps": 900}
        write_by_hand(StatePaths(tmp_path).checkpoints, before, arrays=before.arrays, extra=extra)

        assert learn(config_in(tmp_path, **{"batch.steps": 1}), log).step == before.step

    def test_an_added_or_removed_option_is_a_difference(self, tmp_path: Path, log: MemoryLog) -> None:
        """It is on one side only."""
        checkpoint = load_newest(StatePaths(tmp_path).checkpoints)
        assert checkpoint is not None

        with pytest.raises(ConfigError, match=r"model\.options\.hidden: checkpoint \[8\] → config not there"):
            check_model(config_in(tmp_path, **{"model.options": {}}), checkpoint)

    def test_classes_are_compared_by_name_and_order(self, tmp_path: Path, log: MemoryLog) -> None:
        """Swapped classes would swap the answers."""
        with pytest.raises(
            ConfigError, match=r'schema\.classes: checkpoint \["0", "1", "2"\] → config \["1", "0", "2"\]'
        ):
            learn(config_in(tmp_path, **{"schema.classes": ["1", "0", "2"]}), log)
        with pytest.raises(ConfigError, match=r'→ config \["a", "b", "c", "d"\]'):  # all of them
            learn(config_in(tmp_path, **{"schema.classes": ["a", "b", "c", "d"]}), log)

    def test_a_new_class_does_not_take_the_place_of_one_that_grew(self, tmp_path: Path) -> None:
        """`check` says so too. Under its own name it may be added, and others after it."""
        names, log = ["a", "b", "c"], empty_log()
        grow = {"labels.unknown_class": "grow", "schema.max_classes": 6}
        config = config_in(tmp_path, **grow, **{"schema.classes": names})
        more(log, config)
        log.append("labels", [NewRecord(b"s3", b"fox")])
        learn(config, log)

        with pytest.raises(ConfigError, match=r'class 3 was learned as "fox" → config "gnu"; give it this name'):
            learn(config_in(tmp_path, **grow, **{"schema.classes": [*names, "gnu"]}), log)
        learn(config_in(tmp_path, **grow, **{"schema.classes": [*names, "fox", "gnu"]}), log)

    def test_nothing_is_changed(self, tmp_path: Path, log: MemoryLog) -> None:
        """After the refusal a learner with the old settings continues."""
        config = config_in(tmp_path)
        with pytest.raises(ConfigError):
            learn(config_in(tmp_path, **{"learn.optimizer": "sgd"}), log)
        more(log, config)

        assert learn(config, log).extra["accounts"]["samples_learned"] == 32

    def test_check_reports_them_too(self, tmp_path: Path) -> None:
        """`streamlearn check` lists the same differences."""
        config = config_in(tmp_path, **{"log.kind": "embedded"})
        run_learner(config, threading.Event(), until_end=True)

        findings = check(config_in(tmp_path, **{"learn.optimizer": "sgd"}))

        assert any(f.verdict == "error" and 'learn.optimizer: checkpoint "adamw"' in f.text for f in findings)


class TestOtherVersions:
    def test_the_first_version_is_read(self, tmp_path: Path, log: MemoryLog) -> None:
        """Its checkpoints have no epoch, no shed samples and no further steps."""
        config, folder = config_in(tmp_path), StatePaths(tmp_path).checkpoints
        saved = load_newest(folder)
        assert saved is not None
        accounts = {name: count for name, count in saved.extra["accounts"].items() if name != "samples_thinned"}
        extra = {name: value for name, value in saved.extra.items() if name != "further_steps"}
        write_by_hand(folder, saved, arrays=saved.arrays, extra={**extra, "accounts": accounts})
        more(log, config)

        again = learn(config, log)

        assert again.extra["accounts"]["samples_learned"] == 32
        assert again.extra["accounts"]["samples_thinned"] == 0

    def test_one_without_an_identity_is_refused(self, tmp_path: Path, log: MemoryLog) -> None:
        """The meaning of its weights is unknown."""
        config, folder = config_in(tmp_path), StatePaths(tmp_path).checkpoints
        saved = load_newest(folder)
        assert saved is not None
        extra = {name: value for name, value in saved.extra.items() if name != "identity"}
        write_by_hand(folder, saved, arrays=saved.arrays, extra=extra)

        with pytest.raises(ConfigError, match=r"schema\.dtype: checkpoint not there → config"):
            learn(config, log)

    @pytest.mark.parametrize("group", ["board.gain.", "memory.", "guard."])
    def test_missing_arrays_are_refused_before_anything_changes(
        self, tmp_path: Path, log: MemoryLog, group: str
    ) -> None:
        """The message has the missing arrays and two ways out. The file is kept for the version that wrote it."""
        config, folder = config_in(tmp_path), StatePaths(tmp_path).checkpoints
        saved = load_newest(folder)
        assert saved is not None
        arrays = {name: array for name, array in saved.arrays.items() if not name.startswith(group)}
        path = write_by_hand(folder, saved, arrays=arrays, extra=saved.extra)
        before = path.read_bytes()

        with pytest.raises(CheckpointError, match=rf"another version.* it has no {group}.*{FROM_SCRATCH}") as caught:
            learn(config, log)

        assert "use the version that saved it" in str(caught.value)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("format_", [0, 2, 255])
    def test_another_format_is_not_taken_for_a_corrupt_file(self, tmp_path: Path, log: MemoryLog, format_: int) -> None:
        """It is refused, not set aside: falling back to an older checkpoint would silently lose progress."""
        config, folder = config_in(tmp_path), StatePaths(tmp_path).checkpoints
        saved = load_newest(folder)
        assert saved is not None
        path = write_by_hand(folder, saved, arrays=saved.arrays, extra=saved.extra, format_=format_)

        with pytest.raises(
            CheckpointFormatError, match=f"format {format_}, .* reads format 1: use the version .* or start"
        ):
            learn(config, log)

        assert sorted(folder.iterdir()) == [path]


AMOUNT, SHOP = "number", {"kind": "category", "buckets": 50}
COUNTRY = {"kind": "category", "buckets": 7}


def with_columns(folder: Path, columns: Mapping[str, Any], **overrides: Any) -> Config:
    """A small `table` network for these columns."""
    settings = small_learner.config_in(folder).model_dump(include={"batch", "state", "metrics"}, exclude_unset=True)
    tables = {**settings, "schema": {"classes": 3}, "model": {"options": {"hidden": [8]}}, "columns": columns}
    return load_config(environ={}, overrides={**tables, "learn.threads": 1, **overrides})


def more_rows(log: MemoryLog, config: Config, count: int = 40) -> None:
    """Records with both forms of a sample, by the columns and as a row; and labels, four samples later."""
    begin, width = len(log.records("samples")), config.schema_.build().shape[0]
    for n in range(begin, begin + count):
        shop, country = n % 11, n % 5
        row = [float(n % 7), 1.0, float(shop), float(country)][:width]
        fields = {"id": f"s{n}", "x": row, "amount": row[0], "shop": f"shop {shop}", "country": f"country {country}"}
        log.append("samples", [NewRecord(f"s{n}".encode(), json.dumps(fields).encode())])
        if n >= 4:
            log.append("labels", [make_codec(config).labels.encode(f"s{n - 4}", n % 3)])


class TestColumns:
    def test_a_learner_resumes_with_a_column_at_the_end(self, tmp_path: Path) -> None:
        """All other state is that before; labels of old samples find them; servers get a teacher with the column."""
        before, now = {"amount": AMOUNT, "shop": SHOP}, {"amount": AMOUNT, "shop": SHOP, "country": COUNTRY}
        log = empty_log()
        more_rows(log, with_columns(tmp_path, before))
        old = learn(with_columns(tmp_path, before), log)
        config = with_columns(tmp_path, now)
        more_rows(log, config)
        with capture_logs() as logged:
            new = learn(config, log)

        assert new.step > old.step
        assert [line["columns"] for line in logged if line["event"] == "columns_added"] == [["country"]]
        assert new.extra["accounts"]["samples_learned"] == 80
        assert new.extra["accounts"]["labels_taken"] == 76
        assert (old.arrays["memory.x"].shape[1], new.arrays["memory.x"].shape[1]) == (3, 4)
        old_rows = {row.tobytes() for row in old.arrays["memory.x"]}
        assert old_rows <= {row[:3].tobytes() for row in new.arrays["memory.x"] if row[3] == 0.0}
        published = PublishedDir(StatePaths(tmp_path).published).newest()
        assert published is not None
        assert ModelSpec.from_json(published.metadata["model_spec"]).columns == config.schema_.build().columns

    def test_a_restart_equals_no_restart(self, tmp_path: Path) -> None:
        """I3, with columns and replayed steps: stopped after some steps, and not at all."""
        columns = {"amount": AMOUNT, "shop": SHOP, "country": COUNTRY}
        configs = [with_columns(tmp_path / name, columns) for name in ("stopped", "whole")]
        log = empty_log()
        more_rows(log, configs[0], 120)
        stopping = threading.Event()

        def stop_at_five(loop: TrainingLoop, _report: StepReport) -> None:
            if loop.learner.step == 5:
                stopping.set()

        first = learn(configs[0], log, stopping=stopping, on_step=stop_at_five)
        last, whole = learn(configs[0], log), learn(configs[1], log)

        assert first.step == 5
        assert last.step == whole.step
        assert last.arrays.keys() == whole.arrays.keys()
        assert [name for name in last.arrays if not np.array_equal(last.arrays[name], whole.arrays[name])] == []

    @pytest.mark.parametrize(
        ("columns", "said"),
        [
            (
                {"amount": AMOUNT},
                'columns.shop: checkpoint {"embedding": 8, "kind": "category", "size": 50} → config not',
            ),
            ({"amount": AMOUNT, "shop": {**SHOP, "buckets": 60}}, '"size": 50} → config {"embedding": 8, "kind": "cat'),
            ({"shop": SHOP, "amount": AMOUNT}, 'columns: checkpoint ["amount", "shop"] → config ["shop", "amount"]'),
            (
                {"amount": AMOUNT, "country": COUNTRY, "shop": SHOP},
                'columns: checkpoint ["amount", "shop"] → config ["amount", "country", "shop"]',
            ),
        ],
        ids=["removed", "changed", "moved", "inserted"],
    )
    def test_other_columns_are_refused_with_the_way_out(self, tmp_path: Path, columns: Any, said: str) -> None:
        """Before anything is written."""
        checkpoint = Checkpoint(
            7, {}, {}, {"identity": identity(with_columns(tmp_path, {"amount": AMOUNT, "shop": SHOP}))}
        )

        with pytest.raises(ConfigError) as caught:
            check_model(with_columns(tmp_path, columns), checkpoint)

        assert said in str(caught.value)
        assert "leave the column of a field that no longer comes" in str(caught.value)

    @pytest.mark.parametrize(
        ("before", "now", "said"),
        [
            ({"amount": AMOUNT}, {"amount": AMOUNT, "paid": "number"}, "columns added: paid, which only a network"),
            ({}, {"amount": AMOUNT, "paid": "number"}, "columns added: amount, paid, which only a network"),
        ],
    )
    def test_another_network_takes_no_column(self, tmp_path: Path, before: Any, now: Any, said: str) -> None:
        """Its inputs are not known."""
        saved = config_in(tmp_path) if not before else with_columns(tmp_path, before, **{"model.factory": "mlp"})
        checkpoint = Checkpoint(7, {}, {}, {"identity": identity(saved)})

        with pytest.raises(ConfigError, match=said):
            check_model(with_columns(tmp_path, now, **{"model.factory": "mlp"}), checkpoint)
