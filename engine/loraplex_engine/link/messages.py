"""The messages between the service and an engine. Typed, versionless (both ends are one release), never pickled.

Every message is one frame. `ToEngine` and `FromEngine` are the two closed sets: a decoder accepts nothing else.
"""

import msgspec

from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.beams import Beams
from loraplex_engine.link.drafts import NO_DRAFTS, Drafts
from loraplex_engine.link.pooling import STATES_NOTHING, ClassifierFacts, ModelPooling, PoolingParams
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from loraplex_engine.link.sizes import DeviceMemory, Needs


class Message(msgspec.Struct, array_like=True, tag=True, frozen=True):
    """Base of every frame: arrays on the wire, tagged with the class name."""


# ---- service → engine ----------------------------------------------------------------------------------------------


class Embedded(msgspec.Struct, frozen=True):
    """A part of a prompt that has no tokens, such as an image: its rows do not come from the token embedding."""

    digest: str  # hex, of everything that its rows depend on; equal digests share cached blocks
    length: int  # positions that it takes; at least 1


class Parts(msgspec.Struct, frozen=True):
    """A prompt of several parts, in order: runs of token ids, and what is embedded between them."""

    parts: list[list[int] | Embedded]


class AddRequest(Message, frozen=True):
    """Start one sequence. Answered by `RequestOutput`s, the last of which carries a finish reason."""

    request_id: int  # chosen by the service, never reused while the engine lives
    prompt: list[int] | Parts  # one part of token ids, or several
    sampling: SamplingParams
    adapter: AdapterKey | None = None  # None: the base model
    cache_salt: str = ""  # requests share cached prefixes only with the same salt
    bypass_prefix_cache: bool = False
    priority: int = 0  # lower runs first; equal: tenants by their shares, and of one tenant first come, first served
    tenant: str = ""  # the tenant, for fairness between tenants
    weight: float = 1.0  # of the tenant's share; above 0
    adapter_wait_seconds: float | None = None  # longest wait for the adapter, once it is its turn; None: for ever
    output_token_ids: list[int] = []  # tokens that an earlier engine generated: go on after them
    grammar: str = ""  # of the form that the output must have, within `link.grammar`'s limits; "": any
    drafts: Drafts = NO_DRAFTS
    beams: Beams | None = None  # search for the best outputs, and answer only then, for each of them; None: draw one
    pooling: PoolingParams | None = None  # what to make of its hidden states; then no tokens are drawn

    @property
    def output_ids(self) -> list[int]:
        """The ids under which its outputs come."""
        return [self.request_id] if self.beams is None else self.beams.output_ids

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt, which must be one part of token ids."""
        assert isinstance(self.prompt, list)
        return self.prompt


class LoadOn(Message, frozen=True):
    """Load the model there. The answer to `EngineSized`."""

    devices: list[str]  # of the ranks, in order: "cpu", "cuda:0"
    fraction: float | None  # of a GPU's memory, or of the host's memory that is free after loading, for its cache


class SetVocabulary(Message, frozen=True):
    """The bytes that each token adds to a text, by id; empty: it adds none, or is a control token.

    Needed before the first request with a grammar, and sent once.
    """

    token_bytes: list[bytes]


class Abort(Message, frozen=True):
    """Forget these requests now, in whatever state. Unknown ids are ignored; no output follows."""

    request_ids: list[int]


class WantAdapter(Message, frozen=True):
    """All that the service wants of one adapter, or of a weighted sum, from now on. It replaces every earlier wish.

    Answered by an `AdapterStatus` after the next step, and by another after each change. Between `least` and `most`,
    and once the wish is met, the engine places the adapter as its requests need it.
    """

    key: AdapterKey
    order: int  # grows with every wish for any adapter; at least 1
    path: str = ""  # directory to read it from, resolved and allowed by the service; "": nothing is read for this wish
    least: Residency = Residency.HOST  # the tier to bring it to, as soon as there is room
    most: Residency = Residency.DEVICE  # the tier to lower it to, once no request uses it; DISK: it is forgotten
    pinned: bool = False  # brought to the device, and kept there
    is_hashed: bool = False  # the files at `path` are known to have the key's digest: it need not be made again
    ahead: bool = False  # nobody waits for the adapter yet: others come before it
    upload: int = 0  # that has brought the files, whole by now, to be read in part already; 0: none


class UploadGrew(Message, frozen=True):
    """So much of an adapter's weights is there, for the engine to read them while they come. It need not: no answer."""

    upload: int  # its number; at least 1
    path: str  # directory, in which the config is whole
    size_bytes: int  # of the weights
    num_bytes: int  # of which these are there


