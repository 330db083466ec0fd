"""How a token is drawn from logits."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from trimtab import kernels
from trimtab.config import Config
from trimtab.kernels import decode
from trimtab.maths.logprobs import Head

_BLOCK = 256


class SamplingConfig(Config):
    """How responses are sampled."""

    max_tokens: int = Field(64, gt=0, description="longest response; one that reaches it without EOS is marked truncated")
    temperature: float = Field(1.0, ge=0, description="divides the logits; 0 is greedy decoding")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the smallest set of tokens with this probability mass")
    top_k: int = Field(0, ge=0, description="sample from the k most probable tokens (0: all)")


def draw_from_head(
    z: Float[Tensor, "rows vocabulary"], head: Head, uniform: Float[Tensor, " rows"], config: SamplingConfig
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """`draw` from what the output layer gives. Where a kernel does it, the numbers draw the same tokens but for rounding in float32."""
    temperature = config.temperature or 1.0
    if config.temperature and not config.top_k and config.top_p == 1 and kernels.serves(z):
        cap = (head.softcap or 0.0) / temperature
        return decode.draw(z, uniform, head.scale / (head.softcap or temperature), cap)
    return draw(head.finish(z, temperature), uniform, config)


def draw(
    logits: Float[Tensor, "rows vocabulary"], uniform: Float[Tensor, " rows"], config: SamplingConfig
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """One token per row, and log pi(token): the policy's log-probability at this temperature.

    `logits` are already divided by the temperature. A row's token depends on its own logits and its own uniform number
    only, so a response does not change with the company it is sampled in. The log-probability is that of the whole
    policy, also where top-p or top-k restrict the draw.
    """
    probabilities = torch.softmax(logits, dim=-1)
    if config.temperature == 0:
        tokens = logits.argmax(dim=-1)
    elif config.top_k or config.top_p < 1:
        tokens = inverse_cdf(_truncate(probabilities, config), uniform)
    else:
        tokens = inverse_cdf(probabilities, uniform)
    return tokens, probabilities.gather(1, tokens[:, None])[:, 0].log()


def inverse_cdf(weights: Float[Tensor, "rows n"], uniform: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The index i with sum(weights[:i]) <= uniform * total < sum(weights[:i+1]); weights need not sum to one.

    Done in two stages of block sums, which is faster and more accurate than one long running sum.
    """
    rows, n = weights.shape
    padded = weights if n % _BLOCK == 0 else torch.nn.functional.pad(weights, (0, -n % _BLOCK))
    padded = padded.reshape(rows, -1, _BLOCK)
    blocks = padded.sum(-1).to(torch.float64).cumsum(-1)
    target = uniform.to(torch.float64)[:, None] * blocks[:, -1:]
    block = torch.searchsorted(blocks, target, right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = padded.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].to(torch.float64)
    offset = torch.searchsorted(inside.cumsum(-1), target - before, right=True)
    # rounding may step past the block's end, or onto a token of weight zero there: take its last possible token
    last = _BLOCK - 1 - (inside > 0).flip(-1).to(torch.int8).argmax(-1, keepdim=True)
    return (block * _BLOCK + torch.minimum(offset, last))[:, 0]


def _truncate(probabilities: Tensor, config: SamplingConfig) -> Tensor:
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    keep = ordered.cumsum(-1) - ordered < config.top_p  # the token that crosses the mass is kept
    if config.top_k:
        keep[:, config.top_k :] = False
    return torch.zeros_like(probabilities).scatter_(1, index, ordered * keep)
