from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_adapters.runtime.weights import LoadedAdapter, load_adapter
from loraplex_kernels.ops import LoraWeights

AdapterMaker = Callable[..., Path]
TensorMaker = Callable[..., dict[str, torch.Tensor]]
KeyOf = Callable[[Path], AdapterKey]
Targets = dict[str, LoraTarget]


def load(key: AdapterKey, directory: Path, targets: Targets, dtype: torch.dtype = torch.float32) -> LoadedAdapter:
    return load_adapter(key, directory, targets, dtype, max_rank=64, pack=lambda weights: weights)


def test_an_adapter_is_read_and_described(make_adapter: AdapterMaker, key_of: KeyOf, targets: Targets) -> None:
    directory = make_adapter(task_type="SEQ_CLS")
    loaded = load(key_of(directory), directory, targets)
    assert loaded.key == key_of(directory)
    assert (loaded.rank, loaded.nbytes, loaded.target_modules) == (4, 2 * 4 * 4 * (8 + 12), ("q_proj",))
    assert list(loaded.packed) == ["0.qkv", "1.qkv"]
    assert len(loaded.warnings) == 1


def test_bytes_are_counted_in_the_compute_dtype(make_adapter: AdapterMaker, key_of: KeyOf, targets: Targets) -> None:
    directory = make_adapter()
    loaded = load(key_of(directory), directory, targets, torch.bfloat16)
    assert loaded.nbytes == 2 * 2 * 4 * (8 + 12)


def test_tensors_at_odd_offsets_are_read(
    make_adapter: AdapterMaker, lora_tensors: TensorMaker, key_of: KeyOf, targets: Targets
) -> None:
    directory = make_adapter()
    tensors = lora_tensors()
    content = save(tensors)
    header_bytes = int.from_bytes(content[:8], "little")
    odd = (header_bytes + 1).to_bytes(8, "little") + content[8 : 8 + header_bytes] + b" " + content[8 + header_bytes :]
    (directory / "adapter_model.safetensors").write_bytes(odd)
    weights = load(key_of(directory), directory, targets).packed["0.qkv"]
    assert isinstance(weights, LoraWeights)
    assert torch.equal(weights.a, next(tensor for key, tensor in tensors.items() if "lora_A" in key))


def test_files_that_are_not_the_version_asked_for_are_refused(
    make_adapter: AdapterMaker, key_of: KeyOf, targets: Targets
) -> None:
    key = key_of(make_adapter("old"))
    with pytest.raises(AdapterRejected, match="they were changed"):
        load(key, make_adapter("new", seed=1), targets)


def test_files_whose_digest_is_known_are_not_hashed_again(make_adapter: AdapterMaker, targets: Targets) -> None:
    key, directory = AdapterKey("shared/mine", "1" * 64), make_adapter()
    loaded = load_adapter(key, directory, targets, torch.float32, 64, lambda weights: weights, is_hashed=True)
    assert loaded.key == key


def test_integer_tensors_are_refused(make_adapter: AdapterMaker, key_of: KeyOf, targets: Targets) -> None:
    directory = make_adapter(tensors={"x.lora_A.weight": torch.ones(4, 8, dtype=torch.int8)})
    with pytest.raises(AdapterRejected, match=r"x\.lora_A\.weight: dtype I8"):
        load(key_of(directory), directory, targets)


def test_an_empty_tensor_is_refused_and_not_a_crash(
    make_adapter: AdapterMaker, key_of: KeyOf, targets: Targets
) -> None:
    directory = make_adapter(tensors={"x.lora_A.weight": torch.ones(0, 8)})
    with pytest.raises(AdapterRejected, match="binds to no projection"):
        load(key_of(directory), directory, targets)
