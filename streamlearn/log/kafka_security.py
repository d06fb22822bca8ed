"""TLS and SASL of the clients of kafka-python: their options, OAuth tokens, and why a connection was refused."""

from __future__ import annotations

import base64
import json
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import structlog
from kafka import errors as kafka_errors
from kafka.net.compat import KafkaNetClient
from kafka.net.inet import KafkaNetSocket, create_connection
from kafka.net.manager import KafkaConnectionManager
from kafka.net.sasl.oauth import AbstractTokenProvider
from kafka.net.selector import NetworkSelector
from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport
from pydantic import SecretStr

from streamlearn.errors import ConfigError
from streamlearn.log.settings import KafkaConfig
from streamlearn.section import FileSecret, read_secret

TOKEN_TIMEOUT_S = 5.0
TOKEN_RETRY_S = 5.0
"""Between two requests after a failure. kafka-python asks for the token in the thread of its connections."""
TOKEN_MAX_BYTES = 64 << 10
FRESH_SHARE = 0.8
"""Share of a token's lifetime after which a new one is requested; the old one is used until that succeeds."""
LIFETIME_S = 60.0
"""Of a token whose reply has no `expires_in`, or a strange one."""
LIFETIME_MAX_S = 366 * 86400.0
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""The characters of a bearer token (RFC 6750)."""
_REFUSED_STATUS = (400, 401, 403)
_HINTS = (
    ("CERTIFICATE_VERIFY_FAILED", "does log.kafka.ca_file hold the authority of the broker's certificate?"),
    ("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|InvalidReceive", "does this port expect TLS (log.kafka.tls)?"),
    (r"\[SSL: \w*ALERT", "does the broker trust log.kafka.cert_file?"),
    ("UnsupportedSaslMechanism", "set log.kafka.mechanism to one that this listener enables"),
    ("TokenUnavailable", "is log.kafka.oauth_token_url up and correct?"),
    ("invalid_token", "the token is expired, or of another issuer, audience or scope than the broker expects"),
    ("SaslAuthenticationFailed", "check log.kafka.username, password and mechanism"),
    ("AuthorizationFailed", "the user lacks an ACL"),
)
"""What to do about an error, by a pattern of its text."""

_log = structlog.get_logger(__name__)


def hint(error: BaseException) -> str | None:
    """What to do about a refused connection or request; None if the error is of another kind."""
    text = repr(error)
    return next((advice for pattern, advice in _HINTS if re.search(pattern, text)), None)


def password_of(settings: KafkaConfig) -> str:
    """The password, read again from its file, since passwords are rotated. If that fails, the one read at the start."""
    secret = settings.password or SecretStr("")
    if isinstance(secret, FileSecret):
        try:
            return read_secret(secret.path)
        except ValueError as error:
            _log.warning("password_not_read", error=str(error))
    return secret.get_secret_value()


def security_options(settings: KafkaConfig, tokens: AbstractTokenProvider | None) -> dict[str, Any]:
    """The options of kafka-python for TLS and SASL; none if neither is set.

    Raises:
        ConfigError: a file cannot be used, or `settings.options` sets the same.
    """
    options: dict[str, Any] = {}
    if settings.uses_tls or settings.username:
        protocol = ("SASL_" if settings.username else "") + ("SSL" if settings.uses_tls else "PLAINTEXT")
        options["security_protocol"] = protocol
    if settings.uses_tls:
        files = {"ssl_cafile": settings.ca_file, "ssl_certfile": settings.cert_file, "ssl_keyfile": settings.key_file}
        options |= {name: str(path) for name, path in files.items() if path}
        _check_files(settings)
    if settings.username:
        options["sasl_mechanism"] = settings.mechanism
        if tokens:
            options["sasl_oauth_token_provider"] = tokens
        else:
            options |= {"sasl_plain_username": settings.username, "sasl_plain_password": password_of(settings)}
    if twice := sorted(options.keys() & settings.options.keys()):
        msg = f"log.kafka.options.{twice[0]}: tls, username and the other settings of log.kafka decide this; remove one"
        raise ConfigError(msg)
    return options


def _check_files(settings: KafkaConfig) -> None:
    """kafka-python would open them at each connection, and report nothing but a timeout."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if settings.ca_file:
            context.load_verify_locations(settings.ca_file)
        if settings.cert_file:
            # An empty password: without one OpenSSL would ask on the terminal.
            password = settings.options.get("ssl_password") or ""
            context.load_cert_chain(settings.cert_file, settings.key_file, password)
    except OSError as error:  # ssl.SSLError too
        given = {"ca_file": settings.ca_file, "cert_file": settings.cert_file, "key_file": settings.key_file}
        files = ", ".join(f"{name} = {str(path)!r}" for name, path in given.items() if path)
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        msg = f"log.kafka: {files}: {reason}; expected PEM, and the key of the certificate"
        raise ConfigError(msg) from error


