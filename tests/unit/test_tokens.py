"""Tokens from files. No token is ever shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import ask, finish, start, stop, until

from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError

TOKENS = ("token", "predict_token", "label_token", "admin_token")
ROUTES = ("/score", "/models", "/metrics", "/model", "/nowhere", "/openapi.json")
SECRET = "s3cr3t-0123456789"


def token_file(folder: Path, content: bytes, mode: int = 0o400) -> Path:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def config_of(**environ: str) -> Config:
    return load_config(environ={f"STREAMLEARN_SERVE__{name.upper()}": value for name, value in environ.items()})


class TestFiles:
    @pytest.mark.parametrize("name", TOKENS)
    def test_each_token_may_be_read_from_a_file(self, tmp_path: Path, name: str) -> None:
        """Without surrounding white space, which editors and `echo` add."""
        path = token_file(tmp_path, f"\n {SECRET}\r\n".encode())

        token = getattr(config_of(**{name: f"file:{path}"}).serve, name)

        assert token.get_secret_value() == SECRET

    @pytest.mark.parametrize(
        ("content", "error"),
        [
            (b"", "is empty"),
            (b" \n\t\n", "is empty"),
            (b"one\ntwo", "expected one line"),
            (b"a\x00b", "expected one line"),
            (b"x" * 5000, "expected one line"),
            (b"\xff\xfe", "expected UTF-8"),
        ],
    )
    def test_invalid_content_is_refused(self, tmp_path: Path, content: bytes, error: str) -> None:
        """With an empty file the server would have no token. The content is not shown."""
        path = token_file(tmp_path, content)

        with pytest.raises(ConfigError, match=error) as caught:
            config_of(token=f"file:{path}")

        assert str(path) in str(caught.value)
        assert "two" not in str(caught.value)

    @pytest.mark.parametrize("name", ["nowhere", "."])
    def test_a_missing_file_is_an_error_with_its_path(self, tmp_path: Path, name: str) -> None:
        """A folder is not a file either."""
        with pytest.raises(ConfigError, match=re.escape(str(tmp_path / name))):
            config_of(token=f"file:{tmp_path / name}")

    def test_the_former_settings_name_their_successor(self, tmp_path: Path) -> None:
        """serve.token_file is serve.token = "file:PATH"."""
        with pytest.raises(ConfigError, match=r'serve\.token_file: removed; write serve\.token = "file:PATH"'):
            config_of(token_file=str(tmp_path / "token"))

    def test_an_empty_variable_is_no_token(self) -> None:
        """Compose passes an empty value for an unset variable."""
        assert config_of(token="").serve.token is None

    def test_a_token_from_a_file_allows_a_public_address(self, tmp_path: Path) -> None:
        """As any other token."""
        path = token_file(tmp_path, b"a")

        assert config_of(host="0.0.0.0", admin_token=f"file:{path}").serve.host == "0.0.0.0"

    @pytest.mark.parametrize(
        ("mode", "is_exposed"), [(0o400, False), (0o440, False), (0o600, False), (0o644, True), (0o460, True)]
    )
    def test_a_file_that_others_can_read_is_reported(self, tmp_path: Path, mode: int, is_exposed: bool) -> None:
        """Its group may read it, as in Kubernetes, but not write it."""
        path = token_file(tmp_path, b"a", mode)

        assert config_of(label_token=f"file:{path}").serve.exposed_token_files() == [path] * is_exposed


class TestSilence:
    @pytest.mark.parametrize(
        "overrides",
        [
            {"serve.tokn": SECRET},
            {"serve.admin_token": [SECRET]},
            {"serve": SECRET},
            {"serve.password": SECRET},
            {"log.kafka.options": SECRET},
            {"log.kafka.sasl_plain_password": SECRET},
            {"serve.token": SECRET, "serve.port": -1, "serve.host": "0.0.0.0"},
        ],
    )
    def test_no_error_shows_what_may_be_a_secret(self, overrides: dict[str, object]) -> None:
        """A misspelt name must not print a value that may be secret."""
        with pytest.raises(ConfigError) as caught:
            load_config(environ={}, overrides=overrides)

        assert SECRET not in str(caught.value)

    def test_no_repr_of_the_settings_shows_a_token(self, tmp_path: Path) -> None:
        """Nor does their JSON."""
        path = token_file(tmp_path, SECRET.encode())
        overrides = {"serve.token": SECRET, "serve.admin_token": f"file:{path}"}
        options = {"log.kafka.options": {"sasl_plain_password": SECRET}}

        config = load_config(environ={}, overrides=overrides)

        assert SECRET not in f"{config!r}{config}{config.model_dump_json()}"
        assert SECRET not in repr(load_config(environ={}, overrides=options))

    @pytest.mark.slow
    def test_a_server_shows_no_token(self, tmp_path: Path) -> None:
        """In replies with right and wrong tokens, log lines, output of commands, and files of the state folder."""
        path = token_file(tmp_path, SECRET.encode(), 0o644)
        other = "0ther-9876543210"
        config = tmp_path / "streamlearn.toml"
        config.write_text(
            f"""
            [schema]
            shape = [4]
            [state]
            dir = "{tmp_path}/state"
            [serve]
            port = 0
            token = "file:{path}"
            admin_token = "{other}"
            """
        )
        output = tmp_path / "output.txt"
        process = start("serve", "--config", config, output=output)
        texts = []
        try:
            found = until(lambda: re.search(r"127\.0\.0\.1:(\d+)", output.read_text()), "an address")
            url = f"http://127.0.0.1:{found[1]}"
            for token in (SECRET, other, "Bearer", SECRET + "x"):
                texts += [str(ask(url + route, headers={"Authorization": f"Bearer {token}"})) for route in ROUTES]
        finally:
            stop(process)
        texts += [output.read_text(), finish("check", "--config", config), finish("inspect", "--config", config)]
        texts += [file.read_text(errors="replace") for file in (tmp_path / "state").rglob("*") if file.is_file()]

        assert "token_file_open" in output.read_text()
        assert not [text for text in texts if SECRET in text or other in text]
