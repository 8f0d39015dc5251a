"""The operations that a model step is made of: what each computes, and with which shapes.

A backend is one object with the methods of `Ops`. It is chosen once, in `selection`, and passed to the code that needs
it: no module asks again which device it is on.

Letters: T tokens in the step, S sequences, H query heads, K kv heads, D head dim, R rank, B blocks, P block size,
N output features, C input features, G segments, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from loraplex_kernels.draws import Draws, Likelihoods, LogitChanges
from loraplex_kernels.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The heads of a fused query/key/value projection: its columns are H·D query, K·D key, K·D value."""

    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D


@dataclass(frozen=True, slots=True)
class QKNorm:
    """RMS norm over each query and key head before rotation (Qwen3, Gemma 3)."""

    q_weight: Tensor  # [D] float32
    k_weight: Tensor  # [D] float32
    eps: float


@dataclass(frozen=True, slots=True)
class Xielu:
    """The trained shape of a layer's activation (Apertus)."""

    positive: float
    negative: float
    beta: float
    eps: float


# Types that keys and values are rounded to, and the largest number of each.
QUANTIZED_KV = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True, slots=True)
class LayerKV:
    """The cached keys and values of one layer.

    `k` and `v` hold B·K·P·D elements each. How a block is laid out inside belongs to the backend that allocated it:
    only its `rotary_store_kv` and `paged_attention` look inside. In a type of QUANTIZED_KV each head of each token has
    a scale of its own: with s = max|x| / largest, what is stored is round(x / s), and what is read is that times s.
    """

    k: Tensor
    v: Tensor
    num_blocks: int  # B
    block_size: int  # P
    k_scale: Tensor | None = None  # float32, B·K·P elements; None: k is what it says
    v_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.tensors())

    def copy_block(self, source: int, copy: int) -> None:
        """Give one block the content of another."""
        for each in self.tensors():
            each[copy] = each[source]

    def tensors(self) -> list[Tensor]:
        """Whatever the layout, a tensor's first dimension counts blocks."""
        return [each for each in (self.k, self.v, self.k_scale, self.v_scale) if each is not None]


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """The keys that each query of a step attends to. Built once for all layers; tensors contiguous on the device."""

    query_starts: Tensor  # int32 [S+1]: tokens [query_starts[s], query_starts[s+1]) belong to sequence s
    seq_lens: Tensor  # int32 [S]: keys in the cache once this step's are stored; the last query sees them all
    block_tables: Tensor  # int32 [S, max blocks]: physical blocks in order; entries past the sequence's end are 0
    slot_mapping: Tensor  # int64 [T]: where each token's key and value go, block·P + offset
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class LoraSegments:
    """Which rows of the step belong to which adapter. Built once, shared by all layers.

    A row of the base model is in no segment. Segments are in ascending row order, do not overlap, and two segments may
    name the same slot.
    """

    ranges: tuple[tuple[int, int, int], ...]  # (slot, first row, end row) on the host
    slots: Tensor  # int32 [G] on the device
    starts: Tensor  # int32 [G] on the device
    ends: Tensor  # int32 [G] on the device


@dataclass(frozen=True, slots=True)
class LoraSlice:
    """One projection's part of an adapter at a (possibly fused) linear.

    y[:, out_start : out_start + N] += (x Aᵀ)[:, rank_start : rank_start + R] Bᵀ
    """

    rank_start: int
    out_start: int
    b: Tensor  # [N, R], the adapter's scale folded in


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter at one linear. The A matrices of projections that share the input are stacked: x is read once."""

    a: Tensor  # [sum of R, C]
    slices: tuple[LoraSlice, ...]
    affine: Tensor | None = None  # float32 [2, N], N of the whole linear: gain and offset; None: plain LoRA

    @property
    def nbytes(self) -> int:
        affine_bytes = 0 if self.affine is None else self.affine.nbytes
        return self.a.nbytes + sum(part.b.nbytes for part in self.slices) + affine_bytes


class PackedLora(Protocol):
    """One adapter at one linear as its backend's table takes it. Never changes; several slots may hold it."""

    @property
    def nbytes(self) -> int: ...


class SlotTable(Protocol):
    """The adapters resident at one place of the model, by slot. Changed between steps only."""

    def put(self, slot: int, packed: PackedLora) -> None:
        """Make `packed` the adapter in `slot`, in no more time than it takes to get it to the device.

        Raises ValueError if it does not fit the place, or has another dtype than the adapters beside it.
        """

    def remove(self, slot: int) -> None:
        """Forget what `slot` holds; an empty slot is not an error."""


