"""The service as a whole: how it starts, what it is made of, and how its listeners are protected."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import msgspec
import pytest

from loraplex import AsyncClient, Unavailable
from loraplex_service.app import running
from loraplex_service.config import ServiceConfig
from loraplex_service.models.config import HostedModelConfig
from loraplex_service.models.supervisor import EngineProcess
from loraplex_service.ports.config import TlsConfig
from tests.service.control_plane import ControlPlane, control_plane
from tests.service.scripted_engine import ThreadedEngines

NO_RETRIES = {"grpc.enable_retries": 0}  # the server asks retrying clients to come again after seconds


def test_the_service_reaches_no_torch() -> None:
    """Not even by way of what it imports: torch would take memory, seconds at the start, and the GIL."""
    code = (
        "import sys; from loraplex_service.cli import main; "
        "main(['--help'], standalone_mode=False); "  # it imports all commands
        "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


async def test_a_model_whose_tokenizer_cannot_be_read_is_failed_and_says_why(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    async with control_plane(broken, tmp_path) as control:
        model = await control.admin.get_model("tiny")
        assert model.state == model.STATE_FAILED
        assert "tokenizer" in model.error.message
        assert control.app.host.get("tiny").client is None


async def test_a_chat_template_of_the_configuration_replaces_the_models_own(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}{{ eos_token }}")
    model = HostedModelConfig(name="tiny", model=str(byte_tokenizer_directory), chat_template=str(template))
    async with running(ServiceConfig(models=(model,)).with_free_ports(), lambda _: ThreadedEngines().launch) as (
        app,
        addresses,
    ):
        await app.host.get("tiny").wait_settled()
        async with AsyncClient(addresses.data) as client:
            response = await client.tokenize("tiny", [{"role": "user", "content": "x"}], include_text=True)
    assert response.text == "x<eos>"
    assert list(response.token_ids) == [ord("x"), 257]


async def test_a_request_while_the_model_loads_is_told_to_come_again(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    model = HostedModelConfig(name="tiny", model=str(byte_tokenizer_directory))
    ready = asyncio.Event()
    engines = ThreadedEngines()

    async def launch(address: str) -> EngineProcess:
        await ready.wait()
        return await engines.launch(address)

    config = ServiceConfig(models=(model,)).with_free_ports()
    async with (
        running(config, lambda _: launch) as (app, addresses),
        AsyncClient(addresses.data, options=NO_RETRIES) as client,
    ):
        with pytest.raises(Unavailable, match="still loading") as raised:
            await client.generate("tiny", "x")
        assert raised.value.reason == "MODEL_LOADING"
        assert not await client.is_serving()
        ready.set()
        await app.host.get("tiny").wait_settled()
        assert (await client.generate("tiny", "x", max_tokens=1)).usage.completion_tokens == 1


async def test_an_engine_that_sends_what_is_no_message_is_replaced(control: ControlPlane) -> None:
    """What it was meant to say is lost: nobody may wait for it for ever."""
    stream = control.client.stream_generate("tiny", "ab", max_tokens=1000)
    await anext(stream)
    control.core().stats = lambda: None  # type: ignore[method-assign, assignment, return-value]
    assert (await stream.collect()).outputs[0].text == "ab" * 500
    assert len(control.engines["tiny"].started) == 2
    assert (await control.client.generate("tiny", "x", max_tokens=1)).usage.completion_tokens == 1


@dataclass(frozen=True)
class Certificate:
    """Of 127.0.0.1, signed by itself: its own authority."""

    config: TlsConfig
    certificate: bytes
    key: bytes


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    config = TlsConfig(certificate=str(certificate), key=str(key), client_ca=str(certificate))
    return Certificate(config, certificate.read_bytes(), key.read_bytes())


async def test_with_tls_only_tls_is_spoken(certificate: Certificate, byte_tokenizer_directory: Path) -> None:
    tls = msgspec.structs.replace(certificate.config, client_ca=None)
    async with listening(byte_tokenizer_directory, tls) as address:
        assert await can_generate(address, grpc.ssl_channel_credentials(certificate.certificate))
        assert not await can_generate(address, None)


async def test_with_a_client_ca_callers_must_show_a_certificate(
    certificate: Certificate, byte_tokenizer_directory: Path
) -> None:
    known = grpc.ssl_channel_credentials(certificate.certificate, certificate.key, certificate.certificate)
    async with listening(byte_tokenizer_directory, certificate.config) as address:
        assert await can_generate(address, known)
        assert not await can_generate(address, grpc.ssl_channel_credentials(certificate.certificate))


@asynccontextmanager
async def listening(model_directory: Path, tls: TlsConfig) -> AsyncIterator[str]:
    """The data address of a service with TLS."""
    config = ServiceConfig(models=(HostedModelConfig(name="tiny", model=str(model_directory)),), tls=tls)
    async with running(config.with_free_ports(), lambda _: ThreadedEngines().launch) as (app, addresses):
        await app.host.get("tiny").wait_settled()
        yield addresses.data


async def can_generate(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    async with AsyncClient(address, credentials=credentials, options=NO_RETRIES) as client:
        try:
            return bool((await client.generate("tiny", "x", max_tokens=1)).outputs)
        except Unavailable as error:
            if error.reason:  # of the service, not of the connection
                raise
            return False


async def test_at_its_end_the_service_lets_running_requests_finish(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    async with AsyncExitStack() as outer:
        async with control_plane(byte_tokenizer_directory, tmp_path) as control:
            client = await outer.enter_async_context(AsyncClient(control.addresses.data))
            stream = client.stream_generate("tiny", "ab", max_tokens=300)
            await anext(stream)
            answer = asyncio.create_task(stream.collect())
        assert (await answer).usage.completion_tokens == 300
