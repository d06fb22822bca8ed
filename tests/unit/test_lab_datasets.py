"""Data sets: their content, and errors for invalid files and schemas."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import datasets as sklearn_datasets
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from streamlearn.config import SchemaConfig
from streamlearn.errors import ConfigError
from streamlearn.lab.datasets import FASHION_CLASSES, FASHION_FOLDERS, Dataset, load
from streamlearn.records import Schema

TEN = tuple("0123456789")


def write_idx(path: Path, array: np.ndarray[Any, np.dtype[np.uint8]], *, magic: int | None = None) -> None:
    header = struct.pack(">I", magic or 2048 + array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A folder in the format of Fashion-MNIST, with six and three images."""
    for part, count in (("train", 6), ("t10k", 3)):
        images = np.arange(count * 784, dtype=np.uint32).astype(np.uint8).reshape(count, 28, 28)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    return tmp_path


class TestNamed:
    def test_digits_are_sixteen_greys_with_a_balanced_holdout(self) -> None:
        """1,297 samples to stream and 500 held out, always the same, all classes in both."""
        digits, again = load("digits"), load("digits")

        assert digits.test_x is not None
        assert digits.test_y is not None
        assert (digits.x.shape, digits.x.dtype, digits.test_x.shape) == ((1297, 1, 8, 8), np.uint8, (500, 1, 8, 8))
        assert (digits.x.min(), digits.x.max()) == (0, 16)
        assert np.bincount(digits.test_y).min() >= 45
        assert np.array_equal(digits.x, again.x)
        bunch = sklearn_datasets.load_digits()
        split = train_test_split(
            bunch.images.astype(np.uint8)[:, None], bunch.target, test_size=500, stratify=bunch.target, random_state=0
        )
        for ours, theirs in zip((digits.x, digits.test_x, digits.y, digits.test_y), split, strict=True):
            assert np.array_equal(ours, theirs)
        together = {row.tobytes() for row in digits.x} | {row.tobytes() for row in digits.test_x}
        assert len(together) == 1797, "a sample is in both parts"

    def test_moons_are_two_balanced_classes(self) -> None:
        """The upper and the lower half circle."""
        moons = load("moons")

        assert (moons.x.shape, moons.x.dtype, moons.classes) == ((20_000, 2), np.float32, ("upper", "lower"))
        assert moons.x[moons.y == 0, 1].mean() > moons.x[moons.y == 1, 1].mean()
        assert 0.45 < moons.y.mean() < 0.55

    def test_shuttle_is_mostly_normal(self) -> None:
        """The imbalanced Statlog stream: 49,097 rows of 9 numbers, 3,511 anomalies."""
        shuttle = load("shuttle")

        assert (shuttle.x.shape, int(shuttle.y.sum()), shuttle.classes[1]) == ((49_097, 9), 3511, "anomaly")
        assert shuttle.x[0].tolist() == [50, 21, 77, 0, 28, 0, 27, 48, 22]

    def test_rbf_drift_has_moving_clusters(self) -> None:
        """1-NN on the first 1,000 samples is accurate on the next 1,000 but not on the last."""
        drift, again = load("rbf-drift"), load("rbf-drift", limit=100)

        assert (drift.x.shape, drift.x.dtype, len(drift.classes)) == ((30_000, 20), np.float32, 4)
        assert np.array_equal(drift.x[:100], again.x)
        nearest = KNeighborsClassifier(1).fit(drift.x[:1000], drift.y[:1000])
        soon, late = (nearest.score(drift.x[part], drift.y[part]) for part in (slice(1000, 2000), slice(-1000, None)))
        assert soon > 0.95 > late + 0.15

    @pytest.mark.parametrize("name", ["digits", "moons", "shuttle", "rbf-drift"])
    def test_suggested_settings_are_the_schema_of_the_samples(self, name: str) -> None:
        """They are valid settings and build the schema of the data set."""
        dataset = load(name, limit=10)

        built = SchemaConfig(**dataset.suggested["schema"]).build()
        assert replace(built, scale=1.0) == dataset.schema, "scaling is the network's"

    def test_limit_keeps_the_first_samples_and_the_whole_holdout(self) -> None:
        """Short and long streams are scored on the same held-out part."""
        digits = load("digits", limit=7)

        assert (len(digits.x), len(digits.y)) == (7, 7)
        assert np.array_equal(digits.x, load("digits").x[:7])
        assert digits.test_y is not None
        assert len(digits.test_y) == 500

    @pytest.mark.parametrize(("name", "limit"), [("mnist", None), ("digits", 0), ("missing.npz", None), ("", None)])
    def test_invalid_arguments_are_config_errors(self, name: str, limit: int | None) -> None:
        """An unknown name, a missing file, a limit of 0."""
        with pytest.raises(ConfigError):
            load(name, limit=limit)

    def test_the_error_for_an_unknown_name_lists_the_known_ones(self) -> None:
        """And the option of a .npz file."""
        with pytest.raises(ConfigError, match=r"'mnist'.*digits, fashion-mnist, shuttle, moons, rbf-drift, or a path"):
            load("mnist")


