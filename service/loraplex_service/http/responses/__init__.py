"""OpenAI's Responses: `table` has the parameters, `input` reads the items, and `answers` says what came of them."""
