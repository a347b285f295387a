"""Sign-in with tokens of an identity provider: real signatures, and tokens forged in every way of RFC 8725."""

import base64
import hashlib
import hmac
import json
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from jwt.warnings import InsecureKeyLengthWarning

from crcjax.serve.accounts import SignInError
from crcjax.serve.config import OidcConfig, RoleRule
from crcjax.serve.oidc import NoRoleError, OidcTokens, ProviderUnavailableError
from crcjax.serve.permissions import Role
from crcjax.serve.service import open_service

RSA, OTHER_RSA = rsa.generate_private_key(65537, 2048), rsa.generate_private_key(65537, 2048)
WEAK_RSA = rsa.generate_private_key(65537, 1024)
EC = ec.generate_private_key(ec.SECP256R1())
RULES = [
    RoleRule(value="crcjax-pathology", role=Role.PATHOLOGIST, site="leeds"),
    RoleRule(value="crcjax-audit", role=Role.AUDITOR, site="*"),
]


def _key_set() -> dict[str, Any]:
    keys = []
    for key_id, key, facts in (
        ("rsa", RSA, {"alg": "RS256", "use": "sig"}),
        ("bare", RSA, {}),
        ("weak", WEAK_RSA, {"alg": "RS256"}),
        ("encryption", RSA, {"use": "enc"}),
    ):
        keys.append(RSAAlgorithm.to_jwk(key.public_key(), as_dict=True) | facts | {"kid": key_id})
    keys.append(ECAlgorithm.to_jwk(EC.public_key(), as_dict=True) | {"kid": "ec", "alg": "ES256"})
    keys.append({"kty": "oct", "kid": "shared", "k": _text(b"x" * 32), "alg": "HS256"})
    return {"keys": keys}


class Provider(ThreadingHTTPServer):
    """Answers discovery and keys, and counts how often its keys are fetched."""

    def __init__(self) -> None:
        self.fetches, self.keys, self.is_down = 0, _key_set(), False
        super().__init__(("127.0.0.1", 0), _Handler)
        self.issuer = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Provider

    def do_GET(self) -> None:
        documents = {
            "/.well-known/openid-configuration": {
                "issuer": self.server.issuer,
                "jwks_uri": f"{self.server.issuer}/keys",
            },
            "/keys": self.server.keys,
        }
        self.server.fetches += self.path == "/keys"
        self.send_response(503 if self.server.is_down else 200)
        self.end_headers()
        self.wfile.write(json.dumps(documents[self.path]).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    server = Provider()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def config(provider: Provider) -> OidcConfig:
    return OidcConfig(issuer=provider.issuer, audience="crcjax", roles=RULES)


@pytest.fixture
def tokens(config: OidcConfig) -> OidcTokens:
    return OidcTokens(config)


def _claims(provider: Provider, **others: Any) -> dict[str, Any]:
    now = int(time.time())
    times = {"iat": now, "nbf": now, "exp": now + 600}
    known = {"iss": provider.issuer, "aud": "crcjax", "sub": "u-17", "groups": ["x", "crcjax-pathology"], **times}
    return {name: value for name, value in (known | others).items() if value is not None}


def _signed(claims: dict, key: Any = RSA, algorithm: str = "RS256", **header: Any) -> str:
    # The claims are not checked: they may be forged.
    return jwt.PyJWS().encode(json.dumps(claims).encode(), key, algorithm, {"kid": "rsa"} | header)


def _signed_with_a_short_key(claims: dict) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureKeyLengthWarning)
        return _signed(claims, WEAK_RSA, kid="weak")


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _part(values: dict) -> str:
    return _text(json.dumps(values).encode())


def test_a_signed_token_has_the_role_and_site_of_the_first_rule_that_applies(
    tokens: OidcTokens, provider: Provider
) -> None:
    session = tokens.session(_signed(_claims(provider, groups=["crcjax-audit", "crcjax-pathology"])))
    account = session.account
    assert (account.name, account.role, account.site) == ("oidc:u-17", Role.PATHOLOGIST, "leeds")
    assert tokens.session(_signed(_claims(provider, groups="crcjax-audit"))).account.site == "*"
    assert tokens.session(_signed(_claims(provider), EC, "ES256", kid="ec")).account == account
    assert tokens.session(_signed(_claims(provider), kid="bare")).account == account
    assert tokens.session(_signed(_claims(provider, aud=["other", "crcjax"]), typ="at+jwt")).account == account
    for groups in (["crcjax-pathology-2"], [], "crcjax", None, {"crcjax-pathology": 1}, [["crcjax-pathology"]]):
        with pytest.raises(NoRoleError):
            tokens.session(_signed(_claims(provider, groups=groups)))


