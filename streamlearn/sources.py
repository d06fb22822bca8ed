"""Where settings come from: a TOML file, the environment, the command line; merged, and named in errors.

`STREAMLEARN_SERVE__PORT=8000` sets `serve.port`. Variables of our prefix that are no settings are `NOT_SETTINGS`, and
read by whom they are for: `STREAMLEARN_CRASH_AT`, by which the fault harness has the learner killed, in `state.points`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from streamlearn.errors import ConfigError
from streamlearn.learn.methods.settings import OPTIONS
from streamlearn.learn.noise.settings import NOISES
from streamlearn.section import Section

ENV_PREFIX = "STREAMLEARN_"
_SECRET = re.compile(r"^serve$|kafka\.options|tok|secret|passw|pwd|key|credential|auth", re.IGNORECASE)
"""In the name of a setting or table, misspelt ones too: its value is not shown in an error."""
NOT_SETTINGS = (
    "STREAMLEARN_TEST_KAFKA",
    "STREAMLEARN_FORBID_SKIPS",
    "STREAMLEARN_SOAK_EXAMPLES",
    "STREAMLEARN_LONG_FAULTS",
    "STREAMLEARN_CRASH_AT",
    "STREAMLEARN_CONFIG",
    "STREAMLEARN_MEMORY",
)
"""Variables of this package that are no settings: the tests' own, the file's path, and the compose file's."""
CHOICES: Mapping[str, Mapping[str, type[Section]]] = {"learn.options": OPTIONS, "learn.noise_options": NOISES}
"""Tables whose keys depend on another setting: the kinds by that setting's value."""
_MOVED = {
    f"learn.{name}": f"use {table}.{name}"
    for table, kinds in CHOICES.items()
    for kind in kinds.values()
    for name in kind.model_fields
}
"""Options of methods and noise were settings of [learn]."""
_ONE_HEAD = "removed: networks have one head; learn.options.contrast_weight learns features without labels"
REMOVED = _MOVED | {
    "bank": 'use learn.twin: "elect" serves the better of teacher and twin, "measure" the teacher',
    "batch.idle_steps": "removed: raise batch.steps; all but the first are skipped while records wait",
    "batch.max_labels": "removed: 1024 label records enter one step at most",
    "batch.merge_wait_s": "removed: 1 s; with --until-end 60 s",
    "batch.prefetch_records": "removed: 2048 records per partition, bounded by bytes as before",
    "batch.recent_rows": "removed: 2048 samples, bounded by bytes as before",
    "drift.delta": "removed: it is always 0.002",
    "guard.backoff_steps": "removed: it is always 200",
    "guard.entropy_ratio": "removed: it is always 0.5",
    "guard.keep_good_every_steps": "removed: it is always 200",
    "guard.look_every_steps": "removed: it is always 20",
    "guard.max_loss": "removed: it is always 0.02",
    "guard.max_skipped": "removed: it is always 3",
    "guard.patience": "removed: it is always 3",
    "labels.max_held": "removed: 10,000 labels of unknown classes are held at most",
    "labels.memory_rows": "renamed to labels.replay_rows",
    "labels.payload_max_age_s": "removed: payloads are kept for labels.horizon_s, up to labels.payload_max_bytes",
    "labels.wanted_again_after_s": "removed: a sample that got no label is handed out again after a day",
    "labels.wanted_per_hour": "renamed to labels.requests_per_hour",
    "labels.wanted_rows": "removed: the 1000 most useful samples are kept; labels.requests_per_hour = 0 turns it off",
    "learn.ema_share": 'removed; it is 0.1, or 1 with learn.recipe = "none"',
    "learn.label_smoothing": "removed; labels are not smoothed",
    "learn.logit_distance": _ONE_HEAD,
    "learn.momentum": "removed; sgd has momentum 0.9",
    "learn.nesterov": "removed; sgd has Nesterov momentum",
    "learn.noise_std": "use learn.noise_options.std",
    "learn.options.logit_distance": _ONE_HEAD,
    "learn.serve": 'use learn.twin: "elect" for elected, "measure" for the teacher',
    "learn.trust_labels": "removed; guard.on = false turns this off too",
    "learn.warmup_steps": "removed; the learning rate is constant",
    "log.create_topics": "removed; log.partitions = 0 creates no topics",
    "log.embedded_max_age_s": "removed; records that were learned are kept for 30 days, within log.max_bytes",
    "log.embedded_max_bytes": "renamed log.max_bytes",
    "log.overload": "removed; set log.shed_above_records for load shedding, leave it out to let samples wait",
    "log.thin_above_records": "renamed log.shed_above_records",
    "log.topics": "use source.samples.topic, source.labels.topic and log.dead_letters",
    "metrics.host": "removed: the learner's own /metrics is on loopback; scrape a server's, which includes it",
    "model.norm": "use model.options.norm",
    "run.log_format": "removed: lines are JSON unless stderr is a terminal",
    "run.log_level": "removed: lines from info on; filter them by `level`",
    "schema.payload": "renamed source.samples.format",
    "score.calibration_bins": "removed: there are always 15",
    "score.fading": "removed: it is always 0.999",
    "serve.admin_token_file": 'removed; write serve.admin_token = "file:PATH"',
    "serve.batch": "removed; the forward pass takes up to 64 rows",
    "serve.label_token_file": 'removed; write serve.label_token = "file:PATH"',
    "serve.max_instances": "removed; a request holds up to 1024 samples or labels",
    "serve.predict_token_file": 'removed; write serve.predict_token = "file:PATH"',
    "serve.queue": "removed; up to 256 requests wait for the model",
    "serve.stale_after_s": "removed; /health/ready reports a learner that was not seen for 120 s",
    "serve.threads": "removed; a server uses one thread for a forward pass; raise serve.processes",
    "serve.token_file": 'removed; write serve.token = "file:PATH"',
    "state.checkpoint_every_steps": "removed; use state.checkpoint_every_s",
    "state.journal_max_bytes": "removed: 1 GiB",
    "state.keep_history": "removed: 10 older teachers",
    "state.keep_published": "removed: the 5 newest teachers",
    "twin": 'use learn.twin = "measure" or "off"',
}
"""Settings and tables of earlier versions, and what to do instead."""
_NO_OPTION = {
    "learn.options": "learn.method has no such option",
    "learn.noise_options": "learn.noise has no such option",
}
_OF_KUBERNETES = re.compile(r"STREAMLEARN_(SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP|SCTP)\w*)?)")
"""What it gives every pod where a Service is called streamlearn; a setting has two underscores after its table."""

