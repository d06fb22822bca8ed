"""What is served, changed over HTTP: list, roll back, promote, and what the other routes say of it."""

import threading

import pytest
from served import Served, X, client_of, error_of
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from streamlearn.serve import schemas
from streamlearn.state.files import Files
from streamlearn.state.publish import PublishedDir, pin, unpin
from streamlearn.testing import FaultyFiles

ADMIN = {"authorization": "Bearer rule"}


def three_versions(folder, **settings):
    """Versions 7, 8 and 9 are published, ten seconds apart."""
    served = Served(folder, admin_token="rule", **settings)
    for step in (7, 8, 9):
        served.publish(step, scores=f'{{"windowed_accuracy": 0.{step}}}')
        served.clock.advance(10.0)
    return served


@pytest.fixture
def served(tmp_path):
    return three_versions(tmp_path)


@pytest.fixture
def client(served):
    with client_of(served, headers=ADMIN) as client:
        yield client


def roll_back(client, version):
    return client.post("/model/rollback", json={"version": version})


class TestModels:
    def test_lists_what_can_be_served_newest_first(self, client):
        """Each with its age and the scores of its time."""
        told = schemas.VersionsReply.model_validate(client.get("/models").json()).versions

        assert [one.version for one in told] == [9, 8, 7]
        assert [one.served for one in told] == [True, False, False]
        assert (told[2].age_s, told[2].scores) == (30.0, {"windowed_accuracy": 0.7})


class TestRollback:
    def test_serves_the_older_version_when_it_says_so(self, client, served):
        """The very next answer comes from it, digit for digit."""
        told = schemas.ServedReply.model_validate(roll_back(client, 7).json())
        answer = client.post("/predict", json={"x": X}).json()

        assert (told.model_version, told.pinned, told.newest_version, told.before) == (7, True, 9, 9)
        assert answer["model_version"] == 7
        assert answer["predictions"][0]["probabilities"] == pytest.approx(served.expected(7, X)[0].tolist())

    def test_holds_while_newer_ones_are_published(self, client, served):
        """The learner learns on, and knows nothing of it."""
        roll_back(client, 7)
        served.publish(10)

        assert client.get("/model").json()["model_version"] == 7

    def test_to_another_version_replaces_the_first(self, client):
        """Also to a newer one."""
        roll_back(client, 7)

        assert roll_back(client, 8).json()["model_version"] == 8

    def test_is_written_to_the_audit_log(self, client):
        """Which version, instead of which, and which request asked for it."""
        with capture_logs() as logged:
            reply = client.post("/model/rollback", json={"version": 7}, headers={"x-request-id": "r-1"})

        (line,) = (line for line in logged if line["event"] == "version_pinned")
        assert (line["step"], line["before_step"], line["by"], line["request_id"]) == (7, 9, "http", "r-1")
        assert reply.status_code == 200

    def test_to_a_version_that_is_not_there_is_404_and_names_those_that_are(self, client):
        """And nothing changes."""
        told = error_of(roll_back(client, 3), 404, "unknown_version")

        assert told.details == {"versions": [7, 8, 9]}
        assert client.get("/model").json()["pinned"] is False

    def test_to_a_version_that_cannot_be_served_is_refused(self, client, served):
        """It is tried first: classes in another order, for one."""
        served.publish(10, classes='["dog", "cat", "owl"]')

        error_of(roll_back(client, 10), 422, "not_servable")
        assert client.get("/model").json()["pinned"] is False

    @pytest.mark.parametrize("route", ["/model/rollback", "/model/promote"])
    def test_where_the_folder_cannot_be_written_is_503(self, served, route):
        """A server on another machine may have it read-only; promoting is refused in the same way."""
        pin(served.folder / "published", 8)
        app = served.app_with(files=FaultyFiles(fail_at=1))

        with TestClient(app, headers=ADMIN) as client:
            told = error_of(client.post(route, json={"version": 7}), 503, "not_writable")

        assert "injected fault" in told.message or "No space left" in told.message

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"7",
            b"[]",
            b"{}",
            b"\xff",
            b'{"version": "7"}',
            b'{"version": -1}',
            b'{"version": 7.5}',
            b'{"version": true}',
            b'{"version": null}',
            b'{"version": 7, "force": true}',
            b'{"version": 99999999999999999999}',
        ],
    )
    def test_a_body_that_is_none_is_422(self, client, body):
        """With an example of a good one."""
        told = error_of(client.post("/model/rollback", content=body), 422, "invalid_body")

        assert '{"version": 1200}' in told.message

    def test_a_body_is_bounded(self, client):
        """As every other."""
        error_of(client.post("/model/rollback", content=b" " * 4097), 413, "body_too_large")

    def test_that_this_server_does_not_follow_in_time_is_503(self, tmp_path):
        """The pin stands, and the reply is honest; without its lifespan this server follows nothing."""
        served = three_versions(tmp_path, timeout_s=0.1)
        served.predictor.refresh()

        error_of(roll_back(TestClient(served.app, headers=ADMIN), 7), 503, "not_served_yet")

        assert PublishedDir(served.folder / "published").pinned().step == 7


