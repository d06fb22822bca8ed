"""One server in process, for the tests of the API: a real published teacher, codec, ledger and predictor."""

import contextlib
from dataclasses import replace

import numpy as np
import torch
from starlette.testclient import TestClient

from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.ledger.view import LedgerView
from streamlearn.log.codec import Codec
from streamlearn.metrics import ServerMetrics
from streamlearn.models.build import ModelSpec, build
from streamlearn.records import Label, Position, Prediction, Sample, Schema
from streamlearn.serve import schemas
from streamlearn.serve.api import create_app
from streamlearn.serve.parts import ServerParts, ServeSettings
from streamlearn.serve.predictor import Predictor
from streamlearn.state.publish import PublishedDir, Publisher
from streamlearn.testing import ManualClock, MemoryLog

FLOATS = Schema((4,), np.dtype(np.float32), ("cat", "dog", "owl"))
IMAGES = Schema((1, 4, 6), np.dtype(np.uint8), ("cat", "dog"))
SETTINGS = ServeSettings(
    name="server-0",
    version="1.2.3",
    samples_topic="clicks",
    labels_topic="truths",
    token=None,
    max_body_bytes=4096,
    max_instances=8,
    queue=16,
    batch=4,
    timeout_s=20.0,
    stale_after_s=60.0,
)
URL = "http://localhost"
"""A server without a token answers to no other names than loopback's."""
X = [0.5, -1.0, 2.0, 0.25]
RAW = {"content-type": "application/octet-stream"}
NPY = {"content-type": "application/x-npy"}
JSON = {"content-type": "application/json"}


class Served:
    """One server and everything around it."""

    def __init__(self, folder, schema=FLOATS, **settings) -> None:
        self.schema, self.folder = schema, folder
        self.spec = ModelSpec("mlp", {"hidden": (5,)}, schema.shape, len(schema.classes), normalise=True, scale=1.0)
        self.clock = ManualClock(1_000_000.0)
        self.log = MemoryLog()
        self.log.create_topics({"clicks": 2, "truths": 2})
        self.codec = Codec(schema, max_record_bytes=100_000)
        self.metrics = ServerMetrics(version="1.2.3")
        self.status = {"time_s": self.clock.now_s, "state": "learning", "step": 7}
        self.siblings = {}
        self.scores = {"time_s": self.clock.now_s, "at_arrival": {"windowed": {"accuracy": {"teacher": 0.5}}}}
        self.publisher = Publisher(folder / "published", keep=3, clock=self.clock)
        self.view = LedgerView(folder / "store", schema)
        self.parts = ServerParts(
            schema=schema,
            codec=self.codec,
            log=self.log,
            predictor=Predictor(PublishedDir(folder / "published"), schema, self.metrics, threads=1),
            ledger=self.view,
            metrics=self.metrics,
            learner_status=lambda: self.status,
            siblings=lambda: self.siblings,
            scores=lambda: self.scores,
            clock=self.clock,
        )
        self.settings = replace(SETTINGS, **settings)
        self.app = create_app(self.parts, self.settings)

    def publish(self, step, *, scale=1.0, **metadata):
        """Publish a teacher; its weights are a function of the step."""
        arrays = {name: tensor.numpy() * np.float32(scale) for name, tensor in self.network(step).state_dict().items()}
        self.publisher.publish(step, arrays, {"model_spec": self.spec.to_json(), **metadata})

    def network(self, step):
        return build(self.spec, seed=step).eval()

    def expected(self, step, *rows):
        """What the teacher of a step says of rows, computed beside the server."""
        with torch.inference_mode():
            x = torch.from_numpy(np.array(rows, self.schema.dtype))
            return self.network(step)(x).softmax(dim=1).numpy()

    def ledger(self):
        """The learner's ledger, to put samples and labels in."""
        return Ledger(
            self.folder / "store",
            self.schema,
            LabelsConfig(horizon_s=1e6),
            read_back=lambda *_: None,
        )

    def records(self, topic):
        return self.log.records(topic)


@contextlib.contextmanager
def client_of(served, **options):
    with TestClient(served.app, base_url=URL, **options) as client:
        yield client


def error_of(reply, status, code):
    """Check the shape that every error has, and give its object."""
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
    told = schemas.Error.model_validate(reply.json()).error
    assert told.code == code, told
    assert len(told.message) > 10
    assert told.request_id == reply.headers["x-request-id"]
    return told


def store(served, sample_id, x, *, step=1, label=None):
    """Let the learner's ledger know a sample, and a label of it."""
    ledger = served.ledger()
    ledger.begin(step, 100.0)
    prediction = Prediction(1, np.float32([0.1, 0.8, 0.1]), 5)
    position = Position("clicks", 0, step)
    ledger.sample_arrived(Sample(position, 100.0, sample_id, np.array(x, served.schema.dtype)), prediction, 0)
    if label is not None:
        ledger.label_arrived(Label(Position("truths", 0, step), 101.0, sample_id, label))
        ledger.trained([sample_id])
    ledger.end()
    ledger.flush()
    ledger.close()
