"""A careless client: sends samples and labels over HTTP and notes each acknowledgement.

Labels come late, early, twice and corrected. Unacknowledged records are sometimes sent again, so the log holds some ids
twice. A few samples bypass the server and cannot be decoded: they must become dead letters. A few labels bypass it too,
with an event time in the past. The seed determines what is sent; kills determine what arrives. SIGWINCH (ignored by a
process without a handler) holds all labels back until the next SIGWINCH, which releases the due ones in random order.

A note is one line, written after the acknowledgement and before the next request: topic, partition, offset, id, class.
"""

from __future__ import annotations

import contextlib
import heapq
import http.client
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from streamlearn.app.log import make_codec, open_log
from streamlearn.config import load_config
from streamlearn.errors import LogUnavailableError
from streamlearn.records import NewRecord, Position

TIMEOUT_S = 5.0
LABEL_SHARE, EARLY, AGAIN, CORRECTED, UNREADABLE, RESENT = 0.5, 0.1, 0.1, 0.15, 0.01, 0.5
"""Shares: samples with a label; of these early, twice, corrected; undecodable samples; failures that are resent."""
FOREIGN = 0.1
"""Share of labels that bypass the server, with an event time up to `OLDEST_S` ago."""
MEAN_DELAY_S, OLDEST_S = 0.7, 3.0
Append = Callable[[str, int, int], Position]
"""Appends a label directly to the log: id, class, milliseconds since the epoch."""


class Producer:
    """One connection to one server, and a queue of labels to send later."""

    def __init__(
        self, port: int, notes: Path, append: Append, *, seed: int, generation: int, features: int, classes: int
    ) -> None:
        """`generation` keeps the ids of restarted producers apart."""
        self.held = False
        """Due labels are held back."""
        self._append = append
        self._port, self._random = port, random.Random(f"{seed}/{generation}")
        self._prefix, self._features, self._classes = f"g{generation}", features, classes
        self._notes = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        self._connection: http.client.HTTPConnection | None = None
        self._due: list[tuple[float, int, str, int]] = []
        self._sent = 0

    def sample(self, now_s: float) -> None:
        """Send the next sample and schedule its labels."""
        draw, number = self._random, self._sent
        self._sent += 1
        name, truth = f"{self._prefix}-{number}", draw.randrange(self._classes)
        if labelled := draw.random() < LABEL_SHARE:
            if draw.random() < EARLY:
                self._label(name, truth)
            else:
                self._plan(now_s, name, truth)
        x = [round(draw.gauss(float(truth == feature), 1.0), 4) for feature in range(self._features)]
        self._post("sample", {"id": name, "x": x})
        if labelled and draw.random() < AGAIN:
            self._plan(now_s, name, truth)
        if labelled and draw.random() < CORRECTED:
            self._plan(now_s, name, draw.randrange(self._classes))

    def labels_due(self, now_s: float) -> None:
        """Send all due labels, in random order."""
        if self.held:
            return
        due = []
        while self._due and self._due[0][0] <= now_s:
            due.append(heapq.heappop(self._due))
        self._random.shuffle(due)
        for _, _, name, class_index in due:
            self._label(name, class_index)

    def hold(self, *_: object) -> None:
        """Toggle holding labels back."""
        self.held = not self.held

    def _plan(self, now_s: float, name: str, class_index: int) -> None:
        at_s = now_s + self._random.expovariate(1.0 / MEAN_DELAY_S)
        heapq.heappush(self._due, (at_s, len(self._due), name, class_index))

    def _label(self, name: str, class_index: int) -> None:
        if self._random.random() >= FOREIGN:
            self._post("label", {"id": name, "label": class_index})
            return
        at_ms = int((time.time() - self._random.uniform(0.0, OLDEST_S)) * 1000)
        with contextlib.suppress(LogUnavailableError):  # this client gives up
            self._note(self._append(name, class_index, at_ms), name, class_index)

    def _post(self, route: str, body: dict[str, Any]) -> None:
        """Send; without an acknowledgement, sometimes send again, since the outcome is unknown."""
        if not self._try(route, body) and self._random.random() < RESENT:
            self._try(route, body)

    def _try(self, route: str, body: dict[str, Any]) -> bool:
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
            headers = {"content-type": "application/json"}
            self._connection.request("POST", f"/{route}", json.dumps(body), headers)
            with self._connection.getresponse() as reply:
                content = reply.read()
        except (OSError, http.client.HTTPException):
            self._drop()
            return False
        if reply.status != http.client.ACCEPTED:
            assert reply.status in (429, 503), (reply.status, content)
            return False
        (item,) = json.loads(content)["items"]
        self._note(Position(**item["position"]), body["id"], body.get("label", -1))
        return True

    def _note(self, position: Position, name: str, class_index: int) -> None:
        line = f"{position.topic} {position.partition} {position.offset} {name} {class_index}\n"
        os.write(self._notes, line.encode())

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        time.sleep(0.01)


def run(*arguments: str) -> None:
    """Send continuously. Arguments: config, port, notes, samples per second, seed, generation."""
    config, port, notes, rate, seed, generation = arguments
    loaded = load_config(Path(config))
    schema, source, codec = loaded.schema_.build(), loaded.source, make_codec(loaded)
    junk = random.Random(f"{seed}/{generation}/junk")
    try:
        log = open_log(loaded)
    except LogUnavailableError as error:
        sys.exit(str(error))
    with closing(log):

        def append(name: str, class_index: int, at_ms: int) -> Position:
            record = codec.labels.encode(name, class_index, timestamp_ms=at_ms)
            (position,) = log.append(source.labels.topic, [record], timeout_s=TIMEOUT_S)
            return position

        producer = Producer(
            int(port),
            Path(notes),
            append,
            seed=int(seed),
            generation=int(generation),
            features=schema.shape[0],
            classes=len(schema.classes),
        )
        signal.signal(signal.SIGWINCH, producer.hold)
        next_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            producer.labels_due(now_s)
            producer.sample(now_s)
            if junk.random() < UNREADABLE:
                with contextlib.suppress(LogUnavailableError):  # this client gives up
                    bad = NewRecord(b"junk-%d" % junk.getrandbits(48), b"{")
                    log.append(source.samples.topics[0], [bad], timeout_s=TIMEOUT_S)
            next_s = max(next_s + 1.0 / float(rate), time.monotonic() - 0.1)
            time.sleep(max(0.0, next_s - time.monotonic()))
