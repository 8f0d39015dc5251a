"""Sum of the events of a generation."""

import grpc

from loraplex.errors import IncompleteStream, local
from loraplex.v1 import inference_pb2


class GenerationEvents:
    """Collects the events of one stream, in order.

    `started` is None until the first event has come, and `completed` until the last one has. A stream without its last
    event did not succeed.
    """

    def __init__(self) -> None:
        self.started: inference_pb2.Started | None = None
        self.completed: inference_pb2.Completed | None = None
        self._outputs: dict[int, _Output] = {}
        self._prompt_logprobs: list[inference_pb2.TokenLogprob] = []

    def add(self, message: inference_pb2.StreamGenerateResponse) -> None:
        match message.WhichOneof("event"):
            case "started":
                self.started = message.started
            case "prompt_logprobs":
                self._prompt_logprobs.extend(message.prompt_logprobs.logprobs)
            case "delta":
                self._output(message.delta.output_index).deltas.append(message.delta)
            case "finished":
                self._output(message.finished.output_index).finished = message.finished
            case "completed":
                self.completed = message.completed
            case None:
                pass  # an event of a newer server, which may be passed over

    def check_complete(self) -> None:
        """Raise IncompleteStream unless the last event has come."""
        if self.completed is None:
            raise local(
                IncompleteStream,
                grpc.StatusCode.DATA_LOSS,
                "the stream ended with status OK but without its last message (Completed): "
                "something between client and server cut it; what came is not a whole answer",
            )

    def response(self) -> inference_pb2.GenerateResponse:
        """Build what Generate would have returned. Raises IncompleteStream unless the last event has come."""
        self.check_complete()
        assert self.completed is not None
        response = inference_pb2.GenerateResponse(
            outputs=[self._outputs[index].build() for index in sorted(self._outputs)],
            prompt_logprobs=self._prompt_logprobs,
            usage=self.completed.usage,
            timings=self.completed.timings,
            seed=self.completed.seed if self.completed.HasField("seed") else None,
        )
        if self.started is not None:
            response.request_id = self.started.request_id
            response.client_request_id = self.started.client_request_id
            response.labels.update(self.started.labels)
            response.target.CopyFrom(self.started.target)
        return response

    def _output(self, index: int) -> "_Output":
        return self._outputs.setdefault(index, _Output())


class _Output:
    """One output as far as it has come."""

    def __init__(self) -> None:
        self.deltas: list[inference_pb2.Delta] = []
        self.finished: inference_pb2.Finished | None = None

    def build(self) -> inference_pb2.GenerateOutput:
        return inference_pb2.GenerateOutput(
            text="".join(delta.text for delta in self.deltas),
            token_ids=[token for delta in self.deltas for token in delta.token_ids],
            logprobs=[logprob for delta in self.deltas for logprob in delta.logprobs],
            finished=self.finished,
            reasoning="".join(delta.reasoning for delta in self.deltas),
            tool_calls=[call for delta in self.deltas for call in delta.tool_calls],
        )
