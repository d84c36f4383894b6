"""The CUDA paths (variable-length flash attention, grouped matrix products) in bfloat16 against float32 on the CPU."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from models.language.decoder import Decoder
from models.language.experts import grouped_swiglu
from models.language.lora import attach, parts
from models.language.lora_layers import LoraConfig
from models.language.moe import MixtureOfExperts
from models.language.packing import Packing
from models.language.router import RouterTrace
from tests.models.language.policies import POLICIES, made

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = (150, 1, 17, 64)


@pytest.fixture(params=POLICIES)
def pair(request: pytest.FixtureRequest) -> tuple[Decoder, Decoder]:
    """The same weights, representable in bfloat16, on the CPU in float32 and on the GPU in bfloat16."""
    # Without norms to bring them to size, small weights make small logits.
    scale = 0.23 if POLICIES[request.param].norm_placement == "none" else 0.08
    config = replace(POLICIES[request.param], head_dim=32, initializer_range=scale)
    gpu = made(config).to(torch.bfloat16)
    return deepcopy(gpu).float(), gpu.cuda()


def logits(model: Decoder, tokens_T: torch.Tensor, device: str, trace: RouterTrace) -> torch.Tensor:
    return model.logits(model(tokens_T.to(device), Packing.of(LENGTHS, device), trace=trace)).float().cpu()


def test_a_pack_and_its_gradients(pair: tuple[Decoder, Decoder]) -> None:
    assert_agreement(*pair)


def assert_agreement(cpu: Decoder, gpu: Decoder) -> None:
    """Of the logits of a pack, and of the gradients of whatever trains."""
    tokens_T = torch.randint(0, 97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    direction = torch.randn(sum(LENGTHS), 97, generator=torch.Generator().manual_seed(1))
    trace = RouterTrace()
    ours = logits(gpu, tokens_T, "cuda", trace)
    chosen = [record.experts_TK.cpu() for record in trace.records]  # near ties fall either way: the CPU follows
    exact = logits(cpu, tokens_T, "cpu", RouterTrace(torch.stack(chosen, 1) if chosen else None))
    assert exact.std() > 0.3
    assert (exact - ours).abs().mean() < 0.05 * exact.std()
    (exact * direction).mean().backward()
    (ours * direction).mean().backward()
    for (name, a), b in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        if not a.requires_grad:
            continue
        similarity = torch.cosine_similarity(a.grad.flatten(), b.grad.float().cpu().flatten(), 0)
        assert similarity > 0.95, f"{name}: {similarity:.4f}"


@pytest.mark.parametrize(
    ("policy", "lora"),
    [
        ("dense", LoraConfig(r=8, targets=("all-linear",))),
        ("dense", LoraConfig(r=8, targets=("all-linear",), use_dora=True)),
        ("moe", LoraConfig(r=8, targets=("q_proj", "experts.gate_up_proj", "experts.down_proj"))),
    ],
    ids=["lora", "dora", "experts"],
)
def test_adapters_and_their_gradients(policy: str, lora: LoraConfig) -> None:
    config = replace(POLICIES[policy], head_dim=32, initializer_range=0.08)
    gpu = Decoder(config).init_weights(0)
    attach(gpu, lora, seed=1)
    with torch.no_grad():
        for _, _, adapter in parts(gpu, "default"):
            adapter.lora_B.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    gpu = gpu.to(torch.bfloat16)
    assert_agreement(deepcopy(gpu).float(), gpu.cuda())


@torch.no_grad()
def test_sequences_of_a_pack_do_not_see_each_other(pair: tuple[Decoder, Decoder]) -> None:
    _, gpu = pair
    tokens_T = torch.randint(0, 97, (sum(LENGTHS),), device="cuda")
    packed = gpu(tokens_T, Packing.of(LENGTHS, "cuda"))
    for together, tokens in zip(packed.split(LENGTHS), tokens_T.split(LENGTHS), strict=True):
        alone = gpu(tokens, Packing.of([len(tokens)], "cuda"))
        assert (together - alone).abs().float().mean() < 0.02 * alone.float().std()


@pytest.mark.parametrize("tokens", [1, 7, 500])
@pytest.mark.parametrize("factor", [None, 0.5])
def test_a_mixture_of_many_experts(tokens: int, factor: float | None) -> None:
    """Most experts have no rows at first; compiled kernels see new row counts; with a capacity, rows are dropped."""
    config = replace(POLICIES["moe"], num_experts=64, num_experts_per_tok=4, expert_capacity_factor=factor)
    torch.manual_seed(0)
    gpu = MixtureOfExperts(config)
    for parameter in gpu.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    gpu.to(torch.bfloat16)
    cpu = deepcopy(gpu).float()
    gpu.cuda()
    x_TD = torch.randn(tokens, 64).bfloat16()
    direction = torch.randn(tokens, 64)
    exact, trace = [], RouterTrace()
    for model, x in ((gpu, x_TD.cuda()), (cpu, x_TD.float())):
        x.requires_grad_()
        y_TD = model(x, trace)
        trace = RouterTrace(trace.records[0].experts_TK[:, None].cpu())  # the CPU follows, so that ties do not matter
        (y_TD.float() * direction.to(x.device)).sum().backward()
        exact.append([y_TD.detach(), x.grad, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*exact, strict=True):
        similarity = torch.cosine_similarity(ours.float().cpu().flatten(), theirs.flatten(), 0)
        assert similarity > 0.99


def test_experts_without_any_row() -> None:
    """As on a process of an expert-parallel group that nobody sends anything."""
    x_SD, weights_S, ends_E = torch.zeros(0, 64), torch.zeros(0), torch.zeros(4, dtype=torch.int32)
    w13, w2 = torch.randn(4, 64, 64), torch.randn(4, 64, 32)
    x_SD, w13, w2 = (t.to("cuda", torch.bfloat16).requires_grad_() for t in (x_SD, w13, w2))
    y_SD = grouped_swiglu(x_SD, weights_S.cuda(), ends_E.cuda(), w13, w2)
    assert y_SD.shape == (0, 64)
    y_SD.sum().backward()
    assert w13.grad.abs().max() == 0
    assert w2.grad.abs().max() == 0


@torch.no_grad()
def test_decoding_with_a_cache(pair: tuple[Decoder, Decoder]) -> None:
    _, gpu = pair
    sequences = [torch.randint(0, 97, (length,), device="cuda") for length in (40, 9)]
    whole = [gpu(s, Packing.of([len(s)], "cuda")) for s in sequences]
    cache = gpu.empty_cache(2, 40)
    gpu(torch.cat([sequences[0][:35], sequences[1][:4]]), Packing.of([35, 4], "cuda"), cache)
    for step in range(5):
        tokens = torch.stack([sequences[0][35 + step], sequences[1][4 + step]])
        ours = gpu(tokens, Packing.of([1, 1], "cuda"), cache)
        for row, (expected, start) in enumerate(zip(whole, (35, 4), strict=True)):
            # Both round to bfloat16, in different orders; a wrong position or state is off by the logits' size.
            assert (ours[row] - expected[start + step]).abs().float().mean() < 0.07 * expected.float().std()
