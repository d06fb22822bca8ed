"""The appender: acknowledged only when durable, bounded, and one call of the log for all that waits."""

import asyncio
import threading

import pytest

from streamlearn.errors import LogError, LogUnavailableError
from streamlearn.metrics import ServerMetrics
from streamlearn.records import NewRecord, Position
from streamlearn.serve.appender import Appender
from streamlearn.serve.failures import RequestError

WAIT_S = 5.0
A, B, C = NewRecord(b"a", b"1"), NewRecord(b"b", b"2"), NewRecord(b"c", b"3")


class ScriptedLog:
    """A log with a gate, that can fail. `refused` are keys that make a whole call fail, as in a real log."""

    def __init__(self, error=None, refused=()) -> None:
        self.records: list[NewRecord] = []
        self.calls: list[tuple[str, list[bytes]]] = []
        self.timeouts: list[float] = []
        self.error, self.refused = error, refused
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def append(self, topic, records, timeout_s=10.0):
        self.timeouts.append(timeout_s)
        self.calls.append((topic, [record.key for record in records]))
        self.entered.release()
        assert self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        if any(record.key in self.refused for record in records):
            raise LogError("too large")
        first = len(self.records)
        self.records += records
        return [Position(topic, 0, first + index) for index in range(len(records))]


def run(log, play, *, open_log=None, timeout_s=WAIT_S, **options):
    """Run `play(appender)` in an event loop; its result and the metrics."""
    metrics = ServerMetrics(version="1")
    appender = Appender(open_log or (lambda: log), metrics, timeout_s=timeout_s, **options)

    async def main():
        appender.start()
        try:
            return await play(appender)
        finally:
            await asyncio.to_thread(appender.close)

    return asyncio.run(main()), metrics.text()


async def busy(appender, log):
    """Close the gate, and start an append that waits behind it."""
    log.gate.clear()
    task = asyncio.create_task(appender.append("labels", "labels", [NewRecord(b"first", b"")]))
    assert await asyncio.to_thread(log.entered.acquire, timeout=WAIT_S)
    return task


async def started(*appends):
    """These appends as tasks that have run up to their wait."""
    tasks = [asyncio.create_task(append) for append in appends]
    await asyncio.sleep(0)
    return tasks


class TestAppend:
    def test_returns_the_positions_of_the_log(self):
        """One position per record, in order; counted under the role of the topic."""
        log = ScriptedLog()

        positions, text = run(log, lambda appender: appender.append("labels", "my-labels", [A, B]))

        assert positions == [Position("my-labels", 0, 0), Position("my-labels", 0, 1)]
        assert log.records == [A, B]
        assert 'streamlearn_appended_records_total{topic="labels"} 2.0' in text

    def test_acknowledges_nothing_before_the_log_does(self):
        """I2: while the log has not answered, neither has the appender."""
        log = ScriptedLog()

        async def play(appender):
            task = await busy(appender, log)
            before = task.done()
            log.gate.set()
            await task
            return before

        done_before, _ = run(log, play)

        assert not done_before

    @pytest.mark.parametrize("error", [LogUnavailableError("away"), LogError("too large")])
    def test_raises_the_errors_of_the_log(self, error):
        """In the request that appended."""
        with pytest.raises(type(error)):
            run(ScriptedLog(error), lambda appender: appender.append("labels", "labels", [A]))

    def test_counts_a_log_that_is_unavailable(self):
        """As a rejection, not as an append."""
        log = ScriptedLog(LogUnavailableError("away"))

        async def play(appender):
            with pytest.raises(LogUnavailableError):
                await appender.append("labels", "labels", [A])

        _, text = run(log, play)

        assert 'streamlearn_rejected_total{reason="log_unavailable"} 1.0' in text
        assert 'streamlearn_appended_records_total{topic="labels"} 0.0' in text


class TestGroups:
    def test_requests_that_wait_share_one_call_per_topic(self):
        """Each gets the positions of its own records."""
        log = ScriptedLog()

        async def play(appender):
            first = await busy(appender, log)
            tasks = await started(
                appender.append("labels", "labels", [A]),
                appender.append("samples", "samples", [B]),
                appender.append("labels", "labels", [C, A]),
            )
            log.gate.set()
            await first
            return await asyncio.gather(*tasks)

        positions, _ = run(log, play)

        assert log.calls == [("labels", [b"first"]), ("labels", [b"a", b"c", b"a"]), ("samples", [b"b"])]
        assert [[position.offset for position in one] for one in positions] == [[1], [4], [2, 3]]

    def test_after_a_call_for_two_requests_the_first_waits_for_a_second(self):
        """For a short time: a closed loop of clients would otherwise split into halves that wait for each other."""
        log = ScriptedLog()

        async def play(appender):
            first = await busy(appender, log)
            pair = await started(*(appender.append("labels", "labels", [record]) for record in (A, B)))
            log.gate.set()
            await asyncio.gather(first, *pair)
            early = await started(appender.append("labels", "labels", [A]))
            await asyncio.sleep(0.02)
            await asyncio.gather(*early, appender.append("labels", "labels", [C]))

        run(log, play, gather_s=WAIT_S)

        assert [keys for _, keys in log.calls] == [[b"first"], [b"a", b"b"], [b"a", b"c"]]

    def test_a_refused_record_fails_only_its_own_request(self):
        """The log refuses the whole group, so each request is tried alone."""
        log = ScriptedLog(refused=(b"b",))

        async def play(appender):
            first = await busy(appender, log)
            tasks = await started(*(appender.append("labels", "labels", [record]) for record in (A, B, C)))
            log.gate.set()
            await first
            return await asyncio.gather(*tasks, return_exceptions=True)

        (a, b, c), text = run(log, play)

        assert isinstance(b, LogError)
        assert [a[0].offset, c[0].offset] == [1, 2]
        assert 'streamlearn_appended_records_total{topic="labels"} 3.0' in text

    def test_a_group_has_the_longest_time_of_its_requests(self):
        """A request with little time left does not fail the others."""
        log, now_s = ScriptedLog(), [0.0]

        async def play(appender):
            first = await busy(appender, log)
            early = await started(appender.append("labels", "labels", [A]))
            now_s[0] = 4.0
            late = await started(appender.append("labels", "labels", [B]))
            log.gate.set()
            await asyncio.gather(first, *early, *late)

        run(log, play, clock=lambda: now_s[0])

        assert log.timeouts == [5.0, 5.0]


