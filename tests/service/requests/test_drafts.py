"""Which drafts a request has, and what callers are told of them."""

from dataclasses import replace

import grpc
import msgspec
import pytest

from loraplex.v1.generation_pb2 import DRAFT_KIND_MODEL, DRAFT_KIND_NGRAM, DRAFT_KIND_OFF, Drafts
from loraplex_engine.link import drafts as link
from loraplex_engine.link.drafts import NO_DRAFTS, DraftKind
from loraplex_service.errors import FeatureUnsupported
from loraplex_service.requests.drafts import wanted_drafts
from tests.service.data_plane import DataPlane, failure, make_spec
from tests.service.fake_engine import LIMITS

NGRAM = link.Drafts(DraftKind.NGRAM, 8)


@pytest.mark.parametrize(
    ("offered", "asked", "most"),
    [
        (NO_DRAFTS, None, 0),
        (NO_DRAFTS, Drafts(draft_kind=DRAFT_KIND_OFF), 0),
        (NGRAM, None, 8),
        (NGRAM, Drafts(), 8),
        (NGRAM, Drafts(draft_kind=DRAFT_KIND_NGRAM), 8),
        (NGRAM, Drafts(draft_kind=DRAFT_KIND_OFF), 0),
        (NGRAM, Drafts(draft_kind=DRAFT_KIND_OFF, max_draft_tokens=3), 0),
        (NGRAM, Drafts(max_draft_tokens=3), 3),
        (NGRAM, Drafts(max_draft_tokens=30), 8),
    ],
)
def test_a_request_has_its_models_drafts_or_fewer(offered: link.Drafts, asked: Drafts | None, most: int) -> None:
    spec = make_spec() if asked is None else make_spec(drafts=asked)
    assert wanted_drafts(spec, msgspec.structs.replace(LIMITS, drafts=offered), "spec").most == most


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        (Drafts(), DraftKind.MODEL),
        (Drafts(draft_kind=DRAFT_KIND_MODEL), DraftKind.MODEL),
        (Drafts(draft_kind=DRAFT_KIND_NGRAM), DraftKind.NGRAM),
    ],
)
def test_a_model_with_a_small_one_has_both_kinds(asked: Drafts, kind: DraftKind) -> None:
    limits = msgspec.structs.replace(LIMITS, drafts=link.Drafts(DraftKind.MODEL, 4))
    assert wanted_drafts(make_spec(drafts=asked), limits, "spec") == link.Drafts(kind, 4)


def test_drafts_of_a_small_model_are_refused_where_there_is_none() -> None:
    limits = msgspec.structs.replace(LIMITS, drafts=NGRAM)
    with pytest.raises(FeatureUnsupported, match="no drafts of kind model"):
        wanted_drafts(make_spec(drafts=Drafts(draft_kind=DRAFT_KIND_MODEL)), limits, "spec")


@pytest.mark.parametrize("asked", [Drafts(), Drafts(max_draft_tokens=2), Drafts(draft_kind=DRAFT_KIND_NGRAM)])
async def test_drafts_that_the_model_does_not_have_are_refused(plane: DataPlane, asked: Drafts) -> None:
    failed = await failure(plane.generate(make_spec(drafts=asked)))
    assert (failed.code, failed.reason) == (grpc.StatusCode.UNIMPLEMENTED, "FEATURE_UNSUPPORTED")
    assert failed.fields == ["spec.drafts"]


async def test_the_engine_gets_the_drafts_of_each_output(plane: DataPlane) -> None:
    limits = msgspec.structs.replace(plane.engine.limits, drafts=NGRAM)
    plane.models.models["demo"] = replace(plane.models.models["demo"], limits=limits)
    await plane.generate(make_spec(drafts=Drafts(max_draft_tokens=5), sampling={"n": 2}))
    assert [request.drafts for request in plane.engine.requests] == [link.Drafts(DraftKind.NGRAM, 5)] * 2


async def test_the_usage_says_how_many_drafts_were_checked_and_right(plane: DataPlane) -> None:
    plane.engine.drafts_per_step = (3, 2)
    usage = (await plane.generate(make_spec(stopping={"max_tokens": 4}, sampling={"n": 2}))).usage
    assert (usage.draft_tokens, usage.accepted_draft_tokens) == (24, 16)
