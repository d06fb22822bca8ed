"""One server in process, for the tests of the API: a real published teacher, codec, ledger and predictor."""

import contextlib

import numpy as np
import torch
from harness.fakes import ManualClock, MemoryLog
from starlette.testclient import TestClient

from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.ledger.view import LedgerView
from streamlearn.log.codec import Codec
from streamlearn.metrics import ServerMetrics
from streamlearn.models.answer import Thresholds
from streamlearn.models.build import ModelSpec, build
from streamlearn.records import Label, Position, Prediction, Sample, Schema
from streamlearn.schema.settings import ColumnConfig, SourceConfig, layout
from streamlearn.serve import schemas
from streamlearn.serve.api import create_app
from streamlearn.serve.appender import Appender
from streamlearn.serve.bodies import Bodies
from streamlearn.serve.parts import Parts
from streamlearn.serve.predictor import Predictor
from streamlearn.serve.settings import ServeConfig
from streamlearn.state.publish import PublishedDir, Publisher

FLOATS = Schema((4,), np.dtype(np.float32), ("cat", "dog", "owl"))
IMAGES = Schema((1, 4, 6), np.dtype(np.uint8), ("cat", "dog"))
ROUTES = [
    ("POST", "/predict", "predict"),
    ("POST", "/label", "label"),
    ("POST", "/sample", "label"),
    ("GET", "/label/requests", "label"),
    ("GET", "/label/{sample_id}", "label"),
    ("GET", "/sample/{sample_id}", "label"),
    ("DELETE", "/sample/{sample_id}", "admin"),
    ("GET", "/model", "predict"),
    ("GET", "/models", "admin"),
    ("POST", "/model/rollback", "admin"),
    ("POST", "/model/promote", "admin"),
    ("GET", "/schema", None),
    ("GET", "/score", None),
    ("GET", "/metrics", None),
    ("GET", "/health/live", None),
    ("GET", "/health/ready", None),
]
"""Every documented route, and the role that it needs; None: any token. Health needs no token."""
COLUMNS = {
    name: ColumnConfig.model_validate(given)
    for name, given in {
        "amount": "number",
        "merchant": {"kind": "category", "buckets": 64},
        "created_at": {"kind": "timestamp", "unit": "ms"},
        "vip": "boolean",
        "country": {"kind": "category", "from": "place.country"},
        "embedding": {"kind": "vector", "size": 2},
        "note": {"kind": "text", "size": 8},
    }.items()
}
MAPPING = {
    "samples": {"id": "transaction_id", "time": "created_at", "time_unit": "ms", "label": "verdict", "domain": "shop"},
    "labels": {
        "id": "transaction_id",
        "label": "is_fraud",
        "time": "judged_at",
        "values": {"true": "fraud", "false": "legitimate"},
    },
}
RECORD = {
    "transaction_id": "t1",
    "amount": 12.5,
    "merchant": "m7",
    "created_at": 1_772_733_600_000,
    "vip": True,
    "place": {"country": "DE"},
    "embedding": [0.25, -1.0],
    "note": "late and large",
    "shop": "web",
    "more": [1, {"a": None}],
}
"""A record of `COLUMNS`, under `MAPPING`, with a field that nothing names."""
URL = "http://localhost"
"""A server without a token accepts only loopback names."""
X = [0.5, -1.0, 2.0, 0.25]
RAW = {"content-type": "application/octet-stream"}
NPY = {"content-type": "application/x-npy"}
JSON = {"content-type": "application/json"}


def record_codec(mapping=MAPPING, columns=COLUMNS):
    """A codec with columns."""
    row = layout(columns)
    width = sum(column.width for column in row)
    schema = Schema((width,), np.dtype(np.float32), ("fraud", "legitimate"), columns=row)
    return Codec(schema, SourceConfig.model_validate(mapping), columns=columns, max_record_bytes=100_000)


