"""Compiled: one graph, whatever the batch size; in converted models too. Numbers are held to eager ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import ilmconvert
from ilmconvert.nn import ILMNorm, Standardization
from tests.helpers import relative

LAYERS = {
    "group": lambda: ILMNorm(48, 6),
    "batch start": lambda: ILMNorm(48, 1, num_key_groups=1, gains=True, standardized_keys=True),
    "position": lambda: ILMNorm(48, standardization=Standardization(layout="position")),
    "rms": lambda: ILMNorm(48, standardization=Standardization(layout="position", center=False, scale_by="rms")),
}


def speaking(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, ILMNorm):
            for parameter in module.predictor.parameters():
                nn.init.normal_(parameter, std=0.3)
    return model


def run(model: nn.Module, twin: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients by ``model``, which may be a compiled ``twin``."""
    y = model(x)
    return [y, *torch.autograd.grad(y.square().mean(), list(twin.parameters()))]


def same(eager: list[Tensor], compiled: list[Tensor]) -> None:
    for one, other in zip(eager, compiled, strict=True):
        tiny = (one - other).abs().max() < 1e-8  # gradients that are sums which cancel to nearly nothing
        assert relative(one, other) < 1e-4 or tiny


def compiled_once(model: nn.Module, batches: list[Tensor], *, dynamic: bool | None = True) -> None:
    """With ``dynamic`` None, the batch size alone varies, and the graph may count on the other sizes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    compilations = set()
    for x in batches:
        if dynamic is None:
            torch._dynamo.mark_dynamic(x, 0)
        same(run(model, model, x), run(compiled, model, x))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1  # none but those of the first batch (of a timm model, converted or not, two)


@pytest.mark.parametrize("kind", LAYERS)
def test_one_graph_for_every_batch_size(kind: str) -> None:
    model = speaking(nn.Sequential(nn.Conv2d(3, 48, 3), LAYERS[kind](), nn.ReLU(inplace=True), nn.Conv2d(48, 4, 1)))
    compiled_once(model, [torch.randn(n, 3, 9, 9) for n in (2, 3, 6)])


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("shape", [(1024, 48), (16, 192), (7, 48), (48,)], ids=str)
def test_one_graph_for_tokens(shape: tuple[int, ...], dynamic: bool | None) -> None:
    """Of 256 rows summed at once, 16, 7, and all; of few key groups, and of many (192 channels)."""
    model = speaking(ILMNorm(shape[-1], standardization=Standardization(layout="token")))
    compiled_once(model, [torch.randn(n, *shape) for n in (6, 16, 33)], dynamic=dynamic)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels", [48, 192])
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_other_tokens_do_not_feel_a_broken_one(where: str, channels: int, compiled: bool) -> None:
    torch._dynamo.reset()
    layer = speaking(ILMNorm(channels, standardization=Standardization(layout="token")))
    forward = torch.compile(layer, backend="aot_eager") if compiled else layer
    x, grad = torch.randn(4096, channels), torch.randn(4096, channels)
    results = []
    for factor in (1.0, float("nan")):
        (x if where == "input" else grad)[0] *= factor
        values = x.clone().requires_grad_()
        y = forward(values)
        results.append((y, torch.autograd.grad(y, values, grad)[0]))
    for clean, found in zip(*results, strict=True):
        assert relative(found[1:], clean[1:]) < 1e-6


@pytest.mark.parametrize(("channels", "products"), [(96, {"mm": 6}), (192, {"bmm": 5, "baddbmm": 1})])
def test_few_key_groups_take_one_product_for_both_branches(channels: int, products: dict[str, int]) -> None:
    """Two forward and four backward."""
    found: Counter[str] = Counter()

    def count(graph: fx.GraphModule, _: object) -> Callable[..., object]:
        found.update(n.target.__name__.partition(".")[0] for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    layer = ILMNorm(channels, standardization=Standardization(layout="token"))
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    compiled(torch.randn(7, channels, requires_grad=True)).sum().backward()
    assert {name: found[name] for name in ("mm", "bmm", "baddbmm") if found[name]} == products


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it, whatever the input
def test_layers_compiled_alone_in_an_eager_network_share_their_graphs() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = speaking(ilmconvert.convert(timm.create_model("test_vit", num_classes=4)).model)
    x = torch.randn(2, 3, 160, 160)
    eager = run(model, model, x)
    for layer in model.modules():
        if isinstance(layer, ILMNorm):
            layer.compile(backend=counter)
    same(eager, run(model, model, x))
    assert counter.frame_count == 1  # of all layers, which are alike


def test_channels_last_compiles_too() -> None:
    model = speaking(nn.Sequential(LAYERS["group"](), nn.ReLU(inplace=True)))
    compiled_once(model, [torch.randn(n, 48, 9, 9).to(memory_format=torch.channels_last) for n in (2, 3)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("resnet10t", {}, 64),
        ("vit_tiny_patch16_224", {"depth": 2, "img_size": 64}, 64),
        ("test_convnext", {}, 64),
        ("test_efficientnet", {}, 64),
    ],
)
def test_converted_models_compile_to_one_graph(name: str, options: dict[str, int], size: int) -> None:
    """In double precision: a random network with gains multiplies the rounding of single precision a thousandfold."""
    model = speaking(ilmconvert.convert(timm.create_model(name, num_classes=5, **options)).model).eval().double()
    compiled_once(model, [torch.randn(n, 3, size, size, dtype=torch.float64) for n in (2, 3)])


def test_gradients_flow_to_what_was_written_through_a_view() -> None:
    torch.manual_seed(0)
    conv, norm, x = nn.Conv2d(3, 32, 3), speaking(ILMNorm(32, 8)), torch.randn(2, 3, 8, 7)

    def step(x: Tensor) -> Tensor:
        y = conv(x)
        padded = y.new_zeros(2, 32, 8, 8)
        padded[:, :, :6, :5].copy_(y)
        return norm(padded).pow(3).sum()  # type: ignore[no-any-return]

    torch._dynamo.reset()
    expected, found = (
        torch.autograd.grad(f(x), conv.weight)[0] for f in (step, torch.compile(step, backend="aot_eager"))
    )
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("where", ["image", "token"])
def test_functorch_transforms_inside_a_compiled_function(where: str) -> None:
    image = where == "image"
    layer = ILMNorm(32, 8) if image else ILMNorm(32, standardization=Standardization(layout="token"))
    speaking(layer)
    x = torch.randn(3, 2, 32, 6) if image else torch.randn(3, 2, 5, 32)
    for transform in (torch.func.vmap(layer), lambda t: torch.func.grad(lambda u: layer(u).pow(3).sum())(t[0])):
        torch._dynamo.reset()
        assert relative(torch.compile(transform, backend="aot_eager")(x), transform(x)) < 1e-4


@pytest.mark.parametrize(("mean", "corner"), [(0.0, 1e3), (1e3, 0.0)])
def test_an_outlier_in_the_corner_costs_no_digits(mean: float, corner: float) -> None:
    torch.manual_seed(0)
    layer, x = speaking(ILMNorm(16, 4)), torch.randn(2, 16, 128, 128) + mean
    x[:, :, 0, 0] = corner
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    exact = [t.float() for t in run(layer.double(), layer, x.double())]
    for found, expected in zip(run(compiled, layer.float(), x), exact, strict=True):
        assert relative(found, expected) < 2e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_inductor_joins_the_passes_over_tokens() -> None:
    """Forward, sum and variance of a key group are one loop; backward, a token's sums and its gradient are."""
    from torch._inductor import config, metrics

    layer = speaking(ILMNorm(768, standardization=Standardization(layout="token")))
    x = torch.randn(8, 64, 768, requires_grad=True)
    torch._dynamo.reset()
    metrics.reset()
    with config.patch(force_disable_caches=True):
        torch.compile(layer)(x).sum().backward()
    assert [loop.inner_kernel_number for loop in metrics.cpp_outer_loop_fused_inner_counts] == [2, 2]
