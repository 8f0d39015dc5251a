"""Adapters in S3-compatible object stores and in repositories of the hub, under allowed prefixes.

Only the operator sets a store's host and credentials: a reference names a bucket or a repository, never a host.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from loraplex_adapters.errors import INVALID, UNREADABLE, AdapterRejected, SourceNotAllowed
from loraplex_adapters.files.config import MAX_CONFIG_BYTES
from loraplex_adapters.files.source import CONFIG_FILE, MAX_REFERENCE_LENGTH, TEXT_FILES, WEIGHTS_FILE
from loraplex_adapters.files.trust import MAX_SIGNATURE_BYTES, SIGNATURE_FILE

_PART = r"[A-Za-z0-9][A-Za-z0-9._=-]{0,127}"
_OBJECTS = re.compile(rf"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{{1,62}})/(?P<prefix>{_PART}(?:/{_PART})*)/?")
_REPOSITORY = re.compile(
    rf"hf://(?P<repository>{_PART}/{_PART})@(?P<revision>[0-9a-f]{{40}})(?:/(?P<folder>{_PART}(?:/{_PART})*))?/?"
)
_CHUNK = 8 << 20


class RemoteSources:
    """Fetches adapters. Its methods wait for the network, so call them in a thread that may block."""

    def __init__(
        self,
        allowed: Sequence[str],  # prefixes such as "s3://adapters/team/" or "hf://acme/"
        object_store: Mapping[str, str],  # of obstore's S3Store: endpoint, region, …; credentials are best left out
        max_bytes: int,  # of one adapter's weights
        hub_endpoint: str | None = None,
    ) -> None:
        self._allowed = tuple(prefix if prefix.endswith("/") else f"{prefix}/" for prefix in allowed)
        self._object_store = dict(object_store)
        self._limits = {
            CONFIG_FILE: MAX_CONFIG_BYTES,
            WEIGHTS_FILE: max_bytes,
            SIGNATURE_FILE: MAX_SIGNATURE_BYTES,
            **TEXT_FILES,
        }
        self._hub_endpoint = hub_endpoint

    @staticmethod
    def is_remote(reference: str) -> bool:
        return reference.startswith(("s3://", "hf://"))

    def fetch(self, reference: str, directory: Path) -> None:
        """Bring the files of an adapter into an empty directory.

        Raises SourceNotAllowed, and AdapterRejected for files that are missing, too large, or cannot be fetched now.
        """
        objects, repository = _OBJECTS.fullmatch(reference), _REPOSITORY.fullmatch(reference)
        if len(reference) > MAX_REFERENCE_LENGTH or (objects is None and repository is None):
            expected = "s3://{bucket}/{prefix} or hf://{owner}/{name}@{commit}, with all 40 digits, is expected"
            raise SourceNotAllowed(f"source {reference[:200]!r}: {expected}")
        # A whole repository is a prefix, too: what follows its name begins like a path.
        if not f"{reference.rstrip('/')}/".replace("@", "/@").startswith(self._allowed):
            raise SourceNotAllowed(f"source {reference[:200]!r}: it is under none of the allowed remote sources")
        try:
            if objects is not None:
                self._fetch_objects(objects["bucket"], objects["prefix"], directory)
            elif repository is not None:
                name, revision, folder = repository["repository"], repository["revision"], repository["folder"]
                self._fetch_repository(name, revision, folder, directory)
        except AdapterRejected:
            raise
        except Exception as error:  # each library has a transport of its own, and that its own errors
            problem = f"it cannot be fetched: {type(error).__name__}: {error}"
            raise AdapterRejected([problem], UNREADABLE) from error

    # ---- object stores ---------------------------------------------------------------------------------------------

    def _fetch_objects(self, bucket: str, prefix: str, directory: Path) -> None:
        import obstore  # only where it is needed
        from obstore.store import S3Store

        insecure = self._object_store.get("endpoint", "").startswith("http://")
        config = cast(Any, self._object_store)
        store = S3Store(bucket, prefix=prefix, config=config, client_options={"allow_http": insecure})
        for name in self._limits:
            try:
                found = obstore.get(store, name)
                self._check_size(name, found.meta["size"])
                with (directory / name).open("xb") as file:
                    for chunk in found.stream(min_chunk_size=_CHUNK):
                        file.write(chunk)
            except FileNotFoundError as error:
                self._check_optional(name, error)

    # ---- the hub ---------------------------------------------------------------------------------------------------

    def _fetch_repository(self, repository: str, revision: str, folder: str | None, directory: Path) -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url  # a third of a second to import
        from huggingface_hub.errors import EntryNotFoundError

        work = directory / "download"
        for name in self._limits:
            url = hf_hub_url(repository, name, subfolder=folder, revision=revision, endpoint=self._hub_endpoint)
            try:
                self._check_size(name, get_hf_file_metadata(url, endpoint=self._hub_endpoint).size or 0)
                file = hf_hub_download(
                    repository,
                    name,
                    subfolder=folder,
                    revision=revision,
                    local_dir=work,
                    endpoint=self._hub_endpoint,
                )
            except EntryNotFoundError as error:
                self._check_optional(name, error)
            else:
                Path(file).rename(directory / name)
        shutil.rmtree(work, ignore_errors=True)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _check_size(self, name: str, num_bytes: int) -> None:
        if num_bytes > self._limits[name]:
            raise AdapterRejected([f"{name}: {num_bytes} bytes, at most {self._limits[name]} are allowed"], INVALID)

    def _check_optional(self, name: str, error: Exception) -> None:
        if name in (CONFIG_FILE, WEIGHTS_FILE):
            raise AdapterRejected([f"{name} is missing"], INVALID) from error