class Served:
    """One server and its surroundings. `settings` are those of [serve]; `app_with` takes other parts."""

    def __init__(self, folder, schema=FLOATS, *, codec=None, queue=16, max_items=8, **settings) -> None:
        schema = schema if codec is None else codec.schema
        self.schema, self.folder = schema, folder
        factory, shape = "table" if schema.columns else "mlp", schema.shape
        self.spec = ModelSpec(factory, {"hidden": (5,)}, shape, schema.capacity, True, 1.0, columns=schema.columns)
        self.clock = ManualClock(1_000_000.0)
        self.log = MemoryLog()
        self.log.create_topics({"clicks": 2, "truths": 2})
        self.codec = codec or Codec(schema, max_record_bytes=100_000)
        self.metrics = ServerMetrics(version="1.2.3")
        self.status = {"time_s": self.clock.now_s, "state": "learning", "step": 7}
        self.siblings = {}
        self.scores = {"time_s": self.clock.now_s, "at_arrival": {"windowed": {"accuracy": {"teacher": 0.5}}}}
        self.publisher = Publisher(folder / "published", keep=3, clock=self.clock)
        self.view = LedgerView(folder / "store", schema)
        self.predictor = Predictor(PublishedDir(folder / "published"), schema, self.metrics)
        self.settings = ServeConfig(**{"max_body_bytes": 4096, "timeout_s": 20.0, **settings})
        self.parts = {
            "settings": self.settings,
            "name": "server-0",
            "samples_topic": "clicks",
            "labels_topic": "truths",
            "codec": self.codec,
            "predictor": self.predictor,
            "thresholds": Thresholds(schema, {}),
            "appender": Appender(lambda: self.log, self.metrics, timeout_s=self.settings.timeout_s),
            "ledger": self.view,
            "requests": None,
            "metrics": self.metrics,
            "learner_status": lambda: self.status,
            "siblings": lambda: self.siblings,
            "scores": lambda: self.scores,
            "clock": self.clock,
            "queue": queue,
            "max_items": max_items,
        }
        self.app = self.app_with()

    def app_with(self, **parts):
        """The application, with some parts replaced."""
        return create_app(Parts(**{**self.parts, **parts}))

    @staticmethod
    def bodies_of(codec):
        """The decoder of bodies, without a server."""
        return Bodies(codec, ServerMetrics(version="1.2.3"), max_bytes=1 << 20, timeout_s=1.0)

    def publish(self, step, *, scale=1.0, **metadata):
        """Publish a teacher whose weights are a function of the step."""
        arrays = {name: tensor.numpy() * np.float32(scale) for name, tensor in self.network(step).state_dict().items()}
        self.publisher.publish(step, arrays, {"model_spec": self.spec.to_json(), **metadata})

    def network(self, step):
        return build(self.spec, seed=step).eval()

    def expected(self, step, *rows):
        """The answers of the teacher of a step, computed without the server."""
        with torch.inference_mode():
            x = torch.from_numpy(np.array(rows, self.schema.dtype))
            return self.network(step)(x).softmax(dim=1).numpy()

    def ledger(self):
        """The learner's ledger, to add samples and labels."""
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
    """Check the shape that every error has, and return its object."""
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
    error = schemas.Error.model_validate(reply.json()).error
    assert error.code == code, error
    assert len(error.message) > 10
    assert error.request_id == reply.headers["x-request-id"]
    return error


def store(served, sample_id, x, *, step=1, label=None):
    """Add a sample and its label to the learner's ledger."""
    ledger = served.ledger()
    ledger.begin(step, 100.0)
    prediction = Prediction(1, np.float32([0.1, 0.8, 0.1])[: served.schema.capacity], 5)
    position = Position("clicks", 0, step)
    ledger.sample_arrived(Sample(position, 100.0, sample_id, np.array(x, served.schema.dtype)), prediction, 0)
    if label is not None:
        ledger.label_arrived(Label(Position("truths", 0, step), 101.0, sample_id, label))
        ledger.trained([sample_id])
    ledger.end()
    ledger.flush()
    ledger.close()
