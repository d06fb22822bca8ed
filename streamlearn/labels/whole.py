"""Checks a store for damage before it is used: LMDB has no checksums, and reading a bad page can end the process.

The check is LMDB's own compacting copy, with the result thrown away. It follows every page reference: each page must
have the type that its parent expects, and must be used once or be free. It reads about 1 GB/s from memory. It does not
look into values, so a bit that flips inside a value stays unnoticed. It runs in a process of its own, because a damaged
reference, or a page past the end of the file, ends that process with a signal.

The length of the file says nothing about damage. LMDB never writes a page that one transaction allocated and freed, so
after a commit the file may end before the last page number. It is damaged only where a page in use is missing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import lmdb

from streamlearn.errors import ANEW, StoreError

MOST_BYTES = 4 << 30
"""A larger store is checked only where its file is too short for all pages: a start should not take minutes."""
TIMEOUT_S = 120.0
_DAMAGED, _TOO_LARGE = 3, 4
"""Exit codes of the process that checks. With any other code but 0 it did not finish, and the store may be good."""
_CRASHES = (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
"""How following a bad reference may end it. Any other signal comes from outside, as at a shutdown."""
_NOT_DAMAGE = (lmdb.DiskError, lmdb.LockError, lmdb.MapResizedError, lmdb.MemoryError, lmdb.ReadersFullError)
"""Errors of LMDB that say nothing about the pages."""


def check_whole(path: Path) -> bool:
    """Refuse a damaged store; False where it was not checked to its end. The caller is the only one to write to it.

    A store that does not exist yet is good.

    Raises:
        StoreError: a page in use is missing or invalid; the message says what to do.
    """
    remove_stump(path)
    data = path / "data.mdb"
    size_bytes = data.stat().st_size if data.exists() else 0
    if size_bytes == 0:
        return True
    if partial_bytes := size_bytes % os.sysconf("SC_PAGE_SIZE"):
        os.truncate(data, size_bytes - partial_bytes)  # no use to anyone, and its missing rest would be read as zeros
    with Check(path, live=False) as check:
        return bool(check.result(TIMEOUT_S))


class Check:
    """The check of one store, while it runs and after. A context manager: at its end the process is gone."""

    def __init__(self, path: Path, *, live: bool) -> None:
        """Start it. `live`: another process may be writing to the store."""
        self._path, self._started_s = path, time.monotonic()
        command = [sys.executable, "-P", __file__, str(path), "live" if live else "closed", str(MOST_BYTES)]
        # A session of its own: Ctrl-C is for the learner, which then stops in order.
        self._process = subprocess.Popen(  # noqa: S603 - our own command, no shell
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self._said = ""

    def __enter__(self) -> Check:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def result(self, timeout_s: float) -> bool | None:
        """True: the store is good. False: it was not checked to its end. None: still running, `timeout_s` after start.

        Raises:
            StoreError: it is damaged.
        """
        try:
            code = self._process.wait(max(0.0, timeout_s - self.age_s))
        except subprocess.TimeoutExpired:
            return None
        assert self._process.stdout is not None
        if not self._process.stdout.closed:
            self._said = self._process.stdout.read().strip()
            self._process.stdout.close()
        if code == _DAMAGED:
            raise damaged(self._path, self._said)
        if -code == signal.SIGBUS:
            raise damaged(self._path, "its end is missing")
        if -code in _CRASHES:
            raise damaged(self._path, f"reading it ends with {signal.Signals(-code).name}")
        return code == 0

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """It has no result yet."""
        return self._process.poll() is None

    @property
    def age_s(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._started_s

    def close(self) -> None:
        """End it, where it still runs."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def remove_stump(path: Path) -> None:
    """Remove what a full disk left of a store that was never made: it is shorter than LMDB's two pages about itself."""
    data = path / "data.mdb"
    if data.exists() and data.stat().st_size < 2 * os.sysconf("SC_PAGE_SIZE"):
        data.unlink()


def damaged(path: Path, why: str) -> StoreError:
    """The error for a store that cannot be trusted."""
    return StoreError(f"{path}: the store is damaged ({why}); restore {path.parent} from a backup, or {ANEW}")


def missing_bytes(path: Path, env: lmdb.Environment) -> int:
    """By how much the file is too short for every page number. Reading there ends the process, if a page is in use."""
    wanted: int = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    return max(0, wanted - (path / "data.mdb").stat().st_size)


def _walk(path: Path, *, live: bool, most_bytes: int) -> int:
    """Copy the store to nowhere; the exit code. The reason for `_DAMAGED` is printed."""
    size_bytes = (path / "data.mdb").stat().st_size
    try:
        # The lock keeps a writer from using pages again that are yet to be read.
        with lmdb.open(str(path), readonly=True, create=False, lock=live, max_dbs=0) as env:
            if live:
                env.reader_check()
            missing = missing_bytes(path, env)
            if size_bytes > most_bytes and not missing:
                return _TOO_LARGE
            if size_bytes % env.stat()["psize"]:
                print("its last page is cut")  # noqa: T201 - read by the parent
                return _DAMAGED
            if missing:
                _copy_to_pipe(env)
            else:
                env.copyfd(os.open(os.devnull, os.O_WRONLY), compact=True)
    except _NOT_DAMAGE:
        raise
    except lmdb.Error as error:
        print(error)  # noqa: T201 - read by the parent
        return _DAMAGED
    return 0


def _copy_to_pipe(env: lmdb.Environment) -> None:
    """Copy so that each page is read, and a missing one is noticed: /dev/null does not read what is written to it."""
    reader, writer = os.pipe()

    def drain() -> None:
        while os.read(reader, 1 << 20):
            pass

    threading.Thread(target=drain, daemon=True).start()
    env.copyfd(writer, compact=True)


if __name__ == "__main__":
    sys.exit(_walk(Path(sys.argv[1]), live=sys.argv[2] == "live", most_bytes=int(sys.argv[3])))
