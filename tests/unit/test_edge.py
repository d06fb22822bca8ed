"""Authorisation: tokens, their roles, and what is open without any token."""

import itertools

import pytest
import served
from served import JSON, Served, X, client_of, error_of
from structlog.testing import capture_logs

from streamlearn.serve.edge import ROLES, Role, role_of

TOKENS = {"token": "one", "predict_token": "ask", "label_token": "tell", "admin_token": "rule"}
ROUTES = [
    *((method, path.format(sample_id="a"), role) for method, path, role in served.ROUTES if "/health/" not in path),
    ("GET", "/", None),
    ("GET", "/docs", None),
    ("GET", "/openapi.json", None),
    ("GET", "/nowhere", None),
]
OPENS = {
    "one": {"predict", "label", None},
    "ask": {"predict", None},
    "tell": {"label", None},
    "rule": {"predict", "label", "admin", None},
}


def bearer(token):
    return {"authorization": f"Bearer {token}"} if token else {}


def started(folder, **settings):
    served = Served(folder, timeout_s=0.1, **settings)
    served.publish(7)
    return served


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with a token of each kind."""
    with client_of(started(tmp_path_factory.mktemp("guarded"), **TOKENS)) as client:
        yield client


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory):
    """A server without any token."""
    with client_of(started(tmp_path_factory.mktemp("open"))) as client:
        yield client


class TestRoles:
    @pytest.mark.parametrize(("method", "path", "role"), [route for route in ROUTES if route[2]])
    def test_each_route_has_its_role(self, method, path, role):
        """By its method and the first part of its path."""
        assert role_of(method, path) is Role(role)

    def test_each_documented_route_is_in_the_table(self, guarded):
        """A route that is not there would be open to every token. The routes tagged admin are admin there too."""
        paths = guarded.get("/openapi.json", headers=bearer("rule")).json()["paths"]

        assert {path.split("/")[1] for path in paths} - set(ROLES) == {"model", "health"}
        for path, methods in paths.items():
            for method, operation in methods.items():
                assert ("admin" in operation["tags"]) == (role_of(method.upper(), path) is Role.ADMIN), (method, path)

    @pytest.mark.parametrize("path", ["/", "/label/a", "/score"])
    def test_all_deletes_are_admin(self, path):
        """Including routes added later."""
        assert role_of("DELETE", path) is Role.ADMIN

    @pytest.mark.parametrize("path", ["/model/", "/model/anything", "/model/rollback/x"])
    def test_all_below_model_is_admin(self, path):
        """Including routes added later."""
        assert role_of("POST", path) is Role.ADMIN

    @pytest.mark.parametrize("token", [*TOKENS.values()])
    @pytest.mark.parametrize(("method", "path", "role"), ROUTES)
    def test_a_token_grants_only_its_roles(self, guarded, token, method, path, *, role):
        """403 for a token of another role; the message names the needed role."""
        reply = guarded.request(method, path, headers=bearer(token))

        if role in OPENS[token]:
            assert reply.status_code not in (401, 403)
        else:
            reported = error_of(reply, 403, "wrong_role")
            assert reported.details == {"needed": role, "held": sorted(OPENS[token] - {None})}

    @pytest.mark.parametrize("token", [None, "", "wrong", "on", "onee", "rule "])
    @pytest.mark.parametrize(("method", "path", "role"), ROUTES)
    def test_without_a_valid_token_all_is_401(self, guarded, token, method, path, *, role):
        """Including admin routes and paths that do not exist."""
        if token == "rule ":
            token = "rule x"
        error_of(guarded.request(method, path, headers=bearer(token)), 401, "unauthorised")

    def test_health_needs_none(self, guarded):
        """Health probes have no token."""
        assert guarded.get("/health/live").status_code == 200

    def test_a_predict_token_may_use_learn(self, guarded):
        """A sample without a label is no ground truth."""
        reply = guarded.post("/predict?learn=1", json={"x": X}, headers=bearer("ask"))

        assert reply.status_code == 200
        assert "position" in reply.json()["predictions"][0]


class TestWebPages:
    """A server without a token, and pages in a browser of its machine."""

    @pytest.mark.parametrize(
        "host",
        ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8080", "127.8.9.10:1", "[::1]", "[::1]:8080"],
    )
    def test_loopback_names_are_answered_with_any_port(self, open_to_all, host):
        """A container's port may be published as another one."""
        assert open_to_all.get("/model", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:8080",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "localhost:80:80",
            "localhost@evil.example",
            "0.0.0.0:8080",
            "10.0.0.1",
            "[::2]",
            "[::1",
            "",
            "\u0660",
        ],
    )
    @pytest.mark.parametrize(("method", "path", "role"), ROUTES)
    def test_another_host_is_refused_everywhere(self, open_to_all, host, method, path, *, role):
        """DNS rebinding: the page's own name resolves to 127.0.0.1, so the browser sees one origin."""
        reply = open_to_all.request(method, path, headers={"host": host.encode()})

        reported = error_of(reply, 403, "wrong_host")
        for named in ("Host", "serve.token", "serve.insecure"):
            assert named in reported.message

    def test_each_host_must_be_loopback(self, open_to_all):
        """Two Host headers are invalid, and a proxy may use either."""
        reply = open_to_all.get("/model", headers=[("host", "localhost"), ("host", "evil.example")])

        error_of(reply, 403, "wrong_host")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("Origin", "http://evil.example"),
            ("Origin", "http://localhost:3000"),
            ("Origin", "null"),
            ("Origin", ""),
            ("Sec-Fetch-Site", "cross-site"),
            ("Sec-Fetch-Site", "same-site"),
        ],
    )
    @pytest.mark.parametrize(("method", "path"), [("GET", "/label/requests"), ("POST", "/label"), ("GET", "/metrics")])
    def test_a_page_of_another_origin_is_refused(self, open_to_all, name, value, method, path):
        """Images and forms are sent without a preflight: a GET of /label/requests takes samples."""
        reported = error_of(open_to_all.request(method, path, headers={name: value}), 403, "wrong_origin")

        assert name in reported.message
        assert "serve.token" in reported.message

    @pytest.mark.parametrize("origin", ["http://localhost:8080", "https://LocalHost:8080"])
    @pytest.mark.parametrize("site", ["same-origin", "none"])
    def test_own_pages_and_typed_addresses_are_answered(self, open_to_all, origin, site):
        """/docs sends requests; a proxy on this machine may end TLS."""
        headers = {"host": "localhost:8080", "origin": origin, "sec-fetch-site": site}

        assert open_to_all.post("/predict", json={"x": X}, headers=headers).status_code == 200

    def test_health_is_answered_for_any_host(self, open_to_all):
        """Probes use the address of a container or a node."""
        headers = {"host": "10.1.2.3:8080", "origin": "http://evil.example"}

        assert open_to_all.get("/health/ready", headers=headers).status_code == 200

    @pytest.mark.parametrize("settings", [{"token": "one"}, {"admin_token": "one"}, {"insecure": True}])
    def test_with_a_token_or_insecure_any_host_is_answered(self, tmp_path, settings):
        """A page has no token; `serve.insecure` is for proxies that authorise by themselves."""
        headers = {"host": "ml.example", "origin": "http://evil.example", "sec-fetch-site": "cross-site"}

        with client_of(started(tmp_path, **settings)) as client:
            assert client.get("/model", headers={**headers, **bearer("one")}).status_code == 200

    def test_refusals_are_counted(self, tmp_path):
        """Like wrong tokens."""
        served = started(tmp_path)

        with client_of(served) as client:
            client.get("/model", headers={"host": "evil.example"})

        assert 'streamlearn_rejected_total{reason="unauthorised"} 1.0' in served.metrics.text()