class LoraTable(SlotTable, Protocol):
    """The adapters resident at one linear. Nothing is padded to a maximum rank."""

    def reserve(self, num_slices: int, rank: int) -> None:
        """Make room for any adapter of so many slices of up to that rank: `put` of such a one then widens nothing.

        A table that is as wide as each adapter by itself has nothing to do.
        """


class LoraTableGroup(Protocol):
    """The tables of E experts as one: what table e has in slot s, now or later, is in slot s·E + e.

    The tables are then no longer read by themselves.
    """

    num_experts: int  # E


class PackedLinear(Protocol):
    """A dense or quantised weight matrix in the layout that its backend multiplies fastest."""

    in_features: int  # C
    out_features: int  # N
    nbytes: int  # what it takes on the device: codes, scales and zeros, bias


@dataclass(frozen=True, slots=True)
class Routing:
    """From a router's logits to the experts of each token."""

    per_token: int  # k
    score: Literal["softmax", "sigmoid", "late_sigmoid", "softmax_of_near"] = "softmax"
    normalised: bool = True  # the weights of a token's experts are divided by their sum
    least_sum: float = 0.0  # which is then at least this
    scale: float = 1.0  # of the weights, at last
    groups: int = 1  # of neighbouring experts
    groups_kept: int = 1  # from which a token's experts are chosen: those whose best experts have the highest sum
    group_best: int = 2  # of each group, that are summed
    near: float = 0.0  # for softmax_of_near


@dataclass(frozen=True, slots=True)
class Routes:
    """A row for each expert of each token: R = T·k, those of one expert together, in the order of the tokens."""

    weights: Tensor  # float32 [T, k]: how much each of a token's experts counts
    rows: Tensor  # int64 [T, k]: the row of each
    tokens: Tensor  # int64 [R]: the token of each row
    starts: Tensor  # int64 [E + 1]: rows [starts[e], starts[e + 1]) are expert e's
    lora: LoraSegments | None  # which rows belong to which adapter: slot s at expert e is slot s·E + e


class LinearGroup(Protocol):
    """The packed linears of several experts, all of one shape, as `grouped_linear` takes them."""

    in_features: int  # C
    out_features: int  # N


