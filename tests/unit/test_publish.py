"""Published teachers: whole files, pointers that are replaced whole (I5), a bounded history, and one that is pinned."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
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
    scores_of,
    teacher_path,
    thinned,
    unpin,
)
from streamlearn.testing import FaultyFiles, ManualClock


def arrays(step: int) -> dict[str, np.ndarray]:
    return {"net.w": np.full(5, step, np.float32)}


def publisher(folder: Path, **more: object) -> Publisher:
    return Publisher(folder, keep=2, keep_history=0, clock=lambda: 1234.5, **more)  # type: ignore[arg-type]


def test_servers_see_the_newest_with_its_header(tmp_path: Path) -> None:
    """Step, time and metadata travel with the weights."""
    seen = PublishedDir(tmp_path)
    assert seen.newest() is None

    publisher(tmp_path).publish(3, arrays(3), {"model_spec": "{}"})
    model = seen.newest()

    assert model is not None
    assert (model.step, model.published_at_s, model.metadata["model_spec"]) == (3, 1234.5, "{}")
    assert np.array_equal(load_arrays(model)["net.w"], arrays(3)["net.w"])


def test_the_oldest_are_removed(tmp_path: Path) -> None:
    """No more than `keep` teachers stay on disk (I6)."""
    writes = publisher(tmp_path)

    for step in range(1, 6):
        writes.publish(step, arrays(step), {})

    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "teacher-000000000004.safetensors",
        "teacher-000000000005.safetensors",
    ]


@pytest.mark.parametrize("lasting", [False, True])
def test_any_single_fault_leaves_the_pointer_on_a_whole_teacher(tmp_path: Path, *, lasting: bool) -> None:
    """Whatever operation fails, what the pointer names can be loaded, and is the old teacher or the new one."""
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

    assert fail_at == 11, "two whole writes of five operations each, then a clean run"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"step": "x"}', b"\xff"])
def test_a_pointer_that_cannot_be_read_is_an_error(tmp_path: Path, content: bytes) -> None:
    """A server keeps its teacher and says so; it does not guess."""
    (tmp_path / POINTER).write_bytes(content)

    with pytest.raises(StateError, match="pointer"):
        PublishedDir(tmp_path).newest()


def test_a_disk_that_cannot_be_read_for_a_while_is_an_error_of_ours(tmp_path: Path) -> None:
    """Whoever follows it goes on with what it has; nothing else of it would reach them."""
    pointer, newest = tmp_path / POINTER, PublishedDir(tmp_path)
    published = publisher(tmp_path).publish(1, arrays(1), {})
    pointer.rename(tmp_path / "away")
    pointer.mkdir()  # EISDIR stands for EIO, ESTALE and EMFILE

    with pytest.raises(StateError, match="cannot read"):
        newest.newest()

    pointer.rmdir()
    (tmp_path / "away").rename(pointer)
    assert newest.newest() == published


def test_the_pointer_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    """A path in it counts by its last part only."""
    header = '{"step": "1", "published_at_s": "1"}'
    (tmp_path / POINTER).write_text(f'{{"file": "../../etc/passwd", "metadata": {header}}}')

    model = PublishedDir(tmp_path).newest()

    assert model is not None
    assert model.path == tmp_path / "passwd"


def test_a_teacher_that_is_not_whole_is_an_error(tmp_path: Path) -> None:
    """Truncated weights are refused by name."""
    model = publisher(tmp_path).publish(1, arrays(1), {})
    model.path.write_bytes(model.path.read_bytes()[:-3])

    with pytest.raises(StateError, match="torn or corrupt"):
        load_arrays(model)

    model.path.unlink()
    with pytest.raises(StateError, match="not readable as a published teacher"):
        load_arrays(model)


class TestDigest:
    def test_finds_any_flipped_bit_of_a_teacher(self, tmp_path: Path) -> None:
        """By the pointer and by the file's own header alike: each bit of header, names and weights counts."""
        newest = publisher(tmp_path).publish(1, arrays(1), {"classes": '["a", "b"]'})
        whole, key = newest.path.read_bytes(), newest.path.read_bytes().index(f'"{DIGEST}":'.encode())
        for at in range(len(whole)):
            flipped = bytearray(whole)
            flipped[at] ^= 1
            newest.path.write_bytes(flipped)
            with pytest.raises(StateError):
                load_arrays(newest)
            if key <= at < key + len(DIGEST) + 3:
                continue  # under another key it is no digest; all else of that file is whole
            with pytest.raises(StateError):
                pin(tmp_path, 1)
        newest.path.write_bytes(whole)

        assert np.array_equal(load_arrays(newest)["net.w"], arrays(1)["net.w"])

    def test_finds_any_flipped_bit_of_the_pointer(self, tmp_path: Path) -> None:
        """Nothing is served by a wrong name or with a wrong header: it is refused, or the flip changes nothing."""
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

    def test_finds_another_teacher_in_the_place_of_the_one_that_was_named(self, tmp_path: Path) -> None:
        """After a restore a step may be published again while somebody loads it."""
        named = publisher(tmp_path).publish(1, arrays(1), {})
        publisher(tmp_path).publish(1, arrays(2), {})

        with pytest.raises(StateError, match="another teacher"):
            load_arrays(named)

    def test_is_not_wanted_of_a_teacher_that_has_none(self, tmp_path: Path) -> None:
        """Earlier versions published such teachers; an upgrade keeps all of them."""
        header = {"step": "1", "published_at_s": "1234.5", "epoch": "0"}
        path = teacher_path(tmp_path, 1)
        path.write_bytes(save(arrays(1), metadata=header))
        (tmp_path / POINTER).write_text(json.dumps({"file": path.name, "metadata": header}))

        model = PublishedDir(tmp_path).newest()

        assert model is not None
        assert np.array_equal(load_arrays(model)["net.w"], arrays(1)["net.w"])
        assert pin(tmp_path, 1).step == 1

    def test_leaves_a_file_that_any_safetensors_library_reads(self, tmp_path: Path) -> None:
        """Also where a value of the header looks like a digest."""
        looks = '"sha256":"' + "0" * 64
        model = publisher(tmp_path).publish(1, {"sha256": arrays(1)["net.w"]}, {"classes": looks, "sha256x": looks})

        assert np.array_equal(load_file(model.path)["sha256"], arrays(1)["net.w"])
        assert np.array_equal(load_arrays(model)["sha256"], arrays(1)["net.w"])


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("teacher-")) for path in folder.glob("teacher-*"))


