"""The bad things, done to the true server. Each is refused, and the same processes serve on."""

import asyncio
import json
import os
import shutil
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraplex import (
    AsyncAdminClient,
    AsyncClient,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    generate_spec,
)
from loraplex.prompts import build_prompt
from loraplex.v1.adapters_pb2 import Adapter
from loraplex.v1.generation_pb2 import Constraint
from tests.e2e.conftest import DEMO, Server
from tests.waits import MOST_SECONDS

LISTENING = "0A"  # in /proc/net/tcp


@pytest.fixture(autouse=True)
async def same_processes(server: Server, client: AsyncClient) -> AsyncIterator[None]:
    """Whatever a test did: no process has ended, and the next request is answered."""
    engines = server.engine_pids()
    yield
    assert server.process.poll() is None
    assert server.engine_pids() == engines
    await client.generate("storyteller", "A fox", max_tokens=1)


# ---- listeners -------------------------------------------------------------------------------------------------------


def listening_addresses(pid: int) -> set[tuple[str, int]]:
    """Hexadecimal address and port of every TCP socket on which a process listens."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue  # it was closed meanwhile
        if target.startswith("socket:["):
            sockets.add(target.removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in sockets:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


def test_nothing_listens_but_the_two_ports_on_loopback(server: Server, client: AsyncClient) -> None:
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    own = listening_addresses(server.process.pid)
    assert {address for address, _ in own} <= loopback
    assert {port for _, port in own} == {int(address.rpartition(":")[2]) for address in (server.data, server.admin)}
    for pid in server.engine_pids():
        assert listening_addresses(pid) == set()


# ---- adapters --------------------------------------------------------------------------------------------------------

SOURCES = [
    "..",
    "../../../../etc",
    "/etc",
    "/proc/self",
    "file:///etc",
    "file://../../etc",
    "http://169.254.169.254/latest/meta-data",
    "https://example.com/adapter",
    "own/../../..",
    "own/./../..",
    "..%2f..%2fetc",
    "..\\..\\etc",
    "~root",
    "$HOME",
    ".",
    "own\0/etc",
    "x" * 5000,
    "//etc",
    "\u2025/etc",
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: ascii(source)[:30])
async def test_no_source_leads_out_of_the_roots(admin: AsyncAdminClient, source: str) -> None:
    with pytest.raises(PermissionDenied) as raised:
        await admin.create_adapter("own", base_model="storyteller", source=source)
    assert raised.value.reason == "SOURCE_NOT_ALLOWED"
    assert "root:" not in str(raised.value)


async def test_a_link_does_not_lead_out_of_the_roots(
    admin: AsyncAdminClient, own_adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(DEMO / "adapters" / "pirate", tmp_path / "secret")
    shutil.copytree(DEMO / "adapters" / "pirate", own_adapter)
    os.symlink(tmp_path / "secret", own_adapter / "out")
    with pytest.raises(PermissionDenied):
        await admin.create_adapter("own", base_model="storyteller", source="own/out")


@pytest.mark.parametrize("name", ["../x", "a/b", "tenants/x", "", ".", "A", "x" * 100, "a\0b", "*", "a@b"])
async def test_no_id_is_a_path(admin: AsyncAdminClient, name: str) -> None:
    with pytest.raises(InvalidArgument):
        await admin.create_adapter(name, base_model="storyteller", source="pirate")


def safetensors(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
EMPTY_TENSOR = json.dumps(tensor(0, 0, [0])).encode()
BOMBS = {
    "empty": b"",
    "length beyond the file": safetensors(b"{}", 1 << 62),
    "length of 2 GiB": safetensors(b"{", 2 << 30),
    "no JSON": safetensors(b"\xff" * 64),
    "nested": safetensors(b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "many tensors": safetensors(b"{%s}" % b",".join(b'"t%d":%s' % (i, EMPTY_TENSOR) for i in range(150_000))),
    "huge shape": safetensors(json.dumps({f"{MODULE}.lora_A.weight": tensor(0, 8, [1 << 40, 1 << 40])}).encode()),
    "negative shape": safetensors(json.dumps({f"{MODULE}.lora_A.weight": tensor(0, 8, [-1, -2])}).encode()),
    "offsets beyond the data": safetensors(
        json.dumps({f"{MODULE}.lora_A.weight": tensor(0, 1 << 40, [4, 4])}).encode()
    ),
    "offsets that overlap": safetensors(
        json.dumps(
            {f"{MODULE}.lora_A.weight": tensor(0, 64, [4, 4]), f"{MODULE}.lora_B.weight": tensor(0, 64, [4, 4])}
        ).encode(),
        data=bytes(64),
    ),
    "a number of 20,000 digits": safetensors(
        b'{"t":{"dtype":"F32","shape":[' + b"9" * 20_000 + b'],"data_offsets":[0,4]}}'
    ),
    "not a number": safetensors(
        json.dumps(
            {f"{MODULE}.lora_A.weight": tensor(0, 64, [4, 4]), f"{MODULE}.lora_B.weight": tensor(64, 128, [4, 4])}
        ).encode(),
        data=struct.pack("<f", float("nan")) * 32,
    ),
}


@pytest.mark.parametrize("name", BOMBS)
async def test_weights_made_to_hurt_are_refused(
    server: Server, admin: AsyncAdminClient, own_adapter: Path, name: str
) -> None:
    shutil.copytree(DEMO / "adapters" / "pirate", own_adapter)
    (own_adapter / "adapter_model.safetensors").write_bytes(BOMBS[name])
    before = resident_bytes(server.process.pid)
    await refused_adapter(admin)
    assert resident_bytes(server.process.pid) - before < 64 << 20


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"[" * 100_000,
        b'{"peft_type": "LORA", "r": 1e999, "lora_alpha": 1, "target_modules": ["q_proj"]}',
        b'{"peft_type": "LORA", "r": -1, "lora_alpha": 1, "target_modules": ["q_proj"]}',
        b'{"peft_type": "LORA", "r": 8, "lora_alpha": NaN, "target_modules": ["q_proj"]}',
        b'{"peft_type": "LORA", "r": 8, "auto_mapping": {"parent_library": "os"}, "trust_remote_code": true}',
        b" " * (4 << 20),
    ],
    ids=["empty", "nested", "infinite rank", "negative rank", "alpha is NaN", "remote code", "large"],
)
async def test_a_config_made_to_hurt_is_refused(admin: AsyncAdminClient, own_adapter: Path, config: bytes) -> None:
    shutil.copytree(DEMO / "adapters" / "pirate", own_adapter)
    (own_adapter / "adapter_config.json").write_bytes(config)
    await refused_adapter(admin)


async def test_pickled_weights_are_never_opened(admin: AsyncAdminClient, own_adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(
        DEMO / "adapters" / "pirate", own_adapter, ignore=shutil.ignore_patterns("adapter_model.safetensors")
    )
    trap = tmp_path / "trapped"
    # What pickle.dumps gives for an object whose __reduce__ is (os.system, ("touch …",)).
    (own_adapter / "adapter_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
    await refused_adapter(admin)
    assert not trap.exists()


async def refused_adapter(admin: AsyncAdminClient) -> None:
    """An adapter that is refused at once, or registered as FAILED: nobody can use it, and it says why."""
    try:
        adapter = await admin.create_adapter("own", base_model="storyteller", source="own", wait=MOST_SECONDS)
    except (FailedPrecondition, InvalidArgument):
        return
    assert adapter.state == Adapter.STATE_FAILED
    assert adapter.error.message
    await admin.delete_adapter("own", wait=MOST_SECONDS)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 17},
        {"n": 2**31 - 1},
        {"max_tokens": 2**31 - 1},
        {"top_logprobs": 21},
        {"top_logprobs": 2**31 - 1, "logprobs": True},
        {"prompt_logprobs": 2**31 - 1},
        {"stop": ["x"] * 17},
        {"stop": ["x" * 257]},
        {"stop_token_ids": [2**32 - 1]},
        {"stop_token_ids": [0] * 65},
        {"logit_bias": {2**32 - 1: 1.0}},
        {"logit_bias": {i: 1.0 for i in range(1025)}},
        {"allowed_token_ids": [2**32 - 1]},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("inf")},
        {"min_tokens": 2**31 - 1},
        {"priority": 2**31 - 1},
    ],
    ids=lambda fields: "-".join(f"{name}={str(value)[:20]}" for name, value in fields.items()),
)
async def test_no_number_is_too_large_to_be_refused(client: AsyncClient, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        await client.generate("storyteller", "A fox", **{"max_tokens": 4, **fields})


@pytest.mark.parametrize(
    "constraint",
    [
        {"regex": "(a+)+$"},
        {"regex": "(" * 10_000},
        {"regex": "a{1000000000}"},
        {"grammar": "root ::= root root"},
        {"grammar": "root ::= " + "x" * (1 << 20)},
        {"json_schema": '{"$ref": "#"}'},
        {"json_schema": "[" * 100_000},
        {"json_schema": '{"$ref": "file:///etc/passwd"}'},
        {"choices": {"values": ["x" * 1000] * 1000}},
    ],
    ids=lambda constraint: ascii(constraint)[:40],
)
async def test_constraints_made_to_hurt_are_refused_or_kept_to_in_time(
    client: AsyncClient, constraint: dict[str, Any]
) -> None:
    spec = generate_spec("storyteller", "A fox", max_tokens=4)
    spec.constraint.MergeFrom(Constraint(**constraint))
    _, item = [item async for item in client.batch_generate([spec])]
    if item.HasField("error"):
        assert item.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert "specs[0].constraint" in item.error.message
    else:
        assert 1 <= item.response.outputs[0].finished.completion_tokens <= 4


@pytest.mark.parametrize(
    "variables",
    [
        {"messages": []},
        {"raise_exception": "x", "strftime_now": "x", "range": 1},
        {"__class__": "x", "self": "x", "loop": "x", "cycler": {"__init__": 1}},
        {"x": "{{ cycler.__init__.__globals__ }}"},
        {"x": ["y" * 1000] * 1000},
        {"\0": "\0", "ü" * 1000: None},
    ],
    ids=lambda variables: ascii(variables)[:40],
)
async def test_variables_of_a_template_are_data(client: AsyncClient, variables: dict[str, Any]) -> None:
    """The caller's only way to a template beside its texts: the prompt stays the same, or they are refused."""
    prompt = build_prompt([{"role": "user", "content": "A fox"}])
    plain = await client.tokenize("storyteller", prompt, include_text=True)
    prompt.chat.template_kwargs.update(variables)
    try:
        told = await client.tokenize("storyteller", prompt, include_text=True)
    except InvalidArgument:
        return
    assert told.text == plain.text


