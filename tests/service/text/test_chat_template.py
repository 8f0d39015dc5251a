"""Chat templates: the same prompt as transformers, whatever the template, and a worker that survives every template."""

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from loraplex_service.text import (
    ArgumentsError,
    ChatTemplate,
    Conversation,
    RendererError,
    TemplateError,
    TemplateLimits,
    TemplateRenderer,
    template_process,
)
from tests.faults.memory import anonymous_mib

REPOSITORY = Path(__file__).resolve().parents[3]
SHARED = REPOSITORY / ".." / "shared" / "data"
WORKER = REPOSITORY / "service/loraplex_service/text/template_worker.py"
CONFIGS = [*sorted(SHARED.glob("tokenizer-configs/*.json")), *sorted(SHARED.glob("tokenizers/*/tokenizer_config.json"))]

MOST_KEPT_MIB = 64.0  # of large conversations, by a worker; measured: 15

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather <now> & "here" – für Zürich',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}, "days": {"type": ["integer", "null"]}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}}
CALL_AS_TEXT = {**CALL, "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}
USER = {"role": "user", "content": "Hi <b>there</b> & co\n"}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [USER]},
    "generation prompt": {"messages": [USER], "add_generation_prompt": True},
    "system": {"messages": [{"role": "system", "content": " Be brief. "}, USER], "add_generation_prompt": True},
    "three turns": {
        "messages": [USER, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "日本語 🇯🇵"}],
        "add_generation_prompt": True,
    },
    "thinking": {
        "messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, USER],
        "add_generation_prompt": True,
    },
    "reasoning": {"messages": [USER, {"role": "assistant", "reasoning": "hm", "content": "Yes."}]},
    "no thinking": {"messages": [USER], "add_generation_prompt": True, "variables": {"enable_thinking": False}},
    "tools": {"messages": [USER], "tools": [TOOL, TOOL], "add_generation_prompt": True},
    "tool call": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "name": "get_weather", "tool_call_id": "c1", "content": '{"sky": "blue"}'},
        ],
        "tools": [TOOL],
        "add_generation_prompt": True,
    },
    "tool call with text arguments": {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL_AS_TEXT, CALL_AS_TEXT]},
            {"role": "tool", "content": "sun"},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "Both."},
        ],
        "tools": [TOOL],
    },
    "documents": {"messages": [USER], "documents": [{"title": "T", "text": "body"}]},
    "unknown role": {"messages": [{"role": "wizard", "content": "abracadabra"}]},
    "assistant first": {"messages": [{"role": "assistant", "content": "I begin."}]},
    "content in blocks": {"messages": [{"role": "user", "content": [{"type": "text", "text": "block"}]}]},
    "continue": {"messages": [USER, {"role": "assistant", "content": "It is "}], "continue_final_message": True},
    "continue blocks": {
        "messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}],
        "continue_final_message": True,
    },
}


@pytest.fixture
async def renderer():
    async with TemplateRenderer() as renderer:
        yield renderer


def special_tokens(config):
    """bos_token and its like, as text."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def render_with_transformers(source, tokens, conversation):
    """What apply_chat_template makes of it; None where it refuses."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    arguments = dict(conversation)
    messages = [
        {key: value for key, value in message.items() if value is not None} for message in arguments.pop("messages")
    ]
    try:
        rendered, _ = utils.render_jinja_template(
            [messages], chat_template=source, **arguments.pop("variables", {}), **arguments, **tokens
        )
    except Exception:
        return None
    return rendered[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
async def test_prompt_equals_transformers(renderer, path):
    config = json.loads(path.read_text())
    declared = config.get("chat_template")
    if declared is None:
        pytest.skip("has no chat template")
    named = {"default": declared} if isinstance(declared, str) else {e["name"]: e["template"] for e in declared}
    tokens = special_tokens(config)
    template = ChatTemplate(named, **tokens)
    for name, source in named.items():
        for label, conversation in CONVERSATIONS.items():
            expected = render_with_transformers(source, tokens, conversation)
            try:
                prompt = await renderer.render(template, Conversation(**conversation, template=name))
            except TemplateError:
                assert expected is None, f"{name}, {label}"
            else:
                assert prompt == expected, f"{name}, {label}"


async def render(renderer, source, *messages, **fields):
    messages = messages or ({"role": "user", "content": "hi"},)
    return await renderer.render(ChatTemplate(source, bos_token="<s>"), Conversation(messages, **fields))


# ---- what templates may use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>hi"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ {'a': '<é>'} | tojson(indent=1) }}", '{\n "a": "<é>"\n}'),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc\n", "a\nb\nc"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{{ missing is defined }}", "False"),
        ("{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}", "1"),
    ],
)
async def test_environment_is_that_of_transformers(renderer, source, expected):
    assert await render(renderer, source) == expected
    conversation = {"messages": [{"role": "user", "content": "hi"}]}
    assert render_with_transformers(source, {"bos_token": "<s>"}, conversation) == expected


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
async def test_reasoning_is_found_under_the_names_that_templates_read(renderer, name):
    source = "{{ messages[0].thinking }} {{ messages[0].reasoning_content }}"
    message = {"role": "assistant", "content": "Yes.", name: "hm"}
    assert await render(renderer, source, message) == "hm hm"
    assert render_with_transformers(source, {}, {"messages": [message]}) == "hm hm"


