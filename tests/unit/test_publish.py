"""Published teachers: files and pointer replaced as a whole (I5), a bounded history, and the pinned version."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from harness.fakes import FaultyFiles, ManualClock
from safetensors.numpy import load_file, save

from streamlearn.errors import StateError
from streamlearn.state.publish import (
    DIGEST,
    PIN,
    POINTER,
    PublishedDir,
    Publisher,
    learned_offsets_of,
    listing,
    load_arrays,
    pin,
    spread,
    teacher_path,
    unpin,
)


def arrays(step: int) -> dict[str, np.ndarray]:
    return {"net.w": np.full(5, step, np.float32)}


def publisher(folder: Path, **more: object) -> Publisher:
    return Publisher(folder, keep=2, keep_history=0, clock=lambda: 1234.5, **more)  # type: ignore[arg-type]


def test_servers_see_the_newest_with_its_header(tmp_path: Path) -> None:
    """Step, time and metadata are in the file of the weights."""
    seen = PublishedDir(tmp_path)
    assert seen.newest() is None

    publisher(tmp_path).publish(3, arrays(3), {"model_spec": "{}"})
    model = seen.newest()

    assert model is not None
    assert (model.step, model.published_at_s, model.metadata["model_spec"]) == (3, 1234.5, "{}")
    assert np.array_equal(load_arrays(model)["net.w"], arrays(3)["net.w"])


def test_the_oldest_are_removed(tmp_path: Path) -> None:
    """At most `keep` teachers stay on disk (I6)."""
    writes = publisher(tmp_path)

    for step in range(1, 6):
        writes.publish(step, arrays(step), {})

    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "teacher-000000000004.safetensors",
        "teacher-000000000005.safetensors",
    ]


@pytest.mark.parametrize("lasting", [False, True])
def test_any_single_fault_leaves_the_pointer_on_a_valid_teacher(tmp_path: Path, *, lasting: bool) -> None:
    """Whichever operation fails, the pointer names the old teacher or the new one, and that can be loaded."""
    for fail_at in itertools.count(1):
        publisher(tmp_path).publish(1, arrays(1), {})
        try:
            files = FaultyFiles(fail_at=fail_at, lasting=lasting)
            publisher(tmp_path, files=files).publish(2, arrays(2), {})
        except OSError:
            model = PublishedDir(tmp_path).newest()
            assert model is not None
            assert np.array_equal(load_arrays(model)["net.w"], arrays(model.step)["net.w"])
        else:
            break

    assert fail_at == 11, "two writes of five operations each, then a clean run"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"step": "x"}', b"\xff"])
def test_a_pointer_that_cannot_be_read_is_an_error(tmp_path: Path, content: bytes) -> None:
    """A server then keeps its teacher, and logs the error."""
    (tmp_path / POINTER).write_bytes(content)

    with pytest.raises(StateError, match="pointer"):
        PublishedDir(tmp_path).newest()


def test_a_failing_read_is_a_state_error(tmp_path: Path) -> None:
    """Servers handle it by keeping their teacher."""
    pointer, newest = tmp_path / POINTER, PublishedDir(tmp_path)
    published = publisher(tmp_path).publish(1, arrays(1), {})
    pointer.rename(tmp_path / "away")
    pointer.mkdir()  # EISDIR in place of EIO, ESTALE and EMFILE

    with pytest.raises(StateError, match="cannot read"):
        newest.newest()

    pointer.rmdir()
    (tmp_path / "away").rename(pointer)
    assert newest.newest() == published


def test_the_pointer_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    """Only the last part of a path is used."""
    header = '{"step": "1", "published_at_s": "1"}'
    (tmp_path / POINTER).write_text(f'{{"file": "../../etc/passwd", "metadata": {header}}}')

    model = PublishedDir(tmp_path).newest()

    assert model is not None
    assert model.path == tmp_path / "passwd"


def test_a_truncated_teacher_is_an_error(tmp_path: Path) -> None:
    """The message has the file."""
    model = publisher(tmp_path).publish(1, arrays(1), {})
    model.path.write_bytes(model.path.read_bytes()[:-3])

    with pytest.raises(StateError, match="torn"):
        load_arrays(model)

    model.path.unlink()
    with pytest.raises(StateError, match="cannot be read as a published teacher"):
        load_arrays(model)


class TestDigest:
    def test_finds_any_flipped_bit_of_a_teacher(self, tmp_path: Path) -> None:
        """Whether the model comes from the pointer or the file: each bit of header, names and weights."""
        newest = publisher(tmp_path).publish(1, arrays(1), {"classes": '["a", "b"]'})
        whole, key = newest.path.read_bytes(), newest.path.read_bytes().index(f'"{DIGEST}":'.encode())
        for at in range(len(whole)):
            flipped = bytearray(whole)
            flipped[at] ^= 1
            newest.path.write_bytes(flipped)
            with pytest.raises(StateError):
                load_arrays(newest)
            if key <= at < key + len(DIGEST) + 3:
                continue  # under another key it is no digest; the rest of the file is valid
            with pytest.raises(StateError):
                pin(tmp_path, 1)
        newest.path.write_bytes(whole)

        assert np.array_equal(load_arrays(newest)["net.w"], arrays(1)["net.w"])

    def test_finds_any_flipped_bit_of_the_pointer(self, tmp_path: Path) -> None:
        """It is refused, unless the flip changes nothing."""
        published = publisher(tmp_path).publish(1, arrays(1), {"classes": '["a", "b"]'})
        pointer = tmp_path / POINTER
        whole = pointer.read_bytes()
        for at in range(len(whole)):
            flipped = bytearray(whole)
            flipped[at] ^= 1
            pointer.write_bytes(flipped)
            try:
                model = PublishedDir(tmp_path).newest()
                assert model is not None
                load_arrays(model)
            except StateError:
                continue
            assert model == published or DIGEST not in model.metadata

    def test_finds_another_teacher_under_the_same_name(self, tmp_path: Path) -> None:
        """After a restore a step may be published again while a server loads it."""
        named = publisher(tmp_path).publish(1, arrays(1), {})
        publisher(tmp_path).publish(1, arrays(2), {})

        with pytest.raises(StateError, match="another teacher"):
            load_arrays(named)

    def test_is_not_required(self, tmp_path: Path) -> None:
        """Early versions published teachers without one."""
        header = {"step": "1", "published_at_s": "1234.5", "epoch": "0"}
        path = teacher_path(tmp_path, 1)
        path.write_bytes(save(arrays(1), metadata=header))
        (tmp_path / POINTER).write_text(json.dumps({"file": path.name, "metadata": header}))

        model = PublishedDir(tmp_path).newest()

        assert model is not None
        assert np.array_equal(load_arrays(model)["net.w"], arrays(1)["net.w"])
        assert pin(tmp_path, 1).step == 1

    def test_keeps_the_safetensors_format(self, tmp_path: Path) -> None:
        """Even if a value of the header looks like a digest."""
        looks = '"sha256":"' + "0" * 64
        model = publisher(tmp_path).publish(1, {"sha256": arrays(1)["net.w"]}, {"classes": looks, "sha256x": looks})

        assert np.array_equal(load_file(model.path)["sha256"], arrays(1)["net.w"])
        assert np.array_equal(load_arrays(model)["sha256"], arrays(1)["net.w"])


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("teacher-")) for path in folder.glob("teacher-*"))


class TestHistory:
    def test_is_kept_in_addition_to_the_newest(self, tmp_path: Path) -> None:
        """Of 60 versions a minute apart: the last three, and four more that reach back to the first (I6)."""
        clock = ManualClock(1000.0)
        writes = Publisher(tmp_path, keep=3, keep_history=4, clock=clock)

        for step in range(1, 61):
            writes.publish(step, arrays(step), {})
            assert len(steps_in(tmp_path)) <= 3 + 4
            clock.advance(60.0)

        assert steps_in(tmp_path)[0] == 1
        assert steps_in(tmp_path)[-3:] == [58, 59, 60]
        assert len(steps_in(tmp_path)) == 7

    @pytest.mark.parametrize("keep_history", [0, 2, 9])
    def test_removes_nothing_before_it_is_full(self, tmp_path: Path, keep_history: int) -> None:
        """For any two bounds."""
        clock = ManualClock(1000.0)
        writes = Publisher(tmp_path, keep=5, keep_history=keep_history, clock=clock)

        for step in range(1, 6 + keep_history):
            writes.publish(step, arrays(step), {})
            clock.advance(1.0)

            assert steps_in(tmp_path) == list(range(1, step + 1))

    def test_is_by_time_and_not_by_step(self, tmp_path: Path) -> None:
        """After a restore, older versions have larger steps."""
        clock = ManualClock(1000.0)
        writes = Publisher(tmp_path, keep=2, keep_history=0, clock=clock)
        for step in (100, 101, 50, 51):
            writes.publish(step, arrays(step), {})
            clock.advance(1.0)

        assert steps_in(tmp_path) == [50, 51]

    def test_does_not_keep_torn_files(self, tmp_path: Path) -> None:
        """One would take the place of a valid version."""
        publisher(tmp_path).publish(1, arrays(1), {}).path.write_bytes(b"torn")

        publisher(tmp_path).publish(2, arrays(2), {})

        assert steps_in(tmp_path) == [2]

    @pytest.mark.parametrize("published", [500, 5000])
    def test_has_a_version_at_every_distance(self, published: int) -> None:
        """The ratio of two neighbours is at most about twice that of an even spread."""
        at_s: list[float] = []
        for now_s in range(published):
            ages_s = [now_s - time_s for time_s in reversed(at_s)]
            at_s = [at_s[len(at_s) - 1 - index] for index in reversed(spread(ages_s, keep=10, after_s=1.0))] + [now_s]

        ages_s = [max(1.0, published - time_s) for time_s in reversed(at_s)]
        ratios = [older / younger for younger, older in itertools.pairwise(ages_s)]

        assert ages_s[-1] == published, "the first is still there"
        assert max(ratios) < 2.5 * published ** (1 / 10)


class TestPin:
    def test_is_independent_of_later_versions(self, tmp_path: Path) -> None:
        """Servers see both."""
        writes, seen = publisher(tmp_path), PublishedDir(tmp_path)
        writes.publish(1, arrays(1), {"classes": "[]"})
        assert seen.pinned() is None

        pin(tmp_path, 1)
        writes.publish(2, arrays(2), {})

        pinned, newest = seen.pinned(), seen.newest()
        assert pinned is not None
        assert newest is not None
        assert (pinned.step, pinned.published_at_s, pinned.metadata["classes"]) == (1, 1234.5, "[]")
        assert newest.step == 2

    def test_survives_the_removal_of_its_version(self, tmp_path: Path) -> None:
        """Its version is removed from the history, and then published again with other weights."""
        writes = publisher(tmp_path)
        writes.publish(1, arrays(1), {})
        pin(tmp_path, 1)

        for step in (2, 3, 4, 1):
            writes.publish(step, arrays(step * 10), {})
        pinned = PublishedDir(tmp_path).pinned()

        assert pinned is not None
        assert np.array_equal(load_arrays(pinned)["net.w"], arrays(1)["net.w"])

    def test_is_replaced_by_another(self, tmp_path: Path) -> None:
        """There is one at a time, and servers see the change."""
        writes, seen = publisher(tmp_path), PublishedDir(tmp_path)
        for step in (1, 2):
            writes.publish(step, arrays(step), {})
        found = []
        for step in (1, 2, 1):
            pin(tmp_path, step)
            pinned = seen.pinned()
            assert pinned is not None
            found.append(load_arrays(pinned)["net.w"][0])

        assert found == [1.0, 2.0, 1.0]

    def test_ends_with_unpin(self, tmp_path: Path) -> None:
        """`unpin` returns whether there was one."""
        publisher(tmp_path).publish(1, arrays(1), {})
        seen = PublishedDir(tmp_path)
        pin(tmp_path, 1)
        assert seen.pinned() is not None

        assert unpin(tmp_path)

        assert seen.pinned() is None
        assert not unpin(tmp_path)

    def test_of_an_unknown_version_is_an_error(self, tmp_path: Path) -> None:
        """The message lists the versions, and the pin is unchanged."""
        writes = publisher(tmp_path)
        for step in (1, 2):
            writes.publish(step, arrays(step), {})
        pin(tmp_path, 1)

        with pytest.raises(StateError, match="no version 7 to roll back to; there are: 1, 2"):
            pin(tmp_path, 7)

        pinned = PublishedDir(tmp_path).pinned()
        assert pinned is not None
        assert pinned.step == 1

    def test_of_the_pinned_version_changes_nothing(self, tmp_path: Path) -> None:
        """Even if its version was removed from the history."""
        publisher(tmp_path).publish(1, arrays(1), {})
        pin(tmp_path, 1)
        teacher_path(tmp_path, 1).unlink()

        assert pin(tmp_path, 1).step == 1

    def test_of_a_torn_file_is_refused(self, tmp_path: Path) -> None:
        """The message has the reason, and nothing is pinned."""
        publisher(tmp_path).publish(1, arrays(1), {}).path.write_bytes(b"torn")

        with pytest.raises(StateError, match="not a published teacher"):
            pin(tmp_path, 1)

        assert PublishedDir(tmp_path).pinned() is None

    def test_that_cannot_be_read_is_an_error(self, tmp_path: Path) -> None:
        """A server must know that another version was requested."""
        (tmp_path / PIN).write_bytes(b"torn")

        with pytest.raises(StateError, match=PIN):
            PublishedDir(tmp_path).pinned()

    def test_any_single_fault_leaves_the_old_pin_or_the_new_one(self, tmp_path: Path) -> None:
        """Whichever operation fails, the pinned version can be loaded."""
        writes = publisher(tmp_path)
        for step in (1, 2):
            writes.publish(step, arrays(step), {})
        for fail_at in itertools.count(1):
            pin(tmp_path, 1)
            try:
                pin(tmp_path, 2, FaultyFiles(fail_at=fail_at))
            except OSError:
                pinned = PublishedDir(tmp_path).pinned()
                assert pinned is not None
                assert np.array_equal(load_arrays(pinned)["net.w"], arrays(pinned.step)["net.w"])
            else:
                break

        assert fail_at == 6, "one write of five operations, then a clean run"


class TestVersions:
    def test_are_all_that_can_be_served_in_the_order_of_publication(self, tmp_path: Path) -> None:
        """With the pinned one, once, even if its file was removed; without torn files."""
        clock = ManualClock(1000.0)
        writes = Publisher(tmp_path, keep=9, clock=clock)
        for step in (5, 1, 2, 3):
            writes.publish(step, arrays(step), {})
            clock.advance(1.0)
        pin(tmp_path, 5)
        teacher_path(tmp_path, 2).write_bytes(b"torn")
        assert [model.step for model in PublishedDir(tmp_path).versions()] == [5, 1, 3]

        teacher_path(tmp_path, 5).unlink()

        assert [model.step for model in PublishedDir(tmp_path).versions()] == [5, 1, 3]

    def test_are_none_before_the_first_publication(self, tmp_path: Path) -> None:
        """Reading creates nothing."""
        assert PublishedDir(tmp_path / "nowhere").versions() == []
        assert not (tmp_path / "nowhere").exists()

    def test_are_listed_newest_first_with_their_marks(self, tmp_path: Path) -> None:
        """newest, pinned and served."""
        clock = ManualClock(1000.0)
        writes = Publisher(tmp_path, keep=9, clock=clock)
        for step in (1, 2):
            writes.publish(step, arrays(step), {"scores": f'{{"windowed_accuracy": 0.{step}}}'})
            clock.advance(10.0)

        def marks() -> list[tuple[bool, bool, bool]]:
            return [(row["newest"], row["pinned"], row["served"]) for row in listing(PublishedDir(tmp_path), 1030.0)]

        assert marks() == [(True, False, True), (False, False, False)]
        pin(tmp_path, 1)
        assert marks() == [(True, False, False), (False, True, True)]
        newest, oldest = listing(PublishedDir(tmp_path), 1030.0)
        assert (newest["version"], newest["published_at_s"], newest["age_s"]) == (2, 1010.0, 20.0)
        assert oldest["size_bytes"] == os.stat(teacher_path(tmp_path, 1)).st_size
        assert oldest["scores"] == {"windowed_accuracy": 0.1}

    def test_are_listed_if_the_pointer_is_broken(self, tmp_path: Path) -> None:
        """An operator needs the list to fix it."""
        publisher(tmp_path).publish(1, arrays(1), {})
        (tmp_path / POINTER).write_bytes(b"torn")

        (row,) = listing(PublishedDir(tmp_path), 2000.0)

        assert (row["version"], row["newest"], row["served"]) == (1, False, False)


class TestHeader:
    @pytest.mark.parametrize("text", [None, "", "{", "[]", "null", '{"labels:0": "7"}', '{"labels:0": true}'])
    def test_malformed_offsets_are_none(self, text: str | None) -> None:
        """The teacher can be served without them."""
        assert learned_offsets_of({} if text is None else {"learned_offsets": text}) is None

    def test_offsets_are_read(self) -> None:
        """By name."""
        assert learned_offsets_of({"learned_offsets": '{"labels:0": 7}'}) == {"labels:0": 7}


def test_a_deeply_nested_pointer_is_a_state_error(tmp_path: Path) -> None:
    """A server keeps its teacher."""
    (tmp_path / POINTER).write_bytes(b'{"step": ' + b"[" * 200_000)

    with pytest.raises(StateError, match="not a pointer"):
        PublishedDir(tmp_path).newest()
