"""`read_records`: every format gives the same records, and no file gives anything but records and sentences."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tracemalloc
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from streamlearn.errors import ConfigError, RecordError
from streamlearn.schema.files import BATCH_ROWS, SUFFIXES, FileRecord, read_records

MAX_BYTES = 10_000


def read(path: Path | str) -> list[FileRecord]:
    return list(read_records(path, max_bytes=MAX_BYTES))


def file_of(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def shown(records: list[FileRecord]) -> list[tuple[int, Any]]:
    """Fields, or the reason of an error."""
    return [(line, found.reason if isinstance(found, RecordError) else found) for line, found in records]


class TestCsv:
    def test_values_are_text_and_an_empty_field_is_missing(self, tmp_path: Path) -> None:
        """Quotes, commas and line breaks inside a value are part of it; a line is where a record starts."""
        path = file_of(tmp_path, "a.csv", '\ufeffid,amount,note\n1,12.5,"a, ""b""\nc"\n\n2,,x\n')

        assert shown(read(path)) == [
            (2, {"id": "1", "amount": "12.5", "note": 'a, "b"\nc'}),
            (5, {"id": "2", "amount": None, "note": "x"}),
        ]

    @pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ";"), ("a.csv", "\t"), ("a.CSV", "|"), ("a.tsv", "\t")])
    def test_the_delimiter_is_that_of_the_header(self, tmp_path: Path, name: str, delimiter: str) -> None:
        """Spreadsheets of many countries write semicolons."""
        path = file_of(tmp_path, name, "a,b;c\r\n1;2,5\r\n".replace(";", delimiter).replace("a,b", "ab"))

        assert shown(read(path)) == [(2, {"ab": "1", "c": "2,5"})]

    def test_an_index_without_a_name_is_left_out(self, tmp_path: Path) -> None:
        """As pandas writes it."""
        assert shown(read(file_of(tmp_path, "a.csv", ",a\n0,x\n"))) == [(2, {"a": "x"})]

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("1,2,3", "bad_shape"),
            ("1", "bad_shape"),
            ('"1"x,2', "bad_dtype"),
            (b"\xff,2", "bad_dtype"),
            ("x" * (MAX_BYTES + 1) + ",2", "too_large"),
            ("1," * MAX_BYTES, "too_large"),
        ],
    )
    def test_a_bad_record_costs_only_itself(self, tmp_path: Path, line: str | bytes, reason: str) -> None:
        """It is reported with its line."""
        line = line.encode() if isinstance(line, str) else line
        path = file_of(tmp_path, "a.csv", b"a,b\n1,2\n" + line + b"\n3,4\n")

        assert shown(read(path)) == [(2, {"a": "1", "b": "2"}), (3, reason), (4, {"a": "3", "b": "4"})]

    def test_a_quote_that_is_not_closed_takes_at_most_the_bytes_of_a_record(self, tmp_path: Path) -> None:
        """Reading goes on after them, and the error names the probable reason."""
        path = file_of(tmp_path, "a.csv", 'a,b\n"1,2\n' + "3,4\n" * MAX_BYTES)

        (line, error), *others = read(path)

        assert line == 2
        assert "is a quote not closed?" in str(error)
        assert MAX_BYTES // 2 < len(others) < MAX_BYTES
        assert others[-1].fields == {"a": "3", "b": "4"}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "expected the names of the fields"),
            (",,\n", "expected the names of the fields"),
            ("a,b,a\n", "'a' twice"),
            ("a,b\n".encode("utf-16"), "UTF-8"),
            ("a" * (MAX_BYTES + 1), "at most"),
            ('"a"b,c\n', "names of the fields"),
        ],
    )
    def test_a_header_that_cannot_be_used_is_a_sentence(
        self, tmp_path: Path, content: bytes | str, message: str
    ) -> None:
        """With the file."""
        with pytest.raises(ConfigError, match=message):
            read(file_of(tmp_path, "a.csv", content))


class TestJsonLines:
    def test_each_line_is_a_record(self, tmp_path: Path) -> None:
        """Empty lines are not."""
        path = file_of(tmp_path, "a.jsonl", '\ufeff{"a": 1}\n\n  {"a": {"b": [true, null]}}')

        assert shown(read(path)) == [(1, {"a": 1}), (3, {"a": {"b": [True, None]}})]

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"{", "not_json"),
            (b"[1]", "not_json"),
            (b'{"a": NaN', "not_json"),
            (b'"\xff"', "not_json"),
            (b"[" * 5000, "not_json"),
            (b" " * (MAX_BYTES + 1), "too_large"),
        ],
    )
    def test_a_bad_line_costs_only_itself(self, tmp_path: Path, line: bytes, reason: str) -> None:
        """It is reported with its number."""
        path = file_of(tmp_path, "a.ndjson", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')

        assert shown(read(path)) == [(1, {"a": 1}), (2, reason), (3, {"a": 2})]

    def test_a_dash_is_standard_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As JSON lines."""
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"a": 1}\n')))

        assert shown(read("-")) == [(1, {"a": 1})]


