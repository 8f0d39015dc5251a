"""What a request wants of its prompt's hidden states, in place of tokens. Torch-free: the service imports it."""

from enum import IntEnum

import msgspec


class PoolingMethod(IntEnum):
    """Which hidden states count. The values travel between processes: never renumber."""

    LAST = 1  # the last token's
    MEAN = 2  # of all tokens, each the same
    EACH = 3  # of every token, one by one


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a prompt's hidden states, after the final norm, become the numbers that its caller gets.

    In this order: the method, then `dimensions`, then `normalize`; or the method and the head.
    """

    method: PoolingMethod = PoolingMethod.LAST
    classify: bool = False  # give the logits of the classification head: the adapter's, else the model's own
    dimensions: int | None = None  # keep so many, the first ones; None: all
    normalize: bool = False  # to length 1

    @property
    def reads_all_tokens(self) -> bool:
        """Whether every token's hidden state is needed, so that nothing can be taken from the prefix cache."""
        return self.method is not PoolingMethod.LAST


class ModelPooling(msgspec.Struct, array_like=True, frozen=True):
    """How a checkpoint says that its prompts are embedded."""

    method: PoolingMethod = PoolingMethod.LAST
    normalize: bool = True
    problem: str = ""  # why this server cannot embed as the checkpoint says; "": it can


STATES_NOTHING = ModelPooling()  # of a checkpoint


class ClassifierFacts(msgspec.Struct, array_like=True, frozen=True):
    """What is known of a classification head."""

    num_labels: int
    each_token: bool  # whether it classifies tokens; else whole prompts
