"""The commands as a user types them: help, errors, exit codes, the demo, and every command line of the README.

What needs no process of its own runs in this one, through `main`, so that torch is imported once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import pytest
import structlog
import typer
from support import Forked, ask, heartbeat, newest_checkpoint, start, stop, until, write_config
from typer.testing import CliRunner

from streamlearn import __version__
from streamlearn.cli import app, main
from streamlearn.config import load_config
from streamlearn.errors import ConfigError, LogUnavailableError
from streamlearn.lab.broker import SHORT_LIVED, java_command, speaks_kafka
from streamlearn.state.paths import StatePaths, state_lock
from streamlearn.state.publish import PublishedDir

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
WITH_SUBCOMMANDS = {**COMMANDS, **{f"models {name}": command for name, command in COMMANDS["models"].commands.items()}}
DEMO_S = 20
OF_A_DEMO = "# Written by `streamlearn demo`. Every setting there is: deploy/streamlearn.example.toml\n"

HERE, OWN_TOPIC = "tests/e2e/test_commands.py", "tests/e2e/test_own_topic.py"
HOW = {
    "make demo": f"{HERE}::test_the_demo_learns_serves_and_ends_cleanly",
    "make test": ".ci/run",
    "make check": ".ci/run",
    ".ci/run": ".ci/run",
    "curl -s http://127.0.0.1:8080/predict -H 'content-type: application/json' -d '{\"ids\": [\"digits-7\"]}'": (
        f"{HERE}::test_the_curl_commands_of_the_readme_work_with_the_demo"
    ),
    "curl -s http://127.0.0.1:8080/label -H 'content-type: application/json' "
    '-d \'{"id": "digits-7", "label": "3"}\'': f"{HERE}::test_the_curl_commands_of_the_readme_work_with_the_demo",
    "curl -s http://127.0.0.1:8080/metrics | grep accuracy": (
        f"{HERE}::test_the_curl_commands_of_the_readme_work_with_the_demo"
    ),
    ".venv/bin/pip install -c constraints.txt -e '.[broker,registry]'": (
        f"{HERE}::test_what_the_readme_installs_is_there"
    ),
    ".venv/bin/streamlearn init --samples transactions --labels chargebacks --bootstrap-servers 127.0.0.1:9092": (
        OWN_TOPIC
    ),
    ".venv/bin/streamlearn check --config streamlearn.toml --sample 500": OWN_TOPIC,
    "curl -s http://127.0.0.1:8080/predict -H 'content-type: application/json' "
    '-d \'{"merchant": "m17", "card_present": true}\'': OWN_TOPIC,
    ".venv/bin/streamlearn kafka": f"{HERE}::test_the_way_to_kafka_without_docker_works_as_the_readme_has_it",
    ".venv/bin/streamlearn run --config streamlearn.toml": (
        f"{HERE}::test_the_way_to_kafka_without_docker_works_as_the_readme_has_it"
    ),
    ".venv/bin/streamlearn simulate digits --config streamlearn.toml --rate 100": (
        f"{HERE}::test_the_way_to_kafka_without_docker_works_as_the_readme_has_it"
    ),
    "streamlearn evaluate digits --label-probability 0.05 --delay 500": (
        f"{HERE}::test_evaluate_runs_the_protocol_of_the_readme"
    ),
    "streamlearn predict new.csv --config FILE": (
        "tests/e2e/test_record_files.py::test_predict_answers_as_the_server_does"
    ),
    "streamlearn models pin 400": "tests/unit/test_versions.py",
    "streamlearn models unpin": "tests/unit/test_versions.py",
    "docker compose up --build": "deploy/try-container.sh",
}
"""Each command line of the README, exactly, and what runs it: a test, or a script if no test can.

