"""Where TRL 1.12.0 keeps what later versions dropped: PPO's helpers and BCO. Runs in the worker only."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import Tensor
from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments
from trl.experimental.ppo import ppo_trainer


def masked_whiten(t: dict[str, Tensor], shift_mean: bool = True) -> dict[str, Tensor]:
    return {"white": ppo_trainer.masked_whiten(t["x"], t["mask"], shift_mean=shift_mean)}


def masked_mean(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": ppo_trainer.masked_mean(t["x"], t["mask"])}


def bco(t: dict[str, Tensor], beta: float) -> dict[str, Tensor]:
    """BCOTrainer.bco_loss of the last of several steps (rows of sums of log-probabilities): every step moves the running mean."""
    trainer: Any = object.__new__(BCOTrainer)
    trainer.accelerator, trainer.beta = Accelerator(cpu=True), beta
    trainer.embedding_func = trainer.embedding_tokenizer = None  # no matching of the underlying distributions
    trainer.running = RunningMoments(trainer.accelerator)
    for chosen, rejected, chosen_ref, rejected_ref in zip(t["chosen"], t["rejected"], t["chosen_ref"], t["rejected_ref"], strict=True):
        losses, *_ = trainer.bco_loss(chosen, rejected, chosen_ref, rejected_ref, None, None)
    return {"loss": losses.mean()}
