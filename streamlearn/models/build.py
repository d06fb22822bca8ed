"""Build a classifier from its spec: a built-in network, or any factory by import path.

The spec is published with the weights, so that a server builds the same network and then loads the arrays.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamlearn.errors import CheckpointError, ConfigError
from streamlearn.models.images import Conv13, ConvNet, WideResNet
from streamlearn.models.mlp import Mlp
from streamlearn.models.normalise import InputBound, RunningNorm
from streamlearn.models.spare import SpareClasses

BUILT_IN: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "convnet": ConvNet,
    "conv13": Conv13,
    "wide_resnet": WideResNet,
}

_FOREIGN_ERRORS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError, ImportError)
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

    def to_json(self) -> str:
        """One line of JSON.

        Raises:
            ConfigError: an option is not a JSON value.
        """
        try:
            return json.dumps(asdict(self), sort_keys=True)
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
            return ModelSpec(**{**fields, "shape": tuple(fields["shape"])})
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

    def forward(self, x_raw: Tensor) -> Tensor:
        """Logits (B, C) of raw samples (B, *shape) in the schema's dtype."""
        logits_BC: Tensor = self.net(self.prepare(x_raw))
        return logits_BC


def import_object(path: str, *, key: str, built_in: Iterable[str]) -> Callable[..., Any]:
    """The callable at `package.module:attribute`. Errors name the setting, `key`, and its other values.

    Raises:
        ConfigError: there is no such module or attribute, or it is not callable.
    """
    module_name, _, attributes = path.partition(":")
    if not module_name or not attributes or module_name.startswith("."):
        raise ConfigError(f"{key}: {path!r} is none of {', '.join(built_in)}, nor an import path")
    try:
        found: Any = importlib.import_module(module_name)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}: cannot import {path!r}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{key}: {path!r} is a {type(found).__name__}, expected a callable")
    called: Callable[..., Any] = found
    return called


def build(spec: ModelSpec, *, seed: int = 0) -> Classifier:
    """A classifier in float32 on the CPU, initialised as a function of the seed alone.

    Torch's global random state does not change. A forward pass of two rows of zeros finds a misfit now and not in the
    first step; it also gives lazy layers their sizes.

    Raises:
        ConfigError: `model.factory` or `model.options` do not make a network from `shape` to `classes`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = _make_net(spec)
        if spec.spare is not None:
            net = SpareClasses(net, classes=spec.classes, spare=spec.spare)
        normalise = RunningNorm(spec.shape) if spec.normalise else InputBound()
        classifier = Classifier(net, normalise=normalise, scale=spec.scale)
        _check_output(classifier, spec)
    classifier.float()
    if len(spec.shape) == 3:
        classifier.to(memory_format=torch.channels_last)
    return classifier


def _make_net(spec: ModelSpec) -> nn.Module:
    options = dict(spec.options)
    factory = BUILT_IN.get(spec.factory)
    if factory is None:
        factory = import_object(spec.factory, key="model.factory", built_in=BUILT_IN)
    else:
        options |= {"shape": spec.shape, "classes": spec.classes}
    try:
        net = factory(**options)
    except _FOREIGN_ERRORS as error:
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
    except _FOREIGN_ERRORS as error:
        raise ConfigError(f"model.factory: {spec.factory} fails on samples of shape {spec.shape}: {error}") from error
    if not isinstance(logits_BC, Tensor):
        raise ConfigError(f"model.factory: {spec.factory} returns a {type(logits_BC).__name__}, expected logits (B, C)")
    if logits_BC.shape != (2, spec.classes) or not logits_BC.is_floating_point():
        raise ConfigError(
            f"model.factory: {spec.factory} gives {logits_BC.dtype} of shape {tuple(logits_BC.shape)} for 2 samples, "
            f"expected logits of shape (2, {spec.classes})"
        )
