"""An upload of which an engine is told how far it is."""

from loraplex_engine.link.messages import UploadEnded, UploadGrew, WantAdapter
from loraplex_engine.link.uploads import NEWS_BYTES
from tests.engine.link.conftest import KEY, Wire


async def test_the_engine_is_told_of_the_first_bytes_of_many_more_and_of_the_last(wire: Wire) -> None:
    size = 2 * NEWS_BYTES
    upload = wire.client.adapters.follow_upload("/incoming/x", size)
    for num_bytes in (1, 2, NEWS_BYTES, NEWS_BYTES + 1, size - 1, size):
        upload.grew(num_bytes)
    upload.end()
    told = [UploadGrew(1, "/incoming/x", size, num_bytes) for num_bytes in (1, NEWS_BYTES + 1, size)]
    assert wire.sent == [*told, UploadEnded(1)]


async def test_a_wish_names_the_upload_and_a_later_one_does_not(wire: Wire) -> None:
    wire.client.adapters.follow_upload("/incoming/x", 10)
    upload = wire.client.adapters.follow_upload("/incoming/y", 10)
    wire.client.adapters.start_loading(KEY, "/a", is_hashed=True, upload=upload)
    assert wire.wishes == [WantAdapter(KEY, 1, "/a", is_hashed=True, upload=2)]
    wire.say(1)
    wire.client.adapters.start_loading(KEY, "/a")
    assert wire.wishes[-1].upload == 0


async def test_the_next_life_of_an_engine_knows_nothing_of_an_upload(wire: Wire) -> None:
    upload = wire.client.adapters.follow_upload("/incoming/x", 10)
    wire.client.fail(RuntimeError("the engine ended"))
    upload.grew(10)
    upload.end()
    assert wire.sent == []
    following = Wire()
    following.client.adapters.start_loading(KEY, "/a", upload=upload)
    assert following.wishes == [WantAdapter(KEY, 1, "/a")]
