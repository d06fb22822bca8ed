"""The container files, checked by the tools that read them: hadolint, the compose schema, promtool, our config.

No container engine is needed. Tests with an engine are manual: deploy/README.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamlearn.config import load_config
from streamlearn.errors import ConfigError
from streamlearn.metrics import LEARNER_METRICS, PREFIX, SCORER_METRICS, SERVER_METRICS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONTAINER_CONFIG = DEPLOY / "streamlearn.container.toml"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
RULES: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]


def tool(name: str) -> str:
    """Path of a tool next to this Python or on PATH; skips the test if there is none."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def check(*command: str | Path) -> None:
    """Run a checker; its output is the message of the failure."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, f"{command[0]}:\n{done.stdout}{done.stderr}"


def environment_of(service: str) -> Mapping[str, str]:
    """Environment of a service without variables of the user: names without a value are left out."""
    variables = SERVICES[service]["environment"]
    return {name: str(value) for name, value in variables.items() if value is not None}


class TestImage:
    def test_the_dockerfile_passes_hadolint(self) -> None:
        """With all rules enabled."""
        assert "hadolint" not in (DEPLOY / "Dockerfile").read_text()

        check(tool("hadolint"), DEPLOY / "Dockerfile")

    def test_the_program_runs_as_a_non_root_user_and_receives_signals(self) -> None:
        """The user is a number, since Kubernetes cannot check a name; the entry point has no shell."""
        final = (DEPLOY / "Dockerfile").read_text().rpartition("\nFROM ")[2]

        assert re.search(r"^USER 10001:10001$", final, re.M)
        assert re.search(r'^ENTRYPOINT \["streamlearn"\]$', final, re.M)
        assert re.search(r'^CMD \["run", ', final, re.M)

    def test_numpy_starts_one_thread(self) -> None:
        """A thread per core in each process could exceed the limit on processes."""
        final = (DEPLOY / "Dockerfile").read_text().rpartition("\nFROM ")[2]

        assert re.search(r"^ENV OPENBLAS_NUM_THREADS=1$", final, re.M)

    def test_the_build_context_holds_exactly_the_copied_files(self) -> None:
        """.dockerignore allows the sources of COPY, and nothing else."""
        copied = {
            source.removeprefix("./")
            for line in re.findall(r"^COPY (?!--from)(.*)$", (DEPLOY / "Dockerfile").read_text(), re.M)
            for source in line.split()[:-1]
        }

        lines = (ROOT / ".dockerignore").read_text().splitlines()

        assert "*" in lines
        assert {line[1:] for line in lines if line.startswith("!")} == copied

    def test_the_health_check_uses_the_port_of_the_config(self) -> None:
        """It is the published port."""
        port = load_config(CONTAINER_CONFIG, environ={"STREAMLEARN_SERVE__TOKEN": "t"}).serve.port

        asked = re.search(r"HTTPConnection\('127\.0\.0\.1', (\d+)", (DEPLOY / "Dockerfile").read_text())

        assert asked is not None
        assert int(asked[1]) == port
        assert SERVICES["streamlearn"]["ports"][0].endswith(f":{port}")


class TestConfigInTheContainer:
    def test_the_image_refuses_to_start_without_a_token(self) -> None:
        """`docker run -p 8080:8080` publishes the port on all interfaces."""
        with pytest.raises(ConfigError, match="STREAMLEARN_SERVE__TOKEN"):
            load_config(CONTAINER_CONFIG, environ={})

    @pytest.mark.parametrize("service", ["streamlearn", "simulate"])
    def test_the_environment_of_compose_is_a_valid_config_for_kafka(self, service: str) -> None:
        """Every STREAMLEARN_ variable is a setting, and the broker is that of compose."""
        config = load_config(CONTAINER_CONFIG, environ=environment_of(service))

        broker = SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
        assert config.log.kind == "kafka"
        assert f"CONTAINERS://{config.log.kafka.bootstrap_servers}," in broker

    def test_state_is_on_the_volume(self) -> None:
        """A new container resumes from it."""
        config = load_config(CONTAINER_CONFIG, environ=environment_of("streamlearn"))

        assert config.state.dir.is_relative_to("/var/lib/streamlearn")
        assert "state:/var/lib/streamlearn" in SERVICES["streamlearn"]["volumes"]

    def test_the_stop_grace_period_exceeds_the_shutdown_time(self) -> None:
        """At least 1.5 times run.shutdown_s."""
        config = load_config(CONTAINER_CONFIG, environ=environment_of("streamlearn"))

        assert int(SERVICES["streamlearn"]["stop_grace_period"].removesuffix("s")) >= 1.5 * config.run.shutdown_s


class TestCompose:
    def test_the_file_obeys_the_compose_specification(self) -> None:
        """The published schema finds misspelt keys."""
        check(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml")

    def test_every_port_is_published_on_loopback_only(self) -> None:
        """API, broker and Prometheus."""
        published = [port for service in SERVICES.values() for port in service.get("ports", [])]

        assert len(published) == 3
        assert all(port.startswith("127.0.0.1:") for port in published)

    @pytest.mark.parametrize("service", sorted(SERVICES))
    def test_no_service_has_privileges(self, service: str) -> None:
        """No capabilities, no new privileges; our services have a read-only file system.

        A read-only service has no config with inline content: compose would not start it.
        """
        settings = SERVICES[service]
        written = [given for given in settings.get("configs", []) if "file" not in COMPOSE["configs"][given["source"]]]

        assert settings["cap_drop"] == ["ALL"]
        assert settings["security_opt"] == ["no-new-privileges:true"]
        assert settings.get("read_only", False) is (service in ("streamlearn", "simulate"))
        assert not (settings.get("read_only") and written)

    @pytest.mark.parametrize("service", sorted(SERVICES))
    def test_every_service_has_resource_limits(self, service: str) -> None:
        """Memory, processes, and the size of each tmpfs."""
        settings = SERVICES[service]

        assert re.search(r"\d+g", settings["mem_limit"])
        assert 0 < settings["pids_limit"] <= 1024
        assert all(":size=" in mount for mount in settings.get("tmpfs", []))

    @pytest.mark.parametrize("service", ["streamlearn", "simulate"])
    def test_our_services_run_as_the_user_of_the_image(self, service: str) -> None:
        """Even with another image."""
        assert SERVICES[service]["user"] == "10001:10001"


class TestSecrets:
    def test_the_file_obeys_the_compose_specification(self) -> None:
        """As docker-compose.yml."""
        check(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.secrets.yml")

    def test_each_role_gets_its_token_from_a_file(self, tmp_path: Path) -> None:
        """With both compose files and mounted secrets the config has four tokens; none is in the environment."""
        secrets = yaml.safe_load((DEPLOY / "compose.secrets.yml").read_text())
        service = secrets["services"]["streamlearn"]
        environ = {**environment_of("streamlearn"), **service["environment"]}
        mounted = {name: value for name, value in environ.items() if value.startswith("file:/run/secrets/")}
        for name, value in mounted.items():
            file = tmp_path / Path(value).name
            file.write_text(f"secret of {file.name}\n")
            environ[name] = f"file:{file}"

        serve = load_config(CONTAINER_CONFIG, environ=environ).serve

        assert (
            sorted(service["secrets"]) == sorted(secrets["secrets"]) == sorted(Path(v).name for v in mounted.values())
        )
        assert not serve.insecure
        tokens = {name: getattr(serve, name) for name in service["secrets"]}
        assert {name: token.get_secret_value() for name, token in tokens.items()} == {
            name: f"secret of {name}" for name in tokens
        }


class TestPrometheus:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """The folder of Prometheus as mounted by compose, with a token."""
        shutil.copy(DEPLOY / "prometheus.yml", tmp_path)
        shutil.copy(DEPLOY / "alerts.yml", tmp_path)
        (tmp_path / "token").write_text("none")
        return tmp_path

    def test_promtool_accepts_the_config_and_the_rules(self, folder: Path) -> None:
        """The config and the expressions of all rules parse."""
        check(tool("promtool"), "check", "config", "--lint-fatal", folder / "prometheus.yml")

    def test_alerts_use_only_exported_metrics(self) -> None:
        """Renaming a metric would silence its alert."""
        exported = {PREFIX + metric.name for metric in (*LEARNER_METRICS, *SERVER_METRICS, *SCORER_METRICS)}

        named = {
            name.removesuffix("_count")
            for rule in RULES
            for name in re.findall(rf"\b{PREFIX}\w+", rule["expr"] + str(rule["annotations"]))
        }

        assert named
        assert named <= exported

    def test_alerts_fire_exactly_in_their_stories(self, folder: Path) -> None:
        """Tested by promtool on the series of each story at the end of this file."""
        names = [rule["alert"] for rule in RULES]
        (folder / "stories.yml").write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": stories(names)}))

        assert {name for fired in STORIES.values() for name in fired[1]} == set(names), "an alert without a story"
        check(tool("promtool"), "test", "rules", folder / "stories.yml")


UP = 'up{job="streamlearn", instance="a"}'
STEPS = 'streamlearn_steps_total{instance="a", process="learner"}'
LAST_STEP = 'streamlearn_last_step_timestamp_seconds{instance="a", process="learner"}'
LAG = 'streamlearn_consumer_lag_records{instance="a", process="learner", topic="samples", partition="0"}'
SCORER_LAG = 'streamlearn_scorer_lag_records{instance="a", process="scorer-0", topic="samples", partition="0"}'
LOG = 'streamlearn_log_available{instance="a", process="learner"}'
CHECKPOINT = 'streamlearn_checkpoint_last_success_timestamp_seconds{instance="a", process="learner"}'
MODEL = 'streamlearn_model_timestamp_seconds{instance="a", process="server-0"}'
ACCURACY = (
    'streamlearn_prequential_accuracy_ratio{instance="a", process="learner", network="teacher", window="windowed"}'
)
STARTED = 'process_start_time_seconds{job="streamlearn", instance="a", process="learner"}'
SKIPPED = 'streamlearn_steps_skipped_total{instance="a", process="learner"}'
READ = 'streamlearn_records_read_total{instance="a", process="learner", topic="samples"}'
DEAD = 'streamlearn_dead_letters_total{instance="a", process="learner", reason="bad_shape"}'
THINNED = 'streamlearn_records_total{instance="a", process="learner", topic="samples", outcome="thinned"}'
TRIMMED = 'streamlearn_records_total{instance="a", process="learner", topic="samples", outcome="trimmed"}'
REQUESTS = 'streamlearn_http_request_duration_seconds_count{{instance="a", route="{}", status="{}"}}'
PREDICT_OK, PREDICT_503 = REQUESTS.format("/predict", "200"), REQUESTS.format("/predict", "503")
READY_503 = REQUESTS.format("/health/ready", "503")
PINNED = 'streamlearn_model_pinned{instance="a", process="server-0"}'
FROZEN = 'streamlearn_guard_frozen{instance="a", process="learner"}'
ACTED = 'streamlearn_guard_actions_total{{instance="a", process="learner", action="{}"}}'
DRIFT = 'streamlearn_drift_alarms_total{instance="a", process="learner", source="error"}'
REJECTED = 'streamlearn_rejected_total{instance="a", process="server-0", reason="queue_full"}'

# One sample per minute for an hour. "0+60x60": from 0, plus 60 per minute; "1x60": always 1. The clock starts at 0.
STORIES: dict[str, tuple[dict[str, str], list[str]]] = {
    "everything works": (
        {
            UP: "1x60",
            'streamlearn_scrape_failed{instance="a", target="learner"}': "0x60",
            STEPS: "0+600x60",
            LAST_STEP: "0+60x60",
            LAG: "20000x60",
            LOG: "1x60",
            CHECKPOINT: "0+60x60",
            MODEL: "0+60x60",
            PINNED: "0x60",
            FROZEN: "0x52 1x5 0x10",
            ACTED.format("keep_good"): "0+1x60",
            ACTED.format("roll_back"): "0x60",
            DRIFT: "1x60",
            ACCURACY: "0.9x60",
            SKIPPED: "0x60",
            READ: "0+6000x60",
            DEAD: "0+30x60",
            TRIMMED: "0x60",
            PREDICT_OK: "0+6000x60",
            PREDICT_503: "0+30x60",
            READY_503: "0+6000x60",
            REJECTED: "0+3x60",
        },
        [],
    ),
    "no process answers": ({UP: "0x60"}, ["StreamlearnAbsent"]),
    "no target is configured": ({STEPS: "0+600x60"}, ["StreamlearnAbsent"]),
    "the learner is dead": (
        {UP: "1x60", 'streamlearn_scrape_failed{instance="a", process="server-0", target="learner"}': "1x60"},
        ["StreamlearnLearnerAbsent"],
    ),
    "the learner hangs with records to read": (
        {UP: "1x60", LAST_STEP: "0+60x30 1800x30", LAG: "5x60"},
        ["StreamlearnLearningStalled"],
    ),
    "the learner has nothing to read": ({UP: "1x60", LAST_STEP: "0+60x30 1800x30", LAG: "0x60"}, []),
    "the log is unavailable after the learner caught up": (
        {UP: "1x60", LAST_STEP: "0+60x30 1800x30", LAG: "0x60", LOG: "1x30 0x30"},
        ["StreamlearnLogAway"],
    ),
    "the log was briefly unavailable": ({UP: "1x60", LOG: "1x50 0x3 1x7"}, []),
    "a learner restores its state": ({UP: "1x60", LOG: 60 * "NaN "}, []),
    "the learner falls behind": ({UP: "1x60", LAST_STEP: "0+60x60", LAG: "0+1000x60"}, ["StreamlearnLagGrowing"]),
    "scorers fall behind": ({UP: "1x60", SCORER_LAG: "0+1000x60"}, ["StreamlearnPredictionsLate"]),
    "a scorer catches up": ({UP: "1x60", SCORER_LAG: "0x52 5000x3 0x10"}, []),
    "a small lag grows": ({UP: "1x60", LAST_STEP: "0+60x60", LAG: "0+100x60"}, []),
    "samples are skipped under overload": ({UP: "1x60", THINNED: "0+600x60"}, ["StreamlearnSamplesThinned"]),
    "some samples were skipped earlier": ({UP: "1x60", THINNED: "0x10 600x50"}, []),
    "the learner catches up": ({UP: "1x60", LAST_STEP: "0+60x60", LAG: "200000-1000x60"}, []),
    "losses are not finite": ({UP: "1x60", SKIPPED: "0x50 5x10"}, ["StreamlearnNonFiniteSteps"]),
    "accuracy drops": ({UP: "1x60", ACCURACY: "0.9x35 0.5x25"}, ["StreamlearnAccuracyDropped"]),
    "accuracy drops after a restart without a value": (
        {UP: "1x60", ACCURACY: 5 * "NaN " + "0.9x30 0.5x25"},
        ["StreamlearnAccuracyDropped"],
    ),
    "there is no accuracy yet": ({UP: "1x60", ACCURACY: 60 * "NaN "}, []),
    "the learner dies every five minutes": (
        {UP: "1x60", STARTED: "0x4 300x4 600x4 900x4 1200x4 1500x4 1800x4 2100x4 2400x4 2700x4 3000x4 3300x6"},
        ["StreamlearnRestarting"],
    ),
    "two deployments": ({UP: "1x60", STARTED: "0x40 2400x10 3000x10"}, []),
    "a producer sends the wrong shape": (
        {UP: "1x60", READ: "0+6000x60", DEAD: "0+120x60"},
        ["StreamlearnRecordsDeadLettered"],
    ),
    "retention overtakes the reader": ({UP: "1x60", TRIMMED: "0x50 700x10"}, ["StreamlearnRecordsTrimmed"]),
    "a restarted learner reports losses in its first values": (
        {
            UP: "1x60",
            TRIMMED: "_x50 700x10",
            SKIPPED: "_x50 5x10",
            ACTED.format("roll_back"): "_x50 1x10",
            DRIFT: "_x50 1x10",
        },
        ["StreamlearnRecordsTrimmed", "StreamlearnNonFiniteSteps", "StreamlearnGuardActed", "StreamlearnDrift"],
    ),
    "a restarted learner has lost nothing": (
        {
            UP: "1x60",
            TRIMMED: "_x50 0x10",
            SKIPPED: "_x50 0x10",
            ACTED.format("keep_good"): "_x50 3x10",
            DRIFT: "_x50 0x10",
        },
        [],
    ),
    "a scrape failed long after a skipped step": ({UP: "1x60", SKIPPED: "5x43 stale stale stale 5x13"}, []),
    "losses of an earlier restart": ({UP: "1x60", SKIPPED: "_x10 5x50"}, []),
    "the disk is full": ({UP: "1x60", STEPS: "0+600x60", CHECKPOINT: "0+60x30 1800x30"}, ["StreamlearnCheckpointOld"]),
    "an idle learner saves nothing": ({UP: "1x60", STEPS: "600x60", CHECKPOINT: "60x60"}, []),
    "one of two servers keeps an old teacher": (
        {UP: "1x60", STEPS: "0+600x60", MODEL: "60x60", MODEL.replace("server-0", "server-1"): "0+60x60"},
        ["StreamlearnModelOld"],
    ),
    "an older teacher is pinned": ({UP: "1x60", STEPS: "0+600x60", MODEL: "60x60", PINNED: "1x60"}, []),
    "the model has collapsed and no action helps": (
        {UP: "1x60", FROZEN: "0x40 1x20"},
        ["StreamlearnPublicationFrozen"],
    ),
    "the twin was adopted": ({UP: "1x60", ACTED.format("adopt_twin"): "0x50 1x10"}, ["StreamlearnGuardActed"]),
    "the error rate has changed": ({UP: "1x60", DRIFT: "0x50 1x10"}, ["StreamlearnDrift"]),
    "appends fail": ({UP: "1x60", PREDICT_OK: "0+6000x60", PREDICT_503: "0+120x60"}, ["StreamlearnRequestsFailing"]),
    "more requests than can be answered": ({UP: "1x60", REJECTED: "0+60x60"}, ["StreamlearnRequestsRejected"]),
}


def stories(names: list[str]) -> list[dict[str, Any]]:
    """The stories as tests of promtool: at the end of the hour each alert fires or does not."""
    return [
        {
            "name": story,
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in given.items()],
            "promql_expr_test": [
                {
                    "expr": f'count by (alertname) (ALERTS{{alertname="{name}", alertstate="firing"}})',
                    "eval_time": "60m",
                    "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1}] if name in fires else [],
                }
                for name in names
            ],
        }
        for story, (given, fires) in STORIES.items()
    ]
