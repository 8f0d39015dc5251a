"""vLLM's two gRPC definitions: of its own front end (`vllm`), and of engines behind gateways (`vllm.grpc.engine`)."""
