"""Errors about adapters."""

# AdapterError
# ├── AdapterRejected      the files are not an adapter that can serve here: every problem is named
# ├── AdapterNotFound      no such adapter or version
# ├── SourceNotAllowed     the reference lies outside the roots that the operator allows
# └── AdapterConflict      the call contradicts the adapter's state: another etag, the current version, too many pins

# Why an adapter was rejected, by the names of loraplex.v1.ErrorReason.
INVALID = "ADAPTER_INVALID"
BASE_MISMATCH = "ADAPTER_BASE_MISMATCH"  # its shapes are those of another base model
TOO_LARGE = "ADAPTER_TOO_LARGE"  # it needs more memory than all adapters together may use
UNREADABLE = "ADAPTER_UNREADABLE"  # the disk failed: the files may be good
COLD = "ADAPTER_COLD"  # nothing is wrong with it: it was unloaded before it could be used

MAX_PROBLEMS = 1000  # a file can hold tens of thousands of tensors that are all wrong


class AdapterError(Exception):
    """Base of all errors about adapters. The message says what is wrong, where, and what to do."""


class AdapterRejected(AdapterError):  # noqa: N818 - it is a verdict, and reads as one where it is raised
    """The adapter cannot be served. `problems` names every field, file or tensor at fault, `reason` their kind."""

    def __init__(self, problems: list[str], reason: str = INVALID) -> None:
        if len(problems) > MAX_PROBLEMS:
            problems = [*problems[:MAX_PROBLEMS], f"and {len(problems) - MAX_PROBLEMS} more"]
        super().__init__("; ".join(problems))
        self.problems = problems
        self.reason = reason


class AdapterNotFound(AdapterError):  # noqa: N818
    """There is no adapter, or no version of it, with that name."""


class SourceNotAllowed(AdapterError):  # noqa: N818
    """The reference is malformed or leads out of the allowed roots."""


class AdapterConflict(AdapterError):  # noqa: N818
    """The adapter's state does not allow the operation."""
