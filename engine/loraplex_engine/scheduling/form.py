"""The form that one output must have."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher


class Form:
    """What may follow the tokens that an output has so far."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def take(self, token_id: int) -> bool:
        """Note the output's next token. Returns whether nothing but the end may follow it."""
        return self.matcher.consume_token(token_id) and self.matcher.is_stopped()

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may follow, one after the other."""
        return int(self.matcher.validate_tokens(list(token_ids)))

    def after(self, token_id: int) -> Form | None:
        """The form after one more token, which the output may never have; None: nothing of it can follow that."""
        matcher = self.matcher.deep_copy()
        return Form(matcher) if matcher.consume_token(token_id) and not matcher.is_stopped() else None

    @property
    def problem(self) -> str:
        """Why the form cannot go on; "": it can."""
        problem = self.matcher.get_error().partition("\n")[0]  # behind it is that details are left out
        return "no text can complete it" if problem == "NoExtensionBias" else problem
