// Stream, deadline, retry, cancel, error details: java Example 127.0.0.1:50051 storyteller
import com.google.protobuf.Any;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import io.grpc.Context;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import loraplex.v1.GenerateRequest;
import loraplex.v1.GenerateSpec;
import loraplex.v1.InferenceServiceGrpc;
import loraplex.v1.InferenceServiceGrpc.InferenceServiceBlockingStub;
import loraplex.v1.Prompt;
import loraplex.v1.Sampling;
import loraplex.v1.Stopping;
import loraplex.v1.StreamGenerateRequest;

public final class Example {
  // UNAVAILABLE may be tried again, and nothing else. A deadline of a call bounds all attempts together.
  private static final Map<String, ?> RETRIES =
      Map.of(
          "methodConfig",
          List.of(
              Map.of(
                  "name",
                  List.of(Map.of()),
                  "retryPolicy",
                  Map.of(
                      "maxAttempts", 3.0,
                      "initialBackoff", "0.1s",
                      "maxBackoff", "2s",
                      "backoffMultiplier", 2.0,
                      "retryableStatusCodes", List.of("UNAVAILABLE")))));

  public static void main(String[] arguments) throws Exception {
    ManagedChannel channel =
        ManagedChannelBuilder.forTarget(arguments[0])
            .usePlaintext()
            .enableRetry()
            .defaultServiceConfig(RETRIES)
            .build();
    try {
      InferenceServiceBlockingStub stub = InferenceServiceGrpc.newBlockingStub(channel);
      GenerateSpec spec =
          GenerateSpec.newBuilder()
              .setModel(arguments[1])
              .setPrompt(Prompt.newBuilder().setText("Once upon a time"))
              .build();
      stream(stub.withWaitForReady(), spec);
      exceedDeadline(stub, spec);
      cancel(stub, spec);
      readError(stub, spec);
    } finally {
      channel.shutdownNow().awaitTermination(5, TimeUnit.SECONDS);
    }
  }

  private static void stream(InferenceServiceBlockingStub stub, GenerateSpec spec) {
    System.out.println("stream:");
    stub.withDeadlineAfter(60, TimeUnit.SECONDS)
        .streamGenerate(streamed(spec, 16))
        .forEachRemaining(event -> System.out.print(event.getDelta().getText()));
    System.out.println();
  }

  private static void exceedDeadline(InferenceServiceBlockingStub stub, GenerateSpec spec) {
    Stopping endless = Stopping.newBuilder().setMaxTokens(2000).setIgnoreEos(true).build();
    try {
      stub.withDeadlineAfter(100, TimeUnit.MILLISECONDS)
          .generate(asked(spec.toBuilder().setStopping(endless)));
    } catch (StatusRuntimeException error) {
      System.out.println("deadline: " + error.getStatus().getCode());
    }
  }

  // Cancelling the context ends the calls that were made in it, and frees what the server holds for them.
  private static void cancel(InferenceServiceBlockingStub stub, GenerateSpec spec) {
    Context.CancellableContext context = Context.current().withCancellation();
    context.run(
        () -> {
          try {
            stub.withDeadlineAfter(60, TimeUnit.SECONDS)
                .streamGenerate(streamed(spec, 1000))
                .forEachRemaining(event -> context.cancel(null));
          } catch (StatusRuntimeException error) {
            System.out.println("cancel: " + error.getStatus().getCode());
          }
        });
  }

  private static void readError(InferenceServiceBlockingStub stub, GenerateSpec spec) throws Exception {
    Sampling impossible = Sampling.newBuilder().setTemperature(-1).build();
    try {
      stub.withDeadlineAfter(60, TimeUnit.SECONDS)
          .generate(asked(spec.toBuilder().setSampling(impossible)));
    } catch (StatusRuntimeException error) {
      Status status = error.getStatus();
      System.out.println("error: " + status.getCode() + " " + status.getDescription());
      for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
        if (detail.is(ErrorInfo.class)) {
          System.out.println("  ErrorInfo " + detail.unpack(ErrorInfo.class).getReason());
        } else if (detail.is(BadRequest.class)) {
          detail
              .unpack(BadRequest.class)
              .getFieldViolationsList()
              .forEach(each -> System.out.println("  " + each.getField() + ": " + each.getDescription()));
        }
      }
    }
  }

  private static StreamGenerateRequest streamed(GenerateSpec spec, int maxTokens) {
    Stopping stopping = Stopping.newBuilder().setMaxTokens(maxTokens).build();
    return StreamGenerateRequest.newBuilder().setSpec(spec.toBuilder().setStopping(stopping)).build();
  }

  private static GenerateRequest asked(GenerateSpec.Builder spec) {
    return GenerateRequest.newBuilder().setSpec(spec).build();
  }
}
