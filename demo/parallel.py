"""Two single-threaded processes that train as one: gloo, flat gradients, running average, resumable stages.

Two threads of one process would be far slower whenever something else runs: OpenMP threads spin as they wait.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

WORKERS = 2
_SAVE_EVERY = 200
_LOG_EVERY = 50


def start(rank: int, port: int) -> None:
    """Join the group of WORKERS processes on this machine."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= WORKERS
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def total(values: Iterable[float]) -> list[float]:
    """Element-wise sum over the processes."""
    tensor = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def log(rank: int, message: str) -> None:
    """One line with the time of day, from the first process only."""
    if rank == 0:
        print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


class Average:
    """Exponential running average of some parameters."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._decay = decay
        self._live = parameters
        self.mean = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the present weights; the first steps are forgotten faster."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for mean, live in zip(self.mean, self._live, strict=True):
            mean.lerp_(live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights; call again to undo."""
        for live, mean in zip(self._live, self.mean, strict=True):
            held = live.detach().clone()
            live.copy_(mean)
            mean.copy_(held)


class Stage:
    """One resumable stretch of training: AdamW, a rate for each step, an average, a file with all of it."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        parameters: list[nn.Parameter],
        file: Path,
        rank: int,
        decay: float,
    ) -> None:
        self.rank = rank
        self.step = 0
        self._modules = modules
        self._parameters = parameters
        self._file = file
        self._optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        self.average = Average(parameters, decay)
        self._losses: list[float] = []
        self._since = time.monotonic()
        if file.exists():
            self._resume()

    def advance(self, loss: torch.Tensor, rate: float) -> None:
        """Backward pass and one optimiser step at this learning rate; logs, and saves every 200 steps."""
        self._optimiser.zero_grad()
        loss.backward()
        average_gradients(self._parameters)
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self.average.update(self.step)
        self.step += 1
        self._losses.append(float(loss.detach()))
        if self.step % _LOG_EVERY == 0:
            seconds = (time.monotonic() - self._since) / _LOG_EVERY
            mean = sum(self._losses) / len(self._losses)
            done = f"{self._file.stem} {self.step} loss {mean:.4f} rate {rate:.1e} {seconds:.3f} s/step"
            log(self.rank, done)
            self._losses.clear()
            self._since = time.monotonic()
        if self.step % _SAVE_EVERY == 0:
            self.save()

    def finish(self) -> None:
        """Leave the averaged weights in the modules."""
        self.save()
        self.average.swap()

    def save(self) -> None:
        """Write everything that a later run needs to go on from here (first process only)."""
        if self.rank != 0:
            return
        state: dict[str, Any] = {
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self._modules.items()},
            "optimiser": self._optimiser.state_dict(),
            "average": self.average.mean,
        }
        # Renamed into place, so that a killed run never leaves half a file.
        temporary = self._file.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self._file)

    def _resume(self) -> None:
        state: dict[str, Any] = torch.load(self._file, weights_only=True)
        self.step = state["step"]
        for name, module in self._modules.items():
            module.load_state_dict(state["modules"][name])
        self._optimiser.load_state_dict(state["optimiser"])
        for mean, saved in zip(self.average.mean, state["average"], strict=True):
            mean.copy_(saved)
        log(self.rank, f"{self._file.stem} resumed at step {self.step}")


def cosine(progress: float, peak: float, step: int, warmup: int = 100) -> float:
    """Learning rate: linear over `warmup` steps, then half a cosine down to 2 % as progress goes 0 -> 1."""
    fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * fall * min(1.0, (step + 1) / warmup)
