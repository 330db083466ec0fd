"""One step of every kind of training does the work that is necessary, and no more. Counted, not timed.

Per forward pass over a batch: each prompt once, each response behind it, the head on response tokens only. A backward pass is two
forward passes. What is allowed: attention may compute the whole square instead of its causal half, and 2 % for what is small (rotary
angles, heads with one output). Models are in bfloat16, so that an array of [tokens, vocabulary] in float32 is seen by its size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import tiny
from trimtab import kernels
from trimtab.batch import Batch, observe
from trimtab.config import load_recipe
from trimtab.data.records import load_comparisons, load_demonstrations
from trimtab.data.templates import Template
from trimtab.engines.local import LocalEngine
from trimtab.maths import logprobs
from trimtab.models import loading, reference_cache
from trimtab.models.base import PackedModel
from trimtab.models.language import LanguageModel
from trimtab.models.packed import Layout
from trimtab.models.scratch import Scratch
from trimtab.stages.policy import PolicyLearning, policy_config
from trimtab.stages.preference import PreferenceLearning, mismatch, preference, preference_config
from trimtab.stages.reward import RewardModelConfig, reward
from trimtab.stages.sft import SFTConfig, sft
from trimtab.training.update import Ahead
from trimtab.types import Group
from work import Necessary, Shape, Work

VOCABULARY = 20_000
SLACK = 1.02
WORDS = ["apples", "rivers", "stones", "clouds"]
CONFIG = tiny.config("llama", vocab_size=VOCABULARY)
SHAPE = Shape.of(CONFIG)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tiny.folder(folder / "model", dtype=torch.bfloat16, scale=1.0, vocab_size=VOCABULARY)
    prompts = [f"what do you think of {word}?" for word in WORDS]
    answers = [("they are very good", "they are not good.")] * len(WORDS)
    rows = [{"prompt": p, "chosen": a, "rejected": b, "completion": a} for p, (a, b) in zip(prompts, answers, strict=True)]
    for name, columns in (("pairs", ("prompt", "chosen", "rejected")), ("sft", ("prompt", "completion")), ("prompts", ("prompt",))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({c: row[c] for c in columns}) + "\n" for row in rows))
    (folder / "reward.py").write_text("def length(prompt, response, row):\n    return float(len(response))\n")
    return folder


@pytest.fixture(autouse=True)
def only_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model is asked when it is loaded is no part of a step, and memory of earlier ones hides nothing that it makes."""
    monkeypatch.setattr(LanguageModel, "_check", lambda self: None)
    logprobs._SPARE.clear()


@dataclass(frozen=True)
class Step:
    """What was counted, and what was necessary: tokens read by each model; trunk and head, each from the least to the most; and the

    bytes of the logits that may exist at once."""

    work: Work
    tokens: list[int]
    trunk: tuple[float, float]
    head: tuple[float, float]
    logits: int

    def check(self) -> None:
        """Fail if anything is more than necessary, or less (then something is not counted)."""
        assert sorted(self.work.tokens.values()) == sorted(self.tokens)
        assert 0.99 * self.trunk[0] <= self.work.trunk <= SLACK * self.trunk[1]
        assert 0.99 * self.head[0] <= self.work.head <= SLACK * self.head[1]
        states = 4 * max(self.tokens) * CONFIG.intermediate_size  # the widest activations of the trunk, in float32
        assert self.work.largest <= max(self.logits, states)


def counted(run: Callable[[], Any]) -> tuple[Work, Any]:
    model = tiny.model("llama", torch.bfloat16, vocab_size=VOCABULARY)
    shapes = {tuple(p.shape) for p in model.parameters()}
    shapes |= {tuple(Scratch(dict(part.named_parameters())).zeros.shape) for part in (model, model.base_model)}  # all gradients together
    with Work(VOCABULARY, shapes) as work:
        result = run()
    return work, result


def supervised(kind: Any, place: Path, data: str, *overrides: str) -> Any:
    settings = [f"model.path={place / 'model'}", "model.dtype=bfloat16", f"data.path={place / data}", "fit.steps=1"]
    return load_recipe(kind, None, [*settings, f"output={place / 'run'}", *overrides])


def template() -> Template:
    return Template.of(tiny.tokenizer(), "plain")


def sft_step(place: Path) -> Step:
    config = supervised(SFTConfig, place, "sft.jsonl")
    work, _ = counted(lambda: sft(config, place / "run", tiny.Recorder()))
    groups = tuple(load_demonstrations(config.data, template()).records)
    one = Necessary.of(groups, SHAPE)
    return passes(work, [one.tokens], one, trunk=3, head=3)


def reward_step(place: Path) -> Step:
    config = supervised(RewardModelConfig, place, "pairs.jsonl")
    work, _ = counted(lambda: reward(config, place / "run", tiny.Recorder()))
    one = Necessary.of(tuple(c.group for c in load_comparisons(config.data, template()).records), SHAPE, keep_last=True)
    return passes(work, [one.tokens], one, trunk=3, head=0)