class TestHistory:
    def test_is_kept_besides_the_newest_and_is_bounded(self, tmp_path: Path) -> None:
        """Of 60 published a minute apart: the last three, and four more that reach back to the first (I6)."""
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
    def test_grows_to_its_size_before_anything_goes(self, tmp_path: Path, keep_history: int) -> None:
        """What fits is all there, whatever the two bounds are to each other."""
        clock = ManualClock(1000.0)
        writes = Publisher(tmp_path, keep=5, keep_history=keep_history, clock=clock)

        for step in range(1, 6 + keep_history):
            writes.publish(step, arrays(step), {})
            clock.advance(1.0)

            assert steps_in(tmp_path) == list(range(1, step + 1))

    def test_is_by_time_and_not_by_step(self, tmp_path: Path) -> None:
        """After a restore of an older checkpoint, what it left behind has larger steps and is older all the same."""
        clock = ManualClock(1000.0)
        writes = Publisher(tmp_path, keep=2, keep_history=0, clock=clock)
        for step in (100, 101, 50, 51):
            writes.publish(step, arrays(step), {})
            clock.advance(1.0)

        assert steps_in(tmp_path) == [50, 51]

    def test_holds_nothing_that_cannot_be_served(self, tmp_path: Path) -> None:
        """A torn file would take the place of a whole one for ever."""
        publisher(tmp_path).publish(1, arrays(1), {}).path.write_bytes(b"torn")

        publisher(tmp_path).publish(2, arrays(2), {})

        assert steps_in(tmp_path) == [2]

    @pytest.mark.parametrize("published", [500, 5000])
    def test_has_something_at_every_distance(self, published: int) -> None:
        """The next older one is at most about twice as far away as an even spread by ratio would have it."""
        at_s: list[float] = []
        for now_s in range(published):
            ages_s = [now_s - time_s for time_s in reversed(at_s)]
            at_s = [at_s[len(at_s) - 1 - index] for index in reversed(thinned(ages_s, keep=10, after_s=1.0))] + [now_s]

        ages_s = [max(1.0, published - time_s) for time_s in reversed(at_s)]
        ratios = [older / younger for younger, older in itertools.pairwise(ages_s)]

        assert ages_s[-1] == published, "the first is still there"
        assert max(ratios) < 2.5 * published ** (1 / 10)