def _forgeries(provider: Provider) -> dict[str, str]:
    """Tokens that must not sign in; the sections are those of RFC 8725."""
    claims, good = _claims(provider), _signed(_claims(provider))
    header, payload, signature = good.split(".")
    public = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def hmac_signed(key: bytes, **facts: Any) -> str:
        text = f"{_part({'alg': 'HS256', 'typ': 'JWT', 'kid': 'rsa'} | facts)}.{payload}"
        return f"{text}.{_text(hmac.digest(key, text.encode(), hashlib.sha256))}"

    own_key = RSAAlgorithm.to_jwk(OTHER_RSA.public_key(), as_dict=True)
    now = int(time.time())
    other_claims = {
        "3.8 another issuer": {"iss": "https://elsewhere"},
        "3.8 no issuer": {"iss": None},
        "3.8 a list of issuers": {"iss": [provider.issuer]},
        "3.8 no subject": {"sub": None},
        "3.8 a subject that is no text": {"sub": 17},
        "3.8 an empty subject": {"sub": ""},
        "3.9 another audience": {"aud": "crcjax2"},
        "3.9 no audience": {"aud": None},
        "expired": {"exp": now - 60},
        "no end": {"exp": None},
        "an end that is no time": {"exp": "never"},
        "an endless end": {"exp": float("inf")},
        "not yet valid": {"nbf": now + 600},
        "of the future": {"iat": now + 600},
    }
    return {
        "2.1 none": f"{_part({'alg': 'none', 'kid': 'rsa'})}.{payload}.",
        "2.1 None": f"{_part({'alg': 'None', 'kid': 'rsa'})}.{payload}.{signature}",
        "2.1 HS256 with the public key": hmac_signed(public),
        "2.1 HS256 with the public key in DER": hmac_signed(
            RSA.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        ),
        "2.1 HS256 with an empty key": hmac_signed(b""),
        "2.1 HS256 with the provider's shared key": hmac_signed(b"x" * 32, kid="shared"),
        "2.1 an algorithm that is not configured": _signed(claims, algorithm="RS512"),
        "2.1 another algorithm than the key's": _signed(claims, algorithm="PS256"),
        "2.1 a key of another type": _signed(claims, EC, "ES256", kid="rsa"),
        "2.2 a short key": _signed_with_a_short_key(claims),
        "2.4 an encrypted token": f"{_part({'alg': 'RSA-OAEP', 'enc': 'A128GCM', 'kid': 'rsa'})}.a.b.c.d",
        "2.4 a key for encryption": _signed(claims, kid="encryption"),
        "2.6 two encodings": f"{_text(json.dumps({'alg': 'RS256', 'kid': 'rsa'}).encode('utf-16'))}.{payload}.{signature}",
        "2.8 another kind of token": _signed(claims, typ="secevent+jwt"),
        "3.1 no signature": f"{header}.{payload}.",
        "3.1 another payload": f"{header}.{_part(claims | {'groups': ['crcjax-audit']})}.{signature}",
        "3.1 another header": f"{_part({'alg': 'RS256', 'kid': 'bare'})}.{payload}.{signature}",
        "3.1 another key": _signed(claims, OTHER_RSA),
        "3.1 no key id": jwt.encode(claims, RSA, "RS256"),
        "3.4 an ECDSA signature of zeros": f"{_part({'alg': 'ES256', 'kid': 'ec'})}.{payload}.{_text(bytes(64))}",
        "3.10 a key id that is a path": _signed(claims, OTHER_RSA, kid="../../../dev/null"),
        "3.10 a key id that is SQL": _signed(claims, OTHER_RSA, kid="' OR 1=1 --"),
        "3.10 a key in the header": _signed(claims, OTHER_RSA, jwk=own_key),
        "3.10 a key in the header, without id": _signed(claims, OTHER_RSA, jwk=own_key, kid="own"),
        "3.10 the address of keys in the header": _signed(claims, OTHER_RSA, jku="http://127.0.0.1:1/keys"),
        "3.10 the address of a certificate in the header": _signed(claims, OTHER_RSA, x5u="http://127.0.0.1:1/c"),
        "an extension that must be understood": _signed(claims, crit=["b64"], b64=False),
        "no token": "..",
        "four parts": f"{good}.{signature}",
        "a long token": _signed(_claims(provider, text="x" * 20_000)),
        "not ASCII": f"{header}é.{payload}.{signature}",
        **{name: _signed(_claims(provider, **others)) for name, others in other_claims.items()},
    }


