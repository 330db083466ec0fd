"""What a recipe will need before it is run: memory by what holds it, and the time of a step.

Parameters are counted on a model without storage. What a backward pass keeps is measured on one and two layers of the recipe's model, at
two lengths of micro-batch, and carried on in a straight line. Time comes from one update of a synthetic micro-batch and a few steps of
decoding with the whole model, once it is known to fit.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimtab import kernels
from trimtab.batch import Batch, observe
from trimtab.data.records import load_comparisons, load_demonstrations, load_prompts
from trimtab.engines.cache import round_up
from trimtab.engines.local import LocalEngine
from trimtab.errors import ConfigError
from trimtab.kernels import adamw
from trimtab.models import loading, packed
from trimtab.models.fused import take_kernels
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.stages.common import nll_loss
from trimtab.training.clock import Clock
from trimtab.training.optimiser import OptimConfig, Optimiser
from trimtab.training.update import update
from trimtab.types import Group, Prompt, Response

PROBED = (64, 192)
"""Packed tokens at which activations are measured."""
HOLES = 1.5
"""On a CPU, what the heap grows by for a byte that is kept: passing tensors leave holes into which no other fits. Measured with glibc on 4
and 8 layers, 340 to 1400 tokens, with and without an adapter: 1.4 to 1.7."""


@dataclass(frozen=True)
class Sizes:
    """What decides memory and time beside the model.

    prompt, response: tokens of the longest prompt and response. micro, step: packed tokens of a micro-batch and of a step.
    rows: responses decoded side by side; sampled: responses of a step (0: nothing is sampled).
    """

    prompt: int
    response: int
    micro: int
    step: int
    rows: int = 0
    sampled: int = 0
    per_prompt: int = 1
    epochs: int = 1


@dataclass(frozen=True)
class Parameters:
    """Of one model: how many there are, how many are trained, and bytes of both."""

    total: int
    trained: int
    bytes: int
    masters: int  # bytes beside the weights from which what is trained in less is stepped in float32
    gradients: int

    @property
    def moments(self) -> int:
        return 2 * self.gradients


@dataclass(frozen=True)
class Plan:
    """Bytes by what holds them, seconds by what takes them, and what there is."""

    parameters: Parameters
    memory: Mapping[str, int]
    available: int
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """What is held throughout, and the larger of the two that take turns: sampling and learning."""
        turns = (("activations",), ("KV cache", "sampler's weights"))
        held = sum(size for name, size in self.memory.items() if not any(name in turn for turn in turns))
        return held + max(sum(self.memory.get(name, 0) for name in turn) for turn in turns)

    def check(self) -> None:
        """Raises ConfigError, naming the settings to change, if it does not fit."""
        if self.peak <= self.available:
            return
        largest = max(self.memory, key=lambda name: self.memory[name])
        raise ConfigError(
            f"the run needs {_gib(self.peak)} and there are {_gib(self.available)}; most of it is {largest}",
            where="plan",
            fix=FIXES.get(largest, FIXES["weights"]),
        )


FIXES = {
    "weights": "set model.lora={rank: 16} or model.dtype=bfloat16, or take a smaller model (model.path, model.layers)",
    "gradients": "train an adapter: model.lora={rank: 16}",
    "optimiser": "train an adapter: model.lora={rank: 16}",
    "activations": "lower micro_batch_tokens, or set model.checkpointing=true",
    "KV cache": "lower engine.rows or sampling.max_tokens",
    "other models": "set model.lora={rank: 16}, critic.trunk=shared, or reference.role=none with algorithm.kl.beta=0",
}


def plan(config: Any, *, probe: bool = True) -> Plan:
    """What the recipe of sft, reward, a preference loss or a policy algorithm needs. Raises ConfigError where it cannot fit."""
    if not hasattr(config, "fit") and not hasattr(config, "prompts_per_step"):
        raise ConfigError(
            "there is no plan for this command", where="plan", fix="plan sft, reward, a preference loss or a policy algorithm"
        )
    sizes = sizes_of(config)
    found = memory_of(config, sizes)
    made = Plan(*found, available(config.model.device))
    made.check()
    return Plan(*found, made.available, seconds_of(config, sizes)) if probe else made


def sizes_of(config: Any) -> Sizes:
    """The sizes of a recipe's steps, from its data."""
    template = loading.load_template(loading.resolve_path(config.model.path), config.data.template)
    if hasattr(config, "prompts_per_step"):
        prompt = max(len(p.tokens) for p in load_prompts(config.data, template).records)
        response, n = config.sampling.max_tokens, config.responses_per_prompt
        group, sampled = prompt + n * response, n * config.prompts_per_step
        fitting = min(config.prompts_per_step, config.micro_batch_tokens // group)
        micro = group * fitting if fitting else max(prompt + response, config.micro_batch_tokens)  # a group that does not fit is cut
        rows = min(config.engine.rows, sampled)
        return Sizes(prompt, response, micro, group * config.prompts_per_step, rows, sampled, n, config.algorithm.epochs)
    if type(config).__name__ == "SFTConfig":
        groups = load_demonstrations(config.data, template).records
    else:
        groups = [comparison.group for comparison in load_comparisons(config.data, template).records]
    prompt, response = max(len(g.prompt.tokens) for g in groups), max(len(r.tokens) for g in groups for r in g.responses)
    counts = sorted((g.token_count for g in groups), reverse=True)
    size = min(config.fit.batch_size, len(counts))
    micro = max(counts[0], min(sum(counts[:size]), config.fit.micro_batch_tokens))
    several = round(sum(len(g.responses) for g in groups) / len(groups))
    return Sizes(prompt, response, micro, round(size * sum(counts) / len(counts)), per_prompt=several)


def count(config: ModelConfig, *, scorer: bool = False, trainable: bool = True) -> Parameters:
    """The parameters of a model, without loading it."""
    model = _bare(config, scorer=scorer, device="meta")
    model.requires_grad_(trainable and config.lora is None)
    if trainable and config.lora is not None:
        model = loading.add_adapter(model, config.lora, "SEQ_CLS" if scorer else "CAUSAL_LM")
    every = list(model.parameters())
    trained = [p for p in every if p.requires_grad]
    wide = {p: max(4, p.element_size()) * p.numel() for p in trained}
    halves = adamw.serves(torch.empty(0, dtype=_dtype(config), device=loading.resolve_device(config.device)))
    return Parameters(
        total=sum(p.numel() for p in every),
        trained=sum(p.numel() for p in trained),
        bytes=sum(p.numel() * p.element_size() for p in every),
        masters=sum(size // (2 if halves else 1) for p, size in wide.items() if p.element_size() < 4),
        gradients=sum(wide.values()),
    )


def memory_of(config: Any, sizes: Sizes) -> tuple[Parameters, dict[str, int]]:
    """Parameters, and bytes by what holds them."""
    scorer = hasattr(config, "head_optim")
    own = count(config.model, scorer=scorer)
    memory = {"weights": own.bytes, "gradients": own.gradients, "optimiser": own.masters + own.moments, "other models": 0}
    if sizes.sampled:
        memory["other models"] = _others(config, own)
        if _own_critic(config):  # it learns after the policy, and its gradients lie where the policy's were
            memory["gradients"] = max(own.gradients, count(config.model, scorer=True).gradients)
        memory["sampler's weights"] = 0 if _lends_to_sampler(config, own) else own.bytes
        memory["KV cache"] = cache_bytes(config.model, sizes)
    elif getattr(getattr(config, "algorithm", None), "reference", None) is not None:
        memory["other models"] = own.gradients if config.algorithm.reference.role in ("synced", "ema") else 0
    program = resident()  # before anything is tried, which leaves its memory behind
    memory["activations"] = working_bytes(config, sizes, scorer=scorer)
    return own, memory | {"program": program}


def working_bytes(config: Any, sizes: Sizes, *, scorer: bool = False) -> int:
    """What memory forward and backward passes work in: what is kept, what passes, and the first pass of a critic that learns later."""
    size = activation_bytes(config.model, sizes.micro, scorer=scorer) + adapter_bytes(config.model, sizes.micro)
    if loading.resolve_device(config.model.device).type == "cpu":
        size = round(HOLES * size)
    return size + (activation_bytes(config.model, sizes.micro, scorer=True) if _own_critic(config) else 0)


def _others(config: Any, own: Parameters) -> int:
    """Of a policy run: reference, critic and reward model."""
    moving = config.reference.role in ("synced", "ema") or config.roles == "textbook"
    frozen = config.reference.role == "frozen" and not moving and config.model.lora is None
    size = own.gradients if moving and config.reference.role != "none" else own.bytes if frozen else 0
    if _own_critic(config):
        critic = count(config.model, scorer=True)
        size += critic.bytes + critic.masters + critic.moments
    if config.reward.model is not None:
        reader = ModelConfig(path=config.reward.model, dtype=config.reward.dtype, device=config.model.device)
        size += count(reader, scorer=True, trainable=False).bytes
    return size + (own.bytes if config.overlap and config.model.lora is None else 0)


def _lends_to_sampler(config: Any, own: Parameters) -> bool:
    """Whether the sampler's order of the weights lies where gradients are added up later."""
    compiled = loading.resolve_device(config.model.device).type == "cpu" and kernels.library() is not None
    return compiled and own.masters > 0 and not config.overlap


def _own_critic(config: Any) -> bool:
    return hasattr(config, "critic") and config.critic.trunk == "own" and hasattr(config.algorithm, "gae_lambda")


def adapter_bytes(config: ModelConfig, tokens: int) -> int:
    """What an adapter makes beside what is kept: the output of every layer that it changes is there a second time, in float32."""
    if config.lora is None:
        return 0
    model = loading.add_adapter(_bare(config, scorer=False, device="meta"), config.lora, "CAUSAL_LM")
    made: int = 4 * tokens * sum(module.out_features for module in model.modules() if hasattr(module, "lora_A"))
    return made // int(_architecture(config).get_text_config().num_hidden_layers) if config.checkpointing else made


def cache_bytes(config: ModelConfig, sizes: Sizes) -> int:
    """Keys and values of the rows that are decoded side by side, and of their prompts."""
    shape: Any = _architecture(config).get_text_config()
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    cells = sizes.rows * round_up(sizes.response) + math.ceil(sizes.rows / sizes.per_prompt) * round_up(sizes.prompt)
    return int(2 * shape.num_hidden_layers * heads * width * cells * _dtype(config).itemsize)


def activation_bytes(config: ModelConfig, tokens: int, *, scorer: bool = False) -> int:
    """What a backward pass over so many packed tokens keeps."""
    shape = _architecture(config).get_text_config()
    depth, width = int(shape.num_hidden_layers), int(shape.hidden_size)
    kept = {layers: [_kept(config, layers, n, scorer=scorer) for n in PROBED] for layers in (1, 2)}
    layer = _line([two - one for one, two in zip(kept[1], kept[2], strict=True)], tokens)
    rest = _line(kept[1], tokens) - layer
    if config.checkpointing:
        return round(rest + layer + depth * tokens * width * _dtype(config).itemsize)
    return round(rest + depth * layer)


def seconds_of(config: Any, sizes: Sizes) -> dict[str, float]:
    """Seconds of a step by what takes them, measured on the model itself: the median of three updates after a first one."""
    model = LanguageModel.load(config.model)
    batch = shaped(sizes, model.plain.config.get_text_config().vocab_size)
    tokens = sum(group.token_count for group in batch.groups)
    optimiser = Optimiser(model.trainable(), OptimConfig(lr=1e-30), 4)
    clocks = [Clock() for _ in range(4)]
    for at, clock in enumerate(clocks):
        update(batch, model.forward, nll_loss("token"), [optimiser], at=at, token_budget=sizes.micro, clock=clock)
    median = {part: statistics.median(clock.parts[f"time/{part}"] for clock in clocks[1:]) for part in ("forward", "backward", "optimiser")}
    updates = getattr(getattr(config, "algorithm", None), "minibatches", 1) * sizes.epochs
    learners = 1 + (config.critic.updates if _own_critic(config) else 0)
    seconds = {part: median[part] / tokens * sizes.step * sizes.epochs * learners for part in ("forward", "backward")}
    seconds["optimiser"] = median["optimiser"] * updates * learners
    if sizes.sampled:
        start = time.perf_counter()
        observe(batch, model.forward, token_budget=sizes.micro)
        looks = 1 + (config.reference.role != "none") + _own_critic(config)
        seconds["observe"] = looks * (time.perf_counter() - start) / tokens * sizes.step
        seconds["generate"] = _decoding(model, config, sizes)
    return seconds


def _decoding(model: LanguageModel, config: Any, sizes: Sizes) -> float:
    """Seconds to sample the responses of a step, if all are as long as they may be."""
    vocabulary = model.plain.config.get_text_config().vocab_size
    prompts = [Prompt(_tokens(sizes.prompt, vocabulary, i), "") for i in range(math.ceil(sizes.rows / sizes.per_prompt))]
    taken = []
    for length in (2, 2, 10):  # the first prepares
        engine = LocalEngine(model, config.sampling.model_copy(update={"max_tokens": length}), config.engine)
        engine.stepper()
        start = time.perf_counter()
        engine.generate(prompts, sizes.per_prompt, seed=0)
        taken.append(time.perf_counter() - start)
    step = max(0.0, taken[2] - taken[1]) / 8
    return (taken[1] + step * max(0, sizes.response - 2)) * math.ceil(sizes.sampled / sizes.rows)


def synthetic(tokens: int, vocabulary: int) -> Batch:
    """One group of so many packed tokens: a prompt of a quarter, the rest in two responses."""
    prompt, first = max(1, tokens // 4), max(1, (tokens - tokens // 4) // 2)
    second = max(1, tokens - prompt - first)
    responses = tuple(Response(_tokens(n, vocabulary, i), "") for i, n in enumerate((first, second)))
    return Batch((Group(Prompt(_tokens(prompt, vocabulary, 2), ""), responses),))


def shaped(sizes: Sizes, vocabulary: int) -> Batch:
    """A micro-batch of groups as large as the recipe's: what attention costs depends on their lengths."""
    responses = tuple(Response(_tokens(sizes.response, vocabulary, i), "") for i in range(sizes.per_prompt))
    group = Group(Prompt(_tokens(sizes.prompt, vocabulary, 2), ""), responses)
    return Batch((group,) * max(1, sizes.micro // group.token_count), apart=bool(sizes.sampled))


def available(device: str) -> int:
    """Bytes of memory of the device: of the GPU, or of the machine and of what its container may use."""
    if loading.resolve_device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        said = Path(place).read_text().strip() if Path(place).is_file() else "max"
        limits += [int(said)] if said.isdigit() else []
    return min(limits)


def resident() -> int:
    """Bytes that this process, with all its libraries, holds now."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def rows_of(made: Plan) -> list[tuple[str, str]]:
    """The plan as a table."""
    counted = f"{made.parameters.total:,}, of which {made.parameters.trained:,} are trained"
    memory = [(name, _gib(size)) for name, size in made.memory.items() if size]
    times = [(f"{name}, a step", f"{seconds:.3g} s") for name, seconds in made.seconds.items()]
    total = [("a step", f"{sum(made.seconds.values()):.3g} s")] if made.seconds else []
    return [("parameters", counted), *memory, ("peak", f"{_gib(made.peak)} of {_gib(made.available)}"), *times, *total]


def _kept(config: ModelConfig, layers: int, tokens: int, *, scorer: bool) -> int:
    """Bytes that autograd keeps after a forward pass of the first layers, without the parameters."""
    device = loading.resolve_device(config.device)
    model = _bare(config.model_copy(update={"layers": layers}), scorer=scorer, device=str(device))
    take_kernels(model)
    template = loading.load_template(loading.resolve_path(config.path), "auto")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    batch = synthetic(tokens, model.config.get_text_config().vocab_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        said = Scorer(model, template).token_scores(batch).token_scores if scorer else _Unchecked(model, template).forward(batch).logprobs
    assert said is not None
    return sum(kept.values())


class _Unchecked(LanguageModel):
    """A policy with random weights, on which nothing can be held against another forward pass."""

    def _check(self) -> None:
        pass


def _bare(config: ModelConfig, *, scorer: bool, device: str) -> Any:
    """A model of this architecture and precision, whose weights mean nothing."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    packed.register()
    kind, options = (AutoModelForSequenceClassification, {"num_labels": 1}) if scorer else (AutoModelForCausalLM, {})
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = kind.from_config(_architecture(config, **options), dtype=_dtype(config), attn_implementation=packed.ATTENTION)
    return model.eval()


def _architecture(config: ModelConfig, **options: Any) -> Any:
    return loading.architecture(loading.base_of(loading.resolve_path(config.path)), config.layers, options)


def _dtype(config: ModelConfig) -> torch.dtype:
    return loading.resolve_dtype(config.dtype, loading.resolve_device(config.device))


def _tokens(n: int, vocabulary: int, offset: int) -> tuple[int, ...]:
    return tuple((7 * i + 3 + offset) % (vocabulary - 1) + 1 for i in range(n))


def _line(values: list[int], at: int) -> float:
    """The straight line through what was measured at PROBED, carried on."""
    (a, b), (x, y) = values, PROBED
    return a + (b - a) * (at - x) / (y - x)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
