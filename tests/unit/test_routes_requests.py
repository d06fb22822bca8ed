"""GET /label/requests and GET /sample/{id}, in process: a real file, ledger and server."""

import numpy as np
import pytest
from served import Served, X, client_of, error_of, store

from streamlearn.ledger.request_queue import RequestQueue
from streamlearn.ledger.request_writer import RequestWriter
from streamlearn.records import Position
from streamlearn.serve import schemas


@pytest.fixture
def served(tmp_path):
    """A server that hands out at most 5 samples per hour."""
    one = Served(tmp_path)
    queue = RequestQueue(tmp_path / "wanted.sqlite", per_hour=5, again_after_s=1000.0)
    one.app = one.app_with(requests=queue)
    return one


def offer(served, *ids):
    """Offer samples, as the learner does."""
    writer = RequestWriter(served.folder / "wanted.sqlite", 100)
    probs_BC = np.tile(np.float32([0.2, 0.5, 0.3]), (len(ids), 1))
    writer.offer(ids, [Position("clicks", 1, n) for n in range(len(ids))], probs_BC, probs_BC, 100.0)
    writer.flush()
    writer.close()


class TestLabelRequests:
    def test_an_item_has_utility_position_and_the_route_of_its_payload(self, served):
        """All that a labelling tool needs."""
        offer(served, "a/b 1")

        with client_of(served) as client:
            reply = client.get("/label/requests?n=3")

        found = schemas.RequestsReply.model_validate(reply.json())
        assert (reply.status_code, found.budget_left, reply.headers["cache-control"]) == (200, 4, "no-store")
        (item,) = found.items
        assert (item.id, item.predicted_class, item.payload) == ("a/b 1", "dog", "/sample/a%2Fb%201")
        assert (item.position.topic, item.position.partition, item.position.offset) == ("clicks", 1, 0)
        assert item.utility == pytest.approx(0.9372, abs=1e-4)

    def test_no_sample_is_handed_out_twice_within_the_interval(self, served):
        """The GET takes."""
        offer(served, "a", "b")

        with client_of(served) as client:
            first = client.get("/label/requests").json()["items"]
            second = client.get("/label/requests").json()["items"]
            served.clock.advance(4000.0)
            third = client.get("/label/requests").json()["items"]

        assert (len(first), len(second), len(third)) == (2, 0, 2)

    def test_peek_takes_nothing(self, served):
        """The next request gets the same samples."""
        offer(served, "a")

        with client_of(served) as client:
            seen = client.get("/label/requests?peek=true").json()
            taken = client.get("/label/requests").json()

        assert (seen["budget_left"], seen["items"]) == (5, taken["items"])

    def test_past_the_budget_the_list_is_empty(self, served):
        """It is not an error."""
        offer(served, *"abcdefgh")

        with client_of(served) as client:
            replies = [client.get("/label/requests?n=4").json() for _ in range(3)]

        assert [(len(one["items"]), one["budget_left"]) for one in replies] == [(4, 1), (1, 0), (0, 0)]

    @pytest.mark.parametrize("n", ["0", "1001", "few"])
    def test_refuses_a_number_out_of_bounds(self, served, n):
        """From 1 to 1000."""
        with client_of(served) as client:
            error_of(client.get(f"/label/requests?n={n}"), 422, "invalid_parameter")

    def test_404_if_active_learning_is_off(self, tmp_path):
        """Without a queue, 404."""
        with client_of(Served(tmp_path)) as client:
            error_of(client.get("/label/requests"), 404, "label_requests_off")

    def test_the_former_path_names_the_new_one(self, served):
        """404 for GET /label/wanted."""
        with client_of(served) as client:
            assert "/label/requests" in error_of(client.get("/label/wanted?n=3"), 404, "not_found").message

    def test_a_damaged_file_is_503(self, served):
        """The learner replaces it at its next flush."""
        (served.folder / "wanted.sqlite").write_bytes(b"not a database" * 1000)

        with client_of(served) as client:
            reply = client.get("/label/requests")

        error_of(reply, 503, "label_requests_unavailable")
        assert "retry-after" in reply.headers


class TestTokens:
    @pytest.mark.parametrize("path", ["/label/requests", "/sample/a"])
    def test_samples_need_the_label_role(self, tmp_path, path):
        """A predict token does not grant them."""
        served = Served(tmp_path, predict_token="predict", label_token="label")

        with client_of(served) as client:
            error_of(client.get(path, headers={"authorization": "Bearer predict"}), 403, "wrong_role")
            reply = client.get(path, headers={"authorization": "Bearer label"})

        assert reply.status_code == 404


class TestSample:
    def test_is_shown_as_it_is_stored(self, served):
        """For annotators."""
        store(served, "a/b", X, step=3)

        with client_of(served) as client:
            reply = client.get("/sample/a%2Fb")

        found = schemas.SampleReply.model_validate(reply.json())
        assert (found.id, found.x, found.time_s) == ("a/b", X, 100.0)
        assert found.position.offset == 3

    def test_an_unknown_one_is_404(self, served):
        """The learner has read no record of this id."""
        with client_of(served) as client:
            error_of(client.get("/sample/nobody"), 404, "unknown_sample")

    def test_an_evicted_payload_is_404_with_the_position(self, served, monkeypatch):
        """The store keeps ids longer than payloads."""
        store(served, "a", X)
        monkeypatch.setattr(type(served.view), "payload", lambda *_: None)

        with client_of(served) as client:
            error = error_of(client.get("/sample/a"), 404, "payload_gone")

        assert error.details["position"]["topic"] == "clicks"
