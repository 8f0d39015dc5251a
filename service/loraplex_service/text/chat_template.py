"""Renders conversations into prompts, with the model's own Jinja template, in processes that can be killed.

Templates come from the operator, or from the caller that registered an adapter, and their input from users: a template
may loop or grow without bound, on purpose or on input that its author never tried. So templates run in
`template_worker.py`, under limits of time, memory and output.
"""

import asyncio
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex_service.text.errors import ArgumentsError, TemplateError
from loraplex_service.text.literal import Span
from loraplex_service.text.template_process import TemplateLimits, TemplateProcess, encode

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # one thing, under the names that clients use


@dataclass(frozen=True, slots=True)
class Conversation:
    """The input of a template. Values are JSON: None, booleans, numbers, strings, lists, objects with string keys."""

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

    @property
    def shows_tools(self) -> bool:
        """Whether any template asks for the tools that are offered."""
        return any(re.search(r"\btools\b", source) for source in self.sources.values())

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


class TemplateRenderer:
    """Renders templates in worker processes, each one at a time.

    Belongs to the event loop that uses it. `async with` closes it.
    """

    def __init__(self, limits: TemplateLimits | None = None) -> None:
        self._limits = limits or TemplateLimits()
        self.workers = self._limits.workers
        self._workers = [TemplateProcess(self._limits) for _ in range(self._limits.workers)]
        self._idle: asyncio.LifoQueue[TemplateProcess] = asyncio.LifoQueue()  # the last used is the warm one
        for worker in reversed(self._workers):
            self._idle.put_nowait(worker)
        self._running: set[asyncio.Task[dict[str, Any]]] = set()

    async def __aenter__(self) -> "TemplateRenderer":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def render(self, template: ChatTemplate | None, conversation: Conversation, is_long: bool = False) -> str:
        """The prompt. `is_long`: keep the work on what goes to the process and comes back off the event loop.

        Raises TemplateError, with the template's own message where it raised one, and RendererError.
        """
        source, variables = self._given(template, conversation)
        if not conversation.continue_final_message:
            return str((await self._render(source, variables, is_long))["text"])
        final, marker = _mark_final_message(variables["messages"])
        return _cut_at_marker((await self._render(source, variables, is_long))["text"], final, marker)

    async def render_literally(
        self, template: ChatTemplate | None, conversation: Conversation, is_long: bool = False
    ) -> tuple[str, list[Span]]:
        """Render as `render` does, and return which parts of the prompt are the caller's text. Roles are the
        template's.

        Also raises TemplateError if the template changes the caller's text in a way that cannot be tracked.
        """
        source, variables = self._given(template, conversation)
        for index, message in enumerate(conversation.messages):
            if not re.fullmatch(r"[\w-]+", message["role"]):
                raise TemplateError(f"messages[{index}].role: with literal_content it must be one word.")
        said = list(dict.fromkeys(["messages", "tools", "documents", *conversation.variables]))
        if not conversation.continue_final_message:
            answer = await self._render(source, variables, is_long, said)
            return answer["text"], [(start, end) for start, end in answer["said"]]
        final, marker = _mark_final_message(variables["messages"])
        answer = await self._render(source, variables, is_long, said)
        text = _cut_at_marker(answer["text"], final, marker)
        return text, [(start, min(end, len(text))) for start, end in answer["said"] if start < len(text)]

    def _given(self, template: ChatTemplate | None, conversation: Conversation) -> tuple[str, dict[str, Any]]:
        """The template's source and variables, as the worker takes them."""
        if template is None:
            raise TemplateError("the model has no chat template. Send the prompt as text or as token ids.")
        source = template.select(conversation.template, bool(conversation.tools))
        if len(source) > self._limits.source_chars:
            raise TemplateError(
                f"the chat template has {len(source)} characters; {self._limits.source_chars} are allowed."
            )
        return source, _variables(template, conversation)

    async def close(self) -> None:
        """End the workers. Renderings under way or waiting end with RendererError."""
        for worker in self._workers:
            worker.stop()
        await asyncio.gather(*self._running, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self._workers))

    async def _render(
        self, source: str, variables: Mapping[str, Any], is_long: bool, said: Sequence[str] | None = None
    ) -> dict[str, Any]:
        request = {"source": source, "variables": variables} | ({} if said is None else {"said": said})
        line = await asyncio.to_thread(encode, request) if is_long else encode(request)
        worker = await self._idle.get()
        # A caller that goes away must not leave an answer in the pipe for the next one, nor cost a worker.
        task = asyncio.create_task(worker.render(line, is_long))
        self._running.add(task)
        task.add_done_callback(lambda ended: self._ended(ended, worker))
        answer = await asyncio.shield(task)
        if "field" in answer:
            raise ArgumentsError(answer["field"], answer["error"])
        if "error" in answer:
            raise TemplateError(f"chat template: {answer['error']}")
        return answer

    def _ended(self, task: "asyncio.Task[dict[str, Any]]", worker: TemplateProcess) -> None:
        self._running.discard(task)
        self._idle.put_nowait(worker)
        if not task.cancelled():
            task.exception()  # seen, even if its caller went away


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
        "documents": list(conversation.documents) or None,
        **conversation.variables,
        "messages": [_message(index, message) for index, message in enumerate(conversation.messages)],
        "tools": list(conversation.tools) or None,  # None: templates ask whether there are tools at all
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
    """Put a marker after the last message's text. Returns the text and the marker.

    The marker ends with a space, so that a template that trims its input is noticed.
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
