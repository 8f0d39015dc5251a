"""The blocking clients: what to call on which port.

Written by client/generate.py from operations/: change that, not this.
"""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from google.protobuf.empty_pb2 import Empty

from loraplex.blocking import Caller, GenerateStream, Stream
from loraplex.channel import Timeout
from loraplex.operations import adapters, inference, models, pooled, routes, server
from loraplex.operations.adapters import Residency
from loraplex.prompts import PromptLike, Tool
from loraplex.v1 import (
    adapters_pb2,
    generation_pb2,
    inference_pb2,
    models_pb2,
    pooling_pb2,
    prompt_pb2,
    routes_pb2,
    server_pb2,
    tokenizer_pb2,
)
from loraplex.watermark import Watermark


class _Reader(Caller):
    """Calls that both ports answer: which models, adapters and routes there are, and what the server takes."""

    def get_model(
        self,
        name: str,
        *,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> models_pb2.Model:
        """Return one model as it is now.

        Args:
            name: Id of the model, or its full name "models/{model}".
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            models.get_model(
                name, timeout=timeout, routing_key=routing_key, metadata=metadata, wait_for_ready=wait_for_ready
            )
        )

    def list_models(
        self,
        *,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> list[models_pb2.Model]:
        """Return all models, ordered by name.

        Args:
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._list(
            models.list_models(
                timeout=timeout, routing_key=routing_key, metadata=metadata, wait_for_ready=wait_for_ready
            )
        )

    def get_adapter(
        self,
        name: str,
        *,
        tenant: str = "shared",
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> adapters_pb2.Adapter:
        """Return one version of an adapter as it is now: the current one for a name without @{version}.

        Args:
            name: Id of the adapter or its full name, tenants/{tenant}/adapters/{adapter}, with or without @{version}.
            tenant: Id of the tenant that has it, unless `name` is a full name.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            adapters.get_adapter(
                name,
                tenant=tenant,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def list_adapters(
        self,
        *,
        tenant: str = "-",
        base_model: str | None = None,
        include_versions: bool = False,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> list[adapters_pb2.Adapter]:
        """Return the adapters of a tenant, ordered by name.

        Args:
            tenant: Id of the tenant. "-": all tenants that the caller may see.
            base_model: Only adapters of this model. None: of all models.
            include_versions: Whether to return every version, instead of only the current one of each adapter.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._list(
            adapters.list_adapters(
                tenant=tenant,
                base_model=base_model,
                include_versions=include_versions,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def get_route(
        self,
        name: str,
        *,
        tenant: str = "shared",
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> routes_pb2.Route:
        """Return one route.

        Args:
            name: Id of the route, or its full name "tenants/{tenant}/routes/{route}".
            tenant: Id of the tenant that has it, unless `name` is a full name.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            routes.get_route(
                name,
                tenant=tenant,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def list_routes(
        self,
        *,
        tenant: str = "-",
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> list[routes_pb2.Route]:
        """Return the routes of a tenant, ordered by name.

        Args:
            tenant: Id of the tenant. "-": all tenants that the caller may see.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._list(
            routes.list_routes(
                tenant=tenant,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def resolve_target(
        self,
        model: str,
        *,
        tenant: str | None = None,
        target_key: str | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> routes_pb2.ResolveTargetResponse:
        """Say what the `model` of a generation would mean, without running anything.

        Args:
            model: Name of a model, an adapter, an adapter version or a route.
            tenant: Id of the tenant in which ids are looked up. None: the caller's own.
            target_key: Routing key that chooses among the targets of a route. None: no key.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            routes.resolve_target(
                model,
                tenant=tenant,
                target_key=target_key,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def get_server_info(
        self,
        *,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> server_pb2.ServerInfo:
        """Say what server this is: version, devices, limits.

        Args:
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            server.get_server_info(
                timeout=timeout, routing_key=routing_key, metadata=metadata, wait_for_ready=wait_for_ready
            )
        )


class Client(_Reader):
    """The data port: generates, embeds, classifies, looks around. May be shared between threads."""

    def generate(
        self,
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
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> inference_pb2.GenerateResponse:
        """Generate from a prompt, and return everything at the end.

        An option that is None is as in `spec`. Where `spec` leaves it out too, the route's default holds, else the
        model's, else what is stated here.

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
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            inference.generate(
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
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def stream_generate(
        self,
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
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> GenerateStream:
        """Generate from a prompt, and return tokens as they come.

        An option that is None is as in `spec`. Where `spec` leaves it out too, the route's default holds, else the
        model's, else what is stated here.

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
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._stream_generation(
            inference.stream_generate(
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
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def batch_generate(
        self,
        specs: Iterable[generation_pb2.GenerateSpec],
        *,
        max_concurrency: int | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> Stream[inference_pb2.BatchGenerateResponse]:
        """Generate for many specs. First comes `started` with the ids of all, then each result as soon as it is ready.

        Args:
            specs: What to generate; see generate_spec.
            max_concurrency: Number of specs to run at a time at most. None: the server decides.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._stream(
            inference.batch_generate(
                specs,
                max_concurrency=max_concurrency,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def score(
        self,
        model: str,
        prompt: PromptLike,
        candidates: Sequence[str | Sequence[int]],
        *,
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
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> inference_pb2.ScoreResponse:
        """Say how likely each candidate is to follow a prompt. The prompt is computed once for all.

        Args:
            model: Name of a model, an adapter, an adapter version or a route.
            prompt: Text, token ids or chat messages.
            candidates: Texts or token ids. A text is tokenised by itself: a blank in front is its own.
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
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            inference.score(
                model,
                prompt,
                candidates,
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
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def cancel_generation(
        self,
        request_ids: Sequence[str] = (),
        *,
        client_request_ids: Sequence[str] = (),
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> inference_pb2.CancelGenerationResponse:
        """Cancel generations by their ids, when the calls themselves are out of reach.

        Args:
            request_ids: Ids that the server gave.
            client_request_ids: Ids that you gave.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            inference.cancel_generation(
                request_ids,
                client_request_ids=client_request_ids,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def tokenize(
        self,
        model: str,
        prompt: PromptLike,
        *,
        include_offsets: bool | None = None,
        include_text: bool | None = None,
        add_special_tokens: bool | None = None,
        truncate_to_tokens: int | None = None,
        literal_content: bool | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str | prompt_pb2.ToolChoice | None = None,
        parallel_tool_calls: bool | None = None,
        template_kwargs: Mapping[str, object] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> tokenizer_pb2.TokenizeResponse:
        """Tokenise text or chat messages exactly as a generation would.

        Args:
            model: Name of a model, an adapter, an adapter version or a route, whose tokenizer is used.
            prompt: Text or chat messages.
            include_offsets: Whether to return where in the text each token is. None: no.
            include_text: Whether to return the text that was tokenised, as the chat template rendered it. None: no.
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
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            inference.tokenize(
                model,
                prompt,
                include_offsets=include_offsets,
                include_text=include_text,
                add_special_tokens=add_special_tokens,
                truncate_to_tokens=truncate_to_tokens,
                literal_content=literal_content,
                tools=tools,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
                template_kwargs=template_kwargs,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def detokenize(
        self,
        model: str,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> tokenizer_pb2.DetokenizeResponse:
        """Turn tokens into text.

        Args:
            model: Name of a model, an adapter, an adapter version or a route, whose tokenizer is used.
            token_ids: Tokens to turn into text.
            skip_special_tokens: Whether to leave special tokens out of the text. None: yes.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            inference.detokenize(
                model,
                token_ids,
                skip_special_tokens=skip_special_tokens,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def embed(
        self,
        model: str,
        prompts: str | Iterable[PromptLike],
        *,
        pooling: pooling_pb2.Pooling.ValueType | str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
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
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> pooling_pb2.EmbedResponse:
        """Turn texts into vectors, one for each, in their order.

        Args:
            model: Name of a model, an adapter, an adapter version or a route.
            prompts: Texts, lists of token ids or lists of chat messages. A string is one text.
            pooling: Which hidden states make up a vector: "last" or "mean". None: as the checkpoint says, else last.
            dimensions: How many numbers of each vector to return, its first ones. None: all.
            normalize: Whether vectors are scaled to length 1. None: as the checkpoint says, else yes.
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
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            pooled.embed(
                model,
                prompts,
                pooling=pooling,
                dimensions=dimensions,
                normalize=normalize,
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
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def classify(
        self,
        model: str,
        prompts: str | Iterable[PromptLike],
        *,
        activation: pooling_pb2.Activation.ValueType | str | None = None,
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
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> pooling_pb2.ClassifyResponse:
        """Classify texts, or each of their tokens, with an adapter or a model that has a head for it.

        Args:
            model: Name of an adapter or a model with a classification head, an adapter version or a route.
            prompts: Texts, lists of token ids or lists of chat messages. A string is one text.
            activation: How logits become probabilities: "softmax" or "sigmoid". None: sigmoid for one label alone.
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
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            pooled.classify(
                model,
                prompts,
                activation=activation,
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
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def rerank(
        self,
        model: str,
        query: str,
        documents: Iterable[str],
        *,
        template: str | None = None,
        top_n: int | None = None,
        keep_order: bool | None = None,
        bypass_prefix_cache: bool | None = None,
        salt: str | None = None,
        on_cold: generation_pb2.OnCold.ValueType | str | None = None,
        max_load_wait: float | datetime.timedelta | None = None,
        priority: int | None = None,
        client_request_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> pooling_pb2.RerankResponse:
        """Say how well documents answer a query, with an adapter or a model that has a head for it, the best one first.

        Args:
            model: Name of an adapter or a model with a classification head, an adapter version or a route.
            query: What is asked.
            documents: What may answer it.
            template: Text with {query} and {document} in it, as the head was trained with. None: two lines.
            top_n: How many documents to return, the best ones. None: all.
            keep_order: Whether documents come in the order in which they were given. None: no.
            bypass_prefix_cache: Whether to compute the whole prompt anew and leave nothing in the cache. None: no.
            salt: Text without which no other request shares cached prefixes with this one. None: no salt.
            on_cold: What to do when the adapter is not on the device: "wait", "fail" or "use_base". None: wait.
            max_load_wait: Seconds to wait for an adapter at most. None: the server's limit.
            priority: Rank under load: higher goes before lower. None: 0.
            client_request_id: Your name for this request, which comes back in the answer and in the server's logs.
                None: no name.
            labels: Labels for your accounting, which come back in the answer. None: no labels.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            pooled.rerank(
                model,
                query,
                documents,
                template=template,
                top_n=top_n,
                keep_order=keep_order,
                bypass_prefix_cache=bypass_prefix_cache,
                salt=salt,
                on_cold=on_cold,
                max_load_wait=max_load_wait,
                priority=priority,
                client_request_id=client_request_id,
                labels=labels,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )


class AdminClient(_Reader):
    """The admin port: models, adapters, routes and the server itself. May be shared between threads."""

    def load_model(
        self,
        name: str,
        *,
        wait: float | None = None,
        request_id: str | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> models_pb2.Model:
        """Start to load a model, and return it as it is then.

        Args:
            name: Id of the model, or its full name "models/{model}".
            wait: Seconds to wait at most until it is loaded or has failed. None: return at once.
            request_id: UUID by which the server knows a repeated call again. None: a new one.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            models.load_model(
                name,
                wait=wait,
                request_id=request_id,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def unload_model(
        self,
        name: str,
        *,
        grace: float | None = None,
        wait: float | None = None,
        request_id: str | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> models_pb2.Model:
        """Start to unload a model, and return it as it is then.

        Args:
            name: Id of the model, or its full name "models/{model}".
            grace: Seconds that running requests may take to end. None: the server's grace for shutting down.
            wait: Seconds to wait at most until it is unloaded. None: return at once.
            request_id: UUID by which the server knows a repeated call again. None: a new one.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            models.unload_model(
                name,
                grace=grace,
                wait=wait,
                request_id=request_id,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def watch_models(
        self,
        name: str | None = None,
        *,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> Stream[models_pb2.WatchModelsResponse]:
        """Receive all models, or one, and then every change.

        Args:
            name: Id of the model, or its full name "models/{model}". None: all models.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._stream(
            models.watch_models(
                name, timeout=timeout, routing_key=routing_key, metadata=metadata, wait_for_ready=wait_for_ready
            )
        )

    def create_adapter(
        self,
        adapter_id: str,
        *,
        base_model: str,
        source: str,
        tenant: str = "shared",
        digest: str | None = None,
        labels: Mapping[str, str] | None = None,
        pinned: bool | None = None,
        make_current: bool | None = None,
        residency: Residency | None = None,
        wait: float | None = None,
        validate_only: bool | None = None,
        default_constraint: generation_pb2.Constraint | None = None,
        request_id: str | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> adapters_pb2.Adapter:
        """Register a version from files that the server can reach, and return it.

        Args:
            adapter_id: Id of the adapter.
            base_model: Model that the adapter is for.
            source: Directory under one of the server's roots, or s3://{bucket}/{prefix} or hf://{owner}/{name}@{commit}.
            tenant: Id of the tenant that shall have the adapter.
            digest: Digest that the files must have, "sha256:" and 64 hex digits. None: any.
            labels: Labels for the operator's own use. None: no labels.
            pinned: Whether the version must stay on the device. None: no.
            make_current: Whether the bare name moves to the version as soon as it can be used. None: yes.
            residency: How close to the device to bring the version: "disk", "host" or "device". None: host.
            wait: Seconds to wait at most until the version is there or has failed. None: return at once.
            validate_only: Whether to read and check the files and register nothing. None: no.
            default_constraint: Form of the outputs of requests that set none: see `loraplex.constraint`. None: any.
            request_id: UUID by which the server knows a repeated call again. None: a new one.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            adapters.create_adapter(
                adapter_id,
                base_model=base_model,
                source=source,
                tenant=tenant,
                digest=digest,
                labels=labels,
                pinned=pinned,
                make_current=make_current,
                residency=residency,
                wait=wait,
                validate_only=validate_only,
                default_constraint=default_constraint,
                request_id=request_id,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def upload_adapter(
        self,
        adapter_id: str,
        *,
        base_model: str,
        directory: str | Path,
        tenant: str = "shared",
        digest: str | None = None,
        labels: Mapping[str, str] | None = None,
        pinned: bool | None = None,
        make_current: bool | None = None,
        residency: Residency | None = None,
        wait: float | None = None,
        validate_only: bool | None = None,
        default_constraint: generation_pb2.Constraint | None = None,
        request_id: str | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> adapters_pb2.Adapter:
        """Register a version from files in a local directory, which are sent to the server, and return it.

        Raises FileNotFoundError, before anything is sent, if adapter_config.json or adapter_model.safetensors is not
        there.

        Args:
            adapter_id: Id of the adapter.
            base_model: Model that the adapter is for.
            directory: Directory with the adapter's files.
            tenant: Id of the tenant that shall have the adapter.
            digest: Digest that the files must have, "sha256:" and 64 hex digits. None: any.
            labels: Labels for the operator's own use. None: no labels.
            pinned: Whether the version must stay on the device. None: no.
            make_current: Whether the bare name moves to the version as soon as it can be used. None: yes.
            residency: How close to the device to bring the version: "disk", "host" or "device". None: host.
            wait: Seconds to wait at most until the version is there or has failed. None: return at once.
            validate_only: Whether to read and check the files and register nothing. None: no.
            default_constraint: Form of the outputs of requests that set none: see `loraplex.constraint`. None: any.
            request_id: UUID by which the server knows a repeated call again. None: a new one.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._upload(
            adapters.upload_adapter(
                adapter_id,
                base_model=base_model,
                directory=directory,
                tenant=tenant,
                digest=digest,
                labels=labels,
                pinned=pinned,
                make_current=make_current,
                residency=residency,
                wait=wait,
                validate_only=validate_only,
                default_constraint=default_constraint,
                request_id=request_id,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def update_adapter(
        self,
        name: str,
        *,
        tenant: str = "shared",
        labels: Mapping[str, str] | None = None,
        pinned: bool | None = None,
        version: str | None = None,
        default_constraint: generation_pb2.Constraint | None = None,
        etag: str = "",
        request_id: str | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> adapters_pb2.Adapter:
        """Change what is given of an adapter, and return it as it is then. Raises ValueError if nothing is given.

        Args:
            name: Id of the adapter or its full name, tenants/{tenant}/adapters/{adapter}, with or without @{version}.
            tenant: Id of the tenant that has it, unless `name` is a full name.
            labels: Labels that replace all others. None: unchanged.
            pinned: Whether the version must stay on the device. None: unchanged.
            version: Version that the bare name shall mean, such as "legal@1a2b3c4d5e6f". None: unchanged.
            default_constraint: Form of the outputs of requests that set none: see `loraplex.constraint`. An empty one
                removes it. None: unchanged.
            etag: Change only if this is still its etag. "": change in any case.
            request_id: UUID by which the server knows a repeated call again. None: a new one.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            adapters.update_adapter(
                name,
                tenant=tenant,
                labels=labels,
                pinned=pinned,
                version=version,
                default_constraint=default_constraint,
                etag=etag,
                request_id=request_id,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def delete_adapter(
        self,
        name: str,
        *,
        tenant: str = "shared",
        etag: str | None = None,
        wait: float | None = None,
        request_id: str | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> adapters_pb2.Adapter:
        """Start to delete a version, or all versions for a bare name. Running requests end first.

        Args:
            name: Id of the adapter or its full name, tenants/{tenant}/adapters/{adapter}, with or without @{version}.
            tenant: Id of the tenant that has it, unless `name` is a full name.
            etag: Delete only if this is still its etag. None: delete in any case.
            wait: Seconds to wait at most until it is gone. None: return at once.
            request_id: UUID by which the server knows a repeated call again. None: a new one.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            adapters.delete_adapter(
                name,
                tenant=tenant,
                etag=etag,
                wait=wait,
                request_id=request_id,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def load_adapter(
        self,
        name: str,
        *,
        tenant: str = "shared",
        residency: Residency | None = None,
        wait: float | None = None,
        request_id: str | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> adapters_pb2.Adapter:
        """Bring a version closer to the device, ahead of its first request.

        Args:
            name: Id of the adapter or its full name, tenants/{tenant}/adapters/{adapter}, with or without @{version}.
            tenant: Id of the tenant that has it, unless `name` is a full name.
            residency: How close to the device: "host" or "device". None: device.
            wait: Seconds to wait at most until it is there or has failed. None: return at once.
            request_id: UUID by which the server knows a repeated call again. None: a new one.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            adapters.load_adapter(
                name,
                tenant=tenant,
                residency=residency,
                wait=wait,
                request_id=request_id,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def unload_adapter(
        self,
        name: str,
        *,
        tenant: str = "shared",
        residency: Residency | None = None,
        wait: float | None = None,
        request_id: str | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> adapters_pb2.Adapter:
        """Free the memory of a version, once no request uses it.

        Args:
            name: Id of the adapter or its full name, tenants/{tenant}/adapters/{adapter}, with or without @{version}.
            tenant: Id of the tenant that has it, unless `name` is a full name.
            residency: How far from the device: "disk" or "host". None: disk.
            wait: Seconds to wait at most until its memory is free. None: return at once.
            request_id: UUID by which the server knows a repeated call again. None: a new one.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            adapters.unload_adapter(
                name,
                tenant=tenant,
                residency=residency,
                wait=wait,
                request_id=request_id,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def watch_adapters(
        self,
        *,
        tenant: str = "-",
        base_model: str | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> Stream[adapters_pb2.WatchAdaptersResponse]:
        """Receive all versions, and then every change.

        Args:
            tenant: Id of the tenant. "-": all tenants that the caller may see.
            base_model: Only adapters of this model. None: of all models.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._stream(
            adapters.watch_adapters(
                tenant=tenant,
                base_model=base_model,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def update_route(
        self,
        route: routes_pb2.Route,
        *,
        update_mask: Sequence[str] | None = None,
        allow_missing: bool = False,
        request_id: str | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> routes_pb2.Route:
        """Change a route, and return it as it is then.

        Args:
            route: Route as it shall be. Its name says which route to change.
            update_mask: Fields to change: targets, fallback, default_sampling, labels, default_constraint. None: all.
            allow_missing: Whether to create the route if there is none.
            request_id: UUID by which the server knows a repeated call again. None: a new one.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            routes.update_route(
                route,
                update_mask=update_mask,
                allow_missing=allow_missing,
                request_id=request_id,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def delete_route(
        self,
        name: str,
        *,
        tenant: str = "shared",
        etag: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> Empty:
        """Delete a route. Requests that it routed go on.

        Args:
            name: Id of the route, or its full name "tenants/{tenant}/routes/{route}".
            tenant: Id of the tenant that has it, unless `name` is a full name.
            etag: Delete only if this is still its etag. None: delete in any case.
            request_id: UUID by which the server knows a repeated call again. None: a new one.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._run(
            routes.delete_route(
                name,
                tenant=tenant,
                etag=etag,
                request_id=request_id,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def watch_load(
        self,
        *,
        interval: float | None = None,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> Stream[server_pb2.WatchLoadResponse]:
        """Receive the server's load now, and then again at every interval.

        Args:
            interval: Seconds between two messages. None: 1.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._stream(
            server.watch_load(
                interval=interval,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )

    def watch_usage(
        self,
        *,
        after_id: str = "",
        existing_only: bool = False,
        timeout: Timeout = "client",
        routing_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        wait_for_ready: bool = False,
    ) -> Stream[server_pb2.WatchUsageResponse]:
        """Receive usage records in the order in which they were written, and then every new one.

        Args:
            after_id: Id of the record after which to begin. "": the oldest record that is kept.
            existing_only: Whether to end with the last record that there is, instead of waiting for more.
            timeout: Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit.
            routing_key: Key of requests that go to the same target of a route, and to the same replica. None: to any.
            metadata: Further metadata, such as x-request-id or traceparent. None: no metadata.
            wait_for_ready: Whether to wait for a server that is not up yet, instead of failing with Unavailable.
        """
        return self._stream(
            server.watch_usage(
                after_id=after_id,
                existing_only=existing_only,
                timeout=timeout,
                routing_key=routing_key,
                metadata=metadata,
                wait_for_ready=wait_for_ready,
            )
        )
