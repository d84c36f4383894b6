"""Attention with a positive feature map φ in the softmax's place, and the weights' sum to divide by.

    o_i = Σ_{j≤i} φ(q_i)ᵀφ(k_j) v_j / Σ_{j≤i} φ(q_i)ᵀφ(k_j)

The denominator is φ(q_i)ᵀz_i with z_i = Σ_{j≤i} φ(k_j): dividing each query's features by it leaves a linear attention
without decay. Three kinds:

    elu_attention         φ(x) = elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)
    performer_attention   positive orthogonal random features of the softmax kernel (Choromanski et al. 2020, arXiv
                          2009.14794, lemma 1 and §2.4): FAVOR+, an unbiased estimate of softmax attention
    efficient_attention   two softmaxes (Shen et al. 2018, arXiv 1812.01243, eq. 3), in efficient_attention.py

Queries and keys get the norm and the rotary embedding of softmax attention before the feature map. For FAVOR+ positions
are then relative in expectation, as in softmax attention; for elu + 1 they are not, but each token can tell them.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.config import LanguageConfig
from models.language.linear_attention import CHUNK, chunked
from models.language.norm import RMSNorm
from models.language.recurrent import RecurrentMixer, Rotation
from models.language.rope import rotate

LARGEST_EXPONENT = 60.0  # of a key's feature: the sum over 2²⁰ keys, and its products with values, fit in float32
SMALLEST_WEIGHT = 1e-20  # of all keys together: where every feature underflows, and in padding, where all are 0


class KernelAttention(RecurrentMixer):
    """Base of the three: projections, and the state [H, F, C + 1], whose last column is z."""

    def __init__(self, config: LanguageConfig, features: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.state_shape = (self.heads, features, self.head_dim + 1)
        size = self.heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    @abstractmethod
    def query_features(self, q_THC: Tensor) -> Tensor:
        """Float32 [T, H, F], not negative. A factor of its own for each token and head cancels."""

    @abstractmethod
    def key_features(self, k_THC: Tensor) -> Tensor:
        """Float32 [T, H, F], positive: zeros stand for no token."""

    def project(self, x_TD: Tensor, cos_sin: Rotation, positions_T: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (proj(x_TD).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *cos_sin).float(), rotate(self.k_norm(k), *cos_sin).float()
        return self.query_features(q), self.key_features(k), v

    def normalise(self, q: Tensor, z: Tensor) -> Tensor:
        """The queries, divided so that the weights of all keys sum to 1; both [..., H, F]."""
        return q / (q * z).sum(-1, keepdim=True).clamp(min=SMALLEST_WEIGHT)

    def mix(self, inputs: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = inputs
        z = running_sum(k)
        if state is not None:
            z = z + state[:, None, ..., -1]
        memory = None if state is None else state[..., :-1]
        o, memory = chunked(self.normalise(q, z), k, v, None, memory)
        return o, torch.cat([memory, z[:, -1, ..., None]], -1)

    def step(self, inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = inputs
        state = state + k[..., :, None] * F.pad(v.float(), (0, 1), value=1.0)[..., None, :]
        q = self.normalise(q, state[..., -1])
        return (q[..., None, :] @ state[..., :-1]).squeeze(-2), state

    def finish(self, o_T: Tensor, x_TD: Tensor) -> Tensor:
        return self.o_proj(o_T.to(x_TD.dtype).flatten(-2))


def running_sum(x_BLHF: Tensor) -> Tensor:
    """Sum over each token and those before it. By chunks, since `cumsum` on a GPU walks a dimension that is not the
    last with one thread for each column."""
    length = x_BLHF.shape[1]
    within = F.pad(x_BLHF, (0, 0, 0, 0, 0, -length % CHUNK)).unflatten(1, (-1, CHUNK)).cumsum(2)
    before = F.pad(within[:, :-1, -1].cumsum(1), (0, 0, 0, 0, 1, 0))
    return (within + before[:, :, None]).flatten(1, 2)[:, :length]


class EluAttention(KernelAttention):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config, config.head_dim)

    def query_features(self, q_THC: Tensor) -> Tensor:
        return F.elu(q_THC) + 1

    def key_features(self, k_THC: Tensor) -> Tensor:
        return F.elu(k_THC) + 1


class PerformerAttention(KernelAttention):
    """The random projection ω [F, C] is one for all heads of a layer. It is not trained, but travels with the weights,
    so that a folder, a weight update and vLLM have the same one; `redraw_features` replaces it."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config, config.performer_features)
        self.projection = nn.Parameter(torch.empty(config.performer_features, config.head_dim), requires_grad=False)

    def query_features(self, q_THC: Tensor) -> Tensor:
        exponent = favor_exponent(q_THC, self.projection)
        return (exponent - exponent.amax(-1, keepdim=True).detach()).exp()

    def key_features(self, k_THC: Tensor) -> Tensor:
        # No maximum to subtract: a later key must not change an earlier one's factor. The exponent is at most ‖ω‖²/2.
        return favor_exponent(k_THC, self.projection).clamp(max=LARGEST_EXPONENT).exp()

    def initialise(self, generator: torch.Generator) -> None:
        self.projection.copy_(orthogonal_gaussian(self.projection.shape[0], self.head_dim, generator))


def favor_exponent(x_THC: Tensor, projection_FC: Tensor) -> Tensor:
    """ωᵀx̂ − ‖x̂‖²/2 with x̂ = x / C^¼, whose exponentials' inner products estimate exp(qᵀk/√C); [T, H, F]."""
    x_THC = x_THC * x_THC.shape[-1] ** -0.25
    return x_THC @ projection_FC.float().mT - x_THC.square().sum(-1, keepdim=True) / 2


def orthogonal_gaussian(features: int, size: int, generator: torch.Generator) -> Tensor:
    """Rows [features, size], each Gaussian, and orthogonal to each other within blocks of `size` rows (§2.4)."""
    blocks = []
    for _ in range(math.ceil(features / size)):
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        # Householder QR fixes signs by a rule, which alone would bias the estimate; this makes all rotations equally
        # likely (Mezzadri 2007, arXiv math-ph/0609050, §5).
        blocks.append((q * r.diagonal().sign()).mT)
    lengths = torch.randn(features, size, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:features] * lengths).float()


@torch.no_grad()
def redraw_features(model: nn.Module, seed: int) -> None:
    """New random features for every Performer layer. Between updates of the policy, since it changes the policy."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, PerformerAttention):
            module.initialise(generator)
