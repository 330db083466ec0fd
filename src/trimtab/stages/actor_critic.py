"""Policy and value model as one thing that looks at a batch and learns from it.

Three arrangements: the value head on the policy's own trunk, a separate critic model, and no critic at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from pydantic import Field

from trimtab.batch import Batch, Counts, Loss, Outputs, observe
from trimtab.config import Config
from trimtab.models.language import LanguageModel
from trimtab.models.reference import Reference
from trimtab.models.scorer import Scorer
from trimtab.models.scratch import Scratch
from trimtab.protocols import Algorithm
from trimtab.training.checkpoint import Saveable
from trimtab.training.optimiser import OptimConfig, Optimiser
from trimtab.training.update import Ahead, update


class CriticConfig(Config):
    """The value model."""

    trunk: Literal["shared", "own"] = Field("shared", description="a head on the policy's hidden states, or a separate model")
    init: Literal["policy", "reward"] = Field("policy", description="where a separate critic starts: the policy, or the reward model")
    weight: float = Field(0.1, gt=0, description="weight of the value loss beside the policy loss (shared trunk)")
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=1e-4, schedule="constant"), description="the critic's own optimiser")
    warmup_steps: int = Field(0, ge=0, description="rollout batches on which only the critic learns")
    updates: int = Field(1, gt=0, description="critic steps per policy step (separate critic)")


class ActorCritic(Protocol):
    """What the policy stage asks of policy and critic together; `at` is the rollout step, for the learning rate."""

    policy: LanguageModel

    def look(self, batch: Batch, *, ahead: bool = False) -> Outputs:
        """Log-probabilities, entropies and (with a critic) values of a batch, without gradients.

        ahead: this batch is learnt from next, before any weight changes, so that its first forward pass may be kept for that."""
        ...

    def learn(self, batch: Batch, algorithm: Algorithm, at: int) -> dict[str, float]:
        """One policy step, and the critic's steps beside it; metrics `policy/...`, `critic/...`."""
        ...

    def learn_values(self, batch: Batch, algorithm: Algorithm, at: int) -> dict[str, float]:
        """A step of the critic alone (warm-up)."""
        ...

    def saveables(self) -> dict[str, Saveable]:
        """The models, by folder name."""
        ...

    def optimisers(self) -> dict[str, Optimiser]:
        """What holds the weights that are trained, by name."""
        ...


@dataclass(frozen=True)
class Passes:
    """How forward passes are made: the policy's temperature, packed tokens at once, whether the loss needs entropies, and

    the reference when it needs the full KL to it at every prefix."""

    temperature: float
    token_budget: int
    entropy: bool
    full_kl_to: Reference | None = None


class PolicyOnly:
    """No critic: the group-based family and REINFORCE."""

    def __init__(self, policy: LanguageModel, optim: OptimConfig, steps: int, passes: Passes, scratch: Scratch | None = None) -> None:
        self.policy, self.passes = policy, passes
        self.optimiser = Optimiser(policy.trainable(), optim, steps, scratch)
        self.ahead = Ahead(lambda batch: self._forward(batch, passes.entropy))

    def forward(self, batch: Batch) -> Outputs:
        outputs = self.ahead(batch)
        return outputs if self.passes.entropy else replace(outputs, entropy=None)

    def look(self, batch: Batch, *, ahead: bool = False) -> Outputs:
        def forward(batch: Batch) -> Outputs:
            return self._forward(batch, True)

        budget = self.passes.token_budget
        return self.ahead.look(batch, token_budget=budget, forward=forward) if ahead else observe(batch, forward, token_budget=budget)

    def _forward(self, batch: Batch, entropy: bool) -> Outputs:
        reference = self.passes.full_kl_to.predictors(batch) if self.passes.full_kl_to else None
        return self.policy.forward(batch, temperature=self.passes.temperature, entropy=entropy, reference=reference)

    def learn(self, batch: Batch, algorithm: Algorithm, at: int) -> dict[str, float]:
        metrics = update(batch, self.forward, algorithm.policy_loss, [self.optimiser], at=at, token_budget=self.passes.token_budget)
        return _named("policy", metrics) | {"policy/lr": self.optimiser.lr(at)}

    def learn_values(self, batch: Batch, algorithm: Algorithm, at: int) -> dict[str, float]:
        return {}

    def saveables(self) -> dict[str, Saveable]:
        return {"model": self.policy}

    def optimisers(self) -> dict[str, Optimiser]:
        return {"policy": self.optimiser}


