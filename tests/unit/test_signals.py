"""Signals, the death of the parent, and errors in threads."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from streamlearn.app.signals import THREAD_DIED, stop_signals


class TestStopSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_the_first_signal_sets_the_event(self, number: signal.Signals) -> None:
        """Nothing is interrupted, and the handlers are restored at the end."""
        before = signal.getsignal(number)

        with stop_signals() as stopping:
            assert not stopping.is_set()
            signal.raise_signal(number)
            assert stopping.wait(10.0)

        assert signal.getsignal(number) is before

    @pytest.mark.timeout(30)
    def test_a_signal_in_the_middle_of_a_wait_stops_too(self) -> None:
        """The handler runs in the thread that waits, which may hold the lock of the event: `set` would never return."""
        with stop_signals() as stopping:
            with stopping._cond:
                signal.raise_signal(signal.SIGTERM)

            assert stopping.wait(10.0)

    def test_without_insisting_a_second_signal_has_no_effect(self) -> None:
        """Something must be stopped first."""
        with stop_signals(insist=False) as stopping:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

            assert stopping.wait(10.0)

    def test_a_second_signal_exits_immediately(self) -> None:
        """With the signal's exit code, and without cleaning up."""
        program = (
            "import signal, sys\n"
            "from streamlearn.app.signals import stop_signals\n"
            "with stop_signals():\n"
            "    try:\n"
            "        signal.raise_signal(signal.SIGTERM)\n"
            "        print('first', flush=True)\n"
            "        signal.raise_signal(signal.SIGINT)\n"
            "    finally:\n"
            "        print('cleaned up', flush=True)\n"
        )

        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)

        assert (done.returncode, done.stdout) == (128 + signal.SIGINT, b"first\n")


class TestExit:
    def test_a_child_exits_when_its_parent_is_killed(self) -> None:
        """An orphan would keep the port and the lock. Its exit closes the pipe that is read here."""
        child = (
            "import sys, time\n"
            "from streamlearn.app.signals import exit_with_parent\n"
            "exit_with_parent(int(sys.argv[1]))\n"
            "print('up', flush=True)\n"
            "time.sleep(15)\n"
            "print('lives on', flush=True)\n"
        )
        parent = (
            "import os, subprocess, sys\n"
            "subprocess.run([sys.executable, '-c', sys.argv[1], str(os.getpid())], check=False)\n"
        )
        with subprocess.Popen([sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"

            process.kill()

            assert process.stdout.read() == ""

    def test_an_error_in_any_thread_exits_the_process(self) -> None:
        """It is logged first. A process whose parent is already dead gets SIGTERM immediately."""
        program = (
            "import os, threading, time\n"
            "from streamlearn.app.logs import set_up_logs\n"
            "from streamlearn.app.signals import exit_on_thread_error, exit_with_parent, stop_signals\n"
            "set_up_logs()\n"
            "exit_on_thread_error()\n"
            "with stop_signals() as stopping:\n"
            "    exit_with_parent(os.getppid() + 1)\n"
            "    print(stopping.wait(10.0), flush=True)\n"
            "    threading.Thread(target=lambda: 1 / 0, name='feed').start()\n"
            "    time.sleep(15)\n"
        )

        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
        line = json.loads(done.stderr)

        assert (done.returncode, done.stdout) == (THREAD_DIED, b"True\n")
        assert (line["event"], line["thread"], line["level"]) == ("thread_died", "feed", "critical")
        assert "ZeroDivisionError" in line["exception"]