class UploadEnded(Message, frozen=True):
    """No more of an upload comes. What was read of it is forgotten, unless a `WantAdapter` has named it before."""

    upload: int


class Ping(Message, frozen=True):
    """Answered by `Pong` between two steps: proof that the step loop turns."""

    nonce: int


class Shutdown(Message, frozen=True):
    """Leave the loop and exit with status 0. Running requests end without an answer: drain first."""


ToEngine = LoadOn | AddRequest | SetVocabulary | Abort | WantAdapter | UploadGrew | UploadEnded | Ping | Shutdown


# ---- engine → service ----------------------------------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Natural-log probabilities at one position, of the distribution that `SamplingParams` names."""

    token_id: int  # the token at this position
    logprob: float
    rank: int  # 1: the most likely
    top_ids: list[int]  # the k most likely, best first; none whose probability is 0
    top_logprobs: list[float]
    named_logprobs: list[float] = []  # of `logprob_token_ids`, in their order


class RequestOutput(msgspec.Struct, array_like=True, frozen=True):
    """The result of one step for one request."""

    request_id: int
    token_ids: list[int]  # new tokens; a stop or EOS token that ended the output is included
    finish_reason: FinishReason | None = None  # set on the last output only
    stop_token_id: int | None = None  # the token that ended it, for STOP and EOS
    logprobs: list[TokenLogprobs] | None = None  # one per new token
    score: float | None = None  # of an output that a search found; see `Beams`
    num_searched: int = 0  # tokens that a search took in this step, whatever becomes of them
    num_drafts: int = 0  # that were checked for it
    num_accepted_drafts: int = 0  # of these, drawn as well: they are among the tokens
    # The following fields are set once, with the first output.
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # [0] is None; all, if a token has been drawn
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    queue_seconds: float | None = None  # from arrival to first scheduling; None: it ended before that
    adapter_load_seconds: float = 0.0  # the part of it spent waiting for the adapter
    error: str = ""  # with finish_reason ERROR: what went wrong with this request alone
    error_reason: str = ""  # if its adapter or its form is at fault: a name of loraplex.v1.ErrorReason
    pooled: bytes = b""  # what `AddRequest.pooling` asked for: float32, little-endian


class RankStats(msgspec.Struct, array_like=True, frozen=True):
    """One of several ranks, when the engine was last pinged."""

    sums: int  # over the ranks of its stage, cumulative as all but the last
    gatherings: int  # of these ranks' parts
    passes: int  # of hidden states, to the stage after
    nbytes: int  # of the tensors that it gave to them
    seconds: float  # that these took it, most of them waiting for the slowest; on a GPU, that giving the orders took
    resident_bytes: int  # in RAM


class EngineStats(msgspec.Struct, array_like=True, frozen=True):
    """The engine at the end of a step."""

    num_running: int
    num_waiting: int  # waiting for a turn, for blocks, or for a form that is compiled
    num_waiting_for_adapter: int
    total_blocks: int
    free_blocks: int  # never used or forgotten
    cached_blocks: int  # not in use, kept for their prefix
    block_size: int  # tokens
    num_steps: int
    num_preemptions: int
    prefix_cache_queries: int  # prompt tokens looked up
    prefix_cache_hits: int  # prompt tokens found
    prompt_tokens: int  # computed, cumulative
    generated_tokens: int  # cumulative
    adapter_device_bytes: int  # bytes of adapters on the device
    adapter_host_bytes: int  # bytes of adapters in host memory
    adapters: list[tuple[AdapterKey, int]] = []  # adapters in use on the device, with their number of requests
    num_not_finite: int = 0  # requests that ended because their logits were NaN or infinite, cumulative
    draft_tokens: int = 0  # checked, cumulative
    accepted_draft_tokens: int = 0  # of these, drawn as well
    num_forms: int = 0  # sequences that were given a form, cumulative, as are the next three
    num_forms_compiled: int = 0  # once for all who ask for the same
    form_seconds: float = 0.0  # that compiling them took in all
    num_forms_failed: int = 0  # sequences that ended because of their form
    host_blocks: int = 0  # of the cache, with a copy in host memory
    host_cache_bytes: int = 0  # that these take
    num_saved_blocks: int = 0  # copied to the host, cumulative, as are the next two
    num_restored_blocks: int = 0  # copied back
    move_seconds: float = 0.0  # between steps, for both
    disk_cache_bytes: int = 0  # of files with blocks
    num_blocks_written: int = 0  # to such files, cumulative, as are the next two
    num_blocks_read: int = 0
    num_bad_files: int = 0  # that could not be read, or were not what had been written
    ranks: list[RankStats] = []  # of a model that several compute

    @property
    def used_blocks(self) -> int:
        """The blocks that requests hold."""
        return self.total_blocks - self.free_blocks - self.cached_blocks

    @property
    def num_not_running(self) -> int:
        """The sequences that wait, for whatever it is."""
        return self.num_waiting + self.num_waiting_for_adapter


