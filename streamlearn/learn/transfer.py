"""Copies between host and device that make neither wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from streamlearn.records import Array


def to_device(array: Array, device: torch.device) -> Tensor:
    """The array on the device; on a CPU it may share memory with a writable, contiguous array."""
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def start_reading(tensor: Tensor) -> Callable[[], npt.NDArray[Any]]:
    """Start a copy to the host, and return the function that waits for it."""
    if tensor.device.type == "cpu":
        return tensor.numpy
    with torch.cuda.device(tensor.device):
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copied.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

    def wait() -> npt.NDArray[Any]:
        done.synchronize()
        return copied.numpy()

    return wait
