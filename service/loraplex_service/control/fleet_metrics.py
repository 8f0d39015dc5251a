"""The part of the Prometheus page that says how a replica follows its fleet."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric

from loraplex_service.control.metric_families import gauge_family
from loraplex_service.fleet.figures import FleetFigures


def fleet_families(fleet: FleetFigures | None) -> Iterator[Metric]:
    """Without series where the server is on its own."""
    shown = fleet or FleetFigures()
    for name, text, value in (
        ("connected", "1 while the fleet's database can be used, and changes are taken.", shown.connected),
        ("last_change", "The number of the last change that is in force here.", shown.cursor),
        ("changes_behind", "Changes that are known of, and not in force here yet.", shown.behind),
        ("schema", "The schema of the database's tables, as it was when they were last read.", shown.schema),
        ("peers", "Other replicas that were seen in the last seconds.", shown.peers),
    ):
        yield gauge_family(f"loraplex_fleet_{name}", text, (), [] if fleet is None else [((), value)])
    for name, text, value in (
        ("changes_applied", "Changes of other replicas that came into force here.", shown.applied),
        ("changes_passed_over", "Changes that could not be read.", shown.passed_over),
        ("database_failures", "Times that the fleet's database could not be used.", shown.lost),
    ):
        yield CounterMetricFamily(f"loraplex_fleet_{name}", text, None if fleet is None else value)