`python benchmarks/NAME.py` needs no entry: it is covered by being there.
"""


class Result(NamedTuple):
    """The result of a command."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """`streamlearn` with these arguments, in this process. What it changes in the process is restored."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, threading.excepthook
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # which `main` would set, for good

    def run_it(*arguments: object) -> Result:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["streamlearn", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        root.handlers[:], threading.excepthook = handlers, hook
        shown = capfd.readouterr()
        return Result(int(ended.value.code or 0), shown.out, shown.err)

    yield run_it
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def examples(command: click.Command) -> list[list[str]]:
    """Arguments of the examples in a command's help."""
    lines = [line.strip() for line in (command.help or "").splitlines()]
    found = [shlex.split(line) for line in lines if re.match(r"([A-Z_]+=\S+ )*streamlearn ", line)]
    return [words[words.index("streamlearn") + 1 :] for words in found]


def commands_of(text: str) -> list[str]:
    """Command lines of a Markdown text: of `sh` fences, and of inline code."""
    fenced = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = [line.strip() for line in fenced.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`((?:(?:make|docker|curl|python|streamlearn|\.venv/bin/\w+) [^`]+)|\.ci/run)`", prose)
    return [line for line in [*lines, *spans] if line and not line.startswith("#")]


class TestHelp:
    @pytest.mark.parametrize("name", WITH_SUBCOMMANDS)
    def test_of_each_command_has_examples_that_work(self, name: str) -> None:
        """Exit code 0, at least one example, and each example has only options that exist."""
        command, path = WITH_SUBCOMMANDS[name], name.split()
        shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "160"})
        found = examples(command)

        assert shown.exit_code == 0
        assert "Example" in shown.output
        assert found
        for words in found:
            assert words[: len(path)] == path
            assert " ".join(words) in re.sub(r"\s+", " ", shown.output)
            command.make_context(name, words[len(path) :])

    def test_of_the_program_lists_the_commands_and_where_to_start(self, run: Run) -> None:
        """It starts with `streamlearn demo`."""
        shown = run("--help")

        assert shown.code == 0
        assert "streamlearn demo" in shown.out
        assert all(re.search(rf"^│ {name} ", shown.out, re.MULTILINE) for name in COMMANDS)

    def test_version_prints_only_the_version(self, run: Run) -> None:
        """On one line."""
        assert run("--version") == (0, f"streamlearn {__version__}\n", "")


class TestMistakes:
    @pytest.mark.parametrize("command", ["run", "learn", "serve", "check", "inspect"])
    def test_an_unknown_setting_is_named(self, run: Run, command: str) -> None:
        """Exit code 2, with key and source, and no stack trace."""
        code, out, err = run(command, "--set", "serve.prt=8000")

        assert (code, out) == (2, "")
        assert "serve.prt: there is no such setting" in err
        assert "command line" in err
        assert "Traceback" not in err

    def test_all_wrong_settings_are_reported_at_once(self, run: Run, tmp_path: Path) -> None:
        """Of file and command line."""
        path = tmp_path / "streamlearn.toml"
        path.write_text("[serve]\nport = 99999\n[modl]\nfactory = 'mlp'\n")

        code, _, err = run("learn", "-c", path, "-s", "batch.fresh=none")

        assert code == 2
        assert all(key in err for key in ("3 settings are wrong", "serve.port", "modl", "batch.fresh", str(path)))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("learn", "--config", "nowhere.toml"), "nowhere.toml: No such file"),
            (("learn", "--set", "serve.port"), "expected KEY=VALUE"),
            (("demo", "--for", "soon"), "expected a time such as 60s"),
            (("demo", "--for", "-5s"), "expected a time such as 60s"),
            (("simulate", "no-such-set"), "no-such-set"),
        ],
    )
    def test_a_wrong_argument_is_one_message(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
    ) -> None:
        """Exit code 2; nothing is created."""
        monkeypatch.chdir(tmp_path)

        code, _, err = run(*arguments)

        assert code == 2
        assert message in err
        assert "Traceback" not in err
        assert list(tmp_path.iterdir()) == []

    def test_a_taken_port_ends_run_before_anything_starts(self, run: Run, tmp_path: Path) -> None:
        """Exit code 2, with the setting."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            code, _, err = run("run", "-c", write_config(tmp_path, port=port))

        assert code == 2
        assert f"serve.port = {port}" in err
        assert not (tmp_path / "state").exists()

    def test_a_taken_metrics_port_ends_the_learner_with_its_name(self, run: Run, tmp_path: Path) -> None:
        """Exit code 2, not a stack trace."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            code, _, err = run("learn", "-c", write_config(tmp_path), "-s", f"metrics.port={port}")

        assert code == 2
        assert f"metrics.port = {port}: Address already in use" in err


def test_check_reports_ok_and_exits_with_0(run: Run, tmp_path: Path) -> None:
    """One line per subject; it changes nothing."""
    config = write_config(tmp_path)

    code, out, _ = run("check", "--config", config)

    assert code == 0
    assert re.search(r"^ok +model: convnet: 1x8x8 to 10 classes", out, re.MULTILINE)
    assert not re.search(r"^error", out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == [config]


def test_evaluate_runs_the_protocol_of_the_readme(run: Run, tmp_path: Path) -> None:
    """The README's command: a table, the curves, the plot."""
    line = next(line for line in HOW if line.startswith("streamlearn evaluate "))

    code, out, _ = run(*shlex.split(line)[1:], "--out", tmp_path / "found", "-s", "learn.threads=1")

    assert code == 0
    assert re.search(r"teacher.*\d\.\d{3}", out)
    found = json.loads((tmp_path / "found" / "evaluation.json").read_text())
    assert found["curves"]
    assert (tmp_path / "found" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_check_reports_an_error_and_exits_with_1(run: Run, tmp_path: Path) -> None:
    """In the line of its subject; text with brackets is unchanged."""
    code, out, _ = run("check", "--config", write_config(tmp_path), "-s", "model.options={layers = [3]}")

    assert code == 1
    assert re.search(r"^error +model: .*layers", out, re.MULTILINE)
    assert re.search(r"^ok +port", out, re.MULTILINE)


class TestLearn:
    def test_sigterm_ends_it_with_a_checkpoint_of_the_last_step(self, run: Run, tmp_path: Path) -> None:
        """Exit code 0; checkpoint, heartbeat and published teacher have one step, which `inspect` shows.

        While it ran, a second learner on its folder ended with 3 and named it.
        """
        config = write_config(tmp_path, checkpoint_every_s=3600.0, max_age_s=0.1)
        sent = run("simulate", "digits", "--limit", 640, "--label-share", 0.2, "--config", config)
        process = start("learn", "--config", config, output=tmp_path / "learner.log")
        try:
            until(lambda: heartbeat(tmp_path).get("accounts", {}).get("samples_learned") == 640, "all to be learned")
            second = run("learn", "--config", config)
        finally:
            code = stop(process)
        state = json.loads(run("inspect", "--config", config).out)
        published = PublishedDir(StatePaths(tmp_path / "state").published).newest()
        step = heartbeat(tmp_path)["step"]

        assert sent.code == 0
        assert "640 samples" in sent.err
        assert second.code == 3
        assert f"the learner with pid {process.pid} owns this state folder" in second.err
        assert code == 0, (tmp_path / "learner.log").read_text()
        assert newest_checkpoint(tmp_path).step == step >= 20
        assert published is not None
        assert published.step == step
        assert (state["learner"]["state"], state["published"]["step"]) == ("stopped", step)
        # Whatever wrote them, also SQLite: samples and labels are not for every user of the machine.
        written = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
        assert len(written) >= 5
        assert [path for path in written if path.stat().st_mode & 0o007] == []

        code, out, _ = run("inspect", "samples", "--config", config, "--offset", 5, "--count", 2)
        assert code == 0
        assert [json.loads(line)["key"] for line in out.splitlines()] == ["digits-5", "digits-6"]


class TestRun:
    def test_children_of_a_killed_supervisor_exit(self, tmp_path: Path) -> None:
        """No process holds the port or the lock."""
        process = start("run", "--config", write_config(tmp_path), output=tmp_path / "run.log")
        try:
            until(lambda: heartbeat(tmp_path).get("state") == "learning", "a learner")
            assert len(processes_using(tmp_path)) == 3, "supervisor, learner and server"
        finally:
            process.kill()
            process.wait(10)

        until(lambda: not processes_using(tmp_path), "its children to end", 15.0)


@dataclass
class Demo:
    """A finished demo, and what a user at another terminal saw while it ran."""

    folder: Path
    url: str = ""
    output: str = ""
    code: int | None = None
    took_s: float = 0.0
    curls: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Exit status and output of each curl command of the README."""
    label: Any = None
    """The state of the label that one of them posted."""
    left: set[int] = field(default_factory=set)
    """Processes that use its folder after its end."""

    def events(self) -> list[str]:
        """Log lines of all processes. Several write to one file, so lines may be interleaved."""
        return re.findall(r'"event": "(\w+)"', (self.folder / "processes.log").read_text())


def processes_using(folder: Path) -> set[int]:
    """Processes that have a file in the folder open, such as their output."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink().is_relative_to(folder):
                found.add(int(link.parts[2]))
        except OSError:
            continue  # it has ended meanwhile
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`streamlearn demo --for 20s --port 0` in the folder of an earlier one, and the README's curl commands."""
    top = tmp_path_factory.mktemp("demo")
    done, said = Demo(top / "state"), top / "said.txt"
    done.folder.mkdir()
    (done.folder / "streamlearn.toml").write_text(OF_A_DEMO)
    (done.folder / "of-an-earlier-demo").write_text("")
    began_s = time.monotonic()
    process = start("demo", "--for", f"{DEMO_S}s", "--port", 0, "--state", done.folder, output=said)
    try:
        until(lambda: "/metrics | grep" in said.read_text() or process.poll() is not None, "curl lines", DEMO_S)
        done.url = re.findall(r"http://127\.0\.0\.1:\d+", said.read_text())[0]
        until(lambda: ask(f"{done.url}/health/ready")[0] == 200, "a served teacher", 10.0)
        for line in commands_of(README):
            if line.startswith("curl") and HOW[line] != OWN_TOPIC:
                shell = ["bash", "-o", "pipefail", "-c", line.replace("http://127.0.0.1:8080", done.url)]
                ran = subprocess.run(shell, capture_output=True, text=True, timeout=20, check=False)
                done.curls[line] = (ran.returncode, ran.stdout + ran.stderr)
        url = f"{done.url}/label/digits-7"
        until(lambda: ask(url)[1].get("first_trained_step"), "the label to be learned", 10.0)
        done.label = ask(url)[1]
    finally:
        try:
            done.code = process.wait(DEMO_S + 30.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        done.took_s = time.monotonic() - began_s
    done.left = processes_using(done.folder)
    done.output = said.read_text()
    return done


@pytest.mark.timeout(180)
def test_the_demo_learns_serves_and_ends_cleanly(demo: Demo) -> None:
    """A version is served, the model learns, it exits with 0, and no process is left."""
    lines = re.findall(r"^step (\d+) .* accuracy teacher (\S+) .* served version (\d+)$", demo.output, re.MULTILINE)
    last_step, last_accuracy, last_version = lines[-1]

    assert demo.code == 0, demo.output
    assert DEMO_S <= demo.took_s < DEMO_S + 25
    assert int(last_version) == int(last_step) >= 50
    assert float(last_accuracy) > 20.0, "percent; one in ten by chance"
    assert "Stopped cleanly. To resume: streamlearn run --config" in demo.output
    assert "Traceback" not in demo.output + (demo.folder / "processes.log").read_text()
    assert demo.left == set()


def test_every_process_of_the_demo_stops_cleanly(demo: Demo) -> None:
    """Servers and learner log it, no card is left, and the last step is in a checkpoint."""
    events = demo.events()

    assert events.count("server_stopped") == events.count("server_started") == 2
    assert events.count("learner_stopped") == events.count("learner_started") == 1
    assert "labels sent" in (demo.folder / "processes.log").read_text(), "the simulator told what it had sent"
    assert list((demo.folder / "processes").iterdir()) == []
    state = StatePaths(demo.folder)
    published = PublishedDir(state.published).newest()
    assert published is not None
    assert sorted(state.checkpoints.iterdir())[-1].name.endswith(f"{published.step:012d}.ckpt")


def test_a_demo_replaces_its_folder(demo: Demo) -> None:
    """If it is a demo's."""
    assert not (demo.folder / "of-an-earlier-demo").exists()
    assert load_config(demo.folder / "streamlearn.toml", environ={}).state.dir == demo.folder


def test_the_curl_commands_of_the_readme_work_with_the_demo(demo: Demo) -> None:
    """A prediction that names its model, a label that is durable and later learned, and the accuracy in the metrics."""
    predict, label, metrics = (demo.curls[line] for line in HOW if line in demo.curls)
    answer, taken = json.loads(predict[1]), json.loads(label[1])

    assert [status for status, _ in (predict, label, metrics)] == [0, 0, 0]
    assert answer["predictions"][0]["id"] == "digits-7"
    assert answer["predictions"][0]["class"] in list("0123456789")
    assert answer["model_version"] > 0
    assert "labels" in json.dumps(taken), "the position in the labels topic"
    assert demo.label["class_index"] == 3
    assert re.search(
        r"^streamlearn_prequential_accuracy_ratio\{.*network=\"teacher\".*\} [01]", metrics[1], re.MULTILINE
    )


def test_the_demo_prints_the_curl_commands_of_the_readme(demo: Demo) -> None:
    """With its port."""
    printed = [line.strip() for line in demo.output.splitlines() if line.strip().startswith("curl")]

    assert [line.replace(demo.url, "http://127.0.0.1:8080") for line in printed] == list(demo.curls)


class TestDemoFolder:
    @pytest.mark.parametrize("name", ["thesis.txt", "streamlearn.toml"])
    def test_another_folder_is_left_alone(self, run: Run, tmp_path: Path, name: str) -> None:
        """With a file of another name, or a config written by hand."""
        (tmp_path / name).write_text("[serve]\nport = 1\n")

        code, _, err = run("demo", "--for", "1s", "--port", 0, "--state", tmp_path)

        assert code == 2
        assert "not written by a demo" in err
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_a_file_in_its_place_is_left_alone(self, run: Run, tmp_path: Path) -> None:
        """The error names it."""
        path = tmp_path / "demo-state"
        path.write_text("mine")

        code, _, err = run("demo", "--for", "1s", "--port", 0, "--state", path)

        assert code == 2
        assert str(path) in err
        assert path.read_text() == "mine"

    @pytest.mark.parametrize("owner", ["learner", "daemon"])
    def test_the_folder_of_a_running_demo_is_left_alone(
        self, run: Run, tmp_path: Path, owner: Literal["learner", "daemon"]
    ) -> None:
        """Exit code 3, also while its learner restarts."""
        (tmp_path / "streamlearn.toml").write_text(OF_A_DEMO)

        with state_lock(StatePaths(tmp_path), owner):
            code, _, err = run("demo", "--for", "1s", "--port", 0, "--state", tmp_path)

        assert code == 3
        assert "owns this state folder" in err
        assert (tmp_path / "streamlearn.toml").read_text() == OF_A_DEMO


@pytest.fixture(scope="module")
def local_kafka(kafka_broker: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Forked, Path]]:
    """`streamlearn kafka` on a free port. Skips if no broker is available."""
    assert kafka_broker
    try:
        java_command()
    except (ConfigError, LogUnavailableError) as error:
        pytest.skip(f"NO KAFKA can be started here: {error}")
    folder = tmp_path_factory.mktemp("local-kafka")
    said = folder / "said.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JDK_JAVA_OPTIONS", " ".join(SHORT_LIVED))
        process = start("kafka", "--port", 0, "--dir", folder / "kafka-data", output=said)
    try:
        until(lambda: "listens on" in said.read_text() or process.poll() is not None, "Kafka to listen", 90.0)
        (address,) = re.findall(r"listens on (\S+:\d+)", said.read_text())
        yield address, process, said
    finally:
        stop(process)


@pytest.mark.kafka
@pytest.mark.timeout(240)
def test_the_way_to_kafka_without_docker_works_as_the_readme_has_it(
    run: Run,
    local_kafka: tuple[str, Forked, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`kafka`, `run` and `simulate` with the README's streamlearn.toml, except for ports: samples sent are learned.

    At SIGTERM the daemon ends with 0, then Kafka does, and nobody listens any more.
    """
    address, kafka, said = local_kafka
    (config,) = re.findall(r"^```toml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "streamlearn.toml").write_text(config)
    (run_line,) = [line for line in HOW if "streamlearn run" in line]
    (simulate_line,) = [line for line in HOW if "streamlearn simulate" in line]
    monkeypatch.chdir(tmp_path)
    ports = {"LOG__KAFKA__BOOTSTRAP_SERVERS": address, "SERVE__PORT": "0", "METRICS__PORT": "0", "LEARN__THREADS": "1"}
    for name, value in {**ports, "SERVE__PROCESSES": "1"}.items():
        monkeypatch.setenv(f"STREAMLEARN_{name}", value)

    daemon = start(*shlex.split(run_line)[1:], output=tmp_path / "run.log")
    try:
        sent = run(*shlex.split(simulate_line)[1:], "--limit", 150)
        status = tmp_path / "streamlearn-state" / "learner.json"
        until(lambda: status.exists() and json.loads(status.read_bytes()).get("step", 0) > 0, "a step", 60.0)
        learned = until(
            lambda: (s := json.loads(status.read_bytes()))["accounts"]["samples_learned"] == 150 and s,
            "the stream",
            30.0,
        )
        address_line = re.findall(r"serving on (http://\S+)", (tmp_path / "run.log").read_text())
        until(lambda: ask(f"{address_line[0]}/health/ready")[0] == 200, "a served teacher", 30.0)
    finally:
        code = stop(daemon)

    assert sent.code == 0
    assert "150 samples" in sent.err
    assert learned["accounts"]["samples_dead_lettered"] == 0
    assert code == 0, (tmp_path / "run.log").read_text()
    host, _, port = address.rpartition(":")
    assert speaks_kafka(host, int(port))
    kafka.send_signal(signal.SIGTERM)
    assert kafka.wait(40.0) == 0
    assert "stopping Kafka" in said.read_text()
    assert not speaks_kafka(host, int(port))


