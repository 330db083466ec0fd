"""Keys and values while responses are sampled, and attention over them.

A prompt is kept once for all its responses, a response has a row of its own, and both come and go independently: rows 0 .. n-1
are the active ones; where a row has finished, the last one moves in. Attention reads widths that are rounded up, so that few
shapes occur: matrix libraries prepare every new shape once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.models.attention import AttentionSettings
from trimtab.models.packed import Layout
from trimtab.types import Group, Prompt, Response

_WIDTH = 32
"""Attention reads prompts and responses in multiples of this many tokens."""


def round_up(n: int) -> int:
    return -(-n // _WIDTH) * _WIDTH


class Prefill:
    """The `layout` of the pass that reads prompts and drafts of responses to them; their keys and values are kept.

    ends [prompts]: where in the packed sequence each prompt ends. A draft's last token is not read: nothing is predicted from it.
    """

    def __init__(self, prompts: Sequence[Prompt], device: torch.device, drafts: Sequence[Sequence[tuple[int, ...]]] = ()) -> None:
        answers = [tuple(Response(draft, "") for draft in group) for group in drafts] or [()] * len(prompts)
        groups = [Group(prompt, responses) for prompt, responses in zip(prompts, answers, strict=True)]
        self.packed = Layout.of(groups, keep_last=False, device=device)
        self.lengths = [len(prompt.tokens) for prompt in prompts]
        self.draft_lengths = [len(response.tokens) for responses in answers for response in responses]
        starts, draft_starts, place = [], [], 0
        for prompt, responses in zip(prompts, answers, strict=True):
            starts.append(place)
            place += len(prompt.tokens)
            for response in responses:
                draft_starts.append(place)
                place += len(response.tokens) - 1
        self.ends = torch.tensor(starts, device=device) + torch.tensor(self.lengths, device=device) - 1

        def cells(first: list[int], longest: int) -> Tensor:
            # beyond an end they hold the keys of other tokens: attention masks them
            index = torch.tensor(first, device=device)[:, None] + torch.arange(round_up(longest), device=device)
            return index.clamp_(max=place - 1)

        self._prompt_cells = cells(starts, max(self.lengths))
        self._draft_cells = cells(draft_starts, max(self.draft_lengths)) if draft_starts else None
        self.settings: dict[int, AttentionSettings] = {}
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}  # [prompts, kv, P, dim]
        self.drafts: dict[int, tuple[Tensor, Tensor]] = {}  # [drafts, kv, R, dim]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Attention of all prompts and drafts (see AttentionLayout)."""
        self.settings[layer] = settings
        self.prompts[layer] = _gathered(key, self._prompt_cells), _gathered(value, self._prompt_cells)
        if self._draft_cells is not None:
            self.drafts[layer] = _gathered(key, self._draft_cells), _gathered(value, self._draft_cells)
        return self.packed.attend(layer, query, key, value, settings)


def _gathered(x: Float[Tensor, "1 kv n dim"], cells: Int[Tensor, "m width"]) -> Float[Tensor, "m kv width dim"]:
    return x[0][:, cells].transpose(0, 1)


@dataclass
class Plan:
    """Where everything lies in one decoding step of n rows and g prompt places.

    A *unit* is one row's queries of one key head. `to_prompts` [g * kv * S] names the unit in every place of a batch that puts
    the rows of a prompt side by side (any unit where there is none), `to_rows` [n * kv] the place of every unit. `write` [n * kv]
    is where this token's keys go. Widths of attention: P prompt tokens, R response tokens.
    """

    to_prompts: Int[Tensor, " places"]
    to_rows: Int[Tensor, " units"]
    write: Int[Tensor, " units"]
    lengths: Int[Tensor, " n"]
    times: Int[Tensor, " n"]
    siblings: int
    P: int
    R: int
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Float[Tensor, "n 1 1 P+R"]:
        """Additive mask of every row: its prompt, its response so far, and a sliding window back from its newest token."""
        if (window, dtype) not in self.masks:
            device = self.times.device
            length, now = self.lengths[:, None], self.times[:, None]
            prompt, own = torch.arange(self.P, device=device), torch.arange(self.R, device=device)
            seen = torch.cat([prompt < length, own <= now], dim=-1)
            if window is not None:
                seen &= torch.cat([length + now - prompt < window, now - own < window], dim=-1)
            hidden = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
            self.masks[window, dtype] = hidden[:, None, None, :]
        return self.masks[window, dtype]


