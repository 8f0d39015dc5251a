"""Outputs that are ranked before they come back: the best of more that are drawn, and those of a beam search."""

from collections.abc import Sequence

import msgspec

from loraplex.v1.generation_pb2 import BeamSearch, GenerateSpec, Sampling
from loraplex_engine.link.beams import Beams, EarlyStopping
from loraplex_engine.link.messages import AddRequest, EngineLimits
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_service.errors import InvalidRequest
from loraplex_service.requests.sampling import of_sampling


def num_ranked(sampling: Sampling, search: BeamSearch) -> int | None:
    """How many outputs come back after ranking; None: they are not ranked."""
    is_ranked = search.num_beams or sampling.best_of > max(sampling.n, 1)
    return (sampling.n or 1) if is_ranked else None


def ranking_params(
    params: SamplingParams, spec: GenerateSpec, merged: Sampling, limits: EngineLimits, path: str
) -> SamplingParams:
    """The parameters of outputs that are ranked, or the same where none are.

    Raises InvalidRequest for a search that the model cannot make, and for fewer to choose from than shall come back.
    """
    _check_number(spec, merged, path)
    if not spec.HasField("beam_search"):
        is_told = params.num_logprobs is not None or num_ranked(merged, spec.beam_search) is None
        return params if is_told else msgspec.structs.replace(params, num_logprobs=0)
    width = spec.beam_search.num_beams
    if width > limits.max_num_seqs:
        problem = f"is {width}, and the model runs {limits.max_num_seqs} sequences at the same time"
        raise InvalidRequest.at(f"{path}.beam_search.num_beams", problem)
    room = limits.total_blocks * limits.block_size
    if width * (params.max_tokens + limits.block_size) > room:
        problem = f"is {width}, and the cache has room for {room} tokens: ask for fewer, or set a lower max_tokens"
        raise InvalidRequest.at(f"{path}.beam_search.num_beams", problem)
    endings = len({*params.eos_token_ids, *params.stop_token_ids})
    return msgspec.structs.replace(
        params,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        typical_p=1.0,
        stop=tuple(dict.fromkeys(spec.stopping.stop)),
        num_candidates=Beams(width, []).num_candidates(endings),
    )


def _check_number(spec: GenerateSpec, merged: Sampling, path: str) -> None:
    """Raise InvalidRequest if more outputs shall come back than there are to choose from."""
    width, best_of = spec.beam_search.num_beams, merged.best_of
    if merged.n > (width or best_of or merged.n):
        least = f"beam_search.num_beams, {width}" if width else f"sampling.best_of, {best_of}"
        raise InvalidRequest(of_sampling(spec, "n", f"is {merged.n}, more than {least}", path))


def to_send(sequences: Sequence[AddRequest]) -> Sequence[AddRequest]:
    """What the engine is sent for these outputs: for those of one search a single request."""
    first = sequences[0] if sequences else None
    if first is None or first.beams is None:
        return sequences
    beams = msgspec.structs.replace(first.beams, output_ids=[each.request_id for each in sequences])
    return [msgspec.structs.replace(first, beams=beams)]


def wanted_beams(search: BeamSearch) -> Beams | None:
    """The search, for outputs that have no ids yet; None: none is asked for."""
    if not search.num_beams:
        return None
    return Beams(
        search.num_beams,
        [],
        search.length_penalty if search.HasField("length_penalty") else 1.0,
        EarlyStopping(search.early_stopping or EarlyStopping.HEURISTIC),
    )
