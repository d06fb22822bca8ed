"""What `init` makes of two topics: the ids that join them, classes, and fields that leak the label."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import orjson
import pytest

from streamlearn.records import Position, Record
from streamlearn.schema.infer import collect
from streamlearn.schema.infer_join import (
    Ids,
    Join,
    choose_label,
    id_candidates,
    joins,
    leaks,
    plain_label,
    rivals,
    unjoined,
)
from streamlearn.schema.profile import profile
from streamlearn.schema.reader import RecordReader
from streamlearn.schema.settings import LabelSource

READER = RecordReader(LabelSource(), None, table="labels")


def ids(parsed: Sequence[object], keys: Sequence[bytes | None] = (), headers: Sequence[bytes] = ()) -> Ids:
    records = [
        Record(
            Position("t", 0, n),
            0,
            keys[n] if keys else None,
            orjson.dumps(value),
            (("Event-Id", headers[n]),) if headers else (),
        )
        for n, value in enumerate(parsed)
    ]
    return id_candidates(READER, records, parsed, collect(parsed))


def chosen(samples: Ids, labels: Ids) -> Join:
    return joins(samples, labels)[0]


class TestIds:
    def test_candidates_are_fields_keys_and_headers(self) -> None:
        """Text and integers; numbers with a fraction, booleans and what is often missing are none."""
        found = ids(
            [{"id": n, "a": {"b": f"x{n}"}, "amount": 0.5, "ok": True, "rare": n or None} for n in range(2)],
            [b'{"k": 1}', b'{"k": 2}'],
            [b"h1", b"h2"],
        )

        assert found == {
            "id": ["0", "1"],
            "a.b": ["x0", "x1"],
            "key.k": ["1", "2"],
            "header:event-id": ["h1", "h2"],
        }

    def test_a_quoted_key_is_its_text(self) -> None:
        """As the reader has it."""
        assert ids([{}, {}], [b'"a"', b"b"]) == {"key": ["a", "b"]}

    def test_a_field_called_key_is_not_the_key(self) -> None:
        """[source] would read the record's key."""
        assert ids([{"key": "a"}]) == {}

    def test_the_field_whose_values_are_in_both_topics(self) -> None:
        """Though names differ, and most labels belong to samples that were not read."""
        samples = ids([{"tx": f"t{n}", "shop": f"s{n % 5}"} for n in range(100)])
        labels = ids([{"ref": f"t{n}", "shop": f"s{n % 5}", "case": f"c{n}"} for n in range(80, 180)])

        found = chosen(samples, labels)

        assert (found.samples, found.labels, found.joined, found.of) == ("tx", "ref", 20, 100)
        assert found.is_unique

    def test_a_customer_that_is_in_all_labels_is_no_id(self) -> None:
        """It repeats."""
        rng = random.Random(0)
        samples = ids([{"tx": f"t{n}"} for n in range(400)], [b"customer-%d" % rng.randrange(500) for _ in range(400)])
        labels = ids(
            [{"tx": f"t{n}"} for n in range(300, 700)], [b"customer-%d" % rng.randrange(500) for _ in range(400)]
        )

        assert chosen(samples, labels).samples == "tx"

    def test_counters_of_both_topics_are_no_ids_if_another_field_joins(self) -> None:
        """Integers without gaps always meet."""
        samples = ids([{"id": n, "tx": f"t{n}"} for n in range(100)])
        labels = ids([{"id": n, "tx": f"t{n * 3}"} for n in range(100)])

        assert chosen(samples, labels).samples == "tx"

    def test_counters_are_taken_with_a_doubt_otherwise(self) -> None:
        """They may be the ids."""
        found = chosen(ids([{"id": n} for n in range(100)]), ids([{"id": n} for n in range(50)]))

        assert (found.samples, found.is_dense) == ("id", True)

    @pytest.mark.parametrize("with_field", [True, False])
    def test_a_field_comes_before_the_key(self, with_field: bool) -> None:
        """Over HTTP there is no key."""
        fields = [{"tx": f"t{n}"} if with_field else {"v": 1} for n in range(50)]
        keys = [b"t%d" % n for n in range(50)]

        found = chosen(ids(fields, keys), ids([{"v": 1}] * 50, keys))

        assert (found.samples, found.labels) == ("tx" if with_field else "key", "key")

    def test_ids_that_repeat_are_taken_if_nothing_else_joins(self) -> None:
        """A topic of changes has each row several times."""
        samples = ids([{"id": f"t{n // 2}"} for n in range(100)])

        found = chosen(samples, ids([{"id": f"t{n}"} for n in range(50)]))

        assert (found.samples, found.is_unique) == ("id", False)
        assert (found.repeated_samples, found.repeated_labels) == (0.5, 0.0)

    def test_two_fields_that_fit_as_well_are_rivals(self) -> None:
        """A second id of the same row."""
        rows = [{"tx": f"t{n}", "order": f"o{n}"} for n in range(50)]
        found = joins(ids(rows), ids(rows))

        assert [(each.samples, each.labels) for each in rivals(found)] == [("order", "order")]

    def test_without_a_common_id_fields_of_equal_names_are_candidates(self) -> None:
        """If their values differ between records."""
        samples = ids([{"transactionId": f"t{n}", "shop": "a"} for n in range(50)])
        labels = ids([{"transaction_id": f"t{n}", "shop": "a"} for n in range(500, 550)])

        assert joins(samples, labels) == []
        assert unjoined(samples, labels) == [("transactionId", "transaction_id")]

    def test_nothing_joins_with_nothing(self) -> None:
        """An empty topic."""
        assert joins(ids([]), ids([{"id": 1}])) == []


