"""The structure of a decoder, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor

from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_engine.link.pooling import STATES_NOTHING, ClassifierFacts, ModelPooling
from loraplex_kernels.ops import HeadShape, LoraSegments, Ops


class ModelError(ValueError):
    """The model cannot be served as it is. The message says which model, what is wrong with it, and what to do."""


class UnknownArchitectureError(ModelError):
    """No native family reads the model."""


class NotBorrowedError(ModelError):
    """The reason why transformers' own modelling cannot serve a model."""


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by a factor."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """A larger base for contexts beyond the original one: it grows with the longest sequence (NTK-aware)."""

    factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long wavelengths slowed by a factor, short ones kept, those between interpolated (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Frequencies blended dimension by dimension, attention made sharper.  Source: YaRN (arXiv 2309.00071)."""

    factor: float
    original_max_positions: int
    attention_factor: float  # multiplies cosines and sines
    beta_fast: float
    beta_slow: float
    truncate: bool  # round the blended range to whole dimensions


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """Each frequency divided by a factor of its own, attention made sharper.  Source: LongRoPE (arXiv 2402.13753)."""

    short: tuple[float, ...]  # [D/2], for contexts up to the original one
    long: tuple[float, ...]  # [D/2]
    original_max_positions: int
    short_attention_factor: float  # multiplies cosines and sines
    long_attention_factor: float


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotary embedding of one kind of layer."""

    theta: float
    scaling: LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None = None
    part: float = 1.0  # of each head, from its first dimension on, that is turned
    interleaved: bool = False  # what is turned together are neighbours, not a dimension of each half

    def dims(self, head_dim: int) -> int:
        """The dimensions of a head that are turned."""
        return int(head_dim * self.part)


@dataclass(frozen=True, slots=True)
class QueryGrowth:
    """Queries that grow with their position: by 1 + β · ln(1 + ⌊(position + ahead) / original⌋).

    Ministral 3, Llama 4.
    """

    beta: float
    original_max_positions: int
    ahead: int = 0
    rounded: bool = True  # the factor, before it multiplies, to the numbers that the model computes in


# How a checkpoint has the weights of norms that differ from head to head: in one tensor, or in one for each head.
HeadNormTensors = Literal["together", "apart"]


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The attention settings that may differ from layer to layer."""

    rope: Rope | None  # None: keys and queries say nothing of their positions
    window: int | None = None  # tokens seen, the own one included; None: all
    chunk: int | None = None  # tokens of the parts of a sequence that see nothing of each other; None: it has no parts
    growth: QueryGrowth | None = None


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Heads whose queries, keys and values are made from short vectors (DeepSeek V2). Sizes in dimensions."""

    query_rank: int | None  # None: queries are made from the hidden state
    rank: int  # of what keys and values are made from
    still: int  # of a head's queries and keys
    turned: int  # of them, by the rotation; all heads' keys share these
    values: int  # of a head's values


# Where ranks divide the inputs of a linear, its output is the sum of theirs.
Split = Literal["outputs", "inputs", "nothing"]


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """The norms that a layer has, by their paths in it.

    The checkpoints' names differ: what most models call post_attention is the norm before the feed-forward, and what
    Gemma calls so comes after attention, before the sum.
    """

    before_attention: str | None = None
    before_mlp: str | None = None
    after_attention: str | None = None
    after_mlp: str | None = None


NORMS_BEFORE = LayerNorms("input_layernorm", "post_attention_layernorm")
NORMS_BEHIND = LayerNorms(None, None, "post_attention_layernorm", "post_feedforward_layernorm")
NORMS_AROUND = replace(NORMS_BEHIND, before_attention="input_layernorm", before_mlp="pre_feedforward_layernorm")


@dataclass(frozen=True, slots=True)
class Stack:
    """One parameter of the matrices of all experts, [E, N, C], and the place of one of them there."""

    path: str  # inside a layer, as adapters name it
    index: int
    count: int  # E
    stored: bool  # the checkpoint has it so, not each expert's by itself
    transposed: bool  # as [E, C, N], where it does
    unknown: bool = False  # PEFT does not know that it is transposed

    @property
    def bias(self) -> str:
        return f"{self.path}_bias"


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """Projections that read the same input, multiplied as one: their rows one after another."""

    name: str  # "qkv": the LoRA site of layer 3 is "layers.3.qkv"
    module: str  # its path inside a layer, had the checkpoint fused it
    in_features: int  # C
    parts: tuple[tuple[str, int], ...]  # (module path inside a layer, output features), in order
    bias: bool
    split: Split  # what several ranks divide
    unit: int = 1  # features that stay together when they do: those of a head
    stored_fused: bool = False  # the checkpoint has them as one tensor, at `module`; so do adapters
    stack: Stack | None = None  # of an expert
    kept_dense: bool = False  # quantising the model while it is loaded leaves it alone
    in_float32: bool = False  # whatever the model computes in


class FeedForward(Protocol):
    """The feed-forward of one layer, with its parameters and the adapters beside them."""

    @property
    def linears(self) -> Sequence[LoRALinear]:
        """The linears, in the order of its layout."""

    def __call__(self, x: Tensor, lora: LoraSegments | None) -> Tensor:
        """x: [T, C] → [T, C], a new tensor.  lora: which rows of x belong to which adapter."""


class FeedForwardLayout(Protocol):
    """The feed-forward of one layer, as data: layers of one model may differ in it."""

    def linears(self, hidden_size: int) -> tuple[FusedLinear, ...]:
        """The linears, each with the names of its parts in a checkpoint."""

    def as_stored(self, holds: Callable[[str], bool]) -> FeedForwardLayout:
        """The layout in the form that a checkpoint has, by which tensors a layer holds there (paths inside it)."""

    def vectors(self) -> Mapping[str, tuple[int, ...]]:
        """Its parameters beside the linears: the path inside a layer of each, and its shape."""

    def build(self, ops: Ops, linears: Sequence[LoRALinear], vectors: Sequence[Tensor] = ()) -> FeedForward:
        """The feed-forward that these parameters make, given in the order of `linears` and of `vectors` (float32)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that the shared decoder needs to know. A family file fills it in."""

    architecture: str
    vocab_size: int  # V
    hidden_size: int
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    max_position_embeddings: int  # tokens, with a scaling of the rotary embedding included
    norm_eps: float
    layers: tuple[LayerAttention, ...]
    feed_forwards: tuple[FeedForwardLayout, ...]  # one for each layer
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: str | None  # as the checkpoint states it: "bfloat16"
    qkv_bias: bool = False
    o_bias: bool = False
    o_module: str = "self_attn.o_proj"  # its path in a layer
    head_bias: bool = False
    latent: LatentAttention | None = None
    fused_tensors: bool = False  # query, key and value are one tensor in the checkpoint, and gate and up (Phi)
    qk_norm: bool = False  # RMS norm over each query and key head
    qk_norm_modules: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")  # the paths of norms on heads
    qk_norm_rotated: bool = False  # it comes behind the rotation (Hunyuan)
    projection_norm: bool = False  # RMS norm over all of a token's queries, and over all of its keys (OLMo)
    unit_heads: bool = False  # query and key heads that turn are given a length of one, times √D (Llama 4)
    head_norm: HeadNormTensors | None = None  # layer norms of heads, each with its own weights
    norms: LayerNorms = NORMS_BEFORE
    norm_offset: float = 0.0  # added to every norm weight: Gemma's checkpoints store weight - 1
    layer_norm: bool = False  # norms subtract the mean first; False: RMS norms
    norm_bias: bool = False  # norms have one
    final_norm: str = "norm"  # the path in the model of the norm before the head
    parallel: bool = False  # attention and feed-forward read the same hidden state, and are added to it together
    embedding_scale: float | None = None
    residual_scale: float | None = None  # of what attention and feed-forward add
    attention_scale: float
    attention_soft_cap: float | None = None
    attention_sinks: bool = False  # each head has a score that takes no value
    logits_scale: float | None = None
    logits_soft_cap: float | None = None
    fits_float16: bool = True  # whether its activations stay below 65504
    quantization: str = ""  # how the weights are stored, for people; "" for none
    pooling: ModelPooling = STATES_NOTHING
    labels: tuple[str, ...] = ()  # of classes; empty: the checkpoint names none
    classifier: ClassifierFacts | None = None  # the head that it has in place of a language model's
    classifier_bias: bool = False
    unused_tensors: tuple[str, ...] = ()  # prefixes of checkpoint names that text generation does not read
    aliases: tuple[tuple[str, str], ...] = ()  # parts of other names that modules have elsewhere, and ours

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def generates(self) -> bool:
        """Whether it has the head of a language model."""
        return self.classifier is None

    @property
    def value_dim(self) -> int:
        """The dimensions of what each head returns."""
        return self.head_dim if self.latent is None else self.latent.values

    @property
    def head_shape(self) -> HeadShape:
        return HeadShape(self.num_heads, self.num_kv_heads, self.head_dim)
