"""Generation in this process, on the policy's own weights.

Every prompt is read once for all of its responses. Rows that have finished leave the batch and further prompts take their place,
so that the batch stays full while anything waits. There is no padding in anything but attention, as in training, and prompts are
read by the same object that is trained, so nothing has to be sent anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from trimtab.config import Config
from trimtab.engines.cache import Cache, Prefill
from trimtab.engines.decoder import Stepper, choose, fingerprint
from trimtab.engines.sampling import SamplingConfig, draw
from trimtab.errors import DataError
from trimtab.models.language import LanguageModel
from trimtab.types import Group, Prompt, Response


class EngineConfig(Config):
    """Where and how wide responses are generated."""

    rows: int = Field(64, gt=0, description="responses generated side by side")


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

    def load(self, parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The weights are the trainer's own: what was made from the old ones is forgotten."""
        self.version = version
        self._stepper = None

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
        jobs = deque(_jobs(prompts, n, self.config.rows))
        sampled = Sampled.empty(uniform, self.model.device)
        self._run(jobs, sampled)
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

    def _run(self, jobs: deque[Job], sampled: Sampled) -> None:
        """Draw one token in every active row, until nothing waits and nothing is active."""
        model, device, stepper = self.model, self.model.device, self.stepper()
        cache = Cache(self.config.rows, self.sampling.max_tokens, device)
        head, temperature = model.head, self.sampling.temperature or 1.0
        eos = torch.tensor(sorted(model.template.eos_ids), device=device)
        active: list[int] = []  # the response that every row of the cache belongs to
        states = torch.zeros(0, head.weight.shape[1], dtype=head.weight.dtype, device=device)
        while jobs or active:
            taken = self._admissible(jobs, len(active))
            if taken:
                states = torch.cat([states, self._read(taken, cache)])
                active += [response for job in taken for response in job.responses]
            rows = torch.tensor(active, device=device)
            times = torch.tensor(cache.times, device=device)
            new, logprobs = draw(head.finish(stepper.logits(states), temperature), sampled.uniform[rows, times], self.sampling)
            ended = torch.isin(new, eos) | (times + 1 == self.sampling.max_tokens)
            sampled.record(rows, times, new, logprobs)
            finished = ended.nonzero()[:, 0].tolist()
            if finished:
                kept = cache.drop(finished)
                active, new = [active[i] for i in kept], new[torch.tensor(kept, dtype=torch.long, device=device)]
            states = stepper.hidden(new, cache.step(), cache) if active else states[:0]

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

    def _read(self, jobs: Sequence[Job], cache: Cache) -> Tensor:
        """Read the prompts of new jobs; the state that predicts the first token of each of their responses."""
        prefill = Prefill([job.prompt for job in jobs], self.model.device)
        states = self.model.hidden(prefill.packed.input_ids, prefill.packed.position_ids, prefill).index_select(0, prefill.ends)
        prompt_of_row = [i for i, job in enumerate(jobs) for _ in job.responses]
        cache.admit(prefill, prompt_of_row)
        return states[torch.tensor(prompt_of_row, device=states.device)]


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

    def record(self, rows: Tensor, times: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        self.tokens[rows, times], self.logprobs[rows, times] = tokens, logprobs.to(torch.float64)
        self.lengths[rows] = times + 1

    def responses(self) -> Iterator[tuple[list[int], list[float]]]:
        for tokens, logprobs, n in zip(self.tokens.tolist(), self.logprobs.tolist(), self.lengths.tolist(), strict=True):
            yield tokens[:n], logprobs[:n]


def _jobs(prompts: Sequence[Prompt], n: int, rows: int) -> Iterator[Job]:
    """The responses of each prompt together, or in parts where they do not fit; long prompts first, so that like follow like."""
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens)):
        for start in range(i * n, (i + 1) * n, rows):
            yield Job(prompts[i], range(start, min(start + rows, (i + 1) * n)))
