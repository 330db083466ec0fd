"""Why a token's probability is raised or lowered: its advantage split into causes, and what the loss makes of it.

Advantages are (assign(r, V) - shift) / spread with `assign` linear, so with r = r_score + r_KL

    A = [assign(r_score, 0) + assign(r_KL, 0) + assign(0, V) - shift] / spread

and the four parts sum to A, to rounding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trimtab.batch import Batch, Counts, Outputs
from trimtab.maths.advantages import gae
from trimtab.maths.reductions import to_column, to_rows
from trimtab.protocols import Algorithm


def causes(algorithm: Algorithm, batch: Batch) -> dict[str, Tensor]:
    """Token columns of a rollout batch after credit: rewards by origin, the TD error, and the advantage's parts."""
    total = batch.tokens["token_rewards"]
    score = algorithm.scores(batch).to(total.dtype)
    values = batch.tokens["values_old"] if algorithm.uses_critic else None
    none, no_values = torch.zeros_like(total), None if values is None else torch.zeros_like(values)
    shift, spread = algorithm.scale(batch, algorithm.assign(batch, total, values))
    parts = {
        "advantage_reward": algorithm.assign(batch, score, no_values),
        "advantage_kl": algorithm.assign(batch, total - score, no_values),
        "advantage_value": none if values is None else algorithm.assign(batch, none, values),
        "advantage_baseline": -shift.expand_as(total),
    }
    seen = none if values is None else values
    delta = gae(to_rows(total, batch.lengths), to_rows(seen, batch.lengths), algorithm.config.discount, 0.0)
    rewards = {"reward_score": score, "reward_kl": total - score, "value": seen, "td_error": to_column(delta, batch.lengths)}
    return rewards | {name: part / spread for name, part in parts.items()}


def weights(algorithm: Algorithm, batch: Batch, outputs: Outputs) -> dict[str, Tensor]:
    """Where `outputs` is what the policy says of the batch now: which tokens are clipped, and how hard each one is pulled.

    gradient_weight: -d loss / d log pi, times the number of tokens: the factor of grad log pi(y_t) in the step that would be taken now.
    It is the advantage where ratio is 1, 0 where the clip holds, and includes a KL term of the loss, but no entropy bonus.
    """
    assert outputs.logprobs is not None
    leaf = outputs.logprobs.detach().requires_grad_()
    with torch.enable_grad():
        counts = Counts.of(batch)
        loss = algorithm.policy_loss(replace(outputs, logprobs=leaf), batch, counts)
        gradient = torch.autograd.grad(loss.value, leaf)[0] if loss.value.requires_grad else torch.zeros_like(leaf)
    clipped = algorithm.surrogate(leaf.detach(), batch)[1]
    held = torch.zeros_like(batch.mask) if clipped is None else clipped & batch.mask
    return {"clipped": held, "gradient_weight": -gradient * max(1, counts.tokens)}
