"""The base of every table of the config file. Each section is defined in the folder that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, SecretStr

FILE_PREFIX = "file:"
"""Of a secret's value that is the path of its file."""
MAX_SECRET_BYTES = 4096


class Section(BaseModel):
    """A table of the TOML file. An unknown key is an error: a misspelt setting must not be ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class FileSecret(SecretStr):
    """A secret, and the file it was read from."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ValueError: as `read_secret`.
        """
        super().__init__(read_secret(path))
        self.path = path


def read_secret(path: Path) -> str:
    """The one line of a file, without surrounding white space.

    Raises:
        ValueError: the file cannot be read, is empty, too long, or has several lines. Its content is never shown.
    """
    try:
        if not path.is_file():
            msg = f"{path}: no such file, or not a readable file"
            raise ValueError(msg)
        with path.open("rb") as file:
            secret = file.read(MAX_SECRET_BYTES + 1).decode().strip()
    except OSError as error:
        msg = f"{path}: {error.strerror or error}"
        raise ValueError(msg) from None
    except UnicodeDecodeError:
        msg = f"{path}: expected UTF-8 text"
        raise ValueError(msg) from None
    if not secret:
        msg = f"{path} is empty: write the secret into it, or unset the setting"
        raise ValueError(msg)
    if len(secret.encode()) > MAX_SECRET_BYTES or not secret.isprintable():
        msg = f"{path}: expected one line of at most {MAX_SECRET_BYTES} bytes"
        raise ValueError(msg)
    return secret


def _resolve(given: SecretStr | None) -> SecretStr | None:
    """Read a secret from its file. An empty value, which compose passes for an unset variable, is none."""
    value = given.get_secret_value() if given else ""
    if value.startswith(FILE_PREFIX):
        return FileSecret(Path(value.removeprefix(FILE_PREFIX)))
    return given if value else None


Secret = Annotated[SecretStr | None, AfterValidator(_resolve)]
"""A token or password, given by its value or as file:PATH; None if not set."""
