"""The HTTP API, in process: a real published teacher, codec, ledger and predictor; the log is in memory."""

import asyncio
import http.server
import io
import json
import threading
from dataclasses import replace

import numpy as np
import orjson
import pytest
from harness.fakes import lost_acknowledgement
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from served import FLOATS, IMAGES, JSON, NPY, RAW, ROUTES, URL, Served, X, client_of, error_of, store
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from streamlearn.errors import LogError, LogUnavailableError
from streamlearn.ledger.store import FILE as STORE_FILE
from streamlearn.ledger.view import LedgerView
from streamlearn.log.codec import Codec
from streamlearn.metrics import LEARNER_METRICS, Metrics, MetricsServer, ServerMetrics
from streamlearn.models.answer import Thresholds
from streamlearn.records import ERASED, RETRACTED, UNLABELLED, Label, Position, Prediction, Record, Sample, Schema
from streamlearn.serve import request_schemas, schemas
from streamlearn.serve.held_bytes import BODIES_IN_FLIGHT

FIELDS = ["x", "id", "ids", "instances", "learn", "labels", "samples", "label", "class", "time", "source", "domain"]


@pytest.fixture
def served(tmp_path):
    served = Served(tmp_path)
    served.publish(7)
    yield served
    served.view.close()


@pytest.fixture
def client(served):
    with client_of(served) as client:
        yield client


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """One client for requests that are refused, which leave no state."""
    served = Served(tmp_path_factory.mktemp("refusing"))
    served.publish(7)
    with client_of(served) as client:
        client.served = served
        yield client
    served.view.close()


@pytest.fixture(scope="module")
def taking(tmp_path_factory):
    """One client for arbitrary requests; its appends do not matter."""
    served = Served(tmp_path_factory.mktemp("taking"))
    served.publish(7)
    with client_of(served) as client:
        yield client
    served.view.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with a token that is not ASCII."""
    served = Served(tmp_path_factory.mktemp("guarded"), token="sésame")
    served.publish(7)
    with client_of(served) as client:
        yield client
    served.view.close()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


class TestPredict:
    def test_one_sample_gets_the_published_teachers_answer(self, client, served):
        """Class, index and probabilities are the network's own, digit for digit; the answer names its teacher."""
        served.clock.advance(2.5)

        reply = client.post("/predict", json={"x": X})

        assert reply.status_code == 200
        reported = schemas.PredictReply.model_validate(reply.json())
        expected = served.expected(7, X)[0]
        assert np.float32(reported.predictions[0].probabilities).tolist() == expected.tolist()
        assert reported.predictions[0].class_index == expected.argmax()
        assert reported.predictions[0].class_ == FLOATS.classes[expected.argmax()]
        assert (reported.model_version, reported.age_s) == (7, 2.5)
        assert reported.published_at == "1970-01-12T13:46:40.000+00:00"
        assert (reply.headers["x-model-version"], reply.headers["x-model-age-s"]) == ("7", "2.500")

    @pytest.mark.parametrize(
        ("body", "headers"),
        [
            (orjson.dumps({"instances": [X, [1, 2, 3, 4]]}), JSON),
            (orjson.dumps({"instances": [X, [1, 2, 3, 4]]}), {"content-type": "Application/JSON; charset=utf-8"}),
            (np.array([X, [1, 2, 3, 4]], np.float32).tobytes(), RAW),
            (npy(np.array([X, [1, 2, 3, 4]], np.float32)), NPY),
        ],
        ids=["json", "json with charset", "raw", "npy"],
    )
    def test_several_samples_are_answered_in_order_in_any_format(self, client, served, body, headers):
        """JSON, a raw tensor and .npy are equivalent."""
        reply = client.post("/predict", content=body, headers=headers)

        found = np.float32([one["probabilities"] for one in reply.json()["predictions"]])
        np.testing.assert_allclose(found, served.expected(7, X, [1, 2, 3, 4]), rtol=1e-6)

    @pytest.mark.parametrize(
        ("body", "headers"),
        [(np.float32(X).tobytes(), RAW), (npy(np.float32(X)), NPY), (npy(np.float32([X])), NPY)],
        ids=["raw", "npy", "npy of one"],
    )
    def test_a_binary_body_may_hold_one_sample(self, client, served, body, headers):
        """With or without a leading dimension of one; its id is in the query."""
        reply = client.post("/predict?id=ä%2F1", content=body, headers=headers)

        (answer,) = reply.json()["predictions"]
        assert answer["id"] == "ä/1"
        assert np.float32(answer["probabilities"]).tolist() == served.expected(7, X)[0].tolist()

    def test_an_image_is_a_sample_of_an_image_schema(self, tmp_path):
        """A PNG is decoded to the schema's shape."""
        served = Served(tmp_path, IMAGES)
        served.publish(7)
        pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")

        with client_of(served) as client:
            reply = client.post("/predict", content=file.getvalue(), headers={"content-type": "image/png"})

        assert (
            np.float32(reply.json()["predictions"][0]["probabilities"]).tolist()
            == served.expected(7, [pixels])[0].tolist()
        )

    def test_stored_samples_are_predicted_by_their_ids(self, client, served):
        """Payloads come from the learner's store, in the order of the ids; repeats are allowed."""
        store(served, "a", X)
        store(served, "b", [1, 2, 3, 4], step=2)

        reply = client.post("/predict", json={"ids": ["b", "a", "b"]})

        assert [one["id"] for one in reply.json()["predictions"]] == ["b", "a", "b"]
        found = np.float32([one["probabilities"] for one in reply.json()["predictions"]])
        np.testing.assert_allclose(found, served.expected(7, [1, 2, 3, 4], X, [1, 2, 3, 4]), rtol=1e-6)

    def test_bytes_of_stored_samples_are_bounded_like_a_body(self, tmp_path):
        """A few bytes of ids may stand for many bytes of payload; those of all requests are counted together."""
        served = Served(tmp_path, max_body_bytes=1024, max_items=100)
        served.publish(7)
        store(served, "a", X)
        with client_of(served) as client:
            many = client.post("/predict", json={"ids": ["a"] * 65})
            few = [client.post("/predict", json={"ids": ["a"] * 64}) for _ in range(30)]
        served.view.close()

        assert "1040 bytes, more than the maximum of 1024" in error_of(many, 413, "body_too_large").message
        assert [reply.status_code for reply in few] == [200] * 30, "bytes are not given back"

    def test_nothing_is_read_from_the_store_before_the_model_is_fresh(self, tmp_path, monkeypatch):
        """A waiting request holds only ids."""
        served = Served(tmp_path, timeout_s=2.0)
        served.publish(7)
        store(served, "a", X)
        asked = []
        payload = LedgerView.payload
        monkeypatch.setattr(LedgerView, "payload", lambda view, name: asked.append(name) or payload(view, name))

        with client_of(served) as client:
            error_of(client.post("/predict?min_version=99", json={"ids": ["a"]}), 503, "model_not_fresh")
            waited = list(asked)
            client.post("/predict?min_version=7", json={"ids": ["a"]})

        assert waited == []
        assert asked == ["a"]

    @pytest.mark.parametrize(
        ("method", "path", "known"),
        [
            ("post", "/predict?lern=true", "learn"),
            ("post", "/sample?ids=a", "id"),
            ("get", "/label/requests?count=3", "n, peek"),
            ("get", "/label/a?wait=3", "wait_s"),
        ],
    )
    def test_a_misspelt_parameter_is_refused(self, refusing, method, path, known):
        """Otherwise a sample would be answered, and silently not learned."""
        body = {"json": {"x": X}} if method == "post" else {}

        error = error_of(getattr(refusing, method)(path, **body), 422, "invalid_parameter")

        assert error.message.startswith("unknown parameter ")
        assert known in error.message

    @pytest.mark.parametrize(
        ("path", "body", "reported"),
        [
            ("/sample", {"items": [{"id": "a", "x": X}]}, "expected several items in samples"),
            ("/label", {"items": [{"id": "a", "label": "cat"}]}, "expected several items in labels"),
            ("/sample?id=a", {"x": X}, "put ids into the body"),
            ("/predict", {"instances": [{"id": "a", "x": X, "label": "cat"}]}, 'objects with "x" and "id" only'),
            ("/predict", {"instances": [{"x": X}, X]}, "instances[1]: expected payloads only"),
            ("/predict", {"instances": [{"x": X}], "ids": ["a"]}, "instances[0]: "),
        ],
    )
    def test_a_body_of_another_form_gets_the_right_form_in_the_error(self, refusing, path, body, reported):
        """By the name of the intended field."""
        assert reported in error_of(refusing.post(path, json=body), 422, "invalid_body").message

    def test_instances_may_be_samples_as_they_are_appended(self, client):
        """With their ids, as far as they have one."""
        reply = client.post("/predict", json={"instances": [{"x": X, "id": "a"}, {"x": X}]})

        assert [one["id"] for one in reply.json()["predictions"]] == ["a", None]
        assert (
            reply.json()["predictions"][1]["class"]
            == client.post("/predict", json={"x": X}).json()["predictions"][0]["class"]
        )

    def test_unknown_ids_are_named(self, client, served):
        """404 with the missing ids."""
        store(served, "a", X)

        reported = error_of(client.post("/predict", json={"ids": ["a", "nö", "b"]}), 404, "unknown_sample")

        assert reported.details == {"missing": ["nö", "b"]}

    def test_changes_nothing(self, client, served):
        """I8: without `learn` neither the log nor the state folder changes."""
        before = {path: path.read_bytes() for path in served.folder.rglob("*") if path.is_file()}

        client.post("/predict", json={"instances": [X, X], "ids": ["a", "b"]})

        assert served.records("clicks") == served.records("truths") == []
        assert {path: path.read_bytes() for path in served.folder.rglob("*") if path.is_file()} == before

    def test_before_the_first_teacher_is_503(self, tmp_path):
        """With Retry-After."""
        with client_of(Served(tmp_path)) as client:
            reply = client.post("/predict", json={"x": X})

        error_of(reply, 503, "not_published")
        assert reply.headers["retry-after"] == "1"

    def test_values_that_drive_the_model_to_nan_are_refused(self, tmp_path):
        """Finite input and weights, no finite answer: 422 rather than null probabilities."""
        served = Served(tmp_path)
        served.spec = replace(served.spec, normalise=False)
        served.publish(7, scale=1e18)

        with client_of(served) as client:
            reported = error_of(
                client.post("/predict", json={"instances": [[0, 0, 0, 0], [1e19] * 4]}), 422, "not_finite"
            )

        assert reported.details == {"instances": [1]}