def dpo_step(place: Path, *overrides: str, reference: bool = True) -> Step:
    """The reference once, which is the policy at the start; then the update."""
    config = supervised(preference_config("dpo"), place, "pairs.jsonl", *overrides)
    work, _ = counted(lambda: preference("dpo", config, place / "run", tiny.Recorder()))
    one = Necessary.of(tuple(c.group for c in load_comparisons(config.data, template()).records), SHAPE)
    return passes(work, [(1 + reference) * one.tokens], one, trunk=3 + reference, head=3 + reference)


def cached_dpo_step(place: Path) -> Step:
    """The reference's log-probabilities are on disk."""
    cache = f"reference_cache={place / 'cache'}"
    preference("dpo", supervised(preference_config("dpo"), place, "pairs.jsonl", cache), place / "run", tiny.Recorder())
    return dpo_step(place, cache, reference=False)


def policy_learning(name: str, place: Path, *overrides: str) -> PolicyLearning:
    settings = [
        f"model.path={place / 'model'}", "model.dtype=bfloat16", f"data.path={place / 'prompts.jsonl'}", f"output={place / 'run'}",
        f"reward.function={place / 'reward.py'}:length", "sampling.max_tokens=16", "prompts_per_step=4", "responses_per_prompt=2",
    ]  # fmt: skip
    return PolicyLearning(name, load_recipe(policy_config(name), None, [*settings, *overrides]))


def policy_step(name: str, place: Path, *overrides: str) -> Step:
    """The reference, and epochs of forward and backward, of policy and of a critic of its own. Their first forward passes are also the

    look at the rollout. Sampling is counted by itself."""
    learner = policy_learning(name, place, *overrides)
    groups = learner.engine.generate(learner.prompts, 2, seed=1)
    learner.engine.generate = lambda *_, **__: groups  # type: ignore[method-assign]
    work, _ = counted(lambda: learner.step(1))
    one, config = Necessary.of(tuple(groups), SHAPE), learner.config
    epochs, reference, critic = config.algorithm.epochs, config.algorithm.kl.beta > 0, config.critic.trunk == "own"
    read = [epochs * one.tokens, *[one.tokens] * reference, *[epochs * one.tokens] * critic]
    return passes(work, read, one, trunk=3 * epochs * (1 + critic) + reference, head=3 * epochs + reference)


