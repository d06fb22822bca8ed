"""[learn]: the method, the teacher's average, the optimizer and the noise."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ModelWrapValidatorHandler, SerializeAsAny, ValidationInfo, field_validator, model_validator

from streamlearn.learn.methods.settings import OPTIONS, MethodOptions, MixupOptions
from streamlearn.learn.noise.settings import NOISES, NoiseOptions
from streamlearn.learn.recipes import RECIPES, Recipe
from streamlearn.models.settings import ImportPath
from streamlearn.section import Section

SectionT = TypeVar("SectionT", bound=Section)


def unset(section: Section, names: Collection[str]) -> None:
    """Make fields count as not set: they have defaults that depend on other settings."""
    section.model_fields_set.difference_update(names)


def _with_defaults(kind: type[SectionT], given: object, defaults: Mapping[str, Any]) -> SectionT:
    if not isinstance(given, Mapping):
        return kind.model_validate(given)
    section = kind.model_validate({**defaults, **given})
    unset(section, defaults.keys() - given.keys())
    return section


class LearnConfig(Section):
    """[learn]: what every method has. `Config` resolves `auto` by the schema before this is validated."""

    recipe: Literal["auto", "image", "table", "none"] = "auto"
    """Set of defaults: image for 3-d shapes, else table; or none. A setting that is set always wins. Under another
    `method` than the recipe's own, only the defaults for labelled rows apply. Evidence: docs/learning.md."""
    method: Literal["mean_teacher", "ict", "pi", "temporal_ensembling", "dsne", "supervised"] = "mean_teacher"
    """mean_teacher; ict (interpolation consistency: mixed samples in place of noise); pi (the student is its own
    teacher); temporal_ensembling (its past answers are); dsne (a labelled source domain next to the stream);
    supervised (labels only)."""
    options: SerializeAsAny[MethodOptions] = MethodOptions()
    """Options of the method."""
    ema_decay: float = Field(0.995, ge=0.0, lt=1.0)
    """alpha of the teacher's average. Its horizon is 1/(1-alpha) steps."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """adamw, or sgd with Nesterov momentum 0.9."""
    learning_rate: float = Field(3e-3, gt=0.0, le=10.0)
    """Constant: a stream has no end to anneal towards."""
    weight_decay: float = Field(1e-4, ge=0.0, le=1.0)
    """Decoupled with adamw; L2 with sgd."""
    noise: ImportPath = "auto"
    """Input noise: auto (image for 3-d shapes, else table), image, table, none, or package.module:factory."""
    noise_options: SerializeAsAny[NoiseOptions] = NoiseOptions()
    """Options of the noise."""
    twin: Literal["off", "measure", "elect"] = "elect"
    """The label-only twin. measure: train it, which shows whether unlabelled samples help. elect: also publish it in
    the teacher's place while labels show that it is better."""
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0.0, le=1e6)]] = Field(
        default_factory=dict
    )
    """Weights of labelled rows in the classification cost: by class, such as {fraud = 5.0}, 1 for the others; or
    balanced: every class of a step has the same sum. The mean weight stays 1. Replay is class-balanced already."""
    correct_prior: bool = True
    """Correct answered probabilities for the class shares of the stream, as far as labels show that it helps: replay
    shows the network all classes about alike. What is learned does not change."""
    seed: int = Field(0, ge=0, lt=2**32)
    """All randomness is a function of (seed, step)."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the networks' passes in a step: auto, float32 or bfloat16. auto: bfloat16 for images where the processor has
    instructions for it (AMX, or a GPU), else float32. Weights, averages, costs and answers are always float32. A
    bit-equal restart needs the same."""
    cpu_share: float = Field(0.5, ge=0.01, le=1.0)
    """Share of its threads' time up to which the learner takes steps without new records. New records are always
    learned at once."""
    threads: int = Field(0, ge=0, le=1024)
    """Intra-op CPU threads of the learner. 0: one for the networks mlp and table, else half of the cores. A bit-equal
    restart needs the same number."""

    @property
    def ema_share(self) -> float:
        """Until the average reaches its horizon, the horizon is this share of the steps so far."""
        return _recipe(self.recipe).ema_share

    @property
    def mixup_beta(self) -> float:
        """Of labelled rows; 0 for methods that do not mix them."""
        return self.options.mixup_beta if isinstance(self.options, MixupOptions) else 0.0

    @property
    def follows_recipe(self) -> bool:
        """Whether the method is the recipe's own, so that all of its defaults apply."""
        return self.method == _recipe(self.recipe).method

    @model_validator(mode="wrap")
    @classmethod
    def _follow_recipe(cls, given: Any, build: ModelWrapValidatorHandler[LearnConfig]) -> LearnConfig:
        if not isinstance(given, Mapping):
            return build(given)
        recipe = _recipe(given.get("recipe"))
        defaults = {"method": recipe.method, "ema_decay": recipe.ema_decay, "options": {}, "noise_options": {}}
        config = build({**defaults, **given})
        unset(config, defaults.keys() - given.keys())
        return config

    @field_validator("options", mode="before")
    @classmethod
    def _read_options(cls, given: Any, info: ValidationInfo) -> Any:
        """Options of the method, defaults by recipe. Nothing is checked where the method itself is wrong."""
        kind = OPTIONS.get(info.data.get("method", ""))
        if kind is None:
            return MethodOptions()
        recipe = _recipe(info.data.get("recipe"))
        return _with_defaults(kind, given, recipe.options_for(info.data["method"], kind.model_fields))

    @field_validator("noise_options", mode="before")
    @classmethod
    def _read_noise_options(cls, given: Any, info: ValidationInfo) -> Any:
        """Options of the noise. An import path has none."""
        return _with_defaults(NOISES.get(info.data.get("noise", ""), NoiseOptions), given, {})


def _recipe(name: object) -> Recipe:
    return RECIPES.get(str(name), RECIPES["table"])
