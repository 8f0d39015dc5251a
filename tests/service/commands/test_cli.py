"""The command line against a running service: what it prints, and its exit status."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from loraplex.v1.models_pb2 import MODEL_CAPABILITY_TOOLS
from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.keys import KeyFile, make_key, write_keys
from loraplex_service.auth.principal import Role
from loraplex_service.cli import main
from loraplex_service.telemetry.config import UsageConfig
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.service.requests.test_messages import with_template

LORAPLEX = Path(sys.executable).with_name("loraplex")


async def run(control: ControlPlane, *arguments: str, said: str | None = None) -> Result:
    """One command, in a thread of its own: the service lives in this one. said: its standard input."""
    where = ["--server", control.addresses.data]
    return await asyncio.to_thread(CliRunner().invoke, main, [*arguments, *where], said)


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.output.startswith("loraplex ")


async def test_text_is_generated(control: ControlPlane) -> None:
    result = await run(control, "generate", "tiny", "abc", "--max-tokens", "7")
    assert (result.exit_code, result.output) == (0, "abcabca\n")


async def test_the_whole_response_can_be_printed(control: ControlPlane) -> None:
    result = await run(control, "generate", "tiny", "abc", "--max-tokens", "7", "--temperature", "0", "--json")
    response = json.loads(result.output)
    assert response["outputs"][0]["text"] == "abcabca"
    assert response["usage"]["completion_tokens"] == 7


async def test_a_conversation_is_generated_from(control: ControlPlane) -> None:
    result = await run(control, "generate", "tiny", "hi", "--chat", "--max-tokens", "8")
    assert result.output == "[user]hi\n"


async def test_texts_are_embedded_a_line_for_each(control: ControlPlane) -> None:
    result = await run(control, "embed", "tiny", "ab", "c", "--pooling", "mean")
    assert (result.exit_code, result.output) == (0, "[97.0, 98.0]\n[99.0]\n")


async def test_the_whole_answer_of_an_embedding_can_be_printed(control: ControlPlane) -> None:
    result = await run(control, "embed", "tiny", "ab", "--dimensions", "4", "--no-normalize", "--json")
    response = json.loads(result.output)
    assert response["embeddings"] == [{"values": [97.0, 98.0], "prompt_tokens": 2}]
    assert response["report"]["usage"] == {"prompt_tokens": 2}


@pytest.fixture
async def with_tools(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    """The model says a call of the tool "look" and its prompt again and again."""
    call = '<tool_call>{"name": "look", "arguments": {"at": 1}}</tool_call>'
    directory = tmp_path / "model"
    directory.mkdir()
    with_template(byte_tokenizer_directory, directory, f"{{% if tools %}}{{% endif %}}<|im_start|>{call}")
    async with control_plane(directory, tmp_path) as control:
        yield control


async def test_calls_of_tools_are_printed_as_lines_of_json(with_tools: ControlPlane, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text('[{"name": "look"}]')
    options = ["--chat", "--tools", str(tmp_path / "tools.json"), "--tool-choice", "auto", "--max-tokens", "75"]
    result = await run(with_tools, "generate", "tiny", "hi", *options)
    assert result.output.splitlines()[-1] == '{"name": "look", "arguments": {"at": 1}}'


@pytest.mark.parametrize(
    ("file", "options", "problem"),
    [
        ("[{", ["--chat"], "holds no list of tools"),
        ("[1]", ["--chat"], "holds no list of tools"),
        ('[{"name": "look", "args": {}}]', ["--chat"], "has no key args"),
        ("[]", [], "--tools goes with --chat"),
    ],
)
async def test_what_is_no_list_of_tools_is_refused(
    control: ControlPlane, tmp_path: Path, file: str, options: list[str], problem: str
) -> None:
    (tmp_path / "tools.json").write_text(file)
    result = await run(control, "generate", "tiny", "hi", "--tools", str(tmp_path / "tools.json"), *options)
    assert result.exit_code != 0
    assert problem in result.output


async def test_a_model_says_that_it_takes_tools_and_no_other_does(
    with_tools: ControlPlane, control: ControlPlane
) -> None:
    assert MODEL_CAPABILITY_TOOLS in (await with_tools.admin.get_model("tiny")).capabilities
    assert MODEL_CAPABILITY_TOOLS not in (await control.admin.get_model("tiny")).capabilities


async def test_a_conversation_may_begin_with_what_the_model_is_told(control: ControlPlane) -> None:
    options = ["--chat", "--system", "be brief", "--max-tokens", "16"]
    result = await run(control, "generate", "tiny", "hi", *options)
    assert result.output == "[system]be brief\n"


async def test_what_the_model_is_told_goes_with_a_conversation(control: ControlPlane) -> None:
    result = await run(control, "generate", "tiny", "hi", "--system", "be brief")
    assert (result.exit_code, "--system goes with --chat" in result.output) == (2, True)


async def test_the_prompt_may_come_from_standard_input(control: ControlPlane) -> None:
    result = await run(control, "generate", "tiny", "-", "--max-tokens", "7", said="abc")
    assert result.output == "abcabca\n"


async def test_each_line_of_a_chat_is_answered_in_its_conversation(control: ControlPlane) -> None:
    result = await run(control, "chat", "tiny", "--max-tokens", "8", said="hi\n\nyes\n/new\nno\n")
    assert result.output == "[user]hi\n[user]hi\n[user]no\n"


async def test_a_chat_in_a_terminal_outlives_an_answer_that_failed(control: ControlPlane) -> None:
    typed, terminal = os.openpty()
    os.write(typed, b"one\ntwo\n\x04")  # Ctrl-D
    command = [str(LORAPLEX), "chat", "nosuch", "--server", control.addresses.data]

    def ended() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, stdin=terminal, capture_output=True, text=True, timeout=60, check=False)

    try:
        chat = await asyncio.to_thread(ended)
    finally:
        os.close(typed)
        os.close(terminal)
    assert (chat.returncode, chat.stderr.count("MODEL_NOT_FOUND")) == (0, 2), chat.stderr


async def test_a_chat_of_a_program_ends_with_the_first_answer_that_failed(control: ControlPlane) -> None:
    result = await run(control, "chat", "nosuch", said="one\ntwo\n")
    assert (result.exit_code, result.output.count("MODEL_NOT_FOUND")) == (1, 1)


async def test_where_the_server_is_may_be_said_once_for_all_commands(control: ControlPlane) -> None:
    environment = {"LORAPLEX_SERVER": control.addresses.data}
    for command in (["health"], ["models", "list"]):
        result = await asyncio.to_thread(CliRunner().invoke, main, command, env=environment)
        assert result.exit_code == 0, result.output


async def test_where_nobody_answers_it_is_said_what_to_look_at(control: ControlPlane) -> None:
    result = await asyncio.to_thread(CliRunner().invoke, main, ["generate", "m", "hi", "--server", "127.0.0.1:1"])
    assert "Does the server run" in result.output
    assert "--server (LORAPLEX_SERVER) is 127.0.0.1:1" in result.output


async def test_the_admin_port_instead_of_the_data_port_is_guessed(control: ControlPlane) -> None:
    arguments = ["generate", "tiny", "hi", "--server", control.addresses.admin]
    result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
    assert "Is it the server's admin port, where its data port is wanted" in result.output


async def test_a_port_that_speaks_something_else_is_guessed() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        address = f"127.0.0.1:{other.sockets[0].getsockname()[1]}"
        arguments = ["generate", "tiny", "hi", "--server", address]
        result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
    assert "It does not speak gRPC, or it wants TLS" in result.output


async def test_who_may_not_use_the_admin_port_is_told_what_to_do(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    token, key = make_key("guest", [Role.INFERENCE], None)
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=(key,)))
    auth = AuthConfig(keys=str(tmp_path / "keys.yaml"))
    async with control_plane(byte_tokenizer_directory, tmp_path, auth=auth) as control:
        listed = await run(control, "models", "list", "--token", token)
        refused = await run(control, "models", "load", "tiny", "--token", token)
    assert "ACTIVE" in listed.output
    assert "this needs the admin port" in refused.output


async def test_what_the_server_refuses_is_said_in_its_words(control: ControlPlane) -> None:
    result = await run(control, "generate", "nope", "abc")
    assert result.exit_code == 1
    assert result.output == (
        "Error: MODEL_NOT_FOUND: there is no model 'nope'; there are: other, tiny; "
        "nor is there an adapter or a route of that name for tenant 'default'\n"
    )


@pytest.mark.parametrize(
    ("service", "status", "word"), [("models/tiny", 0, "SERVING"), ("models/other", 1, "NOT_SERVING")]
)
async def test_health_is_an_exit_status(control: ControlPlane, service: str, status: int, word: str) -> None:
    result = await run(control, "health", service)
    assert (result.exit_code, result.output) == (status, f"{word}\n")


async def test_the_load_is_shown(control: ControlPlane) -> None:
    running = control.client.stream_generate("tiny", "abc", max_tokens=1 << 19)
    await anext(running)
    result = await run(control, "top", "--interval", "0.1", "--count", "2")
    rows = [line.split() for line in result.output.splitlines() if line.split()[:1] == ["tiny"]]
    assert [row[1:4] for row in rows] == [["1", "0", "0"]] * 2
    running.cancel()


async def test_models_are_listed(control: ControlPlane) -> None:
    result = await run(control, "models", "list")
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[1:] == [
        ["models/other", "UNLOADED"],
        ["models/tiny", "ACTIVE", "ScriptedForCausalLM", "float32", "1048576"],
    ]


async def test_models_are_loaded_and_unloaded(control: ControlPlane) -> None:
    loaded = json.loads((await run(control, "models", "load", "other")).output)
    assert loaded["state"] == "STATE_ACTIVE"
    unloaded = json.loads((await run(control, "models", "unload", "other")).output)
    assert unloaded["state"] == "STATE_UNLOADED"


async def test_adapters_are_created_listed_switched_and_deleted(control: ControlPlane) -> None:
    versions = []
    for seed in range(2):
        write_adapter(control.roots / "pirate", seed=seed)
        result = await run(control, "adapters", "create", "pirate", "pirate", "--base-model", "tiny")
        assert result.exit_code == 0
        versions.append(json.loads(result.output)["version"].rpartition("/")[2])
    assert versions[1] in (await run(control, "adapters", "list")).output
    assert versions[0] in (await run(control, "adapters", "list", "--versions")).output
    used = json.loads((await run(control, "adapters", "use", versions[0])).output)
    assert used["version"].endswith(versions[0])
    got = json.loads((await run(control, "adapters", "get", "pirate")).output)
    assert got["version"].endswith(versions[0])
    assert (await run(control, "adapters", "delete", "pirate")).exit_code == 0
    assert (await run(control, "adapters", "get", "pirate")).exit_code == 1


async def test_a_form_is_asked_for(control: ControlPlane, tmp_path: Path) -> None:
    grammar = tmp_path / "form.gbnf"
    grammar.write_text('root ::= "a" | root "b"')
    assert (
        await run(control, "generate", "tiny", "abc", "--max-tokens", "3", "--grammar", str(grammar))
    ).exit_code == 0
    refused = await run(control, "generate", "tiny", "abc", "--regex", "(a")
    assert refused.exit_code == 1
    assert "spec.constraint.regex: cannot be used" in refused.output


async def test_an_adapter_that_is_not_valid_is_an_exit_status(control: ControlPlane) -> None:
    write_adapter(control.roots / "rejected")
    result = await run(control, "adapters", "create", "pirate", "rejected", "--base-model", "tiny")
    assert result.exit_code == 1
    assert json.loads(result.output)["state"] == "STATE_FAILED"


async def test_an_adapter_is_validated_without_being_registered(control: ControlPlane) -> None:
    write_adapter(control.roots / "pirate")
    command = ("adapters", "create", "pirate", "pirate", "--base-model", "tiny", "--validate-only")
    assert (await run(control, *command)).exit_code == 0
    assert len((await run(control, "adapters", "list")).output.splitlines()) == 1


async def test_a_server_that_is_not_there_is_named() -> None:
    arguments = ["generate", "tiny", "abc", "--server", "127.0.0.1:1", "--timeout", "5"]
    result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.output


def test_a_configuration_that_is_wrong_is_said(tmp_path: Path) -> None:
    file = tmp_path / "loraplex.yaml"
    file.write_text("modles: []")
    result = CliRunner().invoke(main, ["serve", "--config", str(file)])
    assert result.exit_code == 1
    assert "unknown key 'modles' in the top level; did you mean 'models'?" in result.output


async def test_usage_records_are_printed_a_line_each_and_resumed_after_any(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    usage = UsageConfig(file=str(tmp_path / "usage.jsonl"))
    async with control_plane(byte_tokenizer_directory, tmp_path, usage=usage) as control:
        answers = [await control.client.generate("tiny", "abc", max_tokens=count) for count in (1, 2, 3)]
        printed = await run(control, "usage", "watch", "--existing")
        rest = await run(control, "usage", "watch", "--existing", "--after", answers[1].request_id)
    records = [json.loads(line) for line in printed.output.splitlines()]
    assert [record["id"] for record in records] == [answer.request_id for answer in answers]
    assert [int(record["completion_tokens"]) for record in records] == [1, 2, 3]
    assert {record["tenant"] for record in records} == {"tenants/default"}
    assert [json.loads(line)["id"] for line in rest.output.splitlines()] == [answers[2].request_id]


async def test_a_server_that_keeps_no_usage_records_says_how_to_have_them(control: ControlPlane) -> None:
    result = await run(control, "usage", "watch", "--existing")
    assert result.exit_code == 1
    assert "set usage.file" in result.output
