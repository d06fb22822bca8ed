"""Up to where labels are learned."""

from __future__ import annotations

import json

from streamlearn.loop.learned_offsets import MAX_UNLEARNED_STEPS, LearnedOffsets
from streamlearn.records import TopicPartition

LABELS = TopicPartition("labels", 0)


def at(offset: int) -> dict[TopicPartition, int]:
    return {LABELS: offset}


class TestStepDone:
    def test_a_step_without_new_rows_is_learned_at_once(self):
        """Its labels, if any, came to another end."""
        learned = LearnedOffsets(at(0))

        learned.step_done(at(5), rows_added=0, rows_drawn=0)

        assert learned.offsets == at(5)

    def test_waits_until_every_row_up_to_the_step_was_drawn(self):
        """Three rows are added in the first step; two are drawn in it, the third in the next."""
        learned = LearnedOffsets(at(0))

        learned.step_done(at(5), rows_added=3, rows_drawn=2)
        assert learned.offsets == at(0)

        learned.step_done(at(9), rows_added=4, rows_drawn=3)
        assert learned.offsets == at(5)

    def test_what_it_remembers_is_bounded(self):
        """Labels that are never drawn fill it up; once they are, it reports the last step it knew."""
        learned = LearnedOffsets(at(0))
        for step in range(1, MAX_UNLEARNED_STEPS + 11):
            learned.step_done(at(step), rows_added=step, rows_drawn=0)

        learned.step_done(at(9999), rows_added=9999, rows_drawn=9998)

        assert learned.offsets == at(MAX_UNLEARNED_STEPS)


def test_is_loaded_as_it_was_saved():
    """Topic names may hold anything but a colon and digits at the end."""
    learned = LearnedOffsets({TopicPartition("a.b-c", 3): 7, LABELS: 2})

    loaded = LearnedOffsets({})
    loaded.load(json.loads(json.dumps(learned.as_json())))

    assert loaded.offsets == learned.offsets
