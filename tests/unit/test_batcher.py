"""The batcher: one inference thread that groups waiting requests, within bounds of queue and time."""

import asyncio
import threading

import numpy as np
import pytest

from streamlearn.errors import NotPublishedError
from streamlearn.metrics import ServerMetrics
from streamlearn.serve.batcher import Batcher
from streamlearn.serve.failures import RequestError

WAIT_S = 5.0


class Scripted:
    """A model that answers each row with (value, version), counts its forward passes, and has a gate."""

    def __init__(self, version: int = 1) -> None:
        self.version = version
        self.sizes: list[int] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def probabilities(self, x):
        self.sizes.append(len(x))
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        return np.stack([x[:, 0], np.full(len(x), self.version)], axis=1).astype(np.float32)


def rows(*values):
    return np.array([[value] for value in values], np.float32)


def run(model_or_current, play, *, queue=4, batch_rows=8):
    """Run `play(batcher)` with a started batcher in a new event loop."""
    current = model_or_current if callable(model_or_current) else lambda: model_or_current
    metrics = ServerMetrics(version="1")
    batcher = Batcher(current, metrics, queue=queue, batch_rows=batch_rows)

    async def main():
        batcher.start()
        try:
            return await play(batcher)
        finally:
            await asyncio.to_thread(batcher.close)

    return asyncio.run(main()), metrics.text()


async def until(event):
    assert await asyncio.to_thread(event.wait, WAIT_S)


class TestGrouping:
    def test_an_idle_batcher_answers_one_request_at_once(self):
        """Without waiting for others."""
        model = Scripted()

        (probs, by), _ = run(model, lambda batcher: batcher.predict(rows(7), WAIT_S))

        assert by is model
        assert probs.tolist() == [[7, 1]]
        assert model.sizes == [1]

    def test_requests_that_wait_together_share_a_forward_pass_and_get_their_own_rows(self):
        """Requests gather during a pass. Each gets the answers to its own rows, in order."""
        model = Scripted()

        async def play(batcher):
            model.gate.clear()
            first = asyncio.create_task(batcher.predict(rows(0), WAIT_S))
            await until(model.entered)
            others = [asyncio.create_task(batcher.predict(rows(*values), WAIT_S)) for values in ((1, 2), (3,), (4, 5))]
            await asyncio.sleep(0)
            model.gate.set()
            return [probs[:, 0].tolist() for probs, _ in await asyncio.gather(first, *others)]

        answers, text = run(model, play)

        assert answers == [[0], [1, 2], [3], [4, 5]]
        assert model.sizes == [1, 5]
        assert "streamlearn_predict_batch_rows_sum 6.0" in text

    def test_a_group_holds_at_most_one_batch(self):
        """The request past the bound waits for the next pass."""
        model = Scripted()

        async def play(batcher):
            model.gate.clear()
            tasks = [asyncio.create_task(batcher.predict(rows(0), WAIT_S))]
            await until(model.entered)
            tasks += [asyncio.create_task(batcher.predict(rows(1, 2, 3), WAIT_S)) for _ in range(3)]
            await asyncio.sleep(0)
            model.gate.set()
            await asyncio.gather(*tasks)

        run(model, play, batch_rows=4)

        assert model.sizes == [1, 3, 3, 3]

    def test_a_request_larger_than_a_batch_is_split_and_answered_by_one_teacher(self):
        """I5: a teacher published during a request does not answer its second half."""
        versions = iter(range(1, 100))

        (probs, by), _ = run(
            lambda: Scripted(next(versions)), lambda batcher: batcher.predict(rows(*range(20)), WAIT_S)
        )

        assert by.sizes == [8, 8, 4]
        assert probs[:, 0].tolist() == list(range(20))
        assert set(probs[:, 1].tolist()) == {by.version}


