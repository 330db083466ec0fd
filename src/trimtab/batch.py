"""The one batch: groups, and columns of numbers over their response tokens.

Nothing is padded. A *token column* has one entry per response token of all groups, in order; a *response column* has one
entry per response. Sampler log-probabilities, trainer log-probabilities, reference log-probabilities, values, rewards and
advantages are columns with different names, so that one is never taken for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab import interrupt
from trimtab.memory import fitted
from trimtab.types import Group


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch. Only what was asked for is there.

    logprobs: log pi(y_t | x, y_<t) of every response token.
    entropy:  H(pi(. | x, y_<t)) in nats at every response token.
    full_kl:  KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t)) over the whole vocabulary at every response token.
    values:   V(x, y_<t): the value of the state *before* every response token.
    scores:   r(x, y): one score per response, read at its last token.
    members:  the scores of every head of an ensemble, whose mean `scores` is.
    token_scores: a score of every response token, read in the state *after* it.
    """

    logprobs: Float[Tensor, " tokens"] | None = None
    entropy: Float[Tensor, " tokens"] | None = None
    values: Float[Tensor, " tokens"] | None = None
    scores: Float[Tensor, " responses"] | None = None
    full_kl: Float[Tensor, " tokens"] | None = None
    members: Float[Tensor, "responses heads"] | None = None
    token_scores: Float[Tensor, " tokens"] | None = None