def label(rows: Sequence[dict[str, Any]], left_out: Sequence[str] = (), fixed: str | None = None) -> Any:
    fields = collect(rows)
    return choose_label({path: profile(values) for path, values in fields.values.items()}, left_out, fixed=fixed)


class TestLabel:
    @pytest.mark.parametrize(
        ("name", "values", "classes", "mapping"),
        [
            ("is_fraud", [True, False, False], ("not_fraud", "fraud"), {"true": "fraud", "false": "not_fraud"}),
            ("fraud", [0, 1, 0], ("not_fraud", "fraud"), {"1": "fraud", "0": "not_fraud"}),
            ("isFraud", [0.0, 1.0], ("not_fraud", "fraud"), {"1": "fraud", "0": "not_fraud"}),
            ("is_fraud", ["True", "False"], ("not_fraud", "fraud"), {"True": "fraud", "False": "not_fraud"}),
            ("label", [True, False], ("false", "true"), {}),
            ("label", [0, 1, 1], ("0", "1"), {}),
            ("label", [7, 3, 10, 3], ("3", "7", "10"), {}),
            ("label", ["spam", "ham", "ham"], ("ham", "spam"), {}),
            ("label", ["a", "b", "b", None, None], ("b", "a"), {}),
        ],
    )
    def test_classes(self, name: str, values: list[Any], classes: tuple[str, ...], mapping: dict[str, str]) -> None:
        """False before true, numbers in order, names by frequency: a rare class is last. Null is no class."""
        found = label([{name: value} for value in values])

        assert (found.path, found.classes) == (name, classes)
        assert mapping.items() <= found.values.items()
        for value in values:
            assert found.class_of(value) in (*classes, None)

    def test_values_of_several_forms_are_one_class(self) -> None:
        """1 is true; but what a word means is the user's to say."""
        found = label([{"is_fraud": value} for value in (True, False, "chargeback", 1, True) * 3])

        assert found.classes == ("not_fraud", "fraud", "chargeback")
        assert [found.class_of(value) for value in (True, 1, False, "chargeback", None)] == [
            "fraud", "fraud", "not_fraud", "chargeback", None,
        ]  # fmt: skip
        assert "chargeback: a class of its own" in found.notes[0]

    def test_spellings_in_another_case_are_one_class(self) -> None:
        """The most frequent spelling is its name, and the file says so."""
        found = label([{"outcome": value} for value in ["kept"] * 9 + ["returned"] * 5 + ["KEPT", "Returned", "?"]])

        assert found.classes == ("kept", "returned", "?")
        assert found.values == {"KEPT": "kept", "Returned": "returned"}
        assert found.class_of("KEPT") == "kept"
        assert "KEPT as kept, Returned as returned" in found.notes[0]

    @pytest.mark.parametrize("text", ["?", "N/A", "unknown"])
    def test_a_class_that_may_be_a_missing_answer_is_said(self, text: str) -> None:
        """It may be a class: only the user knows."""
        found = label([{"outcome": value} for value in ["kept"] * 9 + ["returned"] * 5 + [text]])

        assert found.classes == ("kept", "returned", text)
        assert f"{text}: taken as a class" in found.notes[0]

    def test_a_word_that_is_the_name_of_the_class(self) -> None:
        """It means the same; classes differ."""
        found = label([{"is_fraud": value} for value in (True, False, "fraud", "fraud") * 5])

        assert found.classes == ("not_fraud", "fraud")
        assert found.class_of("fraud") == found.class_of(True) == "fraud"

    @pytest.mark.parametrize("values", [["²", "1"], ["--1", "1"], ["1", "x"]])
    def test_digits_that_are_no_numbers_are_names(self, values: list[str]) -> None:
        """They are in the order of their frequency."""
        assert set(label([{"label": value} for value in values]).classes) == set(values)

    @pytest.mark.parametrize(
        ("name", "value", "classes"),
        [("is_fraud", True, ("not_fraud", "fraud")), ("label", "chargeback", ("not_chargeback", "chargeback"))],
    )
    def test_one_class_alone_is_said(self, name: str, value: object, classes: tuple[str, ...]) -> None:
        """A topic of chargebacks has nothing else: the other class is implied."""
        found = label([{name: value}] * 30)

        assert found.classes == classes
        assert "labels.implied_class" in found.notes[0]

    def test_the_name_decides_between_fields(self) -> None:
        """Ids and times are no classes, and neither are measurements and remarks."""
        rows = [
            {"id": f"t{n}", "label": n % 3, "team": n % 2, "cost": n / 7, "note": f"the case {n} was closed late"}
            for n in range(60)
        ]
        found = label(rows, ["id"])

        assert (found.path, found.others) == ("label", ("team",))

    def test_equal_candidates_are_not_decided(self) -> None:
        """They are listed."""
        found = label([{"a": n % 2 == 0, "b": n % 3 == 0} for n in range(30)])

        assert (found.path, found.classes, found.others) == (None, (), ("a", "b"))

    def test_the_user_decides(self) -> None:
        """Whatever the scores."""
        assert label([{"a": n % 2, "label": n % 3} for n in range(30)], fixed="a").classes == ("not_a", "a")
        assert label([{"a": 1}], fixed="b").classes == ()

    def test_a_plain_class(self) -> None:
        """A record that is nothing else."""
        found = plain_label(profile(["spam", "ham", "ham"]))

        assert (found.path, found.classes) == (None, ("ham", "spam"))


