"""GenerateSpec with every option spelled out.

Written by client/generate.py from generation.py: change that, not this.
"""

import datetime
from collections.abc import Mapping, Sequence

from loraplex import generation
from loraplex.prompts import PromptLike, Tool
from loraplex.v1 import (
    generation_pb2,
    prompt_pb2,
)
from loraplex.watermark import Watermark


def generate_spec(
    model: str | None = None,
    prompt: PromptLike | None = None,
    *,
    spec: generation_pb2.GenerateSpec | None = None,
    add_special_tokens: bool | None = None,
    truncate_to_tokens: int | None = None,
    literal_content: bool | None = None,
    tools: Sequence[Tool] | None = None,
    tool_choice: str | prompt_pb2.ToolChoice | None = None,
    parallel_tool_calls: bool | None = None,
    template_kwargs: Mapping[str, object] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    bypass_prefix_cache: bool | None = None,
    salt: str | None = None,
    on_cold: generation_pb2.OnCold.ValueType | str | None = None,
    max_load_wait: float | datetime.timedelta | None = None,
    priority: int | None = None,
    client_request_id: str | None = None,
    labels: Mapping[str, str] | None = None,
    logprobs: bool | None = None,
    top_logprobs: int | None = None,
    logprob_token_ids: Sequence[int] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    seed: int | None = None,
    n: int | None = None,
    best_of: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    allowed_token_ids: Sequence[int] | None = None,
    bad_words: Sequence[str] | None = None,
    watermark: Watermark | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    early_stopping: generation_pb2.EarlyStopping.ValueType | str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    include_stop: bool | None = None,
    ignore_eos: bool | None = None,
    fit_max_tokens: bool | None = None,
    time_limit: float | datetime.timedelta | None = None,
    text: bool | None = None,
    token_ids: bool | None = None,
    prompt_token_ids: bool | None = None,
    prompt_logprobs: int | None = None,
    logprobs_mode: generation_pb2.LogprobsMode.ValueType | str | None = None,
    skip_special_tokens: bool | None = None,
    parse_message: bool | None = None,
    json_schema: str | Mapping[str, object] | None = None,
    json_object: bool | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    grammar: str | None = None,
    any_text: bool | None = None,
    draft_kind: generation_pb2.DraftKind.ValueType | str | None = None,
    max_draft_tokens: int | None = None,
    min_tokens_per_chunk: int | None = None,
    max_chunk_delay: float | datetime.timedelta | None = None,
) -> generation_pb2.GenerateSpec:
    """Build a GenerateSpec. What is given replaces what `spec` says.

    An option that is None is as in `spec`. Where `spec` leaves it out too, the route's default holds, else the model's,
    else what is stated here.

    Raises TypeError or ValueError for a value that does not fit its field, and ValueError for a spec without a model or
    a prompt. The server checks ranges.

    Args:
        model: Name of a model, an adapter, an adapter version or a route. None: that of `spec`.
        prompt: Text, token ids or chat messages. None: that of `spec`.
        spec: Spec to begin with. None: an empty one.
        add_special_tokens: Whether the tokenizer adds its special tokens. None: yes for text, no for chat.
        truncate_to_tokens: How many tokens to keep of a longer prompt: the last ones. None: a prompt that is too
            long is refused.
        literal_content: Whether text that spells a control token stays text. None: no for text; as the model is
            configured for chat.
        tools: Tools that the model may call, in a chat. None: no tools.
        tool_choice: Whether the model calls tools: "auto", "none", "required", or the name of the tool to call.
            None: auto.
        parallel_tool_calls: Whether one message may call several tools. None: yes.
        template_kwargs: Further variables of the chat template. None: no variables.
        add_generation_prompt: Whether a chat ends with the opening of an assistant message. None: yes, unless
            continue_final_message.
        continue_final_message: Whether the model continues the last message of a chat. None: no.
        bypass_prefix_cache: Whether to compute the whole prompt anew and leave nothing in the cache. None: no.
        salt: Text without which no other request shares cached prefixes with this one. None: no salt.
        on_cold: What to do when the adapter is not on the device: "wait", "fail" or "use_base". None: wait.
        max_load_wait: Seconds to wait for an adapter at most. None: the server's limit.
        priority: Rank under load: higher goes before lower. None: 0.
        client_request_id: Your name for this request, which comes back in the answer and in the server's logs.
            None: no name.
        labels: Labels for your accounting, which come back in the answer. None: no labels.
        logprobs: Whether to return the log-probability of each token. None: no.
        top_logprobs: Number of the likeliest tokens to return beside each token. None: 0.
        logprob_token_ids: Token ids whose log-probabilities to return beside each token. None: no ids.
        temperature: Divisor of the logits. 0 takes the likeliest token each time. None: 1.
        top_p: Total probability of the likeliest tokens to keep. None: 1, which keeps all.
        top_k: Number of the likeliest tokens to keep. 0 keeps all. None: 0.
        min_p: Smallest probability to keep, as a fraction of the likeliest token's. None: 0, which keeps all.
        typical_p: Total probability of the most typical tokens to keep. None: 1, which keeps all.
        repetition_penalty: Factor against tokens of the prompt and the output. None: 1, which changes nothing.
        presence_penalty: Amount to take from the logit of each token that the output has. None: 0.
        frequency_penalty: Amount to take from a token's logit for each time that the output has the token. None: 0.
        seed: Number that makes the draws repeatable. None: the server chooses one and reports it.
        n: Number of outputs to generate from the prompt. None: 1.
        best_of: Number of outputs to draw, of which the n best come back. None: n.
        logit_bias: Amounts to add to the logits, by token id. None: no amounts.
        allowed_token_ids: Token ids that may be chosen. None: all.
        bad_words: Words that are never written. None: no words.
        watermark: Watermark, with which its `detect` finds the outputs again. None: no watermark.
        num_beams: Number of beginnings that go on in a search. None: no search.
        length_penalty: Power of the length by which an output's score is divided: above 0 favours long ones. None:
            1.
        early_stopping: When a search with enough ended outputs ends: "heuristic", "always" or "never". None:
            heuristic.
        max_tokens: Most tokens of an output; 0: none, the prompt is read. None: as many as the context has room
            for.
        min_tokens: Number of tokens before which nothing ends an output. None: 0.
        stop: String or strings that end an output. None: no strings.
        stop_token_ids: Token ids that end an output. None: only the model's end of sequence.
        include_stop: Whether the stop string or stop token is part of the output. None: no.
        ignore_eos: Whether to go on past the model's end of sequence. None: no.
        fit_max_tokens: Whether to cut max_tokens to the room that the prompt leaves. None: no, and such a request
            is refused.
        time_limit: Seconds after which the outputs end as they are, without an error. None: no limit.
        text: Whether to return text. None: yes.
        token_ids: Whether to return token ids. None: no, unless text is False.
        prompt_token_ids: Whether to return the ids of the prompt's tokens. None: no.
        prompt_logprobs: Number of the likeliest tokens to return beside each token of the prompt. None: nothing of
            the prompt.
        logprobs_mode: Distribution of the log-probabilities: "raw", the model's, or "processed", the one drawn
            from. None: raw.
        skip_special_tokens: Whether to leave special tokens out of the text. None: yes.
        parse_message: Whether reasoning and calls of tools come apart from a chat's text. None: yes, where the
            server knows how.
        json_schema: JSON Schema that the text must satisfy, as JSON text or as a mapping. None: any text.
        json_object: Whether the text must be a JSON object. None: no.
        regex: Regular expression that the whole text must match. None: any text.
        choices: Texts, one of which the output must be. None: any text.
        grammar: Grammar that the text must follow, in GBNF. None: any text.
        any_text: Whether the text may be any, whatever the route or the adapter says. None: no, their default
            holds.
        draft_kind: Where drafts come from: "off", "ngram" or "model". They change the speed alone. None: as the
            model says.
        max_draft_tokens: Most drafts at once. None: as many as the model is configured for.
        min_tokens_per_chunk: Number of tokens to gather into one message of a stream. None: 1.
        max_chunk_delay: Seconds to hold tokens back at most. None: 0.1.
    """
    return generation.build_spec(
        model,
        prompt,
        spec=spec,
        add_special_tokens=add_special_tokens,
        truncate_to_tokens=truncate_to_tokens,
        literal_content=literal_content,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel_tool_calls,
        template_kwargs=template_kwargs,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        bypass_prefix_cache=bypass_prefix_cache,
        salt=salt,
        on_cold=on_cold,
        max_load_wait=max_load_wait,
        priority=priority,
        client_request_id=client_request_id,
        labels=labels,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        logprob_token_ids=logprob_token_ids,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        n=n,
        best_of=best_of,
        logit_bias=logit_bias,
        allowed_token_ids=allowed_token_ids,
        bad_words=bad_words,
        watermark=watermark,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=stop,
        stop_token_ids=stop_token_ids,
        include_stop=include_stop,
        ignore_eos=ignore_eos,
        fit_max_tokens=fit_max_tokens,
        time_limit=time_limit,
        text=text,
        token_ids=token_ids,
        prompt_token_ids=prompt_token_ids,
        prompt_logprobs=prompt_logprobs,
        logprobs_mode=logprobs_mode,
        skip_special_tokens=skip_special_tokens,
        parse_message=parse_message,
        json_schema=json_schema,
        json_object=json_object,
        regex=regex,
        choices=choices,
        grammar=grammar,
        any_text=any_text,
        draft_kind=draft_kind,
        max_draft_tokens=max_draft_tokens,
        min_tokens_per_chunk=min_tokens_per_chunk,
        max_chunk_delay=max_chunk_delay,
    )