class TestSettings:
    @pytest.mark.parametrize(("method", "path", "role"), ROUTES)
    def test_without_any_token_all_is_open_except_admin(self, open_to_all, method, path, *, role):
        """403 names the missing setting."""
        reply = open_to_all.request(method, path)

        if role == "admin":
            assert "STREAMLEARN_SERVE__ADMIN_TOKEN" in error_of(reply, 403, "admin_token_not_set").message
        else:
            assert reply.status_code not in (401, 403)

    def test_without_an_admin_token_admin_is_closed_to_other_tokens(self, tmp_path):
        """The reason is shown only with a valid token."""
        served = started(tmp_path, token="one", predict_token="ask")

        with client_of(served) as client:
            error_of(client.get("/models", headers=bearer("one")), 403, "admin_token_not_set")
            error_of(client.get("/models", headers=bearer("wrong")), 401, "unauthorised")

    @pytest.mark.parametrize("name", list(TOKENS))
    def test_any_token_closes_the_routes_it_does_not_grant(self, tmp_path, name):
        """With only an admin token, all routes need it."""
        with client_of(started(tmp_path, **{name: "t"})) as client:
            assert client.post("/predict", content=b"{}", headers=JSON).status_code == 401
            assert client.post("/label", content=b"{}", headers=JSON).status_code == 401

    def test_one_value_of_two_tokens_grants_both(self, tmp_path):
        """Roles are united."""
        with client_of(started(tmp_path, predict_token="t", label_token="t")) as client:
            assert client.get("/model", headers=bearer("t")).status_code == 200
            assert client.get("/label/a", headers=bearer("t")).status_code == 404

    @pytest.mark.parametrize("names", [*itertools.combinations(TOKENS, 1), tuple(TOKENS)])
    def test_no_token_is_shown_or_logged(self, tmp_path, names):
        """In the settings' repr, in replies, or in log lines."""
        served = started(tmp_path, **{name: f"secret-{name}" for name in names})

        with client_of(served) as client, capture_logs() as logged:
            texts = [client.get("/models", headers=bearer(f"secret-{name}")).text for name in names]
            texts += [client.get("/models", headers=bearer("guess")).text]

        assert "secret-" not in repr(served.settings) + repr(logged) + "".join(texts)