@dataclass
class Views:
    """One layer's keys and values as a step of these rows, prompts and widths reads them; made once, used until one of them changes."""

    keys: Float[Tensor, "cells dim"]
    values: Float[Tensor, "cells dim"]
    own_keys: Float[Tensor, "units dim R"]
    own_values: Float[Tensor, "units R dim"]
    prompt_keys: Float[Tensor, "prompt_units dim P"]
    prompt_values: Float[Tensor, "prompt_units P dim"]


class Cache:
    """Keys and values of the active rows and of their prompts; also the `layout` of decoding steps.

    places [n]: the prompt place that each active row answers; times [n]: how many response tokens each has read.
    Held on the host: what to do next never waits for the device. The rows of a step are on the device, too: `reading` [3, n],
    each row's prompt place, the length of its prompt, and the response tokens it had read before.
    """

    def __init__(self, rows: int, max_tokens: int, device: torch.device) -> None:
        self.rows, self.max_tokens, self.device = rows, max_tokens, device
        self.places: list[int] = []
        self.times: list[int] = []
        self.lengths: list[int] = []  # tokens of the prompt in each place
        self.settings: dict[int, AttentionSettings] = {}
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}  # [places, kv, P, dim]
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # [rows, kv, R, dim]
        self.room = 0
        self.reading = torch.zeros(3, 0, dtype=torch.long)
        self._shape = (0, 0, 0)  # of the step: rows, widths of prompts and responses
        self._plan: Plan | None = None
        self._views: dict[int, Views] = {}

    def admit(self, prefill: Prefill, prompt_of_row: Sequence[int]) -> None:
        """Take in prompts that have been read, and new rows that answer them (numbered among these prompts)."""
        count = len(prefill.lengths)
        free = sorted(set(range(len(self.lengths))) - set(self.places))[:count]
        fresh = range(len(self.lengths), len(self.lengths) + count - len(free))
        self.lengths += [0] * len(fresh)
        places = [*free, *fresh]
        for place, length in zip(places, prefill.lengths, strict=True):
            self.lengths[place] = length
        index = torch.tensor(places, device=self.device)
        for layer, new in prefill.prompts.items():
            old = self.prompts.get(layer, new)
            self.prompts[layer] = (_with_places(old[0], new[0], index), _with_places(old[1], new[1], index))
        self._views = {}
        self.settings |= prefill.settings
        self.places += [places[i] for i in prompt_of_row]
        self.times += [0] * len(prompt_of_row)

    def resume(self, prefill: Prefill, drafts: Sequence[int], read: Sequence[int]) -> None:
        """Let the last rows that were admitted begin with the first `read` tokens of these drafts."""
        first = len(self.places) - len(drafts)
        self.times[first:] = read
        R = round_up(max(read) + 1)
        if self.room < R:
            self._make_room(R)
        index = torch.tensor(drafts, device=self.device)
        for layer, pair in prefill.drafts.items():
            for target, source in zip(self.own[layer], pair, strict=True):
                width = min(R, source.shape[2])
                target[first : first + len(drafts), :, :width] = source[index, :, :width]

    def drop(self, finished: Sequence[int]) -> list[int]:
        """Forget some rows. Returns, for each row that is left, its number before."""
        kept = len(self.places) - len(finished)
        gone = set(finished)
        holes = [row for row in sorted(gone) if row < kept]
        movers = [row for row in range(kept, len(self.places)) if row not in gone]
        before = list(range(kept))
        for hole, mover in zip(holes, movers, strict=True):
            before[hole] = mover
        if holes and kept:
            target, source = torch.tensor(holes, device=self.device), torch.tensor(movers, device=self.device)
            for pair in self.own.values():
                for x in pair:
                    x[target] = x[source]
        self.places, self.times = [self.places[i] for i in before], [self.times[i] for i in before]
        self._shrink()
        return before

    def _shrink(self) -> None:
        """Forget prompts that nobody answers any more, when they are the greater part."""
        used = sorted(set(self.places))
        if not used or 2 * len(used) > len(self.lengths):
            return
        self._views = {}
        index = torch.tensor(used, device=self.device)
        self.prompts = {layer: (k[index], v[index]) for layer, (k, v) in self.prompts.items()}
        self.lengths = [self.lengths[i] for i in used]
        self.places = [used.index(place) for place in self.places]

    def step(self) -> Int[Tensor, " n"]:
        """Begin a step in which every active row reads one token; returns the positions of these tokens."""
        R = round_up(max(self.times) + 1)
        if self.room < R:
            self._make_room(R)
        lengths = [self.lengths[place] for place in self.places]
        shape = (len(self.places), round_up(max(lengths)), R)
        if shape != self._shape:
            self._views = {}
        self._shape, self._plan = shape, None
        self.reading = torch.tensor([self.places, lengths, self.times], device=self.device)
        self.times = [time + 1 for time in self.times]
        return self.reading[1] + self.reading[2]

    def _make_plan(self) -> Plan:
        ((key, _), *_) = self.prompts.values()
        kv, (n, P, R), g = key.shape[1], self._shape, len(self.lengths)
        seen: Counter[int] = Counter()
        ranks = []
        for place in self.places:
            ranks.append(seen[place])
            seen[place] += 1
        S = max(seen.values())
        places, lengths, times = self.reading
        heads = torch.arange(kv, device=self.device)
        units = torch.arange(n, device=self.device)[:, None] * kv + heads
        to_rows = ((places[:, None] * kv + heads) * S + torch.tensor(ranks, device=self.device)[:, None]).flatten()
        to_prompts = torch.zeros(g * kv * S, dtype=torch.long, device=self.device).index_copy_(0, to_rows, units.flatten())
        write = (units * self.room + times[:, None]).flatten()
        return Plan(to_prompts, to_rows, write, lengths, times, S, P, R)

    def _make_room(self, R: int) -> None:
        """Room for R response tokens, and for as many again while there may be more."""
        self.room = min(2 * R, round_up(self.max_tokens))
        self._views = {}
        for layer, (key, _) in self.prompts.items():
            fresh = [key.new_zeros(self.rows, key.shape[1], self.room, key.shape[3]) for _ in "kv"]
            for new, old in zip(fresh, self.own.get(layer, ()), strict=False):
                new[:, :, : old.shape[2]] = old
            self.own[layer] = (fresh[0], fresh[1])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Attention of the step's new tokens (see AttentionLayout)."""
        return self.attend_rows(layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))

    def attend_rows(
        self, layer: int, query: Float[Tensor, "n heads dim"], key: Float[Tensor, "n kv dim"], value: Float[Tensor, "n kv dim"]
    ) -> Float[Tensor, "n heads dim"]:
        """Attention of every row's new token to its prompt and its response, the new token included."""
        plan, settings = self._plan or self._make_plan(), self.settings[layer]
        self._plan = plan
        n, heads, dim = query.shape
        kv = key.shape[1]
        rep, S, P, R = heads // kv, plan.siblings, plan.P, plan.R
        views = self._views.get(layer) or self._view(layer, plan)
        views.keys.index_copy_(0, plan.write, key.reshape(-1, dim))
        views.values.index_copy_(0, plan.write, value.reshape(-1, dim))

        units = query.reshape(n * kv, rep * dim)
        by_prompt = units.index_select(0, plan.to_prompts).view(-1, S * rep, dim)
        cross = torch.bmm(by_prompt, views.prompt_keys).view(-1, rep * P)
        own = torch.bmm(units.view(-1, rep, dim), views.own_keys)
        scores = torch.cat([cross.index_select(0, plan.to_rows).view(-1, rep, P), own], dim=-1).view(n, kv, rep, P + R)
        mask = plan.mask(settings.window, query.dtype)
        if settings.softcap is None:
            scores = torch.add(mask, scores, alpha=settings.scale)
        else:
            scores = torch.add(mask, torch.tanh(scores * (settings.scale / settings.softcap)), alpha=settings.softcap)
        weights = torch.softmax(scores, dim=-1).view(n * kv, rep, P + R)
        to_prompt = weights[..., :P].reshape(-1, rep * P).index_select(0, plan.to_prompts).view(-1, S * rep, P)
        out = torch.bmm(to_prompt, views.prompt_values).view(-1, rep * dim).index_select(0, plan.to_rows)
        return out.view(-1, rep, dim).baddbmm_(weights[..., P:], views.own_values).view(n, heads, dim)

    def _view(self, layer: int, plan: Plan) -> Views:
        n = len(plan.times)
        keys, values = (x[:n].view(-1, x.shape[-1]) for x in self.own[layer])
        own_keys, own_values = (x[:n].flatten(0, 1)[:, : plan.R] for x in self.own[layer])
        prompt_keys, prompt_values = (x.flatten(0, 1)[:, : plan.P] for x in self.prompts[layer])
        self._views[layer] = Views(keys, values, own_keys.transpose(1, 2), own_values, prompt_keys.transpose(1, 2), prompt_values)
        return self._views[layer]


def _with_places(old: Tensor, new: Tensor, places: Tensor) -> Tensor:
    """The prompts of `old` with `new` ones put in some places, made larger where they do not fit."""
    count, width = max(len(old), int(places.max()) + 1), max(old.shape[2], new.shape[2])
    if old is new or count > len(old) or width > old.shape[2]:
        larger = old.new_zeros(count, old.shape[1], width, old.shape[3])
        larger[: len(old), :, : old.shape[2]] = old
        old = larger
    old[places, :, : new.shape[2]] = new
    return old
