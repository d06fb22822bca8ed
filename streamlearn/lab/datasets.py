"""Labelled data sets that need no download, as arrays in file order.

digits          ships with the package
moons           scikit-learn, extra `lab`
shuttle         Statlog shuttle from river, extra `lab`: normal against anomalous
rbf-drift       a drifting mixture from river, extra `lab`; stream it in file order
fashion-mnist   files of the Debian package dataset-fashion-mnist
PATH.npz        any file with the arrays `x` and `y`
"""

from __future__ import annotations

import functools
import gzip
import itertools
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from streamlearn.errors import ConfigError
from streamlearn.lab.records import Records
from streamlearn.records import Array, Schema

Classes: TypeAlias = npt.NDArray[np.int64]

FASHION_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("/usr/share/dataset-fashion-mnist"))
"""Folders of the Debian package, current and possible."""
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DTYPES = ("uint8", "int8", "int16", "int32", "float16", "float32", "float64")
"""Supported dtypes of samples."""

_SPLIT_SEED = 0
_RBF_SAMPLES, _RBF_CENTROIDS, _RBF_SPEED = 30_000, 20, 7e-5
_IDX_TYPES = {2049: 1, 2051: 3}


@dataclass(frozen=True)
class Dataset:
    """Samples x (N, *shape) with classes y (N,), and an optional held-out part of the same form."""

    name: str
    x: Array
    y: Classes
    classes: tuple[str, ...]
    test_x: Array | None = None
    test_y: Classes | None = None
    suggested: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Suggested settings, as tables of a config file; `schema` is always present."""
    records: Records | None = None
    """The user's records, if the samples are from a file of them (`lab.files`). Then y may be UNLABELLED."""

    def __post_init__(self) -> None:
        assert len(self.x) == len(self.y) > 0, self.name
        assert self.x.ndim >= 2, self.x.shape

    @property
    def schema(self) -> Schema:
        """The schema of the samples."""
        return Schema(self.x.shape[1:], self.x.dtype, self.classes)

    def check_fits(self, schema: Schema) -> None:
        """Check that the samples can be reshaped and cast to `schema` without changing a value.

        Raises:
            ConfigError: they cannot; the message contains settings that fit.
        """
        own = self.schema
        same = np.prod(schema.shape) == np.prod(own.shape) and len(schema.classes) == len(own.classes)
        if not same or not np.can_cast(own.dtype, schema.dtype):
            raise ConfigError(
                f"schema: {self.name} has shape {list(own.shape)}, dtype {own.dtype} and {len(own.classes)} classes,"
                f" the config says {list(schema.shape)}, {schema.dtype} and {len(schema.classes)};"
                f" set {_as_settings(self.suggested['schema'])}"
            )

    def fit(self, schema: Schema) -> Dataset:
        """The same samples in another schema. Classes keep their index and take the names of `schema`.

        Raises:
            ConfigError: see `check_fits`.
        """
        self.check_fits(schema)

        def cast(x: Array) -> Array:
            return x.reshape(-1, *schema.shape).astype(schema.dtype, copy=False)

        test_x = None if self.test_x is None else cast(self.test_x)
        return replace(self, x=cast(self.x), test_x=test_x, classes=schema.classes)


