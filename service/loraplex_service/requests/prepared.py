"""What a generation is before it is let in: all that its spec and what it names decide."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from loraplex.v1.generation_pb2 import Constraint, GenerateSpec, Sampling
from loraplex.v1.inference_pb2 import Candidate
from loraplex_engine.link.drafts import NO_DRAFTS, Drafts
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_service.admission.tenants import Tenant
from loraplex_service.call import Call
from loraplex_service.names.target import LoadedModel, Target, merged_sampling
from loraplex_service.requests.cold_adapters import Wait
from loraplex_service.requests.drafts import wanted_drafts
from loraplex_service.requests.entrance import Entered, Size
from loraplex_service.requests.forms import Forms
from loraplex_service.requests.messages import Messages
from loraplex_service.requests.output_form import OutputForm
from loraplex_service.requests.prompts import TextWork, prompt_tokens
from loraplex_service.requests.ranking import num_ranked, ranking_params, wanted_beams
from loraplex_service.requests.run import Job
from loraplex_service.requests.sampling import derived_seed, sampling_params
from loraplex_service.requests.scores import candidate_tokens, check_size, scoring_sequences
from loraplex_service.text import Message
from loraplex_service.validation.checks import requires_calls

SEED_BITS = 53  # bits of a drawn seed: as many as a JavaScript number holds


@dataclass(frozen=True, slots=True)
class Form:
    """The form that outputs must have."""

    grammar: str  # "": they have none
    kind: str  # of the constraint, as telemetry calls it; "": they have none
    named_by: str  # the route or the adapter that names it by default; "": the request itself, or nobody


@dataclass(frozen=True, slots=True)
class Prepared:
    """One generation, or a score of candidates."""

    spec: GenerateSpec
    path: str  # where the spec is in the request
    target: Target
    prompt: list[int]  # its token ids
    scored: Sequence[list[int]]  # those of the candidates, where there are any
    form: Form
    sampling: Sampling  # what is asked for, with the defaults of what is named
    params: SamplingParams
    drafts: Drafts
    outputs: int
    messages: Sequence[Message] | None  # that read the outputs; None: they are plain text

    @property
    def size(self) -> Size:
        num_read = len(self.prompt) + sum(map(len, self.scored))
        return Size(num_read, self.spec.beam_search.num_beams or self.outputs, self.params.max_tokens)

    def job(self, call: Call, tenant: Tenant, entered: Entered, streaming: bool) -> Job:
        """What is to be done now that it was let in."""
        spec, is_chat = self.spec, self.spec.prompt.HasField("chat")
        resolved = entered.target
        resolved.constraint_source = self.form.named_by
        return Job(
            request_id=call.request_id,
            client_request_id=call.client_request_id,
            labels=call.labels,
            operation="score" if self.scored else "chat" if is_chat else "text_completion",
            target=resolved,
            constraint=self.form.kind,
            tokenizer=self.target.model.tokenizer,
            form=OutputForm.of(spec, streaming, self.params.max_tokens),
            prompt=self.prompt,
            sequences=self._sequences(tenant, entered),
            arrival=call.arrival,
            adapter_load_seconds=entered.wait.seconds,
            num_ranked=None if self.scored else num_ranked(self.sampling, spec.beam_search),
            form_path=_form_path(spec, self.path),
            messages=self.messages,
        )

    def _sequences(self, tenant: Tenant, entered: Entered) -> list[AddRequest]:
        """One request to the engine for each output. Only the first one asks for the prompt's log-probabilities."""
        spec, client, params = self.spec, self.target.model.client, _after(self.params, entered.wait)
        first = AddRequest(
            request_id=client.requests.new_id(),
            prompt=self.prompt,
            sampling=params,
            adapter=entered.adapter,
            cache_salt=tenant.cache_salt(spec.cache.salt),
            bypass_prefix_cache=spec.cache.bypass_prefix_cache,
            priority=-tenant.priority(spec.priority),  # higher is first for callers, lower is first for engines
            tenant=tenant.name,
            weight=tenant.config.weight,
            adapter_wait_seconds=entered.wait.seconds_left,
            grammar=self.form.grammar,
            drafts=NO_DRAFTS if spec.HasField("beam_search") else self.drafts,
            beams=wanted_beams(spec.beam_search),
        )
        if self.scored:
            return scoring_sequences(first, self.scored, client)
        sequences = [first]
        for index in range(1, self.outputs):
            seed = derived_seed(params.seed, index)
            sampling = msgspec.structs.replace(params, seed=seed, num_prompt_logprobs=None)
            sequences.append(msgspec.structs.replace(first, request_id=client.requests.new_id(), sampling=sampling))
        return sequences