async def test_any_text_comes_through_unchanged(renderer):
    text = "".join(map(chr, range(0x20))) + '\x7f"\\\u2028\U0001f600\ud800'
    assert await render(renderer, "{{ messages[0].content }}", {"role": "user", "content": text}) == text


async def test_tools_choose_the_tool_template(renderer):
    template = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "documents"})
    message = ({"role": "user", "content": ""},)
    assert await renderer.render(template, Conversation(message)) == "plain"
    assert await renderer.render(template, Conversation(message, tools=[TOOL])) == "tools"
    assert await renderer.render(template, Conversation(message, tools=[TOOL], template="rag")) == "documents"


async def test_continued_message_may_have_been_trimmed(renderer):
    said = {"role": "assistant", "content": "It is "}
    source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    assert await render(renderer, source, said, continue_final_message=True) == "[It is"


# ---- the user's mistakes -------------------------------------------------------------------------------------------


async def test_documents_are_a_variable_like_others_that_a_caller_may_give(renderer):
    given = {"documents": [{"title": "T"}]}
    assert await render(renderer, "{{ documents[0].title }}", variables=given) == "T"


@pytest.mark.parametrize(
    ("source", "fields", "message"),
    [
        ("{{ raise_exception('only user and assistant') }}", {}, "chat template: only user and assistant"),
        ("{{ raise_exception('x' * 100000) }}", {}, "x{900,1000}$"),
        ("{% if %}", {}, "syntax error in line 1"),
        ("{{ missing.field }}", {}, "'missing' is undefined"),
        ("{{ 1 + 'a' }}", {}, "TypeError"),
        ("{{ ''.__class__.__mro__ }}", {}, "unsafe|undefined"),
        ("{{ messages.append(1) }}", {}, "'append' of 'list' object is unsafe"),
        ("{% include 'x' %}", {}, "no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", {}, "recursion"),
        ("x", {"template": "rag"}, "'rag'.*only default"),
        ("x", {"variables": {"messages": []}}, "'messages' has a field of its own"),
        ("x", {"variables": {"y": object()}}, "not JSON"),
        ("x", {"add_generation_prompt": True, "continue_final_message": True}, "Set one"),
        ("x", {"continue_final_message": True}, "does not write the last message"),
    ],
)
async def test_mistake_is_named(renderer, source, fields, message):
    with pytest.raises(TemplateError, match=message):
        await render(renderer, source, **fields)


@pytest.mark.parametrize(
    "source",
    [
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ joiner['__init__'] }}",
        "{{ messages['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ ['__class__']|map('attr')|list }}",
        "{{ [messages]|map(attribute='__class__')|list }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ ('{0.__class__}'|attr('format'))(messages) }}",
        "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
        "{{ ['{0.__class__}'.format]|map('attr', '__self__')|list }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% import 'os' as os %}{{ os }}",
        "{% extends '/etc/passwd' %}",
        "{{ __import__('os') }}",
        "{{ open('/etc/passwd').read() }}",
        "{{ config }}{{ request }}{{ get_flashed_messages.__globals__ }}",
        "{% set x = messages.__setitem__(0, 1) %}{{ x.__class__ }}",
    ],
)
async def test_no_template_gets_out_of_its_sandbox(renderer, source):
    try:
        text = await render(renderer, source)
    except TemplateError as error:
        text = str(error)
    assert not re.search(r"<(class|module|function|code|built-in)|root:|uid=", text)


