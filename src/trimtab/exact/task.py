"""Tasks whose responses can all be listed, their exact optimum, and models for them in the layout every stage reads."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab import seeds
from trimtab.batch import Batch
from trimtab.data.records import write_jsonl
from trimtab.maths.optimum import kl_divergence, log_partition, optimal_logprobs
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.models.tabular import TabularConfig, TabularForCausalLM, register
from trimtab.types import Group, Prompt, Response

LETTERS = "abcdefghij"
END = "."
Kind = Literal["tabular", "transformer"]


@dataclass(frozen=True)
class Task:
    """All responses of at most `length` tokens over `vocabulary` tokens (token 0 ends a response), to one or more prompts.

    Prompts begin with the end token, which occurs nowhere else before the end: from "aaaa" alone a transformer with relative positions
    could not tell how many tokens there were.

    rewards: "random": N(0, 1) for every response. "places": a N(0, 0.6^2) weight for every token at every place, added up.
             "pattern": +1 for every "ab" and -1 for every "bb" in prompt and response.
    """

    name: str
    vocabulary: int
    length: int
    prompts: tuple[str, ...]
    rewards: Literal["random", "places", "pattern"]
    seed: int = 0

    @cached_property
    def responses(self) -> tuple[Response, ...]:
        """Every response: ended by the end token, or cut off at `length`."""
        found = []
        for letters in range(self.length + 1):
            for tokens in product(range(1, self.vocabulary), repeat=letters):
                text = "".join(LETTERS[token - 1] for token in tokens)
                cut = letters == self.length
                found.append(Response(tokens if cut else (*tokens, 0), text, truncated=cut))
        return tuple(found)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Every prompt with all its responses."""
        return tuple(Group(Prompt(tuple(map(_token, text)), text), self.responses) for text in self.prompts)

    @cached_property
    def reward_table(self) -> Tensor:
        """r(x, y) [prompts, responses] in float64."""
        if self.rewards == "random":
            generator = seeds.generator(self.seed, "rewards of an exact task")
            return torch.randn(len(self.prompts), len(self.responses), dtype=torch.float64, generator=generator)
        if self.rewards == "places":
            shape = len(self.prompts), self.length, self.vocabulary
            weights = 0.6 * torch.randn(shape, dtype=torch.float64, generator=seeds.generator(self.seed, "weights of an exact task"))
            return torch.stack([torch.stack([w[range(len(r.tokens)), r.tokens].sum() for r in self.responses]) for w in weights])
        texts = [[prompt + r.text for r in self.responses] for prompt in self.prompts]
        return torch.tensor([[float(t.count("ab") - t.count("bb")) for t in row] for row in texts], dtype=torch.float64)

    def write_prompts(self, path: Path) -> Path:
        """The prompts as data; each row carries the rewards of all its responses for `from_row`."""
        rows = zip(self.prompts, self.reward_table.tolist(), strict=True)
        texts = [r.text for r in self.responses]
        write_jsonl(path, [{"prompt": p, "rewards": dict(zip(texts, table, strict=True))} for p, table in rows])
        return path

    def write_model(self, folder: Path, kind: Kind, seed: int) -> Path:
        """A start policy in Hugging Face layout; float64, so that nothing but the mathematics is seen."""
        model = _tabular(self, seed) if kind == "tabular" else _transformer(self, seed)
        model.save_pretrained(folder)
        _tokenizer(self.vocabulary).save_pretrained(folder)
        return folder

    def start(self, kind: Kind, seed: int) -> LanguageModel:
        """The start policy, loaded as a stage loads it."""
        with tempfile.TemporaryDirectory() as place:
            path = self.write_model(Path(place), kind, seed)
            return LanguageModel.load(ModelConfig(path=str(path), dtype="float64"), trainable=False)


def _token(letter: str) -> int:
    return 0 if letter == END else LETTERS.index(letter) + 1


def from_row(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """The reward function of a task: looked up in the prompt's row."""
    return float(row["rewards"][response])


@dataclass(frozen=True)
class Standing:
    """Where a policy stands: J = E[r] - beta KL(pi || ref), the best possible J* = beta log Z, means over prompts."""

    value: float
    reward: float
    kl: float
    optimum: float
    identity_error: float

    @property
    def gap(self) -> float:
        return self.optimum - self.value


def standing(task: Task, logprobs: Tensor, logprobs_ref: Tensor, beta: float) -> Standing:
    """Exact figures of a policy's log-probabilities [prompts, responses]; also by how much J* - J = beta KL(pi || pi*) fails to hold."""
    values, rewards, kls, optima, errors = [], [], [], [], []
    for pi, ref, r in zip(logprobs, logprobs_ref, task.reward_table, strict=True):
        reward, kl = float((pi.exp() * r).sum()), float(kl_divergence(pi, ref))
        optimum = beta * float(log_partition(r, ref, beta))
        gap = beta * float(kl_divergence(pi, optimal_logprobs(r, ref, beta)))
        values.append(reward - beta * kl)
        errors.append(abs(optimum - values[-1] - gap))
        rewards.append(reward)
        kls.append(kl)
        optima.append(optimum)
    n = len(values)
    return Standing(sum(values) / n, sum(rewards) / n, sum(kls) / n, sum(optima) / n, max(errors))


@torch.no_grad()
def exact_logprobs(task: Task, model: LanguageModel) -> Tensor:
    """log pi(y | x) of every response to every prompt [prompts, responses], by the packed forward pass."""
    batch = Batch(task.groups)
    logprobs = model.forward(batch).logprobs
    assert logprobs is not None
    return batch.sum_by_response(logprobs.double()).view(len(task.prompts), -1)


class Quiet:
    """A tracker that keeps nothing."""

    def log(self, step: int, metrics: Any) -> None: ...
    def samples(self, step: int, rows: Any) -> None: ...
    def event(self, kind: str, **details: Any) -> None: ...
    def rewind(self, step: int) -> None: ...
    def close(self) -> None: ...


def _tabular(task: Task, seed: int) -> Any:
    register()
    prompts = [group.prompt.tokens for group in task.groups]
    model = TabularForCausalLM(TabularConfig(vocab_size=task.vocabulary, prompts=prompts, max_tokens=task.length)).double()
    generator = seeds.generator(seed, "start of an exact task")
    model.lm_head.weight.data = torch.randn(model.lm_head.weight.shape, dtype=torch.float64, generator=generator)
    return model


def _transformer(task: Task, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=task.vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    generator = seeds.generator(seed, "start of an exact task")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * scale
    model.lm_head.weight.data *= 0.5  # a reference that leaves no response unsampled
    return model


def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {END: 0, **{letter: i + 1 for i, letter in enumerate(LETTERS[: vocabulary - 1])}}
    core = Tokenizer(models.WordLevel(words, unk_token=LETTERS[0]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)
