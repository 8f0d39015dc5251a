"""The engine's own check of requests. The service has checked all this; one request must never end the engine."""

from __future__ import annotations

import math

from loraplex_engine.link.messages import AddRequest, EngineLimits


def problem_with(message: AddRequest, limits: EngineLimits) -> str:
    """The reason to refuse a request; empty: there is none."""
    sampling = message.sampling
    if not isinstance(message.prompt, list):
        return f"the prompt has several parts: {limits.architecture} reads token ids alone"
    count, num_outputs = len(message.prompt_token_ids), len(message.output_token_ids)
    most = limits.max_model_len - (sampling.max_tokens > 0)  # the first drawn token has a position, too
    if not 1 <= count <= most:
        return f"prompt of {count} tokens: it must have 1 to {most}"
    if num_outputs and (num_outputs >= sampling.max_tokens or count + num_outputs >= limits.max_model_len):
        return f"{num_outputs} output tokens to go on from: there must be fewer than it may have"
    token_ids = (
        *message.prompt_token_ids,
        *message.output_token_ids,
        *sampling.logit_bias,
        *(sampling.allowed_token_ids or ()),
        *sampling.stop_token_ids,
        *sampling.eos_token_ids,
        *sampling.logprob_token_ids,
    )
    if min(token_ids) < 0 or max(token_ids) >= limits.vocab_size:
        return f"token ids must lie in 0 to {limits.vocab_size - 1}"
    if not sampling.can_draw:
        return "no token could be drawn: allowed_token_ids is empty, or all of its tokens end the output too early"
    if message.pooling is not None and message.pooling.classify and message.adapter is None and not limits.classifier:
        return "there is no classification head without an adapter"
    if message.pooling is None and limits.classifier is not None:
        return f"{limits.architecture} has a classification head, and generates no text"
    if message.pooling is not None and sampling.max_tokens:
        return f"max_tokens is {sampling.max_tokens}: it must be 0 where hidden states are pooled"
    if sampling.max_tokens < 0:
        return f"max_tokens is {sampling.max_tokens}: it must be at least 0"
    if message.drafts.most and not limits.drafts.offers(message.drafts.kind):
        return f"drafts of kind {message.drafts.kind}: the model has none; give it some in its configuration"
    if message.beams is not None and message.beams.width > limits.max_num_seqs:
        return f"{message.beams.width} beams: {limits.max_num_seqs} sequences run at the same time"
    if message.beams is not None and (problem := _unsearchable(message)):
        return f"a beam search has no {problem}"
    if message.beams is None and sampling.stop:
        return "stop strings: the engine looks for them in beam searches alone"
    if not 0 < message.weight < math.inf:
        return f"weight is {message.weight}: it must be above 0"
    return ""


def _unsearchable(message: AddRequest) -> str:
    """What a search was sent without, or with; empty: it can be run."""
    sampling = message.sampling
    if not sampling.max_tokens or not sampling.num_candidates:
        return "tokens to look for: max_tokens and num_candidates must be above 0"
    return "drafts" if message.drafts.most else ""
