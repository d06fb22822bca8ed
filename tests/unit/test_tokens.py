"""Tokens from files, and that no token is ever shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import ask, finish, start, stop, until

from streamlearn.config import TOKENS, Config, load_config
from streamlearn.errors import ConfigError

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
    def test_each_token_may_come_from_a_file(self, tmp_path: Path, name: str) -> None:
        """Without the white space around it, which editors and `echo` add."""
        path = token_file(tmp_path, f"\n {SECRET}\r\n".encode())

        token = getattr(config_of(**{f"{name}_file": str(path)}).serve, name)

        assert token.get_secret_value() == SECRET

    @pytest.mark.parametrize(
        ("content", "wanted"),
        [
            (b"", "is empty"),
            (b" \n\t\n", "is empty"),
            (b"one\ntwo", "wanted one line"),
            (b"a\x00b", "wanted one line"),
            (b"x" * 5000, "wanted one line"),
            (b"\xff\xfe", "wanted UTF-8"),
        ],
    )
    def test_what_is_no_token_is_refused(self, tmp_path: Path, content: bytes, wanted: str) -> None:
        """A file that is empty would else be a server without a token."""
        path = token_file(tmp_path, content)

        with pytest.raises(ConfigError, match=wanted) as caught:
            config_of(token_file=str(path))

        assert str(path) in str(caught.value)
        assert "two" not in str(caught.value)

    @pytest.mark.parametrize("name", ["nowhere", "."])
    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path, name: str) -> None:
        """A folder is none either."""
        with pytest.raises(ConfigError, match=re.escape(str(tmp_path / name))):
            config_of(token_file=str(tmp_path / name))

    def test_a_token_and_its_file_together_are_refused(self, tmp_path: Path) -> None:
        """Nobody would know which counts."""
        path = token_file(tmp_path, b"a")

        with pytest.raises(ConfigError, match=r"serve\.token and serve\.token_file are both set"):
            config_of(token=SECRET, token_file=str(path))

    def test_empty_variables_are_none(self) -> None:
        """As compose passes on what is not set."""
        serve = config_of(token="", token_file="").serve

        assert not serve.token
        assert serve.token_file is None

    def test_a_token_from_a_file_allows_a_public_address(self, tmp_path: Path) -> None:
        """It counts as any other."""
        path = token_file(tmp_path, b"a")

        assert config_of(host="0.0.0.0", admin_token_file=str(path)).serve.host == "0.0.0.0"

    @pytest.mark.parametrize(
        ("mode", "is_open"), [(0o400, False), (0o440, False), (0o600, False), (0o644, True), (0o460, True)]
    )
    def test_a_file_that_is_open_to_others_is_told(self, tmp_path: Path, mode: int, is_open: bool) -> None:
        """Its owner's group may read it, as in Kubernetes."""
        path = token_file(tmp_path, b"a", mode)

        assert config_of(label_token_file=str(path)).serve.open_token_files() == [path] * is_open


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
        """A misspelt name must not print what was meant to be hidden."""
        with pytest.raises(ConfigError) as caught:
            load_config(environ={}, overrides=overrides)

        assert SECRET not in str(caught.value)

    def test_no_repr_of_the_settings_shows_one(self, tmp_path: Path) -> None:
        """Nor their JSON."""
        path = token_file(tmp_path, SECRET.encode())
        overrides = {"serve.token": SECRET, "serve.admin_token_file": str(path)}
        options = {"log.kafka.options": {"sasl_plain_password": SECRET}}

        config = load_config(environ={}, overrides=overrides)

        assert SECRET not in f"{config!r}{config}{config.model_dump_json()}"
        assert SECRET not in repr(load_config(environ={}, overrides=options))

    @pytest.mark.slow
    def test_a_server_that_tells_everything_tells_no_token(self, tmp_path: Path) -> None:
        """A real one with debug logging, asked rightly and wrongly, and what can be had of it and of the commands."""
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
            token_file = "{path}"
            admin_token = "{other}"
            [run]
            log_level = "debug"
            log_format = "console"
            """
        )
        output = tmp_path / "output.txt"
        process = start("serve", "--config", config, output=output)
        told = []
        try:
            found = until(lambda: re.search(r"127\.0\.0\.1:(\d+)", output.read_text()), "an address")
            url = f"http://127.0.0.1:{found[1]}"
            for token in (SECRET, other, "Bearer", SECRET + "x"):
                told += [str(ask(url + route, headers={"Authorization": f"Bearer {token}"})) for route in ROUTES]
        finally:
            stop(process)
        told += [output.read_text(), finish("check", "--config", config), finish("inspect", "--config", config)]
        told += [file.read_text(errors="replace") for file in (tmp_path / "state").rglob("*") if file.is_file()]

        assert "token_file_open" in told[-1] + output.read_text()
        assert not [text for text in told if SECRET in text or other in text]
