"""Noise for images (B, channels, height, width), a whole batch at once, each image independently.

Images may have any range. Shift, flip and crop only move pixels. Colour and cutout use means and deviations of the
image itself, so pixels from 0 to 1 and standardised ones get the same noise (that of a x + b is a times that of x, plus
b). Nothing is clipped, so pixels may leave their range a little.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional

ASPECT = 4 / 3
"""Largest ratio of a crop's width to height, or height to width."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""


def shift(x: Tensor, generator: Generator, *, pixels: int, flip: bool) -> Tensor:
    """Move each image by up to `pixels` in both directions, with reflected edges; mirror half of them.

    One gather moves the whole batch in channels-last order, where a pixel's channels are contiguous.
    """
    batch, _, height, width = x.shape
    rows = _shifted(batch, height, pixels, x, generator)
    columns = _shifted(batch, width, pixels, x, generator)
    if flip:
        mirrored = torch.rand((batch, 1), generator=generator, device=x.device) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    images = torch.arange(batch, device=x.device)
    moved = x.permute(0, 2, 3, 1)[images[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def _shifted(batch: int, size: int, most: int, x: Tensor, generator: Generator) -> Tensor:
    """Indices (batch, size) of a line of pixels after a random shift, reflected at both ends."""
    most = min(most, size - 1)
    offsets = torch.randint(-most, most + 1, (batch, 1), generator=generator, device=x.device)
    moved = (torch.arange(size, device=x.device) + offsets).abs()
    return (size - 1) - ((size - 1) - moved).abs()


def resized_crop(x: Tensor, generator: Generator, *, scale: float) -> Tensor:
    """Crop a part and resize it to the whole image, bilinearly (the crop of Inception, Szegedy et al., 2015).

    The part has `scale` to 1 of the area, at a random place. Its aspect ratio is 3/4 to 4/3 of the image's (uniform in
    the logarithm), limited to the image.
    """
    area, aspect, left, top = _uniform((4, len(x)), x, generator)
    side = (scale + (1.0 - scale) * area).sqrt()
    stretch = torch.exp((aspect - 0.5) * math.log(ASPECT))
    width, height = (side * stretch).clamp(max=1.0), (side / stretch).clamp(max=1.0)
    none = torch.zeros_like(width)
    # From coordinates in the view to those in the image, both from -1 to 1.
    across = torch.stack((width, none, (2.0 * left - 1.0) * (1.0 - width)), dim=1)
    down = torch.stack((none, height, (2.0 * top - 1.0) * (1.0 - height)), dim=1)
    grid = functional.affine_grid(torch.stack((across, down), dim=1), list(x.shape), align_corners=False)
    cropped = functional.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return cropped.contiguous(memory_format=torch.channels_last)


def colour(x: Tensor, generator: Generator, *, strength: float) -> Tensor:
    """Change saturation, then contrast, then brightness, each by up to `strength`, a share from 0 to 1.

    With factors s and c from U(1 - strength, 1 + strength) and a shift b from U(-strength, strength),

        x <- grey + s (x - grey),    x <- mean + c (x - mean),    x <- x + b deviation

    where `grey` is the luma of each pixel (with three channels; else saturation is unchanged), `mean` the mean luma of
    the image, and `deviation` the standard deviation of all its values. As torchvision's ColorJitter, except for
    brightness: there it is a factor, which would be contrast for centred inputs.
    """
    drawn = 2.0 * _uniform((3, len(x), 1, 1, 1), x, generator) - 1.0
    saturation, contrast = 1.0 + strength * drawn[0], 1.0 + strength * drawn[1]
    is_rgb = x.shape[1] == len(LUMA)
    # Three numbers on the host: a tensor of them would be copied to the device in each step.
    red, green, blue = LUMA
    grey = red * x[:, :1] + green * x[:, 1:2] + blue * x[:, 2:] if is_rgb else x
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    deviation = x.flatten(1).std(dim=1, correction=0).view_as(mean)
    # Saturation leaves the mean grey unchanged, so all three are one sum.
    offset = (1.0 - contrast) * mean + strength * drawn[2] * deviation
    if not is_rgb:
        return torch.addcmul(offset, x, contrast)
    return torch.addcmul(offset + contrast * (1.0 - saturation) * grey, x, contrast * saturation)


def cutout(x: Tensor, generator: Generator, *, pixels: int) -> Tensor:
    """Cover a square with a side of `pixels`, centred anywhere, with the image's mean of each channel.

    DeVries and Taylor (2017), who cover with the 0 of standardised images. Near an edge, part of it lies outside.
    """
    batch, _, height, width = x.shape
    rows = _covered(batch, height, pixels, x, generator)
    columns = _covered(batch, width, pixels, x, generator)
    covered = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(covered, x.mean(dim=(2, 3), keepdim=True), x)


def _covered(batch: int, size: int, pixels: int, x: Tensor, generator: Generator) -> Tensor:
    """Which places (batch, size) of a line are within `pixels` around a random centre."""
    first = torch.randint(size, (batch, 1), generator=generator, device=x.device) - pixels // 2
    places = torch.arange(size, device=x.device)
    return (places >= first) & (places < first + pixels)


def _uniform(shape: tuple[int, ...], x: Tensor, generator: Generator) -> Tensor:
    """Uniform from 0 to 1."""
    return torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)
