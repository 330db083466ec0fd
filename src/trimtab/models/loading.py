"""Loading and saving any Hugging Face decoder-only model, whole or with a LoRA adapter, ready for packed batches."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from trimtab.config import Config
from trimtab.data.templates import Mode, Template
from trimtab.errors import ConfigError, ModelError
from trimtab.models import packed
from trimtab.models.allocator import keep_freed_memory
from trimtab.models.fused import take_kernels

log = logging.getLogger(__name__)

DEFAULT = "default"
"""The model path that means the embedded default model."""

LAST_MODEL = Path("checkpoints", "last", "model")
"""Where a run directory keeps the model it has trained."""

NOTE_FILE = "trimtab.json"
"""What transformers has no place for: the template mode a model was trained with."""


class LoraConfig(Config):
    """Train a low-rank adapter instead of all weights: W + (alpha / rank) B A, with B zero at the start."""

    rank: int = Field(16, gt=0, description="rank of the update")
    alpha: float = Field(32.0, gt=0, description="scale: the update is multiplied by alpha / rank")
    target_modules: str | list[str] = Field("all-linear", description="which linear layers get an adapter; the output head never does")


class ModelConfig(Config):
    """Which model, in which precision, and what of it is trained."""

    path: str = Field(DEFAULT, description="folder or hub name of a causal language model; 'default' is SmolLM2-135M-Instruct")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto", description="compute precision; auto is bfloat16 where the hardware is fast at it. Master weights are float32 regardless"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    layers: int | None = Field(None, gt=0, description="keep only the first layers (a smaller reward model or critic); null keeps all")
    lora: LoraConfig | None = Field(None, description="train a LoRA adapter (null: train all weights)")
    checkpointing: bool = Field(
        False,
        description="keep only the input of every layer for the backward pass and compute the rest again there: memory hardly grows with "
        "depth, for a third more work; results are the same bit for bit",
    )


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a setting; "auto" asks the hardware."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16
    capability = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if capability.startswith("AVX512") and ("avx512_bf16" in flags or "amx_bf16" in flags) else torch.float32


def resolve_device(name: str) -> torch.device:
    """The torch device of a setting; "auto" takes the first GPU there is."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"there is no device {name!r}", where="model.device", fix="use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this machine has no usable GPU", where="model.device", fix="set model.device=cpu")
    return device


def resolve_path(path: str) -> str:
    """The folder (or hub name) of a model setting: "default", a model folder, or a run directory (its last checkpoint)."""
    if path == DEFAULT:
        from trimtab.models.default import default_model

        return str(default_model())
    folder = Path(path)
    if (folder / LAST_MODEL).is_dir():
        return str(folder / LAST_MODEL)
    looks_local = folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1
    if not looks_local:
        return path
    if not folder.is_dir():
        raise ModelError(
            "there is no such model folder", where=path, fix="check the path; a run directory will do, its last model is taken"
        )
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise ModelError("this folder holds no config.json or adapter_config.json", where=path, fix="name the folder of a saved model")
    return path


def base_of(path: str) -> str:
    """The model that an adapter's folder belongs to; any other path is its own base."""
    adapter = Path(path, "adapter_config.json")
    return json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else path


def load_template(path: str, mode: Mode, extra_eos: tuple[int, ...] = ()) -> Template:
    """The tokenizer saved with a model, and how text is put to it; "auto" first asks how the model was trained here."""
    from transformers import AutoTokenizer

    tokenizer = _guarded(path, "tokenizer", lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    note = Path(path, NOTE_FILE)
    if mode == "auto" and note.exists():
        mode = json.loads(note.read_text(encoding="utf-8"))["template"]
    return Template.of(tokenizer, mode, extra_eos)


def save_template(template: Template, folder: Path) -> None:
    """Save the tokenizer, and note the template mode beside it."""
    template.tokenizer.save_pretrained(folder)
    (folder / NOTE_FILE).write_text(json.dumps({"template": template.mode}) + "\n", encoding="utf-8")


def load_model(auto_class: Any, config: ModelConfig, **options: Any) -> Any:
    """A transformers model of `auto_class` whose attention is packed and whose dropout is off.

    An adapter folder is loaded on its base model and merged into it. Raises ModelError with the fix.
    """
    packed.register()
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    path = resolve_path(config.path)
    adapter, base = Path(path, "adapter_config.json"), base_of(path)
    model = _guarded(
        base,
        "model",
        lambda: auto_class.from_pretrained(
            base,
            dtype=resolve_dtype(config.dtype, device),
            attn_implementation=packed.ATTENTION,
            trust_remote_code=False,
            use_safetensors=True,
            config=architecture(base, config.layers, options),
        ),
    )
    if adapter.exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    _switch_off_dropout(model)
    model = model.to(device).eval()
    take_kernels(model)
    if config.checkpointing:
        checkpoint_layers(model)
    return model


def checkpoint_layers(model: Any) -> None:
    """From now on every layer's activations are computed again in the backward pass instead of being kept."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no layers that can be checkpointed", where="model.checkpointing", fix="set it to false"
        )
    for layer in layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, _checkpointed
        layer.training = True  # of the layer alone, which transformers asks; what is in it stays in eval mode


def _checkpointed(layer: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return layer(*inputs)
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing in a layer is random


def add_adapter(model: nn.Module, config: LoraConfig, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> Any:
    """Wrap a model with a trainable LoRA adapter (float32, whatever the model's precision). Its random start is always the same."""
    import peft

    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.target_modules,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            wrapped = peft.get_peft_model(model, lora)
    except ValueError as error:
        raise ModelError(f"the adapter does not fit the model: {error}", where="model.lora.target_modules", fix="use all-linear") from None
    if isinstance(lora.target_modules, set):  # in every process in another order, and so would be what is saved
        lora.target_modules = sorted(lora.target_modules)
    return wrapped


def unwrap(model: Any) -> Any:
    """The transformers model inside a peft wrapper (or the model itself)."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


@contextmanager
def plain_attention(model: Any) -> Iterator[Any]:
    """The same model with transformers' own attention, for comparison."""
    model.set_attn_implementation("eager")
    try:
        yield model
    finally:
        model.set_attn_implementation(packed.ATTENTION)


def architecture(path: str, layers: int | None, options: dict[str, Any]) -> Any:
    """The model's configuration, with only its first layers if that is asked for."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
    if layers is not None:
        depth = config.get_text_config().num_hidden_layers
        if layers > depth:
            raise ConfigError(f"the model has {depth} layers, not {layers}", where="model.layers", fix=f"set at most {depth}, or null")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def _switch_off_dropout(model: nn.Module) -> None:
    """Log-probabilities must be those of the policy that samples, so nothing is dropped, in whatever mode the model is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _guarded(path: str, what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load the {what}: {reason}", where=path, fix="name a folder in Hugging Face layout with safetensors weights"
        ) from error
