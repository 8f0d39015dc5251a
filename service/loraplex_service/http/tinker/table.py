"""The parameters of Tinker's calls: what they become in the contract, or why they are refused."""

import base64
import binascii
from typing import Any

from loraplex.v1.generation_pb2 import GenerateSpec, LogprobsMode, OutputOptions, Stopping
from loraplex.v1.routes_pb2 import ResolveTargetRequest
from loraplex_service.http.parameters import (
    INTEGER,
    OBJECT,
    STRING,
    Draft,
    Parameter,
    Table,
    bounded,
    flag,
    items,
    mapping,
    number,
    refuse_others,
    refused,
    scalar,
    text,
    whole,
    wrong,
)

SCHEME = "tinker://"
SAMPLING = ("max_tokens", "seed", "stop", "temperature", "top_k", "top_p")
SESSION = "sampler-"  # what ids of sampling sessions begin with; then comes what they sample from


def session_id(model: str) -> str:
    """The id of a sampling session, which is all that there is of it."""
    return SESSION + base64.urlsafe_b64encode(model.encode()).decode().rstrip("=")


def model_of(session: str) -> str:
    """What a sampling session samples from. Raises ValueError."""
    encoded = session.removeprefix(SESSION)
    try:
        model = base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        model = ""
    if not model or not session.startswith(SESSION):
        raise ValueError("is no sampling session of this server; create one")
    return model


def _put_path(draft: Draft, value: Any) -> None:
    """The name of an adapter, as a path of Tinker's."""
    draft.message.model = text(value).removeprefix(SCHEME)


def _put_session(draft: Draft, value: Any) -> None:
    draft.message.model = model_of(text(value))


def _put_chunks(draft: Draft, value: Any) -> None:
    ids = draft.message.prompt.token_ids.ids
    for place, given in enumerate(items(mapping(value).get("chunks"))):
        chunk = mapping(given)
        if chunk.get("type", "encoded_text") != "encoded_text":
            raise wrong(f"prompt.chunks[{place}]", "there is text alone", code="unsupported_parameter")
        ids.extend([whole(token) for token in bounded(items(chunk.get("tokens")), "TokenIds.ids")])
        bounded(ids, "TokenIds.ids")


def _put_sampling(draft: Draft, value: Any) -> None:
    given, message = mapping(value), draft.message
    refuse_others(given, SAMPLING, "sampling_params")
    message.sampling.temperature = number(given.get("temperature", 1.0))
    message.sampling.top_p = number(given.get("top_p", 1.0))
    message.sampling.top_k = max(0, whole(given.get("top_k", -1)))
    if given.get("seed") is not None:
        message.sampling.seed = whole(given["seed"])
    if given.get("max_tokens") is not None:
        message.stopping.max_tokens = whole(given["max_tokens"])
    if given.get("stop") is not None:
        _put_stop(message.stopping, given["stop"])


def _put_stop(stopping: Stopping, value: Any) -> None:
    """Texts, or tokens. An empty list: not even the model's own end of sequence."""
    ends = [value] if isinstance(value, str) else items(value, "Stopping.stop_token_ids")
    stopping.ignore_eos = not ends
    for end in ends:
        if isinstance(end, str):
            stopping.stop.append(end)
        else:
            stopping.stop_token_ids.append(whole(end))


def _put_prompt_logprobs(draft: Draft, value: Any) -> None:
    if flag(value):
        draft.message.output.prompt_logprobs = 0


def _put_top_prompt(draft: Draft, value: Any) -> None:
    if whole(value):
        draft.message.output.prompt_logprobs = whole(value)


def _put_last(draft: Draft, value: Any) -> None:
    if whole(value) < 1:
        raise ValueError("must be at least 1")


def _put_nothing(draft: Draft, value: Any) -> None:
    if not isinstance(value, int | str):
        raise TypeError("must be a number or a text")


def _taken(name: str, note: str) -> Parameter:
    """A parameter that nothing depends on."""
    return Parameter(name, "", _put_nothing, f"taken: {note}", schema={"anyOf": [INTEGER, STRING]})


def _new_sample() -> Draft:
    output = OutputOptions(
        text=False, token_ids=True, logprobs=True, logprobs_mode=LogprobsMode.LOGPROBS_MODE_PROCESSED
    )
    stopping = Stopping(include_stop=True, fit_max_tokens=True)
    return Draft(GenerateSpec(output=output, stopping=stopping), paths=[("model", "sampling_session_id")])


_BASE = scalar("base_model", "model", "a model; `model_path` comes before it")
_PATH = Parameter(
    "model_path", "model", _put_path, "`tinker://` and the name of an adapter, a version or a route", schema=STRING
)

SAMPLE = Table(
    "/api/v1/asample",
    _new_sample,
    (
        _BASE,
        _PATH,
        Parameter("sampling_session_id", "model", _put_session, "what the session was created for", schema=STRING),
        _taken("seq_id", "counts the caller's requests"),
        scalar("num_samples", "sampling.n"),
        Parameter("prompt", "prompt.token_ids", _put_chunks, "`chunks` of tokens", schema=OBJECT),
        Parameter(
            "sampling_params",
            "sampling.temperature",
            _put_sampling,
            "`max_tokens`, `seed`, `stop`, `temperature`, `top_k`, `top_p`",
            schema=OBJECT,
        ),
        Parameter(
            "prompt_logprobs",
            "output.prompt_logprobs",
            _put_prompt_logprobs,
            "the model's own",
            schema={"type": "boolean"},
        ),
        Parameter("topk_prompt_logprobs", "output.prompt_logprobs", _put_top_prompt, "up to 20", schema=INTEGER),
        scalar("topk_sample_logprobs", "output.top_logprobs", "of the distribution that was drawn from"),
        Parameter("prompt_logprobs_last_n", "", _put_last, "so many tokens of the prompt have theirs", schema=INTEGER),
        refused("target_prompt_logprobs", "named tokens are asked for over gRPC, by logprob_token_ids"),
        refused("prompt_alt_tokens_k", "nothing is drawn within a prompt", 0),
        refused("record_stability_info", "nothing is recorded", False),
        refused("type", "there is one", "sample"),
    ),
    does="Begins to sample; the result is fetched at /api/v1/retrieve_future",
    repeated=("prompt_logprobs", "topk_prompt_logprobs", "topk_sample_logprobs", "prompt_logprobs_last_n"),
)

CREATE = Table(
    "/api/v1/create_sampling_session",
    lambda: Draft(ResolveTargetRequest(), paths=[("model", "model_path")]),
    (
        _BASE,
        _PATH,
        _taken("session_id", "nothing is kept for it"),
        _taken("sampling_session_seq_id", "counts the caller's sessions"),
        refused("type", "there is one", "create_sampling_session"),
    ),
    does="What samples are drawn from: the version that the name means now",
)

TABLES = (CREATE, SAMPLE)
