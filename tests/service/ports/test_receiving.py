"""How large the messages of each method may be."""

import pytest

from loraplex_service.ports.receiving import ReceiveLimits
from loraplex_service.validation.limits import TOTALS

LIMITS = ReceiveLimits(request_bytes=10, batch_bytes=20)


@pytest.mark.parametrize(
    ("method", "size"),
    [
        ("/loraplex.v1.InferenceService/Generate", 10),
        ("/loraplex.v1.InferenceService/CancelGeneration", 10),
        ("/loraplex.v1.PoolingService/Embed", 10),
        ("/loraplex.v1.TokenizerService/Tokenize", 10),
        ("/loraplex.v1.InferenceService/BatchGenerate", 20),
        ("/loraplex.v1.ModelService/ListModels", 256 << 10),
        ("/grpc.health.v1.Health/Watch", 256 << 10),
    ],
)
def test_a_method_takes_no_more_than_it_needs(method: str, size: int) -> None:
    assert LIMITS.bytes_of(method) == size


def test_an_adapter_with_all_that_its_limits_allow_can_be_updated() -> None:
    assert LIMITS.bytes_of("/loraplex.v1.AdapterService/UpdateAdapter") > TOTALS["Adapter"].characters


def test_a_port_takes_what_its_largest_method_takes() -> None:
    assert LIMITS.largest(["loraplex.v1.InferenceService", "loraplex.v1.TokenizerService"]) == 20
    assert LIMITS.largest(["loraplex.v1.ModelService", "loraplex.v1.AdapterService"]) == 2 << 20
    assert LIMITS.largest([]) == 256 << 10
