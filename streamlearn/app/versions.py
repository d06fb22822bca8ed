"""`streamlearn models`, `rollback`, `promote`: which published version is served, by hand, with or without a server.

They change the published folder alone; servers follow it within a second, and the learner learns on as it did.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from typing import Any

import structlog
from rich.table import Table

from streamlearn.config import Config
from streamlearn.errors import ConfigError, StateError
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import PublishedDir, PublishedModel, listing, pin, unpin

_log = structlog.get_logger(__name__)


def versions(config: Config, now_s: float | None = None) -> list[dict[str, Any]]:
    """All versions that can be served, newest first, as plain values (`state.publish.listing`)."""
    return listing(_published(config), time.time() if now_s is None else now_s)


def roll_back(config: Config, *, version: int | None = None, back: int | None = None) -> PublishedModel:
    """Pin a version, or the one that was published `back` versions before the one that is served.

    It is loaded first: a version that servers would refuse is not pinned.

    Raises:
        ConfigError: there is no such version; the message lists those there are.
        StateError: it cannot be served, or the folder cannot be written. Nothing was changed.
    """
    from streamlearn.serve.predictor import load  # noqa: PLC0415  torch, which the other commands do without

    published = _published(config)
    model = _chosen(published, version=version, back=back)
    before = _served(published)
    load(model, config.schema_.build(), factory=config.model.factory)
    try:
        pinned = pin(published.folder, model.step)
    except OSError as error:
        raise _not_writable(published, error) from error
    _log.warning("version_pinned", step=pinned.step, before_step=before and before.step, **_WHO)
    return pinned


def promote(config: Config) -> PublishedModel | None:
    """Have the newest version served again, and say which that is; None where none is published.

    Raises:
        StateError: the folder cannot be written.
    """
    published = _published(config)
    before = _served(published)
    try:
        was_pinned = unpin(published.folder)
    except OSError as error:
        raise _not_writable(published, error) from error
    if was_pinned:
        _log.warning("version_unpinned", before_step=before and before.step, **_WHO)
    return published.newest()


def table(rows: list[dict[str, Any]]) -> Table:
    """What `versions` found, for people, in 80 columns."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("version", "published (UTC)", "age", "size", "accuracy", "gain", ""):
        shown.add_column(name, justify="left" if name in ("published (UTC)", "") else "right", no_wrap=True)
    for row in rows:
        scores = row["scores"] or {}
        marks = [mark for mark in ("served", "pinned", "newest") if row[mark]]
        shown.add_row(
            str(row["version"]),
            datetime.fromtimestamp(row["published_at_s"], UTC).strftime("%Y-%m-%d %H:%M:%S"),
            _duration(row["age_s"]),
            "" if row["size_bytes"] is None else _size(row["size_bytes"]),
            _ratio(scores.get("windowed_accuracy"), ".3f"),
            _ratio(scores.get("ssl_gain"), "+.3f"),
            ", ".join(marks[:2]),
            style="bold" if row["served"] else None,
        )
    return shown


_WHO = {"by": "command line", "user_id": os.getuid()}


def _published(config: Config) -> PublishedDir:
    return PublishedDir(StatePaths(config.state.dir).published)


def _served(published: PublishedDir) -> PublishedModel | None:
    try:
        return published.pinned() or published.newest()
    except StateError:  # the pin, or the pointer, is what an operator may be here to mend
        return None


def _chosen(published: PublishedDir, *, version: int | None, back: int | None) -> PublishedModel:
    found = published.versions()
    there = ", ".join(str(model.step) for model in found) or "none"
    if version is not None:
        matching = [model for model in found if model.step == version]
        if not matching:
            msg = f"version {version} is not among those that are kept: {there} (`streamlearn models` shows them)"
            raise ConfigError(msg)
        return matching[-1]
    assert back is not None, "neither a version nor how far back"
    served = _served(published)
    at = next((at for at, model in enumerate(found) if served and model.identity == served.identity), len(found) - 1)
    if at < back:
        msg = f"--back {back}: {max(at, 0)} versions are kept from before the one that is served; there are: {there}"
        raise ConfigError(msg)
    return found[at - back]


def _not_writable(published: PublishedDir, error: OSError) -> StateError:
    return StateError(f"{published.folder}: cannot be written, so nothing was changed: {error.strerror or error}")


def _duration(seconds: float) -> str:
    for unit, length_s in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} GB"


def _ratio(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""