class TestPin:
    def test_stands_beside_what_is_published_later(self, tmp_path: Path) -> None:
        """Servers see both, and which is which."""
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

    def test_outlives_the_file_that_it_was_made_of(self, tmp_path: Path) -> None:
        """Its version leaves the history, and then comes again with other weights."""
        writes = publisher(tmp_path)
        writes.publish(1, arrays(1), {})
        pin(tmp_path, 1)

        for step in (2, 3, 4, 1):
            writes.publish(step, arrays(step * 10), {})
        pinned = PublishedDir(tmp_path).pinned()

        assert pinned is not None
        assert np.array_equal(load_arrays(pinned)["net.w"], arrays(1)["net.w"])

    def test_gives_way_to_another(self, tmp_path: Path) -> None:
        """There is one at a time, and who follows the folder sees the change."""
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
        """Which says whether there was one."""
        publisher(tmp_path).publish(1, arrays(1), {})
        seen = PublishedDir(tmp_path)
        pin(tmp_path, 1)
        assert seen.pinned() is not None

        assert unpin(tmp_path)

        assert seen.pinned() is None
        assert not unpin(tmp_path)

    def test_of_a_version_that_is_not_there_names_those_that_are(self, tmp_path: Path) -> None:
        """And leaves the pin as it was."""
        writes = publisher(tmp_path)
        for step in (1, 2):
            writes.publish(step, arrays(step), {})
        pin(tmp_path, 1)

        with pytest.raises(StateError, match="version 7 is not there to roll back to; there are: 1, 2"):
            pin(tmp_path, 7)

        pinned = PublishedDir(tmp_path).pinned()
        assert pinned is not None
        assert pinned.step == 1

    def test_of_what_is_pinned_already_changes_nothing(self, tmp_path: Path) -> None:
        """Though its file has left the history."""
        publisher(tmp_path).publish(1, arrays(1), {})
        pin(tmp_path, 1)
        teacher_path(tmp_path, 1).unlink()

        assert pin(tmp_path, 1).step == 1

    def test_of_a_torn_file_is_refused(self, tmp_path: Path) -> None:
        """The reason is told, and nothing is pinned."""
        publisher(tmp_path).publish(1, arrays(1), {}).path.write_bytes(b"torn")

        with pytest.raises(StateError, match="wanted a published teacher"):
            pin(tmp_path, 1)

        assert PublishedDir(tmp_path).pinned() is None

    def test_that_cannot_be_read_is_an_error(self, tmp_path: Path) -> None:
        """A server must know that somebody wanted another version."""
        (tmp_path / PIN).write_bytes(b"torn")

        with pytest.raises(StateError, match=PIN):
            PublishedDir(tmp_path).pinned()

    def test_any_single_fault_leaves_the_old_pin_or_the_new_one(self, tmp_path: Path) -> None:
        """Whatever operation fails, what is pinned can be loaded."""
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

        assert fail_at == 6, "one whole write of five operations, then a clean run"


class TestVersions:
    def test_are_all_that_can_be_served_in_the_order_of_publication(self, tmp_path: Path) -> None:
        """The pinned one among them, once, also when its own file is gone; torn files are not."""
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

    def test_are_none_where_nothing_was_published(self, tmp_path: Path) -> None:
        """To look creates nothing."""
        assert PublishedDir(tmp_path / "nowhere").versions() == []
        assert not (tmp_path / "nowhere").exists()

    def test_are_listed_newest_first_with_their_marks(self, tmp_path: Path) -> None:
        """As plain values: which is the newest, which is pinned, which is served."""
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

    def test_are_listed_where_the_pointer_is_broken(self, tmp_path: Path) -> None:
        """Whoever is to mend it must see what there is."""
        publisher(tmp_path).publish(1, arrays(1), {})
        (tmp_path / POINTER).write_bytes(b"torn")

        (row,) = listing(PublishedDir(tmp_path), 2000.0)

        assert (row["version"], row["newest"], row["served"]) == (1, False, False)


class TestHeader:
    @pytest.mark.parametrize("text", [None, "", "{", "[]", "null", '{"labels:0": "7"}', '{"labels:0": true}'])
    def test_offsets_that_cannot_be_read_are_none(self, text: str | None) -> None:
        """Whoever wrote them; the teacher can be served all the same."""
        assert learned_offsets_of({} if text is None else {"learned_offsets": text}) is None

    def test_offsets_and_scores_are_read(self) -> None:
        """By name."""
        assert learned_offsets_of({"learned_offsets": '{"labels:0": 7}'}) == {"labels:0": 7}
        assert scores_of({"scores": '{"labels": 3, "ssl_gain": null}'}) == {"labels": 3, "ssl_gain": None}


def test_a_pointer_nested_without_end_is_an_error_of_ours(tmp_path: Path) -> None:
    """The watcher of a server goes on with the teacher that it has."""
    (tmp_path / POINTER).write_bytes(b'{"step": ' + b"[" * 200_000)

    with pytest.raises(StateError, match="wanted the pointer"):
        PublishedDir(tmp_path).newest()
