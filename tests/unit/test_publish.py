"""Published teachers: whole files and one pointer that is replaced whole (I5)."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from streamlearn.errors import StateError
from streamlearn.state.publish import POINTER, PublishedDir, Publisher, load_arrays
from streamlearn.testing import FaultyFiles


def arrays(step: int) -> dict[str, np.ndarray]:
    return {"net.w": np.full(5, step, np.float32)}


def publisher(folder: Path, **more: object) -> Publisher:
    return Publisher(folder, keep=2, clock=lambda: 1234.5, **more)  # type: ignore[arg-type]


def test_servers_see_the_newest_with_its_header(tmp_path: Path) -> None:
    """Step, time and metadata travel with the weights."""
    seen = PublishedDir(tmp_path)
    assert seen.newest() is None

    publisher(tmp_path).publish(3, arrays(3), {"model_spec": "{}"})
    model = seen.newest()

    assert model is not None
    assert (model.step, model.published_at_s, model.metadata["model_spec"]) == (3, 1234.5, "{}")
    assert np.array_equal(load_arrays(model)["net.w"], arrays(3)["net.w"])


def test_the_oldest_are_removed(tmp_path: Path) -> None:
    """No more than `keep` teachers stay on disk (I6)."""
    writes = publisher(tmp_path)

    for step in range(1, 6):
        writes.publish(step, arrays(step), {})

    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "teacher-000000000004.safetensors",
        "teacher-000000000005.safetensors",
    ]


def test_any_single_fault_leaves_the_pointer_on_a_whole_teacher(tmp_path: Path) -> None:
    """Whatever operation fails, what the pointer names can be loaded, and is the old teacher or the new one."""
    for fail_at in itertools.count(1):
        publisher(tmp_path).publish(1, arrays(1), {})
        try:
            publisher(tmp_path, files=FaultyFiles(fail_at=fail_at)).publish(2, arrays(2), {})
        except OSError:
            model = PublishedDir(tmp_path).newest()
            assert model is not None
            assert np.array_equal(load_arrays(model)["net.w"], arrays(model.step)["net.w"])
        else:
            break

    assert fail_at == 11, "two whole writes of five operations each, then a clean run"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"step": "x"}', b"\xff"])
def test_a_pointer_that_cannot_be_read_is_an_error(tmp_path: Path, content: bytes) -> None:
    """A server keeps its teacher and says so; it does not guess."""
    (tmp_path / POINTER).write_bytes(content)

    with pytest.raises(StateError, match="pointer"):
        PublishedDir(tmp_path).newest()


def test_the_pointer_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    """A path in it counts by its last part only."""
    (tmp_path / POINTER).write_text('{"file": "../../etc/passwd", "step": 1, "published_at_s": 1, "metadata": {}}')

    model = PublishedDir(tmp_path).newest()

    assert model is not None
    assert model.path == tmp_path / "passwd"


def test_a_teacher_that_is_not_whole_is_an_error(tmp_path: Path) -> None:
    """Truncated weights are refused by name."""
    model = publisher(tmp_path).publish(1, arrays(1), {})
    model.path.write_bytes(model.path.read_bytes()[:-3])

    with pytest.raises(StateError, match="not readable as a published teacher"):
        load_arrays(model)
