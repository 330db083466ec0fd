"""Where TRL 0.11.4 keeps PPO: methods of the last PPOTrainer that had them as functions. Runs in the worker only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.ppo_trainer import PPOTrainer
from trl.trainer.utils import AdaptiveKLController


def trainer(settings: dict[str, Any], kl_coefficient: float = 0.0) -> Any:
    """A PPOTrainer without a model: its config and its KL coefficient are all these methods read."""
    made: Any = object.__new__(PPOTrainer)
    made.config, made.kl_ctl = PPOConfig(**settings), SimpleNamespace(value=kl_coefficient)
    return made


def compute_rewards(t: dict[str, Tensor], kl_coefficient: float, **settings: Any) -> dict[str, Tensor]:
    made = trainer(settings, kl_coefficient)
    rewards, _, kl = made.compute_rewards(t["scores"], t["logprobs"], t["logprobs_ref"], t["mask"])
    return {"rewards": rewards, "kl": kl}


def compute_advantages(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    _, advantages, returns = trainer(settings).compute_advantages(t["values"], t["rewards"], t["mask"])
    return {"advantages": advantages, "returns": returns}


def loss(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """PPOTrainer.loss. "loss" is the sum of both parts, so that one backward pass differentiates both (vf_coef is 1)."""
    logits = torch.zeros(*t["mask"].shape, 2, dtype=torch.float64)  # only for the entropy it reports
    policy, value, stats = trainer({"vf_coef": 1.0, **settings}).loss(
        t["logprobs_old"], t["values_old"], logits, t["values"], t["logprobs"], t["mask"], t["advantages"], t["returns"]
    )
    return {"loss": policy + value, "policy": policy, "value": value, "clip_fraction": stats["policy/clipfrac"]}


def full_kl(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """PPOTrainer's kl_penalty="full", on log-probabilities of the whole vocabulary."""
    return {"kl": trainer({"kl_penalty": "full"})._kl_penalty(t["logprobs"], t["logprobs_ref"])}


def adaptive_kl(t: dict[str, Tensor], target: float, horizon: int, steps: int) -> dict[str, Tensor]:
    """The coefficient after each of a run's measured KLs, from 0.2."""
    controller, values = AdaptiveKLController(0.2, target, horizon), []
    for measured in t["kl"].tolist():
        controller.update(measured, steps)
        values.append(controller.value)
    return {"coefficients": torch.tensor(values, dtype=torch.float64)}
