"""`streamlearn models`, `rollback`, `promote`: an operator's choice of what is served, on the state folder alone."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog
from structlog.testing import capture_logs
from typer.testing import CliRunner

from streamlearn.app import versions
from streamlearn.app.build import model_spec
from streamlearn.cli import app
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError, StateError
from streamlearn.models.build import build
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import PIN, POINTER, PublishedDir, Publisher
from streamlearn.testing import ManualClock

SETTINGS = {"schema.shape": "[4]", "schema.classes": 3, "model.options": "{hidden = [5]}"}


def config_in(folder: Path, **overrides: object) -> Config:
    settings = {"schema.shape": [4], "schema.classes": 3, "model.options": {"hidden": [5]}, "state.dir": str(folder)}
    return load_config(environ={}, overrides={**settings, **overrides})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Versions 10, 20 and 30 were published, an hour apart, the last at 1970-01-01 02:00."""
    config, clock = config_in(tmp_path), ManualClock(0.0)
    publisher = Publisher(StatePaths(tmp_path).published, keep=9, clock=clock)
    for step in (10, 20, 30):
        arrays = {name: tensor.numpy() for name, tensor in build(model_spec(config), seed=step).state_dict().items()}
        scores = {"labels": step, "windowed_accuracy": step / 100, "ssl_gain": -0.01 if step == 30 else None}
        publisher.publish(step, arrays, {"model_spec": model_spec(config).to_json(), "scores": json.dumps(scores)})
        clock.advance(3600.0)
    return config


def published(config: Config) -> PublishedDir:
    return PublishedDir(StatePaths(config.state.dir).published)


def served(config: Config) -> int:
    (row,) = (row for row in versions.versions(config) if row["served"])
    return int(row["version"])


@pytest.fixture
def process_as_before() -> Iterator[None]:
    """Puts back what a command changes in its process: log lines, and how threads die."""
    root, hook = logging.getLogger(), threading.excepthook
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], threading.excepthook = handlers, hook
    root.setLevel(level)
    structlog.reset_defaults()


