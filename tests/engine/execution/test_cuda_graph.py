"""What a captured graph reads: padded inputs at fixed addresses. Capturing itself is tested in tests/gpu."""

import itertools
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_engine.execution.cuda_graph import DecodeInputs, batch_sizes, decode_graphs, reserve_adapters
from loraplex_engine.execution.kv_cache import create_kv_cache
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models import load_model
from loraplex_engine.models.step_batch import StepBatch
from loraplex_kernels.ops import AttentionMetadata, LoraSegments, LoraSlice, LoraWeights
from loraplex_kernels.reference import ReferenceOps

transformers = pytest.importorskip("transformers")
pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_SEQS, NUM_BLOCKS = 4, 600, 8, 100
LONG = 300  # keys: more than one program attends to alone


@pytest.mark.parametrize("largest", [1, 5, 8, 100, 256])
def test_batch_sizes_reach_the_largest_and_waste_little(largest):
    sizes = batch_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, largest)
    for rows in range(1, largest + 1):
        assert next(size for size in sizes if size >= rows) <= max(rows + 1, 1.5 * rows)


@pytest.fixture(scope="module")
def ops():
    from loraplex_kernels.triton import TritonOps

    return TritonOps(DEVICE)


@pytest.fixture(scope="module")
def model(ops, tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(
        **shape, vocab_size=40, num_hidden_layers=2, max_position_embeddings=MAX_MODEL_LEN
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    loaded = load_model(EngineConfig(model=str(folder), dtype="float32", max_resident_adapters=2), folder, ops)
    generator = torch.Generator().manual_seed(1)
    for name, site in loaded.lora_sites().items():
        if not isinstance(site, LoRALinear):
            continue
        a = torch.randn(3, site.in_features, generator=generator)
        b = torch.randn(site.out_features, 3, generator=generator)
        affine = torch.rand(2, site.out_features, generator=generator) if name == "layers.0.qkv" else None
        site.table.put(1, ops.pack_lora(LoraWeights(a, (LoraSlice(0, 0, b),), affine)))
    return loaded


def tensor(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def batch_of(lens, ranges):
    """One new token for each sequence of up to so many tokens. Their blocks follow each other."""
    blocks = itertools.count(1)
    places = range(-(-max(lens) // BLOCK_SIZE))
    tables = [[next(blocks) if place * BLOCK_SIZE < n else 0 for place in places] for n in lens]
    slots = [tables[s][(n - 1) // BLOCK_SIZE] * BLOCK_SIZE + (n - 1) % BLOCK_SIZE for s, n in enumerate(lens)]
    count = len(lens)
    return StepBatch(
        token_ids=tensor(range(7, 7 + count), torch.int64),
        positions=tensor([n - 1 for n in lens], torch.int64),
        attention=AttentionMetadata(
            tensor(range(count + 1)), tensor(lens), tensor(tables), tensor(slots, torch.int64), 1, max(lens)
        ),
        lora=LoraSegments(ranges, *map(tensor, zip(*ranges, strict=True))) if ranges else None,
        logits_rows=tensor(range(count), torch.int64),
    )


def decode_batch(with_adapters):
    """Three sequences, the last two of the adapter in slot 1."""
    return batch_of([5, 1, LONG], ((1, 1, 3),) if with_adapters else ())


@torch.inference_mode()
@pytest.mark.parametrize("with_adapters", [False, True])
def test_padding_changes_neither_results_nor_cache(ops, model, with_adapters):
    def filled_cache():
        generator = torch.Generator().manual_seed(2)
        cache = create_kv_cache(model.config, ops, NUM_BLOCKS, BLOCK_SIZE, torch.float32)
        for layer in cache:
            layer.k.copy_(torch.randn(layer.k.shape, generator=generator))
            layer.v.copy_(torch.randn(layer.v.shape, generator=generator))
        return cache

    plain, padded = filled_cache(), filled_cache()
    batch, inputs = decode_batch(with_adapters), DecodeInputs(MAX_NUM_SEQS, MAX_MODEL_LEN, BLOCK_SIZE, DEVICE)
    inputs.fill(decode_batch(True), MAX_NUM_SEQS)  # what an earlier step left behind must not matter
    inputs.fill(batch, 6)
    hidden = model.forward(inputs.batch(6, with_adapters), padded)
    assert hidden.shape == (6, 16)
    torch.testing.assert_close(hidden[:3], model.forward(batch, plain), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(padded, plain, strict=True):
        torch.testing.assert_close(mine.k, theirs.k, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.v, theirs.v, rtol=1e-5, atol=1e-5)


def test_operations_that_cannot_be_captured_have_no_graphs(model):
    config = EngineConfig(model="any")
    assert decode_graphs(model, ReferenceOps(torch.device("cpu")), [], config, 1) is None


def test_adapters_within_what_was_reserved_change_no_graph(ops, model):
    reserve_adapters(model, 40)
    growth, table = ops.lora_growth, model.lora_sites()["layers.0.qkv"].table
    a, part = torch.ones(120, table.in_features), torch.ones(4, 40)
    table.put(0, ops.pack_lora(LoraWeights(a, tuple(LoraSlice(40 * i, 4 * i, part) for i in range(3)))))
    assert (ops.lora_growth, table.capacity, table.slice_capacity) == (growth, 128, 64)
    table.remove(0)


class Recording(TorchDispatchMode):
    """What a step launches and has torch do, in order, and with what. Of kernels no more than that they are launched.

    A tensor that the step makes is known by its number, as a graph has a place of its own for it. Any other is known by
    its address, where a graph would read it again.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self._made = {}  # the number of each, by its address
        self._kept = []  # so that no address is taken twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.note(str(function), (args, kwargs))
        given = {address(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and address(each) not in given:
                self._made[address(each)] = len(self._made)
                self._kept.append(each)
        return result

    def note(self, name, args):
        self.calls.append((name, [self._place(x) if isinstance(x, torch.Tensor) else x for x in tree_leaves(args)]))

    def _place(self, tensor):
        place = self._made.get(address(tensor))
        where = ("held", tensor.data_ptr()) if place is None else ("made", place, tensor.storage_offset())
        return where, tensor.shape, tensor.stride(), tensor.dtype


def address(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def recorded(model, monkeypatch):
    """Records the step of a batch that was brought into these inputs: recorded(inputs, cache, lengths, ranges)"""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def step(inputs, cache, lengths, ranges):
        def note(executor, *args, **kwargs):
            recording.note(executor.fn.__name__, (executor.grid, args, kwargs))

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", note)
        inputs.fill(batch_of(lengths, ranges), 6)
        with Recording() as recording:
            model.forward(inputs.batch(6, True), cache)
        return recording.calls

    return step


BATCHES = ([5, 1, 9], ((1, 1, 3),)), ([1, 12, 2, 1, LONG, 3], ((0, 0, 2), (1, 2, 3), (0, 4, 6)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's launches are recorded")
@torch.inference_mode()
def test_a_step_does_the_same_with_any_batch_of_a_captured_size(ops, model, recorded):
    """A graph repeats grids and arguments as they were captured, whoever is in the batch that it is replayed for."""
    inputs = DecodeInputs(MAX_NUM_SEQS, MAX_MODEL_LEN, BLOCK_SIZE, DEVICE)
    cache = create_kv_cache(model.config, ops, NUM_BLOCKS, BLOCK_SIZE, torch.float32)
    one, other = (recorded(inputs, cache, *batch) for batch in BATCHES)
    assert {"_decode", "_combine", "_shrink", "_expand", "_scale"} <= {name for name, _ in one}
    assert one == other


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's launches are recorded")
@pytest.mark.parametrize("moved", ["seq_lens", "block_tables", "segments", "token_ids"])
@torch.inference_mode()
def test_a_tensor_of_a_captured_step_that_moves_is_noticed(ops, model, recorded, moved):
    inputs = DecodeInputs(MAX_NUM_SEQS, MAX_MODEL_LEN, BLOCK_SIZE, DEVICE)
    cache = create_kv_cache(model.config, ops, NUM_BLOCKS, BLOCK_SIZE, torch.float32)
    one = recorded(inputs, cache, *BATCHES[0])
    before = getattr(inputs, moved)
    setattr(inputs, moved, before.clone())
    assert recorded(inputs, cache, *BATCHES[0]) != one
