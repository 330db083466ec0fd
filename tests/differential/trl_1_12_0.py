"""Where TRL 1.12.0 keeps what later versions dropped: PPO's helpers and BCO. Runs in the worker only."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments
from trl.experimental.ppo import ppo_trainer


def masked_whiten(t: dict[str, Tensor], shift_mean: bool = True) -> dict[str, Tensor]:
    return {"white": ppo_trainer.masked_whiten(t["x"], t["mask"], shift_mean=shift_mean)}


def masked_mean(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": ppo_trainer.masked_mean(t["x"], t["mask"])}


def bco(t: dict[str, Tensor], beta: float, steps: int = 1) -> dict[str, Tensor]:
    """BCOTrainer.bco_loss called `steps` times on the same sums of log-probabilities: the running mean moves each time."""
    trainer: Any = object.__new__(BCOTrainer)
    trainer.accelerator, trainer.beta = Accelerator(cpu=True), beta
    trainer.embedding_func = trainer.embedding_tokenizer = None  # no matching of the underlying distributions
    trainer.running = RunningMoments(trainer.accelerator)
    given = (t["chosen"], t["rejected"], t["chosen_ref"], t["rejected_ref"], None, None)
    for _ in range(steps):
        losses, *_rewards, delta = trainer.bco_loss(*given)
    return {"loss": losses.mean(), "delta": torch.as_tensor(delta)}
