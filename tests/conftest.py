"""Without a GPU the Triton kernels are tested under Triton's interpreter."""

import os
from pathlib import Path

# Triton decides when it is first imported, and transformers imports it: so before any test module is.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