def load(name_or_path: str | Path, *, limit: int | None = None, folder: Path | None = None) -> Dataset:
    """Load a data set by name or from a .npz file.

    Args:
        name_or_path: one of `NAMES`, or a path that ends in .npz.
        limit: keep only the first samples; the held-out part stays whole.
        folder: of the four .gz files of Fashion-MNIST, if not that of the Debian package.

    Raises:
        ConfigError: the data set is unknown, its files or its library are missing, or its content is invalid.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: wanted at least 1 sample, got {limit}")
    name = str(name_or_path)
    if name.endswith(".npz"):
        dataset = _npz(Path(name))
    elif name == "fashion-mnist":
        dataset = _fashion_mnist(folder)
    elif name in _LOADERS:
        try:
            dataset = _LOADERS[name]()
        except ImportError as error:
            raise ConfigError(f"data set {name!r} needs the extra: pip install 'streamlearn[lab]' ({error})") from error
    else:
        raise ConfigError(f"data set {name!r}: wanted one of {', '.join(NAMES)}, or a path to a .npz file")
    return dataset if limit is None else replace(dataset, x=dataset.x[:limit], y=dataset.y[:limit])


def _digits() -> Dataset:
    """1,797 scanned digits, 8 x 8 (Alpaydin and Kaynak, UCI, CC BY 4.0), 1,297 to learn and 500 held out."""
    with np.load(Path(__file__).with_name("digits.npz")) as parts:
        x, y, test_x, test_y = (parts[name] for name in ("x", "y", "test_x", "test_y"))
    classes = tuple(str(digit) for digit in range(10))
    suggested = _suggest(x, classes, scale=1 / 16, model={"factory": "convnet", "normalise": False})
    return Dataset("digits", x, y.astype(np.int64), classes, test_x, test_y.astype(np.int64), suggested)


def _moons() -> Dataset:
    from sklearn.datasets import make_moons  # noqa: PLC0415

    x, y = make_moons(22_000, noise=0.1, random_state=_SPLIT_SEED)
    x, y = x.astype(np.float32), y.astype(np.int64)
    classes = ("upper", "lower")
    suggested = _suggest(x, classes, model={"factory": "mlp", "normalise": True})
    return Dataset("moons", x[:20_000], y[:20_000], classes, x[20_000:], y[20_000:], suggested)


def _shuttle() -> Dataset:
    from river.datasets import Shuttle  # noqa: PLC0415

    rows = [(list(features.values()), anomaly) for features, anomaly in Shuttle()]
    x = np.array([features for features, _ in rows], np.float32)
    y = np.array([anomaly for _, anomaly in rows], np.int64)
    classes = ("normal", "anomaly")
    return Dataset(
        "shuttle", x, y, classes, suggested=_suggest(x, classes, model={"factory": "mlp", "normalise": True})
    )


@functools.cache
def _rbf_drift() -> Dataset:
    """Moving Gaussian clusters (RandomRBFDrift of MOA): 20 clusters of 4 classes, in the order of time."""
    from river.datasets.synth import RandomRBFDrift  # noqa: PLC0415

    clusters = RandomRBFDrift(
        seed_model=_SPLIT_SEED,
        seed_sample=_SPLIT_SEED,
        n_classes=4,
        n_features=20,
        n_centroids=_RBF_CENTROIDS,
        n_drift_centroids=_RBF_CENTROIDS,
        change_speed=_RBF_SPEED,
    )
    rows = [(list(features.values()), y) for features, y in itertools.islice(clusters, _RBF_SAMPLES)]
    x = np.array([features for features, _ in rows], np.float32)
    y = np.array([y for _, y in rows], np.int64)
    classes = tuple(str(n) for n in range(4))
    suggested = _suggest(x, classes, model={"factory": "mlp", "normalise": True})
    return Dataset("rbf-drift", x, y, classes, suggested=suggested)


def _fashion_mnist(folder: Path | None) -> Dataset:
    folders = FASHION_FOLDERS if folder is None else (folder,)
    found = next((path for path in folders if (path / "train-images-idx3-ubyte.gz").is_file()), None)
    if found is None:
        searched = ", ".join(str(path) for path in folders)
        raise ConfigError(
            f"data set 'fashion-mnist': no train-images-idx3-ubyte.gz in {searched};"
            " on Debian or Ubuntu: apt-get install dataset-fashion-mnist"
        )
    x, test_x = (_idx(found / f"{part}-images-idx3-ubyte.gz")[:, None] for part in ("train", "t10k"))
    y, test_y = (_idx(found / f"{part}-labels-idx1-ubyte.gz").astype(np.int64) for part in ("train", "t10k"))
    if len(x) != len(y) or len(test_x) != len(test_y) or not len(x):
        raise ConfigError(f"{found}: wanted as many labels as images, got {len(y)} and {len(x)}")
    suggested = _suggest(x, FASHION_CLASSES, scale=1 / 255, model={"factory": "convnet", "normalise": False})
    return Dataset("fashion-mnist", x, y, FASHION_CLASSES, test_x, test_y, suggested)


def _idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read a gzipped IDX file of bytes: magic number, a 32-bit big-endian size per dimension, data."""
    try:
        with gzip.open(path) as file:
            (magic,) = struct.unpack(">I", file.read(4))
            dimensions = _IDX_TYPES[magic]
            shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            # One extra byte makes gzip reach and check its checksum.
            return np.frombuffer(file.read(math.prod(shape) + 1), np.uint8).reshape(shape)
    except (OSError, EOFError, KeyError, ValueError, struct.error, zlib.error) as error:
        raise ConfigError(f"{path}: wanted a gzipped IDX file of unsigned bytes: {error}") from None


def _npz(path: Path) -> Dataset:
    arrays = _read_npz(path)
    classes = _classes_of(path, arrays)
    x, y = _pair(path, arrays, "x", "y", classes)
    if not len(x):
        raise ConfigError(f"{path}: wanted at least one sample, got none")
    test_x = test_y = None
    if "test_x" in arrays:
        test_x, test_y = _pair(path, arrays, "test_x", "test_y", classes)
        if (test_x.shape[1:], test_x.dtype) != (x.shape[1:], x.dtype):
            raise ConfigError(
                f"{path}: wanted test_x like x, {x.dtype} {x.shape[1:]}, got {test_x.dtype} {test_x.shape[1:]}"
            )
    image = x.ndim == 4 and x.dtype == np.uint8
    model = {"factory": "convnet" if image else "mlp", "normalise": not image}
    suggested = _suggest(x, classes, scale=1 / 255 if image else 1.0, model=model)
    return Dataset(path.stem, x, y, classes, test_x, test_y, suggested)


