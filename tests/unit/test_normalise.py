"""Running statistics against those of all rows at once, and against data that would break them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from streamlearn.models.normalise import LIMIT, BatchNormWarmup, RunningNorm, as_centre_and_scale


def rows(count: int, *shape: int, seed: int = 0):
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed)) * 3.0 + 100.0


def follow(norm: RunningNorm, x_BF: torch.Tensor, *, batch: int = 32) -> Iterator[None]:
    """After each batch."""
    for part in x_BF.split(batch):
        norm.observe(part)
        yield


def follow_all(norm: RunningNorm, x_BF: torch.Tensor, *, batch: int = 32) -> None:
    for _ in follow(norm, x_BF, batch=batch):
        pass


def observed(x_BF: torch.Tensor, *, batch: int = 32) -> RunningNorm:
    norm = RunningNorm(tuple(x_BF.shape[1:]))
    follow_all(norm, x_BF, batch=batch)
    return norm


class TestRunningNorm:
    @pytest.mark.parametrize("batch", [1, 7, 64])
    def test_centre_and_scale_are_those_of_the_rows(self, batch):
        """Median, and a quantile of the distances from it that is the deviation of normal values."""
        x_BF = rows(256, 4)
        norm = observed(x_BF, batch=batch)

        distances = (x_BF - x_BF.quantile(0.5, dim=0, interpolation="lower")).abs()
        torch.testing.assert_close(norm.centre, x_BF.quantile(0.5, dim=0, interpolation="lower"))
        torch.testing.assert_close(norm.scale, distances.quantile(7 / 8, dim=0, interpolation="lower") / 1.534)
        torch.testing.assert_close(norm.scale, torch.full((4,), 3.0), rtol=0.15, atol=0)

    def test_is_linear_within_a_scale_and_logarithmic_beyond(self):
        """arsinh; clipped in the end."""
        norm = observed(rows(256, 1))
        centre, scale = norm.centre.item(), norm.scale.item()

        places = torch.tensor([[0.0], [0.1], [-1.0], [100.0], [-3e38], [float("inf")]])
        standard = norm(centre + scale * places).flatten().tolist()

        assert standard == pytest.approx([0.0, 0.0998, -0.881, 5.298, -LIMIT, LIMIT], abs=1e-3)

    def test_values_of_a_heavy_tail_stay_apart(self):
        """Amounts: with mean and deviation, half of them lie within a hundredth."""
        x_BF = (rows(5000, 1) - 100.0).exp()
        norm = observed(x_BF)

        low, middle, high = norm(x_BF.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)).flatten().tolist()

        assert middle - low > 0.05
        assert high - middle > 1.0

    def test_standardises_each_channel_of_images(self):
        """Over rows and pixels, per channel."""
        x = rows(50, 3, 4, 5) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
        norm = RunningNorm((3, 4, 5))

        norm.observe(x)

        standard = norm(x)
        torch.testing.assert_close(standard.mean(dim=(0, 2, 3)), torch.zeros(3), atol=0.1, rtol=0)
        torch.testing.assert_close(standard.std(dim=(0, 2, 3)), torch.full((3,), 0.76), atol=0.1, rtol=0)

    def test_follows_drift_within_a_horizon(self):
        """A row of every block is kept: the median moves once half of them are new."""
        norm = RunningNorm((1,), horizon_rows=1000)

        centres = [norm.centre.item() for _ in follow(norm, torch.cat((rows(1000, 1), rows(1000, 1) + 50.0)), batch=10)]

        assert centres[99] == pytest.approx(100.0, abs=1.0)
        assert centres[120] == pytest.approx(100.0, abs=4.0)
        assert centres[-1] == pytest.approx(150.0, abs=1.0)

    @pytest.mark.parametrize("value", [0.0, 0.1, 12345.678])
    def test_a_constant_feature_is_zero_and_a_change_of_it_is_bounded(self, value):
        """No division by a zero scale."""
        norm = observed(torch.full((21, 1), value), batch=7)

        assert norm(torch.tensor([[value]])).abs().item() < 0.01
        assert norm(torch.tensor([[value + 1e6]])).item() == LIMIT

    @pytest.mark.parametrize("outlier", [3e38, -1e30, float("inf")])
    def test_an_overflowing_value_does_not_poison_the_statistics(self, outlier):
        """In the second batch, and alone in the first."""
        norm = observed(torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.0, 2.0], [outlier, 5.0], [2.0, 5.0]]), batch=3)
        alone = observed(torch.tensor([[outlier]]))

        assert norm.centre.tolist() == [2.0, 3.0]
        assert norm(torch.tensor([[outlier, 5.0]])).abs().max().item() <= LIMIT
        for each in (norm, alone):
            assert torch.isfinite(each.scale).all()
            assert torch.isfinite(each(torch.full((1, len(each.scale)), 7.0))).all()

    @pytest.mark.parametrize("sentinel", [-999.0, -999_999.0, 1e9, 1e15, 3e38, float("inf")])
    @pytest.mark.parametrize("batch", [1, 2, 8, 64])
    @pytest.mark.parametrize("row", [0, 49])
    def test_one_sentinel_in_the_first_rows_does_not_become_the_scale(self, sentinel, batch, row):
        """Whatever the size of the first micro-batches, one row each included."""
        norm, x_BF = RunningNorm((1,)), rows(1280, 1)
        x_BF[row] = sentinel

        scales = [norm.scale.item() / 3.0 for _ in follow(norm, x_BF, batch=batch)]

        assert 0.7 < scales[64 // batch - 1] < 1.4
        assert 0.85 < scales[-1] < 1.15
        assert norm.centre.item() == pytest.approx(100.0, abs=0.6)

    @pytest.mark.parametrize("batch", [1, 64])
    def test_a_twentieth_of_sentinels_does_not_compress_the_others(self, batch):
        """-999999 for a missing value."""
        x_BF = rows(6400, 1)
        x_BF[torch.rand(len(x_BF), generator=torch.Generator().manual_seed(5)) < 0.05] = -999_999.0

        norm = observed(x_BF, batch=batch)

        assert norm.scale.item() / 3.0 < 1.5
        assert norm(torch.tensor([[103.0]])).item() - norm(torch.tensor([[97.0]])).item() > 1.2

    def test_a_burst_of_outliers_changes_little(self):
        """A twentieth of the horizon, and right at its end."""
        norm = observed(rows(12_800, 1))

        follow_all(norm, torch.full((512, 1), 1e15) * torch.sign(rows(512, 1) - 100.0))

        assert 0.8 < norm.scale.item() / 3.0 < 1.5
        assert norm.centre.item() == pytest.approx(100.0, abs=1.0)

    @pytest.mark.parametrize("factor", [10.0, 100.0, 1e6])
    @pytest.mark.parametrize("place", [0.0, 1.0])
    def test_a_lasting_change_of_scale_or_location_is_followed(self, factor, place):
        """Within a horizon."""
        norm = RunningNorm((1,), horizon_rows=1000)
        follow_all(norm, rows(1600, 1))

        changed = rows(1000, 1, seed=1) * (1.0 if place else factor) + place * 3.0 * factor
        follow_all(norm, changed)

        assert norm.centre.item() == pytest.approx(changed.median().item(), rel=0.2)
        assert norm(changed).abs().max().item() < 3.0

    def test_a_feature_that_starts_to_vary_is_followed(self):
        """A constant feature has no scale."""
        norm = RunningNorm((1,), horizon_rows=1000)
        follow_all(norm, torch.full((1600, 1), 7.0))

        follow_all(norm, rows(1000, 1))

        assert norm.centre.item() == pytest.approx(100.0, rel=0.02)
        assert norm.scale.item() == pytest.approx(3.0, rel=0.3)

    @pytest.mark.parametrize("sentinel", [-999_999.0, 1e9, 1e15])
    @pytest.mark.parametrize("batch", [1, 32])
    def test_a_sentinel_in_a_constant_feature_is_forgotten_once_it_varies(self, sentinel, batch):
        """It may be the only distance there is."""
        norm = RunningNorm((1,), horizon_rows=1000)
        follow_all(norm, torch.cat((torch.full((1600, 1), 7.0), torch.tensor([[sentinel]]))), batch=batch)

        follow_all(norm, rows(1000, 1), batch=batch)

        assert norm.scale.item() < 4.0
        assert norm.centre.item() == pytest.approx(100.0, abs=2.0)

    @pytest.mark.parametrize("share", [0.05, 0.01])
    def test_a_sparse_feature_has_the_scale_of_its_other_values(self, share):
        """Most distances from its median are 0. A value that is 1 is 1, however rare."""
        x_BF = (torch.rand((6400, 1), generator=torch.Generator().manual_seed(2)) < share).to(torch.float32)

        norm = observed(x_BF)

        assert norm(torch.tensor([[0.0], [1.0]])).flatten().tolist() == pytest.approx([0.0, math.asinh(1.0)])

    def test_a_sensor_that_is_idle_at_times_keeps_its_scale(self):
        """A quiet period shorter than the horizon must not magnify later values."""
        norm = RunningNorm((1,))
        active_N = torch.arange(20_000) // 1000 % 2 == 1
        x_BF = (rows(20_000, 1) - 100.0) * torch.where(active_N, 1.0, 0.001)[:, None]

        scales = [norm.scale.item() for _ in follow(norm, x_BF, batch=64)]

        assert min(scales[200:]) > 0.8
        assert max(scales[200:]) < 3.5

    def test_each_channel_of_images_has_its_own_sample(self):
        """Outliers in one channel do not change the statistics of the other."""
        norm, without = RunningNorm((2, 6, 6)), RunningNorm((2, 6, 6))
        x = rows(40, 2, 6, 6).to(memory_format=torch.channels_last)
        outlier = x.clone(memory_format=torch.preserve_format)
        outlier[3, 0] = 1e12

        follow_all(norm, outlier, batch=8)
        follow_all(without, x, batch=8)

        assert norm.scale.flatten()[0].item() / 3.0 < 1.5
        assert torch.equal(norm.scale[1], without.scale[1])
        assert torch.equal(norm.centre[1], without.centre[1])

    def test_the_sample_does_not_depend_on_how_rows_are_batched(self):
        """A row is kept by its number; the kept rows are spread over the horizon."""
        x_BF = torch.arange(5000.0)[:, None]
        norms = [RunningNorm((1,), horizon_rows=2000) for _ in range(3)]

        for norm, batch in zip(norms, (1, 64, 777), strict=True):
            follow_all(norm, x_BF, batch=batch)

        kept = [norm.sample.tensors()["sample"].flatten().sort().values for norm in norms]
        assert torch.equal(kept[0], kept[1])
        assert torch.equal(kept[0], kept[2])
        assert 2900 < kept[0].min().item() < 3300
        assert kept[0].max().item() > 4980
        assert kept[0].diff().max().item() < 20

    def test_is_computed_again_only_after_some_new_rows_of_the_sample(self):
        """Sorting them at each step would cost a small network more than its step."""
        norm = RunningNorm((1,))

        scales = [norm.scale.item() for _ in follow(norm, rows(20_000, 1), batch=64)]

        assert len(set(scales[:4])) == 4
        assert 10 <= len(set(scales[200:])) <= 20

    def test_before_any_row_changes_only_the_spacing(self):
        """A server may load it before the first row."""
        x_BF = torch.tensor([[1.0, -2.0]])

        assert torch.equal(RunningNorm((2,))(x_BF), x_BF.asinh())

    def test_forward_changes_nothing(self):
        """Predicting is pure, in train mode too."""
        norm = RunningNorm((4,)).train()
        norm.observe(rows(9, 4))
        before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}

        norm(rows(5, 4, seed=2))

        assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())

    def test_mean_and_deviation_of_an_earlier_version_are_its_centre_and_scale(self):
        """Other arrays stay; a constant feature has the scale 1."""
        old = {
            "teacher.normalise.mean": np.array([5.0, 7.0], np.float32),
            "teacher.normalise.var": np.array([4.0, 0.0], np.float32),
            "teacher.normalise.count": np.array(9.0, np.float32),
            "teacher.net.weight": np.ones(2, np.float32),
        }

        found = {name: array.tolist() for name, array in as_centre_and_scale(old).items()}

        assert found == {
            "teacher.normalise.centre": [5.0, 7.0],
            "teacher.normalise.scale": [2.0, 1.0],
            "teacher.net.weight": [1.0, 1.0],
        }
        assert as_centre_and_scale(as_centre_and_scale(old)).keys() == found.keys()


class TestBatchNormWarmup:
    def test_makes_running_statistics_the_plain_mean_at_first(self):
        """After three batches the running mean is the mean of the three, without the initial zero."""
        net = nn.Sequential(nn.BatchNorm1d(2))
        warmup = BatchNormWarmup(net)
        batches = [rows(8, 2, seed=seed) for seed in range(3)]

        for batch in batches:
            warmup.set(ask=True)
            net(batch)

        torch.testing.assert_close(net[0].running_mean, torch.stack(batches).mean(dim=(0, 1)))

    def test_ends_at_the_layers_own_momentum(self):
        """Counted in the batches of each layer, also after a rollback."""
        net = nn.Sequential(nn.BatchNorm2d(2, momentum=0.05), nn.BatchNorm1d(2, momentum=None))
        warmup = BatchNormWarmup(net)

        momenta = []
        for batches in (0, 9, 19, 999, 1):
            net[0].num_batches_tracked.fill_(batches)
            warmup.set(ask=True)
            momenta.append(net[0].momentum)
        warmup.set(ask=False)

        assert momenta == [1.0, 0.1, 0.05, 0.05, 0.5]
        assert net[0].momentum == 0.05
        assert net[1].momentum is None
