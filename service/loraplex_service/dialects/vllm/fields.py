"""What the fields of a generation become, in both of vLLM's definitions. docs/dialects.md has these tables."""

from typing import Any

from loraplex_service.call import current_call
from loraplex_service.dialects.fields import Draft, Field, Fields, copied, put_prompt_logprobs, refused, taken
from loraplex_service.errors import FeatureUnsupported

_ALL = "all tokens of the vocabulary are not told: ask for the likeliest, or for some by their ids"


def _put_priority(draft: Draft, value: int) -> None:
    draft.spec.priority = -value


def _put_session(draft: Draft, value: str) -> None:
    current_call().routing_key = value


def _put_json_object(draft: Draft, value: bool) -> None:
    if value:
        draft.spec.constraint.json_object.SetInParent()


def _put_top_logprobs(draft: Draft, value: int) -> None:
    draft.spec.output.logprobs, draft.spec.output.top_logprobs = True, value


def _put_candidates(draft: Draft, value: Any) -> None:
    match value.WhichOneof("select"):
        case "top_n":
            draft.spec.output.top_logprobs = value.top_n
        case "token_ids":
            draft.spec.output.logprob_token_ids.extend(value.token_ids.ids)
        case "all" if value.all:
            raise FeatureUnsupported("response.output_candidates.all", _ALL)


def _put_prompt_candidates(draft: Draft, value: Any) -> None:
    kind = value.WhichOneof("select")
    if kind in ("token_ids", "all"):
        raise FeatureUnsupported(f"response.prompt_candidates.{kind}", "of prompts the likeliest are told; give top_n")
    draft.spec.output.prompt_logprobs = value.top_n


INFERENCE = Fields(
    (
        copied("request_id", "client_request_id"),
        taken("model", "`model`: a model, an adapter, a version, a route, a sum; may be left out where one is served"),
        copied("text", "prompt.text"),
        copied("token_ids.ids", "prompt.token_ids.ids"),
        copied("temperature", "sampling.temperature"),
        copied("sampling.num_sequences", "sampling.n"),
        copied("sampling.top_k", "sampling.top_k"),
        copied("sampling.top_p", "sampling.top_p"),
        copied("sampling.min_p", "sampling.min_p"),
        copied("sampling.seed", "sampling.seed"),
        copied("decoding.presence_penalty", "sampling.presence_penalty"),
        copied("decoding.frequency_penalty", "sampling.frequency_penalty"),
        copied("decoding.repetition_penalty", "sampling.repetition_penalty"),
        copied("decoding.logit_bias", "sampling.logit_bias"),
        copied("decoding.allowed_token_ids", "sampling.allowed_token_ids"),
        copied("decoding.json", "constraint.json_schema"),
        copied("decoding.regex", "constraint.regex"),
        copied("decoding.choice.choices", "constraint.choices.values"),
        copied("decoding.grammar", "constraint.grammar", "GBNF"),
        Field("decoding.json_object", "constraint", _put_json_object),
        copied("stopping.max_new_tokens", "stopping.max_tokens", "20 by default, as vLLM has it"),
        copied("stopping.min_new_tokens", "stopping.min_tokens"),
        copied("stopping.stop_token_ids", "stopping.stop_token_ids"),
        copied("stopping.stop_strings", "stopping.stop"),
        copied("stopping.include_stop_strings", "stopping.include_stop"),
        copied("stopping.ignore_eos", "stopping.ignore_eos"),
        copied("response.prompt_token_ids", "output.prompt_token_ids"),
        Field("response.prompt_logprobs", "output.prompt_logprobs", put_prompt_logprobs),
        Field("response.prompt_candidates", "output.prompt_logprobs", _put_prompt_candidates, "`top_n`"),
        copied("response.output_text", "output.text"),
        taken("response.output_token_ids", "whether tokens come back"),
        copied("response.output_logprobs", "output.logprobs"),
        Field("response.output_candidates", "output", _put_candidates, "`top_n`, `token_ids`"),
        copied("response.skip_special_tokens", "output.skip_special_tokens"),
        copied("kv.bypass_prefix_cache", "cache.bypass_prefix_cache"),
        copied("kv.cache_salt", "cache.salt"),
        copied("truncate_prompt_tokens", "prompt.truncate_to_tokens"),
        Field("priority", "priority", _put_priority, "lower goes first, as vLLM has it: with the other sign"),
        Field("session_id", "", _put_session, "as the metadata `loraplex-routing-key`"),
        taken("lora_name", "`model`: an adapter of the model"),
    )
)

ENGINE = Fields(
    (
        copied("request_id", "client_request_id"),
        taken("tokenized.original_text", "nothing reads it"),
        copied("tokenized.input_ids", "prompt.token_ids.ids"),
        copied("text", "prompt.text"),
        copied("sampling_params.temperature", "sampling.temperature"),
        copied("sampling_params.top_p", "sampling.top_p"),
        copied("sampling_params.top_k", "sampling.top_k"),
        copied("sampling_params.min_p", "sampling.min_p"),
        copied("sampling_params.frequency_penalty", "sampling.frequency_penalty"),
        copied("sampling_params.presence_penalty", "sampling.presence_penalty"),
        copied("sampling_params.repetition_penalty", "sampling.repetition_penalty"),
        copied("sampling_params.max_tokens", "stopping.max_tokens"),
        copied("sampling_params.min_tokens", "stopping.min_tokens"),
        copied("sampling_params.stop", "stopping.stop"),
        copied("sampling_params.stop_token_ids", "stopping.stop_token_ids"),
        taken("sampling_params.skip_special_tokens", "only tokens come back"),
        taken("sampling_params.spaces_between_special_tokens", "only tokens come back"),
        copied("sampling_params.ignore_eos", "stopping.ignore_eos"),
        copied("sampling_params.n", "sampling.n"),
        Field("sampling_params.logprobs", "output.top_logprobs", _put_top_logprobs),
        copied("sampling_params.prompt_logprobs", "output.prompt_logprobs"),
        copied("sampling_params.seed", "sampling.seed"),
        copied("sampling_params.include_stop_str_in_output", "stopping.include_stop"),
        copied("sampling_params.logit_bias", "sampling.logit_bias"),
        copied("sampling_params.truncate_prompt_tokens", "prompt.truncate_to_tokens"),
        taken("sampling_params.grammar_from_first_token", "forms begin with the first token of such prompts"),
        copied("sampling_params.json_schema", "constraint.json_schema"),
        copied("sampling_params.regex", "constraint.regex"),
        copied("sampling_params.grammar", "constraint.grammar", "GBNF"),
        Field("sampling_params.json_object", "constraint", _put_json_object),
        copied("sampling_params.choice.choices", "constraint.choices.values"),
        taken("stream", "whether tokens come as they are made"),
        refused("data_parallel_rank", "there is one rank", 0),
    )
)
