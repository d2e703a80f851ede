"""A saved conversion: a folder of plain files, without pickle.

===============================  =====================================================================
``model.safetensors``            the converted model's weights
``original_norms.safetensors``   the norms that were replaced, for :meth:`Conversion.revert`
``config.json``                  timm's own model config (architecture, num_classes, pretrained_cfg,
                                 model_args), or the factory; and what wrote it, under ``ilmconvert``
``plan.json``                    every decision; loading replays it
``README.md``                    a short model card with the report
``calibration.json``             the account of a calibration
``recover.*``                    of a recovery: its log (csv, jsonl), account (json) and curve (png)
===============================  =====================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from ilmconvert.checkpoint.card import model_card
from ilmconvert.checkpoint.origin import timm_config, trusted_source
from ilmconvert.checkpoint.weights import check_keys
from ilmconvert.conversion import Conversion, size_of
from ilmconvert.disk import writing
from ilmconvert.errors import CheckpointError, NotFoundError, OutputExistsError, PlanError
from ilmconvert.jsonable import parse_json
from ilmconvert.plan import Plan
from ilmconvert.report import Report
from ilmconvert.rewrite import rewrite
from ilmconvert.sources import Source, build, is_factory
from ilmconvert.wording import one_line

__all__ = [
    "FORMAT_VERSION",
    "RECORDS",
    "check_target",
    "is_saved",
    "load",
    "load_conversion",
    "save",
    "saved_source",
    "write_beside",
]

FORMAT_VERSION = 1
WEIGHTS, NORMS, CONFIG, PLAN, CARD = (
    "model.safetensors",
    "original_norms.safetensors",
    "config.json",
    "plan.json",
    "README.md",
)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KINDS = {"architecture": str, "factory": str, "model_args": dict}  # where config.json has them
_JSON = {str: "a string", dict: "an object"}
RECORDS = ("calibration.json", "recover.csv", "recover.json", "recover.jsonl", "recover.png")
FILES = (WEIGHTS, NORMS, CONFIG, PLAN, CARD, *RECORDS)


def is_saved(path: str | Path) -> bool:
    """Whether ``path`` is a folder that :func:`save` wrote."""
    folder = Path(path)
    return (folder / PLAN).is_file() and (folder / CONFIG).is_file() and "ilmconvert" in _read_json(folder / CONFIG)


def saved_source(path: str | Path) -> Source | None:
    """How a saved folder says that its original is built; None if it does not."""
    return _source(_read_config(Path(path)))


def save(
    conversion: Conversion,
    path: str | Path,
    *,
    factory: str | None = None,
    model_args: dict[str, Any] | None = None,
    force: bool = False,
    records: Mapping[str, bytes] | None = None,
) -> Path:
    """Save a conversion as a folder, all of it or nothing.

    Args:
        conversion: what to save.
        path: the folder to write.
        factory: ``package.module:factory`` that builds the original of a model that is not timm's. Without it, loading
            needs the rebuilt original.
        model_args: keyword arguments (in JSON types) that the factory needs.
        force: replace a conversion saved there before.
        records: further files by name (of :data:`RECORDS`), such as the log of a recovery.

    Returns:
        The folder.

    Raises:
        OutputExistsError: the folder exists, and either ``force`` is False or it holds something else.
        CheckpointError: the model has state that safetensors cannot write, a record has another name, or ``factory``
            is no such name.

    Warns:
        UserWarning: a timm model that its name does not rebuild (changed by hand, or built with arguments that are no
            JSON values).
    """
    if factory is not None and not is_factory(factory):
        raise CheckpointError(f"expected package.module:factory, got {factory!r}")
    if unknown := sorted(set(records or {}) - set(RECORDS)):
        raise CheckpointError(f"expected records among {', '.join(RECORDS)}, got {', '.join(unknown)}")
    conversion = conversion.current()
    source = Source("factory", factory, model_args or {}) if factory else trusted_source(conversion)
    plan, card = conversion.plan.to_json(), model_card(conversion, source, worked_on=bool(records))
    config = _json(_config(conversion, source))
    with write_beside(path, force=force) as folder:
        _write_weights(conversion, folder)
        (folder / PLAN).write_text(plan, encoding="utf-8")
        (folder / CONFIG).write_text(config, encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")
        for name, content in (records or {}).items():
            (folder / name).write_bytes(content)
    return Path(path)


def _write_weights(conversion: Conversion, folder: Path) -> None:
    try:
        save_model(conversion.model, str(folder / WEIGHTS), metadata={"format": "pt"})
        save_file(norm_tensors(conversion.originals), str(folder / NORMS), metadata={"format": "pt"})
    except (RuntimeError, AttributeError, NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"expected a state dict of plain tensors with data of their own, but {conversion.plan.model} has another "
            f"kind, which safetensors cannot write: {one_line(error)}"
        ) from error


def _json(config: dict[str, Any]) -> str:
    try:
        return json.dumps(config, indent=1) + "\n"
    except TypeError as error:
        raise CheckpointError(f"expected model_args of JSON types, but: {error}") from error


def load(path: str | Path, *, model: nn.Module | None = None, trust_factory: bool = False) -> nn.Module:
    """The converted model of a saved folder, in evaluation mode, weights in, in the dtypes it was saved with.

    Modes and ``requires_grad`` flags are not saved.

    Args:
        path: the folder.
        model: the rebuilt original, where the folder does not tell how to build it. It is left as it is.
        trust_factory: import and call the factory that the folder names, for a model that is not timm's. Only do so
            with folders you trust: any importable function can be named.

    Raises:
        NotFoundError: no saved conversion.
        CheckpointError: a damaged one, or weights that do not fit.
        PlanError: ``model`` is not what the plan was made for.
    """
    return load_conversion(path, model=model, trust_factory=trust_factory).model


@torch.inference_mode(False)
def load_conversion(path: str | Path, *, model: nn.Module | None = None, trust_factory: bool = False) -> Conversion:
    """As :func:`load`, with the plan, the report and the original norms: it can be reverted and saved again.

    Args:
        path: the folder.
        model: the rebuilt original, where the folder does not tell how to build it. It is left as it is.
        trust_factory: as in :func:`load`.

    Raises:
        NotFoundError: no saved conversion.
        CheckpointError: a damaged one, or weights that do not fit.
        PlanError: ``model`` is not what the plan was made for.

    Example:
        >>> import ilmconvert, tempfile, timm
        >>> conversion = ilmconvert.convert(timm.create_model("test_vit"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loaded = ilmconvert.load_conversion(conversion.save(f"{folder}/vit"))
        >>> loaded.report == conversion.report, type(loaded.revert().norm).__name__
        (True, 'LayerNorm')
    """
    folder = Path(path)
    if not is_saved(folder):
        found = "a folder without them" if folder.is_dir() else "a file" if folder.exists() else "nothing"
        raise NotFoundError(
            f"expected a folder saved by ilmconvert (with {CONFIG} and {PLAN}) at {str(folder)!r}, found {found}; "
            "`ilmconvert convert MODEL --output FOLDER` and `conversion.save(FOLDER)` make one"
        )
    plan = _read_plan(folder)
    config = _read_config(folder)
    original = _rebuild(folder, config, trust_factory) if model is None else model
    converted, originals = rewrite(original, plan)
    _load_strictly(converted, folder / WEIGHTS)
    _restore_norms(originals, folder / NORMS)
    report, known = Report.of(plan, size_of(original), originals), config["ilmconvert"].get("fingerprint")
    return Conversion(converted.eval(), report, originals, _source(config), known, size_of(converted))


def check_target(path: str | Path, *, force: bool) -> Path:
    """The folder to write, if it may be written.

    Raises:
        OutputExistsError: it exists, and either ``force`` is False or there is something else than a saved conversion.
    """
    target = Path(path).resolve()
    if Path.cwd().is_relative_to(target):
        raise OutputExistsError(f"expected a folder of its own, got {str(path)!r}, which holds the working directory")
    if not target.exists():
        return target
    if not force:
        raise OutputExistsError(
            f"expected a new folder, but {str(target)!r} exists; choose another, or give --force (force=True)"
        )
    foreign = [str(path)] if target.is_file() else sorted(p.name for p in target.iterdir() if p.name not in FILES)
    if foreign or (any(target.iterdir()) and not is_saved(target)):
        raise OutputExistsError(
            f"expected only a conversion saved before in {str(target)!r}, the one thing --force replaces; there is "
            f"something else{': ' if foreign else ''}{', '.join(foreign[:5])}. Choose another folder"
        )
    return target


@contextlib.contextmanager
def write_beside(path: str | Path, *, force: bool) -> Iterator[Path]:
    """A new folder beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        OutputExistsError: ``path`` exists and may not be replaced.
        IlmconvertError: the place cannot be written to.
    """
    target = check_target(path, force=force)
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        aside = beside.with_name(f"{beside.name}.old")
        try:
            yield beside
            beside.chmod(0o777 & ~_umask())
            for file in beside.iterdir():
                file.chmod(0o666 & ~_umask())
            if target.exists():
                target.replace(aside)
            beside.replace(target)
        except BaseException:
            if aside.exists() and not target.exists():
                aside.replace(target)
            raise
        finally:
            for leftover in (beside, aside):
                shutil.rmtree(leftover, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _config(conversion: Conversion, source: Source | None) -> dict[str, Any]:
    from ilmconvert import __version__

    ours = {
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "model": conversion.plan.model,
        "fingerprint": conversion.fingerprint,
    }
    if source is None:
        return {"ilmconvert": ours}
    if source.kind == "factory":
        return {"ilmconvert": {**ours, "factory": source.name, "model_args": source.model_args}}
    return {**timm_config(conversion.model), "ilmconvert": ours}


def _source(config: dict[str, Any]) -> Source | None:
    ours = config.get("ilmconvert", {})
    if factory := ours.get("factory"):
        return Source("factory", factory, ours.get("model_args", {}))
    if architecture := config.get("architecture"):
        return Source("timm", architecture, config.get("model_args", {}))
    return None


def _rebuild(folder: Path, config: dict[str, Any], trust_factory: bool) -> nn.Module:
    source = _source(config)
    if source is None:
        raise CheckpointError(
            f"the folder {str(folder)!r} does not tell how to build its {config.get('ilmconvert', {}).get('model')}; "
            "rebuild the original and give it to ilmconvert.load or load_conversion, as model=original"
        )
    if source.kind == "factory" and not trust_factory:
        raise CheckpointError(
            f"the folder {str(folder)!r} asks to import and call {source.name!r}; if you trust it, load with "
            "trust_factory=True (--trust-factory on the command line), or give the rebuilt original as model="
        )
    if source.kind == "factory":
        return build(source.name, model_args=source.model_args)
    return build(f"local-dir:{folder}")


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / CONFIG)
    ours = config["ilmconvert"]
    if not isinstance(ours, dict) or ours.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"expected format_version {FORMAT_VERSION} under 'ilmconvert' in {str(folder / CONFIG)!r}, got {ours!r}; "
            "it may come from a newer release"
        )
    for values in (config, ours):
        for name, kind in _KINDS.items():
            if not isinstance(values.get(name, kind()), kind):
                raise CheckpointError(
                    f"expected {name!r} in {str(folder / CONFIG)!r} to be {_JSON[kind]}, got {values[name]!r}"
                )
    return config


def _read_plan(folder: Path) -> Plan:
    try:
        return Plan.from_json((folder / PLAN).read_text(encoding="utf-8"))
    except (PlanError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the plan in {str(folder / PLAN)!r} cannot be read: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"expected JSON in {str(file)!r}, but: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"expected a JSON object in {str(file)!r}, got {type(data).__name__}")
    return data


def _load_strictly(model: nn.Module, file: Path) -> None:
    try:
        with safe_open(file, "pt") as stored:
            dtypes = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
        # a tied tensor is stored under one of its names, not always its first
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        for name, tensor in tensors:
            if dtypes.get(name) in _DTYPES:
                tensor.data = tensor.data.to(_DTYPES[dtypes[name]])
        load_model(model, str(file))
    except Exception as error:
        raise CheckpointError(
            f"the weights in {str(file)!r} do not load: {one_line(error)}; "
            "copy the folder again from where it was saved, or convert anew"
        ) from error


def norm_tensors(originals: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The norms' own tensors by full name; those of a fused activation belong to the model."""
    return {
        f"{path}.{name}".lstrip("."): tensor.detach().contiguous().clone()
        for path, norm in originals.items()
        for name, tensor in norm.state_dict().items()
        if not name.startswith(("drop.", "act."))
    }


def _restore_norms(originals: dict[str, nn.Module], file: Path) -> None:
    try:
        tensors = load_file(str(file))
    except Exception as error:
        raise CheckpointError(f"the original norms in {str(file)!r} cannot be read: {error}") from error
    check_keys(norm_tensors(originals), tensors, str(file))
    for path, norm in originals.items():
        for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
            if (stored := tensors.get(f"{path}.{name}".lstrip("."))) is not None:
                tensor.data = stored
