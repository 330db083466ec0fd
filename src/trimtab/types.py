"""The records every stage works on. A stage's whole world is *a prompt and a few responses to it*.

Plain frozen data, importable without torch. Token sequences are tuples of ints; log-probabilities are natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Message = Mapping[str, str]
"""One chat turn: {"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy is given.

    tokens: the encoded prompt, generation header included; never empty.
    text:   the same for a person or a reward to read: plain text, or the chat turns.
    row:    the data row it came from, for rewards that need more (a reference answer, unit tests).
    """

    tokens: tuple[int, ...]
    text: str | tuple[Message, ...]
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def as_text(self) -> str:
        """The prompt as one string (chat turns are joined as "role: content" lines)."""
        if isinstance(self.text, str):
            return self.text
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.text)


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a prompt.

    tokens:    the answer's tokens; the last is EOS unless `truncated`. EOS is an action like any other.
    text:      the decoded answer without special tokens.
    truncated: the answer was cut off by a length limit, so it has no EOS.
    mask:      which tokens are the assistant's own (multi-turn answers contain user turns); None means all.
    logprobs:  the *sampler's* log-probability of every token, or None if it was not sampled here.
    version:   the policy version that sampled it, or None.
    """

    tokens: tuple[int, ...]
    text: str
    truncated: bool = False
    mask: tuple[bool, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    version: int | None = None

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("a response has at least one token (EOS is one)")
        for name in ("mask", "logprobs"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.tokens):
                raise ValueError(f"Response.{name} has {len(column)} entries for {len(self.tokens)} tokens")


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its responses: one for SFT, two for a comparison, K for a ranking, G for a rollout."""

    prompt: Prompt
    responses: tuple[Response, ...]

    @property
    def token_count(self) -> int:
        """Tokens a packed forward pass of this group reads: the prompt once, then every response."""
        return len(self.prompt.tokens) + sum(len(r.tokens) for r in self.responses)

    def only(self, indices: Sequence[int]) -> Group:
        """The same prompt with some of its responses."""
        return replace(self, responses=tuple(self.responses[i] for i in indices))


JudgementKind = Literal["pair", "ranking", "rating", "binary", "process"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a solution, and whether it is right.

    text:  the step as it was written.
    end:   which response token is its last one (the state after it is where the step is judged).
    label: 1 right, 0 wrong, None neutral (not used).
    """

    text: str
    end: int
    label: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A group and what somebody thought of its responses: one score each, higher is better.

    kind "pair":    scores (1, 0): the first response was chosen.
    kind "ranking": scores K-1 .. 0 from best to worst; equal scores are a tie.
    kind "rating":  the numbers given by the annotator, on the annotator's own scale.
    kind "binary":  1 for good, 0 for bad; one response or several.
    kind "process": one response whose `steps` were judged; its score is 1 if none of them is wrong, else 0.
    margin:         how much better the chosen one is (pairs only), in reward units; 0 if unknown.
    probability:    how sure it is that the first response is the better one (pairs only); 1 is a plain choice.
    """

    group: Group
    scores: tuple[float, ...]
    kind: JudgementKind = "pair"
    margin: float = 0.0
    probability: float = 1.0
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.group.responses):
            raise ValueError(f"{len(self.scores)} scores for {len(self.group.responses)} responses")

    def pairs(self) -> list[tuple[int, int]]:
        """All (better, worse) index pairs; ties make none. K distinct scores give K(K-1)/2 pairs."""
        n = len(self.scores)
        return [(i, j) for i in range(n) for j in range(n) if self.scores[i] > self.scores[j]]


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward says of one response: the total, and the named parts it is made of.

    placed: where it was earned: (response token, reward) pairs that add up to the total; a token may occur again. Empty: all at the
            last token.
    failure: why the reward could not score the response, or None. The total is then the value that stands in, or NaN: leave it out.
    """

    total: float
    parts: Mapping[str, float] = field(default_factory=dict)
    placed: tuple[tuple[int, float], ...] = ()
    failure: str | None = None

    @property
    def missing(self) -> bool:
        """Whether the reward failed and nothing stands in."""
        return math.isnan(self.total)

    def __post_init__(self) -> None:
        if self.placed and not math.isclose(sum(value for _, value in self.placed), self.total, rel_tol=1e-6, abs_tol=1e-6):
            raise ValueError(f"rewards placed on tokens add up to {sum(value for _, value in self.placed)}, not to {self.total}")
