"""The learner of the detr job: network, optimizer, averaged weights."""

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from agents.vision.dense_scaffold import DenseScaffold, dense_loss
from envs.vision.example import Batch, DeviceBatch
from models.detr.checkpoint import fill, load_detr, read_backbone
from models.detr.config import DetrConfig, LayerType, ResNetConfig
from models.detr.detr import Detr
from models.detr.labels import with_labels
from models.detr.loss import SetLossConfig, set_loss
from models.errors import UserError
from models.seeding import derive_seed


@dataclass(frozen=True)
class NetworkConfig:
    """A DETR to train from random weights. The default is small: 4.6M parameters, features at stride 16."""

    layer_type: LayerType = "basic"
    depths: tuple[int, ...] = (2, 2, 2)
    """Blocks of each stage of the ResNet."""
    hidden_sizes: tuple[int, ...] = (64, 128, 256)
    backbone_weights: Path | None = None
    """A ResNet's weights under torchvision's names, .pth or .safetensors, with its shape: of these three none is needed
    then. Its batch norms stay frozen."""
    queries: int = 20
    d_model: int = 128
    heads: int = 8
    encoder_layers: int = 3
    decoder_layers: int = 3
    ffn_dim: int = 512
    dropout: float = 0.0
    masks: bool = False
    """Train a mask head too, for panoptic segmentation; a fresh one if --model has none."""

    def __post_init__(self) -> None:
        for name in ("queries", "d_model", "heads", "decoder_layers", "ffn_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"--network.{name.replace('_', '-')} is {getattr(self, name)}: must be positive")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--network.dropout is {self.dropout}: must be at least 0 and below 1")

    def shape(self, names: tuple[str, ...]) -> DetrConfig:
        return DetrConfig(
            num_labels=len(names),
            labels=names,
            num_queries=self.queries,
            d_model=self.d_model,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            encoder_attention_heads=self.heads,
            decoder_attention_heads=self.heads,
            encoder_ffn_dim=self.ffn_dim,
            decoder_ffn_dim=self.ffn_dim,
            dropout=self.dropout,
            mask_head=self.masks,
            backbone=ResNetConfig(self.layer_type, self.depths, self.hidden_sizes, self.hidden_sizes[0]),
        )


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 4e-4
    """Of AdamW; falls to 0 along a cosine."""
    backbone_lr: float = 4e-4
    """Of the backbone: the same from random weights, a tenth for a trained one."""
    weight_decay: float = 1e-4
    warmup: int = 500
    """Steps until the full learning rate."""
    max_grad_norm: float = 0.1
    dense_weight: float = 0.0
    """Of the dense loss that helps a backbone from random weights (dense_scaffold.py); 0 for a trained one."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are evaluated and saved."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; weights and optimizer stay in float32."""
    compile: bool = False
    """Compile the network for the GPU."""
    cuda_graphs: bool = False
    """Replay what was compiled as CUDA graphs, for networks whose kernels are shorter than their launches. All batches
    must have one shape, as scenes do."""

    def __post_init__(self) -> None:
        if self.cuda_graphs and not self.compile:
            raise UserError("--optimizer.cuda-graphs needs --optimizer.compile")
        for name in ("lr", "backbone_lr", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise UserError(f"--optimizer.{name.replace('_', '-')} is {getattr(self, name)}: must be positive")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--optimizer.ema-decay is {self.ema_decay}: must be at least 0 and below 1")


class DetrLearner:
    """All that a checkpoint has to hold. `averaged` follows the weights at `ema_decay`, and starts as they do.

    names, category_ids: of the data's labels, and COCO's numbers for them, which are asked for where the model to start
    from does not name its own. dilation: of that model, as `load_detr` takes it.

    Raises UserError if that model cannot be read, or lacks a label.
    """

    def __init__(
        self,
        start: Path | None,
        names: tuple[str, ...],
        network: NetworkConfig,
        loss: SetLossConfig,
        optimizer: OptimizerConfig,
        steps: int,
        seed: int,
        device: str,
        category_ids: Sequence[int] = (),
        dilation: bool = False,
    ) -> None:
        self.category_ids, self.dilation = category_ids, dilation
        self.loss, self.settings, self.steps, self.seed, self.device = loss, optimizer, steps, seed, device
        self.net = self.build(start, network, names).to(device).train()
        self.masks = network.masks if start is None else self.net.config.mask_head
        for parameter in self.net.parameters():
            if parameter.dim() == 4:  # images arrive with their channels last, and convolutions are faster so
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.scaffold = self.scaffolded().to(device)
        self.averaged = copy.deepcopy(self.net).eval().requires_grad_(False)
        self._averaging = _floats(self.averaged), _floats(self.net)
        self.parameters = list(self.scaffold.parameters())
        self.optimizer = torch.optim.AdamW(self._groups(), fused=True)
        mode = "reduce-overhead" if optimizer.cuda_graphs else None
        self.forward: Any = torch.compile(self.scaffold, mode=mode) if optimizer.compile else self.scaffold
        self.step = 0

    def build(self, start: Path | None, network: NetworkConfig, names: tuple[str, ...]) -> Detr:
        if start is None:
            return _random(network, names, self.seed)
        model = with_labels(load_detr(start, self.dilation), names, self.category_ids, str(start))
        return _with_mask_head(model, self.seed) if network.masks and not model.config.mask_head else model

    def scaffolded(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "scaffold"))
            return DenseScaffold(self.net)

    def _groups(self) -> list[dict[str, Any]]:
        """The backbone at its own rate; no decay of vectors (norms, biases)."""
        groups = []
        for lr, of_backbone in ((self.settings.lr, False), (self.settings.backbone_lr, True)):
            named = [p for n, p in self.scaffold.named_parameters() if n.startswith("net.backbone.") == of_backbone]
            for matrices, decay in ((True, self.settings.weight_decay), (False, 0.0)):
                group = [p for p in named if (p.dim() > 1) == matrices]
                if group:
                    groups.append({"params": group, "lr": lr, "peak_lr": lr, "weight_decay": decay})
        return groups

    def update(self, batch: Batch, want_metrics: bool) -> dict[str, float]:
        """One step. Metrics cost a synchronisation with the GPU, so they are empty unless wanted.

        Raises UserError if the loss is not finite, which is looked at whenever metrics are wanted.
        """
        torch.manual_seed(derive_seed(self.seed, "dropout", self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * self._schedule()
        total, parts = self.losses(batch.to_device(self.device))
        total.backward()
        norm = clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()  # CUDA graphs write the next gradients where these lie
        self._average()
        self.step += 1
        return self._metrics(total, parts, norm) if want_metrics else {}

    def losses(self, batch: DeviceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with self._autocast():
            output, cells_BChw = self.forward(batch.images_BCHW, batch.valid_BHW)
        if not self.settings.dense_weight:
            return set_loss(output, batch.targets, self.loss)
        # First, for matching waits for the GPU: this is begun while it is still busy with the network.
        dense = dense_loss(cells_BChw, batch.targets, batch.valid_BHW)
        total, parts = set_loss(output, batch.targets, self.loss)
        return total + self.settings.dense_weight * dense, parts | {"dense": dense}

    def _schedule(self) -> float:
        warmed = min(1.0, (self.step + 1) / max(1, self.settings.warmup))
        return warmed * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.settings.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, torch.bfloat16)

    @torch.no_grad()
    def _average(self) -> None:
        """Shorter memory at first, or the random weights would be remembered for long."""
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(*self._averaging, 1 - decay)

    def _metrics(self, total: Tensor, parts: dict[str, Tensor], norm: Tensor) -> dict[str, float]:
        if not math.isfinite(total.item()):
            raise UserError(
                f"the loss is not finite at step {self.step}: the last checkpoint is good; try a lower --optimizer.lr"
            )
        last = {f"train/{name}": (value[-1] if value.dim() else value).item() for name, value in parts.items()}
        return {
            "train/loss": total.item(),
            **last,
            "train/grad_norm": norm.item(),
            "train/lr": self.optimizer.param_groups[0]["lr"],
        }

    def is_finite(self) -> bool:
        return all(bool(weights.isfinite().all()) for weights in self._averaging[0])

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "net": self.scaffold.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.scaffold.load_state_dict(state["net"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape == parameter.shape:  # to lie in memory as the parameter does: fused AdamW needs it
                    moments[name] = torch.empty_like(parameter).copy_(value)
        self.step = state["step"]


def _floats(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]


def _random(network: NetworkConfig, names: tuple[str, ...], seed: int) -> Detr:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initial weights"))
        if network.backbone_weights is None:
            return Detr(network.shape(names), freeze_batch_norm=False)
        backbone, named = read_backbone(network.backbone_weights)
        plain, given, there = ((c.layer_type, c.depths, c.hidden_sizes) for c in (NetworkConfig(), network, backbone))
        if given not in (plain, there):
            raise UserError(
                f"{network.backbone_weights}: a {backbone.layer_type} ResNet of depths {list(backbone.depths)} and "
                f"widths {list(backbone.hidden_sizes)}: leave out --network.layer-type, --network.depths and "
                "--network.hidden-sizes, which ask for another"
            )
        model = Detr(replace(network.shape(names), backbone=backbone))
        fill(model.backbone, named.items(), str(network.backbone_weights))
        return model


def _with_mask_head(model: Detr, seed: int) -> Detr:
    """A trained box model and a mask head of random weights (arXiv 2005.12872, section 4.4)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "mask head"))
        whole = Detr(replace(model.config, mask_head=True)).eval()
    whole.load_state_dict(whole.state_dict() | model.state_dict())
    return whole