def adapter_step(place: Path) -> Step:
    """With an adapter the reference is the same model, and frozen weights have no gradient: their backward pass counts 1, not 2.

    Nothing flows back through the first layer's projections of q, k and v; the adapter's own products are small, and may be counted.
    """
    step = policy_step("grpo", place, "model.lora={rank: 2}")
    tokens, width, hidden = step.tokens[0], SHAPE.width, CONFIG.intermediate_size
    dense, projections = 2 * tokens * SHAPE.linear, 2 * tokens * 2 * width * width  # kv heads are half as many
    adapter = 2 * tokens * SHAPE.layers * 2 * (2 * 2 * width + 2 * 3 * width // 2 + 3 * (width + hidden))
    low, high = (bound - dense for bound in step.trunk)
    head = tuple(bound * 3 / 4 for bound in step.head)
    return replace(step, tokens=[2 * tokens], trunk=(low - projections, high + 3 * adapter), head=head)


def kto_step(place: Path) -> Step:
    """What the loss must know before the update is the first forward pass of the update. The KL is estimated from other responses."""
    config = supervised(preference_config("kto"), place, "pairs.jsonl")
    work, _ = counted(lambda: preference("kto", config, place / "run", tiny.Recorder()))
    groups = tuple(c.group for c in load_comparisons(config.data, template()).records)
    one, others = Necessary.of(groups, SHAPE), Necessary.of(tuple(mismatch(groups, groups)), SHAPE)
    step = passes(work, [2 * one.tokens + 2 * others.tokens], one, trunk=4, head=4)
    trunk = (step.trunk[0] + 2 * others.low, step.trunk[1] + 2 * others.high)
    return replace(step, trunk=trunk, head=(step.head[0] + 2 * others.head, step.head[1] + 2 * others.head))


def look(place: Path) -> Step:
    """What a model says of responses from which nothing is learnt by it now; a kernel reads logits without writing them down."""
    config = supervised(preference_config("dpo"), place, "pairs.jsonl")
    batch = Batch(tuple(c.group for c in load_comparisons(config.data, template()).records))
    policy = LanguageModel.load(config.model)
    work, _ = counted(lambda: observe(batch, policy.forward, token_budget=10_000))
    one = Necessary.of(batch.groups, SHAPE)
    step = passes(work, [one.tokens], one, trunk=1, head=1)
    return replace(step, logits=0) if kernels.library() else step


def generation(place: Path) -> Step:
    """Prompts once, and every sampled token but the last; the head at most once for each; the logits of a decoding step in float32."""
    learner = policy_learning("grpo", place)
    learner.engine.stepper()  # checks itself against the model, once
    work, groups = counted(lambda: learner.engine.generate(learner.prompts, 4, seed=1))
    one = Necessary.of(tuple(groups), SHAPE)
    fewest = one.head - len(groups) * 3 * 2 * SHAPE.width * VOCABULARY  # the first tokens of a group come from one state
    return Step(work, [one.tokens], (one.low, one.high), (fewest, one.head), round(SLACK * 4 * 4 * len(groups) * VOCABULARY))


def passes(work: Work, tokens: list[int], one: Necessary, *, trunk: int, head: int) -> Step:
    """So many passes; a backward one counts 2, and may make scores again. All logits of response tokens may exist in bfloat16."""
    logits = 2 * round(one.head / (2 * SHAPE.width)) if head else 0
    return Step(work, tokens, (trunk * one.low, trunk * one.high + trunk // 3 * one.again), (head * one.head, head * one.head), logits)


STEPS: dict[str, Callable[[Path], Step]] = {
    "sft": sft_step,
    "reward": reward_step,
    "dpo": dpo_step,
    "dpo, reference on disk": cached_dpo_step,
    "kto": kto_step,
    "grpo": lambda place: policy_step("grpo", place),
    "grpo without a penalty": lambda place: policy_step("grpo", place, "algorithm.kl.beta=0"),
    "grpo, adapter": adapter_step,
    "ppo, shared trunk": lambda place: policy_step("ppo", place),
    "ppo, own critic": lambda place: policy_step("ppo", place, "critic.trunk=own"),
    "look": look,
    "generation": generation,
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_does_the_necessary_work(kind: str, place: Path) -> None:
    STEPS[kind](place).check()


def twice(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    once = getattr(owner, name)

    def again(*args: Any, **options: Any) -> Any:
        once(*args, **options)
        return once(*args, **options)

    monkeypatch.setattr(owner, name, again)


def logits_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = PackedModel.hidden

    def padded(self: Any, *args: Any) -> torch.Tensor:
        states = hidden(self, *args)
        return states + functional.linear(states, self.head.weight)[:, :1] * 0

    monkeypatch.setattr(PackedModel, "hidden", padded)


def repeated_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Layout.of

    def repeated(groups: Any, **options: Any) -> Layout:
        return shared([group.only([i]) for group in groups for i in range(len(group.responses))], **options)

    monkeypatch.setattr(Layout, "of", repeated)


def prompts_read_for_every_response(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = LocalEngine.generate

    def apart(self: Any, prompts: Any, n: int, *, seed: int) -> list[Group]:
        alone = generate(self, [p for p in prompts for _ in range(n)], 1, seed=seed)
        return [Group(p, tuple(g.responses[0] for g in alone[i * n : i * n + n])) for i, p in enumerate(prompts)]

    monkeypatch.setattr(LocalEngine, "generate", apart)


def layers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    load = loading.load_model

    def checkpointed(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        loading.checkpoint_layers(model)
        return model

    monkeypatch.setattr(loading, "load_model", checkpointed)


def frozen_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    add = loading.add_adapter

    def unfrozen(*args: Any) -> Any:
        model = add(*args)
        return model.requires_grad_(True)

    monkeypatch.setattr(loading, "add_adapter", unfrozen)


def kept_for_nothing(patch: pytest.MonkeyPatch) -> None:
    if kernels.library() is None:
        pytest.skip("needs compiled kernels")
    apply = logprobs._TokenLogprobs.apply
    patch.setattr(logprobs._TokenLogprobs, "apply", lambda *settings: apply(*settings[:-1], True))


def _whole_logits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(logprobs.kernels, "serves", lambda x: False)  # a kernel makes no float32 logits at all
    patch.setattr(logprobs, "SLICE_ELEMENTS", 2**40)


LOST: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "a second reference pass": ("dpo", lambda patch: twice(patch, PreferenceLearning, "_look")),
    "a look that is not learnt from": ("grpo", lambda patch: patch.setattr(Ahead, "serves", staticmethod(lambda *_: False))),
    "a reference that nothing needs": ("grpo without a penalty", lambda patch: patch.setattr(PolicyLearning, "refers", lambda *_: True)),
    "a cache that is not read": ("dpo, reference on disk", lambda patch: patch.setattr(reference_cache, "_read", lambda *_: None)),
    "logits over the prompt": ("sft", logits_everywhere),
    "prompts repeated in training": ("dpo", repeated_prompts),
    "prompts repeated in sampling": ("generation", prompts_read_for_every_response),
    "all logits in float32": ("sft", _whole_logits),
    "the head computed again": ("sft", lambda patch: patch.setattr(logprobs, "PART_BYTES", 2**20)),
    "weights of words that nothing is learnt from": ("look", kept_for_nothing),
    "layers computed again": ("reward", layers_again),
    "gradients of frozen weights": ("grpo, adapter", frozen_gradients),
}


@pytest.mark.parametrize("factor", LOST)
def test_a_lost_factor_is_noticed(factor: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, lose = LOST[factor]
    lose(monkeypatch)
    with pytest.raises(AssertionError):
        STEPS[kind](place).check()
