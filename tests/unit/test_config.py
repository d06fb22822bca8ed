"""Settings: one precedence, all errors at once, nothing misspelt passes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import pytest

from streamlearn.config import RECIPES, LearnConfig, load_config, settings
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
        """An operator mends them in one go."""
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
            ({"schema.payload": "image"}, "shape [1 or 3, height, width]"),
            ({"schema.shape": []}, "at least 1 item"),
            ({"schema.shape": 6}, "schema.shape: wanted a list, such as [6]"),
            ({"log.topics.labels": "samples"}, "must be three topics"),
            ({"log.topics.dead_letters": "labels"}, "must be three topics"),
            ({"model.factory": "os:system; rm"}, "import path"),
            ({"model.norm": "loud"}, "'batch', 'robust_batch', 'group', 'layer' or 'none'"),
            ({"model.norm": "group", "model.factory": "a:b"}, "norm: is of built-in networks"),
            ({"model.norm": "group", "model.options": {"norm": "batch"}}, "stands in one place"),
            ({"learn.crop_scale": 0.0}, "greater than 0"),
            ({"learn.colour": 1.1}, "less than or equal to 1"),
            ({"learn.feature_dropout": 1.0}, "less than 1"),
            ({"log.topics.samples": "a b"}, "pattern"),
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


@pytest.mark.parametrize("recipe", ["auto", *RECIPES])
@pytest.mark.parametrize("method", ["mean_teacher", "ict", "pi", "temporal_ensembling", "supervised"])
def test_no_recipe_and_no_default_is_refused_with_any_method(method: str, recipe: str) -> None:
    """Nobody has set what a recipe brings; and a copy of the example sets all to what it is."""
    asked = {"learn.method": method, "learn.recipe": recipe, "schema.shape": [1, 8, 8]}
    copied = {f"learn.{name}": LearnConfig.model_fields[name].default for name in ("align", "gate", "temperature")}

    for setting in (asked, asked | copied):
        assert load_config(environ={}, overrides=setting).learn.method == method


def test_a_learner_may_change_to_labels_alone_and_leave_its_other_settings() -> None:
    """The runbook has it so, for a night."""
    settings = {"learn.method": "supervised", "learn.align": "labels", "learn.gate": "softmatch"}

    assert load_config(environ={}, overrides=settings).learn.method == "supervised"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learn.method": "dsne"}, "wants learn.source_path"),
        ({"learn.method": "ict", "learn.logit_distance": 1.0}, "learn.logit_distance: no effect"),
        ({"learn.method": "dsne", "learn.source_path": "x.npz", "learn.mixup_beta": 0.5}, "learn.mixup_beta = 0"),
        ({"learn.method": "temporal_ensembling", "learn.mixup_beta": 0.5, "batch.steps": 1}, "wants batch.steps > 1"),
        (
            {"learn.method": "temporal_ensembling", "learn.align": "labels", "learn.gate": "freematch"},
            'learn.align, learn.gate: no effect with learn.method = "temporal_ensembling"',
        ),
        ({"learn.gate_threshold": 0.9}, 'learn.gate_threshold: no effect with learn.gate = "none", only with "fixed"'),
        ({"learn.method": "temporal_ensembling", "learn.temperature": 0.5}, "learn.temperature: no effect"),
        ({"learn.method": "pi", "learn.teacher_mode": "train"}, "learn.teacher_mode: no effect"),
        ({"learn.method": "pi", "learn.interpolation_beta": 1.0}, "learn.interpolation_beta: no effect"),
        ({"learn.source_path": "x.npz"}, 'no effect with learn.method = "mean_teacher", only with "dsne"'),
        ({"learn.ensemble_slots": 9}, "learn.ensemble_slots: no effect"),
        ({"learn.nesterov": False, "learn.method": "supervised"}, 'learn.optimizer = "adamw", only with "sgd"'),
        (
            {"learn.momentum": 0.5, "learn.logit_distance": 1.0, "learn.method": "pi"},
            'only with "mean_teacher"; learn.momentum: no effect',
        ),
    ],
)
def test_what_would_have_no_effect_or_compare_nothing_is_refused(settings: dict[str, object], said: str) -> None:
    """Before anything is opened; a cost of zero would pass for agreement."""
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(None, overrides=settings, environ={})


class TestRecipe:
    IMAGE: ClassVar[dict[str, object]] = {"schema.shape": [1, 8, 8], "schema.dtype": "uint8"}

    @pytest.mark.parametrize(
        ("settings", "recipe"),
        [
            ({}, "table"),
            ({"schema.shape": [5, 7]}, "table"),
            (IMAGE, "image"),
            ({"learn.recipe": "image"}, "image"),
            (IMAGE | {"learn.recipe": "table"}, "table"),
            (IMAGE | {"learn.method": RECIPES["image"]["method"]}, "image"),
        ],
    )
    def test_it_fits_the_shape_or_is_named(self, settings: dict[str, object], recipe: str) -> None:
        """Images are three-dimensional; everything else is a table."""
        learn = load_config(environ={}, overrides=settings).learn

        assert {name: getattr(learn, name) for name in RECIPES[recipe]} == RECIPES[recipe]

    def test_what_is_set_wins_over_it(self) -> None:
        """Each setting by itself."""
        learn = load_config(environ={}, overrides=self.IMAGE | {"learn.mixup_beta": 0.0, "learn.seed": 3}).learn

        wanted = RECIPES["image"] | {"mixup_beta": 0.0, "seed": 3}
        assert {name: getattr(learn, name) for name in wanted} == wanted

    def test_another_method_has_those_of_labelled_rows_alone(self) -> None:
        """Half a recipe is none: a weight for one method is no weight for another. Mixed rows are mixed for all."""
        learn = load_config(environ={}, overrides=self.IMAGE | {"learn.method": "pi"}).learn

        image = RECIPES["image"]
        assert learn == LearnConfig(method="pi", mixup_beta=image["mixup_beta"], ema_share=image["ema_share"])

    @pytest.mark.parametrize("asked", [{"method": "temporal_ensembling"}, {"method": "dsne", "source_path": "x.npz"}])
    def test_a_method_that_takes_no_mixed_rows_gets_none(self, asked: dict[str, object]) -> None:
        """Or it would be refused for what nobody has set."""
        settings = {f"learn.{name}": value for name, value in asked.items()} | {"batch.steps": 1}
        learn = load_config(environ={}, overrides=self.IMAGE | settings).learn

        assert learn == LearnConfig(**asked, ema_share=RECIPES["image"]["ema_share"])

    def test_none_leaves_the_settings_own_defaults(self) -> None:
        """Those of the paper's method."""
        learn = load_config(environ={}, overrides=self.IMAGE | {"learn.recipe": "none"}).learn

        assert learn == LearnConfig(recipe="none")

    def test_it_counts_as_not_set(self) -> None:
        """`evaluate` builds the config anew with the data set's own shape, and only what was set may go along."""
        config = load_config(environ={}, overrides={"learn.seed": 3})

        assert config.model_dump(exclude_unset=True) == {"learn": {"seed": 3}}

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_each_is_made_of_settings_in_their_bounds(self, recipe: str) -> None:
        """They pass by validation, which is done here."""
        LearnConfig(**RECIPES[recipe])


@pytest.mark.parametrize("key", REMOVED)
def test_a_removed_setting_is_an_error_that_names_what_to_do(key):
    """Each is gone, and its error says what to use instead."""
    with pytest.raises(ConfigError, match=re.escape(f"{key}: {REMOVED[key]}")):
        load_config(overrides={key: 1}, environ={})
    assert key not in settings()