@dataclass(frozen=True)
class Batch:
    """Groups and their columns. `select`, `minibatches` and `micro_batches` keep the columns aligned.

    apart: whether responses of one group may be in different micro-batches, because nothing that is made of one compares them.
    """

    groups: tuple[Group, ...]
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    responses: Mapping[str, Tensor] = field(default_factory=dict)
    apart: bool = False

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each response."""
        return [len(r.tokens) for g in self.groups for r in g.responses]

    @cached_property
    def response_of_token(self) -> Int[Tensor, " tokens"]:
        """For every response token, which response it belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))

    @cached_property
    def last_token(self) -> Int[Tensor, " responses"]:
        """For every response, the index of its last token in a token column."""
        return torch.tensor(list(accumulate(self.lengths))) - 1

    @cached_property
    def _starts(self) -> tuple[list[int], list[int]]:
        """First response of every group, first token of every response (and one past the end)."""
        return [0, *accumulate(len(g.responses) for g in self.groups)], [0, *accumulate(self.lengths)]

    @cached_property
    def group_of_response(self) -> Int[Tensor, " responses"]:
        """For every response, which group it belongs to."""
        sizes = torch.tensor([len(g.responses) for g in self.groups])
        return torch.repeat_interleave(torch.arange(len(self.groups)), sizes)

    @cached_property
    def _companions(self) -> tuple[Int[Tensor, " couples"], Int[Tensor, " couples"]]:
        """Every response beside every response of its group, in order."""
        sizes = torch.tensor([len(g.responses) for g in self.groups])[self.group_of_response]
        first = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        place = torch.arange(len(first)) - (sizes.cumsum(0) - sizes)[first]
        return first, torch.tensor(self._starts[0])[self.group_of_response][first] + place

    @cached_property
    def mask(self) -> Bool[Tensor, " tokens"]:
        """Which response tokens are the assistant's own: the only ones a loss may see."""
        flags = [r.mask if r.mask is not None else (True,) * len(r.tokens) for g in self.groups for r in g.responses]
        return torch.from_numpy(np.fromiter(chain.from_iterable(flags), np.bool_))

    @cached_property
    def truncated(self) -> Bool[Tensor, " responses"]:
        """Which responses were cut off before EOS."""
        return torch.tensor([r.truncated for g in self.groups for r in g.responses], dtype=torch.bool)

    def with_tokens(self, **columns: Tensor) -> Batch:
        """The same batch with token columns added or replaced."""
        total = sum(self.lengths)
        for name, column in columns.items():
            if column.shape != (total,):
                raise ValueError(f"token column {name!r} has shape {tuple(column.shape)}, the batch has {total} response tokens")
        return replace(self, tokens={**self.tokens, **columns})

    def with_responses(self, **columns: Tensor) -> Batch:
        """The same batch with response columns added or replaced."""
        for name, column in columns.items():
            if column.shape != (len(self.lengths),):
                raise ValueError(f"response column {name!r} has shape {tuple(column.shape)}, the batch has {len(self.lengths)} responses")
        return replace(self, responses={**self.responses, **columns})

    def sum_by_response(self, column: Tensor) -> Float[Tensor, " responses"]:
        """Sum a token column over the tokens of each response."""
        index = self.response_of_token.to(column.device)
        return column.new_zeros(len(self.lengths)).index_add(0, index, column)

    def pairs(self, column: str = "judgement") -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """All (better, worse) pairs of responses within a group by a response column; ties make none."""
        value, (first, second) = self.responses[column], self._companions
        wins = value[first] > value[second]
        return first[wins], second[wins]

    def without_truncated(self) -> Batch:
        """The same batch in which a response that was cut off has no token of its own: no loss sees it, no count counts it."""

        def masked(group: Group) -> Group:
            return replace(group, responses=tuple(replace(r, mask=(False,) * len(r.tokens)) if r.truncated else r for r in group.responses))

        return replace(self, groups=tuple(masked(group) for group in self.groups))

    def select(self, indices: Sequence[int]) -> Batch:
        """The batch of some groups, in the order given, with its share of every column."""
        return self._taken([(i, range(len(self.groups[i].responses))) for i in indices])

    def _taken(self, parts: Sequence[tuple[int, range]]) -> Batch:
        """The batch of some groups, of each a span of its responses."""
        first_response, first_token = self._starts
        responses = [range(first_response[i] + span.start, first_response[i] + span.stop) for i, span in parts]
        rows = _numbers(responses)
        cells = _numbers(range(first_token[span.start], first_token[span.stop]) for span in responses)
        whole = [len(span) == len(self.groups[i].responses) for i, span in parts]
        return Batch(
            tuple(self.groups[i] if all_of_it else self.groups[i].only(span) for (i, span), all_of_it in zip(parts, whole, strict=True)),
            {name: column[cells.to(column.device)] for name, column in self.tokens.items()},
            {name: column[rows.to(column.device)] for name, column in self.responses.items()},
            self.apart,
        )

    def micro_batches(self, token_budget: int) -> list[Batch]:
        """Cut into batches of at most `token_budget` packed tokens, in order.

        Groups stay whole where they fit. One that is larger than the budget is cut where responses may be `apart`, its prompt being read
        by every part, and else makes a batch of its own; so does a single response that is larger.
        """
        pieces: list[list[tuple[int, range]]] = []
        room = 0
        for i, group in enumerate(self.groups):
            for span in self._spans(group, token_budget):
                size = len(group.prompt.tokens) + sum(len(group.responses[r].tokens) for r in span)
                if not pieces or size > room:
                    pieces.append([])
                    room = token_budget
                pieces[-1].append((i, span))
                room -= size
        return [self._taken(piece) for piece in pieces]

    def _spans(self, group: Group, token_budget: int) -> list[range]:
        """A group's responses in as few spans as fit, of about as many tokens each."""
        lengths = [len(response.tokens) for response in group.responses]
        if not self.apart or group.token_count <= token_budget:
            return [range(len(lengths))]
        room = max(1, token_budget - len(group.prompt.tokens))
        share = sum(lengths) / -(-sum(lengths) // room)
        spans, start = list[range](), 0
        for r in range(1, len(lengths)):
            held = sum(lengths[start:r])
            if held >= share or held + lengths[r] > room:
                spans.append(range(start, r))
                start = r
        return [*spans, range(start, len(lengths))]

    def smaller(self, token_budget: int) -> int | None:
        """A budget that cuts the largest micro-batch of this one; null where none can be cut."""
        sizes = [sum(g.token_count for g in m.groups) for m in self.micro_batches(token_budget) if m._divisible]
        return max(sizes) // 2 if sizes else None

    @property
    def _divisible(self) -> bool:
        return len(self.lengths if self.apart else self.groups) > 1

    def minibatches(self, count: int, order: Sequence[int] | None = None) -> list[Batch]:
        """Cut into `count` batches with as equal a number of groups as possible; `order` permutes the groups first."""
        order = list(range(len(self.groups))) if order is None else list(order)
        bounds = [round(i * len(order) / count) for i in range(count + 1)]
        return [self.select(order[a:b]) for a, b in pairwise(bounds) if b > a]


def _numbers(ranges: Iterable[range]) -> Int[Tensor, " n"]:
    """The numbers of all ranges, in order."""
    return torch.cat([torch.arange(0), *(torch.arange(r.start, r.stop) for r in ranges)])


@dataclass(frozen=True)
class Counts:
    """The global numbers a loss is divided by, taken over a whole minibatch (all micro-batches, all ranks)."""

    tokens: int
    responses: int
    groups: int

    @classmethod
    def of(cls, batch: Batch) -> Counts:
        return cls(int(batch.mask.sum()), len(batch.lengths), len(batch.groups))


@dataclass(frozen=True)
class Loss:
    """A micro-batch's share of a minibatch's loss, and of its metrics.

    value:   a scalar; the minibatch's loss is the sum over its micro-batches, because every term was divided by `Counts`.
    means:   metrics that add up the same way.
    maxima:  metrics of which the largest over micro-batches counts.
    """

    value: Float[Tensor, ""]
    means: Mapping[str, Tensor] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


LossFunction = Callable[[Outputs, Batch, Counts], Loss]


@torch.no_grad()
def observe(batch: Batch, forward: Callable[[Batch], Outputs], *, token_budget: int) -> Outputs:
    """Run a model over a batch in micro-batches, without gradients, and join what it says. They are smaller where memory runs out."""
    batch = replace(batch, apart=True)
    outputs, _ = fitted(lambda budget: join([passed(micro, forward) for micro in batch.micro_batches(budget)]), token_budget, batch.smaller)
    return outputs


def passed(micro: Batch, forward: Callable[[Batch], Outputs]) -> Outputs:
    """What a model says of a micro-batch; before it does, the step may be abandoned."""
    interrupt.pause()
    return forward(micro)


def join(parts: Sequence[Outputs]) -> Outputs:
    """What was said of several batches as what is said of them together, without gradient."""

    def joined(name: str) -> Tensor | None:
        columns = [getattr(part, name) for part in parts]
        return None if columns[0] is None else torch.cat(columns).detach()

    return Outputs(**{field.name: joined(field.name) for field in fields(Outputs)})
