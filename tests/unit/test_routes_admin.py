"""The served version, changed over HTTP: list, roll back, promote, and the other routes' reports of it."""

import threading

import pytest
from harness.fakes import FaultyFiles
from served import Served, X, client_of, error_of
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from streamlearn.serve import schemas
from streamlearn.state.files import Files
from streamlearn.state.publish import PublishedDir, pin, unpin

ADMIN = {"authorization": "Bearer rule"}


def three_versions(folder, **settings):
    """Versions 7, 8 and 9, published ten seconds apart."""
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
    def test_lists_the_versions_newest_first(self, client):
        """Each with its age and its scores at publication."""
        reported = schemas.VersionsReply.model_validate(client.get("/models").json()).versions

        assert [one.version for one in reported] == [9, 8, 7]
        assert [one.served for one in reported] == [True, False, False]
        assert (reported[2].age_s, reported[2].scores) == (30.0, {"windowed_accuracy": 0.7})


class TestRollback:
    def test_serves_the_older_version_from_the_reply_on(self, client, served):
        """The next answer equals that of the version, digit for digit."""
        reported = schemas.ServedReply.model_validate(roll_back(client, 7).json())
        answer = client.post("/predict", json={"x": X}).json()

        assert (reported.model_version, reported.pinned, reported.newest_version, reported.before) == (7, True, 9, 9)
        assert answer["model_version"] == 7
        assert answer["predictions"][0]["probabilities"] == pytest.approx(served.expected(7, X)[0].tolist())

    def test_holds_while_newer_ones_are_published(self, client, served):
        """The learner continues."""
        roll_back(client, 7)
        served.publish(10)

        assert client.get("/model").json()["model_version"] == 7

    def test_to_another_version_replaces_the_first(self, client):
        """A newer one as well."""
        roll_back(client, 7)

        assert roll_back(client, 8).json()["model_version"] == 8

    def test_is_written_to_the_audit_log(self, client):
        """The version, the one before, and the request."""
        with capture_logs() as logged:
            reply = client.post("/model/rollback", json={"version": 7}, headers={"x-request-id": "r-1"})

        (line,) = (line for line in logged if line["event"] == "version_pinned")
        assert (line["step"], line["before_step"], line["by"], line["request_id"]) == (7, 9, "http", "r-1")
        assert reply.status_code == 200

    def test_to_an_unknown_version_is_404_with_the_known_ones(self, client):
        """Nothing changes."""
        reported = error_of(roll_back(client, 3), 404, "unknown_version")

        assert reported.details == {"versions": [7, 8, 9]}
        assert client.get("/model").json()["pinned"] is False

    def test_to_a_version_that_cannot_be_served_is_refused(self, client, served):
        """It is loaded first. Here its classes have another order."""
        served.publish(10, classes='["dog", "cat", "owl"]')

        error_of(roll_back(client, 10), 422, "not_servable")
        assert client.get("/model").json()["pinned"] is False

    @pytest.mark.parametrize("route", ["/model/rollback", "/model/promote"])
    def test_a_folder_that_cannot_be_written_is_503(self, served, route):
        """It may be mounted read-only. The same for promote."""
        pin(served.folder / "published", 8)
        app = served.app_with(files=FaultyFiles(fail_at=1))

        with TestClient(app, headers=ADMIN) as client:
            reported = error_of(client.post(route, json={"version": 7}), 503, "not_writable")

        assert "injected fault" in reported.message or "No space left" in reported.message

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
    def test_an_invalid_body_is_422(self, client, body):
        """With an example of a valid one."""
        reported = error_of(client.post("/model/rollback", content=body), 422, "invalid_body")

        assert '{"version": 1200}' in reported.message

    def test_a_body_is_bounded(self, client):
        """Like any other."""
        error_of(client.post("/model/rollback", content=b" " * 4097), 413, "body_too_large")

    def test_a_version_that_is_not_served_in_time_is_503(self, tmp_path):
        """The version stays pinned. Without its lifespan this server follows nothing."""
        served = three_versions(tmp_path, timeout_s=0.1)
        served.predictor.refresh()

        error_of(roll_back(TestClient(served.app, headers=ADMIN), 7), 503, "not_served_yet")

        assert PublishedDir(served.folder / "published").pinned().step == 7


