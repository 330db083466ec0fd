"""The preference losses by name. What each one minimises is said in `maths.preference_losses`; here are its settings.

Many are the same loss under other settings; such a class only changes defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from trimtab.algorithms import PREFERENCES
from trimtab.algorithms.base import ReferenceConfig
from trimtab.algorithms.preference_base import (
    LabelConfig,
    LabelLoss,
    LogRatio,
    MovingReferenceConfig,
    NoReferenceConfig,
    PairConfig,
    PairLoss,
    PreferenceLoss,
    PreferenceLossConfig,
    beta_field,
    log_ratio_field,
    nll_field,
    nll_per_token_field,
    reference_field,
    smoothing_field,
)
from trimtab.batch import Batch, Counts, Loss, Outputs
from trimtab.config import Config, validate
from trimtab.errors import ConfigError
from trimtab.maths import preference_losses as losses


class BetaConfig(PairConfig):
    """Settings of a loss on pairs with a strength beta."""

    beta: float = beta_field(0.1)

    @property
    def scale(self) -> float:
        return self.beta


class DPOConfig(BetaConfig):
    """Settings of DPO and of what differs from it in defaults only."""

    label_smoothing: float = smoothing_field()


class DPO(PairLoss):
    """Direct preference optimisation; with label_smoothing, the conservative form."""

    Config: type[Config] = DPOConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.dpo(chosen, rejected, self.config.beta, self.config.label_smoothing)


class CPOConfig(DPOConfig):
    """Settings of CPO."""

    reference: NoReferenceConfig = reference_field(NoReferenceConfig)
    nll_weight: float = nll_field(1.0)
    nll_per_token: bool = nll_per_token_field(False)


class CPO(DPO):
    """Contrastive preference optimisation: DPO without a reference, with the chosen response's likelihood (Xu et al. 2024)."""

    Config = CPOConfig


class RPOConfig(DPOConfig):
    """Settings of regularised preference optimisation."""

    nll_weight: float = nll_field(0.005)
    nll_per_token: bool = nll_per_token_field(False)


class RPO(DPO):
    """DPO and the chosen response's likelihood (Liu et al. 2024; per token with weight 1: iterative RPO, Pang et al. 2024)."""

    Config = RPOConfig


class WPOConfig(DPOConfig):
    """Settings of weighted preference optimisation."""

    weighting: Literal["none", "wpo"] = Field("wpo", description="wpo: a pair counts as much as the policy itself would sample it")


class WPO(DPO):
    """DPO whose pairs count as if the policy had sampled them."""

    Config = WPOConfig


class LDDPOConfig(DPOConfig):
    """Settings of length-desensitised DPO."""

    log_ratio: LogRatio = log_ratio_field("desensitised")


class LDDPO(DPO):
    """DPO in which what a response is longer than the other counts less."""

    Config = LDDPOConfig


class MeanDPOConfig(DPOConfig):
    """Settings of length-normalised DPO."""

    log_ratio: LogRatio = log_ratio_field("mean")
    beta: float = beta_field(2.0)


class MeanDPO(DPO):
    """DPO on log-ratios per token."""

    Config = MeanDPOConfig


class TRDPOConfig(DPOConfig):
    """Settings of trust-region DPO."""

    reference: MovingReferenceConfig = reference_field(MovingReferenceConfig)


class TRDPO(DPO):
    """DPO whose reference follows the policy (Gorbatovski et al. 2024): synced is its hard update, ema its soft one."""

    Config = TRDPOConfig


class RobustConfig(BetaConfig):
    """Settings of robust DPO."""

    label_smoothing: float = smoothing_field(0.1)


class Robust(PairLoss):
    """DPO, made unbiased for labels flipped at a known rate."""

    Config = RobustConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.robust_dpo(chosen, rejected, self.config.beta, self.config.label_smoothing)


class IPOConfig(PairConfig):
    """Settings of IPO."""

    tau: float = Field(0.1, gt=0, description="strength of the penalty: the log-ratio margin is drawn to 1 / (2 tau)")

    @property
    def scale(self) -> float:
        return self.tau


class IPO(PairLoss):
    """Identity preference optimisation, on sums over tokens as in the paper."""

    Config: type[Config] = IPOConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.ipo(chosen, rejected, self.config.tau)


class MeanIPOConfig(IPOConfig):
    """Settings of IPO per token."""

    log_ratio: LogRatio = log_ratio_field("mean")


class MeanIPO(IPO):
    """IPO on means per token, as several libraries have it: another loss with another tau."""

    Config = MeanIPOConfig


class HingeConfig(BetaConfig):
    """Settings of the hinge loss."""


class Hinge(PairLoss):
    """SLiC's hinge on the margin."""

    Config = HingeConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.hinge(chosen, rejected, self.config.beta)


