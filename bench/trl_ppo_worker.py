"""PPO of TRL 1.12, the last version that has it: policy, reference, reward model and value model, and its own `train()` loop.

A setting is {micro, allocator, frozen, weights}. frozen: precision of reference and reward model, which nothing casts.
"""

from __future__ import annotations

import tempfile
import traceback
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

from bench.data import Row, read_rows
from bench.link import Channel, resident
from bench.turns import Over, Turns
from bench.works import Setting, Work


def trainer_of(work: Work, setting: Setting, model: str, scorer: str, rows: list[Row], callback: Turns, output: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    weights, frozen = getattr(torch, setting["weights"]), getattr(torch, setting["frozen"])
    config = PPOConfig(
        output_dir=output,
        per_device_train_batch_size=setting["micro"],
        gradient_accumulation_steps=work.rows // setting["micro"],
        learning_rate=1e-6,
        total_episodes=len(rows),
        num_ppo_epochs=1,
        num_mini_batches=1,
        num_sample_generations=0,
        response_length=work.new,
        temperature=1.0,
        kl_coef=0.05,
        stop_token="eos",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=weights)
    data = Dataset.from_list([{"input_ids": row["prompt"]} for row in rows])
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(model, dtype=frozen),
        reward_model=AutoModelForSequenceClassification.from_pretrained(scorer, num_labels=1, dtype=frozen),
        value_model=AutoModelForSequenceClassification.from_pretrained(scorer, num_labels=1, dtype=weights),
        train_dataset=data,
        eval_dataset=data.select(range(work.rows)),
        callbacks=[callback],
    )


def main() -> None:
    channel = Channel()
    request = channel.receive()
    assert request is not None
    try:
        work = Work(**request["work"])
        bare = resident()
        rows = read_rows(request["rows"])
        with tempfile.TemporaryDirectory(prefix="bench-trl-") as output:
            trainer = trainer_of(work, request["setting"], request["model"], request["scorer"], rows, Turns(channel), output)
            channel.reply(bare_bytes=bare, loaded_bytes=resident())
            trainer.train()
    except Over:
        return
    except Exception:
        channel.reply(error=traceback.format_exc())


if __name__ == "__main__":
    main()
