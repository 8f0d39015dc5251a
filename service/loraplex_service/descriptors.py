"""The limit on files and sockets that the process may have open."""

import logging
import resource

from loraplex_service.config import ServiceConfig

logger = logging.getLogger(__name__)

SPARE = 512  # for models, engines, files of adapters, logs


def descriptors_needed(config: ServiceConfig) -> int:
    """The number of descriptors that the process needs when all allowed connections are open."""
    listeners = (config.listen, config.admin_listen, config.health_listen, config.metrics_listen, config.http_listen)
    return config.limits.connections * sum(listener is not None for listener in listeners) + SPARE


def raise_descriptor_limit(needed: int) -> None:
    """Raise the limit as far as the system allows.

    Without descriptors no connection is accepted and no engine starts.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        logger.warning(
            "the process may open %d files and sockets, and limits.connections lets callers take up to %d: raise the "
            "limit (ulimit -n), or lower limits.connections",
            allowed,
            needed,
        )
