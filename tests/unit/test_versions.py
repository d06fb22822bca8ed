"""`streamlearn models list|pin|unpin`: an operator chooses the served version, through the state folder."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from harness.fakes import ManualClock
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
    (row,) = (row for row in versions.list_versions(config) if row["served"])
    return int(row["version"])


@pytest.fixture
def process_as_before() -> Iterator[None]:
    """Restores what a command changes in its process: logging, and the hook for errors of threads."""
    root, hook = logging.getLogger(), threading.excepthook
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], threading.excepthook = handlers, hook
    root.setLevel(level)
    structlog.reset_defaults()


def command(config: Config, *arguments: str) -> str:
    """The output of a command."""
    sets = [f"--set={key}={value}" for key, value in {**SETTINGS, "state.dir": config.state.dir}.items()]
    result = CliRunner().invoke(app, [*arguments, *sets], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


class TestPin:
    def test_servers_answer_with_the_pinned_version(self, config: Config) -> None:
        """Until it is unpinned."""
        assert versions.pin_version(config, 10).step == 10

        assert served(config) == 10

    def test_an_unknown_version_is_an_error_that_lists_the_known_ones(self, config: Config) -> None:
        """Nothing is pinned."""
        with pytest.raises(ConfigError, match="version 7 does not exist; existing versions: 10, 20, 30"):
            versions.pin_version(config, 7)

        assert served(config) == 30

    def test_before_the_first_version_it_is_an_error(self, tmp_path: Path) -> None:
        """No folder is created."""
        with pytest.raises(ConfigError, match="none"):
            versions.pin_version(config_in(tmp_path / "new"), 7)

        assert list(tmp_path.iterdir()) == []

    def test_a_version_that_servers_would_refuse_is_refused(self, config: Config) -> None:
        """Here, rather than in the log of each server."""
        other = config_in(config.state.dir, **{"schema.classes": 4})

        with pytest.raises(StateError, match="expected classes 4, got 3"):
            versions.pin_version(other, 10)

        assert served(config) == 30

    def test_works_with_a_broken_pointer(self, config: Config) -> None:
        """The pointer to the newest version is not needed."""
        (published(config).folder / POINTER).write_bytes(b"torn")

        assert versions.pin_version(config, 20).step == 20

    def test_is_written_to_the_audit_log(self, config: Config) -> None:
        """The version, the one before, and the origin."""
        with capture_logs() as logged:
            versions.pin_version(config, 10)
            versions.unpin_version(config)

        assert [(line["event"], line.get("step"), line["before_step"], line["by"]) for line in logged] == [
            ("version_pinned", 10, 30, "command line"),
            ("version_unpinned", None, 10, "command line"),
        ]


class TestUnpin:
    def test_the_newest_version_is_served_again(self, config: Config) -> None:
        """And returned."""
        versions.pin_version(config, 10)

        newest = versions.unpin_version(config)

        assert newest is not None
        assert newest.step == served(config) == 30

    def test_without_a_pin_nothing_changes(self, config: Config, tmp_path: Path) -> None:
        """Nor before the first version. Nothing is logged."""
        with capture_logs() as logged:
            newest = versions.unpin_version(config)
            assert versions.unpin_version(config_in(tmp_path / "new")) is None

        assert newest is not None
        assert newest.step == 30
        assert logged == []

    def test_removes_a_broken_pin(self, config: Config) -> None:
        """Whatever its content."""
        versions.pin_version(config, 10)
        (published(config).folder / PIN).write_bytes(b"torn")

        versions.unpin_version(config)

        assert published(config).pinned() is None


@pytest.mark.usefixtures("process_as_before")
class TestCommands:
    def test_list_shows_a_table(self, config: Config) -> None:
        """Newest first, in 80 columns: time, age, size, scores, and which version is served."""
        versions.pin_version(config, 10)

        lines = [line.rstrip() for line in command(config, "models", "list").splitlines()]

        assert lines[0] == "version  published (UTC)" + lines[0][24:]
        assert [line.split()[0] for line in lines[1:]] == ["30", "20", "10"]
        assert "1970-01-01 02:00:00" in lines[1]
        assert lines[1].split()[-3:] == ["0.300", "-0.010", "newest"]
        assert lines[3].split()[-3:] == ["0.100", "served,", "pinned"]
        assert max(map(len, lines)) <= 80

    def test_list_before_the_first_version_is_one_line(self, tmp_path: Path) -> None:
        """Not an empty table."""
        assert command(config_in(tmp_path), "models", "list") == "no version is published yet\n"

    def test_list_has_json_for_programs(self, config: Config) -> None:
        """With all fields of each version."""
        newest, *_ = found = json.loads(command(config, "models", "list", "--json"))

        assert [row["version"] for row in found] == [30, 20, 10]
        assert newest["scores"] == {"labels": 30, "windowed_accuracy": 0.3, "ssl_gain": -0.01}
        assert (newest["newest"], newest["pinned"], newest["served"]) == (True, False, True)

    def test_pin_and_unpin_print_the_served_version(self, config: Config) -> None:
        """One line each."""
        assert command(config, "models", "pin", "20").startswith("version 20 is pinned")
        assert command(config, "models", "unpin") == "servers follow the newest version: now version 30\n"


def test_sizes_and_ages_are_for_people() -> None:
    """In the largest unit of which there are at least two (ages) or one (sizes)."""
    assert [versions.duration(s) for s in (0.4, 119, 120, 7300, 180_000)] == ["0 s", "119 s", "2 min", "2 h", "2 d"]
