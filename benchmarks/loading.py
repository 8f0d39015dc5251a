"""How much memory loading a model takes, beyond what the loaded model keeps, and how long beside reading its files.

    python -m benchmarks.loading MODEL [--quantization nf4] [--kernels cpu] [--threads 2] [--cold] [--make FORMAT]

Loads the model in this process and watches its anonymous memory: pages of the mapped checkpoint come and go as the
system likes and are not counted. The files are also read beforehand, in pieces into one buffer: the least that any
loader does; and, warm, into memory of their own, by as many threads as load: the least for one that keeps what it
read. The system hands that memory out page by page and clears it first, and in a virtual machine the host may have to
find it, too. `--cold` asks the system to forget the files before each, so that they come from the disk. `--make`
first writes MODEL as a random model in that format: dense or nf4, 270 million weights in the linears.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex_engine.checkpoint.memory import empty_matrix
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models import load_model, parse_model_config
from loraplex_engine.models.layout import tensor_shapes
from loraplex_engine.quantization import round_to_nearest
from loraplex_kernels.quantized import TableWeight
from loraplex_kernels.selection import select_ops

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INTERVAL_SECONDS = 0.002
MIB = 1 << 20
BUFFER_BYTES = 8 * MIB


def anonymous_bytes() -> int:
    """Memory of this process that no file backs. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


class PeakMemory:
    """The most anonymous memory while the block runs, and at its end, beyond what there was at its start."""

    def __enter__(self) -> PeakMemory:
        self._before = self._most = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = self._most - self._before
        self.final = anonymous_bytes() - self._before

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_SECONDS):
            self._most = max(self._most, anonymous_bytes())


def forget(directory: Path) -> None:
    """Drop the weights from the page cache, as far as nobody else maps them."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading_seconds(directory: Path) -> float:
    """How long it takes to read the weights and do nothing with them."""
    buffer = bytearray(BUFFER_BYTES)
    started = time.perf_counter()
    for path in directory.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def keep(directory: Path, threads: int) -> tuple[float, list[Tensor]]:
    """How long it takes to read the weights into new memory on huge pages, and that memory, so that it stays in use."""
    started = time.perf_counter()
    kept = []
    with ThreadPoolExecutor(threads) as pool:
        for path in directory.glob("*.safetensors"):
            buffer = empty_matrix((path.stat().st_size,), torch.uint8, torch.device("cpu"))
            kept.append(buffer)
            with path.open("rb") as file:
                descriptor, view = file.fileno(), buffer.numpy().data
                starts = range(0, len(view), BUFFER_BYTES)
                list(pool.map(lambda at: os.preadv(descriptor, [view[at : at + BUFFER_BYTES]], at), starts))  # noqa: B023
    return time.perf_counter() - started, kept


def make(directory: Path, file_format: str) -> None:
    """A random model, in as many files as it has layers."""
    directory.mkdir(parents=True)
    raw = SHAPE if file_format == "dense" else {**SHAPE, "quantization_config": NF4}
    (directory / "config.json").write_text(json.dumps(raw))
    shards: dict[str, dict[str, Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for name, shape in tensor_shapes(parse_model_config(raw, "config.json")).items():
        weight = (torch.rand(shape, generator=generator) - 0.5).bfloat16()
        tensors = {name: weight}
        if file_format == "nf4" and "_proj." in name:
            tensors = as_nf4(name, weight)
        shard = f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors"
        shards.setdefault(shard, {}).update(tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    for shard, tensors in shards.items():
        save_file(tensors, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def as_nf4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that bitsandbytes stores."""
    record = round_to_nearest(weight, "nf4")
    assert isinstance(record, TableWeight)
    pairs = record.codes.view(-1, 2)
    state = {"quant_type": "nf4", "blocksize": record.block, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        name: (pairs[:, :1] << 4 | pairs[:, 1:]).contiguous(),
        f"{name}.absmax": record.absmax,
        f"{name}.quant_map": record.table,
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory that loading a model takes.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantization")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--make", choices=["dense", "nf4"])
    given = parser.parse_args()
    if given.make:
        make(given.model, given.make)
        return
    config = EngineConfig(model=str(given.model), quantization=given.quantization, kernels=given.kernels)
    config.check()
    ops = select_ops(torch.device("cpu"), config.kernels, threads=given.threads)
    if ops.name == "cpu":
        torch.set_num_threads(1)  # as in an engine
    if given.cold:
        forget(given.model)
    reading = reading_seconds(given.model)
    keeping, kept = keep(given.model, given.threads)
    if given.cold:
        forget(given.model)
    started = time.perf_counter()
    with PeakMemory() as memory:
        model = load_model(config, given.model, ops)
    seconds = time.perf_counter() - started
    del kept
    print(
        f"{model.config.quantization or 'dense'}, {ops.name} kernels: {seconds:.3f} s, reading {reading:.3f} s, "
        f"reading and keeping {keeping:.3f} s"
    )
    print(
        f"model {model.nbytes / MIB:.0f} MiB, memory at the end {memory.final / MIB:.0f}, peak {memory.peak / MIB:.0f}"
    )
    print(f"peak / model {memory.peak / model.nbytes:.3f}")


if __name__ == "__main__":
    main()