class SharedTrunk(PolicyOnly):
    """A value head on the policy's hidden states: one forward and backward pass trains both."""

    def __init__(self, policy: LanguageModel, optim: OptimConfig, steps: int, passes: Passes, critic: CriticConfig) -> None:
        super().__init__(policy, optim, steps, passes)
        self.critic = critic
        head = policy.add_value_head()
        self.head_optimiser = Optimiser(dict(head.named_parameters()), critic.optim, steps)

    def learn(self, batch: Batch, algorithm: Algorithm, at: int) -> dict[str, float]:
        def joint(outputs: Outputs, micro: Batch, counts: Counts) -> Loss:
            policy, value = algorithm.policy_loss(outputs, micro, counts), algorithm.value_loss(outputs, micro, counts)
            means = {**policy.means, "policy_loss": policy.value, "value_loss": value.value}
            return replace(policy, value=policy.value + self.critic.weight * value.value, means=means)

        optimisers = [self.optimiser, self.head_optimiser]
        metrics = update(batch, self.forward, joint, optimisers, at=at, token_budget=self.passes.token_budget)
        critic = {"critic/loss": metrics.pop("value_loss"), "critic/lr": self.head_optimiser.lr(at)}
        metrics["loss"] = metrics.pop("policy_loss")
        return _named("policy", metrics) | {"policy/lr": self.optimiser.lr(at)} | critic

    def optimisers(self) -> dict[str, Optimiser]:
        return {"policy": self.optimiser, "value_head": self.head_optimiser}

    def learn_values(self, batch: Batch, algorithm: Algorithm, at: int) -> dict[str, float]:
        metrics = update(
            batch, self.policy.values, algorithm.value_loss, [self.head_optimiser], at=at, token_budget=self.passes.token_budget
        )
        return _named("critic", metrics) | {"critic/lr": self.head_optimiser.lr(at)}


class OwnCritic(PolicyOnly):
    """A separate critic model with its own optimiser and number of updates."""

    def __init__(self, policy: LanguageModel, optim: OptimConfig, steps: int, passes: Passes, critic: CriticConfig, scorer: Scorer) -> None:
        super().__init__(policy, optim, steps, passes, Scratch(policy.trainable(), scorer.trainable()))  # they learn one after the other
        self.scorer, self.critic = scorer, critic
        self.values_ahead = Ahead(scorer.values)
        self.critic_optimiser = Optimiser(scorer.trainable(), critic.optim, steps, self.optimiser.scratch)

    def look(self, batch: Batch, *, ahead: bool = False) -> Outputs:
        budget = self.passes.token_budget
        seen = self.values_ahead.look(batch, token_budget=budget) if ahead else observe(batch, self.scorer.values, token_budget=budget)
        return replace(super().look(batch, ahead=ahead), values=seen.values)

    def learn(self, batch: Batch, algorithm: Algorithm, at: int) -> dict[str, float]:
        return super().learn(batch, algorithm, at) | self.learn_values(batch, algorithm, at)

    def learn_values(self, batch: Batch, algorithm: Algorithm, at: int) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for _ in range(self.critic.updates):
            metrics = update(
                batch, self.values_ahead, algorithm.value_loss, [self.critic_optimiser], at=at, token_budget=self.passes.token_budget
            )
        return _named("critic", metrics) | {"critic/lr": self.critic_optimiser.lr(at)}

    def saveables(self) -> dict[str, Saveable]:
        return {"model": self.policy, "critic": self.scorer}

    def optimisers(self) -> dict[str, Optimiser]:
        return {"policy": self.optimiser, "critic": self.critic_optimiser}


def _named(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
