"""What can be wrong with text: its files, its templates, its characters."""

# TextError
# ├── TokenizerError      a model directory has no tokenizer that can be read
# └── TemplateError       a chat template is missing, refused the conversation, or ran over its limits
# RendererError           nobody's text is at fault


class TextError(ValueError):
    """A mistake in a model's text files or in a user's text. Says what, where and what to do."""


class TokenizerError(TextError):
    """A tokenizer is missing, unreadable, or of a kind that cannot be served exactly."""


class TemplateError(TextError):
    """A conversation cannot be turned into a prompt. Carries the template's own message where it raised one."""


class RendererError(RuntimeError):
    """The process that renders chat templates cannot be started, or the service is shutting down. Try again later."""
