"""TLS, SASL and OAuth against a real secured Kafka and a real OAuth server; what is refused, and how it is reported."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.fakes import ManualClock
from harness.secured import CLIENT_ID, CLIENT_SECRET, PLAIN_USERS, REAUTH_MS, Authority, SecuredBroker, TokenServer
from kafka import KafkaAdminClient
from kafka import errors as kafka_errors
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ResourcePattern,
    ResourceType,
    UserScramCredentialUpsertion,
)
from small_learner import config_in
from structlog.testing import capture_logs

from streamlearn.app.check import check
from streamlearn.app.learner import learn
from streamlearn.app.log import make_codec
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError, LogError, LogUnavailableError
from streamlearn.log import kafka_security
from streamlearn.log.kafka import KafkaLog
from streamlearn.log.kafka_security import TOKEN_RETRY_S, TokenSource, TokenUnavailableError, security_options
from streamlearn.log.settings import KafkaConfig
from streamlearn.records import NewRecord, TopicPartition

SECRET = "Pa55word-0123456789"
OAUTH = {"mechanism": "OAUTHBEARER", "username": CLIENT_ID, "password": CLIENT_SECRET}
PLAIN = {"mechanism": "PLAIN", "username": "alice", "password": PLAIN_USERS["alice"]}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SecuredBroker, TokenServer]]:
    """A broker with all listeners, and the OAuth server whose tokens it accepts."""
    with TokenServer() as tokens, SecuredBroker(tmp_path_factory.mktemp("secured"), tokens) as broker:
        set_password(broker, SECRET)
        yield broker, tokens


@pytest.fixture
def broker(secured: tuple[SecuredBroker, TokenServer]) -> SecuredBroker:
    return secured[0]


@pytest.fixture
def tokens(secured: tuple[SecuredBroker, TokenServer]) -> Iterator[TokenServer]:
    """The broker's OAuth server, as it was after the test."""
    server = secured[1]
    yield server
    server.reply, server.lifetime_s = None, 60.0
    server.stop()
    server.start()


@pytest.fixture
def idle_tokens() -> Iterator[TokenServer]:
    """An OAuth server without a broker."""
    with TokenServer() as server:
        yield server


def set_password(broker: SecuredBroker, password: str) -> None:
    """The SCRAM password of bob."""
    with closing(KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)) as admin:
        found = [UserScramCredentialUpsertion("bob", f"SCRAM-SHA-{bits}", password) for bits in (256, 512)]
        for each in found:
            assert admin.alter_user_scram_credentials([each]) == {"bob": None}


def allow(broker: SecuredBroker, user: str, topic: str, *operations: ACLOperation) -> None:
    pattern = ResourcePattern(ResourceType.TOPIC, topic)
    with closing(KafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)) as admin:
        admin.create_acls([ACL(f"User:{user}", "*", each, ACLPermissionType.ALLOW, pattern) for each in operations])


def settings_of(broker: SecuredBroker, kind: str, tokens: TokenServer) -> dict[str, Any]:
    """The settings of one kind of security, as a user writes them."""
    ca, (cert, key) = broker.authority.ca_file, broker.authority.issue("learner")
    sasl = {"bootstrap_servers": broker.at("SASL"), "ca_file": ca}
    scram = {"username": "bob", "password": SECRET}
    return {
        "tls": {"bootstrap_servers": broker.at("TLS"), "ca_file": ca},
        "mtls": {"bootstrap_servers": broker.at("MTLS"), "ca_file": ca, "cert_file": cert, "key_file": key},
        "plain": {**sasl, **PLAIN},
        "plain without tls": {"bootstrap_servers": broker.at("SASL_OPEN"), **PLAIN, "tls": False},
        "scram-256": {**sasl, **scram, "mechanism": "SCRAM-SHA-256"},
        "scram-512": {**sasl, **scram},
        "oauth": {**sasl, **OAUTH, "oauth_token_url": tokens.url("token")},
    }[kind]


