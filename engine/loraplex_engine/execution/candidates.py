"""Finds the tokens that may follow the sequences of a search, and what is told of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from loraplex_engine.execution.arrays import Wanted, named_ids
from loraplex_engine.link.messages import TokenLogprobs
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.beam_search import Candidate
from loraplex_kernels.ops import Ops
from loraplex_kernels.transfers import Reading, to_device

Candidates = tuple[Candidate, ...]  # of one row, the best first


def candidates(
    ops: Ops, added: Tensor, own: Tensor, params: Sequence[SamplingParams]
) -> Reading[list[Candidates | None]]:
    """The best tokens to follow each row, none that is impossible; None: the row's logits are not finite.

    added: float32 [S, V], the log-probabilities that the search adds up; own: float32 [S, V], the model's logits
    """
    num_best = min(max(each.num_candidates for each in params), added.shape[-1])
    values, ids = torch.topk(added, num_best, dim=-1)
    wanted = [Wanted(each.num_logprobs or 0, each.logprob_token_ids) for each in params]
    asked = [None if each.num_logprobs is None else each.processed_logprobs for each in params]
    readings = {
        processed: _told(ops, logits, ids, wanted, processed)
        for processed, logits in ((False, own), (True, added))
        if processed in asked
    }

    def finish(here: Iterator[Tensor]) -> list[Candidates | None]:
        columns = zip(next(here).tolist(), next(here).tolist(), params, asked, strict=True)
        told = {processed: reading.finish(here) for processed, reading in readings.items()}
        return [
            None
            if math.isnan(logprobs[0])
            else _row(token_ids, logprobs, each, told[mode][row] if mode in told else ())
            for row, (token_ids, logprobs, each, mode) in enumerate(columns)
        ]

    return Reading([ids, values, *(each for reading in readings.values() for each in reading.tensors)], finish)


def _row(
    token_ids: list[int], logprobs: list[float], params: SamplingParams, told: Sequence[TokenLogprobs]
) -> Candidates:
    count = min(params.num_candidates, len(logprobs) - logprobs.count(-math.inf))
    return tuple(
        Candidate(token_id, logprob, told[place] if told else None)
        for place, (token_id, logprob) in enumerate(islice(zip(token_ids, logprobs, strict=True), count))
    )


def _told(
    ops: Ops, logits: Tensor, ids: Tensor, wanted: Sequence[Wanted], are_logprobs: bool
) -> Reading[list[list[TokenLogprobs]]]:
    """What is told of each of these tokens of each row.

    logits: float32 [S, V], ids: int64 [S, C]. `are_logprobs`: log-probabilities already, which may sum to less than 1.
    """
    named, num_top = named_ids(wanted), max(each.num_top for each in wanted)
    tokens = torch.cat((ids, *to_device([named], logits.device)), dim=1)
    if are_logprobs:
        own = logits.gather(-1, tokens)
        top_logprobs, top_ids = torch.topk(logits, min(num_top, logits.shape[-1]), dim=-1)
    else:
        own, _, top_ids, top_logprobs = ops.likelihoods(logits, tokens, num_top)
    ranks = torch.stack([(logits > logits.gather(-1, each[:, None])).sum(dim=-1) + 1 for each in ids.T], dim=1)

    def finish(here: Iterator[Tensor]) -> list[list[TokenLogprobs]]:
        columns = [next(here).tolist() for _ in range(5)]
        return [_told_of_row(*row) for row in zip(*columns, wanted, strict=True)]

    return Reading([ids, own, ranks, top_ids, top_logprobs], finish)


def _told_of_row(
    ids: list[int], own: list[float], ranks: list[int], top_ids: list[int], tops: list[float], wanted: Wanted
) -> list[TokenLogprobs]:
    count = min(wanted.num_top, len(tops) - tops.count(-math.inf))
    beside = top_ids[:count], tops[:count], own[len(ids) : len(ids) + len(wanted.named)]
    return [
        TokenLogprobs(token_id, logprob, rank, *beside)
        for token_id, logprob, rank in zip(ids, own, ranks, strict=False)
    ]
