"""All that is known about how good the model is, in one place: kept in the checkpoint, and shown as one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamlearn.judge.gain import TwinGain
from streamlearn.judge.prequential import Prequential
from streamlearn.judge.selection_bias import SelectionBias
from streamlearn.judge.window import group_of, joined
from streamlearn.records import Array


class Scoreboard:
    """The scores of one stream; the loop feeds each part by itself.

    Args:
        classes: their names, by class index.
        window: labels in every windowed score.
        fading: what a sample weighs against the one after it, in faded scores.
        bins: of the calibration error.

    Attributes:
        window: as given.
        prequential: first predictions, scored when their label comes.
        oracle: the same of every sample, by the truth that only a simulation sends.
        oracle_gain: teacher and label-only twin on the same samples as they arrive.
        gain: teacher and label-only twin at the time of the label.
        traffic: labelled samples beside all.
    """

    def __init__(
        self, classes: Sequence[str], *, window: int, spare: int = 0, fading: float = 0.999, bins: int = 15
    ) -> None:
        """`spare` classes more may get a name; until then they count as classes that never came."""
        self.window = window
        self._named = len(classes)
        self._classes = [*classes, *(f"spare {n}" for n in range(spare))]
        capacity = len(self._classes)
        self.prequential = Prequential(capacity, window, fading=fading, bins=bins)
        self.oracle = Prequential(capacity, window, fading=fading, bins=bins)
        self.oracle_gain = TwinGain(window)
        self.gain = TwinGain(window)
        self.traffic = SelectionBias(capacity, window)

    def name(self, classes: Sequence[str]) -> None:
        """Spare classes have names by now: all that there are, in their order."""
        self._classes[: len(classes)] = classes
        self._named = len(classes)

    def report(self) -> dict[str, Any]:
        """Every score by name, ready for JSON; None where one is not defined, `oracle` where there is no truth."""
        at_label = self.gain.report()
        return {
            "classes": list(self._classes),
            "at_arrival": self.prequential.report(),
            "at_label": at_label,
            "first_minus_at_label": at_label.pop("first_minus_at_label"),
            "traffic": self.traffic.report(self._named),
            "oracle": self._oracle() if self.oracle.scored else None,
        }

    def state(self) -> dict[str, Array]:
        """All of it, as copies."""
        return joined({name: part.state() for name, part in self._parts().items()})

    def load(self, state: Mapping[str, Array]) -> None:
        """Become what `state` saved; of longer windows the newest stay."""
        for name, part in self._parts().items():
            part.load(group_of(state, name))

    def _parts(self) -> dict[str, Prequential | TwinGain | SelectionBias]:
        return {
            "prequential": self.prequential,
            "oracle": self.oracle,
            "oracle_gain": self.oracle_gain,
            "gain": self.gain,
            "traffic": self.traffic,
        }

    def _oracle(self) -> dict[str, Any]:
        twin = self.oracle_gain.report()
        del twin["first_minus_at_label"]  # they answer once
        return {**self.oracle.report(), "twin": twin if len(self.oracle_gain) else None}
