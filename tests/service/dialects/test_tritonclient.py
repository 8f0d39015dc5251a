"""tritonclient as it is, in an environment of its own. Skipped where no package index is at hand."""

from pathlib import Path

import pytest

from tests.service.control_plane import ControlPlane
from tests.service.http.clients.environments import environment, until_idle, used

pytestmark = pytest.mark.slow

SCRIPT = r"""
import asyncio, json, queue, sys
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from tritonclient.utils import InferenceServerException

[address] = sys.argv[1:]


def inputs(text="abc", parameters={"max_tokens": 4, "temperature": 0}, stream=False):
    found = []
    for name, value in {"text_input": text, "sampling_parameters": json.dumps(parameters)}.items():
        tensor = triton.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([value.encode()], dtype=object))
        found.append(tensor)
    tensor = triton.InferInput("stream", [1], "BOOL")
    tensor.set_data_from_numpy(np.array([stream]))
    return [*found, tensor]


def text_of(result):
    [text] = result.as_numpy("text_output")
    return text.decode()


client = triton.InferenceServerClient(address)
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("pirate")
assert client.get_server_metadata().name == "loraplex"
assert client.get_model_metadata("tiny", as_json=True)["inputs"][0]["name"] == "text_input"
assert client.get_model_config("tiny").config.model_transaction_policy.decoupled
outputs = [triton.InferRequestedOutput("text_output")]
assert text_of(client.infer("tiny", inputs(), outputs=outputs, request_id="a")) == "abcabca"

as_texts = {"max_tokens": "4", "temperature": "0", "top_p": "0.95"}  # as in Triton's own example
assert text_of(client.infer("tiny", inputs(parameters=as_texts), parameters=as_texts)) == "abcabca"

answered = queue.Queue()
client.async_infer("pirate", inputs(), lambda result, error: answered.put((result, error)))
result, error = answered.get(timeout=120)
assert error is None and text_of(result) == "abcabca"

client.start_stream(lambda result, error: answered.put((result, error)))
client.async_stream_infer("tiny", inputs(stream=True), enable_empty_final_response=True)
text, is_final = "", False
while not is_final:
    result, error = answered.get(timeout=120)
    assert error is None, error
    response = result.get_response()
    is_final = response.parameters["triton_final_response"].bool_param
    text += text_of(result) if response.outputs else ""
assert text == "abca", text
client.async_stream_infer("tiny", inputs(parameters={"temperature": -1}))
result, error = answered.get(timeout=120)
assert "sampling_parameters.temperature" in error.message(), error
client.stop_stream()


def failed(call, status, word):
    try:
        call()
    except InferenceServerException as error:
        assert status in error.status() and word in error.message(), error
    else:
        raise AssertionError(status)


endless = inputs(parameters={"max_tokens": 100000, "ignore_eos": True})
failed(lambda: client.infer("nobody", inputs()), "NOT_FOUND", "nobody")
failed(lambda: client.infer("tiny", inputs(), priority=2), "UNIMPLEMENTED", "priority")
failed(lambda: client.infer("tiny", endless, client_timeout=0.5), "DEADLINE_EXCEEDED", "")
failed(lambda: client.register_system_shared_memory("a", "b", 1), "UNIMPLEMENTED", "SystemSharedMemoryRegister")

index = {model.name: model.state for model in client.get_model_repository_index().models}
assert index["tenants/shared/adapters/pirate"] == "READY", index
client.unload_model("tenants/shared/adapters/pirate")
assert not client.is_model_ready("pirate")
client.close()


async def asynchronous():
    async with aio.InferenceServerClient(address) as client:
        assert await client.is_model_ready("tiny")
        assert text_of(await client.infer("tiny", inputs())) == "abcabca"

        async def requests():
            yield {"model_name": "tiny", "inputs": inputs(stream=True), "request_id": "s"}

        parts = []
        async for result, error in client.stream_infer(requests()):
            assert error is None, error
            parts.append(text_of(result))
        assert "".join(parts) == "abca", parts
        call = asyncio.create_task(client.infer("tiny", endless))
        await asyncio.sleep(0.3)
        call.cancel()


asyncio.run(asynchronous())
print("served")
"""


async def test_tritonclient_is_served(control: ControlPlane, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", "tritonclient[grpc]")
    assert "served" in await used(python, SCRIPT, control.addresses.data)
    await until_idle(control)