class BCOPairConfig(BetaConfig):
    """Settings of BCO on pairs."""


class BCOPair(PairLoss):
    """Binary classifier optimisation on both responses of a pair, with the baseline at 0."""

    Config = BCOPairConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.bco_pair(chosen, rejected, self.config.beta)


class ORPOConfig(PairConfig):
    """Settings of ORPO."""

    reference: NoReferenceConfig = reference_field(NoReferenceConfig)
    log_ratio: LogRatio = log_ratio_field("mean")
    nll_weight: float = nll_field(1.0)
    weight: float = Field(0.1, gt=0, description="lambda: weight of the odds ratio beside the likelihood")

    @property
    def scale(self) -> float:
        return self.weight

    @model_validator(mode="after")
    def _probabilities(self) -> ORPOConfig:
        if self.reference.role != "none":
            raise ValueError("reference.role must be none: odds are those of the policy's own probabilities")
        return self


class ORPO(PairLoss):
    """Odds-ratio preference optimisation: fine-tuning on the chosen response, and a push against the rejected one."""

    Config = ORPOConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        weight: float = self.config.weight
        return weight * losses.odds_ratio(chosen, rejected)


class SimPOConfig(BetaConfig):
    """Settings of SimPO."""

    reference: NoReferenceConfig = reference_field(NoReferenceConfig)
    log_ratio: LogRatio = log_ratio_field("mean")
    beta: float = beta_field(2.0)
    gamma: float = Field(1.0, ge=0, description="the margin, after beta, by which the chosen response shall lead")


class SimPO(PairLoss):
    """Simple preference optimisation: mean log-probabilities with a margin, no reference."""

    Config = SimPOConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.simpo(chosen, rejected, self.config.beta, self.config.gamma)


class EXOConfig(BetaConfig):
    """Settings of EXO."""

    label_smoothing: float = Field(1e-3, gt=0, lt=0.5, description="probability the label gives to the rejected response; above 0")


class EXO(PairLoss):
    """Efficient exact optimisation: reverse KL from the policy's choice to the label."""

    Config = EXOConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.exo_pair(chosen, rejected, self.config.beta, self.config.label_smoothing)


class NCAConfig(BetaConfig):
    """Settings of NCA."""


class NCA(PairLoss):
    """Noise contrastive alignment: keeps the chosen response's own probability from falling."""

    Config = NCAConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.nca_pair(chosen, rejected, self.config.beta)


class APOConfig(BetaConfig):
    """Settings of anchored preference optimisation."""


class APOZero(PairLoss):
    """Anchored preference optimisation, chosen up and rejected down: for data better than the policy."""

    Config = APOConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.apo_zero(chosen, rejected, self.config.beta)


class APODown(PairLoss):
    """Anchored preference optimisation, both down and the rejected further: for data worse than the policy."""

    Config = APOConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.apo_down(chosen, rejected, self.config.beta)


class DiscoPOPConfig(BetaConfig):
    """Settings of DiscoPOP."""

    beta: float = beta_field(0.05)
    tau: float = Field(0.05, gt=0, description="width of the passage from the logistic to the exponential loss")


class DiscoPOP(PairLoss):
    """The loss found by search: logistic below margin 0, exponential above. With a small tau its slope at margin 0 is upward."""

    Config = DiscoPOPConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.discopop(chosen, rejected, self.config.beta, self.config.tau)


class SPPOConfig(BetaConfig):
    """Settings of SPPO."""

    beta: float = beta_field(1e-3)


class SPPO(PairLoss):
    """Self-play preference optimisation with hard labels: log-ratios towards +-1 / (2 beta)."""

    Config = SPPOConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.sppo_hard(chosen, rejected, self.config.beta)


class FDPOConfig(BetaConfig):
    """Settings of f-DPO."""

    divergence: losses.Divergence = Field("jensen_shannon", description="the penalty D_f(pi || pi_ref); reverse_kl is DPO")
    alpha: float = Field(0.5, gt=0, lt=1, description="alpha: between reverse KL (0) and forward KL (1)")


class FDPO(PairLoss):
    """DPO for another divergence than reverse KL."""

    Config = FDPOConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.f_dpo(chosen, rejected, self.config.beta, self.config.divergence, self.config.alpha)


class RankingConfig(PreferenceLossConfig):
    """Settings of the Plackett-Luce loss."""

    beta: float = beta_field(0.1)
    log_ratio: Literal["sum", "mean"] = Field("sum", description="h of a response: sum over its tokens, or mean per token")

    @property
    def scale(self) -> float:
        return self.beta


