"""Every attention kind beside an implementation that we did not write, or the definition written out in float64.

`CASES` is what the tests assert and what `python -m benchmarks.attention_oracles` prints: the same inputs for both
sides, and the largest difference of outputs and of gradients with respect to all inputs.
"""

import contextlib
import inspect
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language import delta_rule, gated_attention_unit, linear_attention
from models.language.attention import packed_attention
from models.language.config import LanguageConfig, RopeConfig
from models.language.efficient_attention import EfficientAttention
from models.language.gated_attention_unit import GatedAttentionUnit
from models.language.kernel_attention import EluAttention, KernelAttention, PerformerAttention, orthogonal_gaussian
from models.language.linformer import LinformerAttention
from models.language.nystromformer import NystromformerAttention
from models.language.packing import Packing
from models.language.rope import inverse_frequencies, rotation
from models.language.sparse_patterns import Fixed, Pattern, Sliding, Strided

LENGTH, HEADS, SIZE = 150, 3, 16
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """`inputs` are float64; our side gets them in float32, and so does an oracle that works in float32 only."""

    kind: str
    oracle: str
    inputs: Callable[[], Sequence[Tensor]]
    ours: Function
    theirs: Function
    oracle_dtype: torch.dtype = torch.float64

    def differences(self) -> tuple[float, float]:
        """Largest absolute difference of the output, and of the gradients of a random projection of it."""
        ours = _run(self.ours, self.inputs(), torch.float32)
        theirs = _run(self.theirs, self.inputs(), self.oracle_dtype)
        assert theirs[0].abs().max() > 0.1
        worst = [(a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True)]
        return worst[0], max(worst[1:])


def _run(function: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    output = function(*leaves)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad((output * direction.to(output.dtype)).sum(), leaves)]


def qkv(length: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, HEADS, SIZE, generator=generator, dtype=torch.float64) for _ in range(3)]


def gates() -> list[Tensor]:
    """Log-decays from forgetting at once to remembering nearly all, and β between 0 and 1, [B, L, H]."""
    generator = torch.Generator().manual_seed(1)
    u, w = (torch.rand(2, LENGTH, HEADS, generator=generator, dtype=torch.float64) for _ in range(2))
    return [-3 * u**4, w]


# Linear attention: softmax's place taken by a feature map, and by memories that forget.


def decay_recurrence(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor) -> Tensor:
    state, outputs = torch.zeros_like(k[:, 0, ..., None] * v[:, 0, :, None]), []
    for t in range(q.shape[1]):
        state = log_g[:, t].exp()[..., None, None] * state + torch.einsum("bhf,bhc->bhfc", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhf,bhfc->bhc", q[:, t], state))
    return torch.stack(outputs, 1)


def decay_inputs() -> list[Tensor]:
    q, k, v = qkv()
    return [q / SIZE**0.5, F.normalize(k, dim=-1), v, gates()[0]]


def delta_inputs() -> list[Tensor]:
    q, k, v = qkv()
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, *gates()]


def delta_oracle(name: str) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor) -> Tensor:
        from transformers.models.qwen3_next import modeling_qwen3_next

        plain = inspect.unwrap(getattr(modeling_qwen3_next, name))  # not a GPU kernel that the wrapper may have found
        return plain(q * SIZE**0.5, k, v, g=log_g, beta=beta)[0]

    return run


def fla_decay(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor) -> Tensor:
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    return naive_recurrent_simple_gla(q, k, v, log_g, scale=1.0)[0]


