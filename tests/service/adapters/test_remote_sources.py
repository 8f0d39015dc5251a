"""Adapters from an object store, from the hub, and signed ones: over the wire of each, as the service takes them."""

import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from loraplex import FailedPrecondition, PermissionDenied
from loraplex.v1.adapters_pb2 import Adapter
from loraplex_adapters.errors import AdapterRejected, SourceNotAllowed
from loraplex_adapters.files.remote import RemoteSources
from loraplex_adapters.files.source import CONFIG_FILE, WEIGHTS_FILE, digest
from loraplex_adapters.files.trust import SIGNATURE_FILE, sign
from loraplex_service.adapters.config import AdapterConfig
from loraplex_service.admission.tenants import TenantConfig
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.waits import MOST_SECONDS

ALLOWED = ("s3://adapters/team/", "hf://acme/")
COMMIT = "c" * 40


@pytest.fixture(scope="module")
def store_url() -> Iterator[str]:
    """A small S3, with the bucket "adapters"."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    client.create_bucket(Bucket="adapters")
    yield url
    server.stop()


def object_store(url: str) -> dict[str, str]:
    return {"endpoint": url, "region": "us-east-1", "access_key_id": "x", "secret_access_key": "x"}


def put(url: str, prefix: str, directory: Path) -> None:
    """By the library that fetches: boto3's time stamps are a warning."""
    import obstore
    from obstore.store import S3Store

    store = S3Store("adapters", prefix=prefix, client_options={"allow_http": True}, **object_store(url))  # type: ignore[arg-type]
    for file in directory.iterdir():
        obstore.put(store, file.name, file.read_bytes())


@pytest.fixture
async def control(byte_tokenizer_directory: Path, tmp_path: Path, store_url: str) -> AsyncIterator[ControlPlane]:
    async with control_plane(
        byte_tokenizer_directory, tmp_path, sources=ALLOWED, object_store=object_store(store_url)
    ) as control:
        yield control


async def create(control: ControlPlane, source: str, tenant: str = "shared") -> Adapter:
    return await control.admin.create_adapter(
        "mine", base_model="tiny", source=source, wait=MOST_SECONDS, tenant=tenant
    )


async def test_an_adapter_is_fetched_from_an_object_store(
    control: ControlPlane, store_url: str, tmp_path: Path
) -> None:
    files = write_adapter(tmp_path / "origin", seed=5)
    put(store_url, "team/pirate", files)
    adapter = await create(control, "s3://adapters/team/pirate")
    assert adapter.state == Adapter.STATE_ACTIVE
    assert (adapter.digest, adapter.source) == (f"sha256:{digest(files)}", "s3://adapters/team/pirate")
    assert (await control.client.generate("mine", "abc", max_tokens=1)).target.adapter_version == adapter.version


async def test_an_object_that_is_not_there_is_named(control: ControlPlane) -> None:
    with pytest.raises(FailedPrecondition, match=r"adapter_config\.json is missing"):
        await create(control, "s3://adapters/team/nothing")


@pytest.mark.parametrize(
    "source",
    [
        "s3://adapters/other/pirate",
        "s3://adapters/teams/pirate",
        "s3://adapters/team/../other",
        "s3://elsewhere/team/pirate",
        f"hf://evil/pirate@{COMMIT}",
        "hf://acme/pirate@main",
        "hf://acme/pirate",
    ],
)
async def test_what_lies_outside_the_allowed_prefixes_is_refused(control: ControlPlane, source: str) -> None:
    with pytest.raises(PermissionDenied) as raised:
        await create(control, source)
    assert raised.value.reason == "SOURCE_NOT_ALLOWED"


def test_a_store_that_cannot_be_reached_is_no_verdict_on_the_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected) as raised:
        RemoteSources(("hf://acme",), {}, 1 << 20, "http://127.0.0.1:9").fetch(f"hf://acme/a@{COMMIT}", tmp_path)
    assert raised.value.reason == "ADAPTER_UNREADABLE"


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """As much of the hub as a download of one file needs: its address, and the files of acme/pirate."""
    files = write_adapter(tmp_path / "hub", seed=9)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            file = files / self.path.removeprefix(f"/acme/pirate/resolve/{COMMIT}/")
            found = self.path.startswith("/acme/pirate/resolve/") and file.is_file()
            content = file.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_adapter_is_fetched_from_the_hub_at_a_commit(hub: tuple[str, Path], tmp_path: Path) -> None:
    url, files = hub
    directory = tmp_path / "fetched"
    directory.mkdir()
    RemoteSources(("hf://acme/",), {}, 1 << 20, url).fetch(f"hf://acme/pirate@{COMMIT}", directory)
    assert sorted(file.name for file in directory.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert digest(directory) == digest(files)


def test_weights_above_the_limit_are_not_fetched(hub: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match="at most 10 are allowed"):
        RemoteSources(("hf://acme/",), {}, 10, hub[0]).fetch(f"hf://acme/pirate@{COMMIT}", tmp_path)


def test_one_repository_may_be_allowed_and_no_other(tmp_path: Path) -> None:
    with pytest.raises(SourceNotAllowed):
        RemoteSources(("hf://acme/pir",), {}, 10).fetch(f"hf://acme/pirate@{COMMIT}", tmp_path)


# ---- signatures ------------------------------------------------------------------------------------------------------


async def test_adapters_of_the_configuration_are_accepted_as_others_are(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    listed, other = write_adapter(tmp_path / "listed"), write_adapter(tmp_path / "other", seed=1)
    tenants = {"acme": TenantConfig(adapter_digests=(f"sha256:{digest(listed)}",))}
    configured = tuple(
        AdapterConfig(name=f"acme/{files.name}", model="tiny", source=str(files)) for files in (listed, other)
    )
    async with control_plane(byte_tokenizer_directory, tmp_path, adapters=configured, tenants=tenants) as control:
        adapters = {adapter.name.rpartition("/")[2]: adapter for adapter in await control.admin.list_adapters()}
    assert adapters.keys() == {"listed", "other"}
    assert not adapters["listed"].HasField("error")
    assert adapters["other"].state == Adapter.STATE_FAILED
    assert "accepts only listed or signed adapters" in adapters["other"].error.message


async def test_a_tenant_with_keys_accepts_signed_adapters_alone(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    pem = tmp_path / "key.pem"
    pem.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    tenants = {"acme": TenantConfig(adapter_keys=(str(pem),))}
    async with control_plane(byte_tokenizer_directory, tmp_path, tenants=tenants) as control:
        files = write_adapter(tmp_path / "pirate")
        with pytest.raises(PermissionDenied, match="only listed or signed adapters") as raised:
            await create(control, "pirate", "acme")
        assert raised.value.reason == "ADAPTER_UNTRUSTED"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (files / SIGNATURE_FILE).write_bytes(sign(digest(files), private))
        assert (await create(control, "pirate", "acme")).state == Adapter.STATE_ACTIVE
        write_adapter(files, seed=8)  # under the old signature
        with pytest.raises(PermissionDenied):
            await create(control, "pirate", "acme")
        uploaded = write_adapter(tmp_path / "other", seed=3)
        (uploaded / SIGNATURE_FILE).write_bytes(sign(digest(uploaded), private))
        upload = control.admin.upload_adapter
        assert (await upload("up", base_model="tiny", directory=uploaded, tenant="acme", wait=MOST_SECONDS)).rank == 4
