"""Hostile files in the state folder: nothing in them is executed, and no path in them is followed.

Write access there can stop the learner or change the served weights (docs/security.md), but run no code.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness.fakes import ManualClock
from served import FLOATS, Served, client_of, error_of

import streamlearn
from streamlearn.errors import CheckpointError, NotPublishedError, StateError, StoreError, StreamlearnError
from streamlearn.ledger.request_queue import RequestQueue
from streamlearn.ledger.store_file import FILE
from streamlearn.ledger.view import LedgerView
from streamlearn.metrics import ServerMetrics
from streamlearn.models.build import ModelSpec
from streamlearn.serve.predictor import Predictor
from streamlearn.state.checkpoint import MAGIC, load_checkpoint, load_newest, path_of
from streamlearn.state.journal import read_journal
from streamlearn.state.publish import PIN, POINTER, PublishedDir, Publisher, teacher_path
from streamlearn.state.status import read_status

PACKAGE = Path(streamlearn.__file__).parent


class Evil:
    """An object whose unpickling creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.mkdir, (self.path,)


@pytest.fixture
def effect(tmp_path: Path) -> Iterator[Path]:
    """The folder that unpickling would create. At the end it must not exist."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "a file was executed"


def torch_file(blob: bytes) -> bytes:
    """As torch.save writes it: a zip with a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", blob)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def numpy_file(evil: Evil) -> bytes:
    """A .npy file of objects."""
    file = io.BytesIO()
    np.save(file, np.array([evil], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.fixture(params=["pickle", "torch", "numpy", "digest"])
def blob(request: pytest.FixtureRequest, effect: Path) -> bytes:
    """Pickles in several forms, one of them after the head of a real checkpoint."""
    plain = pickle.dumps(Evil(effect))
    return {
        "pickle": plain,
        "torch": torch_file(plain),
        "numpy": numpy_file(Evil(effect)),
        "digest": MAGIC + hashlib.sha256(plain).digest() + plain,
    }[request.param]


def test_the_pickle_works(tmp_path: Path) -> None:
    """Else the other tests would show nothing."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "executed")))

    assert (tmp_path / "executed").is_dir()


class TestPickles:
    def test_as_a_checkpoint_is_refused_and_set_aside(self, tmp_path: Path, blob: bytes) -> None:
        """Whatever comes before it in the file."""
        path_of(tmp_path, 7).write_bytes(blob)

        with pytest.raises(CheckpointError):
            load_checkpoint(path_of(tmp_path, 7))
        with pytest.raises(CheckpointError, match="no checkpoint is valid"):
            load_newest(tmp_path)

    @pytest.mark.parametrize("pinned", [True, False])
    def test_as_a_teacher_is_not_served(self, tmp_path: Path, blob: bytes, pinned: bool) -> None:
        """Nor listed among the versions."""
        folder = tmp_path / "published"
        folder.mkdir()
        path = folder / PIN if pinned else teacher_path(folder, 7)
        path.write_bytes(blob)
        if not pinned:
            pointer = {"file": path.name, "step": 7, "published_at_s": 1.0, "metadata": spec_of("mlp")}
            (folder / POINTER).write_text(json.dumps(pointer))
        predictor = Predictor(PublishedDir(folder), FLOATS, ServerMetrics(version="1"), factory="mlp")

        assert not predictor.refresh()
        assert predictor.published.versions() == []
        with pytest.raises(NotPublishedError):
            predictor.current()

    def test_as_a_pointer_or_a_heartbeat_is_ignored(self, tmp_path: Path, blob: bytes) -> None:
        """Both are JSON."""
        (tmp_path / POINTER).write_bytes(blob)

        with pytest.raises(StateError):
            PublishedDir(tmp_path).newest()
        assert read_status(tmp_path / POINTER) is None

    def test_in_the_journal_ends_it(self, tmp_path: Path, blob: bytes) -> None:
        """Like a torn line, or with a StateError."""
        (tmp_path / "journal-000000000001.log").write_bytes(blob)

        with contextlib.suppress(StateError):
            assert list(read_journal(tmp_path, 0)) == []

    def test_as_the_wanted_file_is_refused(self, tmp_path: Path, blob: bytes) -> None:
        """SQLite does not recognise it."""
        path = tmp_path / "label-requests.sqlite"
        path.write_bytes(blob * 100)

        with pytest.raises(StoreError):
            RequestQueue(path, per_hour=10, again_after_s=1.0).take(1, 100.0)

    def test_as_the_store_is_refused(self, tmp_path: Path, blob: bytes) -> None:
        """SQLite does not recognise it."""
        (tmp_path / FILE).write_bytes(blob * 200)
        view = LedgerView(tmp_path, FLOATS)

        with pytest.raises(StreamlearnError):
            view.get("a")
        view.close()


def spec_of(factory: str, **options: object) -> dict[str, str]:
    spec = ModelSpec(factory, options, FLOATS.shape, len(FLOATS.classes), normalise=False, scale=1.0)
    return {"model_spec": spec.to_json()}


class TestPaths:
    def test_a_pointer_names_no_file_outside_of_its_folder(self, tmp_path: Path) -> None:
        """Only the name is used; here a valid teacher is elsewhere."""
        served = Served(tmp_path)
        served.publish(7)
        elsewhere = tmp_path / "elsewhere.safetensors"
        shutil.move(teacher_path(tmp_path / "published", 7), elsewhere)
        for named in ("../elsewhere.safetensors", str(elsewhere), "x/../../elsewhere.safetensors"):
            pointer = json.loads((tmp_path / "published" / POINTER).read_bytes())
            (tmp_path / "published" / POINTER).write_text(json.dumps({**pointer, "file": named}))

            model = PublishedDir(tmp_path / "published").newest()

            assert model is not None
            assert model.path.parent == tmp_path / "published"
            assert not served.predictor.refresh()

    def test_a_teacher_cannot_name_a_factory(self, tmp_path: Path, effect: Path) -> None:
        """Only the config names the factory. A published file with another one is not loaded."""
        folder = tmp_path / "published"
        publisher = Publisher(folder, keep=2, clock=ManualClock())
        publisher.publish(7, {"a": np.zeros(1, np.float32)}, spec_of("os:mkdir", path=str(effect)))
        predictor = Predictor(PublishedDir(folder), FLOATS, ServerMetrics(version="1"), factory="mlp")

        assert not predictor.refresh()
        assert not effect.exists()

    @pytest.mark.parametrize("sample_id", ["../../etc/passwd", "/etc/passwd", "a/../wanted", "\x00", "~root"])
    @pytest.mark.parametrize("route", ["/sample/", "/label/"])
    def test_an_id_is_no_path(self, tmp_path: Path, route: str, sample_id: str) -> None:
        """It is only looked up; no file of that name is opened."""
        with client_of(Served(tmp_path)) as client:
            reply = client.get(route + "".join(f"%{byte:02x}" for byte in sample_id.encode()))

        assert error_of(reply, 404, "unknown_sample").details == {"id": sample_id}


FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {("torch", "load"), ("torch", "save"), ("yaml", "load"), ("os", "system"), ("os", "popen")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_reads_or_writes_a_format_that_executes(path: Path) -> None:
    """By its syntax tree: no pickle, no evaluation of text, no shell."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is True:
            found += [node.arg] if node.arg in ("allow_pickle", "shell") else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(node.func.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [node.attr] if (node.value.id, node.attr) in FORBIDDEN_METHODS else []

    assert found == []
