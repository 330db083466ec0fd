"""Losses on pairs of responses, each a term of (h_chosen, h_rejected). What they minimise is said in `maths.preference_losses`; here are
their settings. Many are the same loss under other settings; such a class only changes defaults.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from trimtab.algorithms.preferences.base import (
    LogRatio,
    MovingReferenceConfig,
    NoReferenceConfig,
    PairConfig,
    PairLoss,
    beta_field,
    log_ratio_field,
    nll_field,
    nll_per_token_field,
    reference_field,
    smoothing_field,
)
from trimtab.config import Config
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


class Hinge(PairLoss):
    """SLiC's hinge on the margin."""

    Config = BetaConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.hinge(chosen, rejected, self.config.beta)


class BCOPair(PairLoss):
    """Binary classifier optimisation on both responses of a pair, with the baseline at 0."""

    Config = BetaConfig

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


class NCA(PairLoss):
    """Noise contrastive alignment: keeps the chosen response's own probability from falling."""

    Config = BetaConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.nca_pair(chosen, rejected, self.config.beta)


class APOZero(PairLoss):
    """Anchored preference optimisation, chosen up and rejected down: for data better than the policy."""

    Config = BetaConfig

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.apo_zero(chosen, rejected, self.config.beta)


class APODown(PairLoss):
    """Anchored preference optimisation, both down and the rejected further: for data worse than the policy."""

    Config = BetaConfig

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
