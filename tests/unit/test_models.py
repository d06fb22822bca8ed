"""Networks: built from a spec, the same everywhere, and refused with a helpful error if they do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from streamlearn.errors import CheckpointError, ConfigError
from streamlearn.models.build import ModelSpec, build
from streamlearn.models.mlp import Mlp, completed
from streamlearn.models.normalise import LARGEST_INPUT, RunningNorm


def spec(factory: str, shape: tuple[int, ...], classes: int = 10, **options: object) -> ModelSpec:
    return ModelSpec(factory, options, shape, classes, normalise=False, scale=1.0)


NORMS = ("batch", "robust_batch", "group", "layer", "none")
FITTING = [
    spec("mlp", (64,)),
    spec("mlp", (1, 8, 8), hidden=[32], dropout=0.5, norm="layer"),
    spec("mlp", (5,), 2, hidden=[]),
    spec("convnet", (1, 8, 8)),
    spec("convnet", (3, 28, 28), norm="group"),
    spec("convnet", (1, 4, 5), 3, widths=[6, 7, 8, 9], norm="group"),
    spec("conv13", (3, 32, 32), width=0.1),
    spec("conv13", (1, 8, 8), width=0.05),
    spec("conv13", (1, 28, 28), width=0.05),
    spec("wide_resnet", (3, 9, 8), depth=16, width=1, dropout=0.1),
    spec("torch.nn:Linear", (7,), 4, in_features=7, out_features=4),
    *(spec("mlp", (6,), 3, hidden=[16], norm=norm) for norm in NORMS),
    *(spec("convnet", (1, 8, 8), 3, widths=[8, 6], norm=norm) for norm in NORMS),
    *(spec("conv13", (1, 8, 8), 3, width=0.05, norm=norm) for norm in NORMS),
    *(spec("wide_resnet", (1, 8, 8), 3, depth=10, width=1, norm=norm) for norm in NORMS),
]


def of_user(**options: object) -> object:
    """A user's factory: returns or raises what the test specifies."""
    if "raised" in options:
        raise {"RuntimeError": RuntimeError, "KeyError": KeyError}[str(options["raised"])]("inner")
    return {"text": "no module", "lazy": nn.LazyLinear(3), "split": Split(), "whole": Whole()}[str(options["returned"])]


class Split(nn.Module):
    """Returns two things."""

    def forward(self, x):
        return x, x


class Whole(nn.Module):
    """Returns class indices."""

    def forward(self, x):
        return torch.zeros((len(x), 3), dtype=torch.int64)


class TestBuild:
    @pytest.mark.parametrize("of", FITTING, ids=lambda of: f"{of.factory}-{of.shape}-{of.options.get('norm', '')}")
    def test_gives_logits_with_gradient_for_every_parameter(self, of):
        """(B, C) in train mode; no parameter is unused."""
        classifier = build(of, seed=3).train()

        logits_BC = classifier(torch.rand((4, *of.shape)))
        logits_BC.square().sum().backward()

        assert logits_BC.shape == (4, of.classes)
        assert all(parameter.grad is not None for parameter in classifier.parameters())

    def test_is_a_function_of_the_seed_alone(self):
        """Another seed gives other weights; torch's global generator does not change."""
        torch.manual_seed(11)
        before = torch.get_rng_state()

        first, again, other = (build(spec("mlp", (6,), 3), seed=seed) for seed in (1, 1, 2))

        x_BF = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
        assert torch.equal(first(x_BF), again(x_BF))
        assert not torch.equal(first(x_BF), other(x_BF))
        assert torch.equal(before, torch.get_rng_state())

    def test_takes_timm_models_by_import_path(self):
        """`timm:create_model` with resnet18, on images of 32 x 32."""
        options = {"model_name": "resnet18", "pretrained": False, "num_classes": 10, "in_chans": 1}

        classifier = build(spec("timm:create_model", (1, 32, 32), **options))

        assert classifier(torch.zeros((2, 1, 32, 32), dtype=torch.uint8)).shape == (2, 10)

    def test_gives_lazy_layers_their_sizes(self):
        """In the checking forward pass, under the seed."""
        first, again = (build(spec(f"{__name__}:of_user", (6,), 3, returned="lazy"), seed=1) for _ in range(2))

        assert torch.equal(first.net.weight, again.net.weight)

    @pytest.mark.parametrize(
        ("of", "said"),
        [
            (spec("resnet", (6,)), "expected mlp, table, convnet"),
            (spec("no_such_package:net", (6,)), "cannot import"),
            (spec("torch.nn:NoSuchLayer", (6,)), "cannot import"),
            (spec("torch.nn:__doc__", (6,)), "expected a callable"),
            (spec("mlp", (6,), depth=3), "depth"),
            (spec("mlp", (6,), hidden=[0]), "at least 1"),
            (spec("convnet", (64,)), "expected images"),
            (spec("convnet", (1, 8, 8), norm="loud"), "norm: expected one of batch"),
            (spec("wide_resnet", (1, 8, 8), depth=12), "depth: expected 10, 16"),
            (spec("wide_resnet", (64,)), "expected images"),
            (spec("wide_resnet", (1, 8, 8), width=0), "width: expected"),
            (spec("conv13", (1, 3, 8)), "4 x 4"),
            (spec(f"{__name__}:of_user", (6,), raised="RuntimeError"), "inner"),
            (spec(f"{__name__}:of_user", (6,), raised="KeyError"), "inner"),
            (spec(f"{__name__}:of_user", (6,), returned="text"), "made a str"),
            (spec(f"{__name__}:of_user", (6,), returned="split"), "returns a tuple"),
            (spec(f"{__name__}:of_user", (6,), 3, returned="whole"), "int64"),
            (spec("torch.nn:Linear", (7,), 4, in_features=7, out_features=5), r"\(2, 5\).*expected.*\(2, 4\)"),
            (spec("torch.nn:Linear", (7,), 4, in_features=6, out_features=4), "fails on samples"),
        ],
    )
    def test_a_network_that_does_not_fit_is_a_config_error(self, of, said):
        """The message names the setting and what was found."""
        with pytest.raises(ConfigError, match=said) as caught:
            build(of)

        assert str(caught.value).startswith("model.")

    @pytest.mark.parametrize(("size", "places"), [(32, 6), (28, 5), (12, 1), (8, 2)])
    def test_of_conv13_pads_its_seventh_layer_only_where_it_must(self, size, places):
        """6 x 6 places at the end for 32 x 32, as in the paper; small images are padded."""
        classifier = build(spec("conv13", (1, size, size), width=0.05))

        assert classifier.net.features(torch.zeros(1, 1, size, size)).shape[2:] == (places, places)

    def test_of_conv13_is_the_papers_size(self):
        """3.12 million weights for 32 x 32 colour images, without the vectors of weight and batch norm."""
        classifier = build(spec("conv13", (3, 32, 32)))

        matrices = sum(p.numel() for name, p in classifier.named_parameters() if name.endswith("original1"))
        assert matrices == pytest.approx(3.12e6, rel=0.01)


