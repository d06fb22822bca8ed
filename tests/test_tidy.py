"""The house rules that a machine can hold: docs and code name the same things, and every room has its tests."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest

from streamlearn.config import load_config, settings
from streamlearn.metrics import LEARNER_METRICS, SCORER_METRICS, SERVER_METRICS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "streamlearn"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
TESTED_ELSEWHERE = {
    "streamlearn/app/startup.py": "tests/unit/test_app_learner.py",
    "streamlearn/ledger/baselines.py": "tests/unit/test_ledger.py",
    "streamlearn/log/envelope.py": "tests/unit/test_codec.py, tests/unit/test_label_codec.py",
    "streamlearn/log/label_classes.py": "tests/unit/test_label_codec.py, tests/unit/test_reader.py",
    "streamlearn/ledger/class_names.py": "tests/unit/test_ledger.py",
    "streamlearn/ledger/held.py": "tests/unit/test_ledger.py",
    "streamlearn/ledger/joining.py": "tests/unit/test_ledger.py, tests/faults/test_ledger_any_order.py",
    "streamlearn/ledger/rows.py": "tests/unit/test_ledger.py",
    "streamlearn/ledger/samples.py": "tests/unit/test_ledger.py",
    "streamlearn/ledger/store_file.py": "tests/unit/test_store_check.py",
    "streamlearn/ledger/store_view.py": "tests/unit/test_ledger_store.py",
    "streamlearn/ledger/view.py": "tests/unit/test_ledger.py",
    "streamlearn/ledger/waiting.py": "tests/unit/test_ledger.py",
    "streamlearn/learn/contrast.py": "tests/unit/test_methods.py",
    "streamlearn/learn/embedding.py": "tests/unit/test_methods.py",
    "streamlearn/learn/methods/dsne.py": "tests/unit/test_methods.py",
    "streamlearn/learn/methods/ict.py": "tests/unit/test_methods.py",
    "streamlearn/learn/methods/mean_teacher.py": "tests/unit/test_step.py",
    "streamlearn/learn/methods/pi.py": "tests/unit/test_methods.py",
    "streamlearn/learn/methods/supervised.py": "tests/unit/test_step.py",
    "streamlearn/learn/methods/temporal_ensembling.py": "tests/unit/test_methods.py",
    "streamlearn/learn/class_shares.py": "tests/unit/test_methods.py, tests/unit/test_prior.py",
    "streamlearn/learn/costs.py": "tests/unit/test_learner.py",
    "streamlearn/learn/health.py": "tests/unit/test_twin.py",
    "streamlearn/learn/noise/build.py": "tests/unit/test_noise.py",
    "streamlearn/learn/state.py": "tests/unit/test_learner.py",
    "streamlearn/learn/rows.py": "tests/unit/test_methods.py",
    "streamlearn/learn/targets.py": "tests/unit/test_methods.py",
    "streamlearn/app/answers.py": "tests/unit/test_predict.py",
    "streamlearn/app/findings.py": "tests/unit/test_check.py",
    "streamlearn/app/ports.py": "tests/unit/test_server.py, tests/unit/test_check.py",
    "streamlearn/sources.py": "tests/unit/test_config.py",
    "streamlearn/models/build.py": "tests/unit/test_models.py",
    "streamlearn/models/mlp.py": "tests/unit/test_models.py",
    "streamlearn/models/images.py": "tests/unit/test_models.py",
    "streamlearn/serve/bodies.py": "tests/unit/test_serve_api.py",
    "streamlearn/serve/edge.py": "tests/unit/test_serve_api.py",
    "streamlearn/serve/failures.py": "tests/unit/test_serve_api.py",
    "streamlearn/serve/parts.py": "tests/unit/test_serve_api.py",
    "streamlearn/serve/record_schema.py": "tests/unit/test_routes_records.py, tests/unit/test_openapi.py",
    "streamlearn/serve/request_schemas.py": "tests/unit/test_serve_api.py",
    "streamlearn/serve/replies.py": "tests/unit/test_serve_api.py",
    "streamlearn/serve/routes_append.py": "tests/unit/test_serve_api.py",
    "streamlearn/serve/routes_predict.py": "tests/unit/test_serve_api.py",
    "streamlearn/serve/routes_schema.py": "tests/unit/test_routes_records.py",
    "streamlearn/serve/routes_state.py": "tests/unit/test_serve_api.py",
    "streamlearn/serve/schemas.py": "tests/unit/test_serve_api.py",
    "streamlearn/serve/scrape.py": "tests/unit/test_serve_api.py",
    "streamlearn/serve/worker.py": "tests/unit/test_appender.py, tests/unit/test_batcher.py",
    "streamlearn/__main__.py": "tests/e2e",
    "streamlearn/cli/models.py": "tests/unit/test_versions.py",
    "streamlearn/cli/topics.py": "tests/unit/test_check_records.py, tests/e2e/test_own_topic.py",
    "streamlearn/cli/lab.py": "tests/e2e/test_commands.py, tests/unit/test_lab_report.py",
    "streamlearn/cli/options.py": "tests/e2e/test_commands.py",
    "streamlearn/app/bars.py": "tests/unit/test_lab_simulate.py, tests/unit/test_lab_report.py",
    "streamlearn/lab/curves.py": "tests/unit/test_lab_evaluate.py",
    "streamlearn/lab/demo.py": "tests/e2e/test_commands.py",
    "streamlearn/lab/held_out.py": "tests/unit/test_lab_evaluate.py",
    "streamlearn/lab/records.py": "tests/unit/test_lab_files.py",
    "streamlearn/loop/assembler.py": "tests/unit/test_loop.py",
    "streamlearn/loop/report.py": "tests/unit/test_loop.py, tests/unit/test_monitor.py",
    "streamlearn/loop/scoring.py": "tests/unit/test_loop.py",
    "streamlearn/learn/build.py": "tests/unit/test_step.py",
    "streamlearn/models/spare.py": "tests/unit/test_twin.py",
    "streamlearn/records.py": "tests/unit/test_codec.py",
    "streamlearn/errors.py": "everywhere",
    "streamlearn/log/payload.py": "tests/unit/test_codec.py",
    "streamlearn/log/dead_letters.py": "tests/unit/test_codec.py",
    "streamlearn/schema/fields.py": "tests/unit/test_codec.py, tests/unit/test_reader.py",
    "streamlearn/imports.py": "tests/unit/test_models.py",
    "streamlearn/log/kafka_clients.py": "tests/unit/test_log_kafka.py",
    "streamlearn/log/retention.py": "tests/unit/test_embedded.py",
    "streamlearn/log/base.py": "tests/contract/test_log_contract.py",
    "tests/harness/disk.py": "tests/faults/test_full_disk.py",
    "tests/harness/fork_server.py": "tests/faults/test_kills.py, tests/faults/test_fencing.py",
    "tests/harness/producer.py": "tests/faults/test_kills.py",
    "tests/harness/report.py": "tests/faults/test_kills.py",
    "tests/harness/soak.py": "tests/faults/test_kills.py",
    "tests/harness/stream_out.py": "tests/e2e/test_score.py",
    "streamlearn/log/kafka_writer.py": "tests/contract/test_log_contract.py",
    "streamlearn/log/predictions.py": "tests/unit/test_scorer.py",
    "tests/harness/startups.py": "tests/faults/test_kills.py",
    "tests/harness/stretch.py": "tests/faults/test_kills.py",
}


def names(path: Path) -> set[str]:
    return set(re.findall(r"\w+", path.read_text()))


def defined(reference: str) -> bool:
    """Whether `folder/file.py:Class.method` exists below streamlearn/."""
    file, _, name = reference.partition(":")
    path = PACKAGE / file
    if not path.exists():
        return False
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{each.name}"
                for each in node.body
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return name in found


class TestConfigFile:
    def test_the_example_has_every_setting_with_its_default(self) -> None:
        """The file an operator copies is the whole truth."""
        example = ROOT / "deploy" / "streamlearn.example.toml"
        text = example.read_text()

        assert load_config(example, environ={}) == load_config(environ={})
        for key in settings():
            table, _, name = key.rpartition(".")
            section = re.search(rf"^\[{re.escape(table)}\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
            assert section, table
            assert re.search(rf"^(# )?{name} = ", section[1], re.MULTILINE), key

    def test_the_example_is_what_its_script_writes(self) -> None:
        """Recipes and descriptions change without a change of a default."""
        script = runpy.run_path(str(ROOT / "deploy" / "make_example.py"))

        assert (ROOT / "deploy" / "streamlearn.example.toml").read_text() == script["example"]()

    def test_every_setting_says_what_it_does(self) -> None:
        """A setting documents itself in one place."""
        assert [key for key, (_, text) in settings().items() if not text] == []


class TestDocs:
    def test_the_readme_is_short(self) -> None:
        """At most 120 lines."""
        assert len((ROOT / "README.md").read_text().splitlines()) <= 120

    def test_the_architecture_is_short_and_names_what_exists(self) -> None:
        """At most 14 kB; each `file.py:name` and each test file in it is there."""
        text = (ROOT / "ARCHITECTURE.md").read_text()
        missing = [name for name in re.findall(r"`((?:\w+/)*\w+\.py:[\w.]+)`", text) if not defined(name)]
        tests = set(re.findall(r"`((?:\w+/)?test_\w+\.py)`", text))

        assert len(text.encode()) <= 14_000
        assert missing == ["file.py:function"], "that one explains the notation"
        assert [
            name for name in tests if not any((ROOT / "tests" / kind / name).exists() for kind in ("", "unit"))
        ] == []

    def test_every_log_event_and_alert_is_in_the_runbook(self) -> None:
        """And the runbook names no event that the code does not log."""
        runbook = (ROOT / "deploy" / "RUNBOOK.md").read_text()
        source = "\n".join(path.read_text() for path in MODULES)
        events = set(re.findall(r'\.(?:info|warning|error|critical)\(\s*"([a-z]+(?:_[a-z]+)+)"', source))
        alerts = set(re.findall(r"alert: (\w+)", (ROOT / "deploy" / "alerts.yml").read_text()))
        rows = set(re.findall(r"^\| `([a-z]+(?:_[a-z]+)+)` \|", runbook, re.MULTILINE))

        assert events - set(re.findall(r"`(\w+)`", runbook)) == set()
        assert alerts - set(re.findall(r"`(\w+)`", runbook)) == set()
        assert [row for row in rows if f'"{row}"' not in source] == []

    def test_every_metric_is_in_the_docs(self) -> None:
        """README or docs/metrics.md names each, and names none that is not there."""
        exported = {metric.name for metric in (*LEARNER_METRICS, *SERVER_METRICS, *SCORER_METRICS)}
        text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "metrics.md").read_text()

        assert {name for name in exported if f"streamlearn_{name}" not in text} == set()
        told = set(re.findall(r"`streamlearn_([a-z0-9_]+)", text))
        assert told - exported == set()

    def test_no_machine_path_or_secret_place_is_named(self) -> None:
        """What is committed makes sense to a stranger."""
        tracked = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        banned = ("/wo" + "rk/", "py" + "pi.org", "files.python" + "hosted", "repo1.mav" + "en", "proxy.go" + "lang")
        for name in tracked:
            path = ROOT / name
            if path.suffix in (".png", ".gz", ".npz") or not path.is_file():
                continue
            text = path.read_text(errors="replace")
            assert not [word for word in banned if word in text], name


class TestLanguage:
    """Plain, present-tense technical English; the field's terms and no synonym for them."""

    REPLACED = (
        "anew", "for ever", "is told", "are told", "was told", "mended", "passed by", "passes by", "so many", "whoever",
        "nobody may", "for want of", "labelled memory", "wild value", "sworn in", "election winner",
        "the stream's time", "how often Python looks",
    )  # fmt: skip

    def test_no_text_uses_a_replaced_phrase(self) -> None:
        """Each has a term of the field: again, indefinitely, reported, fixed, skipped, replay buffer, outlier."""
        tracked = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        pattern = re.compile("|".join(rf"\b{re.escape(phrase)}\b" for phrase in self.REPLACED), re.IGNORECASE)
        found = []
        for name in tracked:
            path = ROOT / name
            if (
                path.suffix in (".py", ".md", ".toml", ".yml", ".sh")
                and path.is_file()
                and name != "tests/test_tidy.py"
            ):
                lines = enumerate(path.read_text().splitlines(), start=1)
                found += [f"{name}:{n}: {match[0]}" for n, line in lines if (match := pattern.search(line))]
        assert found == []


class TestCode:
    @pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
    def test_each_module_says_what_it_is(self, path: Path) -> None:
        """A docstring, and a size that fits a mind."""
        tree = ast.parse(path.read_text())

        assert ast.get_docstring(tree)
        assert len(path.read_text().splitlines()) <= 750

    def test_each_module_has_a_test_file_of_its_name(self) -> None:
        """Or a place where it is tested, said above."""
        there = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
        missing = []
        for path in MODULES:
            name = str(path.relative_to(ROOT))
            own = {path.stem, f"{path.parent.name}_{path.stem}"}
            if path.stem not in ("__init__", "settings") and name not in TESTED_ELSEWHERE and not own & there:
                missing.append(name)
        assert missing == []

    def test_dependencies_are_pinned_by_the_constraints(self) -> None:
        """What was tested together is written down, without download addresses."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        pinned = {
            line.split("==")[0].lower().replace("_", "-")
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if "==" in line
        }
        wanted = {re.match(r"[\w-]+", line)[0].lower() for line in project["dependencies"]}  # type: ignore[index]

        assert wanted - pinned == set()
        assert "://" not in (ROOT / "constraints.txt").read_text()