async def test_what_a_user_says_is_no_template(client: AsyncClient) -> None:
    for text in (
        "{{ 7 * 7 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler }}",
    ):
        response = await client.tokenize("storyteller", [{"role": "user", "content": text}], include_text=True)
        assert text in response.text


async def test_ids_of_callers_are_labels(client: AsyncClient) -> None:
    streams = [
        client.stream_generate("storyteller", "A fox", max_tokens=20, ignore_eos=True, client_request_id="same")
        for _ in range(4)
    ]
    cancelled = await client.cancel_generation(["same"])
    assert not cancelled.cancelled_request_ids
    answers = await asyncio.gather(*(stream.collect() for stream in streams))
    assert len({answer.request_id for answer in answers}) == 4
    assert {answer.usage.completion_tokens for answer in answers} == {20}


async def test_floods_of_metadata_and_of_bytes_are_refused(server: Server, client: AsyncClient) -> None:
    many = {f"x-flood-{number}": "x" * 100 for number in range(1000)}
    for metadata in ({"x-flood": "x" * (64 << 10)}, many):
        with pytest.raises(ResourceExhausted):
            await client.generate("storyteller", "A fox", max_tokens=1, metadata=metadata, timeout=MOST_SECONDS)
    with pytest.raises(ResourceExhausted):
        await client.generate("storyteller", "x" * (33 << 20), max_tokens=1, timeout=MOST_SECONDS)


async def test_a_port_that_is_spoken_to_in_another_language_goes_on(server: Server) -> None:
    for noise in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01" * 100,
        os.urandom(4096),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
    ):
        for address in (server.data, server.admin):
            host, _, port = address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(noise)
            await writer.drain()
            writer.close()
            del reader