class TestBounds:
    def test_answers_in_time_although_the_log_does_not(self):
        """A client of a log may exceed its timeout. Its records still count as pending."""
        log = ScriptedLog()
        log.gate.clear()

        async def play(appender):
            with pytest.raises(LogUnavailableError, match=r"labels: not acknowledged within 0\.05 s"):
                await asyncio.wait_for(appender.append("labels", "labels", [A]), WAIT_S)
            pending = appender.pending_records
            log.gate.set()
            return pending

        pending, text = run(log, play, timeout_s=0.05)

        assert pending == 1
        assert 'streamlearn_rejected_total{reason="log_unavailable"} 1.0' in text

    @pytest.mark.parametrize("bound", [{"max_records": 2}, {"max_bytes": 9}])
    def test_refuses_more_than_its_queue(self, bound):
        """429 for records in flight and waiting together. A finished append makes room."""
        log = ScriptedLog()

        async def play(appender):
            first = await busy(appender, log)
            tasks = await started(appender.append("labels", "labels", [A]))
            with pytest.raises(RequestError) as refused:
                await appender.append("labels", "labels", [NewRecord(b"b", b"123")])
            log.gate.set()
            await asyncio.gather(first, *tasks)
            await appender.append("labels", "labels", [B])
            return refused.value.status

        status, text = run(log, play, **bound)

        assert status == 429
        assert 'streamlearn_rejected_total{reason="queue_full"} 1.0' in text

    def test_a_request_larger_than_the_queue_is_written_if_it_comes_alone(self):
        """Its size is bounded by its body."""
        positions, _ = run(
            ScriptedLog(), lambda appender: appender.append("labels", "labels", [A, B, C]), max_records=2, max_bytes=1
        )

        assert len(positions) == 3

    def test_the_wait_in_the_queue_counts_against_the_timeout(self):
        """An append that waited too long is not written."""
        log, now_s = ScriptedLog(), [0.0]

        async def play(appender):
            first = await busy(appender, log)
            (late,) = await started(appender.append("labels", "labels", [A]))
            now_s[0] = 7.0
            log.gate.set()
            await first
            with pytest.raises(LogUnavailableError, match="nothing was appended"):
                await late

        run(log, play, timeout_s=6.0, clock=lambda: now_s[0])

        assert [record.key for record in log.records] == [b"first"]

    def test_a_client_that_leaves_does_not_stop_its_append(self):
        """The records are written, and count as pending until then."""
        log = ScriptedLog()

        async def play(appender):
            task = await busy(appender, log)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(RequestError):
                await appender.append("labels", "labels", [B])
            log.gate.set()
            while appender.pending_records:
                await asyncio.sleep(0)
            await appender.append("labels", "labels", [B])

        run(log, play, max_records=1)

        assert [record.key for record in log.records] == [b"first", b"b"]


class TestLife:
    def test_the_log_is_opened_once_it_can_be(self):
        """Until then each append fails as unavailable; afterwards the log stays open."""
        log, opened = ScriptedLog(), []

        def open_log():
            opened.append(True)
            if len(opened) == 1:
                raise LogError("disk full")
            return log

        async def play(appender):
            with pytest.raises(LogUnavailableError, match="disk full"):
                await appender.append("labels", "labels", [A])
            await appender.append("labels", "labels", [A])
            await appender.append("labels", "labels", [B])

        run(log, play, open_log=open_log)

        assert (len(opened), log.records) == (2, [A, B])

    def test_close_writes_what_waits_and_takes_no_more(self):
        """503 afterwards."""
        log = ScriptedLog()

        async def play(appender):
            first = await busy(appender, log)
            (waiting,) = await started(appender.append("labels", "labels", [A]))
            closing = asyncio.create_task(asyncio.to_thread(appender.close))
            log.gate.set()
            await asyncio.gather(first, waiting, closing)
            with pytest.raises(RequestError) as refused:
                await appender.append("labels", "labels", [B])
            return refused.value.status

        status, _ = run(log, play)

        assert status == 503
        assert [record.key for record in log.records] == [b"first", b"a"]