class TestParquet:
    def test_values_have_their_types(self, tmp_path: Path) -> None:
        """Nested ones too; nanoseconds become microseconds."""
        moment = datetime(2026, 1, 2, 3, 4, 5, 678, UTC)
        rows = [{"a": 1, "b": None, "c": [1.5, 2.0], "d": {"e": "x"}, "t": moment}]
        table = pa.Table.from_pylist(rows)
        nanoseconds = pa.array([moment], pa.timestamp("us", "UTC")).cast(pa.timestamp("ns", "UTC"))
        parquet.write_table(table.append_column("n", nanoseconds), tmp_path / "a.parquet")

        assert shown(read(tmp_path / "a.parquet")) == [(1, {**rows[0], "n": moment})]

    def test_all_batches_are_read(self, tmp_path: Path) -> None:
        """Of all row groups."""
        count = 2 * BATCH_ROWS + 5
        parquet.write_table(pa.table({"a": range(count)}), tmp_path / "a.parquet", row_group_size=BATCH_ROWS + 1)

        assert shown(read(tmp_path / "a.parquet")) == [(n + 1, {"a": n}) for n in range(count)]

    def test_a_date_that_python_cannot_hold_costs_only_its_row(self, tmp_path: Path) -> None:
        """The year 31690."""
        parquet.write_table(pa.table({"t": pa.array([0, 2**49 * 1000, 1], pa.timestamp("us"))}), tmp_path / "a.parquet")

        assert [(line, isinstance(found, RecordError)) for line, found in read(tmp_path / "a.parquet")] == [
            (1, False), (2, True), (3, False),
        ]  # fmt: skip

    def test_without_pyarrow_the_extra_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is large, so it is optional."""
        parquet.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
        monkeypatch.setitem(sys.modules, "pyarrow", None)

        with pytest.raises(ConfigError, match=r"streamlearn\[parquet\]"):
            read(tmp_path / "a.parquet")

    def test_a_damaged_file_is_a_sentence_with_the_row(self, tmp_path: Path) -> None:
        """Rows before the damage have been read."""
        path = tmp_path / "a.parquet"
        table = pa.table({"a": np.random.default_rng(0).normal(size=4 * BATCH_ROWS)})
        parquet.write_table(table, path, row_group_size=BATCH_ROWS, compression="snappy", use_dictionary=False)
        content = bytearray(path.read_bytes())
        content[2 * 8 * BATCH_ROWS : 3 * 8 * BATCH_ROWS] = bytes(8 * BATCH_ROWS)
        path.write_bytes(content)

        with pytest.raises(ConfigError, match=r"cannot be read as Parquet after row \d+: "):
            read(path)


class TestNpz:
    def test_a_row_is_a_record(self, tmp_path: Path) -> None:
        """With its id, if there are ids."""
        np.savez(tmp_path / "a.npz", x=np.arange(6, dtype=np.uint8).reshape(3, 2), id=np.array(["a", "b", "c"]))
        np.savez_compressed(tmp_path / "b.npz", x=np.float32([[0.5]]), y=np.array([0]))

        expected = [(n + 1, {"x": [2 * n, 2 * n + 1], "id": "abc"[n]}) for n in range(3)]
        assert shown(read(tmp_path / "a.npz")) == expected
        assert shown(read(tmp_path / "b.npz")) == [(1, {"x": [0.5]})]

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"y": np.zeros(3)}, "no array x"),
            ({"x": np.zeros((3, 2)), "id": np.arange(4)}, "x has 3 rows, id 4"),
            ({"x": np.zeros((2, MAX_BYTES))}, "rows of at most"),
            ({"x": np.array(["a"])}, "expected x as rows"),
            ({"x": np.float64(1.0)}, "expected x as rows"),
            ({"x": np.zeros((3, 0))}, "expected x as rows"),
            ({"x": np.asfortranarray(np.zeros((3, 2)))}, "Fortran order"),
            ({"x": np.array([object()])}, "expected x as rows"),
        ],
    )
    def test_other_arrays_are_refused_with_the_reason(
        self, tmp_path: Path, arrays: dict[str, Any], message: str
    ) -> None:
        """Objects would be unpickled, so they are never read."""
        np.savez(tmp_path / "a.npz", **arrays)

        with pytest.raises(ConfigError, match=message):
            read(tmp_path / "a.npz")

    def test_a_header_that_promises_more_than_there_is_costs_nothing(self, tmp_path: Path) -> None:
        """Nor does one with negative sizes."""
        for shape in ((1 << 60, 4), (-1, 4), (4, -1)):
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
            with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
                archive.writestr("x.npy", head.getvalue() + bytes(32))

            with pytest.raises(ConfigError, match=r"cannot be read as \.npz"):
                read(tmp_path / "a.npz")


class TestAnyFile:
    @pytest.mark.parametrize("name", ["a.txt", "a", "a.json", "a.csv.gz"])
    def test_an_unknown_suffix_is_refused_with_those_that_are_known(self, tmp_path: Path, name: str) -> None:
        """The format is never guessed."""
        with pytest.raises(ConfigError, match=r"ends in \.csv, \.tsv, \.jsonl"):
            read(file_of(tmp_path, name, "a\n1\n"))

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_a_file_that_is_missing_or_a_folder_is_a_sentence(self, tmp_path: Path, suffix: str) -> None:
        """With the reason of the system."""
        (tmp_path / f"folder{suffix}").mkdir()

        with pytest.raises(ConfigError, match="No such file"):
            read(tmp_path / f"missing{suffix}")
        with pytest.raises(ConfigError, match="Is a directory"):
            read(tmp_path / f"folder{suffix}")

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @given(content=st.binary(max_size=300))
    def test_any_bytes_give_records_or_a_sentence(
        self, tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes
    ) -> None:
        """Nothing else is raised."""
        path = file_of(tmp_path_factory.mktemp("any"), f"a{suffix}", content)

        try:
            found = read(path)
        except ConfigError:
            return
        assert all(isinstance(fields, dict | RecordError) for _, fields in found)

    @pytest.mark.parametrize("suffix", [".parquet", ".npz"])
    def test_a_file_with_any_byte_changed_gives_records_or_a_sentence(self, tmp_path: Path, suffix: str) -> None:
        """Among them those of headers and sizes."""
        path, rng = tmp_path / f"a{suffix}", np.random.default_rng(0)
        if suffix == ".npz":
            np.savez_compressed(path, x=rng.normal(size=(20, 3)), id=np.arange(20))
        else:
            parquet.write_table(pa.table({"a": [str(n) for n in range(50)], "b": rng.normal(size=50)}), path)
        whole = path.read_bytes()

        for at in rng.integers(0, len(whole), 300).tolist():
            path.write_bytes(whole[:at] + bytes([rng.integers(256)]) + whole[at + 1 :])
            with contextlib.suppress(ConfigError):
                read(path)

    @pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".npz"])
    def test_memory_does_not_grow_with_the_file(self, tmp_path: Path, suffix: str) -> None:
        """The file has 20 MB, most of it in one line where there are lines."""
        path, row = tmp_path / f"a{suffix}", json.dumps({"a": "x" * 1000})
        if suffix == ".npz":
            np.savez(path, x=np.zeros((20_000, 250), np.float32))
        else:
            text = "a\nb\n" if suffix == ".csv" else f"{row}\n" * 1000
            path.write_text(text + "x" * 19_000_000 + "\n" + text)

        tracemalloc.start()
        count = sum(1 for _ in read_records(path, max_bytes=MAX_BYTES))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

        assert count >= 3
        assert peak < (40 << 20 if suffix == ".npz" else 1 << 20)
