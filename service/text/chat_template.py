"""Conversations to prompts, with the model's own Jinja template, in a process that can be killed.

Templates belong to the operator, but what they are given comes from users: a template may loop or grow without bound on
input that its author never tried. So they run in `template_worker.py`, under limits of time, memory and output.
"""

import asyncio
import json
import os
import secrets
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.text.errors import RendererError, TemplateError

_WORKER = Path(__file__).with_name("template_worker.py")
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # one thing, under the names that clients use
_WORKER_DIED = (OSError, asyncio.IncompleteReadError)
_START_SECONDS = 60.0  # to start an interpreter on a machine that is busy loading models


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template is given. Values are JSON: None, booleans, numbers, strings, lists, objects with string keys."""

    messages: Sequence[Mapping[str, Any]]  # role, content, and what else the template reads: tool_calls, name …
    tools: Sequence[Mapping[str, Any]] = ()  # JSON schemas
    documents: Sequence[Mapping[str, Any]] = ()
    add_generation_prompt: bool = False  # end with the opening of an assistant message
    continue_final_message: bool = False  # end inside the last message, for the model to go on with
    template: str | None = None  # by name, where the model has several
    variables: Mapping[str, Any] = field(default_factory=dict)  # more for the template: enable_thinking …


class ChatTemplate:
    """One model's templates and the special tokens that they may write."""

    def __init__(self, source: str | Mapping[str, str], **special_tokens: str) -> None:
        """`source`: one template, or several by name. `special_tokens`: bos_token, eos_token, …, with their text."""
        self.sources: Mapping[str, str] = {"default": source} if isinstance(source, str) else dict(source)
        self.special_tokens: Mapping[str, str] = special_tokens

    def select(self, name: str | None, has_tools: bool) -> str:
        """The template to use: the named one, else "tool_use" where there are tools, else "default".

        Raises TemplateError if there is none.
        """
        if name is None:
            name = "tool_use" if has_tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise TemplateError(
                f"chat template {name!r}: the model has no template of that name, only "
                f"{', '.join(sorted(self.sources))}. Name one of these."
            )
        return self.sources[name]


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one rendering may take. Past a limit the request fails, alone."""

    seconds: float = 2.0
    source_chars: int = 1 << 20
    output_chars: int = 4 << 20
    memory_bytes: int = 1 << 30  # address space of the worker process


class TemplateRenderer:
    """Renders templates, one at a time, in a worker process: started at first use, replaced after it had to be killed.

    Belongs to the event loop that uses it. `async with` closes it.
    """

    def __init__(self, limits: TemplateLimits | None = None) -> None:
        self._limits = limits or TemplateLimits()
        self._lock = asyncio.Lock()
        self._worker: Process | None = None
        self._running: set[asyncio.Task[str]] = set()
        self._closed = False

    async def __aenter__(self) -> "TemplateRenderer":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def render(self, template: ChatTemplate | None, conversation: Conversation) -> str:
        """The prompt.

        Raises TemplateError, with the template's own message where it raised one, and RendererError.
        """
        if template is None:
            raise TemplateError("the model has no chat template. Send the prompt as text or as token ids.")
        source = template.select(conversation.template, bool(conversation.tools))
        if len(source) > self._limits.source_chars:
            raise TemplateError(
                f"the chat template has {len(source)} characters; {self._limits.source_chars} are allowed."
            )
        variables = _variables(template, conversation)
        if not conversation.continue_final_message:
            return await self._render(source, variables)
        final, marker = _mark_final_message(variables["messages"])
        return _cut_at_marker(await self._render(source, variables), final, marker)

    async def close(self) -> None:
        """End the worker. Renderings under way or waiting end with RendererError."""
        self._closed = True
        if self._worker is not None and self._worker.returncode is None:
            self._worker.kill()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._worker is not None:
            await self._kill(self._worker)

    async def _render(self, source: str, variables: Mapping[str, Any]) -> str:
        try:
            line = json.dumps({"source": source, "variables": variables}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"the conversation is not JSON: {error}.") from error
        # A caller that goes away must not leave an answer in the pipe for the next one, nor cost a worker.
        task = asyncio.create_task(self._exchange(line))
        self._running.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[str]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even if its caller went away

    async def _exchange(self, line: bytes) -> str:
        async with self._lock:
            try:
                answer = await self._ask(line)
            except _WORKER_DIED:  # maybe while it was idle, and not of this template: one more try tells
                try:
                    answer = await self._ask(line)
                except _WORKER_DIED as error:
                    raise TemplateError("the chat template ended the process that renders it.") from error
        if "error" in answer:
            raise TemplateError(f"chat template: {answer['error']}")
        return answer["text"]

    async def _ask(self, line: bytes) -> dict[str, str]:
        """Send one request to the worker and wait for its answer. Whatever goes wrong, the worker is not used again."""
        worker = await self._started()
        assert worker.stdin is not None
        try:
            async with asyncio.timeout(self._limits.seconds):
                worker.stdin.write(line)
                await worker.stdin.drain()
                return await _read_answer(worker)
        except TimeoutError:
            await self._kill(worker)
            raise TemplateError(
                f"the chat template was still rendering after {self._limits.seconds:g} s and was stopped. Shorten the "
                "conversation, or correct the template."
            ) from None
        except BaseException:
            await self._kill(worker)
            raise

    async def _started(self) -> Process:
        if self._closed:
            raise RendererError("chat templates are no longer rendered: the service is shutting down.")
        if self._worker is not None and self._worker.returncode is None:
            return self._worker
        limits = self._limits
        arguments = [str(limits.seconds), str(limits.output_chars), str(limits.memory_bytes)]
        # -I: neither this folder nor the environment decides what the worker imports. Nor does it see any secret in it.
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}
        self._worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            str(_WORKER),
            *arguments,
            stdin=PIPE,
            stdout=PIPE,
            env=environment,
            limit=12 * limits.output_chars + 1024,  # a character is at most two \\uXXXX escapes in JSON
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _read_answer(self._worker)
        except (TimeoutError, asyncio.IncompleteReadError) as error:
            await self._kill(self._worker)
            raise RendererError(
                f"the process that renders chat templates does not start ({sys.executable} with jinja2)."
            ) from error
        return self._worker

    async def _kill(self, worker: Process) -> None:
        if worker is self._worker:
            self._worker = None
        if worker.returncode is None:
            worker.kill()
        await worker.communicate()


async def _read_answer(worker: Process) -> dict[str, str]:
    assert worker.stdout is not None
    answer: dict[str, str] = json.loads(await worker.stdout.readuntil(b"\n"))
    return answer


# ---- what the template sees ----------------------------------------------------------------------------------------


def _variables(template: ChatTemplate, conversation: Conversation) -> dict[str, Any]:
    if reserved := _RESERVED.intersection(conversation.variables):
        raise TemplateError(f"template variable {min(reserved)!r} has a field of its own. Set it there.")
    if conversation.add_generation_prompt and conversation.continue_final_message:
        raise TemplateError(
            "add_generation_prompt opens a new message and continue_final_message goes on with the last one. Set one."
        )
    if not conversation.messages:
        raise TemplateError("the conversation has no messages. Send at least one.")
    return {
        **template.special_tokens,
        **conversation.variables,
        "messages": [_message(index, message) for index, message in enumerate(conversation.messages)],
        "tools": list(conversation.tools) or None,  # None: templates ask whether there are tools at all
        "documents": list(conversation.documents) or None,
        "add_generation_prompt": conversation.add_generation_prompt,
    }


def _message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: absent keys are absent, not None, and reasoning is under its usual name."""
    if not isinstance(message.get("role"), str):
        raise TemplateError(f"messages[{index}]: has no role. Give it one, such as user or assistant.")
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[name] for name in _REASONING_FIELDS if name in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def _mark_final_message(messages: list[dict[str, Any]]) -> tuple[str, str]:
    """Put a marker behind the last message's text; return that text and the marker.

    The marker ends with a space, so that a template that trims what it is given shows it.
    """
    marker = f"CONTINUE{secrets.token_hex(8)} "
    message = messages[-1]
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + marker
        return content, marker
    blocks = list(content) if isinstance(content, (list, tuple)) else []
    for position in reversed(range(len(blocks))):
        if isinstance(blocks[position], Mapping) and isinstance(text := blocks[position].get("text"), str):
            blocks[position] = {**blocks[position], "text": text + marker}
            message["content"] = blocks
            return text, marker
    raise TemplateError("continue_final_message: the last message has no text to go on with.")


def _cut_at_marker(rendered: str, final: str, marker: str) -> str:
    end = rendered.rfind(marker.rstrip())
    if end < 0 or final.strip() not in rendered:
        raise TemplateError("continue_final_message: the template does not write the last message out as it is.")
    prompt = rendered[:end]
    return prompt if rendered.startswith(marker, end) else prompt.rstrip()
