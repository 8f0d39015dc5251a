"""Tensors of a file that is read as far as somebody asks for them, and no further."""

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.config import LoRAConfig, parse_config
from loraplex_adapters.files.safetensors import Header, TensorEntry, read_header
from loraplex_adapters.runtime.binding import bind
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_adapters.runtime.tensors import FileTensors
from loraplex_kernels.ops import LoraWeights

AdapterMaker = Callable[..., Path]


class Reading:
    """The tensors of a file, and what was read of it so far."""

    def __init__(self, content: bytes, header: Header | None = None) -> None:
        file = BytesIO(content)
        self.read = b""
        self.header = header or read_header(file)
        self.tensors = FileTensors(file, self.header, "shared/mine@0", seen=self._note)

    def _note(self, piece: memoryview) -> None:
        self.read += piece


def test_a_tensor_is_read_with_those_before_it_alone() -> None:
    stored = {name: torch.randn(3, 5) for name in "abc"}
    reading = Reading(content := save(stored))
    assert torch.equal(reading.tensors["b"], stored["b"])
    end = reading.header.data_start + reading.header.tensors["b"].data_offsets[1]
    assert reading.read == content[:end]
    assert torch.equal(reading.tensors["a"], stored["a"])
    assert reading.read == content[:end]


def test_all_bytes_are_seen_in_their_order() -> None:
    reading = Reading(content := save({"large": torch.randn(300, 1000), "none": torch.ones(0, 4)}))
    reading.tensors.read_all()
    assert reading.read == content
    assert reading.tensors["none"].shape == (0, 4)


def test_shapes_and_dtypes_are_known_before_anything_is_read() -> None:
    reading = Reading(save({"a": torch.ones(3, 5, dtype=torch.bfloat16)}))
    outline = reading.tensors.outlines["a"]
    assert (outline.shape, outline.dtype, reading.read) == ((3, 5), torch.bfloat16, b"")


def test_what_lies_between_tensors_is_passed_over() -> None:
    entries = {"late": TensorEntry("F16", (1,), (9, 11)), "early": TensorEntry("F16", (2,), (0, 4))}
    content = torch.arange(8, dtype=torch.float16).numpy().tobytes()
    reading = Reading(content, Header(entries, 0, len(content)))
    assert reading.tensors["late"].view(torch.uint8).tolist() == list(content[9:11])
    reading.tensors.read_all()
    assert reading.read == content


def test_a_file_that_becomes_shorter_is_refused() -> None:
    header = read_header(BytesIO(content := save({"a": torch.ones(64)})))
    reading = Reading(content[:-4], header)
    with pytest.raises(AdapterRejected, match="adapter shared/mine@0: its weights became shorter"):
        reading.tensors["a"]


def _config(directory: Path) -> LoRAConfig:
    return parse_config((directory / "adapter_config.json").read_bytes())


def test_each_site_is_made_before_the_next_one_is_read(
    make_adapter: AdapterMaker, targets: Mapping[str, LoraTarget]
) -> None:
    directory = make_adapter()
    reading, config = Reading((directory / "adapter_model.safetensors").read_bytes()), _config(directory)
    read: list[tuple[str, int]] = []

    def made(site: str, weights: LoraWeights) -> None:
        read.append((site, len(reading.read)))

    bind(reading.tensors, config, targets, torch.float32, 64, made=made)
    ends = sorted(reading.header.data_start + entry.data_offsets[1] for entry in reading.header.tensors.values())
    assert read == [("0.qkv", ends[1]), ("1.qkv", ends[3])]


def test_nothing_is_read_of_an_adapter_whose_names_are_wrong(
    make_adapter: AdapterMaker, targets: Mapping[str, LoraTarget]
) -> None:
    names = (f"model.layers.0.nothing.lora_{part}.weight" for part in "AB")
    reading = Reading(save({name: torch.ones(4, 4) for name in names}))
    with pytest.raises(AdapterRejected, match="binds to no projection"):
        bind(reading.tensors, _config(make_adapter()), targets, torch.float32, 64)
    assert reading.read == b""
