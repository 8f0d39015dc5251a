"""Mixtures of experts: feed-forwards of which every token goes through a few."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_engine.checkpoint.model_config import FeedForward, FusedLinear, Stack
from loraplex_engine.layers.feed_forward import GatedLayout
from loraplex_engine.layers.linear import Linear, SideBySide
from loraplex_kernels.ops import LoraSegments, Ops, PackedLinear, Routes, Routing


class ExpertLinears:
    """The same linear of every expert, with the adapters beside each: rows go to their own expert's."""

    def __init__(self, ops: Ops, experts: Sequence[LoRALinear]) -> None:
        packed = [_packed(expert) for expert in experts]
        self._ops = ops
        # Experts that are quantised in different ways, of unlike numbers of parts, are multiplied one after another.
        self._alike = len({len(parts) for parts in packed}) == 1
        self._linears = [expert.linear for expert in experts]
        self._groups = [ops.group_linears(parts) for parts in zip(*packed, strict=True)] if self._alike else []
        self._table = ops.group_lora_tables([expert.table for expert in experts])

    def __call__(self, x: Tensor, routes: Routes) -> Tensor:
        """x: [R, C], sorted by expert → [R, N]"""
        y = self._together(x, routes.starts) if self._alike else self._one_by_one(x, routes.starts)
        if routes.lora is not None:
            self._ops.segmented_lora(y, x, routes.lora, self._table)
        return y

    def _together(self, x: Tensor, starts: Tensor) -> Tensor:
        parts = [self._ops.grouped_linear(x, starts, group) for group in self._groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _one_by_one(self, x: Tensor, starts: Tensor) -> Tensor:
        bounds = zip(self._linears, pairwise(starts.tolist()), strict=True)
        return torch.cat([linear(x[start:end]) for linear, (start, end) in bounds])


def _packed(expert: LoRALinear) -> tuple[PackedLinear, ...]:
    assert isinstance(expert.linear, Linear | SideBySide)
    return expert.linear.packed


@dataclass(frozen=True, slots=True)
class Mixture:
    """y = Σ weight[e] · expert[e](x) over a token's experts e, and the output of the shared one if there is one."""

    ops: Ops
    routing: Routing
    correction: Tensor | None  # [E]
    router: LoRALinear
    float32_router: bool
    scales_inputs: bool
    gate_up: ExpertLinears
    down: ExpertLinears
    activate_and_mul: Callable[[Tensor], Tensor]  # [R, 2F] → [R, F]
    shared: FeedForward | None  # of every token
    shared_gate: LoRALinear | None  # how much the shared one counts: [T, C] → [T, 1]
    linears: Sequence[LoRALinear]

    def __call__(self, x: Tensor, lora: LoraSegments | None) -> Tensor:
        scores = self.router(x.float() if self.float32_router else x, lora)
        routes = self.ops.route(scores, self.routing, self.correction, lora)
        rows, weights = x.index_select(0, routes.tokens), routes.weights
        if self.scales_inputs:
            rows *= _by_row(routes).to(x.dtype)
            weights = torch.ones_like(weights)
        outputs = self.down(self.activate_and_mul(self.gate_up(rows, routes)), routes)
        y = self.ops.weighted_sums(outputs, routes.rows, weights)
        if self.shared is not None:
            others = self.shared(x, lora)
            if self.shared_gate is not None:
                others *= torch.sigmoid(self.shared_gate(x, lora))
            y += others
        return y


def _by_row(routes: Routes) -> Tensor:
    """How much the expert of each row counts for its token: float32 [R, 1]"""
    weights = torch.empty_like(routes.weights).flatten()
    weights[routes.rows.flatten()] = routes.weights.flatten()
    return weights[:, None]


@dataclass(frozen=True, slots=True)
class MixtureLayout:
    """A router, experts of one shape and perhaps a feed-forward beside them."""

    num_experts: int  # E
    expert: GatedLayout  # its module is that of all experts
    routing: Routing
    router: str = "mlp.gate"  # its path inside a layer
    router_bias: bool = False
    float32_router: bool = False  # it reads and computes in float32, whatever the model does
    scales_inputs: bool = False  # what an expert reads is multiplied by its weight, not what it returns
    correction: str | None = None  # the path of what is added to the scores to choose by
    correction_shape: tuple[int, ...] | None = None  # None: [E]
    shared: GatedLayout | None = None
    shared_gate: str | None = None
    stacked: bool = False  # the checkpoint has the experts' matrices as one tensor
    transposed: bool = False  # which is [E, C, N]
    unknown: bool = False  # of which PEFT does not know

    def as_stored(self, holds: Callable[[str], bool]) -> MixtureLayout:
        module, names = self.expert.module, self.expert.names
        apart = holds(f"{module}.0.{names.down}.weight")  # in GGUF files, whatever others have
        return replace(self, stacked=not apart and (self.stacked or holds(f"{module}.gate_up_proj")))

    def linears(self, hidden_size: int) -> tuple[FusedLinear, ...]:
        router = _dense("router", self.router, hidden_size, self.num_experts, self.router_bias)
        found = [replace(router, in_float32=self.float32_router)]
        for index in range(self.num_experts):
            found.extend(self._expert(index, hidden_size))
        if self.shared is not None:
            found.extend(self.shared.linears(hidden_size))
        if self.shared_gate is not None:
            found.append(_dense("shared_gate", self.shared_gate, hidden_size, 1))
        return tuple(found)

    def vectors(self) -> Mapping[str, tuple[int, ...]]:
        return {} if self.correction is None else {self.correction: self.correction_shape or (self.num_experts,)}

    def build(self, ops: Ops, linears: Sequence[LoRALinear], vectors: Sequence[Tensor] = ()) -> Mixture:
        router, experts, others = linears[0], linears[1 : 1 + 2 * self.num_experts], linears[1 + 2 * self.num_experts :]
        return Mixture(
            ops,
            self.routing,
            vectors[0].flatten() if vectors else None,
            router,
            self.float32_router,
            self.scales_inputs,
            ExpertLinears(ops, experts[::2]),
            ExpertLinears(ops, experts[1::2]),
            self.expert.activate_and_mul(ops),
            None if self.shared is None else self.shared.build(ops, others[:2]),
            None if self.shared_gate is None else others[-1],
            tuple(linears),
        )

    def _expert(self, index: int, hidden_size: int) -> Iterator[FusedLinear]:
        module = self.expert.module
        expert = replace(self.expert, module=f"{module}.{index}", site=f"experts.{index}.")
        for linear, parameter in zip(expert.linears(hidden_size), ("gate_up_proj", "down_proj"), strict=True):
            stack = Stack(f"{module}.{parameter}", index, self.num_experts, self.stacked, self.transposed, self.unknown)
            yield replace(linear, stack=stack)


def _dense(site: str, path: str, in_features: int, out_features: int, bias: bool = False) -> FusedLinear:
    """A linear that decides on others: it is small, and were it rounded, tokens would go to other experts."""
    return FusedLinear(site, path, in_features, ((path, out_features),), bias, "nothing", kept_dense=True)
