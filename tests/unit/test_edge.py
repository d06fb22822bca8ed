"""Who may do what: tokens, their roles, and what a server without any of them leaves open."""

import itertools

import pytest
from served import JSON, Served, X, client_of, error_of
from structlog.testing import capture_logs

from streamlearn.serve.edge import Role, role_of

TOKENS = {"token": "one", "predict_token": "ask", "label_token": "tell", "admin_token": "rule"}
ROUTES = [
    ("POST", "/predict", "predict"),
    ("GET", "/model", "predict"),
    ("POST", "/label", "label"),
    ("POST", "/sample", "label"),
    ("GET", "/label/a", "label"),
    ("GET", "/label/requests", "label"),
    ("GET", "/sample/a", "label"),
    ("GET", "/models", "admin"),
    ("POST", "/model/rollback", "admin"),
    ("POST", "/model/promote", "admin"),
    ("DELETE", "/sample/a", "admin"),
    ("GET", "/metrics", None),
    ("GET", "/score", None),
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
    def test_each_route_has_the_one_that_it_is_for(self, method, path, role):
        """By its method and the first part of its path; the rest does not matter."""
        assert role_of(method, path) is Role(role)

    @pytest.mark.parametrize("path", ["/", "/label/a", "/score"])
    def test_whatever_deletes_is_admin(self, path):
        """Also what nobody has written yet."""
        assert role_of("DELETE", path) is Role.ADMIN

    @pytest.mark.parametrize("path", ["/model/", "/model/anything", "/model/rollback/x"])
    def test_all_below_model_is_admin(self, path):
        """Also what nobody has written yet."""
        assert role_of("POST", path) is Role.ADMIN

    @pytest.mark.parametrize("token", [*TOKENS.values()])
    @pytest.mark.parametrize(("method", "path", "role"), ROUTES)
    def test_a_token_opens_its_own_and_nothing_else(self, guarded, token, method, path, *, role):
        """403 where it is a good token for something else; the message names what is wanted."""
        reply = guarded.request(method, path, headers=bearer(token))

        if role in OPENS[token]:
            assert reply.status_code not in (401, 403)
        else:
            told = error_of(reply, 403, "wrong_role")
            assert told.details == {"needed": role, "held": sorted(OPENS[token] - {None})}

    @pytest.mark.parametrize("token", [None, "", "wrong", "on", "onee", "rule "])
    @pytest.mark.parametrize(("method", "path", "role"), ROUTES)
    def test_a_stranger_learns_nothing(self, guarded, token, method, path, *, role):
        """401 everywhere, admin and what does not exist included."""
        if token == "rule ":
            token = "rule x"
        error_of(guarded.request(method, path, headers=bearer(token)), 401, "unauthorised")

    def test_health_wants_none(self, guarded):
        """Probes have no token."""
        assert guarded.get("/health/live").status_code == 200

    def test_a_predict_token_may_have_learned_what_it_asks(self, guarded):
        """A sample without a label teaches no class: who may ask may ask with `learn`."""
        reply = guarded.post("/predict?learn=1", json={"x": X}, headers=bearer("ask"))

        assert reply.status_code == 200
        assert "position" in reply.json()["predictions"][0]


class TestWebPages:
    """A server without a token, and pages in a browser of its machine."""

    @pytest.mark.parametrize(
        "host",
        ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8080", "127.8.9.10:1", "[::1]", "[::1]:8080"],
    )
    def test_loopback_by_any_name_and_port_is_answered(self, open_to_all, host):
        """A container's port may be published under another number."""
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
        """DNS rebinding: the page's own name leads to 127.0.0.1, and to the browser it is one origin."""
        reply = open_to_all.request(method, path, headers={"host": host.encode()})

        told = error_of(reply, 403, "wrong_host")
        for named in ("Host", "serve.token", "serve.insecure"):
            assert named in told.message

    def test_each_host_must_be_loopback(self, open_to_all):
        """Two are no HTTP, and one of them may be what somebody else goes by."""
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
        """An image or a form needs no leave to send: a GET of /label/requests hands out samples, a label teaches."""
        told = error_of(open_to_all.request(method, path, headers={name: value}), 403, "wrong_origin")

        assert name in told.message
        assert "serve.token" in told.message

    @pytest.mark.parametrize("origin", ["http://localhost:8080", "https://LocalHost:8080"])
    @pytest.mark.parametrize("site", ["same-origin", "none"])
    def test_its_own_pages_and_an_address_that_was_typed_are_answered(self, open_to_all, origin, site):
        """The documentation at /docs tries requests out; a proxy on this machine may end TLS."""
        headers = {"host": "localhost:8080", "origin": origin, "sec-fetch-site": site}

        assert open_to_all.post("/predict", json={"x": X}, headers=headers).status_code == 200

    def test_probes_are_answered_by_any_name(self, open_to_all):
        """They ask by the address of a container or a node."""
        headers = {"host": "10.1.2.3:8080", "origin": "http://evil.example"}

        assert open_to_all.get("/health/ready", headers=headers).status_code == 200

    @pytest.mark.parametrize("settings", [{"token": "one"}, {"admin_token": "one"}, {"insecure": True}])
    def test_with_a_token_or_where_it_is_meant_any_name_will_do(self, tmp_path, settings):
        """A page knows no token; `serve.insecure` is for proxies that ask who is there themselves."""
        headers = {"host": "ml.example", "origin": "http://evil.example", "sec-fetch-site": "cross-site"}

        with client_of(started(tmp_path, **settings)) as client:
            assert client.get("/model", headers={**headers, **bearer("one")}).status_code == 200

    def test_what_is_refused_is_counted(self, tmp_path):
        """As are wrong tokens."""
        served = started(tmp_path)

        with client_of(served) as client:
            client.get("/model", headers={"host": "evil.example"})

        assert 'streamlearn_rejected_total{reason="unauthorised"} 1.0' in served.metrics.text()


class TestSettings:
    @pytest.mark.parametrize(("method", "path", "role"), ROUTES)
    def test_without_any_token_all_is_open_but_admin(self, open_to_all, method, path, *, role):
        """403 says which setting is missing."""
        reply = open_to_all.request(method, path)

        if role == "admin":
            assert "STREAMLEARN_SERVE__ADMIN_TOKEN" in error_of(reply, 403, "admin_token_not_set").message
        else:
            assert reply.status_code not in (401, 403)

    def test_without_an_admin_token_admin_is_closed_to_every_other(self, tmp_path):
        """It is said to who has a token, and to nobody else."""
        served = started(tmp_path, token="one", predict_token="ask")

        with client_of(served) as client:
            error_of(client.get("/models", headers=bearer("one")), 403, "admin_token_not_set")
            error_of(client.get("/models", headers=bearer("wrong")), 401, "unauthorised")

    @pytest.mark.parametrize("name", list(TOKENS))
    def test_any_token_that_is_set_closes_what_it_does_not_open(self, tmp_path, name):
        """A server with an admin token alone asks for it everywhere."""
        with client_of(started(tmp_path, **{name: "t"})) as client:
            assert client.post("/predict", content=b"{}", headers=JSON).status_code == 401
            assert client.post("/label", content=b"{}", headers=JSON).status_code == 401

    def test_one_text_in_two_settings_opens_both(self, tmp_path):
        """The roles add up."""
        with client_of(started(tmp_path, predict_token="t", label_token="t")) as client:
            assert client.get("/model", headers=bearer("t")).status_code == 200
            assert client.get("/label/a", headers=bearer("t")).status_code == 404

    @pytest.mark.parametrize("names", [*itertools.combinations(TOKENS, 1), tuple(TOKENS)])
    def test_no_token_is_shown_or_logged(self, tmp_path, names):
        """Neither by the settings' repr, nor in a reply, nor in a line of the log."""
        served = started(tmp_path, **{name: f"secret-{name}" for name in names})

        with client_of(served) as client, capture_logs() as logged:
            texts = [client.get("/models", headers=bearer(f"secret-{name}")).text for name in names]
            texts += [client.get("/models", headers=bearer("guess")).text]

        assert "secret-" not in repr(served.settings) + repr(logged) + "".join(texts)
