"""Noise for images, each kind against a simple reference."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from streamlearn.learn.noise.image import colour, cutout, resized_crop, shift

GRID = torch.arange(2 * 3 * 6 * 7, dtype=torch.float32).reshape(2, 3, 6, 7)
ALL = {
    "shift": partial(shift, pixels=2, flip=True),
    "crop": partial(resized_crop, scale=0.3),
    "colour": partial(colour, strength=0.5),
    "cutout": partial(cutout, pixels=3),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, channels: int = 3, height: int = 9, width: int = 8) -> torch.Tensor:
    """Channels-last, as the learner's are."""
    x = torch.rand((count, channels, height, width), generator=seeded(5))
    return x.contiguous(memory_format=torch.channels_last)


def by_hand(x, rows: int, columns: int, mirrored: bool):
    """One image padded by reflection and cropped at an offset."""
    padded = torch.nn.functional.pad(x[None], (2, 2, 2, 2), mode="reflect")[0]
    cut = padded[:, 2 + rows : 2 + rows + x.shape[1], 2 + columns : 2 + columns + x.shape[2]]
    return cut.flip(2) if mirrored else cut


class TestEach:
    @pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_keeps_shape_dtype_and_layout_and_its_input(self, noise, channels):
        """float32 and channels-last, so that nothing is copied; also for a single row."""
        for count in (1, 5):
            x = pictures(count, channels)
            before = x.clone()

            view = noise(x, seeded())

            assert view.shape == x.shape, count
            assert view.dtype == torch.float32
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(x, before)

    @pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
    def test_is_a_function_of_the_generator_alone(self, noise):
        """The same seed gives the same view, the next call another; torch's global generator is not used."""
        x, generator, global_state = pictures(6), seeded(1), torch.get_rng_state()

        first, second = noise(x, generator), noise(x, generator)

        assert torch.equal(first, noise(x, seeded(1)))
        assert not torch.equal(first, second)
        assert torch.equal(global_state, torch.get_rng_state())

    @pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
    def test_draws_for_each_image_independently(self, noise):
        """Copies of one image get different views."""
        views = noise(pictures(1).expand(40, -1, -1, -1), seeded())

        assert len({view.contiguous().numpy().tobytes() for view in views}) > 10

    @pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
    def test_does_not_depend_on_the_range_of_pixels(self, noise):
        """Pixels from 0 to 1 and standardised ones: the view of 3 x - 2 is 3 times that of x, minus 2."""
        x = pictures(6)

        torch.testing.assert_close(noise(3.0 * x - 2.0, seeded()), 3.0 * noise(x, seeded()) - 2.0)

    @pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
    def test_leaves_a_constant_image_unchanged(self, noise):
        """Also colour, and the mean that covers."""
        x = torch.full((8, 3, 9, 8), 0.25)

        torch.testing.assert_close(noise(x, seeded()), x)


class TestShift:
    def test_is_a_reflected_shift_and_a_mirror_of_each_image(self):
        """Every view is one of the 5 x 5 x 2 possible ones, and images move independently."""
        x = GRID[:1].expand(200, 3, 6, 7)
        possible = {
            by_hand(GRID[0], rows, columns, mirrored).numpy().tobytes()
            for rows in range(-2, 3)
            for columns in range(-2, 3)
            for mirrored in (False, True)
        }

        views = shift(x, seeded(), pixels=2, flip=True)

        seen = {view.contiguous().numpy().tobytes() for view in views}
        assert seen <= possible
        assert len(seen) > 40

    def test_of_zero_pixels_is_the_image(self):
        """Without a shift and a flip."""
        assert torch.equal(shift(GRID, seeded(), pixels=0, flip=False), GRID)

    def test_larger_than_the_image_stays_inside(self):
        """A reflection reaches at most to the other edge."""
        view = shift(GRID, seeded(), pixels=64, flip=True)

        assert view.shape == GRID.shape
        assert torch.isin(view, GRID).all()


def bilinear(image: np.ndarray, row: float, column: float) -> float:
    """The value between pixel centres; beyond the edge, that of the edge."""
    row, column = (min(max(at, 0.0), size - 1.0) for at, size in zip((row, column), image.shape, strict=True))
    top, left = min(int(row), image.shape[0] - 2), min(int(column), image.shape[1] - 2)
    down, right = row - top, column - left
    upper = image[top, left] * (1 - right) + image[top, left + 1] * right
    lower = image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
    return float(upper * (1 - down) + lower * down)


