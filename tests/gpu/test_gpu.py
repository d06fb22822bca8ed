"""The learner on a GPU. `make gpu` runs these; without a GPU they are skipped, and say so.

`tests/unit/test_host_waits.py` tests the same code path without a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from streamlearn.config import load_config
from streamlearn.lab.evaluate import EvaluationPlan, evaluate
from streamlearn.learn.learner import Learner
from streamlearn.learn.step import FIRST_STEPS
from streamlearn.models.build import ModelSpec, build
from tests.unit.test_host_waits import CASES, RGB, TABLE, batch
from tests.unit.test_learner import settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: there is no GPU")


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """CUDA raises where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(spec: ModelSpec, **changed: Any) -> Learner:
    twin = "off" if changed.get("method") == "supervised" else "measure"
    return Learner(spec, settings(spec, **{"device": "cuda", "twin": twin, **changed}))


def after_first_steps(learner: Learner) -> Learner:
    """In its first steps it may wait."""
    counts = {f"learner.{name}": np.array(FIRST_STEPS, np.int64) for name in ("updates", "twin_updates")}
    learner.load_state(learner.state() | counts)
    return learner


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_no_step_waits(case: str, precision: str) -> None:
    """For any method and any rows; and it learns, and answers with finite numbers."""
    spec, changed = CASES[case]
    learner = after_first_steps(on_gpu(spec, **{**changed, "precision": precision}))
    before = learner.teacher_state()

    for fresh, labelled in ((8, 4), (0, 4), (8, 0), (1, 0), (0, 1)):
        given = batch(learner, fresh, labelled)
        with waiting_is_an_error():
            learner.learn(given)

    assert learner.read_costs().skipped_steps == 0
    after = learner.teacher_state()
    assert any(not np.array_equal(before[name], after[name]) for name in after)
    assert np.isfinite(learner.predict(batch(learner, 8, 0).fresh_x).teacher_probs_BC).all()


def test_waiting_is_detected() -> None:
    """So that the test above can fail."""
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(4, device="cuda").sum().item()


@pytest.mark.parametrize("spec", [RGB, TABLE], ids=["images", "table"])
def test_answers_are_those_of_a_server_on_a_cpu(spec: ModelSpec) -> None:
    """Up to rounding: a score is of what is served."""
    learner = on_gpu(spec, precision="auto")
    given = batch(learner, 8, 4)
    for _ in range(20):
        learner.learn(given)
    served = build(spec).eval()
    served.load_state_dict({name: torch.from_numpy(array) for name, array in learner.teacher_state().items()})

    with torch.inference_mode():
        expected = served(torch.from_numpy(given.fresh_x)).softmax(dim=1).numpy()

    np.testing.assert_allclose(learner.predict(given.fresh_x).teacher_probs_BC, expected, atol=2e-3)


@pytest.mark.parametrize("spec", [RGB, TABLE], ids=["images", "table"])
def test_a_checkpoint_continues_on_the_other_device(spec: ModelSpec) -> None:
    """From CPU to GPU and back: no array is lost, and no step is skipped."""
    learner = Learner(spec, settings(spec, twin="measure"))
    for device in ("cuda", "cpu"):
        state = learner.state()
        learner = Learner(spec, settings(spec, twin="measure", device=device))
        learner.load_state(state)
        resumed = learner.state()
        assert resumed.keys() == state.keys()
        assert [name for name in state if not np.array_equal(state[name], resumed[name])] == []
        for _ in range(3):
            learner.learn(batch(learner, 8, 4))
    assert learner.step == 6
    assert learner.read_costs().skipped_steps == 0


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    """I4, decided on the device: weights, averages and the optimizer stay."""
    spec = replace(TABLE, normalise=False)
    learner = after_first_steps(on_gpu(spec))
    given = batch(learner, 8, 4)
    learner.learn(given)
    kept = ("student.", "teacher.", "optimizer.", "twin.")
    before = {name: array for name, array in learner.state().items() if name.startswith(kept)}
    with torch.no_grad():
        given.fresh_x[:] = np.nan
        given.labelled_x[:] = np.nan

    learner.learn(given)

    after = learner.state()
    assert learner.read_costs().skipped_steps == 1
    assert [name for name in before if not np.array_equal(before[name], after[name])] == []


def test_digits_are_learned_in_bfloat16() -> None:
    """The whole program on a GPU, as `streamlearn evaluate` runs it; `auto` selects GPU and precision."""
    torch.cuda.init()
    config = load_config(None, overrides={"batch.steps": 4}, environ={})
    plan = EvaluationPlan(dataset="digits", label_probability=0.2, window=100, passes=3)

    found = evaluate(config, plan, threading.Event())

    assert found.complete
    assert found.curves[-1].oracle > 0.85
