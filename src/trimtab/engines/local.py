"""Generation in this process, on the policy's own weights.

Every prompt is read once for all of its responses. Rows that have finished leave the batch and further prompts take their place,
so that the batch stays full while anything waits. There is no padding in anything but attention, as in training, and prompts are
read by the same object that is trained, so nothing has to be sent anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from trimtab.config import Config
from trimtab.engines.cache import Cache, Prefill
from trimtab.engines.decoder import Stepper, choose, fingerprint
from trimtab.engines.drafts import Memory, Tokens, agreed, uniform_numbers
from trimtab.engines.sampling import SamplingConfig, draw
from trimtab.errors import DataError
from trimtab.models.language import LanguageModel
from trimtab.types import Group, Prompt, Response


class EngineConfig(Config):
    """Where and how wide responses are generated."""

    rows: int = Field(64, gt=0, description="responses generated side by side")
    reuse: bool = Field(
        False, description="draw a prompt with the same random numbers every time, and start from its last response as far as that holds"
    )


@dataclass(frozen=True)
class Job:
    """Responses to one prompt that are started together: their numbers among all responses of the call."""

    prompt: Prompt
    responses: range


class LocalEngine:
    """Samples from a LanguageModel in this process."""

    def __init__(self, model: LanguageModel, sampling: SamplingConfig, config: EngineConfig | None = None) -> None:
        self.model, self.sampling, self.config = model, sampling, config or EngineConfig()
        self.version = 0
        self._make_stepper: Callable[[LanguageModel], Stepper] | None = None
        self._stepper: Stepper | None = None
        self._made_from: object = None
        self._memory = Memory()

    def load(self, parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The weights are the trainer's own: what was made from the old ones is forgotten."""
        self.version = version
        self._stepper = None

    def generate(self, prompts: Sequence[Prompt], n: int, *, seed: int) -> list[Group]:
        """n responses to each prompt, in order. The same seed and weights give the same responses.

        With `reuse` a prompt seen before keeps the random numbers it had then, whatever the seed (see engines/drafts.py).
        """
        if not self.config.reuse:
            numbers = torch.Generator().manual_seed(seed)
            uniform = torch.rand(len(prompts) * n, self.sampling.max_tokens, dtype=torch.float64, generator=numbers)
            return self.sample(prompts, n, uniform)
        seeds, drafts = self._memory.recall(prompts, seed)
        groups = self.sample(prompts, n, uniform_numbers(seeds, n, self.sampling.max_tokens), drafts)
        self._memory.keep(groups, seeds)
        return groups

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], n: int, uniform: Float[Tensor, "responses tokens"], drafts: Sequence[Sequence[Tokens]] = ()
    ) -> list[Group]:
        """The responses that these random numbers draw. Drafts of a prompt's first responses may save time, and change nothing else."""
        longest = max((len(p.tokens) for p in prompts), default=0)
        if longest + self.sampling.max_tokens > self.model.context:
            raise DataError(
                f"a prompt of {longest} tokens and {self.sampling.max_tokens} new ones exceed the model's context of {self.model.context}",
                fix="lower sampling.max_tokens, or set data.max_prompt_tokens with data.on_long=skip",
            )
        given = [draft[: self.sampling.max_tokens] for group in drafts for draft in [*group[:n], *[()] * (n - len(group))]]
        sampled = Sampled.empty(uniform, self.model.device)
        self._run(deque(_jobs(prompts, n, self.config.rows)), sampled, given or [()] * len(uniform))
        answers = [self._response(tokens, logprobs) for tokens, logprobs in sampled.responses()]
        return [Group(prompt, tuple(answers[i * n : (i + 1) * n])) for i, prompt in enumerate(prompts)]

    def _response(self, tokens: list[int], logprobs: list[float]) -> Response:
        template = self.model.template
        truncated = tokens[-1] not in template.eos_ids
        return Response(tuple(tokens), template.decode(tokens), truncated=truncated, logprobs=tuple(logprobs), version=self.version)

    def stepper(self) -> Stepper:
        """What decodes with the weights as they are now."""
        now = fingerprint(self.model)
        if self._stepper is None or self._made_from != now:
            self._make_stepper = self._make_stepper or choose(self.model)
            self._stepper = None  # two copies of the weights are one too many
            self._stepper, self._made_from = self._make_stepper(self.model), now
        return self._stepper

    def _run(self, jobs: deque[Job], sampled: Sampled, drafts: Sequence[Tokens]) -> None:
        """Draw one token in every active row, until nothing waits and nothing is active."""
        model, device, stepper = self.model, self.model.device, self.stepper()
        cache = Cache(self.config.rows, self.sampling.max_tokens, device)
        eos = torch.tensor(sorted(model.template.eos_ids), device=device)
        active: list[int] = []  # the response that every row of the cache belongs to
        states = torch.zeros(0, model.head.weight.shape[1], dtype=model.head.weight.dtype, device=device)
        while jobs or active:
            taken = self._admissible(jobs, len(active))
            if taken:
                begun, first = self._read(taken, cache, sampled, drafts)
                active, states = active + begun, torch.cat([states, first])
                if not active:
                    continue
            rows, times = torch.tensor(active, device=device), torch.tensor(cache.times, device=device)
            new = self._draw(stepper.logits(states), rows, times, sampled)
            finished = (torch.isin(new, eos) | (times + 1 == self.sampling.max_tokens)).nonzero()[:, 0].tolist()
            if finished:
                kept = cache.drop(finished)
                active, new = [active[i] for i in kept], new[torch.tensor(kept, dtype=torch.long, device=device)]
            states = stepper.hidden(new, cache.step(), cache) if active else states[:0]

    def _draw(self, logits: Tensor, rows: Tensor, times: Tensor, sampled: Sampled) -> Tensor:
        """Draw and note token `times` of responses `rows`."""
        logits = self.model.head.finish(logits, self.sampling.temperature or 1.0)
        tokens, logprobs = draw(logits, sampled.uniform[rows, times], self.sampling)
        sampled.tokens[rows, times], sampled.logprobs[rows, times] = tokens, logprobs.to(torch.float64)
        sampled.lengths[rows] = times + 1
        return tokens

    def _admissible(self, jobs: deque[Job], active: int) -> list[Job]:
        """The next jobs, once an eighth of the rows is free for them: prompts are read several at a time."""
        room = self.config.rows - active
        if not jobs or (active and room < max(len(jobs[0].responses), self.config.rows // 8)):
            return []
        taken = []
        while jobs and len(jobs[0].responses) <= room:
            taken.append(jobs.popleft())
            room -= len(taken[-1].responses)
        return taken

    def _read(self, jobs: Sequence[Job], cache: Cache, sampled: Sampled, drafts: Sequence[Tokens]) -> tuple[list[int], Tensor]:
        """Read the prompts of new jobs, and their drafts. Returns the responses to go on with, and the state that predicts the next

        token of each."""
        drafted = [[r for r in job.responses if drafts[r]] for job in jobs]
        prefill = Prefill([job.prompt for job in jobs], self.model.device, [[drafts[r] for r in group] for group in drafted])
        states = self.model.hidden(prefill.packed.input_ids, prefill.packed.position_ids, prefill)
        checked = [r for group in drafted for r in group]
        read = self._check(checked, drafts, states, prefill, sampled) if checked else {}
        fresh = [(r, i) for i, job in enumerate(jobs) for r in job.responses if not drafts[r]]
        resumed = [(r, i) for i, group in enumerate(drafted) for r in group if read[r] >= 0]
        cache.admit(prefill, [i for _, i in fresh + resumed])
        if resumed:
            cache.resume(prefill, [checked.index(r) for r, _ in resumed], [read[r] for r, _ in resumed])
        firsts = dict(zip(checked, [0, *accumulate(prefill.draft_lengths)], strict=False))
        places = [int(i) for i in prefill.ends[[i for _, i in fresh]].tolist()]
        places += [int(i) for i in prefill.packed.predictor[[firsts[r] + read[r] for r, _ in resumed]].tolist()]
        return [r for r, _ in fresh + resumed], states[torch.tensor(places, dtype=torch.long, device=states.device)]

    def _check(
        self, responses: Sequence[int], drafts: Sequence[Tokens], states: Tensor, prefill: Prefill, sampled: Sampled
    ) -> dict[int, int]:
        """Draw every token of the drafts at once. For each response: the tokens to begin with, or -1 if the draft is all of it."""
        device, eos = states.device, self.model.template.eos_ids
        rows = torch.tensor([r for r in responses for _ in drafts[r]], dtype=torch.long, device=device)
        times = torch.tensor([t for r in responses for t in range(len(drafts[r]))], dtype=torch.long, device=device)
        head = self.model.head
        for part in torch.arange(len(rows), device=device).split(self.config.rows):
            logits = nn.functional.linear(states[prefill.packed.predictor[part]], head.weight, head.bias)
            self._draw(logits, rows[part], times[part], sampled)
        read: dict[int, int] = {}
        for r in responses:
            right = agreed(sampled.tokens[r, : len(drafts[r])].tolist(), drafts[r], eos)
            ended = right > 0 and (drafts[r][right - 1] in eos or right == self.sampling.max_tokens)
            read[r] = -1 if ended else min(right, len(drafts[r]) - 1)
            sampled.lengths[r] = right
        return read


@dataclass
class Sampled:
    """What has been drawn: row r is response r of the call, `uniform` holds its random numbers."""

    uniform: Tensor
    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor

    @classmethod
    def empty(cls, uniform: Tensor, device: torch.device) -> Sampled:
        tokens = torch.zeros(uniform.shape, dtype=torch.long, device=device)
        return cls(
            uniform.to(device), tokens, torch.zeros(uniform.shape, dtype=torch.float64, device=device), tokens.new_zeros(len(uniform))
        )

    def responses(self) -> Iterator[tuple[list[int], list[float]]]:
        for tokens, logprobs, n in zip(self.tokens.tolist(), self.logprobs.tolist(), self.lengths.tolist(), strict=True):
            yield tokens[:n], logprobs[:n]


def _jobs(prompts: Sequence[Prompt], n: int, rows: int) -> Iterator[Job]:
    """The responses of each prompt together, or in parts where they do not fit; long prompts first, so that like follow like."""
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens)):
        for start in range(i * n, (i + 1) * n, rows):
            yield Job(prompts[i], range(start, min(start + rows, (i + 1) * n)))
