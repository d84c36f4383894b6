"""AdamW that keeps float32 masters of its parameters, whatever dtype the model computes in."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class MasterAdamW:
    """AdamW over named parameters.

    A bfloat16 parameter has 8 bits of mantissa: an update below 1/256 of it is lost. So each such parameter has a
    float32 master that gathers gradients, is stepped, and is rounded back into the parameter. A float32 parameter is
    its own master.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        betas: tuple[float, float],
        weight_decay: float,
        lr_multipliers: Mapping[str, float] | None = None,
    ) -> None:
        """lr_multipliers: factor on the learning rate of the parameters that do not have 1 (LoRA+, muP)."""
        self.parameters = dict(named)
        self.lr_multipliers = {name: (lr_multipliers or {}).get(name, 1.0) for name in named}
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for name, p in named.items()
        }
        self.betas, self.weight_decay = betas, weight_decay
        self.reset()

    def reset(self) -> None:
        """Forget both moments (k1.5 does so at the start of each iteration); the masters stay."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by weight decay and multiplier
        for name, p in self.masters.items():
            decay = self.weight_decay if p.dim() > 1 else 0.0
            groups.setdefault((decay, self.lr_multipliers[name]), []).append(p)
        self.adam = torch.optim.AdamW(
            [{"params": ps, "weight_decay": decay, "multiplier": factor} for (decay, factor), ps in groups.items()],
            betas=self.betas,
            fused=True,
        )

    def gather(self) -> None:
        """Move the gradients of the last backward pass to the masters; called after each micro-batch."""
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def clip(self, max_norm: float) -> float:
        """Scale the gathered gradients down to `max_norm`; return the norm before."""
        return nn.utils.clip_grad_norm_(list(self.masters.values()), max_norm).item()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = lr * group["multiplier"]
        self.adam.step()
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)
        self.zero_grad()

    def zero_grad(self) -> None:
        self.adam.zero_grad()
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Masters and moments by parameter name: plain tensors, no pickled objects."""
        moments = {name: self.adam.state[p] for name, p in self.masters.items() if p in self.adam.state}
        return {
            "masters": {name: p.detach() for name, p in self.masters.items()},
            "moments": {name: {key: value for key, value in state.items()} for name, state in moments.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset()
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
            self.parameters[name].copy_(master)
            if name in state["moments"]:
                # `step` too: fused Adam wants it where the parameter lies. A copy, or Adam would change `state`.
                moments = state["moments"][name].items()
                self.adam.state[master] = {key: value.to(master.device, copy=True) for key, value in moments}


def cosine(step: int, steps: int, warmup: int, final_ratio: float) -> float:
    """Learning-rate factor: linear warm-up, then cosine decay to `final_ratio`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress))))
