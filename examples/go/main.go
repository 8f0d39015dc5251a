// Stream, deadline, retry, cancel, error details: ./example 127.0.0.1:50051 storyteller
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "loraplex/v1"
)

// UNAVAILABLE may be tried again, and nothing else. A deadline, in the context of a call, bounds all attempts together.
// Before 1.40, gRPC tries again only where the environment has GRPC_GO_RETRY=on.
const retries = `{"methodConfig": [{"name": [{}], "retryPolicy": {
  "maxAttempts": 3, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,
  "retryableStatusCodes": ["UNAVAILABLE"]}}]}`

func main() {
	address, model := os.Args[1], os.Args[2]
	connection, err := grpc.Dial(address, grpc.WithInsecure(), grpc.WithDefaultServiceConfig(retries))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	client := pb.NewInferenceServiceClient(connection)
	if err := stream(client, model); err != nil {
		log.Fatal(err)
	}
	exceedDeadline(client, model)
	cancelStream(client, model)
	readError(client, model)
}

func stream(client pb.InferenceServiceClient, model string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	request := &pb.StreamGenerateRequest{Spec: spec(model, &pb.Stopping{MaxTokens: proto.Int32(16)}, nil)}
	events, err := client.StreamGenerate(ctx, request, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	fmt.Println("stream:")
	for {
		event, err := events.Recv()
		if errors.Is(err, io.EOF) {
			fmt.Println()
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Print(event.GetDelta().GetText())
	}
}

func exceedDeadline(client pb.InferenceServiceClient, model string) {
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	endless := &pb.Stopping{MaxTokens: proto.Int32(2000), IgnoreEos: proto.Bool(true)}
	_, err := client.Generate(ctx, &pb.GenerateRequest{Spec: spec(model, endless, nil)})
	fmt.Println("deadline:", status.Code(err))
}

// Cancelling the context ends the call, and frees what the server holds for it.
func cancelStream(client pb.InferenceServiceClient, model string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	request := &pb.StreamGenerateRequest{Spec: spec(model, &pb.Stopping{MaxTokens: proto.Int32(1000)}, nil)}
	events, err := client.StreamGenerate(ctx, request)
	for err == nil {
		if _, err = events.Recv(); err == nil {
			cancel()
		}
	}
	fmt.Println("cancel:", status.Code(err))
}

func readError(client pb.InferenceServiceClient, model string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	request := &pb.GenerateRequest{Spec: spec(model, nil, &pb.Sampling{Temperature: proto.Float64(-1)})}
	_, err := client.Generate(ctx, request)
	said := status.Convert(err)
	fmt.Println("error:", said.Code(), said.Message())
	for _, detail := range said.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			fmt.Println("  ErrorInfo", detail.Reason)
		case *errdetails.BadRequest:
			for _, each := range detail.FieldViolations {
				fmt.Printf("  %s: %s\n", each.Field, each.Description)
			}
		}
	}
}

func spec(model string, stopping *pb.Stopping, sampling *pb.Sampling) *pb.GenerateSpec {
	prompt := &pb.Prompt{Content: &pb.Prompt_Text{Text: "Once upon a time"}}
	return &pb.GenerateSpec{Model: model, Prompt: prompt, Stopping: stopping, Sampling: sampling}
}
