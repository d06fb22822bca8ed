"""Input noise, eta and eta': a function from prepared samples to a noisy view of them.

Added after normalisation, on the device, for the whole batch at once. All chance comes from the generator that is
passed in, so that a view is a function of (seed, step); each call draws anew, so two calls give two views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from streamlearn.errors import ConfigError
from streamlearn.models.build import import_object

Noise: TypeAlias = Callable[[Tensor, Generator], Tensor]

_MASK = (1 << 64) - 1


def no_noise(x: Tensor, _generator: Generator) -> Tensor:
    """The samples as they are."""
    return x


def gaussian(std: float) -> Noise:
    """Add N(0, std^2) to each number by itself."""

    def add(x: Tensor, generator: Generator) -> Tensor:
        if std == 0.0:
            return x
        # In place on a tensor of the same layout: randn would fall back to channels-first.
        return torch.empty_like(x).normal_(0.0, std, generator=generator).add_(x)

    return add


def image(*, shift_pixels: int, flip: bool, std: float) -> Noise:
    """Shift each image by up to `shift_pixels` both ways, edges reflected; mirror half of them; add Gaussian noise.

    One gather moves the whole batch, in channels-last order, since there a pixel's channels are copied together.
    """
    add = gaussian(std)

    def view(x: Tensor, generator: Generator) -> Tensor:
        batch, _, height, width = x.shape
        rows = _shifted(batch, height, shift_pixels, x, generator)
        columns = _shifted(batch, width, shift_pixels, x, generator)
        if flip:
            mirrored = torch.rand((batch, 1), generator=generator, device=x.device) < 0.5
            columns = torch.where(mirrored, width - 1 - columns, columns)
        images = torch.arange(batch, device=x.device)
        moved = x.permute(0, 2, 3, 1)[images[:, None, None], rows[:, :, None], columns[:, None, :]]
        return add(moved.permute(0, 3, 1, 2), generator)

    return view


def _shifted(batch: int, size: int, most: int, x: Tensor, generator: Generator) -> Tensor:
    """Indices (batch, size) of a line of pixels after a random shift, reflected at both ends."""
    most = min(most, size - 1)
    offsets = torch.randint(-most, most + 1, (batch, 1), generator=generator, device=x.device)
    wanted = (torch.arange(size, device=x.device) + offsets).abs()
    return (size - 1) - ((size - 1) - wanted).abs()


def make_noise(
    name: str, *, shape: tuple[int, ...], std: float, pixel_std: float, shift_pixels: int, flip: bool
) -> Noise:
    """The noise that a setting names; an import path is a factory that is called without arguments.

    `std` is of gaussian noise alone, `pixel_std` of what is added to a shifted image.

    Raises:
        ConfigError: no such noise, or it does not fit samples of this shape.
    """
    is_image = len(shape) == 3
    if name == "auto":
        name = "image" if is_image else "gaussian"
    if name == "none":
        return no_noise
    if name == "gaussian":
        return gaussian(std)
    if name == "image":
        if not is_image:
            raise ConfigError(f"learn.noise: image wants samples (channels, height, width), got {shape}")
        return image(shift_pixels=shift_pixels, flip=flip, std=pixel_std)
    if ":" not in name:
        raise ConfigError(f"learn.noise: {name!r} is none of auto, gaussian, image, none, nor an import path")
    return _foreign(name, shape)


def _foreign(path: str, shape: tuple[int, ...]) -> Noise:
    try:
        noise: Noise = import_object(path, key="learn.noise")()
        clean = torch.zeros((2, *shape))
        noisy: object = noise(clean, Generator())
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise ConfigError(f"learn.noise: {path} fails on samples of shape {shape}: {error}") from error
    if not isinstance(noisy, Tensor) or noisy.shape != clean.shape:
        raise ConfigError(f"learn.noise: {path} does not return a view of the shape it was given, (2, *{shape})")
    return noise


def mixed_seed(*parts: int) -> int:
    """A seed from several numbers by SplitMix64 (Steele, Lea and Flood, 2014).

    Torch's CPU generator keeps the low 32 bits only, so the numbers cannot simply be packed side by side.
    """
    mixed = 0
    for part in parts:
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        mixed ^= mixed >> 31
    return mixed
