"""The messages and services of others' gRPC definitions, generated from proto/dialects by proto/stubs.sh."""