class StepOutput(Message, frozen=True):
    """Everything one step produced: one message per step, whatever the number of requests."""

    outputs: list[RequestOutput]
    stats: EngineStats


class Device(msgspec.Struct, array_like=True, frozen=True):
    """The device that an engine computes on."""

    name: str  # "cpu", "cuda:0"
    description: str  # as its driver calls it
    memory_bytes: int  # the device's whole memory


class EngineLimits(msgspec.Struct, array_like=True, frozen=True):
    """The limits of the loaded model."""

    architecture: str
    dtype: str
    quantization: str  # "": none
    vocab_size: int
    max_model_len: int  # prompt and output together, tokens
    max_adapter_rank: int
    max_num_seqs: int
    total_blocks: int
    block_size: int
    weight_bytes: int
    kv_cache_bytes: int
    kernel_backend: str
    device: Device
    hidden_size: int = 0
    pooling: ModelPooling = STATES_NOTHING
    labels: list[str] = []  # of classes, by the model's config.json; empty: it names none
    implementation: str = "native"  # or "transformers"
    drafts: Drafts = NO_DRAFTS  # what requests have that do not ask for others; none: no request may have any
    compiled_for: str = ""  # the instruction set or the GPU that its kernels are compiled for
    classifier: ClassifierFacts | None = None  # the head in place of a language model's: it generates no text


class EngineSized(Message, frozen=True):
    """Sent once, before anything is loaded. The engine waits for `LoadOn`."""

    needs: Needs
    devices: list[DeviceMemory]  # of this machine, the host first


class EngineReady(Message, frozen=True):
    """Sent once, after loading and profiling. But for `LoadOn`, nothing is sent to an engine before it."""

    limits: EngineLimits


class EngineFailed(Message, frozen=True):
    """Loading failed for a reason the operator can act on; the process exits after it."""

    reason: str


class LoadProgress(Message, frozen=True):
    """The progress of loading, sent while the model loads."""

    bytes_loaded: int
    bytes_total: int


class LoadWaits(Message, frozen=True):
    """Sent while loading waits for something, once and then as long as there is reason to."""

    what: str  # "its turn to load onto cuda:0"


class AdapterFacts(msgspec.Struct, array_like=True, frozen=True):
    """The result of reading an adapter and binding it to this model, tensor by tensor."""

    rank: int  # the largest
    size_bytes: int
    target_modules: list[str]  # short names, sorted: "q_proj", …
    warnings: list[str]
    whole: str = ""  # why it cannot be one of several in a composition; "": it can
    classifier: ClassifierFacts | None = None  # its classification head; None: it brings none


class AdapterStatus(msgspec.Struct, array_like=True, frozen=True):
    """How an adapter, or a weighted sum, stands after a step. One that was never reported is on disk."""

    key: AdapterKey
    order: int  # of the newest wish that this takes into account; 0: none
    tier: Residency  # HOST also if it is on the device and takes no more requests, to make room for another
    pinned: bool = False
    facts: AdapterFacts | None = None  # None: it was never read, it was forgotten, or it is a weighted sum
    problems: list[
        str
    ] = []  # why it got no further in this step: every tensor or field at fault; empty: nothing failed
    reason: str = ""  # their kind: a name of loraplex.v1.ErrorReason; "": there are too many pins


class AdaptersChanged(Message, frozen=True):
    """The adapters for which a wish arrived, or that changed, in one step."""

    statuses: list[AdapterStatus]


class Pong(Message, frozen=True):
    nonce: int
    stats: EngineStats


FromEngine = EngineSized | EngineReady | EngineFailed | LoadProgress | LoadWaits | StepOutput | AdaptersChanged | Pong
