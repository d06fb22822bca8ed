"""Our optimizers are torch's, bit for bit, and import no compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from streamlearn.learn.optimizers import SGD, AdamW

CASES = [(SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}), (SGD, {}), (AdamW, {"weight_decay": 0.1})]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_steps_are_those_of_torch(kind: type[torch.optim.Optimizer], options: dict[str, object]) -> None:
    """Parameters and state, after ten steps."""
    trained = []
    for each in (kind, getattr(torch.optim, kind.__name__)):
        parameter = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 7))
        optimizer = each([parameter], lr=0.1, fused=True, **options)
        for step in range(10):
            parameter.grad = torch.sin(parameter.detach() * step)
            optimizer.step()
        trained.append([parameter.detach(), *optimizer.state[parameter].values()])

    for ours, theirs in zip(*trained, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_a_learner_imports_no_slow_module() -> None:
    """Up to its first step; each of these takes half as long as torch itself, or more."""
    program = """
import sys, torch
import streamlearn.app.learner
from streamlearn.learn.optimizers import SGD, AdamW
for kind in (SGD, AdamW):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    kind([parameter], lr=0.1, fused=True).step()
print(*({"torch._dynamo", "kafka", "matplotlib", "pandas", "river", "scipy", "sklearn"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == ""