@pytest.mark.parametrize("message", [{"content": "x"}, {"role": None, "content": "x"}, {"role": 3}])
async def test_message_without_a_role_is_named(renderer, message):
    with pytest.raises(TemplateError, match=r"messages\[1\]: has no role"):
        await render(renderer, "x", {"role": "user", "content": ""}, message)


async def test_conversation_without_messages(renderer):
    with pytest.raises(TemplateError, match="no messages"):
        await renderer.render(ChatTemplate("x"), Conversation([]))


async def test_message_without_text_cannot_be_continued(renderer):
    with pytest.raises(TemplateError, match="no text to go on with"):
        await render(renderer, "x", {"role": "assistant", "tool_calls": []}, continue_final_message=True)


async def test_model_without_a_template(renderer):
    with pytest.raises(TemplateError, match="no chat template"):
        await renderer.render(None, Conversation([{"role": "user", "content": ""}]))


# ---- limits --------------------------------------------------------------------------------------------------------

HANG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


async def test_template_that_hangs_is_stopped_and_the_next_one_renders():
    async with TemplateRenderer(TemplateLimits(seconds=0.3)) as renderer:
        with pytest.raises(TemplateError, match=r"still rendering after 0\.3 s"):
            await render(renderer, HANG)
        assert await render(renderer, "fine") == "fine"


async def test_requests_behind_one_that_hangs_are_answered():
    async with TemplateRenderer(TemplateLimits(seconds=0.3)) as renderer:
        sources = [HANG, "one", "two"]
        answers = await asyncio.gather(*(render(renderer, source) for source in sources), return_exceptions=True)
    assert isinstance(answers[0], TemplateError)
    assert answers[1:] == ["one", "two"]


@pytest.mark.parametrize("source", ["{{ 'ab' * 1000 }}", "{% for i in range(2000) %}x{% endfor %}"])
async def test_output_is_limited(source):
    async with TemplateRenderer(TemplateLimits(output_chars=1000)) as renderer:
        with pytest.raises(TemplateError, match="longer than 1000 characters"):
            await render(renderer, source)


async def test_output_of_just_the_limit_comes_through_however_it_is_written():
    async with TemplateRenderer(TemplateLimits(output_chars=1000)) as renderer:
        assert await render(renderer, "{{ '\U0001f600' * 1000 }}") == "\U0001f600" * 1000


async def test_memory_is_limited(renderer):
    with pytest.raises(TemplateError, match="more memory"):
        await render(renderer, "{{ 'x' * 4000000000 }}")
    assert await render(renderer, "fine") == "fine"


async def test_template_source_is_limited():
    async with TemplateRenderer(TemplateLimits(source_chars=10)) as renderer:
        with pytest.raises(TemplateError, match="has 11 characters; 10 are allowed"):
            await render(renderer, "x" * 11)


# ---- the worker ----------------------------------------------------------------------------------------------------


async def test_caller_that_goes_away_leaves_no_answer_behind_and_costs_no_worker(renderer, monkeypatch):
    await render(renderer, "start")
    process, asked = renderer._workers[0].process, asyncio.Event()
    write = process.stdin.write

    def write_and_tell(line: bytes) -> None:
        write(line)
        asked.set()

    monkeypatch.setattr(process.stdin, "write", write_and_tell)
    gone = asyncio.create_task(render(renderer, "{% for i in range(9999) %}x{% endfor %}"))
    await asked.wait()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert await render(renderer, "mine") == "mine"
    assert renderer._workers[0].process is process


async def test_many_at_once_each_get_their_own(renderer):
    texts = [str(i) * i for i in range(50)]
    messages = [{"role": "user", "content": text} for text in texts]
    rendered = await asyncio.gather(*(render(renderer, "{{ messages[0].content }}", m) for m in messages))
    assert rendered == texts


async def test_worker_sees_no_secret_of_the_service(renderer, monkeypatch):
    monkeypatch.setenv("LORAPLEX_SECRET", "s3cret")
    await render(renderer, "start")
    assert b"s3cret" not in environment_of(renderer._workers[0].process.pid)


def environment_of(pid):
    return Path(f"/proc/{pid}/environ").read_bytes()


