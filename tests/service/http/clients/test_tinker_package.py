"""The real `tinker` package as a client, in an environment of its own. Skipped where no package index is at hand."""

from pathlib import Path

import pytest

from tests.service.http.clients.environments import environment, needs_uvicorn, served, until_idle, used

USE = r"""
import sys
import tinker
from tinker import types

service = tinker.ServiceClient(base_url=f"http://{sys.argv[1]}", api_key="tml-any")
told = tinker.RestClient(base_url=f"http://{sys.argv[1]}", api_key="tml-any").get_server_capabilities().result()
assert [model.model_name for model in told.supported_models] == ["tiny"], told
sampling = service.create_sampling_client(model_path="tinker://pirate").result()
prompt = types.ModelInput.from_ints([97, 98, 99])
asked = dict(prompt=prompt, num_samples=2, include_prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=2)
answer = sampling.sample(sampling_params=types.SamplingParams(max_tokens=4, temperature=0.7, seed=3), **asked).result()
assert [sequence.tokens for sequence in answer.sequences] == [[97, 98, 99, 97]] * 2, answer
assert {sequence.stop_reason for sequence in answer.sequences} == {"length"}
assert len({sequence.sequence_id for sequence in answer.sequences}) == 2

stopped = sampling.sample(
    prompt=prompt, num_samples=1, sampling_params=types.SamplingParams(max_tokens=9, stop=["c"])
).result()
assert (stopped.sequences[0].tokens, stopped.sequences[0].stop_reason) == ([97, 98, 99], "stop"), stopped
short = types.SamplingParams(max_tokens=2)
many = [sampling.sample(prompt=prompt, num_samples=1, sampling_params=short) for _ in range(64)]
assert all(each.result().sequences[0].tokens == [97, 98] for each in many)

for refused in (
    lambda: service.create_lora_training_client(base_model="tiny").result(),
    lambda: service.create_sampling_client(model_path="tinker://nobody").result(),
):
    try:
        refused()
    except tinker.APIStatusError as error:
        print(error.status_code, error)
    else:
        raise AssertionError("it was not refused")
service.close("success").result()
"""


@pytest.fixture(scope="module")
def with_tinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("tinker"), "tinker>=0.38")


@pytest.mark.slow
@needs_uvicorn
async def test_the_tinker_package_samples_from_an_adapter(
    with_tinker: Path, byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    async with served(byte_tokenizer_directory, tmp_path) as control:
        printed = await used(with_tinker, USE, str(control.addresses.http))
        await until_idle(control)
    assert "nothing is trained here" in printed
    assert "404" in printed
