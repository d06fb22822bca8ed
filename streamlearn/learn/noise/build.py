"""Build the weak and the strong noise: functions from prepared samples to noisy views of them.

Noise is added after normalisation, on the device, to the whole batch at once. All randomness comes from the generator
that is passed in, so a view is a function of (seed, step), and two calls give two views. The weak view makes targets,
the strong one is learned from (FixMatch, Sohn et al., 2020).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from streamlearn.errors import ConfigError
from streamlearn.learn.noise.image import colour, cutout, resized_crop, shift
from streamlearn.learn.noise.settings import NOISES, ImageNoise, TableNoise
from streamlearn.learn.noise.table import feature_dropout, gaussian
from streamlearn.learn.settings import LearnConfig
from streamlearn.models.build import import_object

Noise: TypeAlias = Callable[[Tensor, Generator], Tensor]


def in_order(*noises: Noise) -> Noise:
    """Apply each noise to the view of the one before. None is called on an empty batch."""

    def view(x: Tensor, generator: Generator) -> Tensor:
        for noise in noises if len(x) else ():
            x = noise(x, generator)
        return x

    return view


no_noise = in_order()
"""The samples unchanged."""


def make_noises(config: LearnConfig, *, shape: tuple[int, ...]) -> tuple[Noise, Noise]:
    """The weak and the strong noise of `learn.noise`; the same object twice if nothing makes one stronger.

    Crop, colour, cutout and feature dropout are strong only. An import path is a factory. It is called once without
    arguments, or, if it has a parameter `strength`, with "weak" and with "strong".

    Raises:
        ConfigError: there is no such noise, or it does not fit samples of this shape.
    """
    options = config.noise_options
    if config.noise == "none":
        return no_noise, no_noise
    if isinstance(options, TableNoise):
        return _table(options)
    if isinstance(options, ImageNoise):
        if len(shape) != 3:
            raise ConfigError(f"learn.noise: image needs samples (channels, height, width), got {shape}")
        return _image(options, shape)
    return _imported(config.noise, shape)


def _table(options: TableNoise) -> tuple[Noise, Noise]:
    added = [partial(gaussian, std=options.std)] if options.std > 0.0 else []
    dropped = [partial(feature_dropout, probability=options.feature_dropout)] if options.feature_dropout > 0.0 else []
    return _weak_and_strong([], dropped, added)


def _image(options: ImageNoise, shape: tuple[int, ...]) -> tuple[Noise, Noise]:
    if options.cutout_pixels >= min(shape[1:]):
        raise ConfigError(
            f"learn.noise_options.cutout_pixels: {options.cutout_pixels} is as large as images of shape {shape}"
        )
    strong = []
    if options.crop_scale < 1.0:
        strong.append(partial(resized_crop, scale=options.crop_scale))
    if options.colour > 0.0:
        strong.append(partial(colour, strength=options.colour))
    if options.cutout_pixels > 0:
        strong.append(partial(cutout, pixels=options.cutout_pixels))
    added = [partial(gaussian, std=options.pixel_noise_std)] if options.pixel_noise_std > 0.0 else []
    return _weak_and_strong([partial(shift, pixels=options.shift_pixels, flip=options.flip)], strong, added)


def _weak_and_strong(first: Sequence[Noise], strong: Sequence[Noise], last: Sequence[Noise]) -> tuple[Noise, Noise]:
    weak = in_order(*first, *last)
    return weak, in_order(*first, *strong, *last) if strong else weak


def _imported(path: str, shape: tuple[int, ...]) -> tuple[Noise, Noise]:
    factory = import_object(path, key="learn.noise", built_in=("auto", *NOISES))
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
        raise ConfigError(f"learn.noise: {path} must return a view of the shape it is given, (2, *{shape})")
    return noises
