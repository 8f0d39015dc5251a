"""A whole service on real gRPC ports, with scripted engines in threads behind it."""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from loraplex import AsyncAdminClient, AsyncClient
from loraplex_service.adapters.config import AdapterConfig
from loraplex_service.admission.tenants import TenantConfig
from loraplex_service.app import Addresses, running
from loraplex_service.assembly import Application
from loraplex_service.config import ServiceConfig
from loraplex_service.models.config import HostedModelConfig, SupervisionConfig
from tests.service.scripted_engine import ScriptedCore, ThreadedEngines

Engines = dict[str, ThreadedEngines]


def write_adapter(directory: Path, rank: int = 4, seed: int = 0) -> Path:
    """The files of an adapter, whose content depends on the seed."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": np.full((rank, 4), seed, dtype=np.float32),
        f"{module}.lora_B.weight": np.zeros((4, rank), dtype=np.float32),
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@dataclass
class ControlPlane:
    """A running service, its engines by the names of their models, and clients of its two ports."""

    app: Application
    engines: Engines
    client: AsyncClient
    admin: AsyncAdminClient
    roots: Path  # where adapters may lie
    addresses: Addresses

    def core(self, model: str = "tiny") -> ScriptedCore:
        return self.engines[model].core


@asynccontextmanager
async def control_plane(
    model_directory: Path,
    roots: Path,
    prepare: Callable[[ScriptedCore], None] = lambda core: None,
    adapters: tuple[AdapterConfig, ...] = (),
    drain_grace_seconds: float = 20.0,
    state_directory: str = "",
    sources: tuple[str, ...] = (),
    object_store: dict[str, str] | None = None,
    models: tuple[str, ...] = ("tiny", "other"),
    tenants: dict[str, TenantConfig] | None = None,
    hosted: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> AsyncIterator[ControlPlane]:
    """Two models, "tiny" which is loaded and "other" which is not. `hosted`: more of the configuration of each,
    `settings`: of the server."""
    config = ServiceConfig(
        models=tuple(
            HostedModelConfig(
                name=name,
                model=str(model_directory),
                labels={"team": "a"},
                load=name == "tiny",
                **hosted,
            )
            for name in models
        ),
        state_directory=state_directory,
        adapter_sources=sources,
        object_store=object_store or {},
        adapters=adapters,
        adapter_roots=(str(roots),),
        supervision=SupervisionConfig(heartbeat_seconds=0.02, restart_delay_seconds=0.01),
        drain_grace_seconds=drain_grace_seconds,
        tenants=tenants or {},
        **settings,
    ).with_free_ports()
    engines = {model.name: ThreadedEngines() for model in config.models}
    for threaded in engines.values():
        threaded.prepare = prepare
    async with running(config, lambda model: engines[model.name].launch) as (app, addresses):
        await app.host.get("tiny").wait_settled()
        async with AsyncClient(addresses.data) as client, AsyncAdminClient(addresses.admin) as admin:
            yield ControlPlane(app, engines, client, admin, roots, addresses)
