import torch

from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_kernels.ops import LoraSegments, LoraSlice, LoraWeights
from loraplex_kernels.selection import select_ops
from tests.adapters.dense import Dense


def segments(*ranges: tuple[int, int, int]) -> LoraSegments:
    columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*ranges, strict=True)]
    return LoraSegments(ranges, *columns)


def make_layer() -> LoRALinear:
    torch.manual_seed(0)
    ops = select_ops(torch.device("cpu"), "reference")
    layer = LoRALinear(ops, Dense(torch.randn(6, 5)), num_slots=2)
    for slot in range(2):
        weights = LoraWeights(torch.randn(2, 5), (LoraSlice(0, 3, torch.randn(3, 2)),))
        layer.table.put(slot, ops.pack_lora(weights))
    return layer


def test_without_segments_the_layer_is_the_linear() -> None:
    layer, x = make_layer(), torch.randn(4, 5)
    assert torch.equal(layer(x, None), layer.linear(x))


def test_rows_of_the_base_are_bit_identical_beside_rows_of_adapters() -> None:
    layer, x = make_layer(), torch.randn(4, 5)
    y = layer(x, segments((0, 1, 2), (1, 3, 4)))
    assert torch.equal(y[[0, 2]], layer.linear(x)[[0, 2]])
    assert not torch.equal(y[[1, 3]], layer.linear(x)[[1, 3]])


def test_an_adapter_s_rows_do_not_depend_on_which_others_are_there() -> None:
    layer, x = make_layer(), torch.randn(4, 5)
    both = layer(x, segments((0, 1, 2), (1, 3, 4)))
    alone = layer(x, segments((1, 3, 4)))
    assert torch.equal(both[3], alone[3])


def test_features_are_those_of_the_linear() -> None:
    layer = make_layer()
    assert (layer.in_features, layer.out_features) == (5, 6)
