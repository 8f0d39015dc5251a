"""An engine that loads is silent once no news came through all slices of the timeout."""

from loraplex_service.models.load_signs import SLICES, LoadSigns


def slices(signs: LoadSigns, count: int) -> list[bool]:
    return [signs.is_silent() for _ in range(count)]


def test_without_news_the_timeout_ends_in_the_slice_after_them() -> None:
    assert slices(LoadSigns(), SLICES + 1) == [False] * SLICES + [True]


def test_news_begin_the_timeout_anew() -> None:
    signs = LoadSigns()
    for number in range(5):
        signs.note(f"step {number}")
        assert not any(slices(signs, SLICES))
    assert signs.state == "step 4"
    assert signs.is_silent()


def test_while_it_waits_for_an_answer_its_silence_does_not_count() -> None:
    signs = LoadSigns()
    slices(signs, SLICES)
    signs.is_asking = True
    assert not any(slices(signs, 3 * SLICES))
    signs.is_asking = False
    assert slices(signs, SLICES + 1)[-1]
