"""Measures the time of a learner with a checkpoint from its start to its first step.

A learner of a small table model (16 features) is started repeatedly as `streamlearn learn`, on a state folder with a
checkpoint and an embedded log with unread records:

    import_s      until Python has imported everything, mostly torch
    restore_s     from there until checkpoint, store and log are opened and checked
    first_step_s  from there until the journal has the first step
    total_s       all of it

The limit is `python -c "import torch"`, measured before each start. Figures are medians.

Run: python benchmarks/startup.py [--quick]. The last line is JSON.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from common import arguments, figures, finish, tell
from harness.damage import last_step

from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.config import load_config
from streamlearn.state.paths import StatePaths

SETTINGS = """
schema = {{ shape = [16], classes = 10 }}
learn.threads = 1
state.dir = "{folder}/state"
metrics.port = 0
"""
LEARN = """
import sys
import streamlearn.app.learner
print("imported", flush=True)
from streamlearn.cli import main
main()
"""
"""`streamlearn learn`, which prints a line after its imports."""
FIRST_RECORDS, MORE_RECORDS = 5000, 500
TIMEOUT_S = 120.0
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Measure; print a line per start."""
    starts = 3 if arguments(__doc__ or "").quick else 9
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "learner.toml"
        path.write_text(SETTINGS.format(folder=folder))
        send(path, FIRST_RECORDS)
        finish("learn", "--config", path, "--until-end")
        for _ in range(starts):
            send(path, MORE_RECORDS)
            for key, value in {"import_torch_s": import_torch(), **start(path)}.items():
                found.setdefault(key, []).append(value)
            tell(", ".join(f"{key} {values[-1]:.2f}" for key, values in found.items()))
    medians = {key: round(statistics.median(values), 3) for key, values in found.items()}
    figures(**medians, total_to_import_torch=round(medians["total_s"] / medians["import_torch_s"], 2), starts=starts)


def send(path: Path, count: int) -> None:
    """Append samples, a fifth of them labelled."""
    config = load_config(path, environ={})
    codec, draw = make_codec(config), np.random.default_rng(count)
    classes = draw.integers(0, 10, count)
    rows = (draw.standard_normal((count, 16)) + 2 * np.eye(16)[classes]).astype(np.float32)
    names = [f"{time.time_ns()}-{i}" for i in range(count)]
    with closing(open_log(config)) as log:
        make_topics(log, config)
        log.append(
            config.source.samples.topics[0], [codec.encode_sample(*each) for each in zip(names, rows, strict=True)]
        )
        labels = [codec.labels.encode(names[i], int(classes[i])) for i in range(0, count, 5)]
        log.append(config.source.labels.topic, labels)


def import_torch() -> float:
    """Seconds of `import torch` in a new process, without its exit."""
    began_s = time.monotonic()
    program = "import torch; print('imported', flush=True)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=ENVIRON) as process:
        assert process.stdout is not None
        assert process.stdout.readline(), f"import torch exited with {process.wait()}"
        return time.monotonic() - began_s


def start(path: Path) -> dict[str, float]:
    """Start a learner, measure until its first step, then stop it, which saves a checkpoint."""
    journal = StatePaths(load_config(path, environ={}).state.dir).journal
    step, began_s = last_step(journal), time.monotonic()
    arguments = [sys.executable, "-c", LEARN, "learn", "--config", str(path)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRON
    ) as learner:
        assert learner.stdout is not None
        seen_s: dict[str, float] = {}
        for word in ("imported", "learner_started"):
            while word not in (line := learner.stdout.readline()):
                assert line, f"the learner exited with {learner.wait()}"
            seen_s[word] = time.monotonic()
        while last_step(journal) <= step:
            assert time.monotonic() - began_s < TIMEOUT_S, "no step"
            time.sleep(0.001)
        stepped_s = time.monotonic()
        learner.terminate()
        learner.communicate(timeout=TIMEOUT_S)
    return {
        "import_s": seen_s["imported"] - began_s,
        "restore_s": seen_s["learner_started"] - seen_s["imported"],
        "first_step_s": stepped_s - seen_s["learner_started"],
        "total_s": stepped_s - began_s,
    }


if __name__ == "__main__":
    main()
