"""How much is let in, by model."""

import msgspec
import pytest

from service.admission import Admission, AdmissionLimits
from service.errors import Unavailable
from tests.service.fake_engine import LIMITS

SMALL = msgspec.structs.replace(LIMITS, max_num_seqs=2, total_blocks=4, block_size=16)  # 64 tokens


def admission(sequences: float = 100, cache_tokens: float = 100) -> Admission:
    return Admission(AdmissionLimits(sequences, cache_tokens, expected_output_tokens=10))


def refusal(admission: Admission, model: str, prompt_tokens: int, outputs: int = 1, max_tokens: int = 1) -> str:
    """Why a request is refused; empty if it is let in."""
    try:
        with admission.enter(model, SMALL, prompt_tokens, outputs, max_tokens):
            return ""
    except Unavailable as error:
        return error.reason


def test_sequences_are_bounded() -> None:
    policy = admission(sequences=1.5)
    with policy.enter("m", SMALL, 1, 2, 1):
        assert refusal(policy, "m", 1) == ""
        assert refusal(policy, "m", 1, outputs=2) == "OVERLOADED"


def test_cache_tokens_are_bounded() -> None:
    policy = admission(cache_tokens=1.0)
    with policy.enter("m", SMALL, 40, 1, 1):
        assert refusal(policy, "m", 22) == ""
        assert refusal(policy, "m", 23) == "OVERLOADED"


def test_every_output_counts_and_none_with_more_than_is_expected() -> None:
    policy = admission(cache_tokens=1.0)
    with policy.enter("m", SMALL, 4, 2, 1000):  # 4 + 2 * 10
        assert refusal(policy, "m", 30, max_tokens=1000) == ""
        assert refusal(policy, "m", 31, max_tokens=1000) == "OVERLOADED"


def test_a_request_alone_is_let_in_whatever_its_size() -> None:
    assert refusal(admission(sequences=0.1, cache_tokens=0.1), "m", 10_000, outputs=16, max_tokens=10_000) == ""


def test_models_do_not_take_each_others_room() -> None:
    policy = admission(sequences=0.5)
    with policy.enter("m", SMALL, 1, 1, 1):
        assert refusal(policy, "m", 1) == "OVERLOADED"
        assert refusal(policy, "other", 1) == ""


def test_tokens_are_given_back() -> None:
    policy = admission(cache_tokens=1.0)
    with policy.enter("m", SMALL, 1, 1, 1):
        for _ in range(3):
            assert refusal(policy, "m", 50) == ""


def test_room_is_given_back_however_a_request_ends() -> None:
    policy = admission(sequences=0.5)
    with pytest.raises(KeyError), policy.enter("m", SMALL, 1, 1, 1):
        raise KeyError
    assert policy.idle
    assert refusal(policy, "m", 1) == ""


def test_when_draining_nothing_is_let_in() -> None:
    policy = admission()
    policy.close()
    assert refusal(policy, "m", 1) == "DRAINING"


async def test_idle_is_waited_for() -> None:
    policy = admission()
    with policy.enter("m", SMALL, 1, 1, 1):
        assert not policy.idle
    await policy.wait_idle()
