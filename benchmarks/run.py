"""Runs benchmarks one after the other, and writes docs/performance.md from the last line of each.

Each script is run in a process of its own; nothing else should run on the machine. The figures of full runs are kept in
benchmarks/results/performance.json, by script, with machine and date, so that one script can be run again alone.

Run: python benchmarks/run.py [--quick] [--report] [NAME ...]. With --quick nothing is kept, with --report nothing run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "performance.json"
DOCUMENT = HERE.parent / "docs" / "performance.md"
NOT_RUN = {"common", "offline", "run", "learning", "learning_report", "compare", "gpu"}
"""Shared code; what takes hours: `make learning`, `python benchmarks/compare.py`; and `make gpu`."""


STAGES = ("learn", "predict", "ledger", "publish", "assemble", "guard", "save")


class Row(NamedTuple):
    """A figure of the page."""

    script: str
    key: str
    """In the last line of the script; parts of a path are separated by dots."""
    what: str
    goal: str = ""
    """Such as "<= 1.05"; empty where there is none."""


TABLES: dict[str, tuple[Row, ...]] = {
    "The step": (
        Row(
            "step",
            "convnet.learn_over_bare",
            "`Learner.learn` of the conv net over forward, backward, teacher; float32",
            "<= 1.05",
        ),
        Row("step", "convnet.bfloat16_over_float32", "the same step in bfloat16, the default here, over float32"),
        Row("step", "mlp.learn_over_bare", "the same of an MLP", "<= 1.05"),
        Row("step", "columns.learn_over_bare", "the same of the network `table`, 12 columns"),
        Row("step", "convnet.twin_share", "what the twin adds to predict and learn, conv net"),
        Row("step", "convnet.contrast_share", "what contrast adds to `learn` of the conv net (`ict`)"),
        Row("step", "mlp.contrast_share", "what contrast adds to `learn` of the MLP (`mean_teacher`)"),
    ),
    "The pipeline": (
        Row(
            "pipeline",
            "daemon_over_same_work",
            "daemon on Kafka over a bare loop of the same work, conv net",
            ">= 0.92",
        ),
        Row("pipeline", "daemon_over_same_work_embedded", "the same on the embedded log", ">= 0.95"),
        Row(
            "pipeline", "daemon_over_handwritten", "daemon on Kafka over a consumer written by hand, conv net", ">= 1.3"
        ),
        Row(
            "pipeline",
            "table_daemon_over_same_work_embedded",
            "12 columns: daemon over a bare loop, embedded log",
            ">= 0.8",
        ),
        Row("pipeline", "table_daemon_over_same_work", "the same on Kafka", ">= 0.8"),
        Row(
            "pipeline", "table_daemon_over_handwritten", "12 columns: daemon over a consumer written by hand", ">= 1.3"
        ),
        Row("pipeline", "table_backlog_over_equal_batches", "12 columns: catching up over micro-batches of 64"),
        Row("pipeline", "table_backlog_samples_per_s", "12 columns: samples per second when catching up", ">= 20000"),
    ),
    "Where the time goes": tuple(
        Row("stages", f"{stream}.{key}", f"{of}{what}")
        for stream, of in (("table", "12 columns: "), ("image", "conv net: "))
        for key, what in (
            ("loop_us_per_sample", "microseconds of the loop per sample"),
            ("step_share", "share of it in `learn` and `predict`, the work of the bare loop"),
            *((f"us_per_sample.{stage}", f"microseconds in `{stage}`") for stage in STAGES),
            ("us_per_sample.feed", "microseconds of the thread that reads and decodes, beside the loop"),
        )
    ),
    "A user's record": (
        Row("encode", "json_ratio", "time to decode and encode 12 columns of JSON over orjson alone"),
        Row("encode", "avro_ratio", "the same of Avro over fastavro alone"),
    ),
    "Answers": (
        Row("serve", "p99_over_p50_16", "p99 over p50 of `/predict` at 16 connections", "<= 1.5"),
        Row("serve", "max_over_p50_16", "slowest over p50 at 16 connections", "<= 4"),
        Row("serve", "json_over_litserve", "rate with JSON, one process, over LitServe, which has two", ">= 3"),
        Row("serve", "raw_over_bare_asgi", "rate with a raw tensor over uvicorn and the network alone", ">= 0.9"),
        Row("serve", "p99_ms_at_half_rate", "p99 in ms at half of the highest rate", "<= 10"),
        Row("serve", "p99_saving_over_alone", "p99 while saving and publishing over p99 alone"),
    ),
    "Freshness": (
        Row("freshness", "label_to_served_p50_s", "seconds from a label to the teacher that answers, p50"),
        Row("freshness", "label_to_served_p99_s", "the same, p99; new labels are published after .25 s", "<= 1"),
        Row("freshness", "sample_to_weights_p99_s", "seconds from a sample to the weights, p99"),
        Row("freshness", "publication_stall_ms", "ms that the loop spends on a publication", "<= 1"),
        Row("freshness", "checkpoint_stall_ms", "ms that the loop spends on a checkpoint", "<= 5"),
    ),
    "Growth": (
        Row(
            "growth",
            "cost_last_over_first",
            "CPU per sample after a million over that after 200,000, past the horizon",
            "<= 1.1",
        ),
        Row("growth", "rss_last_over_first", "memory at these two places", "<= 1.1"),
        Row("growth", "store_last_over_first", "size of the sample store at these two places", "<= 1.1"),
        Row("growth", "cost_64_over_1", "CPU per sample with 64 partitions over that with one", "<= 1.1"),
    ),
}


def scripts() -> list[str]:
    """All that `make bench` runs."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NOT_RUN)


