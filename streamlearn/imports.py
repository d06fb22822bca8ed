"""Import a user's object by its path: `package.module:attribute`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from streamlearn.errors import ConfigError


def import_object(path: str, *, key: str, built_in: Iterable[str] = ()) -> Callable[..., Any]:
    """The callable at `package.module:attribute`. Errors name the setting, `key`, and its other values.

    Raises:
        ConfigError: there is no such module or attribute, or it is not callable.
    """
    module_name, _, attributes = path.partition(":")
    if not module_name or not attributes or module_name.startswith("."):
        raise ConfigError(f"{key}: expected {', '.join((*built_in, 'package.module:attribute'))}, got {path!r}")
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
