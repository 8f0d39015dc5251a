"""What the fields of a generation of OpenEngine's become. docs/dialects.md has this table."""

from typing import Any

from loraplex_service.dialects.fields import Draft, Field, Fields, copied, put_prompt_logprobs, refused, taken
from loraplex_service.errors import FeatureUnsupported


def _put_conditions(draft: Draft, value: Any) -> None:
    stopping = draft.spec.stopping
    for condition in value:
        match condition.WhichOneof("condition"):
            case "stop_text":
                stopping.stop.append(condition.stop_text)
            case "stop_token_id":
                stopping.stop_token_ids.append(condition.stop_token_id)
            case None:
                raise ValueError("has one that is empty: give stop_text or stop_token_id")
    draft.names += [("stopping.stop", "stopping.conditions"), ("stopping.stop_token_ids", "stopping.conditions")]


def _put_candidates(draft: Draft, value: Any) -> None:
    match value.WhichOneof("selection"):
        case "top_n":
            draft.spec.output.top_logprobs = value.top_n
        case "token_ids":
            draft.spec.output.logprob_token_ids.extend(value.token_ids.ids)


def _put_prompt_candidates(draft: Draft, value: Any) -> None:
    if value.WhichOneof("selection") == "token_ids":
        raise FeatureUnsupported(
            "response.prompt_candidates.token_ids", "of prompts the likeliest are told; give top_n"
        )
    draft.spec.output.prompt_logprobs = value.top_n


def _put_json_object(draft: Draft, value: Any) -> None:
    draft.spec.constraint.json_object.SetInParent()


GENERATE = Fields(
    (
        copied("request_id", "client_request_id"),
        taken("model", "`model`: a model, an adapter, a version, a route, a sum; may be left out where one is served"),
        copied("prompt", "prompt.text"),
        copied("token_ids.ids", "prompt.token_ids.ids"),
        copied("sampling.temperature", "sampling.temperature"),
        copied("sampling.top_p", "sampling.top_p"),
        copied("sampling.top_k", "sampling.top_k"),
        copied("sampling.min_p", "sampling.min_p"),
        copied("sampling.frequency_penalty", "sampling.frequency_penalty"),
        copied("sampling.presence_penalty", "sampling.presence_penalty"),
        copied("sampling.repetition_penalty", "sampling.repetition_penalty"),
        copied("sampling.seed", "sampling.seed"),
        copied("sampling.num_sequences", "sampling.n"),
        copied("stopping.max_tokens", "stopping.max_tokens"),
        copied("stopping.min_tokens", "stopping.min_tokens"),
        Field("stopping.conditions", "stopping.stop", _put_conditions, "with `stop_token_ids`"),
        copied("stopping.ignore_eos", "stopping.ignore_eos"),
        copied("stopping.include_stop_in_output", "stopping.include_stop"),
        Field("response.return_prompt_logprobs", "output.prompt_logprobs", put_prompt_logprobs),
        Field("response.prompt_candidates", "output.prompt_logprobs", _put_prompt_candidates, "`top_n`"),
        copied("response.return_output_logprobs", "output.logprobs"),
        Field("response.output_candidates", "output.top_logprobs", _put_candidates, "`top_n`, `token_ids`"),
        refused("response.prompt_logprob_start", "those of the whole prompt are told", 0),
        copied("kv.bypass_prefix_cache", "cache.bypass_prefix_cache"),
        copied("kv.cache_salt", "cache.salt"),
        copied("guided.json_schema", "constraint.json_schema"),
        copied("guided.regex", "constraint.regex"),
        copied("guided.ebnf_grammar", "constraint.grammar", "GBNF"),
        copied("guided.choice.choices", "constraint.choices.values"),
        Field("guided.json_object", "constraint", _put_json_object),
        taken("lora_name", "`model`: an adapter of the model"),
    )
)