def round_trip(log: KafkaLog, topic: str) -> None:
    """Use every client: admin, producer, reader, consumer by position, commit."""
    log.create_topics({topic: 1})
    (position,) = log.append(topic, [NewRecord(b"k", b"v")])
    there = position.topic_partition
    with closing(log.reader({there: 0})) as reader:
        until(lambda: reader.poll([there], 10, 0.5))
    assert log.read(there, position.offset, 1)[0].value == b"v"
    with capture_logs() as logs:
        log.commit({there: 1})
    assert logs == []


def until(done: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "not within the timeout"


@pytest.mark.kafka
class TestRealBroker:
    @pytest.mark.parametrize("kind", ["tls", "mtls", "plain", "plain without tls", "scram-256", "scram-512", "oauth"])
    def test_every_client_works(self, broker: SecuredBroker, tokens: TokenServer, kind: str) -> None:
        """From plain settings, with nothing in `options`."""
        with closing(KafkaLog(KafkaConfig(**settings_of(broker, kind, tokens)))) as log:
            round_trip(log, kind.replace(" ", "-"))

    @pytest.mark.parametrize(
        ("kind", "changed", "error", "says"),
        [
            ("plain", {"password": SECRET[::-1]}, LogError, "Invalid username or password.*check log.kafka.username"),
            (
                "scram-512",
                {"password": SECRET[::-1]},
                LogError,
                "invalid credentials with SASL mechanism SCRAM-SHA-512",
            ),
            ("scram-512", {"username": "nobody"}, LogError, "invalid credentials.*check log.kafka.username"),
            (
                "plain without tls",
                {"mechanism": "SCRAM-SHA-256"},
                LogUnavailableError,
                "UnsupportedSasl.*set .*mechanism",
            ),
            ("oauth", {"password": SECRET[::-1]}, LogError, "HTTP 401, invalid_client the client is not known"),
            ("tls", {"ca_file": None, "tls": True}, LogUnavailableError, "CERTIFICATE_VERIFY_FAILED.*ca_file"),
            ("tls", {"ca_file": None}, LogUnavailableError, "expect TLS"),
            ("mtls", {"cert_file": None, "key_file": None}, LogUnavailableError, "CERTIFICATE_REQUIRED.*cert_file"),
            ("tls", {"ca_file": Path("/nowhere")}, ConfigError, "ca_file = '/nowhere': no such file"),
        ],
    )
    def test_a_refusal_names_the_reason_and_what_to_do(
        self,
        secured: tuple[SecuredBroker, TokenServer],
        kind: str,
        changed: dict[str, Any],
        error: type[Exception],
        says: str,
    ) -> None:
        """At once, and without the password. kafka-python alone reports a timeout after ten seconds."""
        broker, tokens = secured
        began, settings = time.monotonic(), {**settings_of(broker, kind, tokens), **changed}

        with closing(KafkaLog(KafkaConfig(**settings))) as log, pytest.raises(error, match=says) as caught:
            log.partition_count("t")

        assert type(caught.value) is error
        assert time.monotonic() - began < 5.0
        assert str(changed.get("password", "-----")) not in str(caught.value)

    def test_another_authority_is_refused(self, broker: SecuredBroker, tmp_path: Path) -> None:
        """Its certificates do not verify the broker's, and its client certificates are not trusted."""
        other = Authority(tmp_path / "other")
        cert, key = other.issue("learner")
        at = {"bootstrap_servers": broker.at("MTLS"), "cert_file": cert, "key_file": key}

        for ca_file, says in ((other.ca_file, "CERTIFICATE_VERIFY_FAILED"), (broker.authority.ca_file, "ALERT")):
            with (
                closing(KafkaLog(KafkaConfig(**at, ca_file=ca_file))) as log,
                pytest.raises(LogUnavailableError, match=says),
            ):
                log.partition_count("t")

    def test_an_expired_token_is_refused_with_the_brokers_reason(
        self, broker: SecuredBroker, tokens: TokenServer
    ) -> None:
        """The broker validates it by its own handler and the published keys."""
        tokens.lifetime_s = -10.0

        with (
            closing(KafkaLog(KafkaConfig(**settings_of(broker, "oauth", tokens)))) as log,
            pytest.raises(LogError, match=r"invalid_token.*expired") as caught,
        ):
            log.partition_count("t")

        assert type(caught.value) is LogError

    def test_a_missing_acl_is_an_error_before_a_record_needs_it(self, broker: SecuredBroker) -> None:
        """An empty append and an opened reader check it, and name the operation."""
        settings = {"bootstrap_servers": broker.at("SASL"), "ca_file": broker.authority.ca_file, **PLAIN}
        stranger = {**settings, "username": "stranger", "password": PLAIN_USERS["stranger"]}
        with closing(KafkaLog(KafkaConfig(**settings))) as log:
            log.create_topics({"acl": 1, "acl-read": 1, "acl-write": 1})
        allow(broker, "stranger", "acl-read", ACLOperation.READ)
        allow(broker, "stranger", "acl-write", ACLOperation.WRITE)

        with closing(KafkaLog(KafkaConfig(**stranger))) as log:
            with pytest.raises(LogError, match=r"TopicAuthorizationFailed.*the user lacks an ACL"):
                log.partition_count("acl")
            with pytest.raises(LogError, match=r"acl-read: the user lacks an ACL for WRITE; the broker allows.*READ"):
                log.append("acl-read", [])
            with pytest.raises(LogError, match="acl-write: the user lacks an ACL for READ"):
                log.reader({TopicPartition("acl-write", 0): 0})
            assert log.append("acl-write", []) == []
            log.reader({TopicPartition("acl-read", 0): 0}).close()


@pytest.mark.kafka
class TestLearner:
    """Whole processes on a secured broker."""

    def config(self, folder: Path, prefix: str, **kafka: Any) -> Config:
        topics = {
            "source.samples.topic": f"{prefix}-samples",
            "source.labels.topic": f"{prefix}-labels",
            "log.dead_letters": f"{prefix}-dead_letters",
        }
        given = {f"log.kafka.{name}": str(value) for name, value in kafka.items()}
        return config_in(folder, **{"log.kind": "kafka", **topics, **given})

    def test_it_learns_and_writes_dead_letters_and_check_finds_nothing(
        self, broker: SecuredBroker, tokens: TokenServer, tmp_path: Path
    ) -> None:
        """With OAUTHBEARER in each client, and the secret in a file."""
        secret = tmp_path / "secret"
        secret.write_text(f"{CLIENT_SECRET}\n")
        security = {**settings_of(broker, "oauth", tokens), "password": f"file:{secret}"}
        config = self.config(tmp_path / "state", "learn", **security)
        codec, rows = make_codec(config), np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
        with closing(KafkaLog(config.log.kafka)) as log:
            log.create_topics({"learn-samples": 1, "learn-labels": 1, "learn-dead_letters": 1})
            log.append("learn-samples", [codec.encode_sample(f"s{n}", row) for n, row in enumerate(rows)])
            log.append("learn-samples", [NewRecord(b"bad", b"{")])
            log.append("learn-labels", [codec.labels.encode("s3", 1)])

            learn(config, threading.Event(), until_end=True)

            assert len(log.read(TopicPartition("learn-dead_letters", 0), 0, 10)) == 1
        assert [f.text for f in check(config) if f.verdict == "error"] == []

    def test_check_and_the_learner_report_a_refusal_without_the_secret(
        self, broker: SecuredBroker, tokens: TokenServer, tmp_path: Path
    ) -> None:
        """At the start, before any state is written."""
        config = self.config(tmp_path, "refused", **{**settings_of(broker, "oauth", tokens), "password": SECRET})

        (error,) = [
            finding.text for finding in check(config) if finding.subject == "log" and finding.verdict == "error"
        ]
        with pytest.raises(LogError, match="invalid_client") as caught:
            learn(config, threading.Event(), until_end=True)

        assert "invalid_client the client is not known" in error
        assert SECRET not in error + str(caught.value)

    def test_check_and_the_learner_report_a_missing_acl(
        self, broker: SecuredBroker, tokens: TokenServer, tmp_path: Path
    ) -> None:
        """Dead letters are rare: without this the learner would stop at the first one, in mid-stream."""
        topics = ("limited-samples", "limited-labels", "limited-dead_letters")
        with closing(KafkaLog(KafkaConfig(**settings_of(broker, "plain", tokens)))) as log:
            log.create_topics(dict.fromkeys(topics, 1))
        for topic in topics:
            allow(broker, "stranger", topic, ACLOperation.READ)
        user = {"username": "stranger", "password": PLAIN_USERS["stranger"]}
        config = self.config(tmp_path, "limited", **{**settings_of(broker, "plain", tokens), **user})

        errors = [finding.text for finding in check(config) if finding.verdict == "error"]
        with pytest.raises(LogError, match="limited-dead_letters: the user lacks an ACL for WRITE"):
            learn(config, threading.Event(), until_end=True)

        assert len(errors) == 3
        assert all("lacks an ACL for WRITE" in text for text in errors)


class Stream:
    """Appends and reads for a while, and notes what could not be done."""

    def __init__(self, log: KafkaLog, topic: str) -> None:
        log.create_topics({topic: 1})
        self._log, self._there = log, TopicPartition(topic, 0)
        self._reader = log.reader({self._there: 0})
        self.appended, self.read = list[bytes](), list[bytes | None]()
        self.refusals = list[str]()

    def run(self, until_s: float) -> None:
        """Every error but LogUnavailableError fails the test: the learner would end."""
        while time.monotonic() < until_s:
            value = str(len(self.appended)).encode()
            try:
                self._log.append(self._there.topic, [NewRecord(b"k", value)], timeout_s=1.0)
                self.appended.append(value)
            except LogUnavailableError as error:
                self.refusals.append(str(error))
            self.poll()
            time.sleep(0.02)

    def poll(self) -> None:
        """Read some."""
        try:
            self.read += [record.value for record in self._reader.poll([self._there], 100, 0.02)]
        except LogUnavailableError as error:
            self.refusals.append(str(error))

    def finish(self) -> None:
        """All that was acknowledged is read, in order."""
        until(lambda: self.poll() or set(self.appended) <= set(self.read))
        self._reader.close()


@pytest.mark.kafka
class TestMidStream:
    """After a start nothing ends the stream: sessions expire, passwords and tokens change, the OAuth server is away."""

    def test_sessions_are_renewed_and_a_rotated_password_is_read_again(
        self, broker: SecuredBroker, tokens: TokenServer, tmp_path: Path
    ) -> None:
        """The broker ends each session after `REAUTH_MS`. The password changes there first, then in the file."""
        path = tmp_path / "password"
        path.write_text(SECRET)
        settings = {**settings_of(broker, "scram-512", tokens), "password": f"file:{path}"}
        with closing(KafkaLog(KafkaConfig(**settings))) as log:
            stream = Stream(log, "rotation")
            stream.run(time.monotonic() + 1.5 * REAUTH_MS / 1000)
            assert stream.refusals == []

            set_password(broker, "another-Pa55")
            try:
                stream.run(time.monotonic() + 1.2 * REAUTH_MS / 1000)
                path.write_text("another-Pa55")
                before = len(stream.appended)
                until(lambda: stream.run(time.monotonic() + 0.2) or len(stream.appended) > before + 5)
                stream.finish()
            finally:
                set_password(broker, SECRET)

    def test_the_stream_waits_for_an_oauth_server_that_is_away(
        self, broker: SecuredBroker, tokens: TokenServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tokens are renewed before they expire. Without a server the stream stalls, then goes on by itself."""
        monkeypatch.setattr(kafka_security, "TOKEN_RETRY_S", 0.5)
        tokens.lifetime_s, issued = 2.0, tokens.issued
        with closing(KafkaLog(KafkaConfig(**settings_of(broker, "oauth", tokens)))) as log:
            stream = Stream(log, "tokens")
            stream.run(time.monotonic() + 3.0)
            assert stream.refusals == []
            assert tokens.issued >= issued + 2

            tokens.stop()
            with capture_logs() as logs:
                stream.run(time.monotonic() + 3.0)
            tokens.start()
            before = len(stream.appended)
            until(lambda: stream.run(time.monotonic() + 0.2) or len(stream.appended) > before + 5)
            stream.finish()

        assert any(
            "Connection refused" in entry["error"] for entry in logs if entry["event"] == "oauth_token_unavailable"
        )
        assert stream.refusals
        assert CLIENT_SECRET not in str(logs) + str(stream.refusals)


class TestTokenSource:
    def source(self, server: TokenServer, clock: Callable[[], float], **changed: Any) -> TokenSource:
        return TokenSource(KafkaConfig(**{**OAUTH, "oauth_token_url": server.url("token"), **changed}), clock)

    def test_a_token_is_cached_until_near_its_expiry(self, idle_tokens: TokenServer, clock: ManualClock) -> None:
        """All clients share it."""
        source = self.source(idle_tokens, clock, oauth_scope="kafka read")

        first = source.token()
        clock.advance(47.0)
        assert source.token() == first
        clock.advance(2.0)
        assert source.token() != first

        assert idle_tokens.issued == 2
        assert idle_tokens.scopes == ["kafka read"] * 2

    def test_the_cached_token_bridges_an_outage(self, idle_tokens: TokenServer, clock: ManualClock) -> None:
        """It is logged at each attempt, and attempts keep a distance."""
        source = self.source(idle_tokens, clock)
        first = source.token()
        idle_tokens.reply = (503, b"<html>")

        clock.advance(50.0)
        with capture_logs() as logs:
            assert [source.token(), source.token()] == [first, first]
        clock.advance(10.0)
        with pytest.raises(TokenUnavailableError, match="HTTP 503"):
            source.token()
        idle_tokens.reply = None
        clock.advance(TOKEN_RETRY_S)

        assert source.token() != first
        assert [(entry["event"], entry["cached_token_valid_s"]) for entry in logs] == [("oauth_token_unavailable", 10)]

    def test_a_token_that_the_broker_refused_is_replaced(self, idle_tokens: TokenServer, clock: ManualClock) -> None:
        """Keys may have been rotated; but not at each attempt to connect."""
        source = self.source(idle_tokens, clock)
        first = source.token()

        source.refused()
        assert source.token() == first
        clock.advance(TOKEN_RETRY_S)

        assert source.token() != first

    @pytest.mark.parametrize(
        ("reply", "error", "says"),
        [
            (
                (401, b'{"error": "invalid_client"}'),
                kafka_errors.SaslAuthenticationFailedError,
                "HTTP 401, invalid_client",
            ),
            ((400, b"[" * 50_000), kafka_errors.SaslAuthenticationFailedError, "HTTP 400, no token"),
            ((200, b'{"access_token": "a\\u0001b"}'), TokenUnavailableError, "HTTP 200, no token"),
            ((200, b'{"access_token": 7}'), TokenUnavailableError, "HTTP 200, no token"),
            ((200, b"\xff"), TokenUnavailableError, "HTTP 200, no token"),
            ((302, b""), TokenUnavailableError, "HTTP 302"),
            ((200, b"x" * (1 << 20)), TokenUnavailableError, "more than 65536 bytes"),
        ],
    )
    def test_other_replies_are_errors(
        self,
        idle_tokens: TokenServer,
        clock: ManualClock,
        reply: tuple[int, bytes],
        error: type[Exception],
        says: str,
    ) -> None:
        """A redirect is not followed: it would carry the secret to another server."""
        idle_tokens.reply = reply

        with pytest.raises(error, match=says):
            self.source(idle_tokens, clock).token()

    @pytest.mark.parametrize("lifetime", ["null", "0", "-5", '"60"', "1e999", "NaN", "true"])
    def test_a_strange_lifetime_means_a_short_one(
        self, idle_tokens: TokenServer, clock: ManualClock, lifetime: str
    ) -> None:
        """The token is used, and renewed within a minute."""
        idle_tokens.reply = (200, f'{{"access_token": "a", "expires_in": {lifetime}}}'.encode())
        source = self.source(idle_tokens, clock)
        source.token()
        idle_tokens.reply = None
        clock.advance(50.0)

        assert source.token() != "a"

    def test_an_echoed_secret_is_not_shown(self, idle_tokens: TokenServer, clock: ManualClock) -> None:
        """Some servers repeat what they were sent."""
        idle_tokens.reply = (401, f'{{"error": "not {CLIENT_SECRET}"}}'.encode())

        with capture_logs() as logs, pytest.raises(kafka_errors.SaslAuthenticationFailedError) as caught:
            self.source(idle_tokens, clock).token()

        assert CLIENT_SECRET not in str(caught.value) + str(logs)

    def test_the_secret_is_read_again(self, idle_tokens: TokenServer, clock: ManualClock, tmp_path: Path) -> None:
        """A file that is away for a moment changes nothing."""
        path = tmp_path / "secret"
        path.write_text("old")
        source = self.source(idle_tokens, clock, password=f"file:{path}")
        with pytest.raises(kafka_errors.SaslAuthenticationFailedError):
            source.token()

        path.unlink()
        clock.advance(TOKEN_RETRY_S)
        with capture_logs() as logs, pytest.raises(kafka_errors.SaslAuthenticationFailedError):
            source.token()
        path.write_text(CLIENT_SECRET)
        clock.advance(TOKEN_RETRY_S)

        assert source.token()
        assert logs[0]["event"] == "password_not_read"


class TestSettings:
    @pytest.mark.parametrize(
        ("given", "protocol"),
        [
            ({}, None),
            ({"tls": True}, "SSL"),
            (PLAIN, "SASL_SSL"),
            ({**PLAIN, "tls": False}, "SASL_PLAINTEXT"),
        ],
    )
    def test_the_protocol_is_derived(self, given: dict[str, Any], protocol: str | None) -> None:
        """A password is not sent in the clear unless the user says so."""
        assert security_options(KafkaConfig(**given), None).get("security_protocol") == protocol

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"username": "u"}, "username and password must be set together"),
            ({"password": "p"}, "username and password must be set together"),
            ({**PLAIN, "mechanism": "OAUTHBEARER"}, "needs oauth_token_url"),
            ({**PLAIN, "oauth_token_url": "https://idp/token"}, 'need mechanism = "OAUTHBEARER"'),
            ({"key_file": "k"}, "key_file needs cert_file"),
            ({"tls": False, "ca_file": "c"}, "need TLS"),
            ({**OAUTH, "oauth_token_url": f"https://user:{SECRET}@idp/token"}, "oauth_token_url"),
            ({**OAUTH, "oauth_token_url": "file:///etc/passwd"}, "oauth_token_url"),
        ],
    )
    def test_what_does_not_fit_together_is_an_error(self, given: dict[str, Any], says: str) -> None:
        """Found before anything connects, and reported without secrets."""
        with pytest.raises(ConfigError, match=says) as caught:
            load_config(environ={}, overrides={f"log.kafka.{name}": value for name, value in given.items()})

        assert all(secret not in str(caught.value) for secret in (SECRET, PLAIN["password"], CLIENT_SECRET))

    def test_no_secret_is_shown(self) -> None:
        """In a repr, in JSON or as text."""
        config = load_config(
            environ={"STREAMLEARN_LOG__KAFKA__PASSWORD": SECRET, "STREAMLEARN_LOG__KAFKA__USERNAME": "u"}
        )

        for text in (repr(config), str(config.log), config.model_dump_json(), str(config.model_dump())):
            assert SECRET not in text

    def test_a_setting_and_an_option_must_not_decide_the_same(self) -> None:
        """`options` stays for what has no setting."""
        log = KafkaLog(KafkaConfig(tls=True, options={"security_protocol": "PLAINTEXT"}))

        with closing(log), pytest.raises(ConfigError, match=r"options.security_protocol: .*remove one"):
            log.partition_count("t")

    def test_a_key_of_another_certificate_is_named(self, tmp_path: Path) -> None:
        """Before a connection, and an encrypted key does not ask on the terminal."""
        authority = Authority(tmp_path / "a")
        (cert, _), (_, key) = authority.issue("one"), authority.issue("two")

        with pytest.raises(ConfigError, match=r"cert_file = .*key_file = .*mismatch"):
            security_options(KafkaConfig(cert_file=cert, key_file=key), None)
