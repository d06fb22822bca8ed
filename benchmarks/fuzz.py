"""Sends a million hostile records through the codec and a hundred thousand hostile requests through the API.

Each is a function of the seed and its number, so a failure can be reproduced:

    PYTHONPATH=tests python -c 'import fuzzing; print(fuzzing.record(SEED, NUMBER))'

A record must decode to a sample or a label, or be bad for a known reason, with all its bytes in the dead letter. A
request must be answered as /openapi.json describes, never with 500; acknowledged records must be in the log and
readable, and no others. Also measured: the slowest record and request, and the growth of memory.

Run: python benchmarks/fuzz.py [--quick] [--seed N] [--records N] [--requests N]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import structlog

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "unit")]

import fuzzing  # noqa: E402
import test_fuzz_http  # noqa: E402
from served import FLOATS, IMAGES  # noqa: E402

HANG_S = 60.0
"""A record or a request that takes longer ends the run with the stacks of all threads."""
REQUESTS_PER_SERVER = 5000
"""The log and the ledger are in memory."""


def peak_bytes() -> int:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz_records(seed: int, count: int) -> dict[str, object]:
    """Outcomes of `count` records."""
    outcomes: Counter[str] = Counter()
    slowest_s, before, started = 0.0, peak_bytes(), time.monotonic()
    for number in range(count):
        if number % 1000 == 0:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
        codec, kind, given = fuzzing.record(seed, number)
        at = time.thread_time()
        try:
            outcomes[fuzzing.outcome_of(codec, kind, given)] += 1
        except Exception as error:
            error.add_note(f"fuzzing.record({seed}, {number})")
            raise
        slowest_s = max(slowest_s, time.thread_time() - at)
        if number % 100_000 == 99_999:
            print(f"{number + 1} records in {time.monotonic() - started:.0f} s: {dict(outcomes.most_common())}")
    return {
        "records": count,
        "records_accounted": sum(outcomes.values()),
        "outcomes": dict(outcomes.most_common()),
        "slowest_record_ms": round(slowest_s * 1e3, 2),
        "records_memory_growth_mb": round((peak_bytes() - before) / 2**20, 1),
    }


def fuzz_requests(seed: int, count: int) -> dict[str, object]:
    """Statuses of `count` requests."""
    statuses: Counter[int] = Counter()
    left, turn, appended, before, started = count, 0, 0, peak_bytes(), time.monotonic()
    while left > 0:
        faulthandler.dump_traceback_later(REQUESTS_PER_SERVER * test_fuzz_http.MOST_S, exit=True)
        with tempfile.TemporaryDirectory() as folder:
            attacked = test_fuzz_http.Attacked(Path(folder), (FLOATS, IMAGES)[turn % 2])
            asyncio.run(attacked.attack(seed + turn, min(left, REQUESTS_PER_SERVER)))
            for check in (
                test_fuzz_http.test_what_was_acknowledged_is_in_the_log_and_nothing_else,
                test_fuzz_http.test_what_was_acknowledged_can_be_read,
                test_fuzz_http.test_every_request_is_counted,
            ):
                check(attacked)
        for (_, status), times in attacked.answers.items():
            statuses[status] += times
        appended += attacked.appended
        left, turn = left - REQUESTS_PER_SERVER, turn + 1
        print(f"{count - max(0, left)} requests in {time.monotonic() - started:.0f} s: {dict(statuses.most_common())}")
    return {
        "requests": count,
        "requests_accounted": sum(statuses.values()),
        "statuses": {str(status): times for status, times in statuses.most_common()},
        "records_appended": appended,
        "requests_memory_growth_mb": round((peak_bytes() - before) / 2**20, 1),
    }


def main() -> None:
    """Run both; an exception is a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the records and requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=100_000)
    given = parser.parse_args()
    share = 100 if given.quick else 1
    warnings.simplefilter("ignore")  # Pillow warns about damaged images
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    found = {"seed": given.seed, **fuzz_records(given.seed, given.records // share)}
    found |= fuzz_requests(given.seed, given.requests // share)
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
