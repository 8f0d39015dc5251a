"""Anthropic's API: `table` has its parameters, `turns` reads its conversations, `answers` says what came of them."""
