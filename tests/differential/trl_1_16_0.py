"""Where TRL 1.16.0 keeps its losses: in methods of its trainers. Runs in the worker only.

A trainer is made without `__init__` (which wants a model, data and a tokenizer) and given what its loss method reads: a real config
of TRL, copied the way `__init__` copies it, a real Accelerator, and a model whose forward pass is the tensors of the request. All
arithmetic on those tensors is TRL's.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

COMMON = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
PAD, EOS = 0, 1


class Given(torch.nn.Module):
    """A model whose answers are known: one SimpleNamespace per call, in turn."""

    is_gradient_checkpointing = False

    def __init__(self, *answers: SimpleNamespace) -> None:
        super().__init__()
        self.answers = list(answers)

    def forward(self, *_: Any, **__: Any) -> SimpleNamespace:
        return self.answers.pop(0)


def said(logprobs: Tensor, **more: Tensor) -> SimpleNamespace:
    """What TRL's fused head returns; only the log-probabilities (and `more`) matter to the losses."""
    zero = torch.zeros_like(logprobs)
    return SimpleNamespace(**{"log_probs": logprobs, "entropy": zero, "mean_logits": zero, "is_top1": zero.bool()} | more)


def bare(kind: type, args: Any, model: torch.nn.Module | None = None, **attributes: Any) -> Any:
    """A trainer without `__init__`, with what all of them read."""
    trainer = object.__new__(kind)
    trainer.args, trainer.model, trainer.accelerator = args, model, Accelerator(cpu=True)  # after the config, which resets its state
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer.aux_loss_enabled, trainer._total_train_tokens, trainer._tp_size = False, 0, 1
    vars(trainer).update(attributes)
    return trainer


def with_prompt(mask: Tensor) -> dict[str, Tensor]:
    """Input ids, attention and completion mask of rows with one prompt token before `mask`."""
    completion = torch.nn.functional.pad(mask.long(), (1, 0))
    return {"input_ids": torch.full_like(completion, 5), "attention_mask": torch.ones_like(completion), "completion_mask": completion}


