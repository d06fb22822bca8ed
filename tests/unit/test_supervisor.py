"""The parent process: restarts with growing delays, one deadline for all, and the exit code that stops all."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.fakes import ManualClock
from structlog.testing import capture_logs
from support import until

from streamlearn.app.signals import stop_signals
from streamlearn.app.supervisor import NICENESS, Child, Supervisor
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError, StateLockedError
from streamlearn.state.paths import StatePaths

OBEYS = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up', flush=True)"
IGNORES = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)"
STAYS = "; import time; time.sleep(60)"


def config_in(folder: Path, **overrides: object) -> Config:
    settings = {"state.dir": str(folder), "serve.port": 0, "run.shutdown_s": 0.1, "learn.threads": 1}
    return load_config(environ={}, overrides={**settings, **overrides})


def child(name: str, program: str, output: Path | None = None) -> Child:
    """A child that starts in a few milliseconds."""
    return Child(name, [sys.executable, "-I", "-S", "-c", program], output=output)


@pytest.fixture
def supervise(tmp_path: Path, clock: ManualClock) -> Iterator[Callable[..., Supervisor]]:
    """A supervisor of these children on a manual clock. The children are killed at the end."""
    made: list[Supervisor] = []

    def make(*children: Child) -> Supervisor:
        supervisor = Supervisor(config_in(tmp_path), [], clock=clock)
        supervisor.children[:] = children
        made.append(supervisor)
        return supervisor

    yield make
    for supervisor in made:
        for left in supervisor.children:
            if left.process is not None:
                left.process.kill()
                left.process.wait(10)
        supervisor.listener.close()


def die(supervisor: Supervisor, of: Child) -> None:
    """Wait for a child to exit, and let the supervisor look."""
    assert of.process is not None
    of.process.wait(10)
    supervisor.look()
    assert of.process is None


class TestRestart:
    def test_each_death_waits_twice_as_long_up_to_a_minute(
        self, supervise: Callable[..., Supervisor], clock: ManualClock
    ) -> None:
        """Not sooner; the log line has the actual delay."""
        dies = child("learner", "raise SystemExit(3)")
        supervisor = supervise(dies)
        supervisor.look()

        with capture_logs() as lines:
            for wait_s in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
                die(supervisor, dies)
                clock.advance(wait_s - 0.01)
                supervisor.look()
                assert dies.process is None, wait_s
                clock.advance(0.02)
                supervisor.look()
                assert dies.process is not None, wait_s

        assert [line["restart_s"] for line in lines] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
        assert {(line["event"], line["name"], line["exit_code"]) for line in lines} == {("process_died", "learner", 3)}

    def test_a_process_that_cannot_be_started_now_is_tried_again(
        self, supervise: Callable[..., Supervisor], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Out of processes or memory: the others continue, and it is retried."""
        dies, lives = child("learner", OBEYS + STAYS), child("server-0", OBEYS + STAYS)
        supervisor = supervise(dies, lives)
        start = Child.start

        def refused(self: Child, now_s: float) -> None:
            if self is dies:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            start(self, now_s)

        monkeypatch.setattr(Child, "start", refused)
        with capture_logs() as lines:
            supervisor.look()
            supervisor.look()

        assert [(line["event"], line["name"], line["restart_s"]) for line in lines] == [
            ("process_not_started", "learner", 0.5)
        ]
        assert lives.process is not None
        monkeypatch.setattr(Child, "start", start)
        clock.advance(0.5)
        supervisor.look()
        assert dies.process is not None

    def test_a_minute_of_running_resets_the_delay(
        self, supervise: Callable[..., Supervisor], clock: ManualClock
    ) -> None:
        """The next restart has the first delay."""
        dies = child("learner", "raise SystemExit(1)")
        supervisor = supervise(dies)
        supervisor.look()
        die(supervisor, dies)
        clock.advance(0.5)
        supervisor.look()

        assert dies.process is not None
        dies.process.wait(10)
        clock.advance(60.0)
        supervisor.look()

        assert dies.start_at_s == clock() + 0.5

    def test_the_death_of_one_leaves_the_others_alone(self, supervise: Callable[..., Supervisor]) -> None:
        """Servers continue without a learner."""
        dies, lives = child("learner", "raise SystemExit(1)"), child("server-0", OBEYS + STAYS)
        supervisor = supervise(dies, lives)
        supervisor.look()
        before = lives.process

        die(supervisor, dies)

        assert lives.process is before
        assert before is not None
        assert before.poll() is None

    def test_a_process_killed_by_a_signal_is_started_again(
        self, supervise: Callable[..., Supervisor], clock: ManualClock
    ) -> None:
        """As a new process with the same name."""
        lives = child("server-0", OBEYS + STAYS)
        supervisor = supervise(lives)
        supervisor.look()
        assert lives.process is not None
        first = lives.process.pid
        lives.process.kill()
        die(supervisor, lives)

        clock.advance(1.0)
        supervisor.look()

        assert lives.process is not None
        assert lives.process.pid != first

    def test_exit_code_2_after_a_first_run_is_a_restart(
        self, supervise: Callable[..., Supervisor], clock: ManualClock, tmp_path: Path
    ) -> None:
        """A learner ran, exited, and now finds its port taken: servers continue."""
        ran = tmp_path / "ran"
        program = (
            f"import pathlib; p = pathlib.Path({str(ran)!r}); code = 2 if p.exists() else 1; p.touch(); exit(code)"
        )
        dies, lives = Child("learner", [sys.executable, "-c", program]), child("server-0", OBEYS + STAYS)
        supervisor = supervise(dies, lives)
        supervisor.look()

        for _ in range(3):
            die(supervisor, dies)
            clock.advance(60.0)
            supervisor.look()

        assert lives.process is not None
        assert lives.process.poll() is None

    def test_a_minute_of_running_shows_that_settings_are_accepted(
        self, supervise: Callable[..., Supervisor], clock: ManualClock
    ) -> None:
        """Whatever its exit code."""
        dies = child("learner", "raise SystemExit(2)")
        supervisor = supervise(dies)
        supervisor.look()
        assert dies.process is not None
        dies.process.wait(10)

        clock.advance(60.0)
        supervisor.look()

        assert dies.has_run


