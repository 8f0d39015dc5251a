"""Adapters on quantised models against the dequantised model + PEFT, which mixes no adapters on quantised ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapters.key import AdapterKey
from adapters.source import digest
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import LoadAdapter
from tests.engine.quantization.checkpoints import MODEL, load, make_twins
from tests.engine.quantization.formats import FORMATS
from tests.reference.test_generation import ADAPTERS, Client, Oracle

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

BASES = ("gptq act-order", "awq gemm", "bitsandbytes nf4", "bitsandbytes int8", "fp8 blocks")


@pytest.fixture(scope="module", params=BASES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("quantised")
    twins = make_twins(folder, *FORMATS[request.param])
    twins.quantised.rename(folder / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(twins.dense, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    keys = {}
    for name, fields in ADAPTERS.items():
        config = peft.LoraConfig(**fields, task_type="CAUSAL_LM")
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key and f".{name}." in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.peft_config[name].base_model_name_or_path = "base"
        model.save_pretrained(folder / "adapters", selected_adapters=[name])
        keys[name] = AdapterKey(f"shared/{name}", digest(folder / "adapters" / name))
    return Oracle(model.eval(), folder, keys)


@pytest.fixture(params=["reference", "cpu"])
def core(oracle: Oracle, request: pytest.FixtureRequest) -> Iterator[EngineCore]:
    config = EngineConfig(
        model=str(oracle.folder / "base"),
        kernels=request.param,
        device="cpu",
        dtype="float32",
        kv_cache_bytes=4 << 20,
        block_size=4,
        max_model_len=64,
        threads=1,
    )
    try:
        core = EngineCore.load(config)
    except NotImplementedError as error:
        pytest.skip(str(error))
    for name, key in oracle.keys.items():
        core.load_adapter(LoadAdapter(key, str(oracle.folder / "adapters" / name)))
    while core.has_work():
        core.step()
    yield core
    core.close()


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, MODEL["vocab_size"], (length,), generator=generator).tolist()


def test_mixed_batch_equals_each_request_alone(oracle: Oracle, core: EngineCore) -> None:
    names = [None, *ADAPTERS]
    requests = [(index, prompt(3 + 5 * index % 17, index), names[index % len(names)]) for index in range(12)]
    client = Client(core, oracle.keys)
    for request_id, token_ids, adapter in requests:
        client.add(request_id, token_ids, adapter)
        if request_id % 3:
            client.step()
    client.finish()
    for request_id, token_ids, adapter in requests:
        assert client.tokens(request_id) == oracle.greedy(token_ids, adapter, 8), (request_id, adapter)


def test_the_weights_beside_an_adapter_can_be_read_back(tmp_path: Path) -> None:
    """By rows of a fused linear, whose parts may be matrices of their own."""
    twins = make_twins(tmp_path, *FORMATS["gptq act-order"], skipped=("k_proj",))
    sites, dense = load(twins.quantised).lora_sites(), load(twins.dense).lora_sites()
    for site, linear in ((name, site) for name, site in sites.items() if name.startswith("layers.")):
        last = linear.out_features
        for start, end in ((0, last), (last // 2, last - 3), (5, 6)):
            found, wanted = (held.linear.dequantize(start, end) for held in (linear, dense[site]))
            assert torch.equal(found, wanted)
