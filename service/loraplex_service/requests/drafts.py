"""The drafts that a request may have: those of its model, or fewer, or others that the model has."""

from loraplex.v1.generation_pb2 import (
    DRAFT_KIND_MODEL,
    DRAFT_KIND_NGRAM,
    DRAFT_KIND_OFF,
    DRAFT_KIND_UNSPECIFIED,
    GenerateSpec,
)
from loraplex_engine.link.drafts import NO_DRAFTS, DraftKind, Drafts
from loraplex_engine.link.messages import EngineLimits
from loraplex_service.errors import FeatureUnsupported

KINDS = {DRAFT_KIND_NGRAM: DraftKind.NGRAM, DRAFT_KIND_MODEL: DraftKind.MODEL}


def wanted_drafts(spec: GenerateSpec, limits: EngineLimits, path: str) -> Drafts:
    """The drafts of a request to the model with these limits. Raises FeatureUnsupported if it has no such drafts."""
    asked, offered = spec.drafts, limits.drafts
    if asked.draft_kind == DRAFT_KIND_OFF:
        return NO_DRAFTS
    if not spec.HasField("drafts"):
        return offered
    kind = offered.kind if asked.draft_kind == DRAFT_KIND_UNSPECIFIED else KINDS[asked.draft_kind]
    if not offered.offers(kind):
        problem = f"the model has no drafts of kind {kind}: leave them out, or have them configured"
        raise FeatureUnsupported(f"{path}.drafts", problem)
    return Drafts(
        kind, min(asked.max_draft_tokens, offered.most) if asked.HasField("max_draft_tokens") else offered.most
    )
