"""Norm layers against numpy and autograd, and their effect on a batch of one class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from streamlearn.models.norm import RobustBatchNorm, make_norm
from streamlearn.models.normalise import BatchNormWarmup

KINDS = ("batch", "robust_batch", "group", "layer", "none")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int = 12, width: int = 16, *, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return mean + torch.randn((count, width), generator=seeded(seed))


def pictures(count: int = 6, width: int = 16) -> torch.Tensor:
    x = torch.randn((count, width, 5, 4), generator=seeded(1))
    return x.contiguous(memory_format=torch.channels_last)


def with_affine(layer: nn.Module) -> nn.Module:
    """Gamma and beta other than 1 and 0."""
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2.0, generator=seeded(2))
        layer.bias.uniform_(-1.0, 1.0, generator=seeded(3))
    return layer


def per_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, *(1 for _ in x.shape[2:]))


class TestMakeNorm:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("images", [False, True])
    def test_keeps_shape_dtype_and_layout(self, kind, images):
        """float32, images channels-last, in training and in evaluation; also for a single row in evaluation."""
        x = pictures() if images else rows()
        layer = make_norm(kind, 16, images=images)

        for training in (True, False):
            layer.train(training)
            for given in (x, x[:1]) if not training else (x,):
                out = layer(given)
                assert out.shape == given.shape
                assert out.dtype == torch.float32
                assert not images or out.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize(("kind", "groups"), [("group", 8), ("layer", 1)])
    @pytest.mark.parametrize("images", [False, True])
    def test_group_and_layer_standardise_each_row_independently(self, kind, groups, images):
        """Eight groups of channels, or one: mean 0 and variance 1 in each, whatever else is in the batch."""
        x = pictures() if images else rows()

        out = with_affine(make_norm(kind, 16, images=images).train())(x)

        grouped = x.double().numpy().reshape(len(x), groups, -1)
        mean, var = grouped.mean(-1, keepdims=True), grouped.var(-1, keepdims=True)
        standard = torch.from_numpy(((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape))
        layer = with_affine(make_norm(kind, 16, images=images))
        expected = standard * per_channel(layer.weight, x) + per_channel(layer.bias, x)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)

    def test_group_is_one_group_if_eight_do_not_divide(self):
        """Of 6 channels."""
        assert make_norm("group", 6).num_groups == 1

    def test_none_is_the_identity(self):
        """The same tensor."""
        x = rows()

        assert make_norm("none", 16)(x) is x

    @pytest.mark.parametrize("images", [False, True])
    def test_an_unknown_kind_is_an_error_that_lists_all(self, images):
        """The message is what `model.options` shows."""
        with pytest.raises(
            ValueError, match="norm: expected one of batch, robust_batch, group, layer, none, got 'loud'"
        ):
            make_norm("loud", 16, images=images)


def robust(x: torch.Tensor) -> nn.Module:
    return with_affine(RobustBatchNorm(16)).train()


BATCHES = [rows(mean=0.3), pictures()]


class TestRobustBatchNorm:
    @pytest.mark.parametrize("x", BATCHES, ids=["table", "images"])
    def test_normalises_by_the_running_statistics(self, x):
        """Gamma (x - mu) / sigma + beta, with mu and sigma after the batch was merged into them."""
        layer = robust(x)
        for _ in range(20):
            layer(x + torch.randn(x.shape, generator=seeded(4)))

        out = layer(x)

        deviation = (layer.running_var + 1e-5).sqrt()
        standard = (x - per_channel(layer.running_mean, x)) / per_channel(deviation, x)
        expected = standard * per_channel(layer.weight, x) + per_channel(layer.bias, x)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("x", BATCHES, ids=["table", "images"])
    def test_has_the_gradient_of_batch_renormalisation(self, x):
        """Through the batch's own mean and deviation; r and d are constants. So a shift of all rows has none."""
        layer, x = robust(x), x.clone().requires_grad_()
        layer(x.detach())
        pull = torch.randn(x.shape, generator=seeded(6))

        (layer(x) * pull).sum().backward()

        with torch.no_grad():
            mu, sigma = layer.running_mean, (layer.running_var + 1e-5).sqrt()
        again, gamma, beta = (t.detach().clone().requires_grad_() for t in (x, layer.weight, layer.bias))
        dims = [0, *range(2, x.dim())]
        mu_B, sigma_B = again.mean(dims), (again.var(dims, correction=0) + 1e-5).sqrt()
        r, d = (sigma_B / sigma).detach(), ((mu_B - mu) / sigma).detach()
        assert r.min() > 1 / 3
        assert d.abs().max() < 5
        standard = (again - per_channel(mu_B, x)) / per_channel(sigma_B, x) * per_channel(r, x) + per_channel(d, x)
        ((standard * per_channel(gamma, x) + per_channel(beta, x)) * pull).sum().backward()
        torch.testing.assert_close(x.grad, again.grad, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.weight.grad, gamma.grad, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.bias.grad, beta.grad, atol=1e-4, rtol=1e-4)
        assert x.grad.sum(dims).abs().max() < 1e-4

    def test_bounds_the_correction_of_a_batch(self):
        """A batch that is 1000 times as wide and far counts as 3 times as wide and 5 deviations away."""
        layer = RobustBatchNorm(16).train()
        layer.momentum = 1e-9
        for _ in range(3):
            layer(rows())

        far, wide = layer(1000.0 + rows()), layer(1000.0 * rows())

        torch.testing.assert_close(far.mean(0), torch.full((16,), 5.0), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(wide.std(0, correction=0), torch.full((16,), 3.0), atol=1e-3, rtol=1e-3)
        narrow = layer(0.001 * rows())
        assert narrow.std(0, correction=0).max() < 0.34

    @pytest.mark.parametrize("x", BATCHES, ids=["table", "images"])
    def test_keeps_the_statistics_that_batch_normalisation_keeps(self, x):
        """The same buffers after the same batches, so checkpoints are interchangeable."""
        plain = with_affine((nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d)(16)).train()
        layer = robust(x)
        for step in range(5):
            plain(x * step)
            layer(x * step)

        assert layer.state_dict().keys() == plain.state_dict().keys()
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], tensor)
        before = layer.running_mean.clone()
        torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
        assert torch.equal(layer.running_mean, before)

    def test_starts_with_the_first_batch(self):
        """With the warm-up's momentum of 1 the first output is that of batch normalisation."""
        x, layer, plain = rows(count=4000), RobustBatchNorm(16).train(), nn.BatchNorm1d(16).train()

        BatchNormWarmup(layer).set(ask=True)

        torch.testing.assert_close(layer(x), plain(x), atol=2e-3, rtol=2e-3)

    def test_does_not_hide_which_class_a_batch_is_of(self):
        """Alternating batches of one class: batch normalisation makes them equal, this layer does not."""
        plain, layer = nn.BatchNorm1d(16).train(), RobustBatchNorm(16).train()
        for seed in range(200):
            sides = [rows(mean=2.0 * (-1) ** (seed + turn), seed=seed) for turn in (0, 1)]
            hidden = [plain(side).mean().item() for side in sides]
            seen = [layer(side).mean().item() for side in sides]

        assert max(map(abs, hidden)) < 0.01
        assert abs(seen[0] - seen[1]) > 1.0
