"""All scores of one stream: saved in the checkpoint, and reported together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamlearn.judge.calibration import Calibration, CalibrationReport
from streamlearn.judge.gain import GainReport, TwinGain
from streamlearn.judge.prequential import TOP_K, Prequential, PrequentialReport
from streamlearn.judge.ranking import ranked_classes
from streamlearn.judge.selection_bias import SelectionBias, SelectionReport
from streamlearn.judge.window import group_of, joined
from streamlearn.records import Array


@dataclass(frozen=True, slots=True)
class OracleReport(PrequentialReport):
    """Scores over all samples, by the ground truth of a simulation."""

    twin: GainReport | None
    """None where the twin does not predict on arrival."""


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """All scores; `dataclasses.asdict` gives the JSON of `GET /score`. docs/scores.md describes each."""

    classes: tuple[str, ...]
    at_arrival: PrequentialReport
    at_label: GainReport
    first_minus_at_label: float | None
    calibration: CalibrationReport
    traffic: SelectionReport
    oracle: OracleReport | None
    """None without ground truth."""


class Scoreboard:
    """The scores of one stream. The loop updates each part itself.

    Args:
        classes: their names, by class index.
        window: labels in every windowed score.
        spare: further classes that may get a name later. Until then they count as classes that do not occur.
        named: indices of classes to rank where there are too many to rank all.
        top_k: samples of the highest probability, for precision and recall among them.

    Attributes:
        window: as given.
        prequential: first predictions, scored by labels.
        oracle: the same for every sample, by the ground truth of a simulation.
        oracle_gain: teacher and label-only twin on all samples as they arrive, in a simulation.
        gain: teacher and label-only twin when the label arrives.
        calibration: the probabilities of the served network with and without the correction of the prior.
        traffic: labelled samples compared with all.
    """

    def __init__(
        self,
        classes: Sequence[str],
        *,
        window: int,
        spare: int = 0,
        named: Sequence[int] = (),
        top_k: int = TOP_K,
    ) -> None:
        self.window = window
        self._named = len(classes)
        self._classes = [*classes, *(f"spare {n}" for n in range(spare))]
        capacity = len(self._classes)
        ranked = ranked_classes(capacity, window, named)
        self.prequential = Prequential(capacity, window, ranked=ranked, top_k=top_k)
        self.oracle = Prequential(capacity, window, ranked=ranked, top_k=top_k)
        self.oracle_gain = TwinGain(window)
        self.gain = TwinGain(window)
        self.calibration = Calibration(window)
        self.traffic = SelectionBias(capacity, window)

    def name(self, classes: Sequence[str]) -> None:
        """Name the first classes; names are only ever appended."""
        self._classes[: len(classes)] = classes
        self._named = len(classes)

    def report(self) -> ScoreReport:
        """Every score now."""
        return ScoreReport(
            classes=tuple(self._classes),
            at_arrival=self.prequential.report(),
            at_label=self.gain.report(),
            first_minus_at_label=self.gain.first_minus_at_label(),
            calibration=self.calibration.report(),
            traffic=self.traffic.report(self._named),
            oracle=self._oracle() if self.oracle.scored else None,
        )

    def state(self) -> dict[str, Array]:
        """Copies of all state."""
        return joined({name: part.state() for name, part in self._parts.items()})

    def load(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` saved; of longer windows the newest rows."""
        for name, part in self._parts.items():
            part.load(group_of(state, name))

    @property
    def _parts(self) -> dict[str, Prequential | TwinGain | Calibration | SelectionBias]:
        names = ("prequential", "oracle", "oracle_gain", "gain", "calibration", "traffic")
        return {name: getattr(self, name) for name in names}

    def _oracle(self) -> OracleReport:
        found, twin = self.oracle.report(), self.oracle_gain.report() if len(self.oracle_gain) else None
        return OracleReport(found.windowed, found.faded, found.cumulative, twin)