async def test_worker_that_was_killed_is_replaced(renderer):
    await render(renderer, "start")
    os.kill(worker_pid(renderer), signal.SIGKILL)
    assert await render(renderer, "fine") == "fine"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_worker_stays_after_large_conversations_which_leave_little_memory():
    large = {"role": "user", "content": "\U0001f600" * (500 << 10)}
    async with TemplateRenderer(TemplateLimits(workers=1)) as renderer:
        await render(renderer, "start")
        pid, before = worker_pid(renderer), anonymous_mib(worker_pid(renderer))
        for _ in range(6):
            assert await render(renderer, "{{ messages[0].content }}", large) == large["content"]
        await render(renderer, "end")
        assert worker_pid(renderer) == pid  # to start another would hold the event loop
        assert anonymous_mib(pid) < before + MOST_KEPT_MIB


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("print('{}', flush=True); input()", TemplateError, "ended the process that renders it"),
        ("raise SystemExit", RendererError, "does not start"),
    ],
)
async def test_worker_that_always_ends_is_given_up(tmp_path, monkeypatch, script, error, message):
    (tmp_path / "worker.py").write_text(script)
    monkeypatch.setattr(template_process, "WORKER", tmp_path / "worker.py")
    async with TemplateRenderer() as renderer:
        with pytest.raises(error, match=message):
            await render(renderer, "x")


async def test_closing_ends_what_is_under_way_and_what_waits():
    renderer = TemplateRenderer(TemplateLimits(seconds=30.0))
    await render(renderer, "start")
    rendering = [asyncio.create_task(render(renderer, HANG)) for _ in range(2)]
    await asyncio.sleep(0)  # they ask
    await asyncio.sleep(0)  # the first is with the worker
    await renderer.close()
    ends = await asyncio.gather(*rendering, return_exceptions=True)
    assert [type(end) for end in ends] == [RendererError] * 2


def worker_pid(renderer: TemplateRenderer) -> int:
    process = renderer._workers[0].process
    assert process is not None
    return process.pid


async def test_closed_renderer_leaves_no_process():
    async with TemplateRenderer() as renderer:
        await render(renderer, "x")
        pid = worker_pid(renderer)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_worker_that_is_stopped_blames_neither_template_nor_caller():
    async with TemplateRenderer(TemplateLimits(stalled_seconds=0.3)) as renderer:
        await render(renderer, "start")
        os.kill(worker_pid(renderer), signal.SIGSTOP)
        with pytest.raises(RendererError, match=r"did not answer for 0\.3 s"):
            await render(renderer, "fine")
        assert await render(renderer, "fine") == "fine"


async def test_one_that_hangs_holds_up_nobody_while_there_are_other_workers():
    async with TemplateRenderer(TemplateLimits(workers=2, seconds=30.0)) as renderer:
        hanging = asyncio.create_task(render(renderer, HANG))
        assert await render(renderer, "fine") == "fine"
        assert not hanging.done()
        hanging.cancel()


async def test_arguments_that_are_no_json_are_named(renderer):
    call = {"type": "function", "function": {"name": "f", "arguments_json": "[" * 100_000}}
    with pytest.raises(ArgumentsError) as raised:
        await render(renderer, "x", {"role": "user", "content": ""}, {"role": "assistant", "tool_calls": [call]})
    assert raised.value.field == "messages[1].tool_calls[0].arguments_json"


async def test_worker_that_hangs_without_a_parent_ends_itself():
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-I", str(WORKER), "0.05", "100", str(1 << 30), stdin=-1, stdout=-1
    )
    request = {"source": HANG, "variables": {}}
    await worker.communicate(json.dumps(request).encode() + b"\n")
    assert worker.returncode == -signal.SIGPROF


async def test_worker_imports_jinja2_and_no_more():
    # What the installation imports at every start (sitecustomize, hooks of editable packages) is none of the worker's.
    code = f"import runpy, sys; old = set(sys.modules); runpy.run_path({str(WORKER)!r}); print(*set(sys.modules) - old)"
    worker = await asyncio.create_subprocess_exec(sys.executable, "-I", "-c", code, stdout=-1)
    output, _ = await worker.communicate()
    imported = {name.partition(".")[0] for name in output.decode().split()}
    assert imported - set(sys.stdlib_module_names) == {"jinja2", "markupsafe"}
