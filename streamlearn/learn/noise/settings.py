"""Options of each input noise, read from `[learn.noise_options]`. Without torch."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from streamlearn.section import Section


class NoiseOptions(Section):
    """Options of one noise. None, for `none` and for import paths."""


class TableNoise(NoiseOptions):
    """Of `table`."""

    std: float = Field(0.15, ge=0.0, le=10.0)
    """Standard deviation of Gaussian noise, after normalisation or scaling. With [columns]: on numbers and vectors."""
    feature_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Strong views: share of features, or whole columns, that take another row's value. 0: off."""
    category_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of categories that become missing. Without [columns] there are none. 0: off."""


class ImageNoise(NoiseOptions):
    """Of `image`."""

    pixel_noise_std: float = Field(0.0, ge=0.0, le=10.0)
    """Standard deviation of Gaussian noise. The paper's 0.15 is for unit variance; pixels from 0 to 1 need less."""
    shift_pixels: int = Field(2, ge=0, le=64)
    """Largest random shift in pixels, with reflected edges."""
    flip: bool = False
    """Mirror images left to right at random. Off for digits and text."""
    crop_scale: float = Field(1.0, gt=0.0, le=1.0)
    """Strong views: least share of the area that is cropped and resized to the whole. 1: off."""
    colour: float = Field(0.0, ge=0.0, le=1.0)
    """Strong views: largest change of brightness, contrast and saturation, as a share. 0: off."""
    cutout_pixels: int = Field(0, ge=0, le=1024)
    """Strong views: side of the square that is covered. 0: off."""


NOISES: Mapping[str, type[NoiseOptions]] = {"table": TableNoise, "image": ImageNoise, "none": NoiseOptions}
"""By `learn.noise`. `auto` is image for 3-d shapes, else table."""
