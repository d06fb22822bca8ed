"""Sends a stream, kills whoever takes part, and demands that nothing is lost and nothing is learned twice.

Real processes on one folder: a learner, a server, a producer that posts to it, and the log (embedded, or a broker of
Kafka that is killed as well). Faults come from `plan`. Then the learner reads to the end, and so does another, never
killed, in a folder of its own, over the same log and with the same cuts: the surviving journal is copied to it. Both
must end with the same bits (`stretch`), and with what `verify` reads out of the log.

    python -m harness.soak --kills 20 --seed 1

The seed gives the faults and what is sent; when a fault meets what, the machine decides. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from harness.damage import REFUSED, damage, last_step
from harness.disk import SmallDisk, may_mount
from harness.fork_server import PRODUCER, ForkServer
from harness.plan import BURST, TRIM, Fault, draw_bursts, draw_faults
from harness.report import Report
from harness.startups import Startups
from harness.stretch import Stretches
from harness.verify import verify
from streamlearn.app.wiring import StatePaths, make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.lab.broker import Broker, free_port
from streamlearn.ledger.store_file import FILE
from streamlearn.records import Offsets
from streamlearn.state.journal import read_journal
from streamlearn.state.kill_points import VARIABLE
from streamlearn.state.publish import PublishedDir

SETTINGS = """
[schema]
shape = [8]
classes = 4
[model]
factory = "mlp"
options = {{ hidden = [16] }}
[learn]
threads = 1
[batch]
fresh = 8
labelled = 8
steps = 2  # some without records; more would only make the learner that is never killed take as many times longer
max_age_s = 0.05
merge_wait_s = 0.05
[labels]
payload_max_bytes = 65536  # late labels read their payload back from the log
[guard]
look_every_steps = 5
keep_good_every_steps = 20
[log]
kind = "{kind}"
partitions = 2
on_trimmed = "skip"
[log.kafka]
bootstrap_servers = "{bootstrap}"
group_id = "{name}"
[state]
dir = "{folder}/{name}"
checkpoint_every_steps = 5
keep_checkpoints = 4
publish_every_s = 0.05
keep_published = 3
keep_history = 2
[serve]
processes = 1
port = {port}
[metrics]
port = 0
[run]
log_format = "json"
"""
RECOVERY_S = 180.0
"""A learner that has taken no step by then, with records to read, has not recovered."""
PASSED_BY_S = 6.0
"""A named place that was not met by then is given up, and the process killed where it is."""
LOG_AWAY, STATE_BAD = 1, 3
"""Exit codes: the log stayed away for too long; the state cannot be trusted, or not be written."""
AGAIN_S = 0.1
"""A supervisor's wait before it starts a learner again."""
SHOWN_STEPS = 20
STOP_S = 60.0
REPLAY_S = 900.0
_POLL_S = 0.002


class SoakError(AssertionError):
    """A process ended that nobody killed, or did not come back."""


