"""Generation in this process, on the policy's own weights.

Prompts are read by the same object that is trained, so nothing has to be sent anywhere. Tokens are drawn by `batching`, one step at
a time through `decoder`, with a `cache` of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from trimtab.config import Config
from trimtab.engines.batching import Batcher
from trimtab.engines.decoder import Kind, Stepper, choose, fingerprint
from trimtab.engines.drafts import Memory, Tokens, uniform_numbers
from trimtab.engines.sampling import SamplingConfig
from trimtab.errors import DataError
from trimtab.memory import fitted
from trimtab.models.language import LanguageModel
from trimtab.models.scratch import Empty, Scratch, elsewhere
from trimtab.types import Group, Prompt, Response


class EngineConfig(Config):
    """Where and how wide responses are generated."""

    rows: int = Field(64, gt=0, description="responses generated side by side")
    reuse: bool = Field(
        False, description="draw a prompt by the same random numbers every time, from its last response on (does not pay in bfloat16)"
    )


class LocalEngine:
    """Samples from a LanguageModel in this process.

    scratch: lends the memory of the weights in the decoder's order, until `sleep`.
    """

    def __init__(
        self, model: LanguageModel, sampling: SamplingConfig, config: EngineConfig | None = None, scratch: Scratch | None = None
    ) -> None:
        self.model, self.sampling, self.config, self.scratch = model, sampling, config or EngineConfig(), scratch
        self.version = 0
        self._kind: Kind | None = None
        self._stepper: Stepper | None = None
        self._made_from: object = None
        self.memory = Memory()

    @torch.no_grad()
    def load(self, parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Weights that are given are copied; none where the model is the trainer's own. What the old ones made is forgotten."""
        mine = dict(self.model.model.named_parameters())
        for name, parameter in parameters:
            mine[name].copy_(parameter)
        self.version = version
        self.sleep()

    def sleep(self) -> None:
        """Free the weights in the decoder's order, which the next `generate` makes again."""
        if self._stepper is not None and self.scratch is not None:
            self.scratch.take_back()
        self._stepper = None

    def generate(self, prompts: Sequence[Prompt], n: int, *, seed: int) -> list[Group]:
        """n responses to each prompt, in order. The same seed and weights give the same responses.

        With `reuse` a prompt seen before keeps the random numbers it had then, whatever the seed (see engines/drafts.py).
        """
        if not self.config.reuse:
            numbers = torch.Generator().manual_seed(seed)
            uniform = torch.rand(len(prompts) * n, self.sampling.max_tokens, dtype=torch.float64, generator=numbers)
            return self.sample(prompts, n, uniform)
        seeds, drafts = self.memory.recall(prompts, seed)
        groups = self.sample(prompts, n, uniform_numbers(seeds, n, self.sampling.max_tokens), drafts)
        self.memory.keep(groups, seeds)
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

        def drawn(rows: int) -> list[Response]:
            batcher = Batcher(self.model, self.stepper(), self.sampling, rows, uniform)
            batcher.run(prompts, n, drafts)
            return [self._response(tokens, logprobs) for tokens, logprobs in batcher.responses()]

        rows = max(1, min(self.config.rows, len(prompts) * n))  # the cache has room for as many
        try:
            answers, _ = fitted(drawn, rows, lambda rows: rows // 2 or None)
        except BaseException:
            self.sleep()  # what was lent is back before anything else goes on
            raise
        return [Group(prompt, tuple(answers[i * n : (i + 1) * n])) for i, prompt in enumerate(prompts)]

    def _response(self, tokens: list[int], logprobs: list[float]) -> Response:
        template = self.model.template
        truncated = tokens[-1] not in template.eos_ids
        return Response(tuple(tokens), template.decode(tokens), truncated=truncated, logprobs=tuple(logprobs), version=self.version)

    def stepper(self) -> Stepper:
        """What decodes with the weights as they are now."""
        now = fingerprint(self.model)
        if self._stepper is None or self._made_from != now:
            self._stepper = None  # two copies of the weights are one too many
            self._kind = self._kind or choose(self.model, self._empty())
            self._stepper, self._made_from = self._kind(self.model, self._empty()), now
        return self._stepper

    def _empty(self) -> Empty:
        return elsewhere if self.scratch is None else self.scratch.lend()
