"""The suite's own rule on skips, tried on a suite of two lines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
CASES = {
    "skips": "import pytest\ndef test_it():\n    pytest.skip('not here')\n",
    "passes": "def test_it():\n    pass\n",
    "expected failure": "import pytest\n@pytest.mark.xfail\ndef test_it():\n    raise AssertionError\n",
    "skips at collection": "import pytest\npytest.skip('not here', allow_module_level=True)\n",
    "wants a broker": "def test_it(kafka_broker):\n    pass\n",
}
NO_BROKER = "import sys\nsys.modules['jgo'] = None\n"


def run(folder: Path, case: str, *, forbidden: bool, jobs: int = 0) -> subprocess.CompletedProcess[str]:
    """Run one case under this project's conftest, where no broker can be had."""
    shutil.copy(CONFTEST, folder / "conftest.py")
    (folder / "conftest.py").write_text(CONFTEST.read_text() + NO_BROKER)
    (folder / "test_case.py").write_text(CASES[case])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLEARN_")}
    environment["PYTHONPATH"] = str(CONFTEST.parent)  # the package `harness`
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing the others takes most of the time
    environment |= {"STREAMLEARN_FORBID_SKIPS": "1"} if forbidden else {}
    plugins = ["-p", "no:cacheprovider", "-p", "xdist"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "-n", str(jobs), str(folder)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.mark.parametrize(
    ("case", "jobs"), [("skips", 0), ("skips", 2), ("skips at collection", 2), ("wants a broker", 2)]
)
def test_a_skip_is_a_failure_where_skips_are_forbidden(tmp_path: Path, case: str, jobs: int) -> None:
    """Wherever it happens, in another process too, and the summary says so."""
    done = run(tmp_path, case, forbidden=True, jobs=jobs)

    assert done.returncode == 1, done.stdout
    assert "FORBIDDEN" in done.stdout.upper()


@pytest.mark.parametrize("case", ["passes", "expected failure"])
def test_what_is_no_skip_passes_where_skips_are_forbidden(tmp_path: Path, case: str) -> None:
    """An expected failure has run."""
    assert run(tmp_path, case, forbidden=True).returncode == 0


def test_a_missing_broker_is_one_loud_line_where_skips_are_allowed(tmp_path: Path) -> None:
    """At the end, where it is seen, with the reason."""
    done = run(tmp_path, "wants a broker", forbidden=False, jobs=2)

    assert done.returncode == 0
    assert "1 skipped" in done.stdout
    assert "NO KAFKA: its tests did not run" in done.stdout