class TestBounds:
    def test_a_full_queue_is_429_with_retry_after(self):
        """The bound is on waiting requests, not on those in the pass."""
        model = Scripted()

        async def play(batcher):
            model.gate.clear()
            tasks = [asyncio.create_task(batcher.predict(rows(0), WAIT_S))]
            await until(model.entered)
            tasks += [asyncio.create_task(batcher.predict(rows(value), WAIT_S)) for value in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(RequestError) as refused:
                await batcher.predict(rows(9), WAIT_S)
            model.gate.set()
            await asyncio.gather(*tasks)
            return refused.value

        error, text = run(model, play, queue=2)

        assert (error.status, error.code, error.headers["retry-after"]) == (429, "queue_full", "1")
        assert 'streamlearn_rejected_total{reason="queue_full"} 1.0' in text

    def test_waiting_rows_are_bounded_too(self):
        """A few large requests fill the queue like many small ones."""
        model = Scripted()

        async def play(batcher):
            model.gate.clear()
            tasks = [asyncio.create_task(batcher.predict(rows(0), WAIT_S))]
            await until(model.entered)
            tasks.append(asyncio.create_task(batcher.predict(rows(*range(15)), WAIT_S)))
            await asyncio.sleep(0)
            with pytest.raises(RequestError) as refused:
                await batcher.predict(rows(1, 2), WAIT_S)
            model.gate.set()
            await asyncio.gather(*tasks)
            await batcher.predict(rows(*range(16)), WAIT_S)
            tasks = [asyncio.create_task(batcher.predict(rows(1, 2), WAIT_S)) for _ in range(2)]
            await asyncio.gather(*tasks)
            return refused.value.status

        status, _ = run(model, play, queue=4, batch_rows=4)

        assert status == 429

    def test_a_wait_past_its_deadline_is_504_and_is_not_predicted_later(self):
        """No pass is spent on it."""
        model = Scripted()

        async def play(batcher):
            model.gate.clear()
            first = asyncio.create_task(batcher.predict(rows(0), WAIT_S))
            await until(model.entered)
            with pytest.raises(RequestError) as late:
                await batcher.predict(rows(1), 0.01)
            model.gate.set()
            await first
            return late.value

        error, text = run(model, play)

        assert (error.status, error.code) == (504, "timeout")
        assert model.sizes == [1]
        assert 'streamlearn_rejected_total{reason="timeout"} 1.0' in text

    def test_a_cancelled_request_is_dropped(self):
        """No pass is spent on it."""
        model = Scripted()

        async def play(batcher):
            model.gate.clear()
            first = asyncio.create_task(batcher.predict(rows(0), WAIT_S))
            await until(model.entered)
            gone = asyncio.create_task(batcher.predict(rows(1), WAIT_S))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.sleep(0)
            model.gate.set()
            await first

        run(model, play)

        assert model.sizes == [1]


class TestFailures:
    def test_a_missing_teacher_is_an_error_of_the_request(self):
        """It is raised in the request."""

        def none_yet():
            raise NotPublishedError("none")

        with pytest.raises(NotPublishedError):
            run(none_yet, lambda batcher: batcher.predict(rows(1), WAIT_S))

    def test_a_model_that_fails_does_not_end_the_thread(self):
        """The request gets the error; the next one is answered."""
        model = Scripted()
        broken = iter([True, False])

        def current():
            if next(broken):
                raise ZeroDivisionError
            return model

        async def play(batcher):
            with pytest.raises(ZeroDivisionError):
                await batcher.predict(rows(1), WAIT_S)
            return await batcher.predict(rows(2), WAIT_S)

        (probs, _), _ = run(current, play)

        assert probs[0, 0] == 2

    def test_close_answers_waiting_requests_and_refuses_later_ones(self):
        """The queue is drained."""
        model = Scripted()

        async def play(batcher):
            model.gate.clear()
            tasks = [asyncio.create_task(batcher.predict(rows(value), WAIT_S)) for value in range(3)]
            await until(model.entered)
            closing = asyncio.create_task(asyncio.to_thread(batcher.close))
            model.gate.set()
            answered = await asyncio.gather(*tasks)
            await closing
            with pytest.raises(RequestError) as refused:
                await batcher.predict(rows(9), WAIT_S)
            return len(answered), refused.value.status

        result, _ = run(model, play)

        assert result == (3, 503)
