"""Kills the processes of a live system again and again, then checks that nothing was lost and nothing learned twice.

Real processes on one state folder: a learner, a server, a producer that posts to it, and the log (embedded, or a Kafka
broker, which is killed as well). The faults come from `plan`. At the end the learner reads the rest of the log. A
reference learner that is never killed reads the same log, with the steps of the surviving journal. Both must hold the
same bits (`stretch`), and the state that `verify` recomputes from the log.

    python -m harness.soak --kills 20 --seed 1

The seed determines the faults and the records; the timing is the machine's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from harness.damage import REFUSED, damage, last_step
from harness.disk import SmallDisk, may_mount
from harness.fork_server import ForkServer
from harness.plan import BURST, TRIM, Fault, draw_bursts, draw_faults
from harness.report import SoakReport
from harness.site import EXIT_LOG_UNAVAILABLE, EXIT_STATE_BAD, POLL_S, RECOVERY_S, STOP_S, Site, SoakError
from harness.startups import Startups
from harness.stretch import Stretches
from harness.verify import verify
from streamlearn.lab.broker import Broker
from streamlearn.ledger.store_file import FILE
from streamlearn.records import Offsets
from streamlearn.state.journal import read_journal
from streamlearn.state.publish import PublishedDir

POINT_TIMEOUT_S = 6.0
"""If a kill point is not reached within this time, the learner is killed where it is."""
RESTART_WAIT_S = 0.1
"""The wait of a supervisor before it restarts a learner."""
COMPARED_STEPS = 20
"""The newest steps with a published teacher whose records are compared across a restart."""


class Soak:
    """Injects faults into a site and collects the results."""

    def __init__(self, site: Site, report: SoakReport, disk: SmallDisk | None) -> None:
        self._site, self._report, self._disk = site, report, disk
        self._draw = Random(f"damage/{report.seed}")
        self._published_steps: dict[int, Offsets] = {}
        """Next offsets of the last steps that were published before the previous death."""
        self._stretches = Stretches(site.config, site.configure, site.learn_to_end_forked)

    def strike(self, fault: Fault, later: list[Fault]) -> None:
        """Inject one fault. `later` are the faults after it."""
        site = self._site
        self._report.by[f"{fault.victim}-{fault.how}"] += 1
        if fault.victim == "learner":
            self._strike_learner(fault, later)
            return
        time.sleep(fault.after_s)
        if fault.victim == "disk":
            self._fill_disk(fault.for_s, later)
        elif fault.victim == "broker":
            self._kill_broker()
        elif fault.victim == "server":
            self._strike_client(fault, site.start_server)
        else:
            self._strike_client(fault, site.start_producer)

    def _kill_broker(self) -> None:
        broker = self._site.broker
        assert broker is not None
        broker.kill()
        self._report.kills += 1
        broker.start()

    def _strike_client(self, fault: Fault, restart: Callable[[], None]) -> None:
        process = self._site.server if fault.victim == "server" else self._site.producer
        if fault.how == "stop":
            process.pause(fault.for_s)
        elif fault.how == "hold":
            process.signal(signal.SIGWINCH)
            time.sleep(fault.for_s)
            process.signal(signal.SIGWINCH)
        else:
            self._site.kill(process)
            restart()

    def _strike_learner(self, fault: Fault, later: list[Fault]) -> None:
        site = self._site
        if fault.how == "stop":
            site.learner.pause(fault.for_s)  # it may have died at its kill point
            return
        if fault.how == "point":
            self._await_kill_point(fault)
        else:
            if not fault.early:
                site.recover()
            time.sleep(fault.after_s)
            if fault.how == "term":
                site.terminate(site.learner, "learner")
            else:
                site.kill(site.learner)
        died_at_s: float | None = time.monotonic()
        self._compare_published_steps()
        self._stretches.maybe_start_next()
        if fault.damage is not None and self._damage(fault.damage):
            self._report.by[f"damage-{fault.damage}"] += 1
            died_at_s = None  # the time of the damage is not part of a recovery
        site.start_learner(later, died_at_s)

    def _await_kill_point(self, fault: Fault) -> None:
        site, deadline = self._site, time.monotonic() + POINT_TIMEOUT_S
        while site.learner_lives() and time.monotonic() < deadline:
            site.has_stepped()
            time.sleep(POLL_S)
        if site.learner.poll() == -signal.SIGKILL:
            self._report.points[fault.point] += 1
            self._report.kills += 1
        else:
            self._report.by["point-not-met"] += 1
            site.kill(site.learner)

    def _compare_published_steps(self) -> None:
        """After a death: steps published before the previous death still have the same records."""
        paths = self._site.paths
        published = PublishedDir(paths.published).newest()
        step = 0 if published is None else published.step
        first = min([*self._published_steps, step])
        steps = dict(read_journal(paths.journal, max(0, first - COMPARED_STEPS)))
        if not self._stretches.in_gap:  # steps before a gap cannot be formed again
            self._report.formed_otherwise += sum(
                steps.get(number) != offsets for number, offsets in self._published_steps.items()
            )
        newest = range(step - COMPARED_STEPS + 1, step + 1) if not self._stretches.in_gap else range(0)
        self._published_steps = {number: offsets for number, offsets in steps.items() if number in newest}

    # -- damage while the learner is dead

    def _damage(self, kind: str) -> bool:
        """Damage the state folder; False if there was nothing to damage."""
        if kind == TRIM:
            return self._trim()
        if kind in REFUSED:
            return self._damage_store(kind)
        if self._stretches.in_gap or not damage(self._site.paths, kind, self._draw):
            return False
        if kind.startswith("journal"):
            self._published_steps = {}
        return True

    def _trim(self) -> bool:
        """Compare the stretch that ends here, then have retention trim the log past the checkpoint."""
        site = self._site
        if self._stretches.in_gap or last_step(site.paths.journal) == 0:
            return False
        others = site.server, site.producer
        for other in others:
            other.signal(signal.SIGSTOP)  # or the copies would not be of one moment
        try:
            self._report.different += self._stretches.compare_copies()
        finally:
            for other in others:
                other.signal(signal.SIGCONT)
        deadline = time.monotonic() + RECOVERY_S
        time.sleep(self._draw.uniform(0.2, 0.5))
        while not self._stretches.trim():  # until the log holds records that are not learned
            if time.monotonic() > deadline:
                return False
            time.sleep(RESTART_WAIT_S)
        self._report.lost = len(self._stretches.trimmed.lost)
        return True

    def _damage_store(self, kind: str) -> bool:
        """A learner must refuse the store and name the remedy, unless the page is free. Then the store is put back."""
        site = self._site
        backup = site.folder / "store-backup"
        if not (site.paths.store / FILE).exists():
            return False
        shutil.copytree(site.paths.store, backup)  # the whole folder: much of the content may be in the WAL
        if not damage(site.paths, kind, self._draw):
            shutil.rmtree(backup)
            return False
        output_begin = site.learner_log.stat().st_size
        site.start_learner([])
        while site.learner.poll() is None and not site.has_stepped():
            if time.monotonic() - site.started_at_s > RECOVERY_S:
                msg = f"{kind}: the learner neither refused the store nor took a step: {site.tail()}"
                raise SoakError(msg)
            time.sleep(POLL_S)
        if (code := site.learner.poll()) is None:
            self._report.by[f"{kind}-unused"] += 1
            site.kill(site.learner)
            shutil.rmtree(backup)
            return True
        output = site.learner_log.read_bytes()[output_begin:].decode(errors="replace")
        if code != EXIT_STATE_BAD or "state.dir" not in output:
            msg = f"{kind}: the learner exited with {code} and named no remedy: {output[-2000:]}"
            raise SoakError(msg)
        shutil.rmtree(site.paths.store)
        shutil.move(backup, site.paths.store)  # the store may lie on a disk of its own
        return True

    # -- full disk

    def _fill_disk(self, for_s: float, later: list[Fault]) -> None:
        """Fill the disk for `for_s`. A learner may exit with the reason, and is restarted as by a supervisor.

        Once there is space it must learn again. Then it is killed, so that the next one gets its kill point.
        """
        assert self._disk is not None
        self._disk.fill()
        filled_at_s = time.monotonic()
        self._run_on_full_disk(lambda: time.monotonic() - filled_at_s > for_s)
        self._disk.free()
        journal = self._site.paths.journal
        step = last_step(journal)
        self._run_on_full_disk(lambda: last_step(journal) > step)
        self._strike_learner(Fault("learner", "kill"), later)

    def _run_on_full_disk(self, done: Callable[[], bool]) -> None:
        site, since_s = self._site, time.monotonic()
        while not done():
            if (code := site.learner.poll()) is not None:
                self._check_exit_on_full_disk(code)
                time.sleep(RESTART_WAIT_S)
                site.start_learner([])
            if site.server.poll() == EXIT_LOG_UNAVAILABLE:  # started while the log could not be opened
                self._report.by["server-ended-on-full-disk"] += 1
                site.start_server()
            if site.producer.poll() == EXIT_LOG_UNAVAILABLE:
                site.start_producer()
            if time.monotonic() - since_s > RECOVERY_S:
                msg = f"no step since the disk has space: {site.tail()}"
                raise SoakError(msg)
            time.sleep(POLL_S)

    def _check_exit_on_full_disk(self, code: int) -> None:
        site = self._site
        if code == -signal.SIGKILL:  # at its kill point
            self._report.by["learner-point-on-full-disk"] += 1
            self._report.kills += 1
        elif code == EXIT_LOG_UNAVAILABLE and site.broker is not None:
            self._report.by["learner-ended-without-log"] += 1
        elif code in (EXIT_LOG_UNAVAILABLE, EXIT_STATE_BAD) and "free " in site.tail():
            self._report.by["learner-ended-on-full-disk"] += 1
        else:
            msg = f"the learner exited with {code} on a full disk and named no remedy: {site.tail()}"
            raise SoakError(msg)

    # -- end

    def finish(self) -> None:
        """Stop the stream, have a learner read the rest of the log, then audit and compare it."""
        site = self._site
        site.kill(site.producer)
        self._report.kills -= 1  # not a fault
        site.terminate(site.server, "server")
        site.learner.signal(signal.SIGTERM)
        may_exit = 0, EXIT_LOG_UNAVAILABLE, -signal.SIGTERM, -signal.SIGKILL  # the last: at a kill point
        if (code := site.learner.wait(STOP_S)) not in may_exit:
            msg = f"the learner exited with {code} on SIGTERM: {site.tail()}"
            raise SoakError(msg)
        site.learn_to_end("killed")
        self._report.lost = len(self._stretches.trimmed.lost)
        self._report.audit.include(verify(site.config, site.notes, self._stretches.trimmed))
        self._report.different += self._stretches.compare(site.config)
        self._report.steps = last_step(site.paths.journal)

    def measure_cold_start(self, later: list[Fault]) -> None:
        """Kill the learner; measure a start from the real command line to the first step; kill that one too."""
        site = self._site
        if site.learner.poll() is None:
            site.kill(site.learner)
        before, began_s = last_step(site.paths.journal), time.monotonic()
        with site.started("killed") as process:
            while last_step(site.paths.journal) <= before:
                if process.poll() is not None or time.monotonic() - began_s > RECOVERY_S:
                    msg = f"no step after a cold start: {site.tail()}"
                    raise SoakError(msg)
                time.sleep(POLL_S)
            self._report.cold_recovery_s.append(time.monotonic() - began_s)
            process.kill()
            process.wait(STOP_S)
            self._report.kills += 1
            self._report.by["learner-kill-cold"] += 1
        site.start_learner(later)


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
    verbose: bool = False,
) -> SoakReport:
    """Run a soak with at least `kills` kills, at least `broker_kills` of them of brokers, or until `most_s`.

    `startup_kills`: at least this many kills during starts from the real command line, in whole bursts (`startups`).
    `cold`: number of starts from the real command line whose time is measured.

    Raises:
        SoakError: a process exited on its own, or did not recover.
    """
    report, began_s = SoakReport(seed), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for number, burst in enumerate(itertools.islice(draw_bursts(seed), -(-startup_kills // BURST))):
        Startups(folder, number, burst, report).run()
        if verbose:
            print(f"{report.startup_kills} kills during starts, {len(report.refusals)} refusals", flush=True)
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(Broker(folder / "broker", start_timeout_s=RECOVERY_S)) if kafka else None
        disk = stack.enter_context(SmallDisk(folder / "killed")) if may_mount(folder) else None
        if disk is None:
            report.by["disk-cannot-be-filled"] = 1
        forks = stack.enter_context(ForkServer())
        faults = draw_faults(seed, broker=kafka, disk=disk is not None)
        ahead = [next(faults) for _ in range(50)]  # enough to contain one for the learner
        site = Site(folder, forks, report, ahead, rate=rate, broker=broker)
        running = Soak(site, report, disk)
        printed = 0
        while report.kills < kills or report.by["broker-kill"] < broker_kills:
            if time.monotonic() - began_s > most_s:
                break
            if len(report.cold_recovery_s) < cold * report.kills / kills:
                running.measure_cold_start(ahead)
            fault = ahead.pop(0)
            ahead.append(next(faults))
            running.strike(fault, ahead)
            if verbose and report.kills >= printed + 25:
                printed = report.kills
                print(f"{printed} kills, step {last_step(site.paths.journal)}", flush=True)
        running.finish()
    report.duration_s = time.monotonic() - began_s
    return report


def main() -> None:
    """Run one soak; exit code 1 if the promise was not kept, and then the folder stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--startup-kills", type=int, default=0, help="how many of them during the start of a process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=150.0, help="samples per second")
    parser.add_argument("--cold", type=int, default=0, help="measured starts from the real command line")
    parser.add_argument("--kafka", action="store_true", help="use a real broker, and kill it as well")
    parser.add_argument("--broker-kills", type=int, default=0, help="at least this many of the kills, with --kafka")
    parser.add_argument("--minutes", type=float, default=1440.0, help="stop earlier, with fewer kills")
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary folder")
    asked = parser.parse_args()
    if asked.startup_kills and asked.startup_kills > asked.kills - BURST:
        parser.error(f"--startup-kills are part of --kills, in bursts of {BURST}: give at least {BURST} fewer of them")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # or the disk would stay mounted
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
        verbose=True,
    )
    print(json.dumps(report.as_dict()))
    if report.good and asked.folder is None:
        shutil.rmtree(folder)
    elif not report.good:
        print(f"kept: {folder}", file=sys.stderr)
    sys.exit(not report.good)


if __name__ == "__main__":
    main()
