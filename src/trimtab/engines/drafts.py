"""Starting from earlier responses, without a change in what is sampled.

A token is drawn by the inverse of the distribution function at a uniform number, so a response is a function of the weights and of
its uniform numbers alone. An earlier response to the same prompt is a *draft*: one pass over it says what would be drawn at each of
its tokens, and as far as that is what it says, the draft is the response. The first token that differs is drawn as always, and
decoding goes on from there. Whatever a draft says, the responses are those of decoding without it; only the time changes.

That is to rounding, and rounding decides how long a draft holds: its tokens are read in another shape than they were decoded in, and
a token changes where the two distribution functions lie on either side of its number. In bfloat16 SmolLM2 kept 6 to 7 % of a draft of its
own, unchanged, so that drafts cost more than they saved (docs/performance.md).

A draft is right for long only if the random numbers are those it was drawn with. So with `reuse` a prompt keeps its numbers (common
random numbers). What that promises, and what it does not:

- For any fixed policy that does not depend on these numbers, a response is a draw from that policy, exactly.
- Responses to one prompt at different times are not independent: an unchanged policy gives the same responses again.
- A policy that was trained on the earlier responses does depend on the numbers. Given that policy, its responses to those prompts
  are no fresh draws from it. (The same is true of every method that accepts tokens of responses which the policy has learned from.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab import seeds
from trimtab.types import Group, Prompt

Tokens = tuple[int, ...]


@dataclass
class Memory:
    """For every prompt seen: the seed of its random numbers, and the responses it got last.

    A prompt that occurs twice in one call is two prompts here: two groups must not draw alike.
    """

    seen: dict[tuple[Tokens, int], tuple[int, tuple[Tokens, ...]]] = field(default_factory=dict)

    def recall(self, prompts: Sequence[Prompt], seed: int) -> tuple[list[int], list[tuple[Tokens, ...]]]:
        """Seeds and drafts of these prompts; a new prompt gets a seed from `seed` and has no draft."""
        known = [self.seen.get(key, (seeds.derive(seed, "prompt", i), ())) for i, key in enumerate(_keys(prompts))]
        return [one for one, _ in known], [drafts for _, drafts in known]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [[key, count, seed, responses] for (key, count), (seed, responses) in self.seen.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = {(tuple(key), count): (seed, tuple(map(tuple, responses))) for key, count, seed, responses in state["seen"]}

    def keep(self, groups: Sequence[Group], numbers: Sequence[int]) -> None:
        """Remember these responses as drafts, with the seeds they were drawn with."""
        for key, group, number in zip(_keys([g.prompt for g in groups]), groups, numbers, strict=True):
            self.seen[key] = (number, tuple(response.tokens for response in group.responses))


def _keys(prompts: Sequence[Prompt]) -> list[tuple[Tokens, int]]:
    """Each prompt's tokens, and how often they occurred before it."""
    count: Counter[Tokens] = Counter()
    keys = []
    for prompt in prompts:
        keys.append((prompt.tokens, count[prompt.tokens]))
        count[prompt.tokens] += 1
    return keys


def uniform_numbers(numbers: Sequence[int], n: int, max_tokens: int) -> Float[Tensor, "responses tokens"]:
    """The random numbers of n responses to each prompt, each prompt's from a seed of its own."""
    rows = [torch.rand(n, max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(number)) for number in numbers]
    return torch.cat(rows) if rows else torch.zeros(0, max_tokens, dtype=torch.float64)


def agreed(drawn: Sequence[int], draft: Sequence[int], eos: frozenset[int]) -> int:
    """How many tokens of the draft are what would be drawn, up to and including a first EOS."""
    for t, (ours, its) in enumerate(zip(drawn, draft, strict=True)):
        if ours != its:
            return t
        if its in eos:
            return t + 1
    return len(draft)
