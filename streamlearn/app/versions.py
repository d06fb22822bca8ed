"""`streamlearn models list|pin|unpin`: which published version is served. Works with and without a running server.

The commands change only the published folder. Servers follow it within a second; the learner is not affected.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from typing import Any

import structlog
from rich.filesize import decimal
from rich.table import Table

from streamlearn.config import Config
from streamlearn.errors import ConfigError, StateError
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import PublishedDir, PublishedModel, listing, pin, unpin

_log = structlog.get_logger(__name__)
_ORIGIN = {"by": "command line", "user_id": os.getuid()}


def list_versions(config: Config) -> list[dict[str, Any]]:
    """All versions that can be served, newest first, as plain values (`state.publish.listing`)."""
    return listing(_published(config), time.time())


def pin_version(config: Config, version: int) -> PublishedModel:
    """Serve a version until `unpin_version`. It is loaded first: one that servers would refuse is not pinned.

    Raises:
        ConfigError: there is no such version; the message lists those that exist.
        StateError: it cannot be served, or the folder cannot be written. Nothing was changed.
    """
    from streamlearn.serve.predictor import load  # noqa: PLC0415  torch, which the other commands do not need

    published = _published(config)
    found = {model.step: model for model in published.versions()}
    if version not in found:
        existing = ", ".join(map(str, found)) or "none"
        msg = f"version {version} does not exist; existing versions: {existing} (`streamlearn models list`)"
        raise ConfigError(msg)
    before = _served_step(published)
    load(found[version], config.schema_.build(), factory=config.model.factory)
    try:
        pinned = pin(published.folder, version)
    except OSError as error:
        raise _not_writable(published, error) from error
    _log.warning("version_pinned", step=pinned.step, before_step=before, **_ORIGIN)
    return pinned


def unpin_version(config: Config) -> PublishedModel | None:
    """Serve the newest version again, and return it; None if none is published.

    Raises:
        StateError: the folder cannot be written.
    """
    published = _published(config)
    before = _served_step(published)
    try:
        was_pinned = unpin(published.folder)
    except OSError as error:
        raise _not_writable(published, error) from error
    if was_pinned:
        _log.warning("version_unpinned", before_step=before, **_ORIGIN)
    return published.newest()


def table(rows: list[dict[str, Any]]) -> Table:
    """The result of `list_versions` as a table of 80 columns."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("version", "published (UTC)", "age", "size", "accuracy", "gain", ""):
        shown.add_column(name, justify="left" if name in ("published (UTC)", "") else "right", no_wrap=True)
    for row in rows:
        scores = row["scores"] or {}
        marks = [mark for mark in ("served", "pinned", "newest") if row[mark]]
        shown.add_row(
            str(row["version"]),
            datetime.fromtimestamp(row["published_at_s"], UTC).strftime("%Y-%m-%d %H:%M:%S"),
            duration(row["age_s"]),
            "" if row["size_bytes"] is None else decimal(row["size_bytes"]),
            _ratio(scores.get("windowed_accuracy"), ".3f"),
            _ratio(scores.get("ssl_gain"), "+.3f"),
            ", ".join(marks[:2]),
            style="bold" if row["served"] else None,
        )
    return shown


def duration(seconds: float) -> str:
    """A duration in the largest unit of which it has at least two."""
    for unit, length_s in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def _ratio(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""


def _published(config: Config) -> PublishedDir:
    return PublishedDir(StatePaths(config.state.dir).published)


def _served_step(published: PublishedDir) -> int | None:
    try:
        model = published.pinned() or published.newest()
    except StateError:  # a broken pin or pointer may be the reason for this command
        return None
    return None if model is None else model.step


def _not_writable(published: PublishedDir, error: OSError) -> StateError:
    return StateError(f"{published.folder}: cannot be written, so nothing was changed: {error.strerror or error}")