def command(config: Config, *arguments: str) -> str:
    """What a command prints."""
    sets = [f"--set={key}={value}" for key, value in {**SETTINGS, "state.dir": config.state.dir}.items()]
    result = CliRunner().invoke(app, [*arguments, *sets], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


class TestRollBack:
    def test_pins_the_version_that_is_named(self, config: Config) -> None:
        """From then on it is what servers answer with."""
        assert versions.roll_back(config, version=10).step == 10

        assert served(config) == 10

    @pytest.mark.parametrize(("pinned", "back", "reached"), [(None, 1, 20), (None, 2, 10), (20, 1, 10)])
    def test_may_say_how_far_back(self, config: Config, pinned: int | None, back: int, reached: int) -> None:
        """Counted from the version that is served, pinned or not."""
        if pinned is not None:
            versions.roll_back(config, version=pinned)

        assert versions.roll_back(config, back=back).step == reached

    @pytest.mark.parametrize(
        ("asked", "told"),
        [
            ({"version": 7}, "version 7 is not among those that are kept: 10, 20, 30"),
            ({"back": 3}, "--back 3: 2 versions are kept from before the one that is served; there are: 10, 20, 30"),
        ],
    )
    def test_to_what_is_not_there_names_what_is(self, config: Config, asked: dict[str, int], told: str) -> None:
        """And pins nothing."""
        with pytest.raises(ConfigError, match=told):
            versions.roll_back(config, **asked)

        assert served(config) == 30

    @pytest.mark.parametrize("asked", [{"version": 7}, {"back": 1}])
    def test_before_anything_is_published_is_an_error(self, tmp_path: Path, asked: dict[str, int]) -> None:
        """And makes no folder."""
        with pytest.raises(ConfigError, match="none"):
            versions.roll_back(config_in(tmp_path / "new"), **asked)

        assert list(tmp_path.iterdir()) == []

    def test_to_a_version_that_servers_would_refuse_is_refused(self, config: Config) -> None:
        """Better now than in each server's log."""
        other = config_in(config.state.dir, **{"schema.classes": 4})

        with pytest.raises(StateError, match="wanted classes 4, got 3"):
            versions.roll_back(other, version=10)

        assert served(config) == 30

    def test_works_where_the_pointer_is_broken(self, config: Config) -> None:
        """That is a night on which one wants it to."""
        (published(config).folder / POINTER).write_bytes(b"torn")

        assert versions.roll_back(config, back=1).step == 20

    def test_is_written_to_the_audit_log(self, config: Config) -> None:
        """Which version, instead of which, and who."""
        with capture_logs() as logged:
            versions.roll_back(config, version=10)
            versions.promote(config)

        assert [(line["event"], line.get("step"), line["before_step"], line["by"]) for line in logged] == [
            ("version_pinned", 10, 30, "command line"),
            ("version_unpinned", None, 10, "command line"),
        ]


class TestPromote:
    def test_has_the_newest_served_again(self, config: Config) -> None:
        """And says which that is."""
        versions.roll_back(config, version=10)

        newest = versions.promote(config)

        assert newest is not None
        assert newest.step == served(config) == 30

    def test_where_nothing_is_pinned_changes_nothing(self, config: Config, tmp_path: Path) -> None:
        """Nor where nothing was ever published; the audit log stays silent."""
        with capture_logs() as logged:
            newest = versions.promote(config)
            assert versions.promote(config_in(tmp_path / "new")) is None

        assert newest is not None
        assert newest.step == 30
        assert logged == []

    def test_mends_a_pin_that_is_broken(self, config: Config) -> None:
        """It is removed, whatever is in it."""
        versions.roll_back(config, version=10)
        (published(config).folder / PIN).write_bytes(b"torn")

        versions.promote(config)

        assert published(config).pinned() is None


@pytest.mark.usefixtures("process_as_before")
class TestCommands:
    def test_models_shows_a_table(self, config: Config) -> None:
        """Newest first, in 80 columns: when, how old, how large, how good, and which is served."""
        versions.roll_back(config, version=10)

        lines = [line.rstrip() for line in command(config, "models").splitlines()]

        assert lines[0] == "version  published (UTC)" + lines[0][24:]
        assert [line.split()[0] for line in lines[1:]] == ["30", "20", "10"]
        assert "1970-01-01 02:00:00" in lines[1]
        assert lines[1].split()[-3:] == ["0.300", "-0.010", "newest"]
        assert lines[3].split()[-3:] == ["0.100", "served,", "pinned"]
        assert max(map(len, lines)) <= 80

    def test_models_before_anything_is_published_says_so(self, tmp_path: Path) -> None:
        """Not an empty table."""
        assert command(config_in(tmp_path), "models") == "no version is published yet\n"

    def test_models_for_programs_is_json(self, config: Config) -> None:
        """With all that is known of each."""
        newest, *_ = found = json.loads(command(config, "models", "--json"))

        assert [row["version"] for row in found] == [30, 20, 10]
        assert newest["scores"] == {"labels": 30, "windowed_accuracy": 0.3, "ssl_gain": -0.01}
        assert (newest["newest"], newest["pinned"], newest["served"]) == (True, False, True)

    def test_rollback_and_promote_say_what_is_served_now(self, config: Config) -> None:
        """One line each."""
        assert command(config, "rollback", "--back", "2").startswith("version 10 is pinned")
        assert command(config, "rollback", "20").startswith("version 20 is pinned")
        assert command(config, "promote") == "servers follow the newest version: now version 30\n"

    @pytest.mark.parametrize("arguments", [[], ["10", "--back", "1"]])
    def test_rollback_wants_one_of_two(self, config: Config, arguments: list[str]) -> None:
        """A version or how far back."""
        with pytest.raises(ConfigError, match="one of the two"):
            command(config, "rollback", *arguments)


def test_sizes_and_ages_are_for_people() -> None:
    """In units of which there are at least two, or a thousandth."""
    assert [versions._duration(s) for s in (0.4, 119, 120, 7300, 180_000)] == ["0 s", "119 s", "2 min", "2 h", "2 d"]
    assert [versions._size(n) for n in (999, 1500, 2_500_000, 3.21e9)] == ["999 B", "2 kB", "2 MB", "3.2 GB"]
    assert versions._ratio(np.float64(0.5), ".3f") == "0.500"
