"""A real secured Apache Kafka, its certificates, and an OAuth server that issues the tokens it accepts.

The listeners are `TLS`, `MTLS` (a client certificate is required), `SASL` (PLAIN, SCRAM and OAUTHBEARER inside TLS) and
`SASL_OPEN` (PLAIN without TLS). A principal that is no super user may do nothing without an ACL.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from streamlearn.lab.broker import LOOPBACK, SHORT_LIVED, Broker, free_port

SECURITY = {"TLS": "SSL", "MTLS": "SSL", "SASL": "SASL_SSL", "SASL_OPEN": "SASL_PLAINTEXT"}
"""Security protocol of each listener."""
PLAIN_USERS = {"alice": "plain-Pa55", "stranger": "stranger-Pa55"}
"""Users of PLAIN and their passwords; `stranger` has no ACL."""
CLIENT_ID, CLIENT_SECRET, AUDIENCE = "learner@apps", "cl1ent:s3cr3t&+", "kafka"
"""Credentials with characters that must be encoded."""
SUPER_USERS = ("ANONYMOUS", "alice", "bob", "CN=learner", CLIENT_ID)
REAUTH_MS = 2000
"""The broker ends a SASL session that does not authenticate again within this time."""
_DAY = datetime.timedelta(days=1)


class Authority:
    """A certificate authority, and the PEM files of the certificates that it signs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = _name(f"CA of {folder.name}")
        certificate = self._sign(self._name, self._key, x509.BasicConstraints(ca=True, path_length=None))
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(certificate)

    def issue(self, name: str) -> tuple[Path, Path]:
        """Paths of a certificate for `name` at the loopback address, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        at = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK)), x509.DNSName("localhost")])
        cert_file, key_file = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        cert_file.write_bytes(self._sign(_name(name), key, at))
        key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return cert_file, key_file

    def _sign(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(self._name, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - _DAY).not_valid_after(now + _DAY)
        return (
            builder.add_extension(extension, critical=False).sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)
        )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


class TokenServer:
    """OAuth by client credentials: `/token` issues signed JWTs, `/jwks` publishes the key. A context manager.

    Tests change its attributes while it runs. After `stop`, `start` listens on the same port.
    """

    def __init__(self) -> None:
        self.lifetime_s = 60.0
        """Of a token. Negative: it is issued expired."""
        self.issued = 0
        """Number of tokens."""
        self.reply: tuple[int, bytes] | None = None
        """Status and body that `/token` answers in place of a token."""
        self.scopes: list[str] = []
        """The scopes that were requested."""
        self.port = free_port(LOOPBACK)
        self._key = rsa.generate_private_key(65537, 2048)
        self._http: ThreadingHTTPServer | None = None

    def __enter__(self) -> TokenServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def url(self, path: str) -> str:
        """Address of `token` or `jwks`."""
        return f"http://{LOOPBACK}:{self.port}/{path}"

    def start(self) -> None:
        """Listen."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(200, json.dumps({"keys": [server.public_key()]}).encode())

            def do_POST(self) -> None:
                form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
                self._answer(*(server.reply or server.token(self.headers.get("authorization", ""), form)))

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                if status == 302:
                    self.send_header("location", server.url("elsewhere"))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self._http = ThreadingHTTPServer((LOOPBACK, self.port), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Listen no more. May be called twice."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def public_key(self) -> dict[str, str]:
        """The key as a JWK."""
        numbers = self._key.public_key().public_numbers()
        n, e = numbers.n.to_bytes(256, "big"), numbers.e.to_bytes(3, "big")
        return {"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "k1", "n": _encoded(n), "e": _encoded(e)}

    def token(self, authorization: str, form: dict[str, list[str]]) -> tuple[int, bytes]:
        """Status and body for a request with these credentials."""
        user, _, secret = base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
        known = (urllib.parse.unquote_plus(user), urllib.parse.unquote_plus(secret)) == (CLIENT_ID, CLIENT_SECRET)
        if not known or form.get("grant_type") != ["client_credentials"]:
            return 401, b'{"error": "invalid_client", "error_description": "the client is not known"}'
        self.scopes += form.get("scope", [])
        self.issued += 1
        now_s = time.time()
        claims = {
            "iss": self.url(""),
            "aud": AUDIENCE,
            "sub": CLIENT_ID,
            "iat": int(min(now_s, now_s + self.lifetime_s - 1)),
            "exp": now_s + self.lifetime_s,
            "jti": str(self.issued),
        }
        head = {"alg": "RS256", "typ": "JWT", "kid": "k1"}
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in (head, claims))
        signature = self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        reply = {
            "access_token": f"{signed}.{_encoded(signature)}",
            "token_type": "Bearer",
            "expires_in": abs(self.lifetime_s),
        }
        return 200, json.dumps(reply).encode()


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


class SecuredBroker(Broker):
    """One node with a listener for each of `SECURITY`, and one without security for the test itself."""

    def __init__(self, data_dir: Path, tokens: TokenServer) -> None:
        allowed = f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={tokens.url('jwks')}"
        super().__init__(data_dir, heap_mb=256, java_options=(*SHORT_LIVED, allowed))
        self.authority, self._tokens = Authority(data_dir / "certificates"), tokens
        self._ports = {name: free_port(LOOPBACK) for name in SECURITY}

    def at(self, listener: str) -> str:
        """`host:port` of a listener."""
        return f"{LOOPBACK}:{self._ports[listener]}"

    def _settings(self) -> dict[str, str]:
        cert_file, key_file = self.authority.issue("broker")
        keystore = cert_file.with_suffix(".pem")
        keystore.write_bytes(key_file.read_bytes() + cert_file.read_bytes())
        common = super()._settings()
        added = {
            "listeners": ",".join(f"{name}://{self.at(name)}" for name in SECURITY),
            "advertised.listeners": ",".join(f"{name}://{self.at(name)}" for name in SECURITY),
            "listener.security.protocol.map": ",".join(f"{name}:{security}" for name, security in SECURITY.items()),
        }
        settings: dict[str, Any] = {
            **common,
            **{key: f"{common[key]},{more}" for key, more in added.items()},
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": keystore,
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": self.authority.ca_file,
            "listener.name.mtls.ssl.client.auth": "required",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": ";".join(f"User:{name}" for name in SUPER_USERS),
        }
        for listener in ("sasl", "sasl_open"):
            settings |= {f"listener.name.{listener}.{key}": value for key, value in self._sasl().items()}
        settings["listener.name.sasl_open.sasl.enabled.mechanisms"] = "PLAIN"
        return settings

    def _sasl(self) -> dict[str, Any]:
        package = "org.apache.kafka.common.security"
        users = " ".join(f'user_{name}="{password}"' for name, password in PLAIN_USERS.items())
        return {
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
            "connections.max.reauth.ms": REAUTH_MS,
            "plain.sasl.jaas.config": f"{package}.plain.PlainLoginModule required {users};",
            "scram-sha-256.sasl.jaas.config": f"{package}.scram.ScramLoginModule required;",
            "scram-sha-512.sasl.jaas.config": f"{package}.scram.ScramLoginModule required;",
            "oauthbearer.sasl.jaas.config": f"{package}.oauthbearer.OAuthBearerLoginModule required;",
            "oauthbearer.sasl.server.callback.handler.class": (
                f"{package}.oauthbearer.OAuthBearerValidatorCallbackHandler"
            ),
            "oauthbearer.sasl.oauthbearer.jwks.endpoint.url": self._tokens.url("jwks"),
            "oauthbearer.sasl.oauthbearer.expected.audience": AUDIENCE,
            "oauthbearer.sasl.oauthbearer.expected.issuer": self._tokens.url(""),
            "oauthbearer.sasl.oauthbearer.clock.skew.seconds": 0,
        }