class TestMlp:
    @pytest.mark.parametrize("hidden", [(), (7,), (7, 5)])
    def test_the_first_layer_also_takes_squares(self, hidden):
        """Of inputs clipped at 3."""
        net = Mlp((2, 2), 3, hidden=hidden)
        x_BF = torch.tensor([[0.5, -2.0, 30.0, 0.0]])

        first, *others = [layer for layer in net.layers if isinstance(layer, nn.Linear)]
        h = first(x_BF) + net.squares(0.5 * (torch.tensor([[0.25, 4.0, 9.0, 0.0]]) - 1.0))
        for layer in others:
            h = layer(h.relu())

        torch.testing.assert_close(net(x_BF.view(1, 2, 2)), h)

    def test_of_an_earlier_version_has_squares_with_weights_of_zero(self):
        """In each group of arrays of a checkpoint; other arrays stay."""
        tensors = {f"student.net.{name}": tensor for name, tensor in Mlp((4,), 3).state_dict().items()}
        old = {name: tensor.numpy() for name, tensor in tensors.items() if "squares" not in name}

        found = completed(old, tensors)

        assert found.keys() == tensors.keys()
        assert not found["student.net.squares.weight"].any()
        assert all(found[name] is array for name, array in old.items())


class TestClassifier:
    def test_scales_then_normalises_then_predicts(self):
        """The order that the learner and the servers share."""
        of = ModelSpec("mlp", {}, (3,), 2, normalise=True, scale=0.5)
        classifier = build(of)
        assert isinstance(classifier.normalise, RunningNorm)
        raw = torch.tensor([[2, 4, 6], [4, 8, 10]], dtype=torch.uint8)
        classifier.normalise.observe(raw * 0.5)

        expected = classifier.net(torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).asinh())

        torch.testing.assert_close(classifier(raw), expected)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float64])
    def test_sees_the_same_numbers_in_every_dtype(self, dtype):
        """Samples are stored in the schema's dtype; the network sees float32."""
        classifier = build(spec("convnet", (1, 8, 8), 3))
        x = torch.arange(128).reshape(2, 1, 8, 8)

        assert torch.equal(classifier(x.to(dtype)), classifier(x.float()))


class TestModelSpec:
    def test_goes_through_json_and_builds_the_same_network(self):
        """A server's network, built from the published text, gives the learner's answers."""
        of = ModelSpec("mlp", {"hidden": (8, 4)}, (6,), 3, normalise=True, scale=0.1)
        learners, x_BF = build(of, seed=5), torch.rand(4, 6)

        servers = build(ModelSpec.from_json(of.to_json()), seed=99)
        servers.load_state_dict(learners.state_dict())

        assert torch.equal(learners(x_BF), servers(x_BF))
        assert json.loads(of.to_json())["shape"] == [6]

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"shape": 3}', '{"shape": [3], "factory": "mlp"}', "null"])
    def test_from_another_text_is_a_checkpoint_error(self, text):
        """A truncated or foreign publication."""
        with pytest.raises(CheckpointError, match="model spec"):
            ModelSpec.from_json(text)

    def test_options_without_a_json_form_are_a_config_error(self):
        """It could not be published."""
        with pytest.raises(ConfigError, match=r"model\.options"):
            spec("mlp", (6,), hidden={1, 2}).to_json()


def test_inputs_that_are_not_normalised_are_bounded():
    """In learner and server: the answer to 1e19 is that to the bound, and finite."""
    spec = ModelSpec("convnet", {"widths": [4, 6]}, (2, 6, 6), 3, normalise=False, scale=0.5)
    classifier = build(spec).eval()
    outlier, bound = torch.full((1, 2, 6, 6), -1e19), torch.full((1, 2, 6, 6), -2 * LARGEST_INPUT)

    assert torch.isfinite(classifier(outlier)).all()
    assert torch.equal(classifier(outlier), classifier(bound))
    assert not torch.equal(classifier(bound), classifier(bound / 2))
