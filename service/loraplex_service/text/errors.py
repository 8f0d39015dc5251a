"""Errors in text: in its files, its templates, its characters."""

# TextError
# ├── TokenizerError      a model directory has no tokenizer that can be read
# ├── TooManyTokensError  a text that is longer than its reader can use
# └── TemplateError       a chat template is missing, refused the conversation, or ran over its limits
#     └── ArgumentsError  the call of a tool is not what it should be
# RendererError           no text is at fault


class TextError(ValueError):
    """A mistake in a model's text files or in a user's text. Says what, where and what to do."""


class TokenizerError(TextError):
    """A tokenizer is missing, unreadable, or of a kind that cannot be served exactly."""


class TemplateError(TextError):
    """A conversation cannot be turned into a prompt. Carries the template's own message where it raised one."""


class ArgumentsError(TemplateError):
    """The arguments of a tool call, or the parameters of a tool, are no JSON object.

    `field`: the path of the field in the conversation.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


class TooManyTokensError(TextError):
    """A text has more tokens than are allowed."""

    def __init__(self, count: int, most: int) -> None:
        super().__init__(f"comes to {count} tokens; {most} are allowed")
        self.count = count


class RendererError(RuntimeError):
    """The process that renders chat templates does not start or answer, or the service shuts down.

    A retry may succeed.
    """