class TokenUnavailableError(kafka_errors.KafkaConnectionError):  # type: ignore[misc]  # kafka-python has no types
    """The OAuth server is away."""


class TokenSource(AbstractTokenProvider):  # type: ignore[misc]  # kafka-python has no types
    """OAuth tokens by client credentials (RFC 6749, 4.4), shared by the clients of one log.

    A token is cached, and renewed after `FRESH_SHARE` of its lifetime. While the server is away the cached one
    is used until it expires; after that connections fail and are retried, so the stream stalls.
    """

    def __init__(self, settings: KafkaConfig, clock: Callable[[], float] = time.monotonic) -> None:
        assert settings.oauth_token_url
        self._settings, self._url, self._clock = settings, settings.oauth_token_url, clock
        self._lock = threading.Lock()
        self._token = ""
        self._fetched_s = self._fresh_until_s = self._valid_until_s = self._retry_s = float("-inf")
        self._error: kafka_errors.KafkaError | None = None

    def token(self) -> str:
        """Return a valid token.

        Raises:
            TokenUnavailableError: the server is away.
            SaslAuthenticationFailedError: it refuses the client.
        """
        with self._lock:
            now_s = self._clock()
            if now_s >= max(self._fresh_until_s, self._retry_s):
                self._refresh(now_s)
            if self._clock() < self._valid_until_s:
                return self._token
            error = self._error or TokenUnavailableError(f"the token from {self._url} expired before it arrived")
            raise type(error)(*error.args)

    def refused(self) -> None:
        """The broker refused a token: request another one, at most every `TOKEN_RETRY_S`."""
        with self._lock:
            self._fresh_until_s = min(self._fresh_until_s, self._fetched_s + TOKEN_RETRY_S)

    def _refresh(self, now_s: float) -> None:
        try:
            self._token, lifetime_s = self._request()
        except kafka_errors.KafkaError as error:
            self._error, self._retry_s = error, now_s + TOKEN_RETRY_S
            valid_s = max(0, round(self._valid_until_s - now_s)) if self._token else 0
            _log.warning("oauth_token_unavailable", error=str(error), cached_token_valid_s=valid_s)
            return
        if self._error:
            _log.info("oauth_token_available", lifetime_s=lifetime_s)
        self._error = None
        self._fetched_s = now_s
        self._fresh_until_s, self._valid_until_s = now_s + FRESH_SHARE * lifetime_s, now_s + lifetime_s

    def _request(self) -> tuple[str, float]:
        """A new token and its lifetime."""
        secret = password_of(self._settings)
        user = ":".join(map(urllib.parse.quote_plus, (self._settings.username or "", secret)))
        form = {"grant_type": "client_credentials"}
        if self._settings.oauth_scope:
            form["scope"] = self._settings.oauth_scope
        headers = {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}", "Accept": "application/json"}
        request = urllib.request.Request(self._url, urllib.parse.urlencode(form).encode(), headers)  # noqa: S310
        try:
            status, body = self._send(request)
        except (OSError, ValueError) as error:  # URLError, timeouts, TLS; http.client's errors of a broken reply
            msg = f"no token from {self._url}: {getattr(error, 'reason', error)}"
            raise TokenUnavailableError(msg) from error
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        reply = found if isinstance(found, dict) else {}
        token, lifetime_s = reply.get("access_token"), reply.get("expires_in", LIFETIME_S)
        if status == 200 and isinstance(token, str) and _TOKEN.fullmatch(token):
            known = isinstance(lifetime_s, int | float) and 1 < lifetime_s < LIFETIME_MAX_S  # JSON has NaN and 1e999
            return token, float(lifetime_s) if known else LIFETIME_S
        said = " ".join(str(reply[name]) for name in ("error", "error_description") if name in reply) or "no token"
        msg = f"no token from {self._url}: HTTP {status}, {said.replace(secret, '***')[:200]}"
        refused = status in _REFUSED_STATUS
        raise (kafka_errors.SaslAuthenticationFailedError if refused else TokenUnavailableError)(msg)

    def _send(self, request: urllib.request.Request) -> tuple[int, bytes]:
        """Status and body. Redirects are not followed: they would carry the secret to another server."""
        context = ssl.create_default_context()
        if self._settings.ca_file:
            context.load_verify_locations(self._settings.ca_file)
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _NoRedirects)
        deadline_s = time.monotonic() + TOKEN_TIMEOUT_S
        try:
            reply = opener.open(request, timeout=TOKEN_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            body = b""
            while part := reply.read1(TOKEN_MAX_BYTES):
                body += part
                if len(body) > TOKEN_MAX_BYTES or time.monotonic() > deadline_s:
                    msg = f"more than {TOKEN_MAX_BYTES} bytes, or {TOKEN_TIMEOUT_S:g} s"
                    raise ValueError(msg)
            return reply.status, body


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow none."""


class ClosingSocket(KafkaNetSocket):  # type: ignore[misc]  # kafka-python has no types
    """Sockets without a proxy that are closed if they cannot connect.

    kafka-python 3.0.12 leaves them to the garbage collector: an hour without a broker would leave hundreds open.
    """

    SCHEMES = ("closing",)

    async def sock_connect(self, net: NetworkSelector, sock: socket.socket, *address: Any, **timeouts: Any) -> Any:
        """Connect `sock`, or close it."""
        try:
            return await super().sock_connect(net, sock, *address, **timeouts)
        except BaseException:
            sock.close()
            raise


class Connections(KafkaConnectionManager):  # type: ignore[misc]  # kafka-python has no types
    """Connections of one client, and why the last one failed.

    kafka-python 3.0.12 retries every failure until its timeout and reports only that. After a refusal it reconnects
    without waiting, and it keeps the password that it was opened with.
    """

    def __init__(self, net: NetworkSelector, settings: KafkaConfig, tokens: TokenSource | None, **configs: Any) -> None:
        super().__init__(net, **configs)
        self._settings, self._tokens = settings, tokens
        self.failure: Exception | None = None
        """Of the last connection; None once one succeeded."""

    def maybe_raise_auth_failure(self, node_id: Any) -> None:  # noqa: ARG002
        """End the opening of a client that the broker refuses; one that was open connects again until it succeeds."""
        passes = self.bootstrapped or isinstance(self.failure, TokenUnavailableError)
        if self.failure and not passes and hint(self.failure):
            raise self.failure

    async def _build_transport(self, node: Any, timeout_at: float | None = None) -> Any:
        """Keep what arrives together with the end of a connection: the reason of a refusal. kafka-python drops it."""
        transport = await self._open_transport(node, timeout_at)
        receive, ended = transport._sock_recv, list[Exception]()  # noqa: SLF001

        def receive_all() -> tuple[bytes, Exception | None]:
            received, error = (b"", ended.pop()) if ended else receive()
            if received and error:
                ended.append(error)
                error = None
            return received, error

        transport._sock_recv = receive_all  # noqa: SLF001
        return transport

    async def _open_transport(self, node: Any, timeout_at: float | None) -> KafkaTCPTransport:
        """As in kafka-python, which does not close a connection whose handshake failed."""
        options = self.config
        proxy = options["proxy_url"] or f"{ClosingSocket.SCHEMES[0]}://"
        sock = await create_connection(
            self._net, node.host, node.port, options["socket_options"], proxy_url=proxy, timeout_at=timeout_at
        )
        transport = None
        try:
            if self.ssl_enabled:
                tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
                transport = KafkaSSLTransport(self._net, sock, host=node.host, **tls)
            else:
                transport = KafkaTCPTransport(self._net, sock, host=node.host)
            await transport.handshake()
        except BaseException as error:
            (transport or sock).close()
            if not isinstance(error, Exception):
                raise
            msg = f"Handshake failed: {error}"
            raise kafka_errors.KafkaConnectionError(msg) from error
        return transport

    async def _connect(self, node: Any, conn: Any, reset_backoff_on_connect: bool = True, **timeouts: Any) -> None:
        if self._settings.password and not self._tokens:
            conn.config["sasl_plain_password"] = password_of(self._settings)
        await super()._connect(node, conn, reset_backoff_on_connect=False, **timeouts)
        self.failure = conn.init_future.exception
        if self.failure is None:
            if reset_backoff_on_connect:
                self.reset_backoff(node.node_id)
            return
        if self.connection_delay(node.node_id) == 0:
            self.update_backoff(node.node_id)
        if self._tokens and isinstance(self.failure, kafka_errors.SaslAuthenticationFailedError):
            self._tokens.refused()


def open_connections(settings: KafkaConfig, tokens: TokenSource | None, **configs: Any) -> tuple[Any, Connections]:
    """What kafka-python takes as `kafka_client`, and its connections."""
    net = NetworkSelector(**configs)
    connections = Connections(net, settings, tokens, **configs)
    return KafkaNetClient(net=net, manager=connections, **configs), connections
