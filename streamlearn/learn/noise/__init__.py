"""Input noise, eta and eta': a function from prepared samples to a noisy view of them.

Added after normalisation, on the device, for the whole batch at once. All chance comes from the generator that is
passed in, so that a view is a function of (seed, step); each call draws anew, so two calls give two views. There are
two strengths (FixMatch, Sohn et al., 2020): a weak view, from which a target is made, and a strong one, to be learned.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from streamlearn.errors import ConfigError
from streamlearn.learn.noise.image import colour, cutout, resized_crop, shift
from streamlearn.learn.noise.table import feature_dropout, gaussian
from streamlearn.models.build import import_object

Noise: TypeAlias = Callable[[Tensor, Generator], Tensor]

_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class NoiseSettings:
    """Which noise; each field means what the key of its name in `[learn]` means."""

    noise: str
    noise_std: float
    pixel_noise_std: float
    shift_pixels: int
    flip: bool
    crop_scale: float = 1.0
    colour: float = 0.0
    cutout_pixels: int = 0
    feature_dropout: float = 0.0


def no_noise(x: Tensor, _generator: Generator) -> Tensor:
    """The samples as they are."""
    return x


def in_order(*noises: Noise) -> Noise:
    """Each upon the view of the one before it. None of them is asked where there are no rows."""

    def view(x: Tensor, generator: Generator) -> Tensor:
        for noise in noises if len(x) else ():
            x = noise(x, generator)
        return x

    return view


def make_noises(settings: NoiseSettings, *, shape: tuple[int, ...]) -> tuple[Noise, Noise]:
    """The weak and the strong noise that the settings name; one and the same where nothing makes it stronger.

    What is strong only: crop, colour and cutout; feature dropout. An import path is a factory, called without
    arguments, or where it has a parameter `strength`, once with "weak" and once with "strong".

    Raises:
        ConfigError: no such noise, or it does not fit samples of this shape.
    """
    is_image = len(shape) == 3
    name = settings.noise
    if name == "auto":
        name = "image" if is_image else "table"
    if name == "none":
        return no_noise, no_noise
    if name == "table":
        return _table(settings)
    if name == "image":
        if not is_image:
            raise ConfigError(f"learn.noise: image wants samples (channels, height, width), got {shape}")
        return _image(settings, shape)
    if ":" not in name:
        raise ConfigError(f"learn.noise: {name!r} is none of auto, image, table, none, nor an import path")
    return _foreign(name, shape)


def _table(settings: NoiseSettings) -> tuple[Noise, Noise]:
    added = [gaussian(settings.noise_std)] if settings.noise_std > 0.0 else []
    dropped = [feature_dropout(settings.feature_dropout)] if settings.feature_dropout > 0.0 else []
    return _weak_and_strong([], dropped, added)


def _image(settings: NoiseSettings, shape: tuple[int, ...]) -> tuple[Noise, Noise]:
    if settings.cutout_pixels >= min(shape[1:]):
        raise ConfigError(f"learn.cutout_pixels: {settings.cutout_pixels} is as large as images of shape {shape}")
    strong = []
    if settings.crop_scale < 1.0:
        strong.append(resized_crop(settings.crop_scale))
    if settings.colour > 0.0:
        strong.append(colour(settings.colour))
    if settings.cutout_pixels > 0:
        strong.append(cutout(settings.cutout_pixels))
    added = [gaussian(settings.pixel_noise_std)] if settings.pixel_noise_std > 0.0 else []
    return _weak_and_strong([shift(settings.shift_pixels, flip=settings.flip)], strong, added)


def _weak_and_strong(first: list[Noise], strong: list[Noise], last: list[Noise]) -> tuple[Noise, Noise]:
    weak = in_order(*first, *last)
    return weak, in_order(*first, *strong, *last) if strong else weak


def _foreign(path: str, shape: tuple[int, ...]) -> tuple[Noise, Noise]:
    factory = import_object(path, key="learn.noise")
    try:
        if "strength" in inspect.signature(factory).parameters:
            noises = in_order(factory(strength="weak")), in_order(factory(strength="strong"))
        else:
            noises = (in_order(factory()),) * 2
        clean = torch.zeros((2, *shape))
        noisy: list[object] = [noise(clean, Generator()) for noise in noises]
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise ConfigError(f"learn.noise: {path} fails on samples of shape {shape}: {error}") from error
    if not all(isinstance(view, Tensor) and view.shape == clean.shape for view in noisy):
        raise ConfigError(f"learn.noise: {path} does not return a view of the shape it was given, (2, *{shape})")
    return noises


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
