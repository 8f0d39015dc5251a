"""The keys of a provider over https: who is believed, what is kept while it is down, and how often it is asked."""

import asyncio
import http.server
import json
import logging
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.door import Caller, Door
from loraplex_service.auth.jwks import KEPT_SECONDS, LIFE_SECONDS, RETRY_SECONDS, FileKeys, RemoteKeys
from loraplex_service.errors import Unauthenticated, Unavailable
from tests.own_log import own_records
from tests.service.auth.provider import Provider, public
from tests.service.authority import Authority
from tests.waits import MOST_SECONDS

GENERATE = "/loraplex.v1.InferenceService/Generate"


class Endpoint:
    """A provider's https address on this machine: says what the provider's file says, or what a test wants."""

    def __init__(self, provider: Provider, authority: Authority, directory: Path) -> None:
        self.ca = directory / "ca.crt"
        self.ca.write_bytes(authority.certificate)
        authority.issue("provider").write(directory, "provider")
        self.answer: Callable[[], tuple[int, bytes]] = lambda: (200, provider.file.read_bytes())
        self.num_requests = 0
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(directory / "provider.crt", directory / "provider.key")
        self._port = 0
        self._server: http.server.ThreadingHTTPServer | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"https://127.0.0.1:{self._port}/keys"

    def start(self) -> None:
        """Listen, at the same address as before."""
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                endpoint.num_requests += 1
                status, body = endpoint.answer()
                self.send_response(status)
                self.send_header("Location", "https://127.0.0.1:1/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Who does not believe the certificate hangs up: that is wanted here."""

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._server.socket = self._tls.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Be gone: connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def provider(tmp_path: Path) -> Provider:
    return Provider(tmp_path / "jwks.json")


@contextmanager
def serving(provider: Provider, directory: Path) -> Iterator[Endpoint]:
    endpoint = Endpoint(provider, Authority("of the provider"), directory)
    try:
        yield endpoint
    finally:
        endpoint.stop()


@pytest.fixture
def endpoint(provider: Provider, tmp_path: Path) -> Iterator[Endpoint]:
    with serving(provider, tmp_path) as endpoint:
        yield endpoint


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(endpoint: Endpoint, clock: Clock) -> RemoteKeys:
    return RemoteKeys(endpoint.address, str(endpoint.ca), clock)


def door(provider: Provider, endpoint: Endpoint, ca: Path | None) -> Door:
    config = msgspec.structs.replace(provider.config, jwks=endpoint.address, jwks_ca=None if ca is None else str(ca))
    return Door(AuthConfig(jwt=config))


def bearer(token: str) -> Caller:
    return Caller({"authorization": f"Bearer {token}"})


# ---- who is believed -------------------------------------------------------------------------------------------------


async def test_keys_come_from_an_address_whose_certificate_the_authority_signed(
    provider: Provider, endpoint: Endpoint
) -> None:
    believing = door(provider, endpoint, endpoint.ca)
    assert (await believing.enter(GENERATE, bearer(provider.token()))).tenant == "acme"
    stranger = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(Unauthenticated):
        await believing.enter(GENERATE, bearer(provider.token(key=stranger)))


async def test_an_address_that_cannot_prove_itself_is_not_asked_for_keys(
    provider: Provider, endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other.crt"
    other.write_bytes(Authority("another").certificate)
    for ca in (None, other):
        with pytest.raises(Unavailable, match="cannot be fetched"):
            await door(provider, endpoint, ca).enter(GENERATE, bearer(provider.token()))
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
    assert endpoint.num_requests == 0


async def test_the_authority_may_be_replaced(
    provider: Provider, endpoint: Endpoint, clock: Clock, tmp_path: Path
) -> None:
    ca = tmp_path / "changing.crt"
    ca.write_bytes(Authority("another").certificate)
    keys = RemoteKeys(endpoint.address, str(ca), clock)
    with pytest.raises(Unavailable):
        await keys.find(provider.token())
    ca.write_bytes(endpoint.ca.read_bytes())
    clock.now += RETRY_SECONDS
    await keys.find(provider.token())


def test_what_is_no_authority_is_refused_at_the_start(provider: Provider, endpoint: Endpoint, tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.crt"
    nonsense.write_text("nonsense")
    with pytest.raises(ValueError, match=r"nonsense\.crt: not a PEM file"):
        door(provider, endpoint, nonsense)
    config = msgspec.structs.replace(provider.config, jwks=endpoint.address, jwks_ca=str(tmp_path / "gone.crt"))
    assert any("there is no file" in problem and "gone.crt" in problem for problem in config.problems())
    config = msgspec.structs.replace(provider.config, jwks_ca=str(endpoint.ca))
    assert any("is for a jwks with an https:// address" in problem for problem in config.problems())


async def test_a_key_that_is_not_for_signatures_signs_nothing(provider: Provider) -> None:
    [(name, key)] = provider.keys.items()
    provider.file.write_text(json.dumps({"keys": [public(name, key, use="enc")]}))
    with pytest.raises(jwt.InvalidKeyError):
        await FileKeys(str(provider.file)).find(provider.token())


# ---- while it is down ------------------------------------------------------------------------------------------------


async def test_while_the_address_is_down_the_last_keys_are_kept_for_an_hour(
    provider: Provider, endpoint: Endpoint, keys: RemoteKeys, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    key = await keys.find(provider.token())
    endpoint.stop()
    for seconds in (LIFE_SECONDS + 1, RETRY_SECONDS, KEPT_SECONDS - LIFE_SECONDS - RETRY_SECONDS - 1):
        clock.now += seconds
        assert await keys.find(provider.token()) is key
    clock.now += 1
    with pytest.raises(Unavailable, match="try again") as raised:
        await keys.find(provider.token())
    assert raised.value.retry_after_seconds == RETRY_SECONDS
    [said] = [record for record in own_records(caplog) if record.levelno == logging.ERROR]
    assert f"the keys at {endpoint.address} cannot be fetched" in said.getMessage()
    assert "until these are 60 minutes old" in said.getMessage()
    endpoint.start()
    clock.now += RETRY_SECONDS
    await keys.find(provider.token())
    assert "can be fetched again" in caplog.text


async def test_keys_are_asked_for_again_when_their_life_is_over(
    provider: Provider, endpoint: Endpoint, keys: RemoteKeys, clock: Clock
) -> None:
    await keys.find(provider.token())
    clock.now += LIFE_SECONDS
    await keys.find(provider.token())
    assert endpoint.num_requests == 1
    withdrawn = provider.token()
    provider.rotate("k2")
    clock.now += 1
    with pytest.raises(jwt.InvalidKeyError):
        await keys.find(withdrawn)
    assert endpoint.num_requests == 2


async def test_a_key_that_may_be_new_is_not_called_wrong_while_the_address_is_down(
    provider: Provider, endpoint: Endpoint, keys: RemoteKeys, clock: Clock
) -> None:
    await keys.find(provider.token())
    endpoint.stop()
    provider.rotate("k2")
    clock.now += RETRY_SECONDS
    with pytest.raises(Unavailable):
        await keys.find(provider.token())


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"<html>sign in</html>"),
        (200, b"[]"),
        (200, b'{"keys": []}'),
        (200, b'{"keys": [{"kty": "none"}]}'),
        (200, b"\xff\xfe"),
        (302, b""),
        (404, b"{}"),
        (500, b"{}"),
    ],
    ids=str,
)
async def test_an_answer_that_is_no_set_of_keys_is_the_providers_mistake(
    provider: Provider, endpoint: Endpoint, keys: RemoteKeys, clock: Clock, answer: tuple[int, bytes]
) -> None:
    good, endpoint.answer = endpoint.answer, lambda: answer
    with pytest.raises(Unavailable):
        await keys.find(provider.token())
    endpoint.answer = good
    clock.now += RETRY_SECONDS
    await keys.find(provider.token())


# ---- how often it is asked -------------------------------------------------------------------------------------------


async def test_names_of_keys_that_callers_invent_make_one_fetch(
    provider: Provider, endpoint: Endpoint, keys: RemoteKeys, clock: Clock
) -> None:
    await keys.find(provider.token())
    for number in range(20):
        invented = jwt.encode({}, ec.generate_private_key(ec.SECP256R1()), "ES256", headers={"kid": f"x{number}"})
        with pytest.raises(jwt.InvalidKeyError):
            await keys.find(invented)
    assert endpoint.num_requests == 1
    provider.rotate("k2")
    clock.now += RETRY_SECONDS
    await keys.find(provider.token())
    assert endpoint.num_requests == 2


async def test_many_callers_wait_for_one_fetch(provider: Provider, endpoint: Endpoint, keys: RemoteKeys) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slow() -> tuple[int, bytes]:
        asked.set()
        go_on.wait(MOST_SECONDS)
        return 200, provider.file.read_bytes()

    endpoint.answer = slow
    callers = [asyncio.create_task(keys.find(provider.token())) for _ in range(50)]
    await asyncio.to_thread(asked.wait, 20)
    go_on.set()
    assert len({key.key_id for key in await asyncio.gather(*callers)}) == 1
    assert endpoint.num_requests == 1