class TestDecision:
    def test_a_threshold_decides_the_class(self, served):
        """The probabilities are the same, and the answer in the log is that of the reply."""
        served.publish(7)
        served.predictor.refresh()
        probs_C = served.expected(7, X)[0]
        least = int(probs_C.argmin())
        thresholds = Thresholds(FLOATS, {FLOATS.classes[least]: float(probs_C[least]) / 2})

        with TestClient(served.app_with(thresholds=thresholds), base_url=URL) as client:
            (answer,) = client.post("/predict?learn=true", json={"x": X}).json()["predictions"]

        assert answer["class"] == FLOATS.classes[least]
        assert np.float32(answer["probabilities"]).tolist() == probs_C.tolist()
        (record,) = served.records("clicks")
        assert served.codec.decode_sample(record).answer.class_index == least

    def test_probabilities_are_those_for_the_class_shares_of_the_stream(self, client, served):
        """By the offsets in the header of the teacher."""
        offsets_C = [0.5, -3.0, 1.0]
        served.publish(8, log_offsets=json.dumps(offsets_C))
        served.predictor.refresh()

        (answer,) = client.post("/predict", json={"x": X}).json()["predictions"]

        expected_C = served.expected(8, X)[0] * np.exp(offsets_C)
        assert answer["probabilities"] == pytest.approx(expected_C / expected_C.sum(), rel=1e-5)
        assert answer["class_index"] == expected_C.argmax()


class TestFreshness:
    def test_a_published_version_satisfies_min_version(self, client):
        """The version itself does."""
        assert client.post("/predict?min_version=7&max_age_s=5", json={"x": X}).status_code == 200

    @pytest.mark.parametrize("query", ["min_version=8", "max_age_s=1.5"])
    def test_a_model_that_is_not_fresh_in_time_is_503(self, tmp_path, query):
        """The wait is bounded. The code differs from that of a missing first model."""
        served = Served(tmp_path, timeout_s=0.1)
        served.publish(7)
        served.clock.advance(2.0)

        with client_of(served) as client:
            reply = client.post(f"/predict?{query}", json={"x": X})

        error_of(reply, 503, "model_not_fresh")
        assert reply.headers["retry-after"] == "1"

    def test_a_wait_ends_when_the_newer_teacher_is_published(self, client, served):
        """The request is then answered by it."""
        served.metrics.queue_length(0)
        publishing = threading.Timer(0.1, served.publish, [9])
        publishing.start()

        reply = client.post("/predict?min_version=8", json={"x": X})
        publishing.join()

        assert reply.json()["model_version"] == 9

    @pytest.mark.parametrize(
        "query", ["min_version=-1", "min_version=x", "max_age_s=nan", "max_age_s=-1", "learn=maybe"]
    )
    def test_an_invalid_parameter_is_422(self, client, query):
        """FastAPI's validation errors have the one shape too, and name the parameter."""
        reported = error_of(client.post(f"/predict?{query}", json={"x": X}), 422, "invalid_parameter")

        assert query.split("=")[0] in reported.message


