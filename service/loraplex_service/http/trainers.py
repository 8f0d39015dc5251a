"""What trainers call beside generating and publishing: what is not needed here, and what is done in another way.

The paths are vLLM's, and those that TRL and prime-rl add to it.
"""

from collections.abc import Mapping

PUBLISH = "publish an adapter instead: UploadAdapter, or POST /v1/load_lora_adapter (docs/clients.md, Trainers)"

# Calls that have nothing to do, and why.
NEEDLESS: Mapping[str, str] = {
    "/pause": "nothing is paused: a new version is read beside the old one, and running requests keep theirs",
    "/resume": "nothing was paused: a new version is read beside the old one, and running requests keep theirs",
    "/reset_prefix_cache": "nothing is reset: what is cached belongs to one version, and no other version finds it",
}

# Calls of weights that are pushed into a running model, which does not change here.
_PUSHED = f"the weights of a model do not change while it is served; {PUBLISH}"
REFUSED: Mapping[str, str] = {
    "/init_weight_transfer_engine": _PUSHED,
    "/start_weight_update": _PUSHED,
    "/update_weights": _PUSHED,
    "/finish_weight_update": _PUSHED,
    "/init_broadcaster": _PUSHED,
    "/reload_weights": _PUSHED,
    "/init_communicator": _PUSHED,
    "/update_named_param": _PUSHED,
    "/batch_update_named_params": _PUSHED,
    "/close_communicator": _PUSHED,
}

# Questions, with their answers.
TOLD: Mapping[str, Mapping[str, object]] = {"/is_paused": {"is_paused": False}, "/get_world_size": {"world_size": 1}}
NO_SETTINGS = "/server_info"
WHY_NO_SETTINGS = (
    "there are no settings of vLLM here, and no engine that weights are pushed to, for which TRL asks: train with "
    f"rollout_func, and {PUBLISH}"
)
ALIASES: Mapping[str, str] = {"/load_lora_adapter": "/v1/load_lora_adapter"}  # prime-rl's
