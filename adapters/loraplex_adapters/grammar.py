"""The grammar of names: ids, digests and versions, and the resource names that are made of them."""

import re

ID = r"[a-z0-9][a-z0-9._-]{0,62}"  # of a model, a tenant, an adapter or a route
ID_RULE = "1 to 63 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit"
DIGEST = r"[0-9a-f]{64}"  # SHA-256
VERSION = r"[0-9a-f]{12,64}"  # the first digits of a digest, or all

MODEL_NAME = re.compile(rf"models/(?P<model>{ID})")
TENANT_NAME = re.compile(rf"tenants/(?P<tenant>{ID})")
ADAPTER_NAME = re.compile(rf"tenants/(?P<tenant>{ID})/adapters/(?P<adapter>{ID})(?:@(?P<version>{VERSION}))?")
ROUTE_NAME = re.compile(rf"tenants/(?P<tenant>{ID})/routes/(?P<route>{ID})")


def is_id(text: str) -> bool:
    return re.fullmatch(ID, text) is not None


def is_digest(text: str) -> bool:
    return re.fullmatch(DIGEST, text) is not None