CLASSES = ["fraud" if n % 4 == 0 else "ok" for n in range(60)]


class TestLeaks:
    @pytest.mark.parametrize(
        ("value", "how"),
        [
            (lambda n: "closed" if n % 4 == 0 else "open", "each value"),
            (lambda n: f"{'cb' if n % 4 == 0 else 'x'}-{n % 3}", "each value"),
            (lambda n: n if n % 4 == 0 else None, "whether it is there"),
            (lambda n: 100.5 + n if n % 4 == 0 else n / 7, "thresholds"),
        ],
    )
    def test_a_field_that_predicts_the_label_perfectly(self, value: Any, how: str) -> None:
        """By value, presence or threshold."""
        fields = collect([{"x": value(n)} for n in range(60)])

        assert how in leaks(fields, ["x"], CLASSES)["x"]

    @pytest.mark.parametrize(
        "value",
        [lambda n: n % 3, lambda n: f"t{n}", lambda n: n * 7919 % 61, lambda n: None if n % 5 else 1, lambda _: 3],
    )
    def test_other_fields_do_not(self, value: Any) -> None:
        """An id of each row neither."""
        fields = collect([{"x": value(n)} for n in range(60)])

        assert leaks(fields, ["x"], CLASSES) == {}

    def test_few_labels_show_nothing(self) -> None:
        """Chance is perfect too."""
        fields = collect([{"x": n % 4 == 0} for n in range(60)])

        assert leaks(fields, ["x"], [*CLASSES[:19], *[None] * 41]) == {}
        assert leaks(fields, ["x"], ["ok"] * 60) == {}
