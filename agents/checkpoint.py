"""What every control agent keeps of its networks and optimizers, and what it refuses to read back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import get_total_norm

from agents.config import ControlConfig
from models.errors import UserError

Networks = Mapping[str, nn.Module]
Optimizers = Mapping[str, torch.optim.Optimizer]


def networks_state(networks: Networks, optimizers: Optimizers) -> dict[str, Any]:
    return {
        "networks": {name: network.state_dict() for name, network in networks.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
    }


def load_networks(state: Mapping[str, Any], networks: Networks, optimizers: Optimizers, hidden: object) -> None:
    """Raises UserError for a checkpoint of other networks."""
    for name, network in networks.items():
        try:
            network.load_state_dict(state["networks"][name])
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint's {name} is not that of --hidden {hidden} and this job: {' '.join(str(error).split())}"
            ) from error
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])


def refuse_infinite(metrics: Mapping[str, float], networks: Networks, env_steps: int) -> None:
    """Raises UserError if a loss is not finite, or a weight: a loss is of the weights before the step."""
    weights = [parameter.detach() for network in networks.values() for parameter in network.parameters()]
    largest = get_total_norm(weights, torch.inf)  # NaN if any is
    if not (np.isfinite(list(metrics.values())).all() and largest.isfinite()):
        raise UserError(
            f"the loss or the weights are not finite at step {env_steps}, and were not saved: try a lower --lr"
        )


def policy_state(config: ControlConfig) -> dict[str, Any]:
    """What the weights do not show of the policy that plays by them."""
    return {"env": config.env, "settings": {name: getattr(config, name) for name in config.of_the_policy}}


def refuse_other_policy(state: Mapping[str, Any], config: ControlConfig) -> None:
    """Raises UserError if a checkpoint's state is of another environment, or of a policy that would do something else
    by the same weights. (Checkpoints of old hold no settings.)"""
    if state["env"] != config.env:
        raise UserError(f"the checkpoint is of {state['env']}, not of {config.env}: give --env {state['env']}")
    for name, value in state.get("settings", {}).items():
        if value != getattr(config, name):
            raise UserError(
                f"the checkpoint's policy has {name} = {value}, not {getattr(config, name)}: leave out "
                f"--{name.replace('_', '-')}"
            )
