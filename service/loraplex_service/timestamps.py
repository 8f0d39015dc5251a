"""Conversion of times to the messages of the contract."""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def timestamp(seconds: float) -> Timestamp:
    """Convert seconds since the epoch."""
    message = Timestamp()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def duration(seconds: float) -> Duration:
    """Convert seconds."""
    message = Duration()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def duration_seconds(duration: Duration) -> float:
    return float(duration.seconds) + duration.nanos * 1e-9