class TestAfter:
    """Read your own labels: an answer from a teacher that has learned all up to a position."""

    @pytest.fixture
    def hasty(self, tmp_path):
        """A server that waits at most a tenth of a second."""
        served = Served(tmp_path, timeout_s=0.1)
        with client_of(served) as client:
            client.served = served
            yield client
        served.view.close()

    def publish(self, client, step, **learned):
        """A teacher that has learned the labels below some offsets."""
        metadata = {"learned_offsets": json.dumps({name.replace("_", ":"): at for name, at in learned.items()})}
        client.served.publish(step, **metadata)
        client.served.predictor.refresh()

    @pytest.mark.parametrize(
        "after",
        [
            ["truths:1:41"],
            ["truths:1:3", "truths:1:41", "clicks:0:0"],
            ['{"topic": "truths", "partition": 1, "offset": 41}'],
        ],
        ids=["text", "several", "object"],
    )
    def test_a_learned_position_is_answered_at_once(self, hasty, after):
        """Positions below the partition's next offset are learned."""
        self.publish(hasty, 7, truths_1=42, clicks_0=1)

        assert hasty.post("/predict", params={"after": after}, json={"x": X}).json()["model_version"] == 7

    @pytest.mark.parametrize(
        ("after", "reported"),
        [
            ("truths:1:42", "Version 7 has learned truths:1 before 42, requested was 42"),
            ("truths:0:0", "Version 7 has learned truths:0 before 0, requested was 0"),
        ],
    )
    def test_a_position_that_is_not_learned_in_time_is_503(self, hasty, after, reported):
        """Nothing is learned of a partition that the teacher does not name."""
        self.publish(hasty, 7, truths_1=42)

        reply = hasty.post("/predict", params={"after": [after, "truths:1:1"]}, json={"x": X})

        assert error_of(reply, 503, "model_not_fresh").message.startswith(reported)

    def test_a_teacher_without_learned_offsets_is_503(self, hasty):
        """An older version published it; the error says so."""
        hasty.served.publish(7)
        hasty.served.predictor.refresh()

        reply = hasty.post("/predict?after=truths:1:0", json={"x": X})

        assert "does not list the labels it has learned" in error_of(reply, 503, "model_not_fresh").message

    def test_the_position_in_a_reply_can_be_waited_for(self, client, served):
        """POST a label, pass its position to /predict: the first teacher that has learned it answers."""
        position = client.post("/label", json={"id": "a", "label": "dog"}).json()["items"][0]["position"]
        name = f"{position['topic']}:{position['partition']}"
        offsets = json.dumps({name: position["offset"] + 1})
        publishing = threading.Timer(0.1, served.publish, [9], {"learned_offsets": offsets})
        publishing.start()

        reply = client.post("/predict", params={"after": json.dumps(position)}, json={"x": X})
        publishing.join()

        assert reply.json()["model_version"] == 9

    @pytest.mark.parametrize(
        "after",
        [
            "",
            "truths",
            "truths:0",
            "truths:0:-1",
            "truths:0:x",
            "truths:0:1:2",
            "truths:0:" + "9" * 19,
            "a b:0:1",
            "dead-letters:0:1",
            "{",
            "{}",
            '{"topic": "truths", "partition": 0}',
            '{"topic": "truths", "partition": 0, "offset": 1.5}',
            '{"topic": "truths", "partition": 0, "offset": true}',
        ],
    )
    def test_an_invalid_position_is_422(self, refusing, after):
        """With an example, or the valid topics."""
        reported = error_of(refusing.post("/predict", params={"after": after}, json={"x": X}), 422, "invalid_parameter")

        assert "truths" in reported.message

    def test_positions_are_bounded(self, refusing):
        """To the labels of one request."""
        params = {"after": ["truths:0:1"] * 9}

        error_of(refusing.post("/predict", params=params, json={"x": X}), 422, "invalid_parameter")


class TestPredictAndLearn:
    @pytest.mark.parametrize(
        ("url", "content", "headers"),
        [
            ("/predict", orjson.dumps({"x": X, "id": "ü/1", "learn": True}), JSON),
            ("/predict?learn=true", orjson.dumps({"instances": [X], "ids": ["ü/1"]}), JSON),
            ("/predict?learn=true&id=ü/1", np.float32(X).tobytes(), RAW),
        ],
        ids=["body", "query", "binary"],
    )
    def test_appends_the_sample_with_the_answer_that_was_given(self, client, served, url, content, headers):
        """The learner reads the payload, the id, and this answer."""
        reply = client.post(url, content=content, headers=headers)

        (record,) = served.records("clicks")
        sample = served.codec.decode_sample(record)
        (answer,) = reply.json()["predictions"]
        assert (sample.sample_id, sample.x.tolist(), answer["id"]) == ("ü/1", X, "ü/1")
        assert sample.answer is not None
        assert (sample.answer.class_index, sample.answer.model_version) == (answer["class_index"], 7)
        assert sample.answer.probabilities_C.tolist() == np.float32(answer["probabilities"]).tolist()
        assert answer["position"] == record.position._asdict()
        assert served.records("truths") == []

    def test_makes_missing_ids(self, client, served):
        """They are returned, so that labels can refer to the samples."""
        reply = client.post("/predict", json={"instances": [X, X], "learn": True})

        ids = [one["id"] for one in reply.json()["predictions"]]
        assert len(set(ids)) == 2
        assert {record.key.decode() for record in served.records("clicks")} == set(ids)

    def test_a_sample_that_is_not_durable_is_503(self, client, served):
        """I2: no 200 before the log has it. The error has the ids, so that a retry is safe."""
        served.log.fail("append", lost_acknowledgement(), applied=True)

        reply = client.post("/predict", json={"x": X, "learn": True})

        reported = error_of(reply, 503, "log_unavailable")
        assert reported.details == {"ids": [served.records("clicks")[0].key.decode()]}
        assert reply.headers["retry-after"] == "1"

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            ({"instances": [X, X], "ids": ["a", "a"], "learn": True}, "duplicate_id"),
            ({"ids": ["a"], "learn": True}, "invalid_body"),
            ({"x": X, "learn": "yes"}, "invalid_body"),
            ({"x": X, "id": "", "learn": True}, "no_id"),
        ],
    )
    def test_a_request_that_cannot_be_learned_is_refused(self, client, served, body, code):
        """Nothing is predicted or appended."""
        error_of(client.post("/predict", json=body), 422, code)

        assert served.records("clicks") == []


BAD_PREDICT_BODIES = [
    (b"", "not_json"),
    (b"{", "not_json"),
    (b"[1,2,3,4]", "not_json"),
    (b'"x"', "not_json"),
    (b'{"x": [1e39, 0, 0, 0]}', "not_finite"),
    (b'{"x": [1e30, 0, 0, 0]}', "not_finite"),
    (b'{"x": ' + b"[" * 1500 + b"]" * 1500 + b"}", "not_json"),
    (b'{"x": ' + b"[" * 500 + b"]" * 500 + b"}", "bad_shape"),
    (b'{"instances": ' + b"[" * 500 + b"]" * 500 + b"}", "bad_shape"),
    (b"\xff\xfe", "not_json"),
    (b'{"x": "\\ud800"}', "not_json"),
    (b"{}", "invalid_body"),
    (b'{"x": null}', "invalid_body"),
    (b'{"x": [1, 2, 3]}', "bad_shape"),
    (b'{"x": [1, 2, 3, 4, 5]}', "bad_shape"),
    (b'{"x": []}', "bad_shape"),
    (b'{"x": 3}', "bad_shape"),
    (b'{"x": {"a": 1}}', "bad_shape"),
    (b'{"x": ["1", 2, 3, 4]}', "bad_dtype"),
    (b'{"instances": []}', "invalid_body"),
    (b'{"instances": {}}', "invalid_body"),
    (b'{"instances": [[1, 2, 3, 4], [1, 2]]}', "bad_shape"),
    (b'{"instances": [' + b",".join([b"[1,2,3,4]"] * 9) + b"]}", "invalid_body"),
    (b'{"ids": []}', "invalid_body"),
    (b'{"ids": "a"}', "invalid_body"),
    (b'{"ids": [true]}', "no_id"),
    (b'{"ids": [{"a": []}]}', "no_id"),
    (b'{"ids": ["' + b"a" * 513 + b'"]}', "no_id"),
    (b'{"x": [1, 2, 3, 4], "instances": [[1, 2, 3, 4]]}', "invalid_body"),
    (b'{"instances": [[1, 2, 3, 4]], "ids": ["a", "b"]}', "invalid_body"),
    (b'{"x": [1, 2, 3, 4], "lable": "cat"}', "invalid_body"),
]