def test_every_forged_token_is_refused_with_the_same_words(tokens: OidcTokens, provider: Provider) -> None:
    tokens.session(_signed(_claims(provider)))
    forgeries = _forgeries(provider)
    assert len(forgeries) > 40
    messages = set()
    for name, token in forgeries.items():
        try:
            session = tokens.session(token)
        except SignInError as error:
            messages.add(str(error))
        else:
            pytest.fail(f"{name}: signed in as {session.account}")
    assert messages <= {
        "the token is not valid, or has expired; sign in again at the identity provider",
        "the token is too long",
        "the token has no text as sub",
    }


def test_keys_are_fetched_again_for_a_new_key_but_not_for_every_made_up_one(
    config: OidcConfig, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, time_s = OidcTokens(config), time.monotonic()
    monkeypatch.setattr("crcjax.serve.oidc.time.monotonic", lambda: time_s)
    tokens.session(_signed(_claims(provider)))
    provider.fetches = 0
    for number in range(50):
        with pytest.raises(SignInError):
            tokens.session(_signed(_claims(provider), OTHER_RSA, kid=f"made-up-{number}"))
    assert provider.fetches == 0
    new = RSAAlgorithm.to_jwk(OTHER_RSA.public_key(), as_dict=True) | {"kid": "new"}
    provider.keys["keys"].append(new)
    time_s += 31
    tokens.session(_signed(_claims(provider), OTHER_RSA, kid="new"))
    assert provider.fetches == 1
    # A key that the provider withdraws signs nothing after five minutes.
    provider.keys["keys"].remove(new)
    time_s += 301
    with pytest.raises(SignInError):
        tokens.session(_signed(_claims(provider), OTHER_RSA, kid="new"))
    # While it does not answer, its last keys count for an hour; without any, the answer is to try again.
    provider.is_down, time_s = True, time_s + 301
    tokens.session(_signed(_claims(provider)))
    time_s += 3600
    with pytest.raises(ProviderUnavailableError):
        tokens.session(_signed(_claims(provider)))
    with pytest.raises(ProviderUnavailableError):
        OidcTokens(config).session(_signed(_claims(provider)))
    provider.is_down = False


def test_the_api_takes_tokens_of_the_provider_beside_its_own(
    config: OidcConfig, provider: Provider, tmp_path: Path, bundle_folder: Path, serve: Callable
) -> None:
    service = open_service(tmp_path / "state", bundle_folder, {}, oidc=config)
    with serve(service) as server:
        client = server.client(_signed(_claims(provider)))
        me = client.request("GET", "/v1/me").json()
        assert me["account"]["name"] == "oidc:u-17"
        assert client.request("GET", "/v1/predictions").json()["items"] == []
        assert client._http.get("/v1/accounts").status_code == 403
        assert client._http.post("/v1/me/totp").status_code == 422
        assert client._http.post("/v1/me/totp/confirm", json={"code": "1"}).status_code == 401
        assert server.client(_signed(_claims(provider, groups=[])))._http.get("/v1/me").status_code == 403
        refused = server.client(_signed(_claims(provider), OTHER_RSA))._http.get("/v1/me")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert server.client(service.accounts.add_service("gateway", "leeds"))._http.get("/v1/me").status_code == 200


@pytest.mark.slow
def test_a_token_that_a_real_provider_gave_out_signs_in(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    issuer = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-m", "oidc_provider_mock", "--port", str(port)])
    try:
        with httpx.Client(base_url=issuer) as http:
            deadline = time.monotonic() + 60
            while True:
                try:
                    document = http.get("/.well-known/openid-configuration").json()
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline
                    assert process.poll() is None
                    time.sleep(0.1)
            client = {"client_id": "crcjax", "redirect_uri": "http://127.0.0.1:1/back"}
            http.put("/users/u-17", json={"groups": ["crcjax-pathology"]}).raise_for_status()
            query = client | {"response_type": "code", "scope": "openid"}
            redirect = http.post(document["authorization_endpoint"], params=query, data={"sub": "u-17"})
            code = httpx.URL(redirect.headers["location"]).params["code"]
            body = client | {"grant_type": "authorization_code", "code": code, "client_secret": "secret"}
            token = http.post(document["token_endpoint"], data=body).raise_for_status().json()["id_token"]
        config = OidcConfig(issuer=document["issuer"], audience="crcjax", roles=RULES)
        session = OidcTokens(config).session(token)
        assert (session.account.name, session.account.role) == ("oidc:u-17", Role.PATHOLOGIST)
        header, payload, signature = token.split(".")
        with pytest.raises(SignInError):
            OidcTokens(config).session(f"{header}.{payload}.{signature[::-1]}")
    finally:
        process.terminate()
        process.wait()