class TestReadme:
    def test_every_command_is_run_by_something(self) -> None:
        """The table above has exactly the commands of the README, and names existing tests."""
        found = [line for line in commands_of(README) if not line.startswith("python benchmarks/")]

        assert set(found) - set(HOW) == set(), "in the README, but run by nothing"
        assert set(HOW) - set(found) == set(), "in the table, but not in the README"
        for how in HOW.values():
            path, _, name = how.partition("::")
            assert (ROOT / path).exists(), how
            assert not name or f"def {name}(" in (ROOT / path).read_text(), how

    def test_every_benchmark_that_it_names_is_there(self) -> None:
        """Options are ignored."""
        names = [shlex.split(line)[1] for line in commands_of(README) if line.startswith("python benchmarks/")]

        assert names
        assert [name for name in names if not (ROOT / name).exists()] == []

    @pytest.mark.parametrize("page", ["README.md", "docs/own-topic.md"])
    def test_every_option_that_it_names_is_there(self, page: str) -> None:
        """For commands of streamlearn."""
        lines = commands_of((ROOT / page).read_text())
        ours = [shlex.split(line) for line in lines if re.match(r"\S*streamlearn ", line)]

        assert len(ours) >= 3
        for _, name, *arguments in ours:
            if name == "models":
                name, *arguments = f"models {arguments[0]}", *arguments[1:]  # noqa: PLW2901
            WITH_SUBCOMMANDS[name].make_context(name, arguments)

    @pytest.mark.parametrize(
        ("target", "ends"),
        [
            ("demo", "bin/streamlearn demo"),
            ("test", "bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder"),
        ],
    )
    def test_what_make_runs_is_what_is_tested(self, target: str, ends: str) -> None:
        """The last command, after the installation."""
        # These tests may run under make themselves: its variables must not reach the one that is asked here.
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
        ask = ["make", "-n", "--no-print-directory", target]
        told = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True, env=environ)

        assert told.stdout.rstrip().endswith(ends)


def test_what_the_readme_installs_is_there() -> None:
    """The constraints file, and the extra. `make` tests the installation."""
    assert (ROOT / "constraints.txt").is_file()
    assert re.search(r"^broker = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.search(r"^registry = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