Tree = dict[str, Any]
"""Tables within tables."""
Layers = list[tuple[str, Tree]]
"""Each source by its name, the one that wins last."""


def read_layers(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, Any]) -> Layers:
    """What each source says. `overrides` are by dotted keys.

    Raises:
        ConfigError: the file cannot be read, or is not TOML.
    """
    file = [] if path is None else [(str(path), _read_file(path))]
    return [*file, ("environment", _read_environment(environ)), ("command line", _nest(overrides))]


def merged(layers: Layers) -> Tree:
    """One tree of all."""
    tree: Tree = {}
    for _, layer in layers:
        _merge(tree, layer)
    return tree


def _read_file(path: Path) -> Tree:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        msg = f"{path}: {error.strerror or error}; name an existing TOML file with --config"
        raise ConfigError(msg) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{path}: not TOML: {error}"
        raise ConfigError(msg) from error


def _read_environment(environ: Mapping[str, str]) -> Tree:
    dotted = {
        name.removeprefix(ENV_PREFIX).lower().replace("__", "."): from_text(value)
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX) and name not in NOT_SETTINGS and not _OF_KUBERNETES.fullmatch(name)
    }
    return _nest(dotted)


def from_text(value: str) -> Any:
    """Lists and tables as TOML reads them; all else stays text for pydantic to cast, so a token of digits stays one."""
    if not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _nest(dotted: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for key, value in dotted.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _merge(into: Tree, layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value


def explain(error: ValidationError, layers: Layers) -> str:
    """One line an error: key, what is wrong, the value, and where it came from."""
    lines = []
    for detail in error.errors(include_url=False):
        keys = tuple(part for part in detail["loc"] if part not in ("schema_",))
        shown = ".".join(map(str, keys)) or "settings"
        sources = [name for name, layer in layers if _has(layer, keys)]
        source = sources[-1] if sources and keys else "default"
        got = "a value that is not shown" if _SECRET.search(shown) else f"{detail['input']!r:.80}"
        is_section = detail["type"] == "value_error" and (not keys or isinstance(detail["input"], dict))
        value = "" if is_section else f" (got {got}, from {source})"
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = REMOVED.get(shown, _NO_OPTION.get(shown.rpartition(".")[0], "there is no such setting"))
            if source == "environment" and len(keys) == 1 and "_" in shown:
                message += "; in a variable two underscores stand for the dot, as in STREAMLEARN_SERVE__PORT"
        elif detail["type"] == "tuple_type":
            message = "wanted a list, such as [6] or [1, 28, 28]" if keys[-1:] == ("shape",) else "wanted a list"
        lines.append(f"  {shown}: {message}{value}")
    count = f"{len(lines)} settings are wrong" if len(lines) > 1 else "a setting is wrong"
    return "\n".join([f"{count}:", *lines])


def _has(tree: Any, keys: tuple[int | str, ...]) -> bool:
    for key in keys:
        if not isinstance(tree, dict):
            return True
        if key not in tree:
            return False
        tree = tree[key]
    return True
