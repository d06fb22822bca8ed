"""The inlet: durable before acknowledged, bounded, and honest about a log that is away."""

import asyncio
import threading

import pytest

from streamlearn.errors import LogError, LogUnavailableError
from streamlearn.metrics import ServerMetrics
from streamlearn.records import NewRecord, Position
from streamlearn.serve.appender import WORKERS, Appender
from streamlearn.serve.failures import RequestError

WAIT_S = 5.0


class ScriptedLog:
    """Only what the inlet uses of a log: an append that may be held up, or fail."""

    def __init__(self, error=None) -> None:
        self.records: list[NewRecord] = []
        self.timeouts: list[float] = []
        self.error = error
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def append(self, topic, records, timeout_s=10.0):
        self.timeouts.append(timeout_s)
        self.entered.release()
        assert self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        first = len(self.records)
        self.records += records
        return [Position(topic, 0, first + index) for index in range(len(records))]


def run(log, play, *, queue=16, timeout_s=WAIT_S, clock=None):
    metrics = ServerMetrics(version="1")
    inlet = Appender(log, metrics, queue=queue, timeout_s=timeout_s, **({} if clock is None else {"clock": clock}))

    async def main():
        try:
            return await play(inlet)
        finally:
            await asyncio.to_thread(inlet.close)

    return asyncio.run(main()), metrics.text()


def test_returns_the_positions_that_the_log_gave():
    """One position a record, in order, counted by the part that the topic plays."""
    log = ScriptedLog()
    records = [NewRecord(b"a", b"1"), NewRecord(b"b", b"2")]

    positions, text = run(log, lambda inlet: inlet.append("labels", "my-labels", records))

    assert positions == [Position("my-labels", 0, 0), Position("my-labels", 0, 1)]
    assert log.records == records
    assert 'streamlearn_appended_records_total{topic="labels"} 2.0' in text


def test_acknowledges_nothing_before_the_log_does():
    """I2: while the log has not answered, neither has the inlet."""
    log = ScriptedLog()
    log.gate.clear()

    async def play(inlet):
        task = asyncio.create_task(inlet.append("labels", "labels", [NewRecord(b"a", b"1")]))
        assert await asyncio.to_thread(log.entered.acquire, timeout=WAIT_S)
        before = task.done()
        log.gate.set()
        await task
        return before

    done_before, _ = run(log, play)

    assert not done_before


@pytest.mark.parametrize("error", [LogUnavailableError("away"), LogError("too large")])
def test_passes_the_logs_errors_on_and_counts_no_append(error):
    """What the log refused was not appended."""
    with pytest.raises(type(error)):
        run(ScriptedLog(error), lambda inlet: inlet.append("labels", "labels", [NewRecord(b"a", b"1")]))


def test_counts_a_log_that_is_away():
    """The refusal is visible in the metrics."""
    log = ScriptedLog(LogUnavailableError("away"))

    async def play(inlet):
        with pytest.raises(LogUnavailableError):
            await inlet.append("labels", "labels", [NewRecord(b"a", b"1")])

    _, text = run(log, play)

    assert 'streamlearn_rejected_total{reason="log_unavailable"} 1.0' in text
    assert 'streamlearn_appended_records_total{topic="labels"} 0.0' in text


def test_answers_in_time_though_the_log_does_not():
    """A client of a log may wait longer than it was told. What it still holds goes on counting against the queue."""
    log = ScriptedLog()
    log.gate.clear()

    async def play(inlet):
        with pytest.raises(LogUnavailableError, match=r"labels: not acknowledged within 0\.05 s"):
            await asyncio.wait_for(inlet.append("labels", "labels", [NewRecord(b"a", b"1")]), WAIT_S)
        still_pending = inlet.pending
        log.gate.set()
        return still_pending

    still_pending, text = run(log, play, timeout_s=0.05)

    assert still_pending == 1
    assert 'streamlearn_rejected_total{reason="log_unavailable"} 1.0' in text
    assert 'streamlearn_appended_records_total{topic="labels"} 0.0' in text


def test_refuses_more_than_its_queue():
    """Appends in flight and waiting are bounded together; a finished one makes room."""
    log = ScriptedLog()
    log.gate.clear()

    async def play(inlet):
        tasks = [asyncio.create_task(inlet.append("labels", "labels", [NewRecord(b"a", b"1")])) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(RequestError) as refused:
            await inlet.append("labels", "labels", [NewRecord(b"a", b"1")])
        log.gate.set()
        await asyncio.gather(*tasks)
        await asyncio.sleep(0)
        await inlet.append("labels", "labels", [NewRecord(b"a", b"1")])
        return refused.value.status

    status, _ = run(log, play, queue=2)

    assert status == 429


def test_the_wait_in_the_queue_counts_against_the_timeout():
    """An append that waited too long is not begun, and is told as not acknowledged."""
    log = ScriptedLog()
    log.gate.clear()
    now = [0.0]

    async def play(inlet):
        busy = [asyncio.create_task(inlet.append("labels", "labels", [])) for _ in range(WORKERS)]
        for _ in range(WORKERS):
            assert await asyncio.to_thread(log.entered.acquire, timeout=WAIT_S)
        late = asyncio.create_task(inlet.append("labels", "labels", [NewRecord(b"a", b"1")]))
        await asyncio.sleep(0)
        now[0] = 7.0
        log.gate.set()
        await asyncio.gather(*busy)
        with pytest.raises(LogUnavailableError, match="nothing was appended"):
            await late

    run(log, play, timeout_s=6.0, clock=lambda: now[0])

    assert log.records == []
    assert log.timeouts == [6.0] * WORKERS


def test_a_client_that_leaves_does_not_stop_an_append_on_its_way():
    """The record is finished, and keeps its place in the queue until then."""
    log = ScriptedLog()
    log.gate.clear()

    async def play(inlet):
        task = asyncio.create_task(inlet.append("labels", "labels", [NewRecord(b"a", b"1")]))
        assert await asyncio.to_thread(log.entered.acquire, timeout=WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(RequestError):
            await inlet.append("labels", "labels", [NewRecord(b"b", b"2")])
        log.gate.set()
        while inlet.pending:
            await asyncio.sleep(0)
        await inlet.append("labels", "labels", [NewRecord(b"b", b"2")])

    run(log, play, queue=1)

    assert sorted(record.key for record in log.records) == [b"a", b"b"]
