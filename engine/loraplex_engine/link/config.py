"""The configuration of one engine. Torch-free: the service builds it, the engine process reads it."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from loraplex_engine.link.drafts import DraftConfig
from loraplex_engine.link.ranks import DEVICE, rank_devices, rank_problems

DTYPES = ("auto", "float32", "bfloat16", "float16")
IMPLEMENTATIONS = ("auto", "native", "transformers")
QUANTIZATIONS = ("nf4", "int8", "int4")
HEAD_QUANTIZATIONS = ("int8",)
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
LEAST_FRACTION = 0.0001  # the least fraction of a core or of memory that makes sense
BACKENDS = ("auto", "reference", "cpu", "triton")
USUAL_CACHE_FRACTION = 0.5  # of the host's memory that is free once a model is loaded, for all caches together
USUAL_MEMORY_FRACTION = 0.9  # of a GPU; the rest is for CUDA contexts, about half a GiB an engine


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One base model and the resources it may use. `check` names every field that makes no sense."""

    model: str  # a local directory, or a hub id
    revision: str | None = None  # the revision of a hub id: pin it
    implementation: str = "auto"  # who computes the layers; auto: transformers' class where no native family does
    dtype: str = "auto"  # auto: bfloat16 where the checkpoint is 16-bit, else float32
    quantization: str | None = None  # applied to an unquantised checkpoint at load; None: leave it as it is
    head_quantization: str | None = None  # applied to a dense lm_head at load, whatever the other linears are
    device: str = "auto"  # auto: cuda where there is one, else cpu
    tensor_parallel: int = 1  # ranks, each a process with a part of every matrix
    pipeline_parallel: int = 1  # stages, each with a part of the layers
    machines: int = 1  # that compute the model together, each with as many of its ranks
    devices: tuple[str, ...] = ()  # of a machine's ranks, in order; none: `device` and those that follow it
    kernels: str = "auto"
    threads: int | None = None  # compute threads on the CPU; None: all cores the process may use
    max_model_len: int | None = None  # tokens; None: what the model was made for
    rope_scaling: dict[str, Any] | None = None  # replaces config.json's, and is spelt as there
    block_size: int = 16  # tokens
    device_memory_fraction: float | None = None  # share of a GPU's memory for this model; None: 0.9
    kv_cache_bytes: int | None = None  # None: on CUDA the rest of that share, on the CPU kv_cache_fraction
    kv_cache_dtype: str = "auto"  # auto: the model's. int8, fp8: rounded, with a scale for each head and token
    kv_cache_fraction: float | None = None  # on the CPU: share of the memory that is free after loading; None: 0.5
    host_cache_bytes: int = 0  # host memory for blocks that the prefix cache has no room for; 0: they are forgotten
    disk_cache_bytes: int = 0  # files for blocks that came to host memory: they outlive the process; 0: none
    disk_cache_directory: str | None = None  # for these files, of this model alone
    max_num_seqs: int = 256  # sequences that run at once
    max_num_batched_tokens: int = 2048  # tokens computed in one step
    enable_prefix_caching: bool = True
    cuda_graphs: bool = True  # on CUDA: capture decoding steps at the start, with and without adapters, and replay them
    run_ahead: bool | None = None  # start a step before the tokens of the one before are read; None: on CUDA
    drafts: DraftConfig | None = None  # guesses at the next tokens, checked in one step; None: no request may have any
    batch_invariant: bool = False  # a request's bits never depend on its neighbours; may cost speed in prefill
    max_adapter_rank: int = 256
    max_resident_adapters: int = 256  # slots on the device
    adapter_device_bytes: int = 1 << 30
    adapter_host_bytes: int = 4 << 30
    adapter_loader_threads: int = 2
    adapter_load_share: float | None = None  # share of one core while requests run; None: 0.25 on the CPU, else 1

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
        problems = []
        if not self.model:
            problems.append("model must name a directory or a hub id")
        if self.implementation not in IMPLEMENTATIONS:
            problems.append(f"implementation {self.implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
        if self.dtype not in DTYPES:
            problems.append(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            problems.append(f"quantization {self.quantization!r} is not one of {', '.join(QUANTIZATIONS)}")
        if self.head_quantization is not None and self.head_quantization not in HEAD_QUANTIZATIONS:
            problems.append(f"head_quantization {self.head_quantization!r} is not {' or '.join(HEAD_QUANTIZATIONS)}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            problems.append(f"kv_cache_dtype {self.kv_cache_dtype!r} is not one of {', '.join(KV_CACHE_DTYPES)}")
        if not DEVICE.fullmatch(self.device):
            problems.append(f"device {self.device!r} is not auto, cpu, cuda or cuda:N")
        problems += rank_problems(
            self.device, self.devices, self.tensor_parallel, self.pipeline_parallel, self.machines
        )
        if self.world > 1 and self.host_cache_bytes:
            problems.append(f"host_cache_bytes has the blocks of one rank, and there are {self.world}: leave it out")
        if self.kernels not in BACKENDS:
            problems.append(f"kernels {self.kernels!r} is not one of {', '.join(BACKENDS)}")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            problems.append(f"block_size {self.block_size} must be a power of two")
        for name in ("device_memory_fraction", "kv_cache_fraction", "adapter_load_share"):
            fraction = getattr(self, name)
            if fraction is not None and not LEAST_FRACTION <= fraction <= 1.0:
                problems.append(f"{name} {fraction} must be in (0, 1], at least {LEAST_FRACTION}")
        counts = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_adapter_rank": self.max_adapter_rank,
            "max_resident_adapters": self.max_resident_adapters,
            "adapter_device_bytes": self.adapter_device_bytes,
            "adapter_host_bytes": self.adapter_host_bytes,
            "adapter_loader_threads": self.adapter_loader_threads,
        }
        optional = {"threads": self.threads, "max_model_len": self.max_model_len, "kv_cache_bytes": self.kv_cache_bytes}
        for name, value in (counts | {k: v for k, v in optional.items() if v is not None}).items():
            if value < 1:
                problems.append(f"{name} {value} must be at least 1")
        problems += self._cache_problems()
        problems += [] if self.drafts is None else self.drafts.problems()
        if problems:
            raise ValueError("engine config: " + "; ".join(problems))

    def _cache_problems(self) -> list[str]:
        tiers = {"host_cache_bytes": self.host_cache_bytes, "disk_cache_bytes": self.disk_cache_bytes}
        problems = [f"{name} {value} must be at least 0" for name, value in tiers.items() if value < 0]
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
