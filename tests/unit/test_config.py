"""Settings: one precedence, all errors at once, nothing misspelt passes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from streamlearn.config import load_config, settings
from streamlearn.errors import ConfigError
from streamlearn.sources import REMOVED


def message(environ: dict[str, str] | None = None, **overrides: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(environ=environ or {}, overrides={key.replace("__", "."): v for key, v in overrides.items()})
    return str(caught.value)


class TestPrecedence:
    def test_the_later_source_wins(self, tmp_path: Path) -> None:
        """Defaults, file, environment, command line."""
        file = tmp_path / "a.toml"
        file.write_text("[serve]\nport = 1\nmax_body_bytes = 2000\ntimeout_s = 3\n")

        serve = load_config(
            file,
            environ={"STREAMLEARN_SERVE__MAX_BODY_BYTES": "3000", "STREAMLEARN_SERVE__TIMEOUT_S": "4"},
            overrides={"serve.timeout_s": "5"},
        ).serve

        assert (serve.port, serve.max_body_bytes, serve.timeout_s, serve.processes) == (1, 3000, 5.0, 2)

    def test_lists_and_tables_come_as_toml(self) -> None:
        """So every key can be set from the environment."""
        config = load_config(
            environ={
                "STREAMLEARN_SCHEMA__SHAPE": "[3, 4, 4]",
                "STREAMLEARN_SCHEMA__CLASSES": '["cat", "dog"]',
                "STREAMLEARN_MODEL__OPTIONS": "{width = 2}",
                "STREAMLEARN_SERVE__TOKEN": "0123",
            }
        )

        assert config.schema_.build().shape == (3, 4, 4)
        assert config.schema_.build().classes == ("cat", "dog")
        assert config.model.options == {"width": 2}
        assert config.serve.token is not None
        assert config.serve.token.get_secret_value() == "0123"

    def test_the_tests_own_variables_are_no_settings(self) -> None:
        """STREAMLEARN_TEST_KAFKA and its like pass by."""
        own = {"STREAMLEARN_TEST_KAFKA": "x", "STREAMLEARN_FORBID_SKIPS": "1", "STREAMLEARN_CONFIG": "y"}
        own |= {"STREAMLEARN_MEMORY": "12g"}  # of the compose file

        assert load_config(environ=own) == load_config(environ={})

    def test_what_kubernetes_gives_a_pod_is_no_setting(self) -> None:
        """Where a Service is called streamlearn, with a named and an unnamed port."""
        given = {
            "STREAMLEARN_SERVICE_HOST": "10.0.0.7",
            "STREAMLEARN_SERVICE_PORT": "8080",
            "STREAMLEARN_SERVICE_PORT_HTTP": "8080",
            "STREAMLEARN_PORT": "tcp://10.0.0.7:8080",
            "STREAMLEARN_PORT_8080_TCP": "tcp://10.0.0.7:8080",
            "STREAMLEARN_PORT_8080_TCP_PROTO": "tcp",
            "STREAMLEARN_PORT_8080_TCP_PORT": "8080",
            "STREAMLEARN_PORT_8080_TCP_ADDR": "10.0.0.7",
        }

        assert load_config(environ=given) == load_config(environ={})
        assert "serve_port: there is no such setting" in message({"STREAMLEARN_SERVE_PORT": "1"})


class TestErrors:
    def test_all_come_at_once_with_key_value_bound_and_source(self) -> None:
        """An operator fixes them in one go."""
        text = message({"STREAMLEARN_SERVE__PORT": "80000"}, learn__ema_decay=1.0, serve__prt=3)

        assert "3 settings are wrong" in text
        assert "serve.port: Input should be less than or equal to 65535 (got '80000', from environment)" in text
        assert "learn.ema_decay: Input should be less than 1 (got 1.0, from command line)" in text
        assert "serve.prt: there is no such setting" in text

    @pytest.mark.parametrize(
        ("overrides", "wanted"),
        [
            ({"serve.host": "0.0.0.0"}, "open to other machines"),
            ({"schema.classes": "1"}, "2 to 10000"),
            ({"schema.classes": ("a", "a")}, "names must differ"),
            ({"source.samples.format": "image"}, "shape [1 or 3, height, width]"),
            ({"schema.shape": []}, "at least 1 item"),
            ({"schema.shape": 6}, "schema.shape: wanted a list, such as [6]"),
            ({"source.labels.topic": "samples"}, "must be different topics"),
            ({"log.dead_letters": "labels"}, "must be different topics"),
            ({"model.factory": "os:system; rm"}, "import path"),
            ({"learn.noise": "image", "learn.noise_options.crop_scale": 0.0}, "greater than 0"),
            ({"learn.noise": "image", "learn.noise_options.colour": 1.1}, "less than or equal to 1"),
            ({"learn.noise_options.feature_dropout": 1.0}, "less than 1"),
            ({"source.samples.topic": "a b"}, "pattern"),
            ({"state.keep_checkpoints": 1}, "greater than or equal to 2"),
        ],
    )
    def test_each_says_what_was_wanted(self, overrides: dict[str, object], wanted: str) -> None:
        """One table of wrong settings."""
        with pytest.raises(ConfigError, match=wanted.replace("[", r"\[").replace("]", r"\]")):
            load_config(environ={}, overrides=overrides)

    def test_a_variable_with_one_underscore_is_told_how_it_is_written(self) -> None:
        """A table and its key are parted by two."""
        assert "STREAMLEARN_SERVE__PORT" in message({"STREAMLEARN_SERVE_PORT": "3"})

    def test_a_secret_is_never_shown(self) -> None:
        """An error beside a token does not print it."""
        assert "s3cret" not in message({"STREAMLEARN_SERVE__TOKEN": "s3cret", "STREAMLEARN_SERVE__PORT": "-1"})

    def test_a_missing_file_and_a_broken_one_are_named(self, tmp_path: Path) -> None:
        """Before anything is opened."""
        with pytest.raises(ConfigError, match="No such file"):
            load_config(tmp_path / "none.toml", environ={})
        (tmp_path / "bad.toml").write_text("a = ")
        with pytest.raises(ConfigError, match="not TOML"):
            load_config(tmp_path / "bad.toml", environ={})


def test_a_public_address_is_allowed_with_a_token_or_on_purpose() -> None:
    """Safe by default (D15)."""
    for allowed in ({"serve.token": "t"}, {"serve.insecure": True}):
        config = load_config(environ={}, overrides={"serve.host": "0.0.0.0", **allowed})

        assert config.serve.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"learn.method": "dsne"}, "learn.options.source_path: dsne needs the .npz file"),
        (
            {"learn.method": "pi", "learn.options.contrast_weight": 1.0},
            "learn.options.contrast_weight: learn.method",
        ),
        (
            {"learn.options.mixup_beta": 0.5, "learn.method": "dsne"},
            "learn.options.mixup_beta: learn.method",
        ),
        ({"learn.options.source_path": "x.npz"}, "learn.options.source_path: learn.method has no such option"),
        ({"learn.method": "supervised", "learn.options.gate": "fixed"}, "learn.options.gate: learn.method has no such"),
        ({"learn.options.gate_threshold": 0.9}, 'learn.options: gate_threshold = 0.9 has no effect with gate = "none"'),
        ({"learn.noise_options.flip": True}, "learn.noise_options.flip: learn.noise has no such option"),
        ({"learn.noise": "none", "learn.noise_options.std": 0.1}, "learn.noise_options.std: learn.noise has no such"),
        ({"learn.options.gate": "x"}, "learn.options.gate: Input should be 'none', 'fixed'"),
        ({"learn.options": 3}, "learn.options: Input should be a valid dictionary"),
        ({"learn": 3}, "learn: Input should be a valid dictionary"),
    ],
)
def test_an_option_that_method_or_noise_does_not_have_is_an_error(settings: dict[str, object], error: str) -> None:
    """An option that had no effect would look like one that does not help."""
    with pytest.raises(ConfigError, match=re.escape(error)):
        load_config(None, overrides=settings, environ={})


def test_errors_of_options_come_with_all_others() -> None:
    """With key, value and source."""
    text = message({"STREAMLEARN_LEARN__OPTIONS__TEMPERATURE": "0"}, serve__prt=3, learn__noise_options__std=-1.0)

    assert "3 settings are wrong" in text
    assert "learn.options.temperature: Input should be greater than 0 (got '0', from environment)" in text
    assert "learn.noise_options.std: Input should be greater than or equal to 0 (got -1.0, from command line)" in text


def test_options_of_an_unknown_method_are_not_errors_too() -> None:
    """Nobody can say which options a misspelt method has."""
    assert message(learn__method="mean_techer", learn__options__gate="fixed").count("learn.") == 1


@pytest.mark.parametrize("key", REMOVED)
def test_a_removed_setting_is_an_error_that_names_what_to_do(key):
    """Each is gone, and its error says what to use instead."""
    with pytest.raises(ConfigError, match=re.escape(f"{key}: {REMOVED[key]}")):
        load_config(overrides={key: 1}, environ={})
    assert key not in settings()


class TestClasses:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("score.thresholds", {"fraud": 0.8}),
            ("score.classes", ["fraud"]),
            ("learn.class_weights", {"fraud": 2.0}),
        ],
    )
    def test_settings_of_classes_name_classes_of_the_schema(self, key: str, value: object) -> None:
        """A misspelt class would be ignored silently."""
        names = ["legitimate", "fraud"]
        assert load_config(environ={}, overrides={"schema.classes": names, key: value})
        assert f"{key}: 'fraud' is none of schema.classes" in message(schema__classes=3, **{key: value})

    @pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, float("nan"), "high"])
    def test_a_threshold_is_a_probability(self, threshold: object) -> None:
        """Above 0: every class has at least that."""
        assert "score.thresholds" in message(score__thresholds={"1": threshold})

    @pytest.mark.parametrize("weights", ["even", {"1": 0.0}, {"1": float("inf")}, {"1": -2.0}])
    def test_a_class_weight_is_positive_and_finite(self, weights: object) -> None:
        """Or they are balanced."""
        assert "learn.class_weights" in message(learn__class_weights=weights)
