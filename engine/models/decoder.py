"""The one decoder that all families share: what differs between them is in its ModelConfig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.binding import LoraTarget
from adapters.layer import LoRALinear
from engine.batch import StepBatch
from engine.layers.linear import AnyLinear
from engine.model_config import ModelConfig
from engine.models.layout import layer_linears, lora_targets, site_name
from kernels.ops import LayerKV, Ops, QKNorm


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The parameters of one layer. Norm weights are float32 [C], the checkpoint's offset already added."""

    qkv: LoRALinear
    o: LoRALinear
    gate_up: LoRALinear
    down: LoRALinear
    norm_before_attention: Tensor
    norm_before_mlp: Tensor
    norm_after_attention: Tensor | None
    norm_after_mlp: Tensor | None
    qk_norm: QKNorm | None
    cos_sin: Tensor  # float32 [max positions, 2, D/2], shared between layers of one kind
    window: int | None  # tokens

    @property
    def linears(self) -> tuple[LoRALinear, LoRALinear, LoRALinear, LoRALinear]:
        """In the order of `layout.layer_linears`."""
        return self.qkv, self.o, self.gate_up, self.down


class LanguageModel:
    """Token ids and a paged cache in, logits out. Holds parameters only: a step is all in its arguments."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        embedding: Tensor,  # [V, C]
        layers: Sequence[DecoderLayer],
        final_norm: Tensor,  # float32 [C]
        head: AnyLinear,
        nbytes: int,
    ) -> None:
        self.config = config
        self.dtype = embedding.dtype
        self.nbytes = nbytes  # of all parameters
        self._ops = ops
        self._embedding = embedding
        self._layers = tuple(layers)
        self._final_norm = final_norm
        self._head = head
        self._shape = config.head_shape
        self._activate = ops.silu_and_mul if config.activation == "silu" else ops.gelu_tanh_and_mul
        # Rounded as the weights are: 50.6 is 50.5 in bfloat16, and so the models were trained.
        scale = config.embedding_scale
        self._embedding_scale = None if scale is None else torch.tensor(scale, dtype=self.dtype).item()

    def forward(self, batch: StepBatch, kv: Sequence[LayerKV]) -> Tensor:
        """The last hidden states, normed, of the rows in `batch.logits_rows` → [L, C].

        Stores the keys and values of all rows in `kv`, one for each layer.
        """
        ops, eps, lora = self._ops, self.config.rms_norm_eps, batch.lora
        residual = F.embedding(batch.token_ids, self._embedding)
        if self._embedding_scale is not None:
            residual *= self._embedding_scale
        x = ops.rms_norm(residual, self._layers[0].norm_before_attention, eps)
        for index, layer in enumerate(self._layers):
            x = self._attention(layer, x, batch, kv[index])
            x = ops.add_rms_norm(x, residual, layer.norm_before_mlp, eps)
            x = layer.down(self._activate(layer.gate_up(x, lora)), lora)
            if layer.norm_after_mlp is not None:
                x = ops.rms_norm(x, layer.norm_after_mlp, eps)
            if index + 1 < len(self._layers):
                x = ops.add_rms_norm(x, residual, self._layers[index + 1].norm_before_attention, eps)
        rows = batch.logits_rows
        if not len(rows):  # every sequence is in the middle of its prompt
            return x[:0]
        return ops.add_rms_norm(x.index_select(0, rows), residual.index_select(0, rows), self._final_norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the next token, for hidden states as `forward` returns them: [L, C] → float32 [L, V]"""
        logits = self._head(hidden).float()
        cap = self.config.logits_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def lora_targets(self) -> dict[str, LoraTarget]:
        """The projections that an adapter may change, by their module path in the Hugging Face model."""
        return lora_targets(self.config)

    def lora_sites(self) -> dict[str, LoRALinear]:
        """The linears that adapters are placed beside, by the names that the targets refer to."""
        return {
            site_name(index, spec): linear
            for index, layer in enumerate(self._layers)
            for spec, linear in zip(layer_linears(self.config), layer.linears, strict=True)
        }

    def _attention(self, layer: DecoderLayer, x: Tensor, batch: StepBatch, kv: LayerKV) -> Tensor:
        """x: [T, C], normed → [T, C], to be added to the residual."""
        ops, config = self._ops, self.config
        q = ops.rotary_store_kv(
            layer.qkv(x, batch.lora),
            self._shape,
            layer.qk_norm,
            batch.positions,
            layer.cos_sin,
            kv,
            batch.attention.slot_mapping,
        )
        x = ops.paged_attention(q, kv, batch.attention, config.attention_scale, layer.window, config.attention_soft_cap)
        x = layer.o(x, batch.lora)
        if layer.norm_after_attention is not None:
            x = ops.rms_norm(x, layer.norm_after_attention, config.rms_norm_eps)
        return x
