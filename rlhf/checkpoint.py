"""PPO's checkpoints: everything that changes during a run, written whole or not at all."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from alignment.distributed import as_part, from_main_process, whole
from alignment.errors import RunError
from alignment.files import write_folder
from alignment.runs import Run, checkpoint_step, mark_complete

KEEP_CHECKPOINTS = 2


@dataclass(frozen=True)
class Learner:
    """A model in training with its optimizer and learning-rate schedule."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def state(self, *, keep: bool = True) -> dict[str, Any]:
        """Trained parameters by name, moments and the schedule's position, all of them whole.

        Collective where FSDP has split the model. Without `keep` this process only takes part.
        """
        optimizer = self.optimizer.state_dict()
        moments = {
            index: {name: _gathered(value, keep=keep) for name, value in of_parameter.items()}
            for index, of_parameter in optimizer["state"].items()
        }
        return {
            "parameters": self.parameters(keep=keep),
            "optimizer": optimizer | {"state": moments},
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Puts a state back. Raises KeyError where it has a parameter that the model lacks."""
        self.load_parameters(state["parameters"])
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            index: {
                name: as_part(value, trained[index]) if value.shape == trained[index].shape else value
                for name, value in of_parameter.items()
            }
            for index, of_parameter in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})
        self.scheduler.load_state_dict(state["scheduler"])

    def parameters(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """A copy of the trained parameters by name, on the CPU; collective, and with `keep`, as `state`."""
        trained = ((name, p.detach()) for name, p in self._named_parameters() if p.requires_grad)
        gathered = ((name, whole(p)) for name, p in trained)
        return {name: p.to("cpu", copy=True) for name, p in gathered if keep}

    def load_parameters(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Puts parameters back, which every process has. Raises KeyError where the model lacks one."""
        own = dict(self._named_parameters())
        with torch.no_grad():
            for name, value in parameters.items():
                own[name].copy_(as_part(value, own[name]))

    def load_from_main_process(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Puts parameters back that the main process has. Collective."""
        is_main = PartialState().is_main_process
        with torch.no_grad():
            for name, own in self._named_parameters():
                if own.requires_grad:
                    empty = torch.empty(own.shape, dtype=own.dtype, device=own.device)
                    value = parameters[name].to(own.device) if is_main else empty
                    own.copy_(as_part(from_main_process(value), own))

    def _named_parameters(self) -> Any:
        return (self.model.module if hasattr(self.model, "module") else self.model).named_parameters()


def _gathered(value: torch.Tensor, *, keep: bool) -> torch.Tensor | None:
    """The whole of a tensor on the CPU, or None; not a copy where it is there already."""
    found = whole(value)
    return found.cpu() if keep else None


def save_checkpoint(run_dir: Run, step: int, learners: Mapping[str, Learner], extra: Mapping[str, Any]) -> None:
    """Writes `checkpoints/checkpoint-STEP`, marks it complete last, and removes older ones but the last.

    Collective: every process calls it, the main one writes. `extra` holds whatever else decides how the run goes on:
    numbers, texts and mappings of them. Random numbers come from the run's seed and the iteration: no state is left.
    """
    if not run_dir.writes:
        for learner in learners.values():
            learner.state(keep=False)
        return
    folder = run_dir.path / "checkpoints" / f"checkpoint-{step}"

    def fill(path: Path) -> None:
        for name, learner in learners.items():  # one after the other: of a large model all this is much memory
            torch.save(learner.state(), path / f"{name}.pt")
        torch.save(dict(extra), path / "run.pt")

    write_folder(folder, fill)
    run_dir.note_elapsed()
    mark_complete(folder)
    for old in sorted(folder.parent.glob("checkpoint-*"), key=checkpoint_step)[:-KEEP_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)  # NFS keeps a file that a resumed run still has mapped


def load_checkpoint(folder: Path, learners: Mapping[str, Learner]) -> tuple[int, dict[str, Any]]:
    """Puts a checkpoint's state back; returns the iterations done and what else was saved.

    Raises RunError where a file of it is damaged.
    """
    for name, learner in learners.items():
        learner.load_state(_read(folder / f"{name}.pt"))
    return checkpoint_step(folder), _read(folder / "run.pt")


def _read(path: Path) -> dict[str, Any]:
    try:  # mapped, since all processes read it
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(
            f"{path}: the checkpoint is damaged ({reason}). Remove its folder: --resume then goes on from the "
            "checkpoint before it, or begins anew where there is none."
        ) from error
