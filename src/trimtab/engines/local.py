"""Generation in this process, on the policy's own weights.

Every prompt is read once for all of its responses; the responses' keys and values follow it in a cache of their own; rows
that have finished leave the batch. There is no padding in anything but attention, as in training, and the model is the same
object, so nothing has to be copied or kept in step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from trimtab.config import Config
from trimtab.engines.sampling import SamplingConfig, draw
from trimtab.errors import DataError
from trimtab.models.attention import AttentionSettings, attention
from trimtab.models.language import LanguageModel
from trimtab.models.packed import Layout
from trimtab.types import Group, Prompt, Response


class EngineConfig(Config):
    """Where and how wide responses are generated."""

    rows: int = Field(64, gt=0, description="responses generated side by side")


class LocalEngine:
    """Samples from a LanguageModel in this process."""

    def __init__(self, model: LanguageModel, sampling: SamplingConfig, config: EngineConfig | None = None) -> None:
        self.model, self.sampling, self.config = model, sampling, config or EngineConfig()
        self.version = 0

    @torch.no_grad()
    def load(self, parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Weights that are given are copied; where the model is the trainer's own, none are, and only the version changes."""
        mine = dict(self.model.model.named_parameters())
        for name, parameter in parameters:
            mine[name].copy_(parameter)
        self.version = version

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], n: int, *, seed: int) -> list[Group]:
        """n responses to each prompt, in order. The same seed and weights give the same responses."""
        longest = max((len(p.tokens) for p in prompts), default=0)
        if longest + self.sampling.max_tokens > self.model.context:
            raise DataError(
                f"a prompt of {longest} tokens and {self.sampling.max_tokens} new ones exceed the model's context of {self.model.context}",
                fix="lower sampling.max_tokens, or set data.max_prompt_tokens with data.on_long=skip",
            )
        uniform = torch.rand(len(prompts) * n, self.sampling.max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        # prompts of similar length go together; a wave holds whole groups, or part of one that is larger than a wave
        jobs = [(i, row) for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens)) for row in range(i * n, i * n + n)]
        answers: dict[int, Response] = {}
        for start in range(0, len(jobs), self._wave(n)):
            wave = jobs[start : start + self._wave(n)]
            order = list(dict.fromkeys(i for i, _ in wave))
            group_of_row = torch.tensor([order.index(i) for i, _ in wave])
            sampled = self._run([prompts[i] for i in order], group_of_row, uniform[[row for _, row in wave]])
            for (_, row), (tokens, logprobs) in zip(wave, sampled, strict=True):
                truncated = tokens[-1] not in self.model.template.eos_ids
                text = self.model.template.decode(tokens)
                answers[row] = Response(tuple(tokens), text, truncated=truncated, logprobs=tuple(logprobs), version=self.version)
        return [Group(prompt, tuple(answers[i * n + k] for k in range(n))) for i, prompt in enumerate(prompts)]

    def _wave(self, n: int) -> int:
        return max(1, self.config.rows // n) * n if n <= self.config.rows else self.config.rows

    def _run(self, prompts: list[Prompt], group_of_row: Tensor, uniform: Tensor) -> list[tuple[list[int], list[float]]]:
        """One wave: row r answers prompts[group_of_row[r]] with the random numbers uniform[r]."""
        model, device = self.model, self.model.device
        cache = Cache(prompts, group_of_row, self.sampling.max_tokens, device)
        head = model.head
        eos = torch.tensor(sorted(model.template.eos_ids), device=device)
        temperature = self.sampling.temperature or 1.0
        uniform = uniform.to(device)

        states = model.hidden(cache.layout.input_ids, cache.layout.position_ids, cache)
        states = states.index_select(0, cache.prompt_ends).index_select(0, group_of_row.to(device))
        count = len(group_of_row)
        rows = torch.arange(count, device=device)  # still unfinished, in the order of the cache's slots
        tokens = torch.zeros(count, self.sampling.max_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(count, self.sampling.max_tokens, dtype=torch.float64, device=device)
        lengths = torch.full((count,), self.sampling.max_tokens, dtype=torch.long, device=device)
        for t in range(self.sampling.max_tokens):
            new, logp = draw(head.logits(states, temperature), uniform[rows, t], self.sampling)
            tokens[rows, t], logprobs[rows, t] = new, logp.to(torch.float64)
            done = torch.isin(new, eos)
            lengths[rows[done]] = t + 1
            if t + 1 == self.sampling.max_tokens or bool(done.all()):
                break
            if bool(done.any()):
                cache.keep(~done)
                rows, new = rows[~done], new[~done]
            states = model.hidden(new, cache.step(t), cache)
        return [(row[:n], logps[:n]) for row, logps, n in zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)]


class Cache:
    """Keys and values of a wave, and the attention over them: a `layout` for the prompt pass and for every decoding step.

    Prompts are kept once per group, [groups, kv, P, dim]; responses in slots, [groups x S, kv, T, dim]. The active rows are
    a subset of the slots; when few are left, the slots are packed together again.
    """

    def __init__(self, prompts: Sequence[Prompt], group_of_row: Tensor, max_tokens: int, device: torch.device) -> None:
        self.layout = Layout.of([Group(p, ()) for p in prompts], keep_last=False, device=device)
        lengths = torch.tensor([len(p.tokens) for p in prompts], device=device)
        self.prompt_ends = lengths.cumsum(0) - 1
        self.lengths, self.max_tokens, self.device = lengths, max_tokens, device
        self.longest = int(lengths.max())
        self.group_count = len(prompts)
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self.time: int | None = None
        self._arrange(group_of_row.to(device))

    def _arrange(self, group_of_row: Tensor) -> None:
        """Give every row a slot: group-major, S slots a group."""
        self.group_of_row = group_of_row
        counts = torch.bincount(group_of_row, minlength=self.group_count)
        self.S = int(counts.max())
        rank = torch.arange(len(group_of_row), device=self.device) - (counts.cumsum(0) - counts)[group_of_row]
        self.slots = group_of_row * self.S + rank
        hidden = torch.arange(self.longest, device=self.device) >= self.lengths[:, None]
        self.prompt_mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, float("-inf"))

    def step(self, t: int) -> Tensor:
        """Begin the decoding step that reads response token t; returns the position ids of the active rows."""
        self.time = t
        return self.lengths[self.group_of_row] + t

    def keep(self, active: Tensor) -> None:
        """Drop finished rows; pack the slots together when a third of them would be freed."""
        group_of_row, slots = self.group_of_row[active], self.slots[active]
        alive, renumbered = torch.unique(group_of_row, return_inverse=True)
        needed = len(alive) * int(torch.bincount(renumbered).max())
        self.group_of_row, self.slots = group_of_row, slots
        if needed > 0.67 * self.group_count * self.S:
            return
        self.prompts = {layer: (k[alive], v[alive]) for layer, (k, v) in self.prompts.items()}
        self.lengths, self.group_count = self.lengths[alive], len(alive)
        self._arrange(renumbered)
        for layer, (k, v) in self.own.items():
            fresh = [x.new_zeros(self.group_count * self.S, *x.shape[1:]) for x in (k, v)]
            for new, old in zip(fresh, (k, v), strict=True):
                new[self.slots] = old[slots]
            self.own[layer] = (fresh[0], fresh[1])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if self.time is None:
            return self._attend_prompts(layer, q, k, v, settings)
        return self._attend_step(layer, q, k, v, settings)

    def _attend_prompts(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        shape = (self.group_count, self.longest, *k.shape[1:])
        rows = torch.arange(self.longest, device=self.device) < self.lengths[:, None]
        padded = [x.new_zeros(shape) for x in (k, v)]
        for target, x in zip(padded, (k, v), strict=True):
            target[rows] = x
        self.prompts[layer] = (padded[0].transpose(1, 2).contiguous(), padded[1].transpose(1, 2).contiguous())
        return attention(q, k, v, self.layout.plan, settings)

    def _attend_step(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        assert self.time is not None
        rows, heads, dim = q.shape
        kv, total, t = k.shape[1], self.group_count * self.S, self.time
        rep = heads // kv
        if layer not in self.own:
            self.own[layer] = tuple(x.new_zeros(total, kv, self.max_tokens, dim) for x in (k, v))  # type: ignore[assignment]
        own_key, own_value = self.own[layer]
        own_key[self.slots, :, t] = k
        own_value[self.slots, :, t] = v
        queries = q.new_zeros(total, kv, rep, dim)
        queries[self.slots] = q.view(rows, kv, rep, dim)
        prompt_key, prompt_value = self.prompts[layer]

        own = queries @ own_key[:, :, : t + 1].transpose(-1, -2) * settings.scale
        own = own.view(self.group_count, self.S, kv, rep, t + 1).transpose(1, 2)
        grouped = queries.view(self.group_count, self.S, kv, rep, dim).transpose(1, 2).reshape(self.group_count, kv, self.S * rep, dim)
        cross = grouped @ prompt_key.transpose(-1, -2) * settings.scale
        cross = cross.view(self.group_count, kv, self.S, rep, self.longest)
        if settings.softcap is not None:
            own, cross = (torch.tanh(x / settings.softcap) * settings.softcap for x in (own, cross))
        cross_mask, own_mask = self._masks(settings.window, q.dtype)
        weights = torch.softmax(torch.cat([cross + cross_mask, own + own_mask], dim=-1), dim=-1)
        out = (weights[..., : self.longest].reshape(self.group_count, kv, self.S * rep, -1) @ prompt_value).view(
            self.group_count, kv, self.S, rep, dim
        )
        recent = weights[..., self.longest :].transpose(1, 2).reshape(total, kv, rep, t + 1) @ own_value[:, :, : t + 1]
        out = out.transpose(1, 2).reshape(total, kv, rep, dim) + recent
        return out[self.slots].reshape(rows, heads, dim)

    def _masks(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Additive masks [groups, 1, 1, 1, P] over the prompt (padding) and [t+1] over the response (sliding window)."""
        assert self.time is not None
        prompt, now = self.prompt_mask, self.time
        own = torch.zeros(now + 1, device=self.device)
        if window is not None:
            distance = (self.lengths[:, None] + now) - torch.arange(self.longest, device=self.device)
            prompt = prompt.masked_fill(distance >= window, float("-inf"))
            own = own.masked_fill(now - torch.arange(now + 1, device=self.device) >= window, float("-inf"))
        return prompt[:, None, None, None, :].to(dtype), own.to(dtype)
