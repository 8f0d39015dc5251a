"""The configuration of one engine. Torch-free: the service builds it, the engine process reads it."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import msgspec

from loraplex_engine.link.bounds import AT_LEAST_1, Bounds, bound_problems, choice_problems
from loraplex_engine.link.drafts import DraftConfig
from loraplex_engine.link.ranks import DEVICE, RANKS, rank_devices, rank_problems

QUANTIZATIONS = ("nf4", "int8", "int4")
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
FRACTION = Bounds(0.0001, 1)  # of a core or of memory; less makes no sense
USUAL_CACHE_FRACTION = 0.5  # of the host's memory that is free once a model is loaded, for all caches together
USUAL_MEMORY_FRACTION = 0.9  # of a GPU; the rest is for CUDA contexts, about half a GiB an engine


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One base model and the resources it may use. `check` names every field that makes no sense."""

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "implementation": ("auto", "native", "transformers"),
        "dtype": ("auto", "float32", "bfloat16", "float16"),
        "quantization": QUANTIZATIONS,
        "head_quantization": ("int8",),
        "kernels": ("auto", "reference", "cpu", "triton"),
        "kv_cache_dtype": KV_CACHE_DTYPES,
    }
    BOUNDS: ClassVar[dict[str, Bounds]] = {
        "tensor_parallel": RANKS,
        "pipeline_parallel": RANKS,
        "machines": RANKS,
        "threads": AT_LEAST_1,
        "max_model_len": AT_LEAST_1,
        "block_size": AT_LEAST_1,
        "device_memory_fraction": FRACTION,
        "kv_cache_bytes": AT_LEAST_1,
        "kv_cache_fraction": FRACTION,
        "host_cache_bytes": Bounds(0),
        "disk_cache_bytes": Bounds(0),
        "max_num_seqs": AT_LEAST_1,
        "max_num_batched_tokens": AT_LEAST_1,
        "max_adapter_rank": AT_LEAST_1,
        "max_resident_adapters": AT_LEAST_1,
        "adapter_device_bytes": AT_LEAST_1,
        "adapter_host_bytes": AT_LEAST_1,
        "adapter_loader_threads": AT_LEAST_1,
        "adapter_load_share": FRACTION,
    }

    # a directory in Hugging Face layout, a GGUF file (docs/models.md#gguf-files), or the id of a model on the hub
    model: str
    revision: str | None = None  # the revision of a hub id: set it, so that it does not change
    # who computes the layers: `native`, this server's own decoder; `transformers`, the class that transformers has for
    # the architecture; auto: the latter where no native family reads the model. See
    # docs/models.md#everything-else-transformers-own-modelling
    implementation: str = "auto"
    # auto: bfloat16 where the checkpoint has 16 bits, else float32. Gemma 2 and 3 overflow float16, and are refused in
    # it
    dtype: str = "auto"
    # how an unquantised checkpoint is quantised while it is loaded. A quantised one is recognised by itself
    quantization: str | None = None
    # how an unquantised `lm_head` is quantised while it is loaded, whatever the other linears are. See
    # docs/quantization.md#the-head
    head_quantization: str | None = None
    # `cpu`, `cuda` (any GPU) or `cuda:N`; auto: `cuda` where there is one, else `cpu`. Which of several GPUs it is goes
    # by the sizes of all models (docs/sizing.md#several-models-on-one-machine)
    device: str = "auto"
    # the processes that compute a layer together, each with a part of every matrix. See docs/scale.md
    tensor_parallel: int = 1
    # the stages that the layers are divided into, each computed by `tensor_parallel` processes. See docs/scale.md
    pipeline_parallel: int = 1
    # the machines that these processes are shared out to, equally and in their order. See
    # docs/scale.md#one-model-over-several-machines
    machines: int = 1
    # the device of each of these processes on a machine, in order: `[cuda:0, cuda:1]`, in place of `device`. Left out:
    # `device` and those that follow it
    devices: tuple[str, ...] = ()
    kernels: str = "auto"  # who computes the operations: auto: `triton` on a GPU, else `cpu` if it was compiled
    # compute threads on the CPU. Share them out when several models run on one machine. Left out: all cores
    threads: int | None = None
    # tokens of prompt and output together. The model's are its `max_position_embeddings`, times the factor of a linear
    # or dynamic `rope_scaling`, as vLLM counts; of YaRN the factor times what it stretches. Left out: the model's
    max_model_len: int | None = None
    # replaces that of config.json, and is spelt as there: `{rope_type: yarn, factor: 4.0}`. The base and the part of
    # each head that turns stay, unless it states others. A class of transformers that turns nothing by it (learned
    # positions, ALiBi, GPT-J, CodeGen) refuses it. `dynamic` turns all positions as transformers turns those of a
    # sequence of `max_model_len` tokens: with `max_model_len` at most `max_position_embeddings` it changes nothing.
    # Left out: the model's
    rope_scaling: dict[str, Any] | None = None
    block_size: int = 16  # tokens per block of the key-value cache, a power of two
    # the share of a GPU's memory for this model. Models on one GPU without a fraction share what the others leave of
    # 0.9: equally, but none gets less than it needs
    device_memory_fraction: float | None = None
    # memory of the key-value cache. Left out: on a GPU the rest of the model's fraction, and on the CPU
    # `kv_cache_fraction`. Given in bytes, the host's memory is taken at the start, beside the first requests; by
    # fraction, as it is written to
    kv_cache_bytes: int | None = None
    # how keys and values are kept: as the model computes, or rounded to `int8` or `fp8` with a scale for each head and
    # token. See docs/configuration.md#rounded-cache
    kv_cache_dtype: str = "auto"
    # on the CPU: the share of the memory that is free after loading, within the limits of the control groups. Models on
    # the CPU without `kv_cache_bytes` and a fraction have equal parts of 0.5
    kv_cache_fraction: float | None = None
    # host memory for blocks that the prefix cache has no room for: they come back instead of being computed again. See
    # docs/cache.md
    host_cache_bytes: int = 0
    # files for the same, which outlive the engine. Needs `host_cache_bytes` and `disk_cache_directory`. See
    # docs/cache.md#blocks-on-disk
    disk_cache_bytes: int = 0
    # for these files: a directory of the server's user alone, of this model alone; made if it is not there
    disk_cache_directory: str | None = None
    max_num_seqs: int = 256  # sequences that run at once
    max_num_batched_tokens: int = 2048  # tokens computed in one step
    enable_prefix_caching: bool = True  # reuse the cache of equal beginnings of prompts
    # on CUDA: capture decoding steps at the start and replay them. `false` starts sooner and decodes slower
    cuda_graphs: bool = True
    # start each step before the tokens of the one before are read. Left out: on CUDA alone. See
    # docs/configuration.md#on-a-gpu
    run_ahead: bool | None = None
    # guesses at the next tokens, checked together in one step. Left out: no request may have any. See docs/drafts.md
    drafts: DraftConfig | None = None
    # a request's bits never depend on its neighbours; may cost speed in prefill. For models that transformers' classes
    # compute, see docs/models.md#everything-else-transformers-own-modelling
    batch_invariant: bool = False
    max_adapter_rank: int = 256  # adapters above it are refused
    max_resident_adapters: int = 256  # adapters on the device at once
    adapter_device_bytes: int = 1 << 30  # device memory for adapters
    adapter_host_bytes: int = 4 << 30  # host memory for adapters that were read
    adapter_loader_threads: int = 2  # adapters read at once; and as many more while they are uploaded
    # the share of one core that all loads together take while requests run: a smaller one delays other requests less,
    # and a cold adapter more. While nobody waits for any of them, as after a restart, they take a quarter of it. 1: no
    # limit; without running requests there is none. Left out: 0.25 on the CPU, else 1
    adapter_load_share: float | None = None

    def drafting(self) -> EngineConfig | None:
        """The configuration of the small model that drafts; None: there is none. Its steps are not captured."""
        if self.drafts is None or self.drafts.model is None:
            return None
        of_large: dict[str, Any] = dict.fromkeys(("quantization", "head_quantization", "rope_scaling", "drafts"))
        small: dict[str, Any] = {
            "model": self.drafts.model,
            "revision": self.drafts.revision,
            "cuda_graphs": False,
            "implementation": "auto",
            "host_cache_bytes": 0,
            "disk_cache_bytes": 0,
            "disk_cache_directory": None,
            "tensor_parallel": 1,
            "pipeline_parallel": 1,
            "machines": 1,
            "devices": (),
        }
        return msgspec.structs.replace(self, **of_large, **small)

    def check(self) -> None:
        """Raise ValueError naming each field that is out of range."""
        problems: list[str] = []
        if not self.model:
            problems.append("model must name a directory or a hub id")
        problems += [*choice_problems(self), *bound_problems(self)]
        if not DEVICE.fullmatch(self.device):
            problems.append(f"device {self.device!r} is not auto, cpu, cuda or cuda:N")
        problems += rank_problems(
            self.device, self.devices, self.tensor_parallel, self.pipeline_parallel, self.machines
        )
        if self.world > 1 and self.host_cache_bytes:
            problems.append(f"host_cache_bytes has the blocks of one rank, and there are {self.world}: leave it out")
        if self.block_size & (self.block_size - 1):
            problems.append(f"block_size {self.block_size} must be a power of two")
        problems += self._cache_problems()
        problems += [] if self.drafts is None else self.drafts.problems()
        if problems:
            raise ValueError("engine config: " + "; ".join(problems))

    def _cache_problems(self) -> list[str]:
        problems = []
        if self.host_cache_bytes and not self.enable_prefix_caching:
            problems.append("host_cache_bytes needs enable_prefix_caching: it keeps what that finds")
        if self.disk_cache_bytes and not self.host_cache_bytes:
            problems.append("disk_cache_bytes needs host_cache_bytes: blocks go to the disk and come back through it")
        if bool(self.disk_cache_bytes) != (self.disk_cache_directory is not None):
            problems.append("disk_cache_bytes and disk_cache_directory go together: set both, or neither")
        return problems

    @property
    def world(self) -> int:
        """The processes that compute the model together."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def machine_ranks(self) -> int:
        """Those of them that are on one machine."""
        return self.world // self.machines

    @property
    def rank_threads(self) -> int | None:
        """The compute threads of each of them on the CPU. Stages take turns; the ranks of one compute at once, and
        waiting for each other, they would spin on one core."""
        at_once = min(self.tensor_parallel, self.machine_ranks)
        return self.threads if at_once == 1 else max(1, (self.threads or len(os.sched_getaffinity(0))) // at_once)

    @property
    def rank_devices(self) -> tuple[str, ...]:
        """The device of each of the processes of a machine."""
        return rank_devices(self.device, self.devices, self.machine_ranks)

    @property
    def most_drawn(self) -> int:
        """The tokens that a step draws at most, those after drafts among them."""
        return max(self.max_num_seqs, 0 if self.drafts is None else 1 + self.drafts.tokens)
