"""The settings of [serve], the HTTP API, and of [metrics], the learner's own /metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, model_validator

from streamlearn.section import Section

FILE_PREFIX = "file:"
"""Of a token's value that is the path of its file."""
MAX_TOKEN_BYTES = 4096
_READABLE_BY_OTHERS = 0o027
"""Mode bits that a token file must not have: writable by its group, or any access for others."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class FileToken(SecretStr):
    """A token, and the file it was read from."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ValueError: as `read_token`.
        """
        super().__init__(read_token(path))
        self.path = path


def read_token(path: Path) -> str:
    """The one line of a file, without surrounding white space.

    Raises:
        ValueError: the file cannot be read, is empty, too long, or has several lines. Its content is never shown.
    """
    try:
        if not path.is_file():
            msg = f"{path}: no such file, or not a readable file"
            raise ValueError(msg)
        with path.open("rb") as file:
            token = file.read(MAX_TOKEN_BYTES + 1).decode().strip()
    except OSError as error:
        msg = f"{path}: {error.strerror or error}"
        raise ValueError(msg) from None
    except UnicodeDecodeError:
        msg = f"{path}: expected UTF-8 text"
        raise ValueError(msg) from None
    if not token:
        msg = f"{path} is empty: write a token into it, or unset the setting"
        raise ValueError(msg)
    if len(token.encode()) > MAX_TOKEN_BYTES or not token.isprintable():
        msg = f"{path}: expected one line of at most {MAX_TOKEN_BYTES} bytes"
        raise ValueError(msg)
    return token


def _resolve(given: SecretStr | None) -> SecretStr | None:
    """Read a token from its file. An empty value, which compose passes for an unset variable, is no token."""
    value = given.get_secret_value() if given else ""
    if value.startswith(FILE_PREFIX):
        return FileToken(Path(value.removeprefix(FILE_PREFIX)))
    return given if value else None


Token = Annotated[SecretStr | None, AfterValidator(_resolve)]
"""A bearer token, given by its value or as file:PATH; None if not set."""


class ServeConfig(Section):
    """[serve]: the HTTP API."""

    host: str = "127.0.0.1"
    """Address to bind. An address other than loopback requires a token, or `insecure`."""
    port: int = Field(8080, ge=0, le=65_535)
    """0 takes a free port and prints it."""
    processes: int = Field(2, ge=1, le=256)
    """Server processes behind the port."""
    token: Token = None
    """Bearer token for all routes except /health and admin. Here and below: a value, or file:PATH for a file that holds
    it (a secret of Docker or Kubernetes), read once at start. Do not pass a value with --set."""
    predict_token: Token = None
    """Grants predictions only."""
    label_token: Token = None
    """Grants labels and samples only."""
    admin_token: Token = None
    """Grants all routes. Admin routes are closed unless it is set."""
    insecure: bool = False
    """Without a token: allow a public address, and any Host and Origin header."""
    max_body_bytes: int = Field(16 << 20, ge=1024, le=1 << 30)
    """Larger bodies get 413."""
    timeout_s: float = Field(10.0, gt=0.0, le=600.0)
    """Longest wait of a request for its body, the model or the log."""

    @model_validator(mode="after")
    def _check_exposure(self) -> ServeConfig:
        if not (self.host in _LOOPBACK or self.tokens or self.insecure):
            msg = (
                f"serve.host = {self.host!r} is open to other machines: set serve.token (STREAMLEARN_SERVE__TOKEN), or "
                "serve.insecure = true to allow this"
            )
            raise ValueError(msg)
        return self

    @property
    def tokens(self) -> list[SecretStr]:
        """The tokens that are set."""
        given = (self.token, self.predict_token, self.label_token, self.admin_token)
        return [token for token in given if token is not None]

    def exposed_token_files(self) -> list[Path]:
        """Token files with a mode that others can read, or that the group can write."""
        paths = [token.path for token in self.tokens if isinstance(token, FileToken)]
        return [path for path in paths if path.stat().st_mode & _READABLE_BY_OTHERS]


class MetricsConfig(Section):
    """[metrics]: the learner's own /metrics."""

    port: int = Field(9109, ge=0, le=65_535)
    """Port of the learner's own /metrics, on loopback; the /metrics of each server includes it. 0 takes a free port."""
