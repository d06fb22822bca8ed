"""Noise for images (B, channels, height, width): each a small function, a whole batch at once, an image by itself.

All of them take images in any range. Shift, flip and crop only move pixels. Colour and cutout are made of means and
deviations of the image itself, so pixels from 0 to 1 and standardised ones get the same noise (the noise of a x + b is
a times that of x, plus b); nothing is cut to a range, which pixels may therefore leave a little.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from streamlearn.learn.noise.build import Noise

ASPECT = 4 / 3
"""Of a crop, at most: width over height, or height over width."""
LUMA = (0.299, 0.587, 0.114)
"""Grey of red, green and blue (ITU-R BT.601)."""


def shift(pixels: int, *, flip: bool) -> Noise:
    """Move each image by up to `pixels` both ways, edges reflected; mirror half of them.

    One gather moves the whole batch, in channels-last order, since there a pixel's channels are copied together.
    """

    def view(x: Tensor, generator: Generator) -> Tensor:
        batch, _, height, width = x.shape
        rows = _shifted(batch, height, pixels, x, generator)
        columns = _shifted(batch, width, pixels, x, generator)
        if flip:
            mirrored = torch.rand((batch, 1), generator=generator, device=x.device) < 0.5
            columns = torch.where(mirrored, width - 1 - columns, columns)
        images = torch.arange(batch, device=x.device)
        moved = x.permute(0, 2, 3, 1)[images[:, None, None], rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2)

    return view


def _shifted(batch: int, size: int, most: int, x: Tensor, generator: Generator) -> Tensor:
    """Indices (batch, size) of a line of pixels after a random shift, reflected at both ends."""
    most = min(most, size - 1)
    offsets = torch.randint(-most, most + 1, (batch, 1), generator=generator, device=x.device)
    wanted = (torch.arange(size, device=x.device) + offsets).abs()
    return (size - 1) - ((size - 1) - wanted).abs()


def resized_crop(scale: float) -> Noise:
    """Cut a part out and stretch it to the whole image, bilinearly (the crop of Inception, Szegedy et al., 2015).

    The part has `scale` to 1 of the area, a width over height from 3/4 to 4/3 (evenly in its logarithm) of the image's
    own, cut at its edges, and lies anywhere.
    """

    def view(x: Tensor, generator: Generator) -> Tensor:
        area, aspect, left, top = _uniform((4, len(x)), x, generator)
        side = (scale + (1.0 - scale) * area).sqrt()
        stretch = torch.exp((aspect - 0.5) * math.log(ASPECT))
        width, height = (side * stretch).clamp(max=1.0), (side / stretch).clamp(max=1.0)
        none = torch.zeros_like(width)
        # From places in the view to places in the image, both from -1 to 1.
        across = torch.stack((width, none, (2.0 * left - 1.0) * (1.0 - width)), dim=1)
        down = torch.stack((none, height, (2.0 * top - 1.0) * (1.0 - height)), dim=1)
        grid = functional.affine_grid(torch.stack((across, down), dim=1), list(x.shape), align_corners=False)
        cropped = functional.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return cropped.contiguous(memory_format=torch.channels_last)

    return view


def colour(strength: float) -> Noise:
    """Change saturation, then contrast, then brightness, each by up to `strength`, a share from 0 to 1.

    With factors s and c from U(1 - strength, 1 + strength) and a shift b from U(-strength, strength),

        x <- grey + s (x - grey),    x <- mean + c (x - mean),    x <- x + b deviation

    where `grey` is the luma of each pixel (three channels; others keep their saturation), `mean` that of all of an
    image's pixels, and `deviation` that of all its numbers. As torchvision's ColorJitter, but for brightness, which
    is a factor there and would be contrast where inputs are centred.
    """

    def view(x: Tensor, generator: Generator) -> Tensor:
        drawn = 2.0 * _uniform((3, len(x), 1, 1, 1), x, generator) - 1.0
        saturation, contrast = 1.0 + strength * drawn[0], 1.0 + strength * drawn[1]
        is_rgb = x.shape[1] == len(LUMA)
        # By three numbers of the host's: a tensor of them would be copied to the device in each step.
        red, green, blue = LUMA
        grey = red * x[:, :1] + green * x[:, 1:2] + blue * x[:, 2:] if is_rgb else x
        mean = grey.mean(dim=(1, 2, 3), keepdim=True)
        deviation = x.flatten(1).std(dim=1, correction=0).view_as(mean)
        # Saturation leaves the mean grey as it is, so all three are one sum.
        offset = (1.0 - contrast) * mean + strength * drawn[2] * deviation
        if not is_rgb:
            return torch.addcmul(offset, x, contrast)
        return torch.addcmul(offset + contrast * (1.0 - saturation) * grey, x, contrast * saturation)

    return view


def cutout(pixels: int) -> Noise:
    """Cover a square of `pixels` a side, its centre anywhere, with the image's mean of each channel.

    DeVries and Taylor (2017), who cover with the 0 of standardised images. Near an edge a part of it lies outside.
    """

    def view(x: Tensor, generator: Generator) -> Tensor:
        batch, _, height, width = x.shape
        rows = _covered(batch, height, pixels, x, generator)
        columns = _covered(batch, width, pixels, x, generator)
        covered = (rows[:, :, None] & columns[:, None, :])[:, None]
        return torch.where(covered, x.mean(dim=(2, 3), keepdim=True), x)

    return view


def _covered(batch: int, size: int, pixels: int, x: Tensor, generator: Generator) -> Tensor:
    """Which places (batch, size) of a line lie in a stretch of `pixels` around a random one."""
    first = torch.randint(size, (batch, 1), generator=generator, device=x.device) - pixels // 2
    places = torch.arange(size, device=x.device)
    return (places >= first) & (places < first + pixels)


def _uniform(shape: tuple[int, ...], x: Tensor, generator: Generator) -> Tensor:
    """From 0 to 1."""
    return torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)
