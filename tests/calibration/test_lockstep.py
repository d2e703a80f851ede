"""Walking through a network in steps gives what running it gives, whatever torch.fx says of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from ilmconvert.calibration.lockstep import Program, Walk, Walks
from ilmconvert.graph.inputs import Inputs


class Untraceable(nn.Module):
    """Control flow on a tensor's value, a dict output, and one norm that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.conv(x))
        if y.sum() > -1e9:
            y = self.norm(y.relu())
        return {"logits": self.last(y.mean((2, 3)))}


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, shift: float = 0.0, *, scale: Tensor | None = None) -> Tensor:
        return self.norm(x + shift) if scale is None else self.norm(x * scale)


class Written(nn.Module):
    """What it holds at its first norm are views of one tensor, which is written to afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        a, b = y.chunk(2, 1)
        z = self.norm(a)
        y.relu_()
        return self.last(z + b)


X = torch.randn(4, 3, 64, 64)
MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs, bool]] = {
    "traced": (lambda: timm.create_model("test_resnet", num_classes=5), Inputs((X,)), True),
    "inside a leaf": (lambda: timm.create_model("mobilevit_xxs", num_classes=5), Inputs((X,)), True),
    "untraceable": (Untraceable, Inputs((X,)), False),
    "keywords": (Keywords, Inputs((), {"x": X, "scale": torch.tensor(2.0)}), False),
    "written": (Written, Inputs((X,)), True),
    "defaults": (Keywords, Inputs((), {"x": X}), True),
}


def batch_norms(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def recorded(model: nn.Module, inputs: Inputs) -> tuple[list[tuple[str, Tensor]], object]:
    """The inputs of all norms in the order they run, and the output, from an ordinary run."""
    seen: list[tuple[str, Tensor]] = []
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.append((path, args[0].clone()))
        )
        for path in batch_norms(model)
    ]
    with torch.no_grad():
        output = inputs(model)
    for handle in handles:
        handle.remove()
    return seen, output


@pytest.mark.parametrize("name", MODELS)
def test_a_walk_sees_what_a_run_sees(name: str) -> None:
    make, inputs, traced = MODELS[name]
    model = make().eval()
    expected, output = recorded(model, inputs)
    program = Program(model, batch_norms(model), inputs)
    assert (program.prefix == "") is traced
    walk = Walk(program, inputs)
    for path, x in expected:
        visit = walk.advance()
        assert visit.path == path
        assert torch.allclose(visit.input, x, atol=1e-6)
    assert walk.advance() is None
    torch.testing.assert_close(walk.output, output)
    assert walk.nbytes() == 0  # nothing is held once it is done
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["traced", "inside a leaf", "untraceable", "written"])
def test_waiting_on_disk_changes_nothing(name: str) -> None:
    make, inputs, _ = MODELS[name]
    model = make().eval()
    programs = [Program(model, batch_norms(model), inputs)] * 2
    batches = [inputs.map(lambda t: t[:2]), inputs.map(lambda t: t[2:])]
    seen = []
    for budget in (1 << 30, 0, 200_000):
        visits = []
        with Walks(programs, batches, budget) as walks:
            for _ in recorded(model, inputs)[0]:
                for a, b in walks.advance():
                    assert torch.equal(a.input, b.input)
                    visits.append(a.input.clone())
        seen.append(visits)
        assert (walks.spilled > 0) is (budget < 1 << 30)
    for a, b, c in zip(*seen, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


class Caching(nn.Module):
    """Forward code that keeps what it sees, as position embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seen: object = None

    def forward(self, x: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = x.shape[0]
        return self.norm(x)


def test_tracing_leaves_nothing_on_the_model() -> None:
    model = Caching().eval()
    program = Program(model, ["norm"], Inputs((X,)))
    assert program.prefix == ""
    assert model.seen == len(X)


def test_memory_between_stops_is_what_is_still_needed() -> None:
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))]).eval()
    inputs = Inputs((torch.randn(2, 4, 32, 32),))
    walk = Walk(Program(model, batch_norms(model), inputs), inputs)
    while walk.advance() is not None:
        assert walk.nbytes() == inputs.args[0].nbytes