def run(name: str, *, quick: bool) -> dict[str, Any] | None:
    """The last line of a script; None if it failed."""
    given = [sys.executable, str(HERE / f"{name}.py"), *(["--quick"] if quick else [])]
    done = subprocess.run(given, stdout=subprocess.PIPE, text=True, check=False)
    sys.stdout.write(done.stdout)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        print(f"{name}: failed with exit code {done.returncode}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def machine() -> str:
    """Its processor, and how many of it."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{os.cpu_count()} x {models[0] if models else 'CPU'}"


def value_of(figures: dict[str, Any], key: str) -> float | None:
    """A figure by its path; None if the script does not have it."""
    found: Any = figures
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return None if found is None else float(found)


def is_met(value: float, goal: str) -> bool:
    """Whether a figure reaches its goal."""
    sign, limit = goal.split()
    return value <= float(limit) if sign == "<=" else value >= float(limit)


def report(results: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Performance",
        "",
        "Each figure is a ratio against a rival or a limit measured in the same run, or says what its limit is.",
        "`make bench` measures all of them again and writes this page; `benchmarks/NAME.py` says what is compared.",
        "A figure is not measured if its script was not run in full since it was written.",
        "`make gpu` tests and measures a GPU; the goal is 1.15 for `learn_over_graph`. No GPU was at hand so far.",
        "",
    ]
    for title, rows in TABLES.items():
        lines += [f"## {title}", "", "| | figure | goal | met | measured by |", "|---|---|---|---|---|"]
        for row in rows:
            kept = results.get(row.script)
            value = None if kept is None else value_of(kept["figures"], row.key)
            shown = "not measured" if value is None else f"{value:g}"
            met = "" if value is None or not row.goal else ("yes" if is_met(value, row.goal) else "**no**")
            lines.append(f"| {row.what} | {shown} | {row.goal} | {met} | `benchmarks/{row.script}.py` |")
        lines.append("")
    lines += ["## When and where", "", "| script | date | machine |", "|---|---|---|"]
    used = sorted({row.script for rows in TABLES.values() for row in rows} & results.keys())
    lines += [f"| `{name}` | {results[name]['date']} | {results[name]['machine']} |" for name in used]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, keep, write; 1 if a script failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="scripts without .py; default: all")
    parser.add_argument("--quick", action="store_true", help="short runs; nothing is kept")
    parser.add_argument("--report", action="store_true", help="write the page only")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = 0
    for name in [] if options.report else options.names or scripts():
        print(f"== {name}", file=sys.stderr, flush=True)
        found = run(name, quick=options.quick)
        failed += found is None
        if found is not None and not options.quick:
            results[name] = {
                "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
                "machine": machine(),
                "figures": found,
            }
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    if not options.quick:
        DOCUMENT.write_text(report(results))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
