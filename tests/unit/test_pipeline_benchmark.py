"""The bare step of benchmarks/pipeline.py uses the settings of the daemon, so it must follow their changes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from streamlearn.config import load_config

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def test_the_bare_step_takes_the_settings_of_the_daemon(tmp_path: Path) -> None:
    """One short run."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        common, pipeline = importlib.import_module("common"), importlib.import_module("pipeline")
    finally:
        sys.path.remove(str(BENCHMARKS))
    config = load_config(common.write_config(tmp_path / "streamlearn.toml", kind="embedded", steps=1), environ={})

    rate = pipeline.bare(config, 1)

    assert rate > 0.0