class TestBadBodies:
    @pytest.mark.parametrize(
        ("body", "code"), BAD_PREDICT_BODIES, ids=[str(body[:50]) for body, _ in BAD_PREDICT_BODIES]
    )
    def test_an_invalid_json_body_is_422(self, refusing, body, code):
        """Never 500. The code has the kind of error."""
        error_of(refusing.post("/predict", content=body, headers=JSON), 422, code)

    def test_the_wrong_instance_is_named(self, refusing):
        """The first invalid one of several."""
        reported = error_of(refusing.post("/predict", json={"instances": [X, X, [1]]}), 422, "bad_shape")

        assert reported.message.startswith("instances[2]: ")

    @pytest.mark.parametrize(
        ("body", "headers", "code"),
        [
            (b"", RAW, "bad_shape"),
            (b"123", RAW, "bad_shape"),
            (np.zeros(4 * 9, np.float32).tobytes(), RAW, "invalid_body"),
            (np.full(8, np.nan, np.float32).tobytes(), RAW, "not_finite"),
            (np.full(8, -1e30, np.float32).tobytes(), RAW, "not_finite"),
            (npy(np.zeros(5, np.float32)), NPY, "bad_shape"),
            (npy(np.zeros((0, 4), np.float32)), NPY, "invalid_body"),
            (npy(np.zeros((9, 4), np.float32)), NPY, "invalid_body"),
            (npy(np.zeros((2, 4), np.float64)), NPY, "bad_dtype"),
            (b"\x93NUMPY\x01\x00\x76\x00{'descr': '|O', 'shape': (2, 4)}", NPY, "bad_dtype"),
            (b"garbage", NPY, "bad_shape"),
        ],
    )
    def test_an_invalid_binary_body_is_422(self, refusing, body, headers, code):
        """Sizes, shapes and dtypes are checked before anything is built."""
        error_of(refusing.post("/predict", content=body, headers=headers), 422, code)

    def test_ids_must_fit_the_rows_of_a_binary_body(self, refusing):
        """One for each sample, or none."""
        two = np.zeros(8, np.float32).tobytes()

        error_of(refusing.post("/predict?id=a", content=two, headers=RAW), 422, "invalid_body")
        assert refusing.post("/predict?id=a&id=b", content=two, headers=RAW).status_code == 200

    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "", "image/png", "multipart/form-data"]
    )
    @pytest.mark.parametrize("route", ["/predict", "/sample", "/label"])
    def test_another_content_type_is_415(self, refusing, route, kind):
        """Forms in particular: a foreign web page can make a browser send them."""
        reported = error_of(
            refusing.post(route, content=b"{}", headers={"content-type": kind}), 415, "bad_content_type"
        )

        assert "expected" in reported.message or "none of" in reported.message

    @pytest.mark.parametrize("route", ["/predict", "/sample", "/label"])
    def test_a_body_that_is_declared_too_large_is_413(self, client, route):
        """By its Content-Length. The connection is closed, and the body is not read."""
        reply = client.post(route, content=b" " * 4097, headers=JSON)

        error_of(reply, 413, "body_too_large")
        assert reply.headers["connection"] == "close"
        assert (
            'streamlearn_rejected_total{process="server-0",reason="body_too_large"} 1.0' in client.get("/metrics").text
        )

    def test_a_body_that_grows_too_large_is_413(self, refusing):
        """Without a Content-Length the bytes are counted."""

        def chunks():
            for _ in range(5):
                yield b" " * 1000

        error_of(refusing.post("/predict", content=chunks(), headers=JSON), 413, "body_too_large")

    def test_a_declared_size_is_refused_before_a_byte_is_read(self, served):
        """A declared gigabyte is not received."""
        sent = []

        async def receive():
            pytest.fail("the body was read")

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", b"1073741824")]
        scope = {"type": "http", "method": "POST", "path": "/label", "query_string": b"", "headers": headers}
        asyncio.run(served.app(scope, receive, send))

        assert sent[0]["status"] == 413

    def test_bodies_of_the_largest_size_are_accepted_repeatedly(self, refusing):
        """The bound is inclusive, and the bytes are released with the request."""
        body = orjson.dumps({"x": X}).ljust(4096)

        for _ in range(BODIES_IN_FLIGHT + 2):
            assert refusing.post("/predict", content=body, headers=JSON).status_code == 200


