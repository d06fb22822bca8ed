"""Build a classifier from its spec: a built-in network, or any factory by import path.

The spec is published with the weights, so that a server builds the same network and then loads the arrays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamlearn.errors import CheckpointError, ConfigError
from streamlearn.imports import import_object
from streamlearn.models.column_norm import ColumnNorm
from streamlearn.models.images import Conv13, ConvNet, WideResNet
from streamlearn.models.mlp import Mlp
from streamlearn.models.normalise import LARGEST_INPUT, InputBound, RunningNorm
from streamlearn.models.spare import SpareClasses
from streamlearn.models.table import TableNetwork
from streamlearn.records import Column

BUILT_IN: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "table": TableNetwork,
    "convnet": ConvNet,
    "conv13": Conv13,
    "wide_resnet": WideResNet,
}

FOREIGN_ERRORS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError, ImportError)
"""What a user's factory or network raises if its options do not fit. Other exceptions are bugs."""


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build a network; equal specs build equal networks."""

    factory: str
    """A name of `BUILT_IN`, or package.module:attribute."""
    options: Mapping[str, Any]
    """Keyword arguments of the factory. Built-in ones also get `shape` and `classes`."""
    shape: tuple[int, ...]
    """Of one raw sample."""
    classes: int
    """Number of logits, spare classes included."""
    normalise: bool
    """Standardise inputs by running statistics."""
    scale: float
    """The network sees x * scale."""
    spare: int | None = None
    """How many of the last classes have no name yet. 0: all have one by now, and the network is the same. None: the
    network has no spare classes."""
    columns: tuple[Column, ...] = ()
    """Of the rows; empty if samples are not made from the user's records."""

    @property
    def has_categories(self) -> bool:
        """Whether places of a row are codes, which mean nothing as numbers."""
        return any(column.kind == "category" for column in self.columns)

    def to_json(self) -> str:
        """One line of JSON, without `columns` where there are none.

        Raises:
            ConfigError: an option is not a JSON value.
        """
        fields = {name: value for name, value in asdict(self).items() if name != "columns" or value}
        try:
            return json.dumps(fields, sort_keys=True)
        except TypeError as error:
            raise ConfigError(f"model.options: expected JSON values, got {self.options!r}") from error

    @staticmethod
    def from_json(text: str) -> ModelSpec:
        """The spec that `to_json` wrote.

        Raises:
            CheckpointError: the text is not the JSON of a spec.
        """
        try:
            fields = json.loads(text)
            shape = tuple(fields["shape"])
            columns = tuple(Column(**column) for column in fields.get("columns", ()))
            return ModelSpec(**{**fields, "shape": shape, "columns": columns})
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"model spec: expected the JSON of a ModelSpec, got {text[:200]!r}") from error


class Classifier(nn.Module):
    """Raw samples to logits, in the order that training and serving share: to_float, normalise, net.

    The learner calls the parts itself, since it adds noise between normalise and net.
    """

    def __init__(self, net: nn.Module, *, normalise: nn.Module, scale: float) -> None:
        super().__init__()
        self.normalise = normalise
        self.net = net
        self.scale = scale
        self.precision = torch.float32
        """Of the passes of `logits`."""

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    def to_float(self, x_raw: Tensor) -> Tensor:
        """float32 x * scale. Images are channels-last, the faster layout of convolutions on CPU and GPU."""
        layout = torch.channels_last if x_raw.dim() == 4 else torch.preserve_format
        x = x_raw.to(torch.float32, memory_format=layout)
        return x if self.scale == 1.0 else x * self.scale

    def prepare(self, x_raw: Tensor) -> Tensor:
        """The network's input for clean samples."""
        x: Tensor = self.normalise(self.to_float(x_raw))
        return x

    def logits(self, x_B: Tensor, buffers: dict[str, Tensor] | None = None) -> Tensor:
        """Logits (B, C) in float32 of prepared rows, computed in `precision`. `buffers`: in place of the net's own.

        Weights stay in float32. Below it, matrix products and convolutions are computed by torch's autocast.
        """
        with torch.autocast(x_B.device.type, self.precision, enabled=self.precision != torch.float32):
            made = self.net(x_B) if buffers is None else torch.func.functional_call(self.net, buffers, (x_B,))
        logits_BC: Tensor = made.float()
        return logits_BC

    def forward(self, x_raw: Tensor) -> Tensor:
        """Logits (B, C) of raw samples (B, *shape) in the schema's dtype."""
        logits_BC: Tensor = self.net(self.prepare(x_raw))
        return logits_BC


def build(spec: ModelSpec, *, seed: int = 0) -> Classifier:
    """A classifier in float32 on the CPU, initialised as a function of the seed alone.

    Torch's global random state does not change. A forward pass of two rows of zeros finds a misfit now and not in the
    first step; it also gives lazy layers their sizes.

    Raises:
        ConfigError: `model.factory` or `model.options` do not make a network from `shape` to `classes`.
    """
    if spec.columns and spec.scale != 1.0:
        raise ConfigError(f"schema.scale: expected 1 with [columns], which have units of their own, got {spec.scale}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = _make_net(spec)
        if spec.spare is not None:
            net = SpareClasses(net, classes=spec.classes, spare=spec.spare)
        classifier = Classifier(net, normalise=_make_normaliser(spec), scale=spec.scale)
        _check_output(classifier, spec)
    classifier.float()
    if len(spec.shape) == 3:
        classifier.to(memory_format=torch.channels_last)
    return classifier


def _make_normaliser(spec: ModelSpec) -> nn.Module:
    if spec.normalise:
        return ColumnNorm(spec.columns) if spec.columns else RunningNorm(spec.shape)
    return InputBound(max(LARGEST_INPUT, *(column.size for column in spec.columns))) if spec.columns else InputBound()


def _make_net(spec: ModelSpec) -> nn.Module:
    options = dict(spec.options)
    factory = BUILT_IN.get(spec.factory)
    if factory is None:
        factory = import_object(spec.factory, key="model.factory", built_in=BUILT_IN)
    elif factory is TableNetwork:
        options |= {"columns": spec.columns, "classes": spec.classes}
    elif spec.has_categories:
        raise ConfigError(f"model.factory: {spec.factory} would take the codes of categories as numbers; use table")
    else:
        options |= {"shape": spec.shape, "classes": spec.classes}
    try:
        net = factory(**options)
    except FOREIGN_ERRORS as error:
        raise ConfigError(f"model.options: {spec.factory} does not take {dict(spec.options)!r}: {error}") from error
    if not isinstance(net, nn.Module):
        raise ConfigError(f"model.factory: {spec.factory} made a {type(net).__name__}, expected a torch.nn.Module")
    return net


def _check_output(classifier: Classifier, spec: ModelSpec) -> None:
    """One forward pass of two rows, in eval mode so that it changes no statistics."""
    classifier.eval()
    try:
        with torch.no_grad():
            logits_BC: object = classifier.float()(torch.zeros((2, *spec.shape)))
    except FOREIGN_ERRORS as error:
        raise ConfigError(f"model.factory: {spec.factory} fails on samples of shape {spec.shape}: {error}") from error
    if not isinstance(logits_BC, Tensor):
        raise ConfigError(f"model.factory: {spec.factory} returns a {type(logits_BC).__name__}, expected logits (B, C)")
    if logits_BC.shape != (2, spec.classes) or not logits_BC.is_floating_point():
        raise ConfigError(
            f"model.factory: {spec.factory} gives {logits_BC.dtype} of shape {tuple(logits_BC.shape)} for 2 samples, "
            f"expected logits of shape (2, {spec.classes})"
        )
