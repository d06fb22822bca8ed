"""Files of records through real processes: simulate, learn, serve; `predict` answers as the server does."""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from support import ask, command, finish, heartbeat, start, stop, until, write_config

from streamlearn.lab.broker import free_port

COLUMNS = """
[columns]
amount = "number"
shop = {{ kind = "category", buckets = 64 }}
at = {{ kind = "timestamp", unit = "ms" }}

[source.samples]
id = "tid"

[source.labels]
id = "tid"
label = "is_fraud"
values = {{ true = "fraud", false = "ok" }}

[schema]
classes = ["ok", "fraud"]

[model.options]
hidden = [16]

[learn]
threads = 1

[batch]
fresh = 20
steps = 1
max_age_s = 0.2

[state]
dir = "{folder}/state"

[serve]
port = {port}
processes = 1

[metrics]
port = 0
"""


class Learned(NamedTuple):
    """A folder with a learned state, and the server of it."""

    folder: Path
    config: Path
    url: str


def records(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "tid": f"t{n}",
            "amount": None if n % 9 == 0 else float(rng.normal()) + 3 * (n % 4 == 0),
            "shop": f"s{rng.integers(5)}",
            "at": 1_700_000_000_000 + n * 3_600_000,
            "is_fraud": n % 4 == 0,
        }
        for n in range(count)
    ]


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(found), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return path


@contextlib.contextmanager
def serving(folder: Path, config: Path, port: int, samples: object, *options: object) -> Iterator[Learned]:
    """Send the samples of a file with all their labels, learn them, and serve."""
    finish("simulate", samples, "--config", config, "--label-share", 1, "--label-delay", 5, *options)
    finish("learn", "--config", config, "--until-end", timeout_s=200.0)
    process = start("serve", "--config", config, output=folder / "server.log")
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: _is_ready(url), "a served teacher")
        yield Learned(folder, config, url)
    finally:
        stop(process)


def _is_ready(url: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(ask(f"{url}/model")[0] == 200)
    return False


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learned]:
    """Records with columns and mapped ids, labels and values, from a CSV."""
    folder, port = tmp_path_factory.mktemp("shop"), free_port("127.0.0.1")
    config = folder / "streamlearn.toml"
    config.write_text(COLUMNS.format(folder=folder, port=port))
    with serving(folder, config, port, write(folder / "history.csv", records(600)), "--order", "file") as learned:
        yield learned


def answers(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def same(found: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> bool:
    """Whether the answers of `predict` and of a server have the same classes and probabilities."""
    both = [np.array([answer["probabilities"] for answer in some]) for some in (found, predictions)]
    return bool(
        [answer["class"] for answer in found] == [answer["class"] for answer in predictions]
        and np.abs(both[0] - both[1]).max() < 1e-6
    )


@pytest.mark.timeout(300)
def test_a_learner_joins_all_labels_of_a_simulated_file(shop: Learned) -> None:
    """In the form that [source.labels] maps; no record becomes a dead letter, and every answer is scored."""
    accounts = heartbeat(shop.folder)["accounts"]
    scores = json.loads((shop.folder / "state" / "scores.json").read_bytes())

    assert (accounts["samples_learned"], accounts["labels_taken"]) == (600, 600)
    assert (accounts["samples_dead_lettered"], accounts["labels_dead_lettered"]) == (0, 0)
    assert scores["at_arrival"]["cumulative"]["count"] == 600


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_predict_answers_as_the_server_does(shop: Learned, suffix: str) -> None:
    """The same records over HTTP, from the same teacher."""
    given = [{name: value for name, value in record.items() if name != "is_fraud"} for record in records(40)]
    source = write(shop.folder / f"new{suffix}", given)

    found = answers(finish("predict", source, "--config", shop.config))
    status, reply = ask(f"{shop.url}/predict", {"instances": given})

    assert status == 200, reply
    assert [answer["id"] for answer in found] == [record["tid"] for record in given]
    assert same(found, reply["predictions"])
    assert {answer["model_version"] for answer in found} == {reply["model_version"]}


def test_without_columns_too(tmp_path: Path) -> None:
    """Tensors in an .npz file, or in x."""
    port = free_port("127.0.0.1")
    config, x = write_config(tmp_path, port=port), np.random.default_rng(0).integers(0, 17, (20, 1, 8, 8), np.uint8)
    np.savez(tmp_path / "x.npz", x=x)
    write(tmp_path / "x.jsonl", [{"id": n, "x": row} for n, row in enumerate(x.tolist())])

    with serving(tmp_path, config, port, "digits", "--limit", 300) as learned:
        found = [
            answers(finish("predict", tmp_path / name, "--config", config, "--version", version_of(learned)))
            for name in ("x.npz", "x.jsonl")
        ]
        _, reply = ask(f"{learned.url}/predict", {"instances": x.tolist()})

    assert [answer["id"] for answer in found[1]] == [str(n) for n in range(20)]
    assert all(same(some, reply["predictions"]) for some in found)


def version_of(learned: Learned) -> int:
    return int(ask(f"{learned.url}/model")[1]["model_version"])


@pytest.mark.parametrize(("lines", "code"), [("{\n[]\n", 1), ('{\n{"amount": 3}\n', 0)])
def test_the_exit_code_says_whether_any_record_could_be_read(shop: Learned, lines: str, code: int) -> None:
    """Bad records are on stderr, with line and reason; answers are on standard output."""
    done = subprocess.run(
        command("predict", "-", "--config", shop.config), input=lines, capture_output=True, text=True, check=False
    )

    assert done.returncode == code
    assert "line 1: not_json: " in done.stderr
    assert "Traceback" not in done.stderr
    assert len(answers(done.stdout)) == 1 - code


def test_a_missing_file_is_one_message(shop: Learned) -> None:
    """Exit code 2."""
    done = subprocess.run(
        command("predict", "nowhere.csv", "--config", shop.config), capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere.csv: cannot be read: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr
