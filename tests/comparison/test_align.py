"""Alignment against expectations written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ilmconvert
from ilmconvert.comparison import GraphDiff


def conv(i: int, o: int) -> nn.Module:
    return nn.Conv2d(i, o, 3)


def seq(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


class Named(nn.Module):
    """Children by name, run in the order given, or in another one."""

    def __init__(self, order: str | None = None, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.order = None
        self._run = (order or " ".join(children)).split()

    def forward(self, x: Tensor) -> Tensor:
        for name in self._run:
            x = self.get_submodule(name)(x)
        return x


class Residual(nn.Module):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(4, 4), conv(4, 4), conv(4, 4)
        self._source = source

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        return self.c(b) + {"a": a, "b": b}[self._source]


class Relu(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a = conv(3, 4)
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self.a(x))


Rows = list[tuple[str | None, str | None, str]]


def rows(diff: GraphDiff) -> Rows:
    return [(r.before, r.after, "+".join(r.changes)) for r in diff.changed]


def block(width: int = 4) -> nn.Module:
    return Named(conv=conv(width, width), norm=nn.BatchNorm2d(width), act=nn.ReLU())


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Rows]] = {
    "equal": (block, block, []),
    "insert": (
        lambda: seq(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 8)),
        lambda: seq(conv(3, 4), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 8)),
        [(None, "1", "inserted"), ("1", "2", "renamed"), ("2", "3", "renamed"), ("3", "4", "renamed")],
    ),
    "insert by name": (
        lambda: Named(a=conv(3, 4), c=conv(4, 5)),
        lambda: Named(a=conv(3, 4), b=nn.ReLU(), c=conv(4, 5)),
        [(None, "b", "inserted")],
    ),
    "remove": (
        lambda: seq(conv(3, 4), nn.Dropout(), nn.BatchNorm2d(4)),
        lambda: seq(conv(3, 4), nn.BatchNorm2d(4)),
        [("1", None, "removed"), ("2", "1", "renamed")],
    ),
    "rename": (
        lambda: Named(stem=conv(3, 4), layer1=block(), head=conv(4, 2)),
        lambda: Named(stem=conv(3, 4), stage1=block(), head=conv(4, 2)),
        [("layer1", "stage1", "renamed")],
    ),
    "rename and change": (
        lambda: Named(bn=nn.BatchNorm2d(4), last=conv(4, 4)),
        lambda: Named(norm=nn.BatchNorm2d(4, eps=1e-3), last=conv(4, 4)),
        [("bn", "norm", "changed+renamed")],
    ),
    "move within": (
        lambda: Named(a=conv(4, 4), b=nn.BatchNorm2d(4), c=nn.ReLU()),
        lambda: Named(a=conv(4, 4), b=nn.BatchNorm2d(4), c=nn.ReLU(), order="c a b"),
        [("c", "c", "moved")],
    ),
    "move elsewhere": (
        lambda: Named(x=Named(a=conv(4, 4), n=nn.BatchNorm2d(4)), y=Named(b=conv(4, 6))),
        lambda: Named(x=Named(a=conv(4, 4)), y=Named(n=nn.BatchNorm2d(4), b=conv(4, 6))),
        [("x.n", "y.n", "moved")],
    ),
    "replaced": (
        lambda: seq(conv(3, 4), nn.ReLU(), conv(4, 4)),
        lambda: seq(conv(3, 4), nn.GELU(), conv(4, 4)),
        [("1", "1", "changed")],
    ),
    "leaf to block": (
        lambda: Named(stem=conv(3, 4), act=nn.ReLU()),
        lambda: Named(stem=seq(conv(3, 2), conv(2, 4)), act=nn.ReLU()),
        [("stem", "stem", "changed"), (None, "stem.0", "inserted"), (None, "stem.1", "inserted")],
    ),
    "longer repeat": (
        lambda: Named(blocks=seq(*(block() for _ in range(3)))),
        lambda: Named(blocks=seq(*(block() for _ in range(5)))),
        [
            (None, f"blocks.{i}{part}", "inserted")
            for i in (3, 4)
            for part in ("", ".conv", ".norm", ".act")
        ],
    ),
    "called twice": (
        lambda: Named(a=conv(4, 4), b=nn.ReLU()),
        lambda: Named(a=conv(4, 4), b=nn.ReLU(), order="a b a"),
        [("a", "a", "changed")],
    ),
    "wrapped": (lambda: block(), lambda: Named(module=block()), [(None, "", "inserted"), ("", "module", "renamed")]),
    "unwrapped": (lambda: Named(module=block()), lambda: block(), [("", None, "removed"), ("module", "", "renamed")]),
    "wrapped beside another": (
        lambda: Named(conv=conv(3, 4), norm=nn.BatchNorm2d(4)),
        lambda: Named(model=Named(conv=conv(3, 4), norm=nn.GroupNorm(2, 4)), extra=conv(4, 1)),
        [
            (None, "model", "inserted"),
            ("conv", "model.conv", "moved"),
            ("norm", "model.norm", "changed+moved"),
            (None, "extra", "inserted"),
        ],
    ),
    "rewired": (
        lambda: Residual("a"),
        lambda: Residual("b"),
        [(":add", ":add", "changed")],
    ),
    "other function": (
        lambda: Relu(torch.relu),
        lambda: Relu(torch.tanh),
        [(":relu", None, "removed"), (None, ":tanh", "inserted")],
    ),
    "dtype": (lambda: nn.Linear(4, 4), lambda: nn.Linear(4, 4).half(), [("", "", "changed")]),
    "one leaf": (lambda: nn.LayerNorm(4), lambda: nn.LayerNorm(8), [("", "", "changed")]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_expectations(case: str) -> None:
    before, after, expected = CASES[case]
    diff = ilmconvert.diff(before(), after())
    assert sorted(rows(diff), key=str) == sorted(expected, key=str)
    assert diff.equal == (not expected)


@pytest.mark.parametrize("case", CASES)
def test_every_node_has_exactly_one_row(case: str) -> None:
    before, after, _ = CASES[case]
    diff = ilmconvert.diff(before(), after())
    for graph, paths in ((diff.before, [r.before for r in diff.rows]), (diff.after, [r.after for r in diff.rows])):
        assert sorted(p for p in paths if p is not None) == sorted(n.path for n in graph.nodes)
    for index, row in enumerate(diff.rows):
        assert row.parent is None or row.parent < index
    assert sorted(i for below in diff.children.values() for i in below) == list(range(len(diff.rows)))


@pytest.mark.parametrize("case", CASES)
def test_the_other_way_round_swaps_inserted_and_removed(case: str) -> None:
    before, after, _ = CASES[case]
    there, back = ilmconvert.diff(before(), after()).counts, ilmconvert.diff(after(), before()).counts
    assert there == {**back, "inserted": back["removed"], "removed": back["inserted"]}


def test_keys_follow_the_names() -> None:
    diff = ilmconvert.diff(Named(a=block()), Named(b=block()))
    renamed = {k: v for row in diff.rows for k, v in row.keys_renamed.items()}
    assert renamed["a.norm.running_mean"] == "b.norm.running_mean"
    assert set(renamed) == set(Named(a=block()).state_dict())
    assert not any(row.keys_added or row.keys_removed for row in diff.rows)


def test_ties_are_told_apart_from_copies() -> None:
    shared = nn.BatchNorm2d(4)
    tied = Named(a=conv(4, 4), n1=shared, n2=shared)
    untied = Named(a=conv(4, 4), n1=nn.BatchNorm2d(4), n2=nn.BatchNorm2d(4))
    diff = ilmconvert.diff(tied, untied)
    assert rows(diff) == [("n1", "n1", "changed"), (None, "n2", "inserted")]
    fields = [(f.name, f.before, f.after) for f in diff.changed[0].fields]
    assert ("aliases", "1", "0") in fields
    assert ("calls", "2", "1") in fields
    assert ilmconvert.diff(tied, tied).equal


def test_tied_parameters_are_seen() -> None:
    def model(*, tied: bool) -> nn.Module:
        result = seq(nn.Linear(4, 4), nn.Linear(4, 4))
        if tied:
            result[1].weight = result[0].weight
        return result

    (row,) = ilmconvert.diff(model(tied=False), model(tied=True)).changed
    ((field),) = row.fields
    assert (row.path, field.group, field.name) == ("1", "parameter", "weight")
    assert field.after == "float32[4, 4] tied to 0.weight"


def test_large_flat_models_are_aligned_quickly_and_in_order() -> None:
    layers = [nn.Linear(2 + i % 7, 2 + (i + 1) % 7) for i in range(700)]
    diff = ilmconvert.diff(seq(*layers), seq(nn.Tanh(), *layers[:300], *layers[301:]))
    assert (diff.counts["inserted"], diff.counts["removed"], diff.counts["changed"]) == (1, 1, 0)


def test_lopsided_trees_do_not_lose_rows() -> None:
    inner = Named(p=Named(q=conv(3, 3), r=nn.BatchNorm2d(3)))
    diff = ilmconvert.diff(Named(a=inner), Named(p=Named(a=inner)))
    assert {(r.before, r.after) for r in diff.rows if r.before and r.after} >= {("a.p.q", "p.a.p.q")}