class SlowFiles(Files):
    """A disk that waits with its first write until it is told to go on."""

    def __init__(self):
        self.entered, self.go_on = threading.Event(), threading.Event()

    def write(self, path, chunks):
        self.entered.set()
        assert self.go_on.wait(10.0)
        super().write(path, chunks)


class TestOneAtATime:
    def test_a_second_change_is_refused_while_the_first_is_under_way(self, served):
        """429, and nothing is done; afterwards it may come again."""
        disk = SlowFiles()
        with TestClient(served.app_with(files=disk), headers=ADMIN) as client:
            first = threading.Thread(target=roll_back, args=(client, 7))
            first.start()
            assert disk.entered.wait(10.0)

            refused = [roll_back(client, 8), client.post("/model/promote")]
            disk.go_on.set()
            first.join()

            assert [reply.status_code for reply in refused] == [429, 429]
            assert client.get("/model").json()["model_version"] == 7
            assert roll_back(client, 8).status_code == 200


class TestPromote:
    def test_serves_the_newest_again(self, client):
        """And says what answered before."""
        roll_back(client, 7)

        told = schemas.ServedReply.model_validate(client.post("/model/promote").json())

        assert (told.model_version, told.pinned, told.before) == (9, False, 7)

    def test_where_nothing_is_pinned_changes_nothing(self, client):
        """It is 200 all the same, and no line of the audit log."""
        with capture_logs() as logged:
            reply = client.post("/model/promote")

        assert (reply.status_code, reply.json()["model_version"]) == (200, 9)
        assert "version_unpinned" not in {line["event"] for line in logged}

    def test_is_written_to_the_audit_log(self, client):
        """With the version that ends."""
        roll_back(client, 7)
        with capture_logs() as logged:
            client.post("/model/promote")

        (line,) = (line for line in logged if line["event"] == "version_unpinned")
        assert (line["before_step"], line["by"]) == (7, "http")


class TestToldElsewhere:
    def test_model_says_that_a_version_is_pinned_and_which_is_the_newest(self, client):
        """And a note in words."""
        roll_back(client, 7)

        told = schemas.ModelReply.model_validate(client.get("/model").json())

        assert (told.model_version, told.pinned, told.newest_version) == (7, True, 9)
        assert told.notes == ["version 7 is pinned, the newest is 9"]

    def test_a_pinned_server_is_ready_and_says_why_it_is_old(self, client):
        """Nothing is wrong; a probe must not take it away."""
        roll_back(client, 7)

        reply = client.get("/health/ready")

        assert (reply.status_code, reply.json()["reasons"]) == (200, ["version 7 is pinned, the newest is 9"])

    @pytest.mark.parametrize("query", ["min_version=8", "max_age_s=25"])
    def test_who_asks_for_a_newer_one_is_told_of_the_pin(self, tmp_path, query):
        """Waiting longer would not help."""
        served = three_versions(tmp_path, timeout_s=0.1)
        pin(served.folder / "published", 7)

        with client_of(served, headers=ADMIN) as client:
            told = error_of(client.post(f"/predict?{query}", json={"x": X}), 503, "model_not_fresh")

        assert "version 7 is pinned" in told.message

    def test_who_waits_is_answered_when_it_is_promoted(self, client, served):
        """The wait goes on behind a pin, since a pin may end."""
        roll_back(client, 7)
        promoting = threading.Timer(0.1, unpin, [served.folder / "published"])
        promoting.start()

        reply = client.post("/predict?min_version=9", json={"x": X})
        promoting.join()

        assert reply.json()["model_version"] == 9

    def test_a_broken_pin_is_told_and_the_newest_answers(self, client, served):
        """Readiness stays; the reason names the file."""
        (served.folder / "published" / "pinned.safetensors").write_bytes(b"torn")
        served.predictor.refresh()

        told = client.get("/health/ready").json()

        assert told["ready"] is True
        assert "version 9 answers" in told["reasons"][0]
        assert "pinned.safetensors" in told["reasons"][0]

    def test_the_learners_guard_is_told(self, client, served):
        """From its heartbeat; readiness stays, since the last good version answers."""
        served.status["guard"] = {"frozen": True, "reasons": ["collapsed"]}

        notes = client.get("/model").json()["notes"]

        assert notes == [
            "the learner's guard finds the model collapsed",
            "the learner's guard publishes no new version until the model is healthy",
        ]
        assert client.get("/health/ready").json() == {"ready": True, "reasons": notes}