class TestLabel:
    def test_one_label_is_durable_in_the_log_before_202(self, client, served):
        """D1. The reply has its position."""
        body = {"id": "rechnung-ä", "label": "dog", "time": "2026-11-24T09:00:00Z", "source": "audit"}

        reply = client.post("/label", json=body)

        (record,) = served.records("truths")
        label = served.codec.labels.decode(record)
        assert reply.status_code == 202
        assert (label.sample_id, label.class_index, label.source) == ("rechnung-ä", 1, "audit")
        assert label.event_time_s == 1795510800.0
        item = schemas.AppendReply.model_validate(reply.json()).items[0]
        assert (item.id, item.state, item.position.model_dump()) == (
            "rechnung-ä",
            "accepted",
            record.position._asdict(),
        )

    def test_an_id_may_be_a_number_and_a_class_an_index(self, client, served):
        """As in many tables."""
        client.post("/label", json={"id": 17, "label": 2})

        label = served.codec.labels.decode(served.records("truths")[0])
        assert (label.sample_id, label.class_index) == ("17", 2)

    def test_of_an_unknown_class_is_held_by_policy(self, served):
        """It is durable, with another state. A number that is not an index is still refused."""
        codec = Codec(FLOATS, unknown_class="hold")
        labels = [{"id": "a", "label": "wolf"}, {"id": "b", "label": "cat"}, {"id": "c", "label": "17"}]

        with TestClient(served.app_with(codec=codec), base_url=URL) as client:
            reply = client.post("/label", json={"labels": labels})

        items = schemas.AppendReply.model_validate(reply.json()).items
        assert [item.state for item in items] == ["held", "accepted", None]
        held = {record.key: codec.labels.decode(record).class_name for record in served.records("truths")}
        assert held == {b"a": "wolf", b"b": None}

    @pytest.mark.parametrize("named", [{"label": None}, {"class": None}])
    def test_without_a_class_retracts(self, client, served, named):
        """Together with other labels of a request."""
        labels = [{"id": "a", "source": "audit"} | named, {"id": "b", "label": 1}]
        reply = client.post("/label", json={"labels": labels})

        items = schemas.AppendReply.model_validate(reply.json()).items
        assert [item.state for item in items] == ["accepted", "accepted"]
        labels = {record.key: served.codec.labels.decode(record) for record in served.records("truths")}
        assert (labels[b"a"].class_index, labels[b"a"].source, labels[b"b"].class_index) == (RETRACTED, "audit", 1)

    @pytest.mark.parametrize(("room", "reported"), [(2, "new_class"), (1, "held")])
    def test_of_an_unknown_class_may_become_a_new_class(self, tmp_path, room, reported):
        """Depending on the classes of the served teacher, and the spare ones."""
        served = Served(tmp_path / "grown", replace(FLOATS, spare=room))
        served.publish(8, classes=json.dumps(["cat", "dog", "owl", "wolf"]))
        codec = Codec(served.schema, unknown_class="grow")
        names = ("wolf", "bear", "cat")

        with TestClient(served.app_with(codec=codec), base_url=URL) as client:
            labels = client.post("/label", json={"labels": [{"id": name, "label": name} for name in names]})
            samples = client.post("/sample", json={"samples": [{"id": name, "x": X, "label": name} for name in names]})

        for reply in (labels, samples):
            assert [item["state"] for item in reply.json()["items"]] == ["accepted", reported, "accepted"]
        served.view.close()

    @pytest.mark.parametrize(
        ("named", "reported"),
        [
            ({"label": "cat", "class": "dog"}, "two that differ"),
            ({}, "got none"),
        ],
    )
    def test_two_different_classes_are_refused(self, refusing, named, reported):
        """As in a record from Kafka."""
        error = error_of(refusing.post("/label", json={"id": "a"} | named), 422, "no_class")

        assert reported in error.message

    @pytest.mark.parametrize("named", [{"label": None, "class": "dog"}, {"label": "dog", "class": 1}])
    def test_label_and_class_are_synonyms(self, client, served, named):
        """Either, or both if they are equal."""
        assert client.post("/label", json={"id": "a"} | named).status_code == 202

        assert served.codec.labels.decode(served.records("truths")[0]).class_index == 1

    def test_two_labels_of_one_sample_keep_their_order(self, client, served):
        """The ledger uses the later one."""
        reply = client.post("/label", json={"labels": [{"id": "a", "label": "cat"}, {"id": "a", "label": "dog"}]})

        first, second = (item["position"] for item in reply.json()["items"])
        assert first["partition"] == second["partition"]
        assert first["offset"] < second["offset"]

    def test_of_several_labels_the_valid_ones_are_appended(self, client, served):
        """Each item is answered, in order."""
        labels = [{"id": "a", "label": "cat"}, {"id": "b", "label": "wolf"}, 3, {"id": "c", "label": "owl"}]

        reply = client.post("/label", json={"labels": labels})

        assert reply.status_code == 202
        items = schemas.AppendReply.model_validate(reply.json()).items
        assert [item.id for item in items] == ["a", "b", None, "c"]
        assert [item.error and item.error.code for item in items] == [None, "unknown_class", "invalid_body", None]
        by_position = {record.position: record.key for record in served.records("truths")}
        assert by_position[Position(**items[3].position.model_dump())] == b"c"
        assert len(by_position) == 2

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            ({"id": "a"}, "no_class"),
            ({"id": "a", "label": "wolf"}, "unknown_class"),
            ({"id": "a", "label": 3}, "unknown_class"),
            ({"id": "a", "label": -1}, "unknown_class"),
            ({"id": "a", "label": True}, "unknown_class"),
            ({"id": "a", "label": 1.5}, "unknown_class"),
            ({"id": "a", "label": ["cat"]}, "unknown_class"),
            ({"label": "cat"}, "no_id"),
            ({"id": "", "label": "cat"}, "no_id"),
            ({"id": None, "label": "cat"}, "no_id"),
            ({"id": ["a"], "label": "cat"}, "no_id"),
            ({"id": "ä" * 257, "label": "cat"}, "no_id"),
            ({"id": "a", "label": "cat", "time": "yesterday"}, "bad_time"),
            ({"id": "a", "label": "cat", "time": "2026-11-24T09:00:00"}, "bad_time"),
            ({"id": "a", "label": "cat", "time": 1795510800000}, "bad_time"),
            ({"id": "a", "label": "cat", "time": True}, "bad_time"),
            ({"id": "a", "label": "cat", "source": {}}, "bad_dtype"),
            ({"id": "a", "lable": "cat"}, "invalid_body"),
            ({"labels": []}, "invalid_body"),
            ({"labels": {}}, "invalid_body"),
            ({"labels": [{"id": str(n), "label": "cat"} for n in range(9)]}, "invalid_body"),
            ({"labels": [{"id": "a"}, {"id": "b"}]}, "all_refused"),
            ({"labels": [], "id": "a"}, "invalid_body"),
        ],
    )
    def test_without_a_valid_label_it_is_422(self, refusing, body, code):
        """A single label's error is the reply; nothing is appended."""
        error_of(refusing.post("/label", json=body), 422, code)

        assert refusing.served.records("truths") == []

    def test_a_list_as_the_body_refers_to_the_form_for_several(self, client):
        reply = client.post("/label", json=[{"id": "a", "label": "0"}])

        assert reply.status_code == 422
        assert "GET /docs shows how to send several" in reply.json()["error"]["message"]

    def test_several_invalid_labels_are_listed(self, client):
        """In the details of one error."""
        reported = error_of(
            client.post("/label", json={"labels": [{"id": "a"}, {"id": "b", "label": 9}]}), 422, "all_refused"
        )

        assert [(item["id"], item["error"]["code"]) for item in reported.details] == [
            ("a", "no_class"),
            ("b", "unknown_class"),
        ]

    def test_an_unavailable_log_is_503(self, client, served):
        """The message advises a retry."""
        served.log.fail("append", LogUnavailableError("broker away"))

        reply = client.post("/label", json={"id": "a", "label": "cat"})

        reported = error_of(reply, 503, "log_unavailable")
        assert "Retry with the same ids" in reported.message
        assert reply.headers["retry-after"] == "1"
        assert served.records("truths") == []

    def test_a_permanent_refusal_of_the_log_is_422(self, client, served):
        """Without Retry-After: a retry would not help."""
        served.log.fail("append", LogError("no topic truths"))

        reply = client.post("/label", json={"id": "a", "label": "cat"})

        assert "no topic truths" in error_of(reply, 422, "log_refused").message
        assert "retry-after" not in reply.headers

    def test_needs_no_model(self, tmp_path):
        """Labels are accepted before the first teacher is published."""
        with client_of(Served(tmp_path)) as client:
            assert client.post("/label", json={"id": "a", "label": "cat"}).status_code == 202


class TestErase:
    def test_is_durable_in_the_log_before_202_and_lists_remaining_copies(self, tmp_path):
        """A record in the labels topic, since only the learner writes state."""
        served = Served(tmp_path, admin_token="rule")
        ledger = served.ledger()
        ledger.begin(1, 100.0)
        prediction = Prediction(1, np.float32([0.1, 0.8, 0.1]), 5)
        ledger.sample_arrived(Sample(Position("things", 0, 4), 99.0, "a/ß", np.float32(X)), prediction, 1)
        ledger.end()
        ledger.flush()
        ledger.close()
        admin = {"authorization": "Bearer rule"}

        with client_of(served) as client:
            known = client.delete("/sample/a%2F%C3%9F", headers=admin)
            unknown = client.delete("/sample/b", headers=admin)
            refused = error_of(client.delete(f"/sample/{'x' * 2000}", headers=admin), 422, "no_id")

        assert (known.status_code, unknown.status_code, refused.code) == (202, 202, "no_id")
        reported = schemas.ErasedReply.model_validate(known.json())
        assert reported.sample_position is not None
        assert tuple(reported.sample_position.model_dump().values()) == ("things", 0, 4)
        assert unknown.json()["sample_position"] is None
        assert {"checkpoints", "sample store", "weights"} < {item.holder for item in reported.still_held_by}
        assert any("clicks" in item.holder for item in reported.still_held_by)
        orders = {record.key: served.codec.labels.decode(record) for record in served.records("truths")}
        assert {key: label.class_index for key, label in orders.items()} == {"a/ß".encode(): ERASED, b"b": ERASED}
        assert orders["a/ß".encode()].position == Position(**reported.position.model_dump())
        served.view.close()

    def test_needs_the_admin_token(self, tmp_path):
        """A label cannot erase either."""
        with client_of(Served(tmp_path, label_token="tell", admin_token="rule")) as client:
            headers = {"authorization": "Bearer tell"}
            assert client.delete("/sample/a", headers=headers).status_code == 403
            error_of(
                client.post("/label", json={"id": "a", "label": None, "erase": True}, headers=headers),
                422,
                "invalid_body",
            )


