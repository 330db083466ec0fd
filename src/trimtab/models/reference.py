"""The reference policy: the anchor of the KL penalty, which never receives a gradient."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.batch import Batch, Outputs
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig


def make_reference(policy: LanguageModel, config: ModelConfig) -> Callable[..., Outputs]:
    """The policy as it starts: with LoRA the same model with its adapter off (no memory), else a frozen copy."""
    if config.lora is not None:

        def adapter_off(batch: Batch, *, temperature: float = 1.0) -> Outputs:
            with policy.without_adapter():
                return policy.forward(batch, temperature=temperature)

        return adapter_off
    return LanguageModel.load(config, trainable=False).forward
