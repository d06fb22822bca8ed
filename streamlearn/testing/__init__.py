"""For tests of this package and of what is built on it: fakes here, and a harness that kills real processes.

fakes      a log in memory, a clock by hand, a faulty disk, a crash on cue; all of them are named here as well
soak       the harness: sends a stream, kills whoever takes part, demands that nothing is lost or learned twice
plan       which faults, drawn from a seed         nursery    starts processes fast, by forking one that is warm
producer   sends samples and labels over HTTP, and notes what was acknowledged
damage     what a bad disk does to files           disk       a small one, to be filled
retention  takes the log past a checkpoint         verify     reads the log alone, and says what must be learned
startups   kills processes while they start, in bursts, started as a user starts them
stretch    holds the killed learner against one without faults, between gaps of the log
report     what was done, and what came of it
hour       steady work for an hour: do memory, open files and disk stay flat?
"""

from streamlearn.testing.fakes import (
    FaultyFiles,
    InjectedCrash,
    ManualClock,
    MemoryLog,
    MemoryReader,
    Operation,
    lost_acknowledgement,
)

__all__ = [
    "FaultyFiles",
    "InjectedCrash",
    "ManualClock",
    "MemoryLog",
    "MemoryReader",
    "Operation",
    "lost_acknowledgement",
]
