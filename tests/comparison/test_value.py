"""The diff as a value: JSON there and back, and what it refuses."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import torch

import ilmconvert
from ilmconvert.comparison import GraphDiff, Numbers
from ilmconvert.errors import CheckpointError
from tests.comparison.models import Other, Small, every_kind, hostile_diff


@pytest.mark.parametrize("make", [every_kind, hostile_diff])
def test_json_there_and_back(make: object) -> None:
    diff = make()  # type: ignore[operator]
    text = json.dumps(diff.to_dict(), allow_nan=False)
    again = GraphDiff.from_dict(json.loads(text))
    assert again == diff
    assert json.dumps(again.to_dict()) == text
    assert pickle.loads(pickle.dumps(diff)) == diff
    assert again.to_text() == diff.to_text()


def test_every_kind_of_change_is_told() -> None:
    diff = every_kind()
    assert {(r.before, r.after, r.changes) for r in diff.changed} == {
        ("", "", ("changed",)),
        (None, "stem.1", ("inserted",)),
        ("stem.1", "stem.2", ("renamed",)),
        ("stem.2", "stem.3", ("renamed",)),
        ("blocks.0.norm", "blocks.0.norm", ("changed",)),
        ("blocks.1.conv", "blocks.1.conv", ("changed",)),
        *((f"blocks.2{part}", None, ("removed",)) for part in ("", ".conv", ".norm", ".act")),
        ("blocks.2:add", None, ("removed",)),
        ("head", "classifier", ("renamed",)),
    }
    assert diff.counts == {"changed": 3, "inserted": 1, "removed": 5, "renamed": 3, "moved": 0, "unchanged": 12}
    keys = {"added": set(), "removed": set(), "renamed": {}}
    for row in diff.rows:
        keys["added"] |= set(row.keys_added)
        keys["removed"] |= set(row.keys_removed)
        keys["renamed"] |= row.keys_renamed
    old, new = set(Small().state_dict()), set(Other().state_dict())
    assert old - keys["removed"] - set(keys["renamed"]) | keys["added"] | set(keys["renamed"].values()) == new
    assert keys["renamed"]["head.weight"] == "classifier.weight"


def test_details_of_a_converted_site() -> None:
    conversion = ilmconvert.convert(Small(width=32), bn_to="group", num_groups=8, key_group_size=4)
    diff = conversion.diff()
    row = next(r for r in diff.changed if r.path == "stem.1")
    fields = {f.name: (f.before, f.after) for f in row.fields}
    assert fields["class"] == ("BatchNorm2d", "ILMNorm")
    assert fields["num_groups"] == (None, "8")
    assert fields["num_key_groups"] == (None, "8")
    assert "eps" not in fields  # it is kept
    assert fields["predictor.encoder.weight"] == (None, "float32[2, 8]")
    assert fields["running_var"] == ("float32[32]", None)
    assert row.keys_added == tuple(
        f"stem.1.predictor.{n}.weight" for n in ("encoder", "scale_decoder", "shift_decoder")
    )
    assert row.keys_removed == tuple(f"stem.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked"))


def test_equal_models() -> None:
    diff = ilmconvert.diff(Small(), Small())
    assert diff.equal
    assert diff.to_unified() == ""
    assert diff.to_dict()["summary"]["counts"]["unchanged"] == len(diff.rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "expected a diff of version 1, got version 99"),
        ({"rows": [{"before": "nowhere", "after": None, "parent": None}]}, "to be a node, got 'nowhere'"),
        ({"rows": 3}, "diff.rows"),
        ({"colour": "red"}, "got colour"),
    ],
)
def test_damaged_json_is_refused(change: dict[str, object], message: str) -> None:
    data = {**json.loads(json.dumps(every_kind().to_dict())), **change}
    with pytest.raises(CheckpointError, match=message):
        GraphDiff.from_dict(data)


def test_figures_that_are_not_finite_stay_out_of_json() -> None:
    x = torch.full((1, 3, 8, 8), float("nan"))
    diff = ilmconvert.diff(Small(), Small(), numerics=x)
    assert diff.rows[0].numbers == Numbers(None, None, "not finite")
    json.dumps(diff.to_dict(), allow_nan=False)
    assert GraphDiff.from_dict(diff.to_dict()) == diff
    assert replace(diff, numerics=None) != diff