class Ops(Protocol):
    """The operations of a backend. Each accumulates in float32; results have the dtype of their input.

    A row's result does not depend on the other rows, except where a backend says so (see `batch_invariant`).
    """

    name: str
    """ "reference", "cpu" or "triton": for people. What a backend can do is said below."""

    compiled_for: str
    """The instruction set, or the GPU's compute capability, that its kernels are compiled for; "": for none."""

    device: torch.device

    batch_invariant: bool
    """Every result bit is the same whatever else is in the batch."""

    packing_copies: bool
    """What `pack_linear` was given is not needed afterwards."""

    own_threads: bool
    """The operations compute on threads of their own: torch's would spin beside them and take their cores."""

    kv_layout: str
    """How blocks of the cache are laid out and computed: what one process stored, another with the same reads."""

    capturable: bool
    """A CUDA graph may capture the operations and replay them for other adapters: they never read back from the device,
    and their launches follow from shapes alone."""

    @property
    def lora_growth(self) -> int:
        """A count that grows when an adapter has widened a table: graphs captured with adapters are then stale."""

    def pack_linear(self, weights: Sequence[Tensor], bias: Tensor | None) -> PackedLinear:
        """Lay out weights [N₁, C], [N₂, C], …, one above the other, and bias [N₁ + N₂ + …] for `linear`.

        weights: all of one dtype. The result may share memory with them, except where `packing_copies`.
        """

    def pack_quantized(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        """Lay out a quantised weight [N, C] and bias [N] for `linear` of inputs of `dtype`.

        weight: a record with its tensors on this backend's device. The caller gives it up: the result may share memory
        with it. A backend takes every kind of record, or raises NotImplementedError naming what it lacks.
        """

    def dequantize(self, packed: PackedLinear, start: int, end: int) -> Tensor:
        """Rows start … end of the weight, without the bias: float32 [end − start, C], columns as x has them.

        Works for both kinds of packed linear. For uses that need the base's weights once (a norm, a test), not for
        steps. Any thread may call it.
        """

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """y[t, n] = Σ_c x[t, c] · weight[n, c] + bias[n].  x: [T, C] → [T, N]

        A quantised weight stands for what `quantized.dequantize` returns, exact in float32; kernels may round it to the
        dtype of x before they multiply. An IntegerWeight rounds x as well, exactly as `integers.round_inputs` does.
        """

    def route(self, logits: Tensor, routing: Routing, correction: Tensor | None, lora: LoraSegments | None) -> Routes:
        """Choose the experts of each token: those with the k highest scores, or scores plus `correction`.

        A score is softmax(logits)[e] or sigmoid(logits[e]), in float32. late_sigmoid: that, of experts chosen by
        their logits, which differ where sigmoids are all 1. softmax_of_near: each of a token's experts is the best of
        those that are left, with the softmax over those l among them with (best − l) / max(|l|, best) ≤ near.
        logits: [T, E]; correction: float32 [E], which no weight has; lora: which tokens belong to which adapter.
        Source: SparseMixer (arXiv 2409.12136) for softmax_of_near.
        """

    def group_linears(self, experts: Sequence[PackedLinear]) -> LinearGroup:
        """What `grouped_linear` multiplies by: the packed linears of E experts, which it shares memory with."""

    def grouped_linear(self, x: Tensor, group_starts: Tensor, group: LinearGroup) -> Tensor:
        """y[r] = `linear` of x[r] and expert e, for every row group_starts[e] ≤ r < group_starts[e + 1].

        x: [R, C], sorted by expert; group_starts: int64 [E + 1], from 0 to R → [R, N]
        """

    def group_lora_tables(self, tables: Sequence[LoraTable]) -> LoraTableGroup:
        """The tables of several experts as one for `segmented_lora`."""

    def weighted_sums(self, x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """y[t] = Σ_j weights[t, j] · x[rows[t, j]], in the order of j.

        x: [R, C], rows: int64 [T, k], weights: float32 [T, k] → [T, C]
        """

    def pack_lora(self, weights: LoraWeights) -> PackedLora:
        """Lay out one adapter for `LoraTable.put`, in host memory: loader threads call this beside the step.

        Raises ValueError if a slice reads ranks that A does not have, or two slices write the same column.
        """

    def lora_table(self, in_features: int, out_features: int, num_slots: int) -> LoraTable:
        """An empty table for adapters in slots 0 … num_slots-1 at a linear of that shape."""

    def segmented_lora(self, y: Tensor, x: Tensor, segments: LoraSegments, table: LoraTable | LoraTableGroup) -> None:
        """y[t] += (x[t] Aᵀ) Bᵀ for every row t of every segment, A and B those of the segment's slot; y in place.

        An adapter with an affine part then has y[t] = gain ⊙ y[t] + offset, in float32, for all N columns: the
        magnitudes of DoRA and trained biases.

        y: [T, N], x: [T, C]. Ranks may differ between segments and between the projections of a fused linear; a slot
        that the table does not hold adds nothing. Rows outside every segment are not touched.
        Source: Punica (arXiv 2310.18547), S-LoRA (arXiv 2311.03285).
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """y[t, c] = x[t, c] / sqrt(mean_c(x[t]²) + eps) · weight[c].  x: [T, C], weight: [C] float32 → [T, C]"""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place, then rms_norm(residual).  x, residual: [T, C] → [T, C]"""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """y[t] = (x[t] − m) / sqrt(mean_c((x[t] − m)²) + eps) · weight + bias, with m = mean_c(x[t]).

        x: [T, C], weight and bias: [C] float32 → [T, C]
        """

    def add_layer_norm(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """residual += x in place, then layer_norm(residual).  x, residual: [T, C] → [T, C]"""

    def rotary_store_kv(
        self,
        qkv: Tensor,  # [T, (H + 2K)·D]
        shape: HeadShape,
        qk_norm: QKNorm | None,
        positions: Tensor,  # int64 [T]
        cos_sin: Tensor,  # float32 [max positions, 2, R/2]: cosines, then sines
        cache: LayerKV,
        slot_mapping: Tensor,  # int64 [T]
        interleaved: bool = False,
    ) -> Tensor:
        """Norm (if any) and rotate queries and keys, store keys and values in the cache, return the queries [T, H, D].

        Of each head the first R ≤ D dimensions are turned, pair by pair: x₁ becomes x₁·cos − x₂·sin, and x₂ becomes
        x₂·cos + x₁·sin. A pair is R/2 apart, as in GPT-NeoX; `interleaved`: two neighbours, as in GPT-J. Values are not
        rotated; `qkv` may be overwritten.  Source: RoFormer (arXiv 2104.09864).
        """

    def paged_attention(
        self,
        q: Tensor,  # [T, H, D]
        cache: LayerKV,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None,
        soft_cap: float | None,
        sinks: Tensor | None = None,  # float32 [H]
    ) -> Tensor:
        """Causal attention of each sequence's new tokens over its cached keys and values → [T, H·D].

        Query i of a sequence with n new tokens and length L sits at position p = L − n + i and sees keys
        max(0, p − window + 1) … p.  score = scale · q·k, with soft cap c: c · tanh(score / c).  Query head h reads kv
        head h // (H / K).  With sinks, each head's softmax has one score more, sinks[h], that takes no value.
        Source: PagedAttention (arXiv 2309.06180).
        """

    def allocate_kv(self, num_blocks: int, block_size: int, shape: HeadShape, dtype: torch.dtype) -> LayerKV:
        """Zeroed key and value storage for one layer.

        dtype: the dtype of the activations, or one of QUANTIZED_KV. Raises ValueError for a shape that this backend
        cannot store.
        """

    def mask_logits(self, logits: Tensor, rows: Sequence[int], bits: Tensor) -> None:
        """logits[rows[r], v] = −inf in place, for every v whose bit in row r of `bits` is 0; other rows stay.

        logits: float32 [S, V]; bits: int32 [len(rows), W] on the host, 32·W ≥ V; v has bit v mod 32 of word v div 32.
        """

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """silu(x[:, :F]) · x[:, F:].  x: [T, 2F] → [T, F]"""

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor:
        """gelu_tanh(x[:, :F]) · x[:, F:].  x: [T, 2F] → [T, F]"""

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """0.5 · x · (1 + tanh(sqrt(2 / π) · (x + 0.044715 · x³))).  x: [T, F] → [T, F]"""

    def xielu(self, x: Tensor, shape: Xielu) -> Tensor:
        """positive · x² + beta · x where x > 0; negative · (exp(min(x, eps)) − 1 − x) + beta · x elsewhere.

        x: [T, F] → [T, F].  Source: xIELU (arXiv 2411.13010).
        """

    def adjust_logits(self, logits: Tensor, changes: LogitChanges) -> None:
        """Change logits in place: penalties, then bias, then watermarks, then masks.  logits: float32 [S, V]

        x[s, v] of a token v that the prompt or the output has becomes x / repetition if x > 0, else x · repetition.
        With n > 0 times in the output it falls by presence + frequency · n. A bias is added, and delta to what
        `sampling.Watermarks` calls green. What is masked is −inf.
        Source: CTRL (arXiv 1909.05858) for repetition, as transformers has it.
        """

    def draw_tokens(self, logits: Tensor, draws: Draws) -> Tensor:
        """Draw a token from each row → int64 [S]; −1: the row has NaN or infinite logits, or nothing is left of it.

        logits: float32 [S, V]; may be overwritten. p = softmax(x / temperature) is cut to the top_k best, of these to
        the fewest best that hold top_p of their sum, of these to those of at least min_p · max p, of these to the
        typical ones that hold typical_p of their sum; at least one remains. The token is the first at which the running
        sum of p, in descending order (in that of the ids, where nothing is cut, or p is equal), passes u of the
        whole; u is `sampling.uniform` of seed and position.
        Source: nucleus sampling (arXiv 1904.09751), min-p (arXiv 2407.01082), typical (arXiv 2202.00666).
        """

    def cut_logits(self, logits: Tensor, draws: Draws) -> None:
        """Make each row in place the distribution that `draw_tokens` draws from: x / temperature, −inf for what is cut.

        A row whose temperature is 0 stays, and one from which nothing can be drawn.  logits: float32 [S, V]
        """

    def likelihoods(self, logits: Tensor, token_ids: Tensor, num_top: int) -> Likelihoods:
        """log_softmax(x)[s, token_ids[s, n]], the rank of the first of them, and the `num_top` largest of the row.

        logits: float32 [S, V], token_ids: int64 [S, N]
        """
