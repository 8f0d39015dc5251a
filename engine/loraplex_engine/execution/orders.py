"""What the first rank has the others do, as bytes: they are told nothing else, and know no request."""

from __future__ import annotations

import msgspec
import numpy as np

from loraplex_adapters.key import AdapterKey
from loraplex_engine.execution.arrays import Ranges, StepArrays, head_rows

Pairs = tuple[tuple[int, int], ...]
# The arrays of a step, in this order.
ARRAYS = {
    "token_ids": np.int64,
    "positions": np.int64,
    "slot_mapping": np.int64,
    "query_starts": np.int32,
    "seq_lens": np.int32,
    "block_tables": np.int32,
    "logits_rows": np.int64,
}


class Order(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of every order: an array, tagged with the name of its class."""


class Compute(Order, frozen=True):
    """Compute one step."""

    arrays: list[bytes]
    max_query_len: int
    max_seq_len: int
    lora: Ranges
    logits_lora: Ranges
    copied_blocks: Pairs
    head_rows: Pairs  # which of its `logits_rows` go through the head, in turn
    unread: bool  # whether the first rank still has to tell some of its tokens

    @classmethod
    def of(cls, step: StepArrays) -> Compute:
        """The order to compute a step that is laid out."""
        return cls(
            [getattr(step, name).tobytes() for name in ARRAYS],
            step.max_query_len,
            step.max_seq_len,
            step.lora,
            step.logits_lora,
            step.copied_blocks,
            tuple(head_rows(step)),
            bool(step.unread),
        )

    def step(self) -> StepArrays:
        """The step as another rank knows it: without what is drawn from it, and by what."""
        arrays = {
            # A copy: torch may write to what it is given.
            name: np.frombuffer(bytearray(data), dtype)
            for (name, dtype), data in zip(ARRAYS.items(), self.arrays, strict=True)
        }
        arrays["block_tables"] = arrays["block_tables"].reshape(len(arrays["seq_lens"]), -1)
        return StepArrays(
            **arrays,
            max_query_len=self.max_query_len,
            max_seq_len=self.max_seq_len,
            lora=self.lora,
            logits_lora=self.logits_lora,
            num_drawn=(),
            histories=(),
            prompt_targets=(),
            pooled=(),
            unread=((0, 0),) if self.unread else (),
            copied_blocks=self.copied_blocks,
        )


class Allocate(Order, frozen=True):
    """Give the cache so many blocks."""

    num_blocks: int


class Load(Order, frozen=True):
    """Begin to read an adapter, or the parts of a composition."""

    number: int
    key: AdapterKey
    paths: list[str]


class Forget(Order, frozen=True):
    """Drop what a load has read."""

    number: int


class Put(Order, frozen=True):
    """Put what a load has read into a slot."""

    slot: int
    number: int


class Remove(Order, frozen=True):
    """Clear a slot."""

    slot: int


class Report(Order, frozen=True):
    """Say that you are there, and what you have exchanged and hold."""


AnyOrder = Compute | Allocate | Load | Forget | Put | Remove | Report
encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(AnyOrder).decode
