"""TRL 1.16 as a user runs it: its trainers, their own `train()` loop. Only the command line of settings is ours.

A setting is {micro, allocator, checkpointing, sorted, weights, layout, cache}; see works.py.
"""

from __future__ import annotations

import tempfile
import traceback
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import (  # type: ignore[import-not-found]
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from bench.data import Row, as_text, in_steps, read_rows
from bench.link import Channel, resident
from bench.rewards import sevens_of_each
from bench.turns import Over, Turns
from bench.works import Setting, Work

LEARNING_RATE = 1e-6


def trainer_of(work: Work, setting: Setting, model: str, rows: list[Row], callback: Turns, output: str) -> Any:
    """The trainer of a work under a setting, on as many steps as there are rows for."""
    steps = in_steps(rows, work.rows)
    if setting.get("sorted"):
        steps = [sorted(step, key=lambda row: len(row["prompt"]) + max(map(len, row["responses"]))) for step in steps]
    ordered = [row for step in steps for row in step]
    samples = work.rows * (work.responses if work.generates else 1)
    common: dict[str, Any] = {
        "output_dir": output,
        "per_device_train_batch_size": setting["micro"],
        "gradient_accumulation_steps": samples // setting["micro"],
        "gradient_checkpointing": setting["checkpointing"],
        "learning_rate": LEARNING_RATE,
        "max_steps": len(steps),
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": not torch.cuda.is_available(),
        "model_init_kwargs": {"dtype": setting["weights"]},
    }
    tokenizer = AutoTokenizer.from_pretrained(model)
    shared: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [callback]}
    if work.generates:
        common |= {"num_generations": work.responses, "max_completion_length": work.new, "shuffle_dataset": False}
        common |= {"cache_implementation": setting.get("cache")}
        prompts = Dataset.from_list([{"prompt": as_text(row["prompt"])} for row in ordered])
        kinds = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
        trainer, config = kinds[work.kind]
        return trainer(model, reward_funcs=sevens_of_each, args=config(**common), train_dataset=prompts, **shared)
    common |= {"train_sampling_strategy": "sequential"}
    if work.kind == "sft":
        data = Dataset.from_list([{"prompt": as_text(r["prompt"]), "completion": " " + as_text(r["responses"][0])} for r in ordered])
        config = SFTConfig(**common, padding_free=setting.get("layout") == "padding_free")
        return SFTTrainer(model, args=config, train_dataset=data, **shared)
    pairs = Dataset.from_list(
        [
            {"prompt": as_text(r["prompt"]), "chosen": " " + as_text(r["responses"][0]), "rejected": " " + as_text(r["responses"][1])}
            for r in ordered
        ]
    )
    if work.kind == "reward":
        config = RewardConfig(**common, center_rewards_coefficient=0.01)
        return RewardTrainer(model, args=config, train_dataset=pairs, **shared)
    config = DPOConfig(**common, precompute_ref_log_probs=not work.reference)
    return DPOTrainer(model, args=config, train_dataset=pairs, **shared)


def main() -> None:
    channel = Channel()
    request = channel.receive()
    assert request is not None
    try:
        work = Work(**request["work"])
        bare = resident()
        rows = read_rows(request["rows"])
        with tempfile.TemporaryDirectory(prefix="bench-trl-") as output:
            trainer = trainer_of(work, request["setting"], request["model"], rows, Turns(channel), output)
            channel.reply(bare_bytes=bare, loaded_bytes=resident())
            trainer.train()
    except Over:
        return
    except Exception:
        channel.reply(error=traceback.format_exc())


if __name__ == "__main__":
    main()