@dataclass
class Child:
    """A process that was started, whoever is its parent."""

    pid: int
    poll: Callable[[], int | None]

    def signal(self, number: int) -> None:
        """Send a signal; to one that is gone already, none."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        """The exit code.

        Raises:
            SoakError: it did not end in time.
        """
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                msg = f"process {self.pid} did not end within {timeout_s} s"
                raise SoakError(msg)
            time.sleep(_POLL_S)
        return code


def write_config(folder: Path, name: str, *, port: int = 0, bootstrap: str | None = None) -> Path:
    """A small learner with the state folder `name`, on an embedded log, or on a broker."""
    path = folder / f"{name}.toml"
    kind, servers = ("kafka", bootstrap) if bootstrap else ("embedded", "127.0.0.1:1")
    path.write_text(SETTINGS.format(kind=kind, bootstrap=servers, name=name, folder=folder, port=port))
    return path


class Soak:
    """The processes of one run, and what is done to them."""

    def __init__(
        self,
        folder: Path,
        nursery: ForkServer,
        report: Report,
        later: list[Fault],
        *,
        rate: float,
        broker: Broker | None,
        disk: SmallDisk | None,
    ) -> None:
        """Start all of them. `later`: the faults to come, since a learner is told at its start where it dies."""
        self._folder, self._nursery, self._report, self._rate = folder, nursery, report, rate
        self._broker, self._disk = broker, disk
        self._draw = Random(f"damage/{report.seed}")
        self._port = free_port("127.0.0.1")
        self._generations = itertools.count()
        self._shown: dict[int, Offsets] = {}
        """Of the last steps that were published before the last death: how they were cut."""
        self.config = self.configure("killed")
        self._paths = StatePaths(self.config.state.dir)
        self._stretches = Stretches(self.config, self.configure, self._to_end_by_fork)
        with contextlib.closing(open_log(self.config)) as log:
            make_topics(log, self.config)  # or the first request may come to a log without topics
        self._server = self._start_server()
        self._producer = self._start_producer()
        self._learner = self._start_learner(later)

    @property
    def notes(self) -> list[Path]:
        """What each producer wrote down."""
        return sorted(self._folder.glob("notes-*"))

    def configure(self, name: str) -> Config:
        """The config of a learner in a state folder of its own."""
        bootstrap = self._broker.bootstrap_servers if self._broker else None
        return load_config(write_config(self._folder, name, port=self._port, bootstrap=bootstrap), environ={})

    # -- faults

    def strike(self, fault: Fault, later: list[Fault]) -> None:
        """Carry out one fault."""
        self._report.by[f"{fault.victim}-{fault.how}"] += 1
        if fault.victim == "learner":
            self._strike_learner(fault, later)
            return
        time.sleep(fault.after_s)
        if fault.victim == "disk":
            self._fill_disk(fault.for_s, later)
            return
        if fault.victim == "broker":
            assert self._broker is not None
            self._broker.kill()
            self._report.kills += 1
            self._broker.start()
            return
        child = self._server if fault.victim == "server" else self._producer
        if fault.how == "stop":
            self._pause(child, fault.for_s)
            return
        if fault.how == "hold":
            child.signal(signal.SIGWINCH)
            time.sleep(fault.for_s)
            child.signal(signal.SIGWINCH)
            return
        self._kill(child)
        if fault.victim == "server":
            self._server = self._start_server()
        else:
            self._producer = self._start_producer()

    def _strike_learner(self, fault: Fault, later: list[Fault]) -> None:
        if fault.how == "stop":
            self._pause(self._learner, fault.for_s)  # it may have died where it was told to
            return
        if fault.how == "point":
            self._die_at(fault)
        else:
            if not fault.early:
                self._recover()
            time.sleep(fault.after_s)
            if fault.how == "term":
                self._end(self._learner, "learner")
            else:
                self._kill(self._learner)
        died_at_s: float | None = time.monotonic()
        self._compare_shown()
        self._stretches.look()
        if fault.damage is not None and self._spoil(fault.damage):
            self._report.by[f"damage-{fault.damage}"] += 1
            died_at_s = None  # what was done meanwhile is no part of a recovery
        self._learner = self._start_learner(later, died_at_s)

    def _spoil(self, kind: str) -> bool:
        """Do it to the state folder while the learner is dead; False where there is nothing to do it to."""
        if kind == TRIM:
            return self._trim()
        if kind in REFUSED:
            return self._damage_store(kind)
        if self._stretches.in_gap or not damage(self._paths, kind, self._draw):
            return False
        if kind.startswith("journal"):
            self._shown = {}
        return True

    def _trim(self) -> bool:
        """Retention passes the checkpoint. First, the stretch that ends here is held together."""
        if self._stretches.in_gap or last_step(self._paths.journal) == 0:
            return False
        others = self._server, self._producer
        for other in others:
            other.signal(signal.SIGSTOP)  # so that a copy is of one moment
        try:
            self._report.different += self._stretches.compare_copies()
        finally:
            for other in others:
                other.signal(signal.SIGCONT)
        deadline = time.monotonic() + RECOVERY_S
        time.sleep(self._draw.uniform(0.2, 0.5))
        while not self._stretches.trim():  # until something has come that nobody has learned
            if time.monotonic() > deadline:
                return False
            time.sleep(AGAIN_S)
        self._report.lost = len(self._stretches.trimmed.lost)
        return True

    def _damage_store(self, kind: str) -> bool:
        """A learner must refuse it, and name the way out, which is taken then; or nobody uses that page."""
        data, kept, output = self._paths.store / FILE, self._folder / "kept.sqlite3", self._folder / "learner.log"
        if not data.exists():
            return False
        shutil.copyfile(data, kept)
        damage(self._paths, kind, self._draw)
        told_from = output.stat().st_size
        self._learner = self._start_learner([])
        while self._learner.poll() is None and not self._look_for_a_step():
            if time.monotonic() - self._started_at_s > RECOVERY_S:
                msg = f"{kind}: the learner neither refused the store nor took a step: {self._tail()}"
                raise SoakError(msg)
            time.sleep(_POLL_S)
        if (code := self._learner.poll()) is None:
            self._report.by[f"{kind}-unused"] += 1
            self._kill(self._learner)
            return True
        told = output.read_bytes()[told_from:].decode(errors="replace")
        if code != STATE_BAD or "begin anew" not in told:
            msg = f"{kind}: the learner ended with {code}, and named no way out: {told[-2000:]}"
            raise SoakError(msg)
        shutil.copyfile(kept, data)
        return True

    def _fill_disk(self, for_s: float, later: list[Fault]) -> None:
        """No page more for a while. A learner may end, saying why; it is started again, as by a supervisor.

        When there is room again it must learn on. Then it is killed, and the next one is told where to die.
        """
        assert self._disk is not None
        self._disk.fill()
        filled_at_s = time.monotonic()
        self._outlive_full_disk(lambda: time.monotonic() - filled_at_s > for_s)
        self._disk.free()
        step = last_step(self._paths.journal)
        self._outlive_full_disk(lambda: last_step(self._paths.journal) > step)
        self._strike_learner(Fault("learner", "kill"), later)

    def _outlive_full_disk(self, done: Callable[[], bool]) -> None:
        since_s = time.monotonic()
        while not done():
            if (code := self._learner.poll()) is not None:
                self._note_end_on_full_disk(code)
                time.sleep(AGAIN_S)
                self._learner = self._start_learner([])
            if self._server.poll() == LOG_AWAY:  # started while the log could not be opened
                self._report.by["server-ended-on-full-disk"] += 1
                self._server = self._start_server()
            if self._producer.poll() == LOG_AWAY:
                self._producer = self._start_producer()
            if time.monotonic() - since_s > RECOVERY_S:
                msg = f"no step since the disk had room again: {self._tail()}"
                raise SoakError(msg)
            time.sleep(_POLL_S)

    def _note_end_on_full_disk(self, code: int) -> None:
        if code == -signal.SIGKILL:  # it met the place where it was told to die
            self._report.by["learner-point-on-full-disk"] += 1
            self._report.kills += 1
        elif code == LOG_AWAY and self._broker is not None:
            self._report.by["learner-ended-without-log"] += 1
        elif code in (LOG_AWAY, STATE_BAD) and "free " in self._tail():
            self._report.by["learner-ended-on-full-disk"] += 1
        else:
            msg = f"the learner ended on a full disk with {code}, and did not say what to do: {self._tail()}"
            raise SoakError(msg)

    def _compare_shown(self) -> None:
        """After a death: what was shown before the one before is cut as it was; note what has been shown since."""
        published = PublishedDir(self._paths.published).newest()
        step = 0 if published is None else published.step
        first = min([*self._shown, step])
        cuts = dict(read_journal(self._paths.journal, max(0, first - SHOWN_STEPS)))
        if not self._stretches.in_gap:  # what was shown before a gap cannot be formed again
            self._report.formed_otherwise += sum(cuts.get(shown) != cut for shown, cut in self._shown.items())
        shown = range(step - SHOWN_STEPS + 1, step + 1) if not self._stretches.in_gap else range(0)
        self._shown = {each: cut for each, cut in cuts.items() if each in shown}

    def _die_at(self, fault: Fault) -> None:
        """Wait until the learner has killed itself where it was told to."""
        deadline = time.monotonic() + PASSED_BY_S
        while self._lives() and time.monotonic() < deadline:
            self._look_for_a_step()
            time.sleep(_POLL_S)
        if self._learner.poll() == -signal.SIGKILL:
            self._report.points[fault.point] += 1
            self._report.kills += 1
        else:
            self._report.by["point-not-met"] += 1
            self._kill(self._learner)

    def _kill(self, child: Child) -> None:
        child.signal(signal.SIGKILL)
        code = child.wait(STOP_S)
        if code == LOG_AWAY and self._broker is not None:
            return
        if code != -signal.SIGKILL:
            msg = f"a process ended by itself, with {code}: {self._tail()}"
            raise SoakError(msg)
        self._report.kills += 1

    def _end(self, child: Child, name: str) -> None:
        child.signal(signal.SIGTERM)
        if (code := child.wait(STOP_S)) == -signal.SIGTERM:  # it did not listen yet, so it died at once
            self._report.by[f"{name}-term-at-start"] += 1
        elif code == LOG_AWAY and self._broker is not None:  # it had a dead letter to write, and will not drop it
            self._report.by[f"{name}-term-without-log"] += 1
        elif code != 0:
            msg = f"the {name} was asked to end, and ended with {code}: {self._tail()}"
            raise SoakError(msg)

    @staticmethod
    def _pause(child: Child, for_s: float) -> None:
        child.signal(signal.SIGSTOP)
        time.sleep(for_s)
        child.signal(signal.SIGCONT)

    # -- processes

    def _start_learner(self, later: list[Fault], died_at_s: float | None = None) -> Child:
        """Start one; `died_at_s` is when the one before did, where what lies between is its recovery."""
        self._later = list(later)
        armed = next((each for each in later if each.victim == "learner" and each.how != "stop"), None)
        environ = {VARIABLE: f"{armed.point}:{armed.nth}"} if armed and armed.how == "point" else {}
        self._step_before, self._started_at_s = last_step(self._paths.journal), time.monotonic()
        self._died_at_s, self._stepped = died_at_s, False
        return self._fork(["learn", "--config", str(self._folder / "killed.toml")], "learner", environ)

    def _start_server(self) -> Child:
        return self._fork(["serve", "--config", str(self._folder / "killed.toml")], "server", {})

    def _start_producer(self) -> Child:
        generation = next(self._generations)
        notes = self._folder / f"notes-{generation:06d}"
        arguments = [self._folder / "killed.toml", self._port, notes, self._rate, self._report.seed, generation]
        return self._fork([PRODUCER, *map(str, arguments)], "producer", {})

    def _fork(self, arguments: list[str], name: str, environ: dict[str, str]) -> Child:
        pid = self._nursery.start(arguments, self._folder / f"{name}.log", environ)
        return Child(pid, lambda: self._nursery.poll(pid))

    def _look_for_a_step(self) -> bool:
        """Whether the learner has taken a step since its start; the first time, note how long that took."""
        if not self._stepped and last_step(self._paths.journal) > self._step_before:
            self._stepped = True
            if self._died_at_s is not None:
                self._report.recovery_s.append(time.monotonic() - self._died_at_s)
        return self._stepped

    def _lives(self) -> bool:
        """Whether the learner does; one that found its broker away is started again, as a supervisor would."""
        code = self._learner.poll()  # once: it may end at any moment
        if code != LOG_AWAY or self._broker is None:
            return code is None
        self._report.by["learner-ended-without-log"] += 1
        self._learner = self._start_learner(self._later)
        return True

    def _recover(self) -> None:
        """Wait for the learner's next step.

        Raises:
            SoakError: it ended, or takes none.
        """
        while not self._look_for_a_step():
            alive = self._lives()
            if not alive or time.monotonic() - self._started_at_s > RECOVERY_S:
                msg = f"no step after a restart; the learner {'lives' if alive else 'ended'}: {self._tail()}"
                raise SoakError(msg)
            time.sleep(_POLL_S)

    def _tail(self) -> str:
        return (self._folder / "learner.log").read_text(errors="replace")[-2000:]

    # -- the end

    def finish(self) -> None:
        """Stop the stream; one learner reads to the end by hand, another without any fault; hold them together."""
        self._kill(self._producer)
        self._report.kills -= 1  # this is how it ends, no fault
        self._end(self._server, "server")
        self._learner.signal(signal.SIGTERM)
        if (code := self._learner.wait(STOP_S)) not in (0, LOG_AWAY, -signal.SIGTERM, -signal.SIGKILL):  # armed?
            msg = f"the learner ended with {code}: {self._tail()}"
            raise SoakError(msg)
        self._by_hand("killed", REPLAY_S)
        self._report.lost = len(self._stretches.trimmed.lost)
        self._report.verdict.include(verify(self.config, self.notes, self._stretches.trimmed))
        self._report.different += self._stretches.compare(self.config)
        self._report.steps = last_step(self._paths.journal)

    def cold(self, later: list[Fault]) -> None:
        """Kill the learner, and start one as an operator would, interpreter and torch and all: how long does it take?

        It lives until its first step, and is killed.
        """
        if self._learner.poll() is None:
            self._kill(self._learner)
        before, began_s = last_step(self._paths.journal), time.monotonic()
        with self._started("killed") as process:
            while last_step(self._paths.journal) <= before:
                if process.poll() is not None or time.monotonic() - began_s > RECOVERY_S:
                    msg = f"no step after a cold start: {self._tail()}"
                    raise SoakError(msg)
                time.sleep(_POLL_S)
            self._report.cold_recovery_s.append(time.monotonic() - began_s)
            process.kill()
            process.wait(STOP_S)
            self._report.kills += 1
            self._report.by["learner-kill-cold"] += 1
        self._learner = self._start_learner(later)

    def _by_hand(self, name: str, timeout_s: float) -> None:
        with self._started(name, "--until-end") as process:
            if (code := process.wait(timeout_s)) != 0:
                msg = f"the learner that reads {name} to the end ended with {code}: {self._tail()}"
                raise SoakError(msg)

    def _to_end_by_fork(self, name: str) -> None:
        """Have a learner without faults read all there is."""
        arguments = ["learn", "--config", str(self._folder / f"{name}.toml"), "--until-end"]
        if (code := self._fork(arguments, "learner", {}).wait(REPLAY_S)) != 0:
            msg = f"the learner that reads {name} to the end ended with {code}: {self._tail()}"
            raise SoakError(msg)

    @contextlib.contextmanager
    def _started(self, name: str, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "streamlearn", "learn", "--config", str(self._folder / f"{name}.toml"), *flags]
        with (self._folder / "learner.log").open("ab") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait(STOP_S)


def soak(
    folder: Path,
    *,
    kills: int,
    seed: int,
    rate: float = 150.0,
    startup_kills: int = 0,
    cold: int = 0,
    kafka: bool = False,
    broker_kills: int = 0,
    most_s: float = 86400.0,
    say: bool = False,
) -> Report:
    """Kill so many processes, `broker_kills` brokers at least among them, or as many as `most_s` allows, and report.

    `startup_kills` of them at least, in whole bursts, are of processes that were started as a user does (`startups`).
    `cold` learners are started by hand, and measured.

    Raises:
        SoakError: a process ended that nobody killed, or did not come back.
    """
    report, began_s = Report(seed), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for number, burst in enumerate(itertools.islice(draw_bursts(seed), -(-startup_kills // BURST))):
        Startups(folder, number, burst, report).run()
        if say:
            print(f"{report.startup_kills} kills while starting, {len(report.refusals)} refused", flush=True)
    with contextlib.ExitStack() as ends:
        broker = ends.enter_context(Broker(folder / "broker", start_timeout_s=RECOVERY_S)) if kafka else None
        disk = ends.enter_context(SmallDisk(folder / "killed")) if may_mount(folder) else None
        if disk is None:
            report.by["disk-cannot-be-filled"] = 1  # we may not mount one
        nursery = ends.enter_context(ForkServer())
        faults = draw_faults(seed, broker=kafka, disk=disk is not None)
        ahead = [next(faults) for _ in range(50)]  # so far ahead there is surely one for the learner
        running = Soak(folder, nursery, report, ahead, rate=rate, broker=broker, disk=disk)
        told = 0
        while report.kills < kills or report.by["broker-kill"] < broker_kills:
            if time.monotonic() - began_s > most_s:
                break
            if len(report.cold_recovery_s) < cold * report.kills / kills:
                running.cold(ahead)
            fault = ahead.pop(0)
            ahead.append(next(faults))
            running.strike(fault, ahead)
            if say and report.kills >= told + 25:
                told = report.kills
                print(f"{told} kills, step {last_step(StatePaths(running.config.state.dir).journal)}", flush=True)
        running.finish()
    report.duration_s = time.monotonic() - began_s
    return report


def main() -> None:
    """Run one soak; exit 1 where the promise was not kept. The folder is kept then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--startup-kills", type=int, default=0, help="so many of them while processes start")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=150.0, help="samples a second")
    parser.add_argument("--cold", type=int, default=0, help="learners that are started by hand, and measured")
    parser.add_argument("--kafka", action="store_true", help="a real broker, which is killed as well")
    parser.add_argument("--broker-kills", type=int, default=0, help="at least so many of the kills, with --kafka")
    parser.add_argument("--minutes", type=float, default=1440.0, help="fewer kills, where they would take longer")
    parser.add_argument("--folder", type=Path, help="kept; else a temporary one")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # or a disk would stay mounted
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="streamlearn-soak-"))
    report = soak(
        folder,
        kills=asked.kills,
        startup_kills=asked.startup_kills,
        seed=asked.seed,
        rate=asked.rate,
        cold=asked.cold,
        kafka=asked.kafka,
        broker_kills=asked.broker_kills,
        most_s=60.0 * asked.minutes,
        say=True,
    )
    print(json.dumps(report.as_dict()))
    if report.good and asked.folder is None:
        shutil.rmtree(folder)
    elif not report.good:
        print(f"kept: {folder}", file=sys.stderr)
    sys.exit(not report.good)


if __name__ == "__main__":
    main()
