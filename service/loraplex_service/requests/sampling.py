"""Turns a valid GenerateSpec into the SamplingParams of the engine, within what the model has room for."""

import hashlib
from collections.abc import Iterable

from loraplex.v1 import generation_pb2
from loraplex.v1.generation_pb2 import LOGPROBS_MODE_PROCESSED, GenerateSpec, OutputOptions, Sampling
from loraplex_engine.link.messages import EngineLimits
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.link.watermark import Watermark
from loraplex_service.errors import InvalidRequest, PromptTooLong, Violation
from loraplex_service.timestamps import duration_seconds


def sampling_params(
    spec: GenerateSpec,
    sampling: Sampling,  # merged
    limits: EngineLimits,
    eos_token_ids: tuple[int, ...],
    num_token_ids: int,  # of the tokenizer: the highest, and 1
    prompt_tokens: int,
    seed: int,
    path: str,
) -> SamplingParams:
    """The parameters of the first output.

    Raises PromptTooLong and, for ids outside the vocabulary and where no token is left to draw, InvalidRequest.
    """
    stopping, output = spec.stopping, spec.output
    max_tokens = room_for_output(spec, limits, prompt_tokens, path)
    _check_vocabulary(spec, sampling, limits.vocab_size, path)
    if stopping.min_tokens > max_tokens:
        problem = f"is {stopping.min_tokens}, and the context has room for {max_tokens}"
        raise InvalidRequest.at(f"{path}.stopping.min_tokens", problem)

    def given(name: str, default: float) -> float:
        return float(getattr(sampling, name)) if sampling.HasField(name) else default  # type: ignore[arg-type]

    params = SamplingParams(
        temperature=given("temperature", 1.0),
        top_k=min(sampling.top_k, limits.vocab_size),
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
        typical_p=given("typical_p", 1.0),
        repetition_penalty=given("repetition_penalty", 1.0),
        presence_penalty=given("presence_penalty", 0.0),
        frequency_penalty=given("frequency_penalty", 0.0),
        seed=seed,
        logit_bias=dict(sampling.logit_bias),
        allowed_token_ids=tuple(sampling.allowed_token_ids) or None,
        bad_words=tuple(sampling.bad_words),
        num_token_ids=num_token_ids if num_token_ids < limits.vocab_size else None,
        max_tokens=max_tokens,
        min_tokens=stopping.min_tokens,
        stop_token_ids=tuple(stopping.stop_token_ids),
        eos_token_ids=() if stopping.ignore_eos else eos_token_ids,
        num_logprobs=output.top_logprobs if wants_logprobs(output) else None,
        num_prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
        logprob_token_ids=tuple(output.logprob_token_ids),
        watermark=_watermark(spec.watermark) if spec.HasField("watermark") else None,
        processed_logprobs=output.logprobs_mode == LOGPROBS_MODE_PROCESSED,
        time_limit_seconds=duration_seconds(stopping.time_limit) if stopping.HasField("time_limit") else None,
    )
    if not params.can_draw:
        problem = "leaves no token to draw: each one ends the output, which min_tokens forbids, or has no text"
        raise InvalidRequest(of_sampling(spec, "allowed_token_ids", problem, path))
    return params


def _watermark(asked: generation_pb2.Watermark) -> Watermark:
    return Watermark(
        asked.key,
        asked.gamma if asked.HasField("gamma") else 0.25,
        asked.delta if asked.HasField("delta") else 2.0,
        asked.context_tokens or 1,
    )


def wants_logprobs(output: OutputOptions) -> bool:
    """Whether the log-probabilities of the output's tokens are asked for."""
    return bool(output.logprobs or output.top_logprobs or output.logprob_token_ids)


def room_for_output(spec: GenerateSpec, limits: EngineLimits, prompt_tokens: int, path: str) -> int:
    """The most tokens of an output: the caller's max_tokens, cut if that is allowed, else the rest of the context.

    Raises PromptTooLong.
    """
    room = limits.max_model_len - prompt_tokens
    if room < 1:
        raise PromptTooLong.of(f"{path}.prompt", prompt_tokens, limits.max_model_len)
    if not spec.stopping.HasField("max_tokens"):
        return room
    if spec.stopping.max_tokens > room and not spec.stopping.fit_max_tokens:
        raise PromptTooLong(
            f"{path}.stopping.max_tokens",
            f"is {spec.stopping.max_tokens}; behind a prompt of {prompt_tokens} tokens the context of "
            f"{limits.max_model_len} has room for {room}. Ask for less, set fit_max_tokens, or leave max_tokens out",
            prompt_tokens,
            limits.max_model_len,
        )
    return min(spec.stopping.max_tokens, room)


def derived_seed(seed: int, output_index: int) -> int:
    """The seed of a later output. The first output has the request's own seed, so that n changes nothing for it."""
    digest = hashlib.blake2b(seed.to_bytes(8) + output_index.to_bytes(4), digest_size=8)
    return int.from_bytes(digest.digest())


def _check_vocabulary(spec: GenerateSpec, sampling: Sampling, vocab_size: int, path: str) -> None:
    def problem(token_ids: Iterable[int]) -> str:
        largest = max(token_ids, default=0)
        return f"holds {largest}, and the vocabulary has {vocab_size} tokens" if largest >= vocab_size else ""

    merged = {"logit_bias": sampling.logit_bias, "allowed_token_ids": sampling.allowed_token_ids}
    violations = [
        *(of_sampling(spec, name, problem(ids), path) for name, ids in merged.items()),
        Violation(f"{path}.stopping.stop_token_ids", problem(spec.stopping.stop_token_ids)),
        Violation(f"{path}.output.logprob_token_ids", problem(spec.output.logprob_token_ids)),
    ]
    problems = [violation for violation in violations if violation.problem]
    if problems:
        raise InvalidRequest(*problems)


def of_sampling(spec: GenerateSpec, name: str, problem: str, path: str) -> Violation:
    """The violation of a sampling field: of the caller's own, or of a default of the model or route that it named."""
    if getattr(spec.sampling, name):
        return Violation(f"{path}.sampling.{name}", problem)
    return Violation(f"{path}.model", f"has a default sampling whose {name} {problem}" if problem else "")