class PlackettLuce(PairLoss):
    """DPO for whole rankings: the probability of choosing the best, then the best of the rest, and so on."""

    Config = RankingConfig

    def preference(self, logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
        h = self.log_ratios(logprobs, batch)
        return losses.plackett_luce(h, batch.responses["judgement"], batch.group_of_response, self.config.beta).sum() / counts.groups


class OrderStatistics(PreferenceLoss):
    """A loss that sorts the whole minibatch. `prepare` takes its value L and its slopes g_i = dL / dh_i before the update;

    a micro-batch's loss is then its share of L + sum_i g_i (h_i - h_i without gradient): the same value, the same gradient.
    """

    needs_own = True

    def of_minibatch(self, h: Tensor, batch: Batch) -> Tensor:
        """The loss of a whole minibatch, from h of its responses."""
        raise NotImplementedError

    def prepare(self, batch: Batch, mismatched: Batch | None = None, *, training: bool = True) -> Batch:
        batch = super().prepare(batch, mismatched, training=training)
        with torch.enable_grad():
            h = self.log_ratios(batch.tokens["logprobs_now"], batch).detach().requires_grad_()
            value = self.of_minibatch(h, batch)
            (slope,) = torch.autograd.grad(value, h)
        share = torch.full_like(slope, float(value.detach()) / len(slope))
        return batch.with_responses(**{f"{self.name}_slope": slope, f"{self.name}_value": share})

    def preference(self, logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
        h = self.log_ratios(logprobs, batch)
        slope, share = batch.responses[f"{self.name}_slope"], batch.responses[f"{self.name}_value"]
        return share.sum() + (slope * (h - h.detach())).sum()


class AOTConfig(PreferenceLossConfig):
    """Settings of AOT on pairs."""

    beta: float = beta_field(0.1)
    log_ratio: Literal["sum", "mean"] = Field("sum", description="h of a response: sum over its tokens, or mean per token")
    label_smoothing: float = smoothing_field()

    @property
    def scale(self) -> float:
        return self.beta


class AOT(OrderStatistics, PairLoss):
    """Alignment by optimal transport: the policy's margins above the reference's margins, as distributions."""

    Config = AOTConfig

    def of_minibatch(self, h: Tensor, batch: Batch) -> Tensor:
        better, worse = batch.pairs()
        against = torch.zeros_like(h)
        if self.reference.role != "none":
            against = self.over_tokens(batch.tokens["logprobs_ref"].double() * batch.mask, batch)
        own = h + against
        upper, lower = (x[better] - x[worse] for x in (own, against))
        return losses.aot(upper, lower, self.config.beta, self.config.label_smoothing).mean()


class UnpairedAOTConfig(LabelConfig):
    """Settings of AOT on labelled responses."""

    label_smoothing: float = smoothing_field()


class UnpairedAOT(OrderStatistics, LabelLoss):
    """Alignment by optimal transport: log-ratios of desirable responses above those of undesirable ones, as distributions."""

    Config = UnpairedAOTConfig

    def of_minibatch(self, h: Tensor, batch: Batch) -> Tensor:
        label = batch.responses["desirable"]
        good, bad = h[label == 1], h[label == 0]
        if not len(good) or not len(bad):
            return 0 * h.sum()  # a minibatch of one kind has nothing to compare
        return losses.aot(good, bad, self.config.beta, self.config.label_smoothing).mean()

    def find_baseline(self, batch: Batch, mismatched: Batch | None, *, training: bool) -> float:
        """Half-way between the means of the two kinds; it serves the metrics only."""
        h, label = self.log_ratios(batch.tokens["logprobs_now"], batch), batch.responses["desirable"]
        means = [float(h[label == kind].mean()) for kind in (0, 1) if bool((label == kind).any())]
        return sum(means) / len(means) if means else 0.0


class KTOConfig(LabelConfig):
    """Settings of KTO."""

    desirable_weight: float = Field(1.0, gt=0, description="weight of desirable responses; balance it with how many there are")
    undesirable_weight: float = Field(1.0, gt=0, description="weight of undesirable responses")


class KTO(LabelLoss):
    """Kahneman-Tversky optimisation: gains and losses against z, the KL estimated on mismatched prompts and responses."""

    Config = KTOConfig
    needs_mismatched = True

    def terms(self, h: Tensor, desirable: Tensor, baseline: Tensor) -> Tensor:
        config = self.config
        return losses.kto(h, desirable, baseline, config.beta, config.desirable_weight, config.undesirable_weight)

    def find_baseline(self, batch: Batch, mismatched: Batch | None, *, training: bool) -> float:
        """z = max(0, mean h of the mismatched responses)."""
        assert mismatched is not None
        return max(0.0, float(self.log_ratios(mismatched.tokens["logprobs_now"], mismatched).mean()))


class BCO(LabelLoss):
    """Binary classifier optimisation: a logistic classifier of responses with delta, the running mean of rewards, as threshold."""

    Config = LabelConfig
    needs_own = True

    def __init__(self, config: Any, name: str) -> None:
        super().__init__(config, name)
        self.mean, self.count = 0.0, 0

    def terms(self, h: Tensor, desirable: Tensor, baseline: Tensor) -> Tensor:
        return losses.bco(h, desirable, self.config.beta * baseline, self.config.beta)

    def find_baseline(self, batch: Batch, mismatched: Batch | None, *, training: bool) -> float:
        """The mean of h over all labelled responses seen so far, those of this minibatch among them."""
        if training:
            h = self.log_ratios(batch.tokens["logprobs_now"], batch)[batch.responses["desirable"] != 0.5]
            self.count += len(h)
            self.mean += float((h - self.mean).sum()) / max(1, self.count)
        return self.mean

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.count = float(state["mean"]), int(state["count"])


class NLLConfig(LabelConfig):
    """Settings of the likelihood in a mixture."""

    reference: NoReferenceConfig = reference_field(NoReferenceConfig)


class NLL(LabelLoss):
    """Negative log-likelihood of the desirable responses: fine-tuning, as a member of a mixture."""

    Config = NLLConfig

    def preference(self, logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
        return self.nll(logprobs, batch, counts)

    def find_baseline(self, batch: Batch, mismatched: Batch | None, *, training: bool) -> float:
        return 0.0


class MixtureConfig(Config):
    """Settings of a weighted sum of losses. The default is MPO's (Wang et al. 2024)."""

    members: dict[str, float] = Field(
        default_factory=lambda: {"dpo": 0.8, "bco_pair": 0.2, "nll": 1.0},
        description="weight of each loss; nll is the likelihood of the chosen response; metrics are those of the first other loss",
    )
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="settings of the members, for example {dpo: {beta: 0.2}}; the others have their defaults"
    )
    reference: ReferenceConfig = reference_field(ReferenceConfig)

    @field_validator("members")
    @classmethod
    def _known(cls, members: dict[str, float]) -> dict[str, float]:
        known = [*(name for name in PREFERENCES if name != "mixture"), "nll"]
        unknown = [name for name in members if name not in known]
        if unknown or not members or any(weight <= 0 for weight in members.values()):
            what = f"names the unknown loss {unknown[0]!r}" if unknown else "needs at least one loss, with weights above 0"
            raise ValueError(f"{what}; losses are {', '.join(known)}")
        return members

    @model_validator(mode="after")
    def _settings_of_members(self) -> MixtureConfig:
        stray = sorted(self.settings.keys() - self.members.keys())
        if stray:
            raise ValueError(f"settings are given for {stray[0]!r}, which is no member")
        return self


class Mixture(PreferenceLoss):
    """A weighted sum of preference losses on the same data."""

    Config = MixtureConfig

    def __init__(self, config: MixtureConfig, name: str) -> None:
        super().__init__(config, name)
        self.members = {member: _member(member, config) for member in config.members}
        self.lead = next((member for member in self.members if member != "nll"), "nll")
        self.data = "pairs" if any(m.data == "pairs" for m in self.members.values()) else "labels"
        self.needs_own = any(m.needs_own for m in self.members.values())
        self.needs_mismatched = any(m.needs_mismatched for m in self.members.values())
        if all(m.reference.role == "none" for m in self.members.values()):
            self.reference = ReferenceConfig(role="none")

    def prepare(self, batch: Batch, mismatched: Batch | None = None, *, training: bool = True) -> Batch:
        for member in self.members.values():
            batch = member.prepare(batch, mismatched, training=training)
        return batch

    def loss(self, outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        parts = {name: member.loss(outputs, batch, counts) for name, member in self.members.items()}
        value = torch.stack([self.config.members[name] * part.value for name, part in parts.items()]).sum()
        means = {key: x for part in parts.values() for key, x in part.means.items() if key.startswith("loss/")}
        return Loss(value, {**means, **parts[self.lead].means, f"loss/{self.name}": value})

    def correct(self, logprobs: Tensor, batch: Batch) -> Tensor:
        return self.members[self.lead].correct(logprobs, batch)

    def state_dict(self) -> dict[str, Any]:
        return {name: member.state_dict() for name, member in self.members.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, member in self.members.items():
            member.load_state_dict(state[name])


def _member(name: str, mixture: MixtureConfig) -> PreferenceLoss:
    """A member with its own settings; what follows the reference follows that of the mixture."""
    kind = NLL if name == "nll" else PREFERENCES[name].load()
    config = validate(kind.Config, mixture.settings.get(name, {}), source=f"algorithm.settings.{name}")
    if config.reference.role in ("synced", "ema"):
        raise ConfigError(
            f"{name} moves the reference", where="algorithm.members", fix="take dpo instead, and set algorithm.reference of the mixture"
        )
    if config.reference.role == "frozen":
        config = config.model_copy(update={"reference": mixture.reference})
    member: PreferenceLoss = kind(config, name)
    return member
