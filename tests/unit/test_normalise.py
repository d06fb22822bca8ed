"""Running statistics against those of all rows at once, and against data that would break them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from streamlearn.models.normalise import LIMIT, BatchNormWarmup, RunningNorm


def rows(count: int, *shape: int, seed: int = 0):
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed)) * 3.0 + 100.0


class TestRunningNorm:
    def test_in_batches_equals_all_rows_at_once(self):
        """Below the horizon the merge is exact, whatever the batch sizes."""
        x_BF = rows(100, 4)
        norm = RunningNorm((4,))

        for batch in x_BF.split([1, 9, 40, 50]):
            norm.observe(batch)

        torch.testing.assert_close(norm.mean, x_BF.mean(dim=0))
        torch.testing.assert_close(norm.var, x_BF.var(dim=0, correction=0), rtol=1e-4, atol=1e-4)
        assert norm.count.item() == 100

    def test_standardises_each_channel_of_images(self):
        """Mean 0 and deviation 1 over rows and pixels, per channel."""
        x = rows(50, 3, 4, 5) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
        norm = RunningNorm((3, 4, 5))

        norm.observe(x)

        standard = norm(x)
        torch.testing.assert_close(standard.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
        torch.testing.assert_close(standard.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)

    def test_follows_drift_once_the_horizon_is_full(self):
        """After several horizons at a new level the old one is forgotten."""
        norm = RunningNorm((1,), horizon_rows=50)
        norm.observe(torch.zeros(1000, 1))

        for _ in range(50):
            norm.observe(torch.full((10, 1), 7.0))

        assert norm.count.item() == 50
        assert norm.mean.item() == pytest.approx(7.0, abs=0.01)

    @pytest.mark.parametrize("value", [0.0, 0.1, 12345.678])
    def test_a_constant_feature_is_zero_and_a_change_of_it_is_bounded(self, value):
        """No division by a zero deviation."""
        norm = RunningNorm((1,))
        for _ in range(3):
            norm.observe(torch.full((7, 1), value))

        assert norm(torch.tensor([[value]])).abs().item() < 0.01
        assert norm(torch.tensor([[value + 1e6]])).item() == LIMIT

    @pytest.mark.parametrize("outlier", [3e38, -1e30, float("inf")])
    def test_an_overflowing_value_does_not_poison_the_statistics(self, outlier):
        """If its square overflows float32, that feature's statistics do not change; the others do."""
        norm = RunningNorm((2,))
        norm.observe(torch.tensor([[1.0, 1.0], [3.0, 3.0]]))

        norm.observe(torch.tensor([[outlier, 5.0], [2.0, 5.0]]))

        assert norm.mean.tolist() == pytest.approx([2.0, 3.5])
        assert torch.isfinite(norm.var).all()
        assert norm(torch.tensor([[outlier, 5.0]])).abs().max().item() <= LIMIT

    def test_one_outlier_among_many_rows_hardly_changes_the_statistics(self):
        """Without a bound, 1e15 would be the deviation for the next ten thousand rows."""
        norm = RunningNorm((2,))
        for seed in range(20):
            norm.observe(rows(32, 2, seed=seed))
        x_BF = rows(32, 2, seed=20)
        x_BF[5, 0] = 1e15

        norm.observe(x_BF)

        assert norm.mean.tolist() == pytest.approx([100.0, 100.0], abs=0.5)
        # One row in 672 that counts as 30 deviations more than doubles a variance; it does not make it 1e30.
        assert norm.var.sqrt().tolist() == pytest.approx([3.0, 3.0], rel=0.7)
        assert norm(torch.tensor([[109.0, 109.0]])).min().item() > 1.5

    def test_a_burst_of_outliers_is_soon_forgotten(self):
        """A twentieth of the horizon: later rows still differ from each other."""
        norm = RunningNorm((1,))
        for seed in range(400):
            norm.observe(rows(32, 1, seed=seed))

        for seed in range(16):
            norm.observe(torch.full((32, 1), 1e15) * torch.sign(rows(32, 1, seed=seed) - 100.0))

        assert 1.0 < norm.var.sqrt().item() / 3.0 < 2.5
        assert norm.mean.item() == pytest.approx(100.0, abs=5.0)

    @pytest.mark.parametrize("factor", [10.0, 100.0, 1e6])
    @pytest.mark.parametrize("place", [0.0, 1.0])
    def test_a_lasting_change_of_scale_or_location_is_followed(self, factor, place):
        """Within 150 batches, five horizons, although each batch is clipped."""
        norm = RunningNorm((1,), horizon_rows=1000)
        for seed in range(50):
            norm.observe(rows(32, 1, seed=seed))

        changed = [rows(32, 1, seed=seed) * (1.0 if place else factor) + place * 3.0 * factor for seed in range(150)]
        for x_BF in changed:
            norm.observe(x_BF)

        newest = torch.cat(changed[-10:])
        assert norm.mean.item() == pytest.approx(newest.mean().item(), rel=0.2)
        assert norm(newest).abs().max().item() < 5.0

    def test_a_feature_that_starts_to_vary_is_followed(self):
        """A constant feature has no deviation to clip by."""
        norm = RunningNorm((1,), horizon_rows=1000)
        for _ in range(50):
            norm.observe(torch.full((32, 1), 7.0))

        for seed in range(100):
            norm.observe(rows(32, 1, seed=seed))

        assert norm.mean.item() == pytest.approx(100.0, rel=0.1)

    def test_a_rare_value_of_a_sparse_feature_is_not_clipped(self):
        """One row in two hundred is 1: 14 deviations, and no outlier."""
        norm, x_N = RunningNorm((1,)), torch.zeros(6400, 1)
        x_N[::200] = 1.0

        for x_BF in x_N.split(32):
            norm.observe(x_BF)

        assert norm.mean.item() == pytest.approx(0.005, rel=0.1)
        assert norm.var.item() == pytest.approx(0.005 * 0.995, rel=0.1)

    @pytest.mark.parametrize("sentinel", [-999.0, -999_999.0, 1e9, 1e15, 3e38, float("inf")])
    @pytest.mark.parametrize("batch", [1, 2, 8, 64])
    @pytest.mark.parametrize("row", [0, 49])
    def test_one_sentinel_in_the_first_rows_does_not_become_the_deviation(self, sentinel, batch, row):
        """Whatever the size of the first micro-batches, one row each included."""
        norm, x_BF = RunningNorm((1,)), rows(1280, 1)
        x_BF[row] = sentinel

        deviations = []
        for part in x_BF.split(batch):
            norm.observe(part)
            deviations.append(norm.var.sqrt().item() / 3.0)

        assert 0.8 < deviations[640 // batch - 1] < 3.0
        assert 0.9 < deviations[-1] < 2.3
        assert norm.mean.item() == pytest.approx(100.0, abs=1.0)

    @pytest.mark.parametrize("batch", [1, 64])
    def test_a_twentieth_of_sentinels_does_not_compress_the_others(self, batch):
        """-999999 for a missing value."""
        norm, x_BF = RunningNorm((1,)), rows(6400, 1)
        x_BF[torch.rand(len(x_BF), generator=torch.Generator().manual_seed(5)) < 0.05] = -999_999.0

        for part in x_BF.split(batch):
            norm.observe(part)

        assert norm.var.sqrt().item() / 3.0 < 12.0
        assert norm(torch.tensor([[103.0]])).item() - norm(torch.tensor([[97.0]])).item() > 0.15

    @pytest.mark.parametrize("sentinel", [-999_999.0, 1e9, 1e15])
    @pytest.mark.parametrize("batch", [1, 32])
    def test_a_sentinel_in_a_constant_feature_is_forgotten_once_it_varies(self, sentinel, batch):
        """In less than half a horizon."""
        norm = RunningNorm((1,), horizon_rows=1000)
        x_BF = torch.cat((torch.full((1600, 1), 7.0), torch.tensor([[sentinel]]), rows(500, 1)))

        for part in x_BF.split(batch):
            norm.observe(part)

        assert norm.var.sqrt().item() < 200.0
        assert norm.mean.item() == pytest.approx(100.0, abs=150.0)

    @pytest.mark.parametrize("begin", [0, 3000])
    @pytest.mark.parametrize("share", [0.05, 0.01])
    def test_a_sparse_feature_has_the_deviation_of_all_its_rows(self, begin, share):
        """Most distances from its median are 0; the other values are not clipped."""
        norm = RunningNorm((1,), horizon_rows=4000)
        generator = torch.Generator().manual_seed(2)
        x_BF = (torch.rand((begin + 6400, 1), generator=generator) < share).to(torch.float32)
        x_BF[:begin] = 0.0

        for part in x_BF.split(32):
            norm.observe(part)

        assert norm.var.item() == pytest.approx(share * (1.0 - share), rel=0.5)

    def test_a_sensor_that_is_idle_at_times_keeps_one_deviation(self):
        """A quiet period shorter than the horizon must not magnify later values."""
        norm = RunningNorm((1,))
        active_N = torch.arange(20_000) // 1000 % 2 == 1
        x_BF = (rows(20_000, 1) - 100.0) * torch.where(active_N, 1.0, 0.001)[:, None]

        deviations = []
        for part in x_BF.split(64):
            norm.observe(part)
            deviations.append(norm.var.sqrt().item())

        assert min(deviations[200:]) > 1.0
        assert max(deviations[200:]) < 3.0

    def test_each_channel_of_images_is_bounded_by_its_own_sample(self):
        """Outliers in one channel do not change the statistics of the other."""
        norm, without = RunningNorm((2, 6, 6)), RunningNorm((2, 6, 6))
        x = rows(40, 2, 6, 6).to(memory_format=torch.channels_last)
        outlier = x.clone(memory_format=torch.preserve_format)
        outlier[3, 0] = 1e12

        for part, same in zip(outlier.split(8), x.split(8), strict=True):
            norm.observe(part)
            without.observe(same)

        assert norm.var.flatten()[0].sqrt().item() / 3.0 < 12.0
        torch.testing.assert_close(norm.var[1], without.var[1])
        torch.testing.assert_close(norm.mean[1], without.mean[1])

    def test_the_sample_does_not_depend_on_how_rows_are_batched(self):
        """A row is kept by its number; the kept rows are spread over the horizon."""
        x_BF = torch.arange(5000.0)[:, None]
        norms = [RunningNorm((1,), horizon_rows=2000) for _ in range(3)]

        for norm, batch in zip(norms, (1, 64, 777), strict=True):
            for part in x_BF.split(batch):
                norm.observe(part)

        kept = [norm.sample.tensors()["sample"].flatten().sort().values for norm in norms]
        assert torch.equal(kept[0], kept[1])
        assert torch.equal(kept[0], kept[2])
        assert 2900 < kept[0].min().item() < 3100
        assert kept[0].max().item() > 4900
        assert kept[0].diff().max().item() < 100

    def test_before_any_row_is_the_identity(self):
        """A server may load it before the first row."""
        x_BF = torch.tensor([[1.0, -2.0]])

        assert torch.equal(RunningNorm((2,))(x_BF), x_BF)

    def test_forward_changes_nothing(self):
        """Predicting is pure, in train mode too."""
        norm = RunningNorm((4,)).train()
        norm.observe(rows(9, 4))
        before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}

        norm(rows(5, 4, seed=2))

        assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())


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
