"""Drafts change how an output comes, and nothing in it: from the client to the engine and back."""

from typing import Any

import pytest

from loraplex import AsyncAdminClient, AsyncClient
from loraplex.v1.models_pb2 import MODEL_CAPABILITY_DRAFTS

STORY = "The fox found the lamp. The fox found the lamp. The fox found the"


@pytest.mark.parametrize("target", ["storyteller", "pirate"])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.7, "seed": 5, "n": 2}])
async def test_outputs_are_those_without_drafts(client: AsyncClient, target: str, options: dict[str, Any]) -> None:
    asked: dict[str, Any] = options | {"max_tokens": 60, "ignore_eos": True, "token_ids": True, "logprobs": True}
    plain = await client.generate(target, STORY, draft_kind="off", **asked)
    drafted = await client.generate(target, STORY, draft_kind="ngram", **asked)
    assert drafted.outputs == plain.outputs
    assert plain.usage.draft_tokens == 0
    # How many drafts there were is up to what rows cost on this machine: none may have paid.
    assert drafted.usage.draft_tokens >= drafted.usage.accepted_draft_tokens


async def test_models_say_that_they_have_drafts(admin: AsyncAdminClient) -> None:
    model = await admin.get_model("storyteller")
    assert MODEL_CAPABILITY_DRAFTS in model.capabilities
