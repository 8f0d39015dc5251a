"""Text and tokens: reading tokenizers, streaming text out of token ids, stop strings, chat templates.

`Tokenizer.load(path)` reads a Hugging Face model directory. For each output of a request, an `IncrementalDetokenizer`
turns token ids into whole characters and `StopStrings` holds back what could begin a stop string. `TemplateRenderer`
turns a `Conversation` into a prompt with the model's `ChatTemplate`, in a process that can be killed. Everything a user
or an operator can get wrong raises a `TextError`.
"""

from loraplex_service.text.adapted import AdapterText, adapter_text
from loraplex_service.text.argument_types import argument_types
from loraplex_service.text.chat_template import ChatTemplate, Conversation, TemplateRenderer
from loraplex_service.text.detokenizer import IncrementalDetokenizer
from loraplex_service.text.errors import (
    ArgumentsError,
    RendererError,
    TemplateError,
    TextError,
    TokenizerError,
    TooManyTokensError,
)
from loraplex_service.text.literal import Span
from loraplex_service.text.message_reader import Call, Message, MessageReader, MessageRules, PlainMessage
from loraplex_service.text.message_syntax import CallSpelling, MessageSyntax, Reasoning
from loraplex_service.text.stop_strings import StopResult, StopStrings
from loraplex_service.text.template_process import TemplateLimits
from loraplex_service.text.tokenizer import MAX_TOKENS, Encoding, Tokenizer

__all__ = [
    "MAX_TOKENS",
    "AdapterText",
    "ArgumentsError",
    "Call",
    "CallSpelling",
    "ChatTemplate",
    "Conversation",
    "Encoding",
    "IncrementalDetokenizer",
    "Message",
    "MessageReader",
    "MessageRules",
    "MessageSyntax",
    "PlainMessage",
    "Reasoning",
    "RendererError",
    "Span",
    "StopResult",
    "StopStrings",
    "TemplateError",
    "TemplateLimits",
    "TemplateRenderer",
    "TextError",
    "Tokenizer",
    "TokenizerError",
    "TooManyTokensError",
    "adapter_text",
    "argument_types",
]
