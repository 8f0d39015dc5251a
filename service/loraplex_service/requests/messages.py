"""How the outputs of a request are read: as plain text, or as messages with reasoning and calls of tools."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.prompt_pb2 import Chat, Tool
from loraplex_service.admission.tenants import Tenant
from loraplex_service.errors import InvalidRequest
from loraplex_service.names.target import LoadedModel
from loraplex_service.requests.calls import CallForm, answer_grammar
from loraplex_service.requests.forms import Forms
from loraplex_service.requests.prompts import TextWork, offered_tools
from loraplex_service.text import Message, MessageReader, MessageRules, Tokenizer, TokenizerError, argument_types
from loraplex_service.validation.checks import requires_calls

_WINDOWS = (64, 1024)  # the last tokens of a prompt, in which the model's message begins


class Messages:
    """Makes the readers of messages. For one event loop."""

    def __init__(self, work: TextWork) -> None:
        self._work = work
        self._rules: WeakKeyDictionary[Tokenizer, MessageRules] = WeakKeyDictionary()

    async def of(
        self, spec: GenerateSpec, outputs: int, tokenizer: Tokenizer, prompt: Sequence[int], tenant: Tenant, path: str
    ) -> Sequence[Message] | None:
        """One message for each output; None: they are plain text.

        `path`: where the spec is in the request. Raises InvalidRequest, Unavailable.
        """
        if not _is_read(spec, tokenizer, path):
            return None
        rules, chat = await self._rules_of(tokenizer, path), spec.prompt.chat
        opened = await self._opened(rules, chat, tokenizer, prompt, tenant)
        tools = await self._work.on(tenant, chat.ByteSize(), lambda: typed_tools(chat))
        one_call = chat.HasField("parallel_tool_calls") and not chat.parallel_tool_calls
        first = await self._work.on(tenant, len(opened), lambda: MessageReader(rules, opened, tools, one_call))
        return [first, *(first.twin() for _ in range(outputs - 1))]

    async def required_calls(
        self, forms: Forms, spec: GenerateSpec, model: LoadedModel, prompt: Sequence[int], tenant: Tenant, path: str
    ) -> str:
        """The grammar of the calls that a chat requires; "": it requires none.

        `path`: where the spec is in the request. Raises InvalidRequest, Unavailable.
        """
        chat, tokenizer, where = spec.prompt.chat, model.tokenizer, f"{path}.prompt.chat"
        if not requires_calls(chat):
            return ""
        syntax = tokenizer.message_syntax
        if syntax is None or syntax.calls is None:
            problem = "requires calls, and how to force those of this model is not known"
            raise InvalidRequest.at(f"{where}.tool_choice", problem)
        opened = await self._opened(await self._rules_of(tokenizer, path), chat, tokenizer, prompt, tenant)
        form = CallForm(syntax, syntax.calls, tokenizer.control_tokens, opened, chat)
        return await forms.kept(form.key, tenant, lambda: form.grammar(where))

    async def behind_reasoning(
        self, grammar: str, spec: GenerateSpec, model: LoadedModel, prompt: Sequence[int], tenant: Tenant, path: str
    ) -> str:
        """A grammar, behind the reasoning where outputs are read as messages that may begin with one.

        `path`: where the spec is in the request. Raises InvalidRequest, Unavailable.
        """
        tokenizer = model.tokenizer
        syntax = tokenizer.message_syntax
        if syntax is None or syntax.reasoning is None or not _is_read(spec, tokenizer, path):
            return grammar
        rules = await self._rules_of(tokenizer, path)
        opened = await self._opened(rules, spec.prompt.chat, tokenizer, prompt, tenant)
        return answer_grammar(grammar, syntax.reasoning, opened, tokenizer.control_tokens)

    async def _opened(
        self, rules: MessageRules, chat: Chat, tokenizer: Tokenizer, prompt: Sequence[int], tenant: Tenant
    ) -> str:
        return await self._work.on(tenant, len(prompt), lambda: _opened(rules, chat, tokenizer, prompt))

    async def _rules_of(self, tokenizer: Tokenizer, path: str) -> MessageRules:
        rules = self._rules.get(tokenizer)
        if rules is None:
            assert tokenizer.message_syntax is not None
            try:
                rules = await asyncio.to_thread(MessageRules, tokenizer.message_syntax)
            except TokenizerError as error:
                problem = f"cannot be done: the model's {error}. False leaves all of an output as text"
                raise InvalidRequest.at(f"{path}.output.parse_message", problem) from error
            self._rules[tokenizer] = rules
        return rules


def typed_tools(chat: Chat) -> Sequence[Mapping[str, Any]]:
    """The tools offered, with the types of their arguments. Their schemas must be JSON objects."""
    return [_typed(tool) for tool in offered_tools(chat)]


def _typed(tool: Tool) -> Mapping[str, Any]:
    function = {"name": tool.name, "parameters": argument_types(json.loads(tool.parameters_json or "{}"))}
    return {"type": "function", "function": function}


def _is_read(spec: GenerateSpec, tokenizer: Tokenizer, path: str) -> bool:
    """Whether outputs are read as messages. Raises InvalidRequest if they ought to be, and it is not known how."""
    output, syntax = spec.output, tokenizer.message_syntax
    asked = output.HasField("parse_message") and output.parse_message
    if output.HasField("parse_message") and not asked:
        return False
    if not spec.prompt.HasField("chat") or (output.HasField("text") and not output.text):
        return False
    if offered_tools(spec.prompt.chat) and (syntax is None or not syntax.has_calls):
        problem = (
            "cannot be offered: how this model calls tools is not known; with output.parse_message false, all is text"
        )
        raise InvalidRequest.at(f"{path}.prompt.chat.tools", problem)
    if asked and syntax is None:
        problem = "cannot be true: how this model writes its messages is not known"
        raise InvalidRequest.at(f"{path}.output.parse_message", problem)
    return syntax is not None and (asked or bool(offered_tools(spec.prompt.chat)) or syntax.has_reasoning)


def _opened(rules: MessageRules, chat: Chat, tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """What the prompt has of the message that the model goes on with."""
    if chat.HasField("add_generation_prompt") and not chat.add_generation_prompt:
        return ""
    windows = (*_WINDOWS, len(prompt)) if chat.continue_final_message else _WINDOWS
    texts = (tokenizer.decode(prompt[-window:], skip_special_tokens=False) for window in windows)
    return next((found for text in texts if (found := rules.opened(text)) is not None), "")
