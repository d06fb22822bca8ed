"""Walks every page of a store before anybody trusts it: LMDB has no checksums, and dies of a page that is not one.

Every page must be of the kind that its parent names, and each must be used once or free: what LMDB checks when it
copies an environment without its free pages, here to nowhere (about 1 GB/s from memory). Values are not looked into: a
bit that flips inside one goes unseen. In a process of its own, since a damaged pointer can end it by a signal.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lmdb

from streamlearn.errors import ANEW, StoreError

MOST_BYTES = 4 << 30
"""A larger store is not walked, since a learner that starts should not wait for minutes."""
TIMEOUT_S = 120.0


def check_whole(path: Path) -> bool:
    """Refuse a damaged store; False where it was not walked, or not to its end. One that is not there is whole.

    Raises:
        StoreError: a page is missing or is none; the message names the way out.
    """
    remove_stump(path)
    data = path / "data.mdb"
    size_bytes = data.stat().st_size if data.exists() else 0
    if size_bytes == 0:
        return True
    if size_bytes > MOST_BYTES:
        return False
    command = [sys.executable, "-P", __file__, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False, text=True)  # noqa: S603
    except subprocess.TimeoutExpired:
        return False
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2] or f"reading it ends with {done.returncode}"
        raise damaged(path, why)
    return True


def remove_stump(path: Path) -> None:
    """Remove what a full disk left of a store that was never made: it is shorter than LMDB's two pages about itself."""
    data = path / "data.mdb"
    if data.exists() and data.stat().st_size < 2 * os.sysconf("SC_PAGE_SIZE"):
        data.unlink()


def damaged(path: Path, why: str) -> StoreError:
    """What to say of a store that cannot be trusted."""
    return StoreError(f"{path}: the store is damaged ({why}); restore {path.parent} from a backup, or {ANEW}")


def missing_bytes(path: Path, env: lmdb.Environment) -> int:
    """What the file is too short by; reading there would end the process."""
    wanted: int = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    return max(0, wanted - (path / "data.mdb").stat().st_size)


def _walk(path: Path) -> str | None:
    """What is wrong; None where nothing is."""
    try:
        with lmdb.open(str(path), readonly=True, create=False, lock=False, max_dbs=0) as env:
            if missing := missing_bytes(path, env):
                return f"its end is missing, {missing} bytes"
            nowhere = os.open(os.devnull, os.O_WRONLY)
            env.copyfd(nowhere, compact=True)
    except lmdb.Error as error:
        return str(error)
    return None


if __name__ == "__main__":
    if (wrong := _walk(Path(sys.argv[1]))) is not None:
        sys.exit(wrong)