class TestSample:
    def test_a_json_sample_is_durable_in_the_log_before_202(self, client, served):
        """With its label, time and domain, and without an answer."""
        reply = client.post("/sample", json={"id": "ß", "x": X, "label": "owl", "time": 5.5, "domain": "shop"})

        sample = served.codec.decode_sample(served.records("clicks")[0])
        assert reply.status_code == 202
        assert (sample.sample_id, sample.x.tolist(), sample.label, sample.event_time_s) == ("ß", X, 2, 5.5)
        assert (sample.domain, sample.answer) == ("shop", None)
        assert reply.json()["items"][0]["position"] == served.records("clicks")[0].position._asdict()

    def test_with_a_label_of_unknown_class_is_accepted(self, served):
        """The label is held, as one of POST /label. A number that is not an index is refused."""
        codec = Codec(FLOATS, unknown_class="hold")
        samples = [{"id": "a", "x": X, "label": "wolf"}, {"id": "b", "x": X, "label": 17}, {"id": "c", "x": X}]

        with TestClient(served.app_with(codec=codec), base_url=URL) as client:
            reply = client.post("/sample", json={"samples": samples})

        assert [item.get("state") for item in reply.json()["items"]] == ["held", None, "accepted"]
        read = [codec.decode_sample(record) for record in served.records("clicks")]
        assert {sample.sample_id: sample.class_name for sample in read} == {"a": "wolf", "c": None}

    def test_a_sample_without_an_id_gets_one(self, client, served):
        """In the reply, and as the record's key."""
        reply = client.post("/sample", json={"x": X})

        assert reply.json()["items"][0]["id"].encode() == served.records("clicks")[0].key

    @pytest.mark.parametrize("names", ["", "?id=a&id=b"])
    def test_a_binary_body_holds_one_or_several(self, client, served, names):
        """With ids from the query, or made by the server."""
        body = np.float32([X, X]).tobytes()

        reply = client.post(f"/sample{names}", content=body, headers=RAW)

        items = reply.json()["items"]
        assert {item["id"].encode() for item in items} == {record.key for record in served.records("clicks")}
        assert len(items) == 2

    def test_of_equal_ids_in_one_request_the_second_is_refused(self, client, served):
        """Otherwise the learner would silently skip it."""
        reply = client.post("/sample", json={"samples": [{"id": "a", "x": X}, {"id": "a", "x": X}, {"id": 1, "x": X}]})

        items = reply.json()["items"]
        assert [item.get("error", {}).get("code") for item in items] == [None, "duplicate_id", None]
        assert len(served.records("clicks")) == 2

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            ({"id": "a"}, "no_value"),
            ({"id": "a", "x": [1]}, "bad_shape"),
            ({"id": "a", "x": [0, 1e30, 0, 0], "label": "owl"}, "not_finite"),
            ({"id": "a", "x": X, "label": "wolf"}, "unknown_class"),
            ({"id": "a", "x": X, "domain": "d" * 257}, "too_large"),
            ({"id": "a", "x": X, "answer": {}}, "invalid_body"),
            ({"id": "a", "x": X, "true_label": 1}, "invalid_body"),
            ({"samples": []}, "invalid_body"),
        ],
    )
    def test_without_a_valid_sample_it_is_refused(self, client, served, body, code):
        """So is an answer or a true label from outside, which would be scored."""
        error_of(client.post("/sample", json=body), 413 if code == "too_large" else 422, code)

        assert served.records("clicks") == []


class TestLabelStatus:
    def test_a_store_that_cannot_be_read_is_503_with_the_reason(self, served):
        """On every route that reads the store. Predictions continue."""
        served.publish(7)
        store(served, "a", X, label=1)
        (served.folder / "store" / STORE_FILE).write_bytes(b"not a database" * 1000)

        with client_of(served) as client:
            for reply in (
                client.get("/label/a"),
                client.get("/label/a?wait_s=0.1"),
                client.get("/sample/a"),
                client.post("/predict", json={"ids": ["a"]}),
            ):
                error = error_of(reply, 503, "store_unreadable")
                assert "the store is damaged (" in error.message
                assert reply.headers["retry-after"] == "1"
            assert client.post("/predict", json={"x": X}).status_code == 200

    def test_has_the_life_of_a_label(self, client, served):
        """State, class, positions, the prediction that it scored, and whether the served teacher has learned it."""
        store(served, "a/b ü\n", X, step=3, label=2)

        reply = client.get("/label/a%2Fb%20%C3%BC%0A")

        reported = schemas.LabelReply.model_validate(reply.json())
        assert (reported.id, reported.state, reported.class_, reported.class_index) == ("a/b ü\n", "trained", "owl", 2)
        assert (reported.predicted_class, reported.model_version, reported.scored) == ("dog", 5, True)
        assert reported.label_position.model_dump() == {"topic": "truths", "partition": 0, "offset": 3}
        assert (reported.first_trained_step, reported.in_served_model) == (3, True)

    def test_reports_that_the_served_teacher_has_not_learned_it_yet(self, client, served):
        """The teacher of step 7 answers; step 8 learned the label."""
        store(served, "a", X, step=8, label=2)

        assert client.get("/label/a").json()["in_served_model"] is False

    def test_an_unknown_id_is_404(self, client):
        """Also before the learner has run, and after a wait."""
        error_of(client.get("/label/nobody"), 404, "unknown_sample")
        error_of(client.get("/label/nobody?wait_s=0.01"), 404, "unknown_sample")

    def test_a_wait_ends_once_the_served_teacher_has_learned_it(self, client, served):
        """The client need not poll."""
        store(served, "a", X, step=8, label=2)
        publishing = threading.Timer(0.1, served.publish, [8])
        publishing.start()

        reply = client.get("/label/a?wait_s=60")
        publishing.join()

        assert reply.json()["in_served_model"] is True

    def test_a_wait_that_times_out_has_the_state(self, client, served):
        """With 200."""
        store(served, "a", X, step=8, label=2)

        reply = client.get("/label/a?wait_s=0.01")

        assert (reply.status_code, reply.json()["state"], reply.json()["in_served_model"]) == (200, "trained", False)

    def test_a_wait_is_bounded_by_the_servers_timeout(self, tmp_path):
        """Not by the request's own value."""
        served = Served(tmp_path, timeout_s=0.1)
        store(served, "a", X)

        with client_of(served) as client:
            assert client.get("/label/a?wait_s=86400").json()["state"] == "unlabelled"
        served.view.close()

    def test_waits_are_bounded_in_number(self, tmp_path):
        """429 past the bound; requests without a wait are answered."""
        served = Served(tmp_path, queue=0)
        store(served, "a", X)

        with client_of(served) as client:
            error_of(client.get("/label/a?wait_s=1"), 429, "queue_full")
            assert client.get("/label/a").status_code == 200
        served.view.close()

    def test_a_label_that_is_never_learned_ends_the_wait(self, tmp_path):
        """A held label, for example: answered at once, even if the queue is full."""
        served = Served(tmp_path, queue=0)
        ledger = served.ledger()
        ledger.begin(1, 100.0)
        ledger.label_arrived(Label(Position("truths", 0, 1), 101.0, "a", UNLABELLED, class_name="wolf"))
        ledger.end()
        ledger.flush()
        ledger.close()

        with client_of(served) as client:
            reply = client.get("/label/a?wait_s=60")

        reported = schemas.LabelReply.model_validate(reply.json())
        assert (reply.status_code, reported.state, reported.class_, reported.class_index) == (200, "held", "wolf", None)
        served.view.close()

    def test_a_retracted_label_ends_the_wait(self, tmp_path):
        """It has no class, but a position."""
        served = Served(tmp_path, queue=0)
        ledger = served.ledger()
        ledger.begin(1, 100.0)
        ledger.label_arrived(Label(Position("truths", 0, 1), 101.0, "a", 2))
        ledger.label_arrived(Label(Position("truths", 0, 2), 102.0, "a", RETRACTED))
        ledger.end()
        ledger.flush()
        ledger.close()

        with client_of(served) as client:
            reply = client.get("/label/a?wait_s=60")

        reported = schemas.LabelReply.model_validate(reply.json())
        assert (reply.status_code, reported.state, reported.class_, reported.class_index) == (
            200,
            "retracted",
            None,
            None,
        )
        assert reported.label_position is not None
        assert reported.label_position.offset == 2
        served.view.close()

    @pytest.mark.parametrize("wait_s", ["-1", "nan", "inf", "x"])
    def test_an_invalid_wait_is_422(self, client, wait_s):
        """The error names the parameter."""
        assert "wait_s" in error_of(client.get(f"/label/a?wait_s={wait_s}"), 422, "invalid_parameter").message


