"""The network for rows with columns, and how a learner continues when a column is added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from streamlearn.errors import CheckpointError, ConfigError
from streamlearn.learn.learner import Learner
from streamlearn.models.build import ModelSpec, build
from streamlearn.models.table import TableNetwork
from streamlearn.records import Column, MicroBatch
from tests.tables import COLUMNS, rows, table_spec, width_of
from tests.unit.test_learner import differing, settings

FEWER = COLUMNS[:3]
CODES = {1: 50, 10: 7}
"""Places of codes in a row of `COLUMNS`, and their buckets."""


def batch(columns: Sequence[Column], step: int) -> MicroBatch:
    """Eight fresh rows and four labelled ones; the first columns are the same whichever follow."""
    x = rows(columns, 12, seed=step)
    return MicroBatch(x[:8], 8, x[8:], (x[8:, 0] > 100.0).astype(np.int64), 4, ["new"])


def after(columns: Sequence[Column], steps: range, learner: Learner | None = None, **changed: Any) -> Learner:
    learner = learner or Learner(table_spec(columns), settings(**changed))
    for step in steps:
        learner.learn(batch(columns, step))
    return learner


class TestNetwork:
    def test_puts_embeddings_in_place_of_codes(self):
        """In the order of the columns; the other places pass."""
        net = build(table_spec(COLUMNS)).net
        assert isinstance(net, TableNetwork)
        x = torch.from_numpy(rows(COLUMNS, 20))

        embedded = net.embed(x)

        shop, country = net.embeddings["1"].weight, net.embeddings["5"].weight
        assert (shop.shape, country.shape) == ((51, 4), (8, 8))
        expected = (x[:, :2], shop[x[:, 2].long()], x[:, 3:14], country[x[:, 14].long()], x[:, 15:])
        assert torch.equal(embedded, torch.cat(expected, dim=1))

    @pytest.mark.parametrize(("code", "bucket"), [(-3.0, 0), (51.0, 50), (1e9, 50), (float("nan"), 0), (2.0, 2)])
    def test_has_a_bucket_for_every_number(self, code, bucket):
        """No value of a row makes an index out of range."""
        net = build(table_spec(COLUMNS)).net
        x = torch.zeros((2, width_of(COLUMNS)))
        x[0, 2], x[1, 2] = code, bucket

        assert torch.equal(net(x)[0], net(x)[1])

    def test_learns_only_the_embeddings_of_the_categories_that_occur(self):
        """Their gradient is that of finite differences; all others get none."""
        net = build(table_spec(COLUMNS)).net.double()
        x = torch.from_numpy(rows(COLUMNS, 6, missing=0.0)).double() / 100.0
        x[:, 2], x[:, 14] = torch.tensor([3.0, 3.0, 9.0, 0.0, 50.0, 9.0]), 1.0
        weight, used = net.embeddings["1"].weight, [0, 3, 9, 50]

        def loss(rows_of_used: torch.Tensor) -> torch.Tensor:
            embeddings = {"embeddings.1.weight": weight.detach().index_copy(0, torch.tensor(used), rows_of_used)}
            return torch.func.functional_call(net, embeddings, (x,)).square().sum()

        net(x).square().sum().backward()

        assert torch.autograd.gradcheck(loss, weight.detach()[used].clone().requires_grad_(True))
        assert torch.nonzero(weight.grad.abs().sum(dim=1)).flatten().tolist() == used

    def test_of_mlps_options_has_its_layers(self):
        """Widths, dropout and norm."""
        net = build(table_spec(COLUMNS, hidden=[8, 4], dropout=0.5, norm="layer")).net

        kinds = [type(layer).__name__ for layer in net.mlp.layers]
        assert kinds == ["Flatten", *["Linear", "LayerNorm", "ReLU", "Dropout"] * 2, "Linear"]

    @pytest.mark.parametrize(
        ("spec", "said"),
        [
            (ModelSpec("table", {}, (4,), 2, normalise=True, scale=1.0), "needs columns"),
            (replace(table_spec(COLUMNS), factory="mlp"), "mlp would take the codes of categories as numbers"),
            (replace(table_spec(COLUMNS), scale=0.5), r"schema\.scale: expected 1 with \[columns\]"),
            (table_spec(COLUMNS, depth=3), "depth"),
        ],
    )
    def test_that_does_not_fit_is_a_config_error(self, spec, said):
        """With the setting, and what to set."""
        with pytest.raises(ConfigError, match=said):
            build(spec)

    def test_mlp_takes_columns_without_categories(self):
        """All its inputs are numbers."""
        columns = (COLUMNS[0], COLUMNS[2])

        assert torch.isfinite(build(replace(table_spec(columns), factory="mlp"))(torch.zeros((2, 3)))).all()

    def test_spec_goes_through_json(self):
        """With its columns; one without columns has the JSON of earlier versions."""
        spec = table_spec(COLUMNS)

        assert ModelSpec.from_json(spec.to_json()) == spec
        assert "columns" not in ModelSpec("mlp", {}, (4,), 2, normalise=True, scale=1.0).to_json()

    @pytest.mark.parametrize("columns", ['"a"', "[1]", '[{"name": "a"}]', '[{"name": "a", "kind": "number", "is": 1}]'])
    def test_spec_with_other_columns_is_a_checkpoint_error(self, columns):
        """A foreign publication."""
        with pytest.raises(CheckpointError, match="model spec"):
            ModelSpec.from_json(table_spec(COLUMNS).to_json().replace('"columns": [', f'"columns": {columns}, "": ['))

    def test_without_input_statistics_codes_are_not_clipped(self):
        """The bound of other inputs is smaller than the largest bucket."""
        columns = (Column("a", "category", 1 << 20, 1), Column("n", "number"))
        classifier = build(replace(table_spec(columns), normalise=False))
        x = torch.tensor([[float(1 << 20), 1e9, 1.0], [float(1 << 20) - 1, 1e9, 1.0]])

        assert classifier.prepare(x)[:, 0].tolist() == [1 << 20, (1 << 20) - 1]
        assert not torch.equal(classifier.net.embed(classifier.prepare(x))[0], classifier.net.embed(x)[1])


class TestLearner:
    @pytest.mark.parametrize(
        "changed",
        [
            {},
            {"feature_dropout": 0.3},
            {"method": "pi"},
            {"method": "supervised", "optimizer": "sgd"},
            {"method": "temporal_ensembling"},
            {"method": "ict", "mixup_beta": 0.5},
        ],
    )
    def test_restart_equals_no_restart(self, changed):
        """I3, with columns of every kind."""

        def learn(learner: Learner, first: int, last: int) -> Learner:
            for step in range(first, last):
                given = batch(COLUMNS, step)
                given.keys = np.arange(12) % 5 if learner.wants_keys else None
                learner.learn(given)
            return learner

        of, spec = settings(**changed), table_spec(COLUMNS)
        whole = learn(Learner(spec, of), 1, 31)
        half = learn(Learner(spec, of), 1, 15).state()
        resumed = Learner(spec, of)
        resumed.load_state(half)

        assert differing(whole.state(), learn(resumed, 15, 31).state()) == []


class TestAddedColumns:
    @pytest.mark.parametrize(
        ("changed", "spare"),
        [
            ({"twin": "measure"}, None),
            ({"twin": "measure"}, 1),
            ({"optimizer": "sgd"}, None),
            ({"method": "supervised"}, None),
            ({}, None),
            ({"method": "temporal_ensembling"}, None),
            ({"contrast_weight": 0.3}, None),
        ],
    )
    def test_change_no_answer_and_the_learner_continues(self, changed, spare):
        """Student, teacher, twin, optimizer, statistics, tables of the method and kept teachers are those before."""

        def learn(learner: Learner, columns: Sequence[Column], steps: range) -> None:
            for step in steps:
                given = batch(columns, step)
                given.keys = np.arange(12) % 5 if learner.wants_keys else None
                learner.learn(given)

        of = settings(**changed)
        old = Learner(replace(table_spec(FEWER), spare=spare), of)
        learn(old, FEWER, range(1, 20))
        old.keep_good()
        learn(old, FEWER, range(20, 30))
        old.keep_good()
        new = Learner(replace(table_spec(COLUMNS), spare=spare), of)
        x = rows(COLUMNS, 50, seed=99)

        new.load_state(old.state())

        before, now = old.predict(x[:, : width_of(FEWER)]), new.predict(x)
        np.testing.assert_allclose(now.teacher_probs_BC, before.teacher_probs_BC, rtol=0, atol=1e-6)
        np.testing.assert_allclose(now.student_probs_BC, before.student_probs_BC, rtol=0, atol=1e-6)
        assert np.array_equal(new.classify(x).candidates_KB, old.classify(x[:, : width_of(FEWER)]).candidates_KB)
        kept = [name for name in old.state() if name.startswith("good.")]
        saved, given = new.state(), old.state()
        assert all(name in saved for name in given)
        assert len(kept) > 0
        for name, array in given.items():
            same = saved[name][tuple(slice(size) for size in array.shape)]
            assert np.array_equal(same, array), name

        learn(new, COLUMNS, range(30, 60))
        moved = new.predict(x).teacher_probs_BC
        assert new.step == 59
        assert new.read_costs().skipped_steps == 0
        assert np.abs(moved - now.teacher_probs_BC).max() > 1e-3
        weights = new.state()["student.net.net.mlp.layers.1.weight" if spare else "student.net.mlp.layers.1.weight"]
        assert np.abs(weights[:, -4:]).max() > 0, "the added inputs are learned"

        assert new.roll_back()
        assert np.isfinite(new.predict(x).teacher_probs_BC).all()

    def test_have_embeddings_from_the_seed(self):
        """The same in student, teacher, twin and kept teachers, and in every start."""
        old = after(FEWER, range(1, 10), twin="measure")
        old.keep_good()
        states = []
        for _ in range(2):
            new = Learner(table_spec(COLUMNS), settings(twin="measure"))
            new.load_state(old.state())
            states.append(new.state())

        assert differing(*states) == []
        names = [name for name in states[0] if name.endswith("embeddings.5.weight") and "optimizer" not in name]
        assert len(names) == 5
        built = build(table_spec(COLUMNS), seed=7).net.embeddings["5"].weight.detach().numpy()
        assert all(np.array_equal(states[0][name], built) for name in names)

    def test_start_their_own_statistics(self):
        """The others keep theirs."""
        new = Learner(table_spec(COLUMNS), settings())
        new.load_state(after(FEWER, range(1, 30)).state())
        before = new.state()["inputs.rows"]
        assert before[0] > 0
        assert before[3] == 0

        after(COLUMNS, range(30, 40), new)

        rows = new.state()["inputs.rows"]
        assert before[0] < rows[0]
        assert 0 < rows[3] < rows[0]

    @pytest.mark.parametrize(
        "columns",
        [COLUMNS[:2], (replace(COLUMNS[1], size=60), *FEWER[1:]), (FEWER[0], replace(FEWER[1], embedding=5), FEWER[2])],
        ids=["removed", "another kind", "another size"],
    )
    def test_are_all_that_may_change(self, columns):
        """Nothing is changed by an attempt to load other columns."""
        learner = Learner(table_spec(columns), settings())
        before = learner.state()

        with pytest.raises(CheckpointError, match="learner state does not fit"):
            learner.load_state(after(FEWER, range(1, 5)).state())

        assert differing(before, learner.state()) == []


def test_an_informative_category_of_5000_values_helps():
    """Accuracy before learning, in the last quarter of 20,000 rows: .84 with the category, .68 without."""
    values, count, rng = 5000, 20_000, np.random.default_rng(0)
    effect, bucket = rng.normal(size=values) * 1.5, rng.integers(1, 8193, values)
    frequency = 1.0 / (np.arange(values) + 50.0)
    value, number = rng.choice(values, count, p=frequency / frequency.sum()), rng.normal(size=count)
    y = (effect[value] + number + 0.3 * rng.normal(size=count) > 0.0).astype(np.int64)
    x = np.stack((number * 30.0 + 100.0, np.ones(count), bucket[value]), axis=1).astype(np.float32)
    columns = (Column("amount", "number"), Column("shop", "category", 8192, 8))

    def accuracy(columns: Sequence[Column]) -> float:
        learner = Learner(table_spec(columns, 2, hidden=[32]), settings(twin="off"))
        right = []
        for at in range(0, count, 64):
            rows, labels = x[at : at + 64, : width_of(columns)], y[at : at + 64]
            right.append(learner.predict(rows).teacher_probs_BC.argmax(axis=1) == labels)
            learner.learn(MicroBatch(rows, len(rows), rows, labels, len(rows)))
        return float(np.concatenate(right)[-count // 4 :].mean())

    assert accuracy(columns) > 0.79
    assert accuracy(columns[:1]) < 0.72