class TestResizedCrop:
    HEIGHT, WIDTH = 12, 10

    def crops(self, scale: float, count: int = 60):
        """Views of an image whose first two channels hold the coordinates of each pixel; the third is a picture."""
        x = pictures(1, 3, self.HEIGHT, self.WIDTH).expand(count, -1, -1, -1).clone()
        x[:, 0] = torch.arange(self.HEIGHT, dtype=torch.float32)[:, None]
        x[:, 1] = torch.arange(self.WIDTH, dtype=torch.float32)
        return x, resized_crop(x, seeded(3), scale=scale)

    def parts(self, views) -> np.ndarray:
        """(top, height, left, width) of the cropped part of each view, in pixels."""
        rows, columns = views[:, 0, :, 0].double().numpy(), views[:, 1, 0, :].double().numpy()
        found = []
        for centres, size in ((rows, self.HEIGHT), (columns, self.WIDTH)):
            pitch = (centres[:, 7] - centres[:, 2]) / 5
            # Pixel j of the view is at (j + .5) / size of the part; a pixel's centre is half a pixel into it.
            found += [centres[:, 2] + 0.5 - 2.5 * pitch, pitch * size]
        return np.stack(found, axis=1)

    def test_has_the_specified_size_and_place(self):
        """30 to 100 % of the area (less only at edges), nearly the image's aspect ratio, inside the image."""
        _, views = self.crops(0.3, count=400)
        top, height, left, width = self.parts(views).T
        share_height, share_width = height / self.HEIGHT, width / self.WIDTH

        area, aspect = share_height * share_width, share_width / share_height
        assert area.min() == pytest.approx(0.3, abs=0.02)
        assert 0.9 < area.max() <= 1.0 + 1e-5
        assert aspect.min() == pytest.approx(3 / 4, abs=0.02)
        assert aspect.max() == pytest.approx(4 / 3, abs=0.02)
        assert top.min() >= -1e-4
        assert left.min() >= -1e-4
        assert (top + height).max() <= self.HEIGHT + 1e-4
        assert (left + width).max() <= self.WIDTH + 1e-4
        freedom = (self.HEIGHT - height) > 1.0
        place = top[freedom] / (self.HEIGHT - height)[freedom]
        assert place.min() < 0.1
        assert place.max() > 0.9
        assert place.mean() == pytest.approx(0.5, abs=0.06)

    def test_is_bilinear(self):
        """Against the reference, pixel by pixel."""
        x, views = self.crops(0.3, count=5)
        picture = x[0, 2].numpy()

        for view, (top, height, left, width) in zip(views, self.parts(views), strict=True):
            expected = [
                [
                    bilinear(
                        picture,
                        top + (row + 0.5) * height / self.HEIGHT - 0.5,
                        left + (column + 0.5) * width / self.WIDTH - 0.5,
                    )
                    for column in range(self.WIDTH)
                ]
                for row in range(self.HEIGHT)
            ]
            np.testing.assert_allclose(view[2].numpy(), expected, atol=1e-3)

    def test_of_the_whole_area_is_almost_the_image(self):
        """Only the aspect ratio may differ."""
        area = np.prod(self.parts(self.crops(1.0)[1])[:, [1, 3]], axis=1) / (self.HEIGHT * self.WIDTH)

        assert area.min() > 3 / 4


class TestColour:
    def by_hand(self, x: np.ndarray, saturation: float, contrast: float, shift: float) -> np.ndarray:
        """By the definition, one image after the other."""
        deviation = x.std()
        if len(x) == 3:
            grey = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]
            x = grey + saturation * (x - grey)
        mean = (0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]).mean() if len(x) == 3 else x.mean()
        return mean + contrast * (x - mean) + shift * deviation

    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_is_saturation_contrast_and_brightness(self, channels):
        """Each view is the reference's for some factors within the strength."""
        x = pictures(30, channels)
        views = colour(x, seeded(), strength=0.4).double().numpy()

        factors = []
        for view, image in zip(views, x.double().numpy(), strict=True):
            # Three unknowns: what saturation multiplies, what contrast multiplies, and the shift.
            weights = np.array([0.299, 0.587, 0.114] if channels == 3 else [1 / channels] * channels)
            grey = np.tensordot(weights, image, 1)
            terms = [np.broadcast_to(grey, image.shape), np.ones(image.shape)]
            terms = [image, *terms] if channels == 3 else [image, terms[1]]
            solved, *_ = np.linalg.lstsq(np.stack([term.ravel() for term in terms], 1), view.ravel(), rcond=None)
            # image * c s + grey * c (1 - s) + offset, or image * c + offset
            contrast = solved[0] + solved[1] if channels == 3 else solved[0]
            saturation = solved[0] / contrast if channels == 3 else 1.0
            shift = (solved[-1] - (1.0 - contrast) * grey.mean()) / image.std()
            np.testing.assert_allclose(self.by_hand(image, saturation, contrast, shift), view, atol=1e-5)
            factors.append((saturation - 1.0, contrast - 1.0, shift))

        spread = np.abs(factors).max(axis=0)
        assert (spread <= 0.4 + 1e-4).all()
        assert (spread[1:] > 0.3).all()
        assert (spread[0] > 0.3) == (channels == 3)


class TestCutout:
    def test_covers_one_square_with_the_mean_of_each_channel(self):
        """4 x 4 pixels, fewer at an edge; centred anywhere, corners included."""
        x = pictures(500, 3, 9, 8)
        views = cutout(x, seeded(), pixels=4)

        corners = set()
        for image, view in zip(x, views, strict=True):
            rows, columns = torch.nonzero((view != image).any(dim=0), as_tuple=True)
            square = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
            height, width = view[0][square].shape
            assert 2 <= height <= 4
            assert 2 <= width <= 4
            expected = image.clone()
            for channel in range(3):
                expected[channel][square] = image[channel].mean()
            torch.testing.assert_close(view, expected)
            corners.add((int(rows.min()), int(columns.min()), height, width))
        # Centres in 9 rows x 8 columns: 9 x 8 squares, of which those cut at an edge differ in size.
        assert len(corners) == 72