class SlowFiles(Files):
    """A disk whose first write blocks until `go_on` is set."""

    def __init__(self):
        self.entered, self.go_on = threading.Event(), threading.Event()

    def write(self, path, chunks):
        self.entered.set()
        assert self.go_on.wait(10.0)
        super().write(path, chunks)


class TestOneAtATime:
    def test_a_second_change_is_refused_during_the_first(self, served):
        """429, and nothing changes; a later one is accepted."""
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
        """The reply has the version before."""
        roll_back(client, 7)

        reported = schemas.ServedReply.model_validate(client.post("/model/promote").json())

        assert (reported.model_version, reported.pinned, reported.before) == (9, False, 7)

    def test_without_a_pin_nothing_changes(self, client):
        """200, and no line of the audit log."""
        with capture_logs() as logged:
            reply = client.post("/model/promote")

        assert (reply.status_code, reply.json()["model_version"]) == (200, 9)
        assert "version_unpinned" not in {line["event"] for line in logged}

    def test_is_written_to_the_audit_log(self, client):
        """With the version before."""
        roll_back(client, 7)
        with capture_logs() as logged:
            client.post("/model/promote")

        (line,) = (line for line in logged if line["event"] == "version_unpinned")
        assert (line["before_step"], line["by"]) == (7, "http")


class TestOtherRoutes:
    def test_model_reports_the_pin_and_the_newest_version(self, client):
        """And has a note."""
        roll_back(client, 7)

        reported = schemas.ModelReply.model_validate(client.get("/model").json())

        assert (reported.model_version, reported.pinned, reported.newest_version) == (7, True, 9)
        assert reported.notes == ["version 7 is pinned, the newest is 9"]

    def test_a_pinned_server_is_ready_with_a_note(self, client):
        """A pin is no failure."""
        roll_back(client, 7)

        reply = client.get("/health/ready")

        assert (reply.status_code, reply.json()["reasons"]) == (200, ["version 7 is pinned, the newest is 9"])

    @pytest.mark.parametrize("query", ["min_version=8", "max_age_s=25"])
    def test_predict_for_a_newer_version_reports_the_pin(self, tmp_path, query):
        """A longer wait would not help."""
        served = three_versions(tmp_path, timeout_s=0.1)
        pin(served.folder / "published", 7)

        with client_of(served, headers=ADMIN) as client:
            reported = error_of(client.post(f"/predict?{query}", json={"x": X}), 503, "model_not_fresh")

        assert "version 7 is pinned" in reported.message

    def test_predict_that_waits_is_answered_after_promote(self, client, served):
        """A wait continues during a pin, which may end."""
        roll_back(client, 7)
        promoting = threading.Timer(0.1, unpin, [served.folder / "published"])
        promoting.start()

        reply = client.post("/predict?min_version=9", json={"x": X})
        promoting.join()

        assert reply.json()["model_version"] == 9

    def test_with_a_broken_pin_the_newest_answers(self, client, served):
        """The server stays ready; the note names the file."""
        (served.folder / "published" / "pinned.safetensors").write_bytes(b"torn")
        served.predictor.refresh()

        reported = client.get("/health/ready").json()

        assert reported["ready"] is True
        assert "version 9 answers" in reported["reasons"][0]
        assert "pinned.safetensors" in reported["reasons"][0]

    def test_findings_of_the_learners_guard_are_reported(self, client, served):
        """From its heartbeat. The server stays ready: the last healthy version answers."""
        served.status["guard"] = {"frozen": True, "reasons": ["collapsed"]}

        notes = client.get("/model").json()["notes"]

        assert notes == [
            "the learner's guard finds the model collapsed",
            "the learner's guard publishes no new version until the model is healthy",
        ]
        assert client.get("/health/ready").json() == {"ready": True, "reasons": notes}
