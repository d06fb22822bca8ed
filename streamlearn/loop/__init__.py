"""The loop (`loop`), what it moves (`parts`), and who watches over the model in it (`guarding`)."""

from streamlearn.loop.loop import Pipeline
from streamlearn.loop.parts import Cadence, Parts, StepReport

__all__ = ["Cadence", "Parts", "Pipeline", "StepReport"]