def dpo(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """DPOTrainer.compute_loss. Rows of `logprobs`, `logprobs_ref` and `mask`: chosen ones first, then rejected ones.

    The fused head writes 0 where a label is masked, hence the products with the mask.
    """
    args = DPOConfig(**COMMON, **settings)
    model = Given(said(t["logprobs"] * t["mask"], log_sum_sq_probs=t.get("log_sum_sq_probs", torch.zeros_like(t["logprobs"]))))
    trainer = bare(
        DPOTrainer, args, model, ref_model=Given(said(t["logprobs_ref"] * t["mask"])), precompute_ref_logps=False, beta=args.beta,
        loss_types=args.loss_type, loss_weights=args.loss_weights or [1.0] * len(args.loss_type), ld_alpha=args.ld_alpha,
        f_divergence_type=args.f_divergence_type, f_alpha_divergence_coef=args.f_alpha_divergence_coef,
        label_smoothing=args.label_smoothing, use_weighting=args.use_weighting,
    )  # fmt: skip
    return {"loss": trainer.compute_loss(model, with_prompt(t["mask"]))}


def kto(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """KTOTrainer.compute_loss. `kl_logprobs`, `kl_logprobs_ref`: rows of mismatched responses, for the reference point z."""
    args = KTOConfig(**COMMON, **settings)
    uses_kl = args.loss_type == "kto"
    answers = [said(t["logprobs"] * t["mask"])]
    answers_ref = [said(t["logprobs_ref"] * t["mask"])]
    inputs = {**with_prompt(t["mask"]), "label": t["label"].bool()}
    if uses_kl:
        answers.insert(0, said(t["kl_logprobs"]))
        answers_ref.insert(0, said(t["kl_logprobs_ref"]))
        inputs |= {f"KL_{name}": value for name, value in with_prompt(torch.ones_like(t["kl_logprobs"])).items()}
    model = Given(*answers)
    trainer = bare(
        KTOTrainer, args, model, ref_model=Given(*answers_ref), precompute_ref_logps=False, beta=args.beta, loss_type=args.loss_type,
        desirable_weight=args.desirable_weight, undesirable_weight=args.undesirable_weight, calculate_KL=uses_kl,
    )  # fmt: skip
    return {"loss": trainer.compute_loss(model, inputs), "kl": torch.tensor(trainer._metrics["train"]["kl"][0])}


def reward(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """RewardTrainer.compute_loss. `scores`: chosen ones first, then rejected ones; `margin` is optional."""
    model = Given(SimpleNamespace(logits=t["scores"][:, None]))
    inputs = {"attention_mask": torch.ones_like(t["scores"])} | {name: t[name] for name in ("margin",) if name in t}
    return {"loss": bare(RewardTrainer, RewardConfig(**COMMON, **settings), model).compute_loss(model, inputs)}


def cpo(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """CPOTrainer.cpo_loss on sums or means of log-probabilities per response, as the caller chooses."""
    args = CPOConfig(**COMMON, **settings)
    names = ("beta", "loss_type", "label_smoothing", "simpo_gamma", "alpha")
    trainer = bare(CPOTrainer, args, **{name: getattr(args, name) for name in names})
    return {"loss": trainer.cpo_loss(t["chosen"], t["rejected"])[0].mean()}


def orpo(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """ORPOTrainer.odds_ratio_loss on mean log-probabilities per response; it returns what is *subtracted* from the NLL."""
    args = ORPOConfig(**COMMON, **settings)
    return {"loss": -bare(ORPOTrainer, args, beta=args.beta).odds_ratio_loss(t["chosen"], t["rejected"])[0].mean()}


def logits_of(logprobs: Tensor) -> Tensor:
    """Logits over two tokens whose log-softmax at token 0 is `logprobs`; one row more at the end, which predicts nothing."""
    logits = torch.stack([logprobs, torch.log(-torch.expm1(logprobs))], dim=-1)
    return torch.nn.functional.pad(logits, (0, 0, 0, 1))


def with_likelihood(kind: type, args: Any, t: dict[str, Tensor], **attributes: Any) -> dict[str, Tensor]:
    """The whole loss of a trainer that adds a likelihood: rows of two prompt tokens (the second predicted with `prompt_logprobs`)
    and a response of tokens 0; chosen rows first."""
    model = Given(SimpleNamespace(logits=logits_of(torch.cat([t["prompt_logprobs"], t["logprobs"]], dim=1))))
    exists = torch.nn.functional.pad(t["mask"].long(), (2, 0), value=1)
    labels = torch.nn.functional.pad(torch.where(t["mask"].bool(), 0, -100), (2, 0), value=-100)
    batch: dict[str, Tensor] = {}
    for part, side in enumerate(("chosen", "rejected")):
        columns = {"input_ids": torch.zeros_like(exists), "attention_mask": exists, "labels": labels}
        batch |= {f"{side}_{name}": column.chunk(2)[part] for name, column in columns.items()}
    trainer = bare(kind, args, model, is_encoder_decoder=False, padding_value=1, pad_token_id=1, **attributes)
    return {"loss": trainer.get_batch_loss_metrics(model, batch)[0]}


def cpo_with_likelihood(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """CPOTrainer.get_batch_loss_metrics."""
    args = CPOConfig(**COMMON, **settings)
    names = ("beta", "loss_type", "label_smoothing", "simpo_gamma", "alpha", "cpo_alpha")
    return with_likelihood(CPOTrainer, args, t, **{name: getattr(args, name) for name in names})


def orpo_with_likelihood(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """ORPOTrainer.get_batch_loss_metrics."""
    args = ORPOConfig(**COMMON, **settings)
    return with_likelihood(ORPOTrainer, args, t, beta=args.beta)


def group_trainer(kind: type, args: Any, model: Given, **attributes: Any) -> Any:
    """What GRPO, GMPO and RLOO trainers read in their losses and in their advantages."""
    copied = (
        "beta", "importance_sampling_level", "off_policy_mask_threshold", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy",
        "loss_type", "max_completion_length", "num_iterations", "scale_rewards", "multi_objective_aggregation", "num_generations",
        "mask_truncated_completions", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "use_vllm",
        "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max", "normalize_advantages", "reward_clip_range",
    )  # fmt: skip
    found = {name: getattr(args, name) for name in copied if hasattr(args, name)}
    return bare(
        kind, args, model, epsilon_low=args.epsilon, epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        _entropy_bonus_enabled=getattr(args, "entropy_coef", 0.0) != 0.0, **found, **attributes,
    )  # fmt: skip


def completions(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of one prompt token and a completion; `present` marks tokens that exist, `mask` those that are the assistant's own."""
    ids = torch.full_like(t["present"].long(), 5)
    one = torch.ones(len(ids), 1, dtype=torch.long)
    tokens = {"prompt_ids": one, "prompt_mask": one, "completion_ids": ids, "completion_mask": t["present"].long()}
    names = {"logprobs_old": "old_per_token_logps", "logprobs_ref": "ref_per_token_logps", "is_ratio": "importance_sampling_ratio"}
    given = {there: t[here] for here, there in names.items() if here in t}
    own = torch.where(t["present"].bool(), t["mask"].long(), 1)  # TRL pads its tool mask with 1
    return {**tokens, **given, "tool_mask": own, "advantages": t["advantages"], "num_items_in_batch": t["mask"].sum()}


def group_loss(kind: type, configure: type, t: dict[str, Tensor], settings: dict[str, Any], micro_batches: int = 1) -> dict[str, Tensor]:
    """The loss of one optimiser step: responses in `micro_batches` equal parts, whose losses gradient accumulation adds up."""
    size = len(t["logprobs"]) // micro_batches
    args = configure(
        **COMMON, per_device_train_batch_size=size, num_generations=size, gradient_accumulation_steps=micro_batches, **settings
    )
    inputs = completions(t)
    total = inputs.pop("num_items_in_batch")
    losses = []
    for part in (slice(start, start + size) for start in range(0, len(t["logprobs"]), size)):
        model = Given(said(t["logprobs"][part], **({"entropy": t["entropy"][part]} if "entropy" in t else {})))
        trainer = group_trainer(kind, args, model, current_gradient_accumulation_steps=micro_batches)
        losses.append(trainer.compute_loss(model, {name: x[part] for name, x in inputs.items()} | {"num_items_in_batch": total}))
    return {"loss": torch.stack(losses).sum()}


def grpo(t: dict[str, Tensor], micro_batches: int = 1, **settings: Any) -> dict[str, Tensor]:
    """GRPOTrainer.compute_loss."""
    return group_loss(GRPOTrainer, GRPOConfig, t, settings, micro_batches)


def gmpo(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """GMPOTrainer.compute_loss."""
    return group_loss(GMPOTrainer, GMPOConfig, t, settings)


def rloo(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """RLOOTrainer.compute_loss. It knows no tool mask: the own tokens are passed as the completion."""
    args = RLOOConfig(**COMMON, per_device_train_batch_size=len(t["logprobs"]), num_generations=len(t["logprobs"]), **settings)
    model = Given(said(t["logprobs"]))
    inputs = completions(t | {"present": t["mask"]}) | {"old_logps": (t["logprobs_old"] * t["mask"]).sum(1)}
    return {"loss": group_trainer(RLOOTrainer, args, model).compute_loss(model, inputs)}


def scored(kind: type, args: Any, t: dict[str, Tensor], generated: tuple[Any, ...], *answers: Tensor) -> dict[str, Tensor]:
    """`_generate_and_score_completions` where generation and rewards are given: `rewards` has a column per reward function."""
    names = [f"reward {i}" for i in range(t["rewards"].shape[1])]
    trainer = group_trainer(
        kind, args, Given(*(said(answer) for answer in answers)), ref_model=None, tools=None, environments=None, environment_factories=None,
        _tokenizer=SimpleNamespace(pad_token_id=PAD), eos_token_ids=[EOS], pad_to_multiple_of=None, _is_vlm=False,
        reward_weights=torch.ones(len(names), dtype=torch.float64), reward_funcs=names, reward_func_names=names, log_multimodal=False,
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)), _pending_extra_logs={}, _pending_metrics={},
        _generate=lambda prompts: generated, _calculate_rewards=lambda *_: t["rewards"],
    )  # fmt: skip
    if "logprobs_ref" in t:
        trainer.ref_model = Given(said(t["logprobs_ref"]))
    return trainer._generate_and_score_completions([{"prompt": "?"}] * len(t["rewards"]))


def ids_of(t: dict[str, Tensor]) -> list[list[int]]:
    """Token ids with the right number of tokens; the last is EOS unless `truncated` says otherwise."""
    cut = t["truncated"].bool().tolist() if "truncated" in t else [False] * len(t["rewards"])
    lengths = t["present"].sum(1).long().tolist() if "present" in t else [1] * len(t["rewards"])
    return [[5] * (n - 1) + [5 if c else EOS] for n, c in zip(lengths, cut, strict=True)]


def grpo_scored(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """Advantages, loss mask and (with `sampler` log-probabilities) the importance weights that GRPOTrainer makes of a rollout."""
    uses_sampler = "logprobs_sampler" in t
    args = GRPOConfig(**COMMON, per_device_train_batch_size=len(t["rewards"]), use_vllm=uses_sampler, **settings)
    ids = ids_of(t)
    sampler = [row[: len(i)].tolist() for row, i in zip(t["logprobs_sampler"], ids, strict=True)] if uses_sampler else None
    generated = ([[5]] * len(ids), ids, None, ["!"] * len(ids), sampler, {}, None, None)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # TRL rebuilds the sampler's log-probabilities from lists
    try:
        answers = [t["logprobs_old"]] if uses_sampler else []
        result = scored(GRPOTrainer, args, t, generated, *answers)
    finally:
        torch.set_default_dtype(default)
    names = ("advantages", "completion_mask", "importance_sampling_ratio")
    return {name: result[name] for name in names if name in result}


def rloo_scored(t: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """Advantages that RLOOTrainer makes of rewards, own and reference log-probabilities."""
    args = RLOOConfig(**COMMON, per_device_train_batch_size=len(t["rewards"]), **settings)
    ids = ids_of(t)
    result = scored(RLOOTrainer, args, t, ([[5]] * len(ids), ids, ["!"] * len(ids)), t["logprobs_old"])
    return {"advantages": result["advantages"]}


def fused_head(t: dict[str, Tensor], temperature: float, softcap: float | None, scale: float) -> dict[str, Tensor]:
    """The kernel behind TRL's fused head; "loss" weighs its two outputs with the given `weights`, so that both are differentiated."""
    kernel = (t["hidden"], t["weight"], t.get("bias"), t["targets"], temperature, 16, softcap, scale, ("entropy",))
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(*kernel)
    return {"loss": (torch.stack([logprobs, entropy]) * t["weights"]).sum(), "logprobs": logprobs, "entropy": entropy}


def overlong(t: dict[str, Tensor], longest: int, cache: int) -> dict[str, Tensor]:
    """The reward function for long responses."""
    reward_of = get_soft_overlong_punishment(longest, cache)
    return {"rewards": torch.tensor(reward_of([[5] * n for n in t["lengths"].tolist()]), dtype=torch.float64)}


def synced(t: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """SyncRefModelCallback's move of a reference's weights towards a policy's."""
    policy, reference = (torch.nn.ParameterList([t[name]]) for name in ("policy", "reference"))
    Accelerator(cpu=True)  # TRL looks for DeepSpeed in its state
    SyncRefModelCallback.sync_target_model(policy, reference, alpha)
    return {"reference": reference[0]}
