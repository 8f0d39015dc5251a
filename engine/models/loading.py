"""From a model directory to a model that runs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from adapters.layer import LoRALinear
from engine.config import EngineConfig
from engine.layers.linear import Linear
from engine.layers.rotary import cos_sin_table
from engine.model_config import ModelConfig, ModelError
from engine.models.decoder import DecoderLayer, LanguageModel
from engine.models.layout import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    FusedLinear,
    layer_linears,
    layer_norms,
    tensor_shapes,
)
from engine.models.registry import read_model_config
from engine.weights import Checkpoint, Progress
from kernels.ops import Ops, QKNorm

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(config: EngineConfig, path: Path, ops: Ops, progress: Progress | None = None) -> LanguageModel:
    """Load the model in directory `path` for inference on the device of `ops`.

    Raises ModelError if it is of no known family, or its weights are not all that its config.json asks for.
    """
    model_config = read_model_config(path)
    with Checkpoint(path, model_config.unused_tensors, progress) as checkpoint:
        expected = tensor_shapes(model_config)
        if HEAD in checkpoint:  # some files hold a tied head a second time
            expected[HEAD] = expected[EMBEDDING]
        checkpoint.check(expected)
        longest = model_config.max_position_embeddings
        num_positions = min(config.max_model_len or longest, longest)
        dtype = compute_dtype(config.dtype, model_config.dtype, checkpoint.dtype(EMBEDDING))
        return _Loader(model_config, checkpoint, ops, dtype, num_positions, config.max_resident_adapters).load()


def compute_dtype(requested: str, stated: str | None, stored: torch.dtype) -> torch.dtype:
    """What EngineConfig asks for; if that is auto, bfloat16 where the checkpoint is 16-bit, else float32.

    stated: by config.json, which may differ from how the tensors are stored.
    """
    if requested != "auto":
        return DTYPES[requested]
    checkpoint_dtype = DTYPES[stated] if stated is not None else stored
    return torch.bfloat16 if checkpoint_dtype.itemsize == 2 else torch.float32


class _Loader:
    """What the steps of loading one model share. Each tensor is read once, straight to its place."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        ops: Ops,
        dtype: torch.dtype,
        num_positions: int,
        num_slots: int,
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.ops = ops
        self.dtype = dtype
        self.num_slots = num_slots
        self.cos_sin = {
            rope: cos_sin_table(rope, config.head_dim, num_positions, ops.device)
            for rope in {layer.rope for layer in config.layers}
        }
        self.nbytes = sum(table.nbytes for table in self.cos_sin.values())

    def load(self) -> LanguageModel:
        embedding = self._rows(EMBEDDING)
        layers = [self._layer(index) for index in range(self.config.num_layers)]
        final_norm = self._norm(FINAL_NORM)
        head = self._pack(self._head_weight(embedding), None)
        self.nbytes += embedding.nbytes
        return LanguageModel(self.config, self.ops, embedding, layers, final_norm, head, self.nbytes)

    def _layer(self, index: int) -> DecoderLayer:
        prefix, attention, norms = f"model.layers.{index}.", self.config.layers[index], layer_norms(self.config)
        qkv, o, gate_up, down = (self._fused(prefix, linear) for linear in layer_linears(self.config))
        qk_norm = None
        if norms.query is not None and norms.key is not None:
            qk_norm = QKNorm(
                self._norm(f"{prefix}{norms.query}.weight"),
                self._norm(f"{prefix}{norms.key}.weight"),
                self.config.rms_norm_eps,
            )
        return DecoderLayer(
            qkv=qkv,
            o=o,
            gate_up=gate_up,
            down=down,
            norm_before_attention=self._norm(f"{prefix}{norms.before_attention}.weight"),
            norm_before_mlp=self._norm(f"{prefix}{norms.before_mlp}.weight"),
            norm_after_attention=self._norm_if(norms.after_attention, prefix),
            norm_after_mlp=self._norm_if(norms.after_mlp, prefix),
            qk_norm=qk_norm,
            cos_sin=self.cos_sin[attention.rope],
            window=attention.window,
        )

    def _fused(self, prefix: str, linear: FusedLinear) -> LoRALinear:
        weight = self._rows(*(f"{prefix}{part}.weight" for part, _ in linear.parts))
        bias = self._rows(*(f"{prefix}{part}.bias" for part, _ in linear.parts)) if linear.bias else None
        return LoRALinear(self.ops, self._pack(weight, bias), self.num_slots)

    def _head_weight(self, embedding: Tensor) -> Tensor:
        if HEAD not in self.checkpoint:
            return embedding
        weight = self._rows(HEAD)
        if not self.config.tie_word_embeddings:
            return weight
        if torch.equal(weight, embedding):
            return embedding
        raise ModelError(
            f"{self.checkpoint.directory}: config.json ties {HEAD} to {EMBEDDING}, but the weights hold another one: "
            "set tie_word_embeddings to false to use it, or remove it"
        )

    def _pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        linear = Linear(self.ops, self.ops.pack_linear(weight, bias))
        self.nbytes += linear.nbytes
        return linear

    def _norm(self, name: str) -> Tensor:
        weight = self.checkpoint.stacked([name], torch.float32, self.ops.device)
        self.nbytes += weight.nbytes
        return weight.add_(self.config.norm_offset)

    def _norm_if(self, module: str | None, prefix: str) -> Tensor | None:
        return None if module is None else self._norm(f"{prefix}{module}.weight")

    def _rows(self, *names: str) -> Tensor:
        return self.checkpoint.stacked(names, self.dtype, self.ops.device)
