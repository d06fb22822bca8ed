"""No step and no prediction makes the host wait for the device (D9); tested without a GPU.

The learner runs on the CPU with the code path of a GPU (`host_may_ask` is off). Torch's modes intercept each call and
each kernel that would make the host wait for a GPU: reading a value, selecting by a mask, copying a host constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from streamlearn.learn.learner import Learner
from streamlearn.learn.rows import one_hot
from streamlearn.learn.step import FIRST_STEPS
from streamlearn.models.build import ModelSpec
from streamlearn.records import MicroBatch
from tests.tables import COLUMNS, table_spec
from tests.unit.test_learner import settings

RGB = ModelSpec("convnet", {"widths": [4, 6]}, (3, 8, 8), 3, normalise=False, scale=1 / 255)
TABLE = ModelSpec("mlp", {"hidden": [8]}, (5,), 3, normalise=True, scale=1.0)
KERNELS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")
CALLS = ("tensor", "as_tensor", "cpu", "numpy", "item", "tolist", "new_tensor", "__bool__", "__int__", "__float__")
CASES: dict[str, tuple[ModelSpec, dict[str, Any]]] = {
    "mean_teacher": (RGB, {"consistency": "kl"}),
    "spare_classes": (replace(RGB, classes=6, spare=3), {"contrast_weight": 0.3}),
    "ict": (RGB, {"method": "ict", "mixup_beta": 0.5}),
    "contrast": (RGB, {"method": "ict", "mixup_beta": 0.5, "contrast_weight": 0.3}),
    "contrast_of_columns": (table_spec(COLUMNS), {"mixup_beta": 0.2, "contrast_weight": 0.3}),
    "pi": (RGB, {"method": "pi"}),
    "bfloat16": (RGB, {"precision": "bfloat16"}),
    "temporal_ensembling": (RGB, {"method": "temporal_ensembling"}),
    "supervised": (RGB, {"method": "supervised", "optimizer": "sgd"}),
    "strong_noise": (RGB, {"colour": 0.3, "crop_scale": 0.5, "cutout_pixels": 4}),
    "softmatch": (RGB, {"gate": "softmatch", "align": "labels", "temperature": 0.5}),
    "freematch": (RGB, {"gate": "freematch", "align": "uniform"}),
    "robust_batch": (replace(RGB, options={"widths": [4, 6], "norm": "robust_batch"}), {}),
    "normalised_images": (replace(RGB, normalise=True), {"teacher_mode": "train"}),
    "table": (TABLE, {"feature_dropout": 0.2}),
    "columns": (table_spec(COLUMNS), {"feature_dropout": 0.2}),
}


class Kernels(TorchDispatchMode):
    """Collects the kernels that wait."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        by_mask = name.startswith("aten.index") and any(
            index is not None and index.dtype == torch.bool
            for indices in args
            if isinstance(indices, (list, tuple))
            for index in indices
            if isinstance(index, torch.Tensor)
        )
        if by_mask or any(waiting in name for waiting in KERNELS):
            self._found.append(name)
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Collects the calls that wait, which do nothing on a CPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in CALLS:
            self._found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[str]]:
    """Collects what would wait for a GPU."""
    found: list[str] = []
    with Calls(found), Kernels(found):
        yield found


def as_on_a_gpu(spec: ModelSpec, **changed: Any) -> Learner:
    """A learner on the CPU with the code path of a GPU, after its first steps, in which it may wait."""
    supervised = changed.get("method") == "supervised"
    learner = Learner(spec, settings(spec, **changed, twin="off" if supervised else "measure"), host_may_ask=False)
    counts = {f"learner.{name}": np.array(FIRST_STEPS, np.int64) for name in ("updates", "twin_updates")}
    learner.load_state(learner.state() | counts)
    return learner


def batch(learner: Learner, fresh: int, labelled: int) -> MicroBatch:
    spec, rng = learner.spec, np.random.default_rng(fresh)
    dtype = np.uint8 if len(spec.shape) == 3 else np.float32
    x = (rng.random((fresh + labelled, *spec.shape)) * 255).astype(dtype)
    keys = np.arange(fresh + labelled) % 5 if learner.wants_keys else None
    ids = [f"{n}" for n in range(min(labelled, 2))]
    return MicroBatch(x[:fresh], fresh, x[fresh:], np.arange(labelled) % 3, labelled, ids, keys)


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_and_a_prediction_only_for_its_answers(case: str) -> None:
    """For any method and any rows: the host waits once, where it reads the answers."""
    spec, changed = CASES[case]
    learner = as_on_a_gpu(spec, **changed)

    for fresh, labelled in ((8, 4), (0, 4), (8, 0), (1, 0), (0, 1)):
        given = batch(learner, fresh, labelled)
        with waits() as found:
            learner.learn(given)
        assert found == [], (fresh, labelled)
        with waits() as found:
            answers = learner.predict(given.fresh_x)
        assert found == (["numpy"] if fresh else []), fresh
        assert np.isfinite(answers.teacher_probs_BC).all()
    assert learner.read_costs().skipped_steps == 0


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x[x > 0],
        lambda x: x.new_tensor((1.0, 2.0)),
        lambda x: torch.tensor((1.0, 2.0)),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x.sum()),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put((x > 0,), torch.zeros(())),
    ],
)
def test_waiting_is_detected(waiting: Callable[[torch.Tensor], object]) -> None:
    """So that the test above can fail."""
    x = torch.ones(4)

    with waits() as found:
        waiting(x)

    assert found


def test_one_hot_is_that_of_torch() -> None:
    """Without checking the values."""
    labels_L = torch.tensor([2, 0, 1, 1])

    with waits() as found:
        hot_LC = one_hot(labels_L, 4)

    assert found == []
    assert torch.equal(hot_LC, torch.nn.functional.one_hot(labels_L, 4).to(torch.float32))
