"""What the ranks of a model exchange and hold, as families of the metrics page."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import Metric

from loraplex_engine.link.messages import EngineStats, RankStats
from loraplex_service.control.metric_families import counter_family, gauge_family
from loraplex_service.control.metrics_snapshot import ModelSnapshot
from loraplex_service.telemetry.series import Counter

_NAMES = ("model", "rank")
_COUNTERS: Sequence[tuple[str, str, Callable[[RankStats], float]]] = (
    ("loraplex_rank_sums", "Tensors that were added up over the ranks of a stage.", lambda rank: rank.sums),
    ("loraplex_rank_gatherings", "Tensors that were gathered from these ranks.", lambda rank: rank.gatherings),
    ("loraplex_rank_passes", "Hidden states that were given to the next stage.", lambda rank: rank.passes),
    ("loraplex_rank_exchanged_bytes", "Bytes of the tensors that a rank gave to these.", lambda rank: rank.nbytes),
    (
        "loraplex_rank_exchange_seconds",
        "Time that these took a rank, most of it waiting for the slowest.",
        lambda rank: rank.seconds,
    ),
)


def rank_families(stats: Sequence[tuple[ModelSnapshot, EngineStats]]) -> Iterator[Metric]:
    """The figures of models that several ranks compute, as of the last heartbeat."""
    ranks = [((model.name, str(number)), rank) for model, last in stats for number, rank in enumerate(last.ranks)]
    for name, text, value in _COUNTERS:
        counter = Counter()
        counter.values = {labels: value(rank) for labels, rank in ranks}
        yield counter_family(name, text, _NAMES, counter)
    memory = [(labels, float(rank.resident_bytes)) for labels, rank in ranks]
    text = "Memory of a rank that is in RAM, shared pages included."
    yield gauge_family("loraplex_rank_resident_memory_bytes", text, _NAMES, memory)
