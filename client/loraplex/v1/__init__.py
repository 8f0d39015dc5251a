"""Messages and services of the contract `loraplex.v1`, generated from proto/loraplex/v1 by proto/stubs.sh."""
