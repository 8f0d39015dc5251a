"""Counters and histograms, by labels."""

from loraplex_service.telemetry.series import MAX_SERIES, OTHER, Counter, Histogram


def test_label_values_of_callers_cannot_fill_the_memory() -> None:
    counter = Counter()
    for number in range(MAX_SERIES + 10):
        counter.add((f"tenant-{number}", "tiny"))
    assert len(counter.values) == MAX_SERIES + 1
    assert counter.values[OTHER, OTHER] == 10


def test_a_series_that_ends_makes_room_for_another() -> None:
    counter = Counter()
    for number in range(MAX_SERIES + 1):
        counter.add((f"tenant-{number}", "tiny"))
    counter.drop(lambda labels: labels == ("tenant-7", "tiny"))
    counter.add(("late", "tiny"))
    counter.add(("later", "tiny"))
    assert counter.values["late", "tiny"] == 1
    assert counter.values[OTHER, OTHER] == 2


def test_a_value_falls_into_the_first_bucket_that_holds_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for seconds in (0.5, 1.0, 1.5, 2.5):
        histogram.observe(("tiny",), seconds)
    assert histogram.values["tiny",].counts == [2, 1, 1]
    assert histogram.values["tiny",].total == 5.5
