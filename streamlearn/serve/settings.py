"""The settings of [serve], the HTTP API, and of [metrics], the learner's own /metrics."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr, model_validator

from streamlearn.section import FileSecret, Secret, Section

_READABLE_BY_OTHERS = 0o027
"""Mode bits that a token file must not have: writable by its group, or any access for others."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServeConfig(Section):
    """[serve]: the HTTP API."""

    host: str = "127.0.0.1"
    """Address to bind. An address other than loopback requires a token, or `insecure`."""
    port: int = Field(8080, ge=0, le=65_535)
    """0 takes a free port and prints it."""
    processes: int = Field(2, ge=1, le=256)
    """Server processes behind the port."""
    token: Secret = None
    """Bearer token for all routes except /health and admin. Here and below: a value, or file:PATH for a file that holds
    it (a secret of Docker or Kubernetes), read once at start. Do not pass a value with --set."""
    predict_token: Secret = None
    """Grants predictions only."""
    label_token: Secret = None
    """Grants labels and samples only."""
    admin_token: Secret = None
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
        paths = [token.path for token in self.tokens if isinstance(token, FileSecret)]
        return [path for path in paths if path.stat().st_mode & _READABLE_BY_OTHERS]


class MetricsConfig(Section):
    """[metrics]: the learner's own /metrics."""

    port: int = Field(9109, ge=0, le=65_535)
    """Port of the learner's own /metrics, on loopback; the /metrics of each server includes it. 0 takes a free port."""