class TestModelAndHealth:
    def test_model_describes_the_teacher_and_its_learner(self, client, served):
        """All that a client needs to form a request."""
        served.clock.advance(3.0)

        reported = schemas.ModelReply.model_validate(client.get("/model").json())

        assert (reported.model_version, reported.age_s, reported.factory) == (7, 3.0, "mlp")
        assert (reported.classes, reported.shape, reported.dtype) == (["cat", "dog", "owl"], [4], "float32")
        assert (reported.learner["state"], reported.learner_seen_s) == ("learning", 3.0)

    def test_model_before_the_first_is_503(self, tmp_path):
        """As for /predict."""
        with client_of(Served(tmp_path)) as client:
            error_of(client.get("/model"), 503, "not_published")

    def test_reports_that_an_older_version_answers(self, tmp_path):
        """The newest cannot be loaded at start: /health/ready and /model have the reason."""
        served = Served(tmp_path)
        served.publish(7)
        served.clock.advance(1.0)
        served.publish(8, scale=np.nan)

        with client_of(served) as client:
            reported, ready = client.get("/model").json(), client.get("/health/ready")

        assert (reported["model_version"], reported["newest_version"]) == (7, 8)
        (note,) = reported["notes"]
        assert note.startswith("the newest version cannot be loaded, version 7 answers: ")
        assert (ready.status_code, ready.json()["reasons"]) == (200, [note])

    def test_live_is_always_200(self, tmp_path):
        """If the process runs."""
        served = Served(tmp_path)
        served.status = None

        with client_of(served) as client:
            assert client.get("/health/live").json() == {"live": True}

    @pytest.mark.parametrize(
        ("publish", "status", "query", "code", "reasons"),
        [
            (True, {"time_s": 1_000_000.0}, "", 200, []),
            (True, {"time_s": 1_000_000.0 - 120.0}, "", 200, []),
            (True, {"time_s": 1_000_000.0 + 9.0}, "", 200, []),
            (
                True,
                {"time_s": 1_000_000.0 - 121.0, "state": "stopped"},
                "",
                503,
                ["learner not seen for 121 s (last state: stopped)"],
            ),
            (True, {"time_s": 1_000_000.0 - 121.0}, "?require_learner=false", 200, ["learner not seen for 121 s"]),
            (
                True,
                {"time_s": 1_000_000.0, "state": "log unavailable"},
                "",
                200,
                ["the learner cannot read the log, and learns nothing until it is back"],
            ),
            (True, None, "", 503, ["no learner has been seen"]),
            (True, {"time_s": "then"}, "", 503, ["no learner has been seen"]),
            (False, {"time_s": 1_000_000.0}, "", 503, ["no teacher is published yet"]),
            (False, None, "?require_learner=false", 503, ["no teacher is published yet", "no learner has been seen"]),
        ],
    )
    def test_ready_needs_a_model_and_a_live_learner(self, tmp_path, publish, status, *, query, code, reasons):
        """503 has the reasons. A probe may leave out the learner, since predictions continue without it."""
        served = Served(tmp_path)
        served.status = status
        if publish:
            served.publish(7)

        with client_of(served) as client:
            reply = client.get(f"/health/ready{query}")

        reported = schemas.ReadyReply.model_validate(reply.json())
        assert (reply.status_code, reported.ready) == (code, code == 200)
        assert len(reported.reasons) == len(reasons)
        assert all(found.startswith(wanted) for found, wanted in zip(reported.reasons, reasons, strict=True))

    def test_predictions_continue_without_the_learner(self, client, served):
        """/health/ready is 503; /predict answers with the model's age."""
        served.clock.advance(3600.0)

        assert client.get("/health/ready").status_code == 503
        assert client.post("/predict", json={"x": X}).json()["age_s"] == 3600.0


class TestScore:
    def test_has_the_learners_scores_and_their_age(self, client, served):
        """Unchanged: the learner names its scores."""
        served.scores = {"time_s": served.clock.now_s, "at_label": {"gain": None}}
        served.clock.advance(2.5)

        assert client.get("/score").json() == {**served.scores, "age_s": 2.5}

    @pytest.mark.parametrize("scores", [None, {}])
    def test_before_the_first_scores_it_is_503(self, client, served, scores):
        """With Retry-After."""
        served.scores = scores

        reply = client.get("/score")

        error_of(reply, 503, "no_scores_yet")
        assert reply.headers["retry-after"] == "1"


class TestToken:
    @pytest.mark.parametrize(
        "header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic sésame", "sésame", "Bearer sésame2"]
    )
    @pytest.mark.parametrize("route", ["/", "/model", "/metrics", "/label/a", "/docs", "/openapi.json", "/nowhere"])
    def test_without_it_every_route_but_health_is_401(self, guarded, route, header):
        """Also paths that do not exist."""
        headers = {} if header is None else {"authorization": header.encode()}

        reply = guarded.get(route, headers=headers)

        error_of(reply, 401, "unauthorised")
        assert reply.headers["www-authenticate"].startswith("Bearer")

    @pytest.mark.parametrize("route", ["/predict", "/label", "/sample"])
    def test_a_post_without_it_does_nothing(self, guarded, route):
        """It is refused before the body is read."""
        error_of(guarded.post(route, content=b"x" * 9999, headers=JSON), 401, "unauthorised")

    @pytest.mark.parametrize("header", ["Bearer sésame", "bearer sésame", "Bearer  sésame "])
    def test_with_it_all_routes_are_open(self, guarded, header):
        """The scheme's case does not matter."""
        reply = guarded.post("/predict", json={"x": X}, headers={"authorization": header.encode()})

        assert reply.status_code == 200

    def test_health_needs_none(self, guarded):
        """Health probes have no token."""
        assert guarded.get("/health/live").status_code == 200
        assert guarded.get("/health/ready").status_code == 200

    def test_openapi_declares_it(self, guarded, served):
        """The bearer scheme is at each route that needs a token: all except health, or only admin."""
        guarded_paths = guarded.get("/openapi.json", headers={"authorization": "Bearer sésame".encode()}).json()[
            "paths"
        ]
        open_paths = served.app.openapi()["paths"]

        def secured(paths):
            return {path for path, methods in paths.items() for route in methods.values() if "security" in route}

        assert secured(guarded_paths) == {path for path in guarded_paths if not path.startswith("/health/")}
        assert secured(open_paths) == {path for method, path, role in ROUTES if role == "admin" and method != "DELETE"}


class TestErrorsAndEdge:
    def test_an_unknown_path_is_404(self, client):
        """Also with a trailing slash; there are no redirects."""
        error_of(client.get("/nowhere"), 404, "not_found")
        error_of(client.post("/predict/", json={"x": X}, follow_redirects=False), 404, "not_found")

    def test_another_method_is_405_with_the_right_one(self, client):
        """In the header and the message."""
        reply = client.get("/predict")

        assert "POST" in error_of(reply, 405, "method_not_allowed").message
        assert reply.headers["allow"] == "POST"

    def test_a_bug_is_500_without_its_secrets(self, served):
        """The stack trace is only in the server's log, under the request id. The metrics count it."""

        def broken():
            raise ZeroDivisionError("password=1234")

        app = served.app_with(learner_status=broken)

        with TestClient(app, base_url=URL, raise_server_exceptions=False) as client, capture_logs() as logged:
            reply = client.get("/model")
            text = client.get("/metrics").text

        reported = error_of(reply, 500, "internal")
        (event,) = (line for line in logged if line["event"] == "request_failed")
        assert (event["request_id"], event["path"]) == (reported.request_id, "/model")
        assert isinstance(event["exc_info"], ZeroDivisionError)
        assert "1234" not in reply.text
        assert (
            'http_request_duration_seconds_count{process="server-0",method="GET",route="/model",status="500"} 1.0'
            in text
        )

    @pytest.mark.parametrize(
        ("sent", "echoed"), [("abc-1.2:x", True), ("a b", False), ("x" * 129, False), ("ü", False)]
    )
    def test_a_valid_request_id_is_echoed_and_an_invalid_one_replaced(self, client, sent, echoed):
        """It cannot forge a log line or a header."""
        reply = client.get("/health/live", headers={"x-request-id": sent.encode()})

        assert (reply.headers["x-request-id"] == sent) is echoed
        assert reply.headers["x-request-id"]

    def test_the_links_of_the_index_exist(self, client):
        """Each GET route answers."""
        links = client.get("/").json()["links"]

        for path in links.values():
            assert client.get(path).status_code in (200, 405)


