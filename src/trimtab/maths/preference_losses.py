"""Losses on preference pairs, from sums of log-probabilities.

With h = log pi(y|x) - log pi_ref(y|x), the optimum of E[r] - beta KL satisfies r = beta (h + log Z(x)); the partition function
cancels in differences, so that a preference between two responses is a statement about h_chosen - h_rejected.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def dpo(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " pairs"]:
    """-(1 - e) log sigma(beta Delta) - e log sigma(-beta Delta), Delta = h_chosen - h_rejected, e = label_smoothing.

    chosen, rejected: log-ratios h of the two responses. e = 0 is DPO (Rafailov et al. 2023, eq. 7); e > 0 is the
    conservative form for labels that are wrong with probability e (Mitchell 2023).
    """
    margin = beta * (chosen - rejected)
    logsigmoid = torch.nn.functional.logsigmoid
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
