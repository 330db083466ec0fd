"""Continuous batching: rows that have finished leave the batch and further prompts take their place.

Every prompt is read once for all of its responses. The batch stays full while anything waits, and shrinks when nothing does. There
is no padding in anything but attention, as in training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab import interrupt
from trimtab.engines.cache import Cache, Prefill
from trimtab.engines.decoder import Stepper
from trimtab.engines.drafts import Tokens, agreed
from trimtab.engines.sampling import SamplingConfig, draw_from_head
from trimtab.models.language import LanguageModel
from trimtab.types import Prompt

_LOGITS_AT_ONCE = 2**21
"""Logits in full precision at once: 8 MiB, so that many rows need no more memory than some."""


@dataclass(frozen=True)
class Job:
    """Responses to one prompt that are started together: their numbers among all responses, and the drafts that some of them have."""

    prompt: Prompt
    responses: range
    drafts: dict[int, Tokens]


@dataclass(frozen=True)
class Start:
    """A response that goes on from what has been read of it."""

    response: int
    prompt: int  # which of the prompts read together
    state: int  # packed position of the state that predicts its next token
    draft: int = 0  # which of the drafts read together it begins with ...
    read: int = 0  # ... and how many tokens of it


class Batcher:
    """Draws responses: token t of response r by the random number uniform[r, t].

    tokens, logprobs [responses, max_tokens] and lengths [responses]: what has been drawn, on the model's device.
    """

    def __init__(
        self, model: LanguageModel, stepper: Stepper, sampling: SamplingConfig, rows: int, uniform: Float[Tensor, "responses tokens"]
    ) -> None:
        self.model, self.stepper, self.sampling, self.rows = model, stepper, sampling, rows
        self.uniform = uniform.to(model.device)
        self.tokens = torch.zeros_like(self.uniform, dtype=torch.long)
        self.logprobs = torch.zeros_like(self.uniform)
        self.lengths = self.tokens.new_zeros(len(uniform))
        self.cache = Cache(rows, sampling.max_tokens, model.device)

    def responses(self) -> Iterator[tuple[list[int], list[float]]]:
        """Tokens and log-probabilities of every response."""
        for tokens, logprobs, n in zip(self.tokens.tolist(), self.logprobs.tolist(), self.lengths.tolist(), strict=True):
            yield tokens[:n], logprobs[:n]

    def run(self, prompts: Sequence[Prompt], n: int, drafts: Sequence[Sequence[Tokens]] = ()) -> None:
        """Draw n responses to each prompt: one token in every active row, until nothing waits and nothing is active."""
        cache, device = self.cache, self.model.device
        jobs = deque(_jobs(prompts, n, self.rows, drafts, self.sampling.max_tokens))
        eos = torch.tensor(sorted(self.model.template.eos_ids), device=device)
        active: list[int] = []  # the response in every row of the cache
        states = torch.zeros(0)
        while jobs or active:
            interrupt.pause()
            taken = self._admissible(jobs, len(active))
            if taken:
                starts, first = self._read(taken)
                states = torch.cat([states, first]) if active else first
                active = active + [start.response for start in starts]
            if not active:
                continue
            times = torch.tensor(cache.times, device=device)
            new = self._draw(self.stepper.logits(states), torch.tensor(active, device=device), times)
            finished = (torch.isin(new, eos) | (times + 1 == self.sampling.max_tokens)).nonzero()[:, 0].tolist()
            if finished:
                kept = cache.drop(finished)
                active, new = [active[i] for i in kept], new[torch.tensor(kept, dtype=torch.long, device=device)]
            if active:
                states = self.stepper.hidden(new, cache.step(), cache)

    def _draw(self, logits: Tensor, responses: Int[Tensor, " n"], times: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Draw and note a token of each of these responses."""
        size, head = max(1, _LOGITS_AT_ONCE // logits.shape[1]), self.model.head
        numbers = self.uniform[responses, times].split(size)
        parts = [draw_from_head(z, head, u, self.sampling) for z, u in zip(logits.split(size), numbers, strict=True)]
        tokens, logprobs = (torch.cat(column) for column in zip(*parts, strict=True))
        self.tokens[responses, times], self.logprobs[responses, times] = tokens, logprobs.to(torch.float64)
        self.lengths[responses] = times + 1
        return tokens

    def _admissible(self, jobs: deque[Job], active: int) -> list[Job]:
        """The next jobs, once an eighth of the rows is free for them: prompts are read several at a time."""
        room = self.rows - active
        if not jobs or (active and room < max(len(jobs[0].responses), self.rows // 8)):
            return []
        taken = []
        while jobs and len(jobs[0].responses) <= room:
            taken.append(jobs.popleft())
            room -= len(taken[-1].responses)
        return taken

    def _read(self, jobs: Sequence[Job]) -> tuple[list[Start], Float[Tensor, "new width"]]:
        """Read the prompts of new jobs and their drafts. Returns the responses to go on with, and the state each goes on from."""
        prefill = Prefill([job.prompt for job in jobs], self.model.device, [tuple(job.drafts.values()) for job in jobs])
        states = self.model.hidden(prefill.packed.input_ids, prefill.packed.position_ids, prefill)
        ends: list[int] = prefill.ends.tolist()
        starts = [Start(r, i, ends[i]) for i, job in enumerate(jobs) for r in job.responses if r not in job.drafts]
        resumed = self._check(jobs, prefill, states)
        starts += resumed
        self.cache.admit(prefill, [start.prompt for start in starts])
        if resumed:
            self.cache.resume(prefill, [start.draft for start in resumed], [start.read for start in resumed])
        return starts, states[torch.tensor([start.state for start in starts], dtype=torch.long, device=states.device)]

    def _check(self, jobs: Sequence[Job], prefill: Prefill, states: Tensor) -> list[Start]:
        """Draw every token of the drafts, as if each were the response so far. Returns those that are not finished with that."""
        drafted = [(i, r, draft) for i, job in enumerate(jobs) for r, draft in job.drafts.items()]
        if not drafted:
            return []
        cells = torch.tensor([(r, t) for _, r, draft in drafted for t in range(len(draft))], dtype=torch.long, device=states.device)
        predictors = prefill.packed.predictor
        for part in torch.arange(len(cells), device=states.device).split(self.rows):
            self._draw(self.stepper.logits(states[predictors[part]]), *cells[part].unbind(1))
        starts: list[Start] = []
        first = 0
        for place, (i, r, draft) in enumerate(drafted):
            right = agreed(self.tokens[r, : len(draft)].tolist(), draft, self.model.template.eos_ids)
            self.lengths[r] = right
            if not (right and draft[right - 1] in self.model.template.eos_ids) and right < self.sampling.max_tokens:
                read = min(right, len(draft) - 1)  # the draft's last token has not been read
                starts.append(Start(r, i, int(predictors[first + read]), place, read))
            first += len(draft)
        return starts


def _jobs(prompts: Sequence[Prompt], n: int, rows: int, drafts: Sequence[Sequence[Tokens]], longest: int) -> Iterator[Job]:
    """The responses of each prompt together, or in parts where they do not fit; long prompts first, so that like follow like."""
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens)):
        known = {i * n + k: draft[:longest] for k, draft in enumerate(drafts[i][:n]) if draft} if drafts else {}
        for start in range(i * n, (i + 1) * n, rows):
            part = range(start, min(start + rows, (i + 1) * n))
            yield Job(prompts[i], part, {r: draft for r, draft in known.items() if r in part})