class TestStop:
    def test_refused_settings_stop_everything(self, supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
        """Exit code 2 of one child stops all children; the error names it."""
        output = tmp_path / "lives.log"
        lives = child("server-0", OBEYS + STAYS, output)
        refuses = child("learner", "raise SystemExit(2)")
        supervisor = supervise(lives, refuses)
        supervisor.look()
        until(lambda: output.read_text() == "up\n", "the child to be up")

        stopping = threading.Event()
        bound = threading.Timer(8.0, stopping.set)
        bound.start()
        with pytest.raises(ConfigError, match="learner refused its settings"):
            supervisor.run(stopping)
        bound.cancel()

        assert lives.process is not None
        assert lives.process.returncode == 0, "it got SIGTERM, and time to stop"

    def test_one_deadline_holds_for_all(self, supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
        """Children that ignore SIGTERM are killed at the deadline, however many they are."""
        outputs = [tmp_path / f"{n}.log" for n in range(3)]
        programs = (OBEYS, IGNORES, IGNORES)
        names = ("learner", "server-0", "server-1")
        children = [
            child(name, program + STAYS, output) for name, program, output in zip(names, programs, outputs, strict=True)
        ]
        supervisor = supervise(*children)
        supervisor.look()
        until(lambda: all(output.read_text() == "up\n" for output in outputs), "all to be up")

        began_s = time.monotonic()
        with capture_logs() as lines:
            supervisor.stop()
        took_s = time.monotonic() - began_s

        assert [each.process.returncode for each in children if each.process] == [0, -signal.SIGKILL, -signal.SIGKILL]
        assert [(line["event"], line["name"]) for line in lines] == [
            ("process_killed", "server-0"),
            ("process_killed", "server-1"),
        ]
        assert 5.0 <= took_s < 7.0, "run.shutdown_s and five seconds more, once for all"

    def test_ctrl_c_reaches_only_the_supervisor(self, supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
        """Children have their own sessions: a terminal's SIGINT does not reach them; they get one SIGTERM."""
        output = tmp_path / "child.log"
        program = "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(9)); " + OBEYS + STAYS
        lives = child("learner", program, output)
        supervisor = supervise(lives)

        def press() -> None:
            until(lambda: output.exists() and output.read_text() == "up\n", "the child to be up")
            assert lives.process is not None
            sessions.append(os.getsid(lives.process.pid))
            os.kill(os.getpid(), signal.SIGINT)

        sessions: list[int] = []
        presser = threading.Thread(target=press)
        with stop_signals() as stopping:
            presser.start()
            supervisor.run(stopping)
        presser.join()

        assert lives.process is not None
        assert sessions == [lives.process.pid]
        assert lives.process.returncode == 0
        assert supervisor.listener.fileno() == -1, "the port is closed"

    def test_stop_does_not_start_or_wait_for_a_child_that_is_due(self, supervise: Callable[..., Supervisor]) -> None:
        """It has no process."""
        dies = child("learner", "raise SystemExit(1)")
        supervisor = supervise(dies)
        supervisor.look()
        die(supervisor, dies)

        supervisor.stop()

        assert dies.process is None


class TestChildren:
    def test_the_learner_yields_to_those_that_answer(self, supervise: Callable[..., Supervisor]) -> None:
        """Its niceness is higher, also when the supervisor has one of its own."""
        learner, server = child("learner", STAYS), child("server-0", STAYS)
        learner.yields = True
        supervise(learner, server).look()

        nice = [os.getpriority(os.PRIO_PROCESS, each.process.pid) for each in (learner, server) if each.process]
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert nice == [min(own + NICENESS, 19), own]

    def test_a_learner_and_its_servers_share_config_and_socket(self, tmp_path: Path) -> None:
        """Servers inherit the listening socket by number; the learner does not. All exit with their parent."""
        supervisor = Supervisor(config_in(tmp_path, **{"serve.processes": 2}), ["--config", "c.toml"])
        fd = supervisor.listener.fileno()
        learner, *servers = supervisor.children
        shared = ["--config", "c.toml", "--parent", str(os.getpid())]
        supervisor.listener.close()

        assert (learner.command[3:], learner.pass_fds) == (["learn", *shared], ())
        assert [each.yields for each in supervisor.children] == [True, False, False]
        assert [server.name for server in servers] == ["server-0", "server-1"]
        assert all(server.pass_fds == (fd,) for server in servers)
        assert servers[1].command[3:] == ["serve", *shared, "--name", "server-1", "--fd", str(fd)]

    def test_a_child_answers_on_the_inherited_socket(self, tmp_path: Path) -> None:
        """At the supervisor's address."""
        supervisor = Supervisor(config_in(tmp_path), [])
        fd = supervisor.listener.fileno()
        answers = f"import socket; s = socket.socket(fileno={fd}); c, _ = s.accept(); c.sendall(b'hello'); c.close()"
        supervisor.children[:] = [child("server-0", answers)]
        supervisor.children[0].pass_fds = (fd,)
        supervisor.look()

        host, port = supervisor.address.split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            said = connection.recv(16)
        supervisor.stop()

        assert said == b"hello"

    def test_output_is_appended_to_the_file(self, supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
        """Both streams; earlier content stays."""
        output = tmp_path / "processes.log"
        output.write_text("before\n")
        says = child("learner", "import sys; print('out', flush=True); print('err', file=sys.stderr)", output)

        supervise(says).look()
        assert says.process is not None
        says.process.wait(10)

        assert output.read_text() == "before\nout\nerr\n"


class TestCards:
    def test_cards_of_killed_processes_are_removed_at_start(self, tmp_path: Path) -> None:
        """Their process ids may belong to other processes now."""
        cards = StatePaths(tmp_path).processes
        cards.mkdir(parents=True)
        (cards / "server-7.json").write_text('{"pid": 1, "metrics_port": 1}')

        Supervisor(config_in(tmp_path), []).listener.close()

        assert list(cards.iterdir()) == []

    def test_a_second_daemon_of_a_folder_is_refused_and_removes_no_card(self, tmp_path: Path) -> None:
        """Even with another port."""
        first = Supervisor(config_in(tmp_path), [])
        cards = StatePaths(tmp_path).processes
        cards.mkdir(parents=True)
        (cards / "server-0.json").write_text("{}")

        with pytest.raises(StateLockedError, match=f"the daemon with pid {os.getpid()} owns"):
            Supervisor(config_in(tmp_path), [])
        kept = (cards / "server-0.json").exists()
        first.stop()
        second = Supervisor(config_in(tmp_path), [])
        second.stop()

        assert kept

    def test_a_daemon_whose_port_is_taken_removes_no_card(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The cards are those of the running daemon."""
        monkeypatch.setattr("streamlearn.app.supervisor.PORT_WAIT_S", 0.2)
        first = Supervisor(config_in(tmp_path), [])
        port = int(first.address.rpartition(":")[2])
        cards = StatePaths(tmp_path).processes
        cards.mkdir(parents=True)
        (cards / "server-0.json").write_text("{}")

        with pytest.raises(ConfigError, match=f"serve.port = {port}"):
            Supervisor(config_in(tmp_path, **{"serve.port": port}), [])
        first.listener.close()

        assert (cards / "server-0.json").exists()