class Preparation:
    """Prepares generations. For one event loop."""

    def __init__(self, texts: TextWork, forms: Forms, answer_bytes: int) -> None:
        """`answer_bytes`: the limit of an answer in one piece."""
        self._texts = texts
        self._forms = forms
        self._messages = Messages(texts)
        self._answer_bytes = answer_bytes

    async def prepared(
        self, spec: GenerateSpec, target: Target, tenant: Tenant, path: str, candidates: Sequence[Candidate]
    ) -> Prepared:
        """Read and check what a spec asks for. `path`: where it is in the request.

        Raises InvalidRequest, MessageTooLarge, Unavailable.
        """
        model = target.model
        prompt = await prompt_tokens(spec.prompt, model, self._texts, tenant, f"{path}.prompt")
        room = model.limits.max_model_len - len(prompt)
        scored = await candidate_tokens(candidates, room, model, self._texts, tenant)
        check_size(scored, spec.output, self._answer_bytes)
        form = await self._form(spec, target, prompt, bool(scored), tenant, path)
        sampling = merged_sampling(spec.sampling, target.default_sampling)
        params = _params(spec, sampling, model, len(prompt), path)
        drafts = wanted_drafts(spec, model.limits, path)
        params = ranking_params(params, spec, sampling, model.limits, path)
        is_search = spec.beam_search.num_beams > 0
        outputs = len(scored) or (sampling.n or 1 if is_search else max(sampling.best_of, sampling.n, 1))
        messages = None
        if not scored:
            messages = await self._messages.of(spec, outputs, model.tokenizer, prompt, tenant, path)
        return Prepared(spec, path, target, prompt, scored, form, sampling, params, drafts, outputs, messages)

    async def _form(
        self, spec: GenerateSpec, target: Target, prompt: list[int], is_scored: bool, tenant: Tenant, path: str
    ) -> Form:
        model, messages = target.model, self._messages
        if not is_scored:
            calls = await messages.required_calls(self._forms, spec, model, prompt, tenant, path)
            if calls:
                return Form(calls, "tool_calls", "")
        constraint, named_by = _constraint(spec, target)
        where = f"{path}.model" if named_by else f"{path}.constraint"
        grammar = await self._forms.grammar(constraint, tenant, where)
        if not grammar:
            return Form("", "", named_by)
        grammar = await messages.behind_reasoning(grammar, spec, model, prompt, tenant, path)
        return Form(grammar, constraint.WhichOneof("kind") or "", named_by)


def _params(spec: GenerateSpec, sampling: Sampling, model: LoadedModel, num_read: int, path: str) -> SamplingParams:
    tokenizer = model.tokenizer
    seed = sampling.seed if sampling.HasField("seed") else secrets.randbits(SEED_BITS)
    vocabulary = tokenizer.eos_token_ids, tokenizer.num_token_ids
    return sampling_params(spec, sampling, model.limits, *vocabulary, num_read, seed, path)


def _constraint(spec: GenerateSpec, target: Target) -> tuple[Constraint, str]:
    """The constraint of a request, and who names it by default; "": the request itself, or nobody."""
    return (spec.constraint, "") if spec.HasField("constraint") else target.default_constraint


def _form_path(spec: GenerateSpec, path: str) -> str:
    """Where a request says what form its outputs have; the name of a route or model, if theirs is the default."""
    if requires_calls(spec.prompt.chat):
        return f"{path}.prompt.chat.tools"
    if spec.HasField("constraint"):
        return f"{path}.constraint"
    return f"{path}.sampling.bad_words" if spec.sampling.bad_words else f"{path}.model"


def _after(params: SamplingParams, wait: Wait) -> SamplingParams:
    """The parameters of a request that has waited: its time limit is shorter by the wait."""
    if params.time_limit_seconds is None:
        return params
    return msgspec.structs.replace(params, time_limit_seconds=max(params.time_limit_seconds - wait.seconds, 0.0))
