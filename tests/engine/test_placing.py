"""An engine says what its model needs, and loads it where the service says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraplex_engine import core
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.shard import Shard
from loraplex_engine.execution.loading import check_divisible
from loraplex_engine.execution.sizing import needs_of
from loraplex_engine.link import host_memory
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.drafts import DraftConfig, DraftKind
from loraplex_engine.link.load_report import UNREPORTED
from loraplex_engine.link.messages import EngineSized, FromEngine, LoadOn
from loraplex_engine.link.sizes import Needs, readable
from loraplex_engine.models import load_model, parse_model_config
from loraplex_engine.models.layout import tensor_shapes
from loraplex_engine.placing import check_free, devices, placed
from loraplex_engine.ranks.exchange import Alone
from loraplex_kernels.selection import select_ops
from tests.engine.execution.cuda_stand_in import TOTAL_BYTES, StandIn, one_cuda_device

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


class FakeBus:
    """A service that answers what it was made with."""

    def __init__(self, answer: LoadOn) -> None:
        self.answer = answer
        self.sent: list[FromEngine] = []

    def send(self, message: FromEngine) -> None:
        self.sent.append(message)

    def receive(self, timeout_seconds: float | None) -> list[LoadOn]:
        return [self.answer]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = tensor_shapes(parse_model_config(CONFIG, "config.json"))
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with one_cuda_device(monkeypatch) as device:
        yield device


def sized(config: EngineConfig, answer: LoadOn) -> tuple[Needs, EngineConfig]:
    bus = FakeBus(answer)
    found = placed(config, bus, UNREPORTED)  # type: ignore[arg-type]
    (message,) = bus.sent
    assert isinstance(message, EngineSized)
    return message.needs, found


def test_the_model_is_loaded_on_the_device_that_the_service_says(model: Path) -> None:
    config = EngineConfig(model=str(model), revision="main")
    needs, found = sized(config, LoadOn(["cpu"], 0.25))
    assert needs == needs_of(config, model)
    assert (found.device, found.devices, found.kv_cache_fraction, found.revision) == ("cpu", (), 0.25, None)


def test_the_cache_of_one_request_is_needed_at_least(model: Path) -> None:
    of_token = 2 * 1 * 8 * 4  # keys and values of one head of 8, in float32
    assert needs_of(EngineConfig(model=str(model)), model).cache == 48 * of_token  # whole blocks of 16
    assert needs_of(EngineConfig(model=str(model), max_model_len=10), model).cache == 16 * of_token
    assert needs_of(EngineConfig(model=str(model), kv_cache_bytes=77), model).cache == 77


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "vocab_size"])
def test_sizes_that_no_machine_has_are_the_fault_of_the_file(model: Path, tmp_path: Path, field: str) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {field: 10**30}))
    with pytest.raises(ValueError, match=r"config\.json: by its sizes the model takes .*, which no machine has: fetch"):
        sized(EngineConfig(model=str(tmp_path)), LoadOn(["cpu"], 0.5))


def test_a_small_model_that_drafts_is_counted_too(model: Path) -> None:
    alone, _ = sized(EngineConfig(model=str(model)), LoadOn(["cpu"], 0.5))
    drafts = DraftConfig(kind=DraftKind.MODEL, model=str(model))
    both, _ = sized(EngineConfig(model=str(model), drafts=drafts), LoadOn(["cpu"], 0.5))
    assert (both.weights, both.cache) == (2 * alone.weights, 2 * alone.cache)


def test_a_rank_needs_its_part_of_the_matrices_and_the_whole_embedding(model: Path) -> None:
    config = EngineConfig(model=str(model), tensor_parallel=2, kv_cache_bytes=5000)
    needs, _ = sized(config, LoadOn(["cpu", "cpu"], 0.5))
    ops = select_ops(torch.device("cpu"), "reference")
    assert needs.weights == load_model(config, model, ops, ranks=Alone(Shard(0, 2))).nbytes
    assert needs.cache == 5000


def test_more_stages_than_layers_are_refused_before_any_rank_is_started(model: Path) -> None:
    with pytest.raises(ValueError, match="1 layers cannot be divided into 2 stages: lower pipeline_parallel"):
        sized(EngineConfig(model=str(model), device="cpu", pipeline_parallel=2), LoadOn(["cpu", "cpu"], 0.5))


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        ({"pipeline_parallel": 2}, "1 layers cannot be divided into 2 stages"),
        ({"tensor_parallel": 5}, "cannot be divided equally among 5 ranks"),
        ({"tensor_parallel": 2, "implementation": "transformers"}, "transformers' class cannot be divided among 2"),
    ],
)
def test_an_engine_that_is_loaded_at_once_starts_no_rank_of_a_model_that_cannot_be_divided(
    model: Path, monkeypatch: pytest.MonkeyPatch, ranks: dict[str, Any], problem: str
) -> None:
    def start(*arguments: object) -> None:
        raise AssertionError("ranks are started")

    monkeypatch.setattr(core, "Leader", start)
    with pytest.raises(ModelError, match=problem):
        core.EngineCore.load(EngineConfig(model=str(model), device="cpu", **ranks))


def test_of_an_unknown_architecture_no_rank_is_started(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["Nobody"]}))
    with pytest.raises(ModelError, match=r"Nobody.*transformers' class cannot be divided among 2 ranks"):
        check_divisible(EngineConfig(model=str(tmp_path), tensor_parallel=2), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_needs_the_layers_and_ends_that_it_has(model: Path, tmp_path: Path, tied: bool) -> None:
    config_json = CONFIG | {"num_hidden_layers": 3, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    shapes = tensor_shapes(parse_model_config(config_json, "config.json"))
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    config, ops = EngineConfig(model=str(tmp_path), pipeline_parallel=2), select_ops(torch.device("cpu"), "reference")
    stages = [load_model(config, tmp_path, ops, ranks=Alone(Shard(0, 1, stage, 2))) for stage in (0, 1)]
    assert [stage.num_layers for stage in stages] == [1, 2]
    needs = needs_of(config, tmp_path)
    assert needs.weights == max(stage.nbytes for stage in stages)
    of_layer = needs_of(EngineConfig(model=str(model)), model).cache
    assert needs.cache == 2 * of_layer


def test_ranks_that_share_a_head_of_keys_have_it_whole_in_their_caches(model: Path) -> None:
    one, two = (needs_of(EngineConfig(model=str(model), tensor_parallel=ranks), model) for ranks in (1, 2))
    assert two.cache == one.cache


def test_the_devices_are_the_host_and_the_gpus_that_torch_sees(cuda: StandIn) -> None:
    cuda.num_devices = 2
    host, *gpus = devices()
    assert host.name == "cpu"
    assert [(gpu.name, gpu.total_bytes) for gpu in gpus] == [("cuda:0", TOTAL_BYTES), ("cuda:1", TOTAL_BYTES)]


def test_the_share_of_a_gpu_is_what_the_service_says(cuda: StandIn, model: Path) -> None:
    _, found = sized(EngineConfig(model=str(model)), LoadOn(["cuda:0"], 0.3))
    assert (found.device, found.device_memory_fraction, found.kv_cache_fraction) == ("cuda:0", 0.3, None)


def test_memory_that_others_hold_is_refused_with_the_size_of_each_part(cuda: StandIn, model: Path) -> None:
    cuda.others_bytes = TOTAL_BYTES - cuda.reserved_bytes - (1 << 20)
    with pytest.raises(
        ValueError, match=r"it needs 1\.0 GiB of cuda:0 at least \(weights .*, cache .*, a step .*, adapters 1\.0 GiB\)"
    ):
        sized(EngineConfig(model=str(model)), LoadOn(["cuda:0"], 0.9))


def test_ranks_that_share_a_host_need_room_together(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model=str(model), device="cpu", tensor_parallel=2)
    of_rank, _ = sized(config, LoadOn(["cpu", "cpu"], 0.5))
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 2 * of_rank.least("cpu") - 1)
    with pytest.raises(ValueError, match="are free there"):
        sized(config, LoadOn(["cpu", "cpu"], 0.5))


def test_a_model_that_just_fits_is_not_refused() -> None:
    check_free(Needs(1, 2, 3, 4), "cpu", 6)
    with pytest.raises(ValueError, match=r"it needs 6 bytes of cpu .* 5 bytes are free there"):
        check_free(Needs(1, 2, 3, 4), "cpu", 5)
    with pytest.raises(ValueError, match=r"it needs 12 bytes of cpu .* for each of 2 ranks\), and 11 bytes are free"):
        check_free(Needs(1, 2, 3, 4), "cpu", 11, ranks=2)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 << 40, "3072.0 GiB")]
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert readable(size) == text