class TestFashion:
    def test_reads_the_four_files(self, fashion: Path) -> None:
        """Images have shape (1, 28, 28); the test files become the held-out part."""
        dataset = load("fashion-mnist", folder=fashion)

        assert (dataset.x.shape, dataset.classes) == ((6, 1, 28, 28), FASHION_CLASSES)
        assert dataset.y.tolist() == [0, 1, 2, 3, 4, 5]
        assert dataset.test_x is not None
        assert dataset.test_x.shape == (3, 1, 28, 28)
        assert dataset.x[1, 0, 0, :3].tolist() == [16, 17, 18]

    def test_the_error_for_missing_files_names_the_package(self, tmp_path: Path) -> None:
        """And the searched folder."""
        with pytest.raises(ConfigError, match=f"{tmp_path}.*apt-get install dataset-fashion-mnist"):
            load("fashion-mnist", folder=tmp_path)

    @pytest.mark.parametrize("damage", ["cut", "magic", "plain", "count", "gone"])
    def test_a_damaged_file_is_refused(self, fashion: Path, damage: str) -> None:
        """Truncated, another type, not gzip, another length, or missing."""
        path = fashion / "t10k-labels-idx1-ubyte.gz"
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-9])
        elif damage == "magic":
            write_idx(path, np.zeros(3, np.uint8), magic=9)
        elif damage == "plain":
            path.write_bytes(b"no gzip")
        elif damage == "count":
            write_idx(path, np.zeros(2, np.uint8))
        else:
            path.unlink()

        with pytest.raises(ConfigError, match="wanted"):
            load("fashion-mnist", folder=fashion)

    @pytest.mark.parametrize("folder", [path for path in FASHION_FOLDERS if path.is_dir()])
    def test_the_debian_package_is_complete(self, folder: Path) -> None:
        """60,000 images, balanced; runs where the package is installed."""
        dataset = load("fashion-mnist", folder=folder)

        assert np.bincount(dataset.y).tolist() == [6000] * 10
        assert dataset.schema.nbytes == 784


