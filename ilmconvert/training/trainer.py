"""The loop of a recovery: steps, measurements, the best moment, and going on after a break."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ilmconvert.disk import writing
from ilmconvert.errors import CheckpointError, ModelError
from ilmconvert.fingerprint import fingerprint
from ilmconvert.finite import why_not_finite
from ilmconvert.graph.shadow import copy_model
from ilmconvert.nn import ILMNorm
from ilmconvert.options import Progress
from ilmconvert.processes import from_all
from ilmconvert.training.data import ImageData
from ilmconvert.training.evaluate import Judge
from ilmconvert.training.groups import parameter_groups
from ilmconvert.training.objective import Objective, freeze_unreached_
from ilmconvert.training.options import RecoverOptions
from ilmconvert.training.processes import from_main, prepare, same_buffers_
from ilmconvert.training.result import Evaluation, Recovery, RecoveryReport, to_jsonl
from ilmconvert.training.state import JOURNAL, full_weights, read_state, restore_, write_state
from ilmconvert.training.stream import Batch, training_stream

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Listener", "Trainer"]

_MAY_CHANGE = ("workers", "fsdp", "cpu")  # when a run goes on
_RESERVE = 1.5  # times the last measurement is kept for the one at the end of a run with a time limit


@dataclass(frozen=True)
class Listener:
    """Whom to tell: ``progress(what, done, total)``, and each measurement."""

    progress: Progress | None = None
    on_evaluation: Callable[[Evaluation], None] | None = None


class Trainer:
    """One session of a recovery.

    Args:
        accelerator: of this process.
        original: the teacher; None for training on labels.
        converted: the model to start from.
        data: the images.
        options: how to train.
        listener: whom to tell.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        original: nn.Module | None,
        converted: nn.Module,
        data: ImageData,
        options: RecoverOptions,
        listener: Listener,
    ) -> None:
        self._began, self._before, self._measuring = time.monotonic(), 0.0, 0.0
        self._accelerator, self._converted, self._data = accelerator, converted, data
        self._options, self._listener = options, listener
        self._identity = {
            "original": None if original is None else fingerprint(original),
            "converted": fingerprint(converted),
            "images": data.digest,
            **{name: value for name, value in asdict(options).items() if name not in _MAY_CHANGE},
        }
        teacher = None if original is None else self._placed(original).eval().requires_grad_(False)
        self._candidate = self._placed(converted)  # whole in every process: what is measured
        self._broken: dict[str, str] = {}
        self._judge = Judge(data, options, teacher, accelerator, self._broken.update)
        self._judge.check(self._candidate)
        student = _widened(self._placed(converted))
        self._trained = self._freeze(student)
        if accelerator.num_processes > 1:
            first = next(training_stream(data.train, options, 0, accelerator.process_index, accelerator.num_processes))
            freeze_unreached_(accelerator, teacher, student, options, first)
        self._objective = Objective(accelerator, teacher, student, options)
        self._model, self._optimizer = prepare(accelerator, student, lambda: self._groups(student), options)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._steps = options.total_steps(len(data.train))  # type: ignore[arg-type]
        self._every = options.evaluate_every or (max(self._steps // 20, 1) if self._steps else 50)
        self._step, self._evaluations = 0, list[Evaluation]()
        self._best: dict[str, Tensor] = {}

    def resume(self, folder: Path) -> None:
        """Go on with the run in a folder.

        Raises:
            CheckpointError: there is none, or it is another run.
        """
        state = read_state(folder)
        theirs = state.progress["identity"]
        ours = _plain(self._identity)
        if differing := [name for name in ours if theirs.get(name) != ours[name]]:
            raise CheckpointError(
                f"expected the run in {str(folder)!r} to be of this model, these images and options, but it differs in "
                f"{', '.join(differing)}; go on with the same ones, or begin anew"
            )
        restore_(state, self._model, getattr(self._optimizer, "optimizer", self._optimizer))
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state.progress["scaler"])
        self._best, self._step, self._before = state.best, state.progress["step"], state.progress["seconds"]
        self._evaluations = [Evaluation.from_dict(e) for e in state.progress["evaluations"]]
        self._broken.update(state.progress["broken"])

    def train(self, folder: Path | None) -> Recovery:
        """Train until a limit is reached; measure, and save in ``folder`` if given, on the way."""
        if not self._evaluations:
            self._measure(0.0, None, folder)
        ranks = self._accelerator.process_index, self._accelerator.num_processes
        stream = training_stream(self._data.train, self._options, self._step, *ranks)
        losses: list[Tensor] = []
        while (share := self._share()) < 1 and not self._diverged:
            losses.append(self._train_on(next(stream), share))
            self._step += 1
            self._tell()
            if self._step % self._every == 0 or self._share() >= 1:
                self._measure(self._optimizer.param_groups[0]["lr"], torch.stack(losses).mean(), folder)
                losses = []
        return self._result()

    @property
    def _diverged(self) -> bool:
        loss = self._evaluations[-1].loss
        return loss is not None and not math.isfinite(loss)

    def _train_on(self, batch: Batch, share: float) -> Tensor:
        """One optimizer step; returns the loss."""
        self._broken.update(batch.broken)
        torch.manual_seed(hash((self._options.seed, self._step, self._accelerator.process_index)) % 2**63)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * _schedule(share, self._options.warmup)
        loss = self._objective(self._model, batch)
        self._accelerator.backward(loss)
        if self._options.clip:
            self._accelerator.clip_grad_norm_(self._model.parameters(), self._options.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def _measure(self, lr: float, loss: Tensor | None, folder: Path | None) -> None:
        """Measure the present weights, keep them if they are the best, and save the run."""
        began = time.monotonic()
        same_buffers_(self._model)
        self._candidate.load_state_dict(full_weights(self._model))
        measured = self._judge(self._candidate)
        mean = None if loss is None else float(self._accelerator.reduce(loss, "mean"))
        epoch = self._step * self._options.batch_size / len(self._data.train)  # type: ignore[arg-type]
        evaluation = Evaluation(self._step, epoch, self._seconds(), lr, mean, measured)
        if not self._evaluations and not math.isfinite(evaluation.distance):
            raise ModelError(_no_numbers(self._objective.original, self._candidate))
        if not self._best or evaluation.merit > max(e.merit for e in self._evaluations):
            self._best = {name: t.detach().cpu().clone() for name, t in self._candidate.state_dict().items()}
        self._evaluations.append(evaluation)
        if self._listener.on_evaluation is not None:
            self._listener.on_evaluation(evaluation)
        if folder is not None:
            self._save(folder)
        known = len(self._evaluations) > 1 or self._objective.original is None
        self._measuring = (time.monotonic() - began) / (1 if known else 2)  # the original answers once

    def _save(self, folder: Path) -> None:
        scaler = self._accelerator.scaler
        progress = {
            "identity": self._identity,
            "step": self._step,
            "seconds": self._seconds(),
            "evaluations": [e.to_dict() for e in self._evaluations],
            "broken": self._broken,
            "scaler": {} if scaler is None else scaler.state_dict(),
        }
        optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        main = self._accelerator.is_main_process
        write_state(folder, self._model, optimizer, self._best, progress, main=main)
        if main:
            with writing(folder):
                (folder / JOURNAL).write_text(to_jsonl(self._evaluations), encoding="utf-8")

    def _result(self) -> Recovery:
        model = copy_model(self._converted)
        model.load_state_dict(self._best)
        report = RecoveryReport(
            evaluations=tuple(self._evaluations),
            images=len(self._data.train),  # type: ignore[arg-type]
            held_out=self._evaluations[0].measured.answers,
            trained=self._trained,
            options=_plain(asdict(self._options)),
            stopped="diverged" if self._diverged else "done",
            broken=from_all(self._broken),
        )
        return Recovery(model, report)

    def _placed(self, model: nn.Module) -> nn.Module:
        return copy_model(model).to(self._accelerator.device)

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        o = self._options
        return parameter_groups(
            model, lr=o.lr, weight_decay=o.weight_decay, meta_lr_scale=o.meta_lr_scale, freeze=o.freeze
        )

    def _freeze(self, model: nn.Module) -> int:
        """Set modes and ``requires_grad`` to what is trained; returns the number of trained parameters."""
        trained = {p for group in self._groups(model) for p in group["params"]}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)
        for module in model.modules():
            module.training = self._options.freeze is not True or isinstance(module, ILMNorm)
        return sum(p.numel() for p in trained)

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def _share(self) -> float:
        """How much of the run is done, the same in every process; 1 or more is the end."""
        shares = [self._step / self._steps] if self._steps else []
        if self._options.minutes:
            left = 60 * self._options.minutes - _RESERVE * self._measuring
            shares.append(self._seconds() / left if left > 0 else 1.0)
            return from_main(self._accelerator, max(shares))
        return shares[0]

    def _tell(self) -> None:
        if self._listener.progress is None:
            return
        if self._options.minutes:
            limit = math.ceil(60 * self._options.minutes)
            self._listener.progress("recovering (seconds)", min(int(self._seconds()), limit), limit)
        else:
            self._listener.progress("recovering", self._step, self._steps or 0)


def _schedule(share: float, warmup: float) -> float:
    """The learning rate's factor: a linear rise, then a cosine down to zero."""
    if share < warmup:
        return (share + 0.01 * warmup) / (1.01 * warmup)
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup or 1)))


def _widened(model: nn.Module) -> nn.Module:
    """Half-precision weights as float32, which small steps need; what is measured keeps its dtype."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.data.float()
    return model


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}


def _no_numbers(original: nn.Module | None, converted: nn.Module) -> str:
    """Why there is nothing to train towards, or from."""
    models = {"the original": original, "the converted model": converted}
    told = "; ".join(f"{who}: {why_not_finite(model)}" for who, model in models.items() if model is not None)
    return f"expected models with finite answers at the start, but they are not ({told})"
