"""The bare step of benchmarks/pipeline.py: it takes the daemon's own settings, so it must follow them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from streamlearn.config import load_config

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def test_the_bare_step_takes_the_settings_of_the_daemon(tmp_path: Path) -> None:
    """It broke once, for most of a day, when [learn] got a setting that is none of the learner's."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        common, pipeline = importlib.import_module("common"), importlib.import_module("pipeline")
    finally:
        sys.path.remove(str(BENCHMARKS))
    config = load_config(common.write_config(tmp_path / "streamlearn.toml", kind="embedded", steps=1), environ={})

    rates = pipeline.bare(config, 1)

    assert rates["learn"] >= rates["step"] > 0.0
