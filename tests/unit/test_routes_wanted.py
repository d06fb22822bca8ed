"""GET /label/wanted and GET /sample/{id}, in process: a real file, ledger and server."""

from dataclasses import replace

import numpy as np
import pytest
from served import Served, X, client_of, error_of, store

from streamlearn.ledger.request_queue import RequestQueue
from streamlearn.ledger.request_writer import RequestWriter
from streamlearn.records import Position
from streamlearn.serve import schemas
from streamlearn.serve.api import create_app


@pytest.fixture
def served(tmp_path):
    """A server that hands out at most 5 samples an hour."""
    one = Served(tmp_path)
    queue = RequestQueue(tmp_path / "label-requests.sqlite", per_hour=5, again_after_s=1000.0)
    one.parts = replace(one.parts, wanted=queue)
    one.app = create_app(one.parts, one.settings)
    return one


def offer(served, *ids):
    """Let the learner offer samples."""
    writer = RequestWriter(served.folder / "label-requests.sqlite", 100)
    probs_BC = np.tile(np.float32([0.2, 0.5, 0.3]), (len(ids), 1))
    writer.offer(ids, [Position("clicks", 1, n) for n in range(len(ids))], probs_BC, probs_BC, 100.0)
    writer.flush()
    writer.close()


class TestWanted:
    def test_names_samples_their_worth_and_where_to_see_them(self, served):
        """Everything a labelling tool needs."""
        offer(served, "a/b 1")

        with client_of(served) as client:
            reply = client.get("/label/wanted?n=3")

        told = schemas.WantedReply.model_validate(reply.json())
        assert (reply.status_code, told.budget_left, reply.headers["cache-control"]) == (200, 4, "no-store")
        (item,) = told.items
        assert (item.id, item.predicted_class, item.payload) == ("a/b 1", "dog", "/sample/a%2Fb%201")
        assert (item.position.topic, item.position.partition, item.position.offset) == ("clicks", 1, 0)
        assert item.utility == pytest.approx(0.9372, abs=1e-4)

    def test_hands_out_none_twice_until_time_has_passed(self, served):
        """A GET that takes."""
        offer(served, "a", "b")

        with client_of(served) as client:
            first = client.get("/label/wanted").json()["items"]
            second = client.get("/label/wanted").json()["items"]
            served.clock.advance(4000.0)
            third = client.get("/label/wanted").json()["items"]

        assert (len(first), len(second), len(third)) == (2, 0, 2)

    def test_a_peek_takes_none(self, served):
        """Seen is not handed out."""
        offer(served, "a")

        with client_of(served) as client:
            seen = client.get("/label/wanted?peek=true").json()
            taken = client.get("/label/wanted").json()

        assert (seen["budget_left"], seen["items"]) == (5, taken["items"])

    def test_ends_with_the_budget(self, served):
        """No error: there is nothing to hand out for now."""
        offer(served, *"abcdefgh")

        with client_of(served) as client:
            told = [client.get("/label/wanted?n=4").json() for _ in range(3)]

        assert [(len(one["items"]), one["budget_left"]) for one in told] == [(4, 1), (1, 0), (0, 0)]

    @pytest.mark.parametrize("n", ["0", "1001", "few"])
    def test_refuses_a_number_out_of_bounds(self, served, n):
        """From 1 to 1000."""
        with client_of(served) as client:
            error_of(client.get(f"/label/wanted?n={n}"), 422, "invalid_parameter")

    def test_says_so_where_it_is_off(self, tmp_path):
        """labels.requests_per_hour = 0: no queue."""
        with client_of(Served(tmp_path)) as client:
            error_of(client.get("/label/wanted"), 404, "wanted_off")

    def test_a_damaged_file_is_not_now(self, served):
        """The learner makes it anew within a flush."""
        (served.folder / "label-requests.sqlite").write_bytes(b"not a database" * 1000)

        with client_of(served) as client:
            reply = client.get("/label/wanted")

        error_of(reply, 503, "wanted_unavailable")
        assert "retry-after" in reply.headers


class TestTokens:
    @pytest.mark.parametrize("path", ["/label/wanted", "/sample/a"])
    def test_only_who_may_label_may_see(self, tmp_path, path):
        """Samples are as private as their labels."""
        served = Served(tmp_path, predict_token="predict", label_token="label")

        with client_of(served) as client:
            error_of(client.get(path, headers={"authorization": "Bearer predict"}), 403, "wrong_role")
            reply = client.get(path, headers={"authorization": "Bearer label"})

        assert reply.status_code == 404


class TestSample:
    def test_is_shown_as_it_is_stored(self, served):
        """Whoever labels it must see it."""
        store(served, "a/b", X, step=3)

        with client_of(served) as client:
            reply = client.get("/sample/a%2Fb")

        told = schemas.SampleReply.model_validate(reply.json())
        assert (told.id, told.x, told.time_s) == ("a/b", X, 100.0)
        assert told.position.offset == 3

    def test_that_is_unknown_is_not_found(self, served):
        """Nothing was ever read under this id."""
        with client_of(served) as client:
            error_of(client.get("/sample/nobody"), 404, "unknown_sample")

    def test_without_its_payload_names_where_it_stood(self, served, monkeypatch):
        """The store keeps ids longer than payloads."""
        store(served, "a", X)
        monkeypatch.setattr(type(served.view), "payload", lambda *_: None)

        with client_of(served) as client:
            told = error_of(client.get("/sample/a"), 404, "payload_gone")

        assert told.details["position"]["topic"] == "clicks"
