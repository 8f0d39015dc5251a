"""Certificates that are replaced while the server listens, and callers who are known by theirs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from loraplex import AsyncAdminClient, AsyncClient, LoraplexError, PermissionDenied, Unauthenticated
from loraplex_service.app import Addresses, running
from loraplex_service.auth.config import AuthConfig, CertificateConfig
from loraplex_service.auth.principal import Role
from loraplex_service.config import ServiceConfig
from loraplex_service.models.config import HostedModelConfig
from loraplex_service.ports.config import TlsConfig
from loraplex_service.ports.tls import server_credentials
from tests.service.authority import Authority, Pair
from tests.service.scripted_engine import ThreadedEngines

NO_RETRIES = {"grpc.enable_retries": 0}


@asynccontextmanager
async def listening(
    model: Path, directory: Path, client_ca: Authority | None = None, auth: AuthConfig | None = None
) -> AsyncIterator[Addresses]:
    """A service with the certificate server.crt of the directory."""
    if client_ca is not None:
        (directory / "client-ca.crt").write_bytes(client_ca.certificate)
    tls = TlsConfig(
        certificate=str(directory / "server.crt"),
        key=str(directory / "server.key"),
        client_ca=None if client_ca is None else str(directory / "client-ca.crt"),
    )
    config = ServiceConfig(
        models=(HostedModelConfig(name="tiny", model=str(model)),), tls=tls, auth=auth, state_directory=""
    ).with_free_ports()
    async with running(config, lambda _: ThreadedEngines().launch) as (app, addresses):
        await app.host.get("tiny").wait_settled()
        yield addresses


async def answer_to(address: str, trusted: Authority, own: Pair | None = None) -> str:
    """OK, or why a new connection comes to nothing."""
    pair = (None, None) if own is None else (own.key, own.certificate)
    credentials = grpc.ssl_channel_credentials(trusted.certificate, *pair)
    async with AsyncClient(address, credentials=credentials, options=NO_RETRIES) as client:
        try:
            await client.generate("tiny", "x", max_tokens=1)
        except LoraplexError as error:
            return type(error).__name__
    return "OK"


async def test_a_new_certificate_is_used_without_a_restart_and_old_connections_stay(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    old, new = Authority("old"), Authority("new")
    old.issue("server").write(tmp_path, "server")
    async with listening(byte_tokenizer_directory, tmp_path) as addresses:
        credentials = grpc.ssl_channel_credentials(old.certificate)
        async with AsyncClient(addresses.data, credentials=credentials) as connected:
            await connected.generate("tiny", "x", max_tokens=1)
            new.issue("server").write(tmp_path, "server")
            assert await answer_to(addresses.data, new) == "OK"
            assert await answer_to(addresses.admin, new) == "Unsupported"  # connected, and it is the other port
            assert await answer_to(addresses.data, old) == "Unavailable"
            await connected.generate("tiny", "x", max_tokens=1)


async def test_a_pair_that_does_not_fit_together_is_not_taken(
    byte_tokenizer_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority("a")
    authority.issue("server").write(tmp_path, "server")
    async with listening(byte_tokenizer_directory, tmp_path) as addresses:
        (tmp_path / "server.key").write_bytes(authority.issue("server").key)
        assert await answer_to(addresses.data, authority) == "OK"
    assert "changed and cannot be used" in caplog.text


async def test_who_may_call_can_be_changed_without_a_restart(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    server, old, new = Authority("of the server"), Authority("old"), Authority("new")
    server.issue("server").write(tmp_path, "server")
    async with listening(byte_tokenizer_directory, tmp_path, client_ca=old) as addresses:
        assert await answer_to(addresses.data, server, old.issue("me")) == "OK"
        (tmp_path / "client-ca.crt").write_bytes(new.certificate)
        assert await answer_to(addresses.data, server, new.issue("me")) == "OK"
        assert await answer_to(addresses.data, server, old.issue("me")) == "Unavailable"


@pytest.mark.parametrize("content", [b"", b"\n", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
async def test_authorities_that_are_emptied_shut_nobody_out(
    byte_tokenizer_directory: Path, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority("a")
    authority.issue("server").write(tmp_path, "server")
    async with listening(byte_tokenizer_directory, tmp_path, client_ca=authority) as addresses:
        (tmp_path / "client-ca.crt").write_bytes(content)
        assert await answer_to(addresses.data, authority, authority.issue("me")) == "OK"
        assert await answer_to(addresses.data, authority) == "Unavailable"
    assert "client-ca.crt holds no certificates" in caplog.text


async def test_a_caller_is_known_by_its_certificate(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    authority = Authority("a")
    authority.issue("server").write(tmp_path, "server")
    auth = AuthConfig(
        certificates=(
            CertificateConfig(name="shop.acme", tenant="acme"),
            CertificateConfig(name="operator", tenant="operator", roles=(Role.ADMIN,)),
        )
    )
    async with listening(byte_tokenizer_directory, tmp_path, authority, auth) as addresses:
        shop, operator, stranger = (authority.issue(name) for name in ("shop.acme", "operator", "stranger"))
        assert await answer_to(addresses.data, authority, shop) == "OK"
        assert await answer_to(addresses.data, authority, stranger) == "Unauthenticated"

        def admin(pair: Pair) -> AsyncAdminClient:
            credentials = grpc.ssl_channel_credentials(authority.certificate, pair.key, pair.certificate)
            return AsyncAdminClient(addresses.admin, credentials=credentials)

        async with admin(operator) as client:
            assert [model.name for model in await client.list_models()] == ["models/tiny"]
        async with admin(shop) as client:
            with pytest.raises(PermissionDenied):
                await client.load_model("tiny")
        for pair in (stranger, authority.issue("operator\0.evil"), authority.issue("x", x509.DNSName("operator\0.x"))):
            async with admin(pair) as client:
                with pytest.raises(Unauthenticated):
                    await client.list_models()


def test_at_the_start_files_that_cannot_be_used_are_an_error(tmp_path: Path) -> None:
    authority = Authority("a")
    authority.issue("server").write(tmp_path, "server")
    (tmp_path / "server.key").write_bytes(authority.issue("server").key)
    with pytest.raises(ValueError, match=r"server\.crt"):
        server_credentials(TlsConfig(certificate=str(tmp_path / "server.crt"), key=str(tmp_path / "server.key")))
    authority.issue("server").write(tmp_path, "server")
    (tmp_path / "ca.crt").touch()
    files = {name: str(tmp_path / name) for name in ("server.crt", "server.key", "ca.crt")}
    with pytest.raises(ValueError, match=r"ca\.crt holds no certificates"):
        server_credentials(
            TlsConfig(certificate=files["server.crt"], key=files["server.key"], client_ca=files["ca.crt"])
        )
    with pytest.raises(OSError, match="gone"):
        server_credentials(TlsConfig(certificate=str(tmp_path / "gone"), key=str(tmp_path / "server.key")))
