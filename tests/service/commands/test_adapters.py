"""`loraplex adapters` and `loraplex routes` against a running service, and what needs none."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from loraplex_adapters.files.source import digest
from loraplex_service.cli import main
from tests.service.control_plane import ControlPlane, write_adapter

Run = Callable[..., Awaitable[Result]]


@pytest.fixture
def run(control: ControlPlane) -> Run:
    """Runs a command in a thread, against the running service."""

    async def run(*arguments: str) -> Result:
        servers = ["--server", control.addresses.data]
        result = await asyncio.to_thread(CliRunner().invoke, main, [*arguments, *servers])
        assert result.exit_code == 0, result.output
        return result

    return run


async def test_an_adapter_is_uploaded_pinned_and_listed(run: Run, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "pirate")
    uploaded = json.loads((await run("adapters", "upload", "mine", str(files), "--base-model", "tiny")).output)
    assert uploaded["state"] == "STATE_ACTIVE"
    assert json.loads((await run("adapters", "pin", "mine")).output)["pinned"]
    listed = (await run("adapters", "list")).output
    assert uploaded["version"] in listed
    assert "pinned" not in json.loads((await run("adapters", "unpin", "mine")).output)


async def test_an_adapter_is_preloaded_and_unloaded(run: Run, control: ControlPlane) -> None:
    source = write_adapter(control.roots / "pirate").name
    await run("adapters", "create", "mine", source, "--base-model", "tiny")
    loaded = json.loads((await run("adapters", "preload", "mine")).output)
    assert loaded["residency"] == "ADAPTER_RESIDENCY_DEVICE"
    unloaded = json.loads((await run("adapters", "unload", "mine")).output)
    assert unloaded["residency"] == "ADAPTER_RESIDENCY_DISK"


async def test_a_source_may_be_named_from_here(
    run: Run, control: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(control.roots / "team/pirate")
    monkeypatch.chdir(control.roots / "team")
    for number, source in enumerate(("pirate", "./pirate", "../team/pirate", "team/pirate")):
        created = await run("adapters", "create", f"mine{number}", source, "--base-model", "tiny")
        assert json.loads(created.output)["state"] == "STATE_ACTIVE"


async def test_a_directory_under_no_root_is_refused_with_the_way_out(control: ControlPlane, tmp_path: Path) -> None:
    outside = write_adapter(tmp_path.parent / f"{tmp_path.name}-outside")
    arguments = ["adapters", "create", "mine", str(outside), "--base-model", "tiny"]
    result = await asyncio.to_thread(CliRunner().invoke, main, [*arguments, "--admin-server", control.addresses.admin])
    assert result.exit_code == 1
    assert "or upload the adapter" in result.output


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["adapter_config.json", "adapter_model.bin"], "adapter_model.bin: pickled weights can run code"),
        (["adapter_config.json", "model.safetensors"], "weights under another name or in shards are not read"),
        (["adapter_config.json"], "adapter_model.safetensors is missing"),
        ([], "adapter_config.json is missing"),
    ],
)
def test_an_upload_of_no_adapter_says_what_is_there_instead(tmp_path: Path, files: list[str], reason: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    result = CliRunner().invoke(main, ["adapters", "upload", "mine", str(tmp_path), "--base-model", "tiny"])
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert reason in result.output


async def test_an_adapter_of_a_model_that_failed_says_so_at_once(
    tmp_path: Path, control: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = control.app.host.get("other")
    monkeypatch.setattr(model, "_text_error", "its tokenizer is broken")
    arguments = ["adapters", "upload", "mine", str(write_adapter(tmp_path / "mine")), "--base-model", "other"]
    result = await asyncio.to_thread(CliRunner().invoke, main, [*arguments, "--admin-server", control.addresses.admin])
    assert result.exit_code == 1
    answer = json.loads(result.output)
    assert answer["state"] == "STATE_LOADING"
    assert answer["error"]["message"] == "model 'other' could not be loaded: its tokenizer is broken"


async def test_a_form_is_set_shown_and_removed(run: Run, control: ControlPlane, tmp_path: Path) -> None:
    schema = tmp_path / "form.json"
    schema.write_text('{"type": "object"}')
    write_adapter(control.roots / "pirate")
    arguments = ["adapters", "create", "pirate", "pirate", "--base-model", "tiny", "--json-schema", str(schema)]
    assert json.loads((await run(*arguments)).output)["default_constraint"] == {"json_schema": '{"type": "object"}'}
    changed = json.loads((await run("adapters", "form", "pirate", "--choice", "a", "--choice", "b")).output)
    assert changed["default_constraint"] == {"choices": {"values": ["a", "b"]}}
    assert "default_constraint" not in json.loads((await run("adapters", "form", "pirate")).output)
    route = json.loads((await run("routes", "set", "main", "pirate", "--regex", "[ab]+")).output)
    assert route["default_constraint"] == {"regex": "[ab]+"}


def test_an_output_has_one_form_at_most() -> None:
    result = CliRunner().invoke(main, ["adapters", "form", "pirate", "--regex", "a", "--json-object"])
    assert result.exit_code == 2
    assert "one constraint at most" in result.output


async def test_a_route_is_set_resolved_and_deleted(run: Run) -> None:
    made = json.loads((await run("routes", "set", "main", "tiny=3", "models/other", "--fallback", "tiny")).output)
    assert [target["weight"] for target in made["targets"]] == [3, 1]
    assert "tiny=3, models/other=1" in (await run("routes", "list")).output
    resolved = json.loads((await run("routes", "resolve", "main", "--key", "user-1")).output)
    assert resolved["target"]["route"] == "tenants/shared/routes/main"
    await run("routes", "delete", "main")
    assert "main" not in (await run("routes", "list")).output


def test_a_weight_that_is_no_number_is_refused() -> None:
    result = CliRunner().invoke(main, ["routes", "set", "main", "tiny=much"])
    assert result.exit_code == 2
    assert "a whole number is expected" in result.output


def test_an_adapter_is_signed(tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "pirate")
    key = tmp_path / "key.pem"
    private = Ed25519PrivateKey.generate()
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert CliRunner().invoke(main, ["adapters", "digest", str(files)]).output.strip() == f"sha256:{digest(files)}"
    assert CliRunner().invoke(main, ["adapters", "sign", str(files), "--key", str(key)]).exit_code == 0
    assert (files / "adapter.sig").exists()
    key.write_text("no key")
    assert CliRunner().invoke(main, ["adapters", "sign", str(files), "--key", str(key)]).exit_code == 1
