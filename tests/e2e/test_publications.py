"""A trainer that publishes its adapter again and again: every token is of the version that it is said to be of."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex import AsyncAdminClient, AsyncClient, NotFound
from loraplex.v1.inference_pb2 import GenerateResponse
from tests.e2e.conftest import DEMO
from tests.waits import MOST_SECONDS

PUBLICATIONS, LIVE = 100, 4
PROMPT = "Once upon a time there was a fox who"


def drawn(answer: GenerateResponse) -> list[tuple[int, float]]:
    return [(token.token_id, token.logprob) for token in answer.outputs[0].logprobs]


@pytest.mark.long
async def test_a_hundred_publications_in_a_row_are_each_served_as_they_are(
    client: AsyncClient, admin: AsyncAdminClient, tmp_path: Path
) -> None:
    origin, directory = DEMO / "adapters" / "pirate", tmp_path / "student"
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes((origin / "adapter_config.json").read_bytes())
    tensors = load_file(origin / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)

    async def ask(name: str, fresh: bool = False) -> GenerateResponse:
        return await client.generate(
            name, PROMPT, max_tokens=4, temperature=0, logprobs=True, bypass_prefix_cache=fresh
        )

    said: dict[str, list[tuple[int, float]]] = {}  # by the versions that are there, oldest first
    for _ in range(PUBLICATIONS):
        for name, tensor in tensors.items():
            tensors[name] = tensor + 0.01 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        save_file(tensors, directory / "adapter_model.safetensors")
        made = await admin.upload_adapter("student", base_model="storyteller", directory=directory, wait=MOST_SECONDS)
        answer = await ask("student")
        assert answer.target.adapter_version == made.version
        assert drawn(answer) not in said.values(), "it has what another version says"
        said[made.version] = drawn(answer)
        if len(said) > LIVE:
            oldest = next(iter(said))
            del said[oldest]
            await admin.delete_adapter(oldest, wait=MOST_SECONDS)
            with pytest.raises(NotFound):
                await ask(oldest)
        for version, before in said.items():
            again = await ask(version)
            assert (again.target.adapter_version, drawn(again)) == (version, before)
    for version, before in said.items():  # as without a cache
        for (token, logprob), (cached, expected) in zip(drawn(await ask(version, fresh=True)), before, strict=True):
            assert (token, logprob) == (cached, pytest.approx(expected, abs=1e-4))
    versions = await admin.list_adapters(include_versions=True)
    assert {each.version for each in versions if each.name.endswith("/student")} == said.keys()
    await admin.delete_adapter("student", wait=MOST_SECONDS)
