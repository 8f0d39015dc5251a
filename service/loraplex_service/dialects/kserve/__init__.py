"""KServe's inference protocol, version 2, with Triton's streams and repository, for tritonclient."""