class TestMetricsRoute:
    def test_requests_are_counted_by_template(self, client):
        """An id in a path never becomes a label value. Unknown paths are one series."""
        client.get("/label/secret-1")
        client.get("/label/secret-2")
        client.get("/nowhere-1")
        client.get("/nowhere-2")
        client.request("BREW", "/nowhere-3")
        client.post("/predict", json={"instances": [X] * 5})

        text = client.get("/metrics").text

        head = 'streamlearn_http_request_duration_seconds_count{process="server-0",'
        assert head + 'method="GET",route="/label/{sample_id:id}",status="404"} 2.0' in text
        assert head + 'method="GET",route="unmatched",status="404"} 2.0' in text
        assert head + 'method="OTHER",route="unmatched",status="404"} 1.0' in text
        assert "secret" not in text
        assert 'streamlearn_predict_batch_rows_sum{process="server-0"} 5.0' in text
        assert 'streamlearn_model_version{process="server-0"} 7.0' in text

    def test_metrics_of_siblings_are_merged(self, client, served):
        """One scrape has the learner and all servers."""
        learner = Metrics(LEARNER_METRICS, version="1")
        learner.count("steps_total", 1)
        server = MetricsServer(learner.registry, 0)
        port = server.port
        served.siblings = {"learner": f"http://127.0.0.1:{port}/metrics"}
        try:
            reply = client.get("/metrics")
        finally:
            server.close()

        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert 'streamlearn_steps_total{process="learner"} 1.0' in reply.text
        assert 'streamlearn_scrape_failed{process="server-0",target="learner"} 0.0' in reply.text

    def test_siblings_are_scraped_without_a_proxy(self, client, served, monkeypatch):
        """Whatever proxy the environment names: they are on this machine."""
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        server = MetricsServer(Metrics(LEARNER_METRICS, version="1").registry, 0)
        port = server.port
        served.siblings = {"learner": f"http://127.0.0.1:{port}/metrics"}
        try:
            reported = client.get("/metrics").text
        finally:
            server.close()

        assert 'streamlearn_scrape_failed{process="server-0",target="learner"} 0.0' in reported

    def test_failed_scrapes_of_a_sibling_are_left_out(self, client, served):
        """They date from its own last scrape."""
        other = ServerMetrics(version="1")
        other.scraped("learner", failed=True)
        learner = MetricsServer(Metrics(LEARNER_METRICS, version="1").registry, 0)
        learner_port = learner.port
        sibling = MetricsServer(other.registry, 0)
        port = sibling.port
        served.siblings = {
            "learner": f"http://127.0.0.1:{learner_port}/metrics",
            "server-1": f"http://127.0.0.1:{port}/metrics",
        }
        try:
            reported = [line for line in client.get("/metrics").text.splitlines() if "scrape_failed{" in line]
        finally:
            learner.close()
            sibling.close()

        assert sorted(reported) == [
            f'streamlearn_scrape_failed{{process="server-0",target="{target}"}} 0.0' for target in served.siblings
        ]

    def test_an_unreachable_sibling_is_reported(self, client, served):
        """Nothing listens; another program listens; the URL is not HTTP."""

        class Foreign(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<html>hello</html>")

            def log_message(self, *_):
                pass

        gone = MetricsServer(served.metrics.registry, 0)
        gone_port = gone.port
        gone.close()
        with http.server.HTTPServer(("127.0.0.1", 0), Foreign) as foreign:
            threading.Thread(target=foreign.handle_request, daemon=True).start()
            served.siblings = {
                "learner": f"http://127.0.0.1:{gone_port}/metrics",
                "server-1": f"http://127.0.0.1:{foreign.server_address[1]}/metrics",
                "server-2": "file:///etc/hostname",
            }
            reply = client.get("/metrics")

        assert reply.status_code == 200
        for target in served.siblings:
            assert f'streamlearn_scrape_failed{{process="server-0",target="{target}"}} 1.0' in reply.text
        assert "hello" not in reply.text


class TestOpenApi:
    def test_every_post_declares_its_body_with_examples_that_work(self, client, served):
        """Each example is accepted as it is."""
        document = client.get("/openapi.json").json()
        store(served, "invoice-7", X)

        for route in ("/predict", "/label", "/sample"):
            content = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]
            assert content["examples"]
            for example in content["examples"].values():
                reply = client.post(route, json=example["value"])
                assert reply.status_code in (200, 202), (route, example, reply.text)

    def test_every_route_declares_its_errors_in_the_one_shape(self, client):
        """FastAPI's own 422 shape is absent."""
        document = client.get("/openapi.json").json()

        assert "HTTPValidationError" not in json.dumps(document)
        assert set(document["paths"]) == {path for _, path, _ in ROUTES}
        for status in ("404", "413", "415", "422", "429", "503", "504"):
            assert status in document["paths"]["/predict"]["post"]["responses"]

    def test_a_large_sample_has_no_json_example(self):
        """Only a binary body."""
        body = request_schemas.predict_body(Codec(Schema((3, 64, 64), np.dtype(np.uint8), ("a", "b"))), most=8)[
            "requestBody"
        ]["content"]

        assert list(body["application/json"]["examples"]) == ["stored samples"]
        assert set(body) == {"application/json", "application/octet-stream", "application/x-npy", "image/*"}


def test_served_equals_computed_over_a_stream_of_teachers(client, served):
    """Each answer equals that of the version it names, while teachers change."""
    rng = np.random.default_rng(3)

    for step in range(8, 12):
        served.publish(step)
        row = rng.normal(size=4).astype(np.float32)
        reply = client.post(f"/predict?min_version={step}", content=row.tobytes(), headers=RAW).json()

        assert reply["model_version"] == step
        assert np.float32(reply["predictions"][0]["probabilities"]).tolist() == served.expected(step, row)[0].tolist()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    route=st.sampled_from(["/predict", "/label", "/sample", "/predict?learn=1", "/sample?id=a"]),
    value=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=5),
)
def test_no_json_causes_a_500(taking, route, value):
    """Random objects of the API's own field names get a declared status."""
    reply = taking.post(route, content=json.dumps(value), headers=JSON)

    assert reply.status_code in (200, 202, 404, 413, 422), reply.text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    route=st.sampled_from(["/predict", "/label", "/sample"]),
    kind=st.sampled_from([*(kind["content-type"] for kind in (RAW, NPY, JSON)), "image/png", "x/y", ";"]),
    body=st.binary(max_size=200),
)
def test_no_bytes_cause_a_500(taking, route, kind, body):
    """Of any content type."""
    reply = taking.post(route, content=body, headers={"content-type": kind})

    assert reply.status_code in (200, 202, 413, 415, 422), reply.text


def test_records_of_predict_with_learn_can_be_decoded(client, served):
    """By the learner's codec."""
    client.post("/predict", json={"instances": [X] * 8, "learn": True})

    assert all(isinstance(served.codec.decode_sample(record), Sample) for record in served.records("clicks"))
    assert all(isinstance(record, Record) for record in served.records("clicks"))