class TestNpz:
    def test_reads_samples_classes_and_holdout(self, tmp_path: Path) -> None:
        """All five arrays; the name is that of the file."""
        path = tmp_path / "mine.npz"
        x = np.arange(12, dtype=np.float32).reshape(4, 3)
        np.savez(path, x=x, y=[0, 1, 1, 0], test_x=x[:1], test_y=[1], classes=["a", "b"])

        dataset = load(path)

        assert (dataset.name, dataset.classes, dataset.y.dtype) == ("mine", ("a", "b"), np.int64)
        assert np.array_equal(dataset.x, x)
        assert dataset.test_y is not None
        assert dataset.test_y.tolist() == [1]

    @pytest.mark.parametrize(
        ("y", "classes", "indices"),
        [
            (["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1]),
            ([2, 0, 2], ("0", "1", "2"), [2, 0, 2]),
            ([True, False, True], ("0", "1"), [1, 0, 1]),
        ],
    )
    def test_without_classes_they_are_taken_from_y(
        self, tmp_path: Path, y: list[Any], classes: tuple[str, ...], indices: list[int]
    ) -> None:
        """Sorted strings, or numbers from 0 to the largest."""
        path = tmp_path / "mine.npz"
        np.savez(path, x=np.zeros((3, 2), np.float32), y=y)

        dataset = load(path)

        assert (dataset.classes, dataset.y.tolist()) == (classes, indices)

    @pytest.mark.parametrize(
        ("x", "dtype", "shape"),
        [
            (np.zeros((2, 3), np.int64), "int32", (3,)),
            (np.zeros((2, 3), np.bool_), "uint8", (3,)),
            (np.zeros(2, np.float64), "float64", (1,)),
            (np.zeros((2, 1, 4, 4), np.uint8), "uint8", (1, 4, 4)),
            (np.ones((2, 3), ">f4"), "float32", (3,)),
        ],
    )
    def test_samples_are_converted_to_a_dtype_of_the_schema(
        self, tmp_path: Path, x: Any, dtype: str, shape: tuple[int, ...]
    ) -> None:
        """Wide integers that fit, booleans, scalars, swapped bytes."""
        path = tmp_path / "mine.npz"
        np.savez(path, x=x, y=[0, 1])

        schema = load(path).schema

        assert (schema.dtype, schema.dtype.isnative, schema.shape) == (np.dtype(dtype), True, shape)
        assert replace(SchemaConfig(**load(path).suggested["schema"]).build(), scale=1.0) == schema

    @pytest.mark.parametrize(
        "arrays",
        [
            {"x": np.zeros((2, 3))},
            {"y": [0, 1]},
            {"x": np.zeros((2, 3)), "y": [0, 1, 1]},
            {"x": np.zeros((0, 3)), "y": np.zeros(0, np.int64)},
            {"x": np.zeros((2, 3)), "y": [0.0, 1.0]},
            {"x": np.zeros((2, 3)), "y": [0, -1]},
            {"x": np.zeros((2, 3)), "y": [0, 0]},
            {"x": np.zeros((2, 3)), "y": [[0], [1]]},
            {"x": np.zeros((2, 3)), "y": ["a", "b"], "classes": ["a", "c"]},
            {"x": np.zeros((2, 3)), "y": [0, 2], "classes": ["a", "c"]},
            {"x": np.zeros((2, 3)), "y": [0, 1], "classes": ["a", "a"]},
            {"x": np.full((2, 3), np.nan), "y": [0, 1]},
            {"x": np.full((2, 3), 2**40), "y": [0, 1]},
            {"x": np.full((2, 3), 1j), "y": [0, 1]},
            {"x": np.zeros((2, 1, 1, 1, 1, 1)), "y": [0, 1]},
            {"x": np.zeros((2, 3)), "y": [0, 1], "test_x": np.zeros((1, 3))},
            {"x": np.zeros((2, 3)), "y": [0, 1], "test_x": np.zeros((1, 4)), "test_y": [0]},
            {"x": np.zeros((2, 3)), "y": [0, 1], "test_x": np.zeros((1, 3)), "test_y": [2]},
            {"x": np.zeros((2, 3)), "y": [0, 1], "test_x": np.zeros((2, 3)), "test_y": [1]},
        ],
    )
    def test_an_invalid_file_is_refused(self, tmp_path: Path, arrays: dict[str, Any]) -> None:
        """Missing, inconsistent or unsupported arrays; the error names the file."""
        path = tmp_path / "mine.npz"
        np.savez(path, **arrays)

        with pytest.raises(ConfigError, match=r"mine\.npz: .*"):
            load(path)

    def test_pickled_objects_are_refused(self, tmp_path: Path) -> None:
        """Unpickling could run code."""
        path = tmp_path / "mine.npz"
        np.savez(path, x=np.zeros((1, 1)), y=np.array([print], object))

        with pytest.raises(ConfigError, match="without pickled objects"):
            load(path)

    def test_a_file_that_is_not_an_archive_is_refused(self, tmp_path: Path) -> None:
        """Any bytes with the extension .npz."""
        path = tmp_path / "mine.npz"
        path.write_bytes(b"PK\x03\x04 no zip")

        with pytest.raises(ConfigError, match=r"wanted a \.npz file"):
            load(path)

    def test_a_single_array_is_refused(self, tmp_path: Path) -> None:
        """A .npy file with the extension .npz."""
        path = tmp_path / "mine.npz"
        with path.open("wb") as file:
            np.save(file, np.zeros(3))

        with pytest.raises(ConfigError, match="got a single array"):
            load(path)


class TestFit:
    DATASET = Dataset("d", np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2), np.array([0, 1]), ("a", "b"))

    def test_reshapes_and_casts(self) -> None:
        """Images become flat floats; classes take the names of the schema."""
        fitted = self.DATASET.fit(Schema((4,), np.dtype("float32"), ("0", "1")))

        assert fitted.x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert (fitted.x.dtype, fitted.classes) == (np.float32, ("0", "1"))

    @pytest.mark.parametrize(
        "schema",
        [
            Schema((65,), np.dtype("uint8"), TEN),
            Schema((64,), np.dtype("int8"), TEN),
            Schema((64,), np.dtype("uint8"), TEN[:9]),
        ],
    )
    def test_refuses_a_schema_that_would_change_values(self, schema: Schema) -> None:
        """Another size, a narrower dtype, another number of classes; the error has settings that fit."""
        digits = load("digits", limit=3)

        with pytest.raises(
            ConfigError, match=r"set shape = \[1, 8, 8\], dtype = 'uint8', classes = 10, scale = 0.0625"
        ):
            digits.fit(schema)