def _read_npz(path: Path) -> dict[str, Array]:
    """The known arrays of the file: x and y, and test_x and test_y if either is present."""
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ConfigError(f"{path}: wanted a .npz file of named arrays, got a single array")
            names = ("x", "y", "test_x", "test_y", "classes")
            arrays: dict[str, Array] = {name: file[name] for name in names if name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path}: wanted a .npz file without pickled objects: {error}") from None
    held_out = ("test_x", "test_y") if arrays.keys() & {"test_x", "test_y"} else ()
    for name in ("x", "y", *held_out):
        if name not in arrays:
            raise ConfigError(f"{path}: wanted the array {name!r}, got {sorted(arrays)}")
    return arrays


def _pair(
    path: Path, arrays: Mapping[str, Array], x_name: str, y_name: str, classes: tuple[str, ...]
) -> tuple[Array, Classes]:
    x, y = _samples_of(path, arrays[x_name]), _indices_of(path, arrays[y_name], classes)
    if len(x) != len(y):
        raise ConfigError(f"{path}: wanted as many rows in {y_name} as in {x_name}, got {len(y)} and {len(x)}")
    return x, y


def _samples_of(path: Path, x: Array) -> Array:
    """Samples in a dtype of `DTYPES`, native byte order, with at least one dimension each."""
    if x.dtype == np.bool_:
        x = x.astype(np.uint8)
    if x.dtype.kind in "iu" and x.dtype.name not in DTYPES and x.size:
        bounds = np.iinfo(np.int32)
        if bounds.min <= int(x.min()) and int(x.max()) <= bounds.max:
            x = x.astype(np.int32)
    if x.dtype.name not in DTYPES or not 1 <= x.ndim <= 5:
        raise ConfigError(
            f"{path}: wanted samples of {', '.join(DTYPES)} in 1 to 4 dimensions, got {x.dtype} {x.shape}"
        )
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise ConfigError(f"{path}: wanted finite samples, got NaN or infinity among them")
    x = x.astype(x.dtype.newbyteorder("="), copy=False)
    return x[:, None] if x.ndim == 1 else x


def _classes_of(path: Path, arrays: Mapping[str, Array]) -> tuple[str, ...]:
    """Names in `classes`; else the sorted strings in y; else the numbers from 0 to the largest in y."""
    y = arrays["y"]
    if "classes" in arrays:
        classes = tuple(str(name) for name in arrays["classes"].ravel().tolist())
    elif y.dtype.kind == "U":
        classes = tuple(sorted({str(name) for name in y.ravel().tolist()}))
    else:
        classes = tuple(str(index) for index in range(int(y.max()) + 1)) if y.dtype.kind in "biu" and y.size else ()
    if not 2 <= len(classes) <= 10_000 or len(set(classes)) != len(classes):
        raise ConfigError(f"{path}: wanted 2 to 10000 distinct classes, got {len(classes)}")
    return classes


def _indices_of(path: Path, y: Array, classes: tuple[str, ...]) -> Classes:
    if y.ndim == 1 and y.dtype.kind == "U":
        index_of = {name: index for index, name in enumerate(classes)}
        unknown = sorted({str(name) for name in y.tolist()} - set(classes))
        if not unknown:
            return np.array([index_of[str(name)] for name in y.tolist()], np.int64)
        raise ConfigError(f"{path}: class {unknown[0]!r:.80} in y is not among the {len(classes)} in classes")
    if y.ndim != 1 or y.dtype.kind not in "biu" or (y.size and not 0 <= int(y.min()) <= int(y.max()) < len(classes)):
        raise ConfigError(
            f"{path}: wanted y as class names, or as indices from 0 to {len(classes) - 1}, in one dimension"
        )
    return y.astype(np.int64)


def _suggest(
    x: Array, classes: tuple[str, ...], *, model: Mapping[str, Any], scale: float = 1.0
) -> dict[str, Mapping[str, Any]]:
    plain = classes == tuple(str(index) for index in range(len(classes)))
    schema = {
        "shape": list(x.shape[1:]),
        "dtype": x.dtype.name,
        "classes": len(classes) if plain else list(classes),
        "scale": scale,
    }
    return {"schema": schema, "model": model}


def _as_settings(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value!r}" for key, value in table.items())


_LOADERS: Mapping[str, Callable[[], Dataset]] = {
    "digits": _digits,
    "moons": _moons,
    "shuttle": _shuttle,
    "rbf-drift": _rbf_drift,
}
NAMES = ("digits", "fashion-mnist", "shuttle", "moons", "rbf-drift")
"""Known data sets."""