def fla_delta(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    return naive_recurrent_gated_delta_rule(q, k, v, beta, log_g, scale=1.0)[0]


def elu_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bihf,bjhf->bhij", F.elu(q) + 1, F.elu(k) + 1).tril()
    return torch.einsum("bhij,bjhc->bihc", weights / weights.sum(-1, keepdim=True), v)


SHAPE = LanguageConfig(num_attention_heads=HEADS, num_key_value_heads=1, head_dim=SIZE, performer_features=40)


def mixed(layer: KernelAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return layer.mix([layer.query_features(q), layer.key_features(k), v], None)[0]


def elu_ours(*qkv: Tensor) -> Tensor:
    return mixed(EluAttention(SHAPE), *qkv)


def performer_library(name: str) -> Callable[..., Tensor]:
    with contextlib.redirect_stdout(io.StringIO()):
        from performer_pytorch import performer_pytorch
    return getattr(performer_pytorch, name)


def elu_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = performer_library("causal_linear_attention_noncuda")
    q, k, v = (x.transpose(1, 2) for x in (F.elu(q) + 1, F.elu(k) + 1, v))
    return causal(q, k, v, chunk_size=5, eps=0.0).transpose(1, 2)


PROJECTION = orthogonal_gaussian(40, SIZE, torch.Generator().manual_seed(2))


def favor_ours(*qkv: Tensor) -> Tensor:
    layer = PerformerAttention(SHAPE)
    layer.projection.data = PROJECTION
    return mixed(layer, *qkv)


def favor_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kernel, causal = performer_library("softmax_kernel"), performer_library("causal_linear_attention_noncuda")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q = kernel(q, projection_matrix=PROJECTION.to(q), is_query=True, eps=0.0)
    k = kernel(k, projection_matrix=PROJECTION.to(k), is_query=False, eps=0.0)
    return causal(q, k, v, chunk_size=5, eps=0.0).transpose(1, 2)


def efficient_ours(*qkv: Tensor) -> Tensor:
    return mixed(EfficientAttention(SHAPE), *qkv)


def efficient_written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For each reader a softmax over the positions that it may read, channel by channel."""
    rows = []
    for i in range(q.shape[1]):
        averages = torch.einsum("bjhf,bjhc->bhfc", k[:, : i + 1].softmax(1), v[:, : i + 1])
        rows.append(torch.einsum("bhf,bhfc->bhc", q[:, i].softmax(-1), averages))
    return torch.stack(rows, 1)


def efficient_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return performer_library("linear_attention")(q.softmax(-1), k.softmax(-2), v)[:, :, -1]


# FLASH. The library has biases, a relative position bias and interleaved rotary pairs: the first two are set to zero,
# and the channels of z are reordered.

FLASH_D, FLASH_E, FLASH_S, FLASH_CHUNK = 24, 40, 16, 32


def flash_weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, gate, up, z = draw(2, LENGTH, FLASH_D), draw(FLASH_E, FLASH_D), draw(FLASH_E, FLASH_D), draw(FLASH_S, FLASH_D)
    down, scale, offset = draw(FLASH_D, FLASH_E), draw(4, FLASH_S), draw(4, FLASH_S)
    return [x, gate / 5, up / 5, z / 5, down / 6, scale, offset / 3]


def flash_ours(x: Tensor, gate: Tensor, up: Tensor, z: Tensor, down: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    config = LanguageConfig(
        hidden_size=FLASH_D, intermediate_size=FLASH_E, head_dim=FLASH_S, gau_chunk_size=FLASH_CHUNK
    )
    weights = {"gate_proj.weight": gate, "up_proj.weight": up, "z_proj.weight": z, "down_proj.weight": down}
    weights |= {"scale": scale, "offset": offset.flatten()}
    packing = Packing.of([LENGTH] * len(x))
    cos_sin = rotation(inverse_frequencies(RopeConfig(), FLASH_S), packing.positions_T, x.dtype)
    arguments = (x.flatten(0, 1), packing, cos_sin, None)
    return torch.func.functional_call(GatedAttentionUnit(config), weights, arguments).view_as(x)


def flash_library(
    x: Tensor, gate: Tensor, up: Tensor, z: Tensor, down: Tensor, scale: Tensor, offset: Tensor
) -> Tensor:
    from flash_pytorch.flash_pytorch import FLASH
    from rotary_embedding_torch import RotaryEmbedding

    rotary = RotaryEmbedding(dim=FLASH_S)
    module = FLASH(
        dim=FLASH_D,
        group_size=FLASH_CHUNK,
        query_key_dim=FLASH_S,
        expansion_factor=FLASH_E / FLASH_D + 1e-9,
        causal=True,
        rotary_pos_emb=rotary,
        norm_klass=lambda dim: nn.Identity(),
    ).to(x.dtype)
    nn.init.zeros_(module.rel_pos_bias.relative_attention_bias.weight)
    pairs = torch.arange(FLASH_S).view(2, -1).T.flatten()  # our channels i and i + S/2 are its 2i and 2i + 1
    order = [0, 2, 1, 3]  # it holds q, q', k, k'
    weights = {
        "to_hidden.0.weight": torch.cat([up, gate]),
        "to_hidden.0.bias": x.new_zeros(2 * FLASH_E),
        "to_qk.0.weight": z[pairs],
        "to_qk.0.bias": x.new_zeros(FLASH_S),
        "qk_offset_scale.gamma": scale[:, pairs][order],
        "qk_offset_scale.beta": offset[:, pairs][order],
        "to_out.weight": down,
        "to_out.bias": x.new_zeros(FLASH_D),
    }
    return torch.func.functional_call(module, weights, (x,)) - x


def flash_parallel(
    x: Tensor, gate: Tensor, up: Tensor, z: Tensor, down: Tensor, scale: Tensor, offset: Tensor
) -> Tensor:
    positions = torch.arange(LENGTH)
    cos, sin = rotation(inverse_frequencies(RopeConfig(), FLASH_S), positions, x.dtype)
    z = F.silu(x @ z.T)[:, :, None] * scale + offset
    a, b = z.chunk(2, -1)
    q, k, q_far, k_far = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).unbind(2)
    o = gated_attention_unit.parallel(q, k, q_far, k_far, F.silu(x @ up.T), FLASH_CHUNK)
    return (F.silu(x @ gate.T) * o) @ down.T


# Sparse softmax: the dense mask against a softmax over the positions in the paper's sets.


def sparse_ours(pattern: Pattern) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths = (LENGTH - 30, 29, 1)  # a pack of three, in which nothing may leak
        packing = Packing.of(lengths)
        return torch.stack([packed_attention(q[b], k[b], v[b], packing, pattern) for b in range(len(q))])

    return run


def sparse_written_out(reads: Callable[[int], set[int]]) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, begin = [], 0
        for length in (LENGTH - 30, 29, 1):
            for i in range(length):
                js = [begin + j for j in sorted(reads(i)) if 0 <= j <= i]
                scores = torch.einsum("bhc,bjhc->bhj", q[:, begin + i], k[:, js]) / SIZE**0.5
                rows.append(torch.einsum("bhj,bjhc->bhc", scores.softmax(-1), v[:, js]))
            begin += length
        return torch.stack(rows, 1)

    return run


def strided_set(i: int) -> set[int]:
    return set(range(i - 8 + 1, i + 1)) | set(range(i, -1, -8))


def fixed_set(i: int) -> set[int]:
    return set(range(i // 8 * 8, i + 1)) | {j for j in range(i + 1) if j % 8 in (5, 6, 7)}


# Bidirectional.


def encoder_inputs(*extra: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    def draw() -> list[Tensor]:
        generator = torch.Generator().manual_seed(4)
        shapes = [(2, 50, 24), (32, 24), (32, 24), (32, 24), (24, 32), (24,), *extra]
        return [
            torch.randn(*s, generator=generator, dtype=torch.float64) / (s[-1] ** 0.5 if len(s) < 3 else 1)
            for s in shapes
        ]

    return draw


PROJECTIONS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "o_proj.bias")


def linformer_ours(x: Tensor, *weights: Tensor) -> Tensor:
    names = (*PROJECTIONS, "key_mixture", "value_mixture")
    module = LinformerAttention(24, heads=2, head_dim=16, max_len=64, projected_len=8)
    return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))


def linformer_library(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, b: Tensor, e: Tensor, f: Tensor) -> Tensor:
    from linformer import LinformerSelfAttention

    module = LinformerSelfAttention(24, seq_len=64, k=8, heads=2, dim_head=16)
    weights = {"to_q.weight": q, "to_k.weight": k, "to_v.weight": v, "to_out.weight": o, "to_out.bias": b}
    return torch.func.functional_call(module, weights | {"proj_k": e.T, "proj_v": f.T}, (x,))


def nystrom_ours(x: Tensor, *weights: Tensor) -> Tensor:
    module = NystromformerAttention(24, heads=2, head_dim=16, landmarks=8, convolution=5)
    names = (*PROJECTIONS, "value_conv.weight")
    return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))


def nystrom_library(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, b: Tensor, conv: Tensor) -> Tensor:
    from nystrom_attention import NystromAttention

    module = NystromAttention(24, dim_head=16, heads=2, num_landmarks=8, residual_conv_kernel=5)
    weights = {"to_qkv.weight": torch.cat([q, k, v]), "to_out.0.weight": o, "to_out.0.bias": b}
    return torch.func.functional_call(module, weights | {"res_conv.weight": conv}, (x,))


def first(function: Callable[..., tuple[Tensor, Tensor]], **options: int) -> Function:
    return lambda *inputs: function(*inputs, **options)[0]


def sets(pattern: Pattern, reads: Callable[[int], set[int]]) -> tuple[Function, Function]:
    return sparse_ours(pattern), sparse_written_out(reads)


F32 = torch.float32
WRITTEN, FLA = "written out, float64", "flash-linear-attention"
CASES = [
    Case("linear_attention, parallel", WRITTEN, decay_inputs, first(linear_attention.parallel), decay_recurrence),
    Case("linear_attention, chunked", WRITTEN, decay_inputs, first(linear_attention.chunked), decay_recurrence),
    Case("linear_attention, recurrent", WRITTEN, decay_inputs, first(linear_attention.recurrent), decay_recurrence),
    *(
        Case(
            f"gated_delta_rule, {form.__name__}",
            f"transformers {name}",
            delta_inputs,
            first(form),
            delta_oracle(name),
            F32,
        )
        for form in (delta_rule.parallel, delta_rule.chunked, delta_rule.recurrent)
        for name in ("torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule")
    ),
    Case("linear_attention, chunked", FLA, decay_inputs, first(linear_attention.chunked), fla_decay, F32),
    Case("gated_delta_rule, chunked", FLA, delta_inputs, first(delta_rule.chunked), fla_delta, F32),
    Case("elu_attention", WRITTEN, qkv, elu_ours, elu_weights),
    Case("elu_attention", "performer-pytorch", qkv, elu_ours, elu_library),
    Case("performer_attention", "performer-pytorch", qkv, favor_ours, favor_library),
    Case("efficient_attention", WRITTEN, qkv, efficient_ours, efficient_written_out),
    Case(
        "efficient_attention, last row",
        "performer-pytorch",
        qkv,
        lambda *x: efficient_ours(*x)[:, -1],
        efficient_library,
    ),
    Case("gated_attention_unit", "FLASH-pytorch", flash_weights, flash_ours, flash_library),
    Case("gated_attention_unit", "parallel form, float64", flash_weights, flash_ours, flash_parallel),
    Case("sliding_attention", WRITTEN, qkv, *sets(Sliding(20), lambda i: set(range(i - 19, i + 1)))),
    Case("strided_attention", WRITTEN, qkv, *sets(Strided(8), strided_set)),
    Case("fixed_attention", WRITTEN, qkv, *sets(Fixed(8, 3), fixed_set)),
    Case("linformer", "linformer", encoder_inputs((8, 64), (8, 64)), linformer_ours, linformer_library),
    Case("nystromformer", "nystrom-attention", encoder_inputs((2, 1, 5, 1)), nystrom_ours, nystrom_library),
]
