"""The log that the config names: its topics, and when it is created or contacted."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.fakes import MemoryLog
from structlog.testing import capture_logs

from streamlearn.app.log import log_exists, make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.log.kafka import KafkaLog


def config(**overrides: object) -> Config:
    return load_config(environ={}, overrides=overrides)


def counts(log: MemoryLog) -> list[int]:
    return [log.partition_count(topic) for topic in ("samples", "labels", "dead-letters")]


class TestTopics:
    def test_missing_topics_are_created(self) -> None:
        """Samples and labels have `log.partitions` partitions, dead letters one."""
        log = MemoryLog()

        make_topics(log, config(**{"log.partitions": 4}))

        assert counts(log) == [4, 4, 1]

    @pytest.mark.parametrize(("existing", "expected"), [("samples", [3, 3, 1]), ("labels", [3, 3, 1])])
    def test_a_missing_topic_gets_the_partitions_of_the_existing_one(self, existing: str, expected: list[int]) -> None:
        """Whatever the config says."""
        log = MemoryLog()
        log.create_topics({existing: 3})

        make_topics(log, config(**{"log.partitions": 8}))

        assert counts(log) == expected

    def test_existing_topics_are_left_unchanged(self) -> None:
        """Nothing is created, and each may have any number of partitions."""
        log = MemoryLog()
        log.create_topics({"samples": 2, "labels": 3, "dead-letters": 5})

        make_topics(log, config(**{"log.partitions": 0}))

        assert counts(log) == [2, 3, 5]

    def test_missing_topics_are_an_error_if_none_may_be_created(self) -> None:
        """The message names them, and nothing is created."""
        log = MemoryLog()
        log.create_topics({"samples": 1})

        with pytest.raises(ConfigError, match=r"missing: labels, dead-letters; .*log\.partitions"):
            make_topics(log, config(**{"log.partitions": 0}))

        assert counts(log) == [1, 0, 0]

    def test_there_may_be_several_topics_of_samples(self) -> None:
        """All are created."""
        log = MemoryLog()

        make_topics(log, config(**{"source.samples.topic": ["web", "shop"], "log.partitions": 2}))

        assert [log.partition_count(topic) for topic in ("web", "shop", "labels", "dead-letters")] == [2, 2, 2, 1]

    @pytest.mark.parametrize(
        ("existing", "expected"),
        [("payments", ["payments"]), ("clicks", None), ("labels", None), ("dead-letter", None)],
    )
    def test_a_created_topic_that_may_be_a_misspelt_one_is_reported(
        self, existing: str, expected: list[str] | None
    ) -> None:
        """Else a learner waits for samples that another topic has. Topics that are only written are new at first."""
        log = MemoryLog()
        log.create_topics({existing: 1})

        with capture_logs() as logged:
            make_topics(log, config(**{"source.samples.topic": "payment"}))

        found = [line["similar"] for line in logged if line["event"] == "topic_created"]
        assert found == ([expected] if expected else [])


class TestLog:
    def test_an_embedded_log_exists_once_it_is_used(self, tmp_path: Path) -> None:
        """`log_exists` creates nothing."""
        settings = config(**{"state.dir": str(tmp_path / "state")})

        assert not log_exists(settings)
        assert list(tmp_path.iterdir()) == []
        log = open_log(settings)
        log.create_topics({"samples": 1})
        log.close()

        assert isinstance(log, EmbeddedLog)
        assert log_exists(settings)

    def test_kafka_is_not_contacted_before_the_first_use(self) -> None:
        """A process can start while the broker is down."""
        settings = config(**{"log.kind": "kafka", "log.kafka.bootstrap_servers": "127.0.0.1:1"})

        log = open_log(settings)
        log.close()

        assert isinstance(log, KafkaLog)
        assert log_exists(settings)
