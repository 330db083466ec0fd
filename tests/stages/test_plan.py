"""A plan counts parameters exactly, grows with what costs memory, and refuses what cannot fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import resuming
import tiny
from trimtab.cli import main
from trimtab.cli.commands import config_of
from trimtab.config import load_recipe
from trimtab.models.language import LanguageModel
from trimtab.models.loading import LoraConfig, ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.runs.directory import RunDirectory
from trimtab.stages import plan as planning
from trimtab.stages.plan import Plan, activation_bytes, cache_bytes, count, plan, sizes_of
from trimtab.training.clock import Clock
from trimtab.training.optimiser import OptimConfig, Optimiser


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    resuming.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(kind: str, *more: str) -> Any:
    name, *words = resuming.command(kind, "run", *more)
    return load_recipe(config_of(name), None, words)


def sizes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
@pytest.mark.parametrize("scorer", [False, True])
def test_parameters_and_what_is_held_for_them_are_exact(dtype: Any, lora: LoraConfig | None, scorer: bool, place: Path) -> None:
    config = ModelConfig(path="model", dtype=dtype, lora=lora)
    loaded = Scorer.load(config, head="zero") if scorer else LanguageModel.load(config)
    if scorer:
        loaded.head.to(count(config).bytes and getattr(torch, dtype))  # the head's own float32 is a few hundred bytes
    said, optimiser = count(config, scorer=scorer), Optimiser(loaded.trainable(), OptimConfig(), 1)
    assert said.total == sum(p.numel() for p in loaded.model.parameters())
    assert said.trained == sum(p.numel() for p in optimiser.parameters.values())
    beside = [*optimiser.copies.values(), *(half.lower for half in optimiser.halves.values())]
    if not scorer:
        assert said.bytes == sizes(loaded.model.parameters())
        assert said.masters == sizes(beside)
        assert said.gradients == sizes(optimiser.sums.get(name, parameter) for name, parameter in optimiser.parameters.items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_activations_carry_on_in_a_straight_line(architecture: str, place: Path) -> None:
    """Against what a deeper model keeps of a longer micro-batch."""
    deep = {"n_layer": 5} if architecture == "gpt2" else {"num_hidden_layers": 5}
    longer = {"n_positions": 1024} if architecture == "gpt2" else {"max_position_embeddings": 1024}
    tiny.folder(place / "deep", architecture, **deep, **longer)
    config = ModelConfig(path="deep", dtype="float32")
    measured = planning._kept(config, 5, 400, scorer=False)
    assert activation_bytes(config, 400) == pytest.approx(measured, rel=0.15)


def test_what_costs_memory_makes_the_plan_larger(place: Path) -> None:
    def of(kind: str, *more: str) -> Plan:
        return plan(recipe(kind, *more), probe=False)

    plain, model = of("grpo"), ModelConfig(path="model", dtype="float32")
    assert of("grpo", "micro_batch_tokens=200").memory["activations"] > plain.memory["activations"]
    assert of("grpo", "engine.rows=1").memory["KV cache"] < plain.memory["KV cache"]
    assert of("grpo", "sampling.max_tokens=60").memory["KV cache"] > plain.memory["KV cache"]
    assert of("grpo", "model.lora={rank: 2}").memory["optimiser"] < plain.memory["optimiser"]
    assert of("grpo", "reference.role=none", "algorithm.kl.beta=0").memory["other models"] == 0
    assert of("ppo, critic of its own").memory["other models"] > of("ppo").memory["other models"]
    assert of("dpo, reference moving").memory["other models"] > of("dpo").memory["other models"]
    tiny.folder(place / "deep", num_hidden_layers=6)
    deep = ModelConfig(path="deep", dtype="float32")
    assert activation_bytes(deep.model_copy(update={"checkpointing": True}), 200) < activation_bytes(deep, 200)
    assert cache_bytes(deep, sizes_of(recipe("grpo"))) == 3 * cache_bytes(model, sizes_of(recipe("grpo")))


def test_what_cannot_fit_is_refused_with_the_settings_to_change(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "resident", lambda: 0)
    monkeypatch.setattr(planning, "available", lambda device: 200_000)
    assert main(["plan", *resuming.command("sft", "run")]) == 2
    said = capsys.readouterr().err
    assert "the run needs" in said
    assert "micro_batch_tokens" in said or "model.lora" in said
    assert not (place / "run").exists()


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "grpo"])
def test_the_table_says_all_of_it(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *resuming.command(kind, "run")]) == 0
    said = capsys.readouterr().out
    parts = ["parameters", "weights", "gradients", "optimiser", "activations", "peak", "a step"]
    assert all(part in said for part in [*parts, *(["KV cache", "generate, a step"] if kind == "grpo" else [])])


def test_there_is_no_plan_for_what_trains_nothing(place: Path) -> None:
    assert main(["plan", "merge", "model=model", "output=merged"]) == 2


def test_what_works_beside_the_activations_is_counted(place: Path) -> None:
    def of(kind: str, *more: str) -> int:
        return plan(recipe(kind, *more), probe=False).memory["activations"]

    config = ModelConfig(path="model", dtype="float32", lora=LoraConfig(rank=2))
    widths = [m.out_features for m in LanguageModel.load(config).plain.modules() if isinstance(m, torch.nn.Linear) and hasattr(m, "weight")]
    assert 0 < planning.adapter_bytes(config, 10) <= 40 * sum(widths)
    assert planning.adapter_bytes(config.model_copy(update={"checkpointing": True}), 10) == planning.adapter_bytes(config, 10) // 2
    assert planning.adapter_bytes(config.model_copy(update={"lora": None}), 10) == 0
    assert of("sft with an adapter") > of("sft")
    assert of("ppo, critic of its own") > of("ppo")


def test_a_critic_of_its_own_takes_time_for_every_update_of_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Still(Clock):
        """A second for everything, whatever the machine does."""

        def __init__(self) -> None:
            self.parts = {f"time/{part}": 1.0 for part in ("forward", "backward", "optimiser")}

        def __call__(self, part: str) -> Any:
            return nullcontext()

    monkeypatch.setattr(planning, "Clock", Still)
    shared, own, more = (
        planning.seconds_of(asked, sizes_of(asked))
        for asked in (recipe("ppo"), recipe("ppo", "critic.trunk=own"), recipe("ppo", "critic.trunk=own", "critic.updates=3"))
    )
    for part in ("forward", "backward", "optimiser"):
        assert [own[part], more[part]] == [pytest.approx(2 * shared[part]), pytest.approx(4 * shared[part])]


SUPERVISED = ("fit.batch_size=8", "fit.micro_batch_tokens=700", "data.holdout=0", "fit.eval_every=null")
ROLLOUT = ("micro_batch_tokens=700", "sampling.max_tokens=64", "prompts_per_step=4", "responses_per_prompt=4", "samples_every=100")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["sft", "sft with an adapter", "reward", "dpo", "grpo", "ppo, critic of its own"])
def test_peak_and_step_time_are_what_a_run_really_takes(kind: str, place: Path) -> None:
    """Memory within 15 %, time within 30 %, of a run in a process of its own.

    Two plans, before the run and after it, tell whether the machine has kept its speed; if not, all three are repeated.
    """
    small = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    tiny.folder(place / "model", scale=1.0, **small)
    rows = {
        "sft": {"completion": "say " * 40},
        "pairs": {"chosen": "yes " * 40, "rejected": "no " * 40},
    }
    for name, row in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"{i} ", **row}) + "\n" for i in range(64)))
    more = ROLLOUT if kind.startswith(("grpo", "ppo")) else SUPERVISED
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ask = (
        "import sys, json; from trimtab.cli.commands import config_of; from trimtab.config import load_recipe; "
        "from trimtab.stages.plan import plan; "
        "made = plan(load_recipe(config_of(sys.argv[1]), None, sys.argv[2:])); print(json.dumps([made.peak, sum(made.seconds.values())]))"
    )
    code = "import sys; from trimtab.cli import main; main(sys.argv[1:]); print([l for l in open('/proc/self/status') if 'VmHWM' in l][0])"

    def python(code: str, words: list[str]) -> str:
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, env=environment).stdout

    for attempt in range(4):
        words = resuming.command(kind, f"run{attempt}", *more, "model.device=cpu")
        said, before = json.loads(python(ask, words).splitlines()[-1])
        peak = 1024 * int(python(code, words).rsplit("VmHWM:", 1)[1].split()[0])
        _, after = json.loads(python(ask, words).splitlines()[-1])
        steps = sorted(row["time/step"] for row in RunDirectory.open(place / f"run{attempt}").metrics()[1:])
        took = steps[len(steps) // 2]
        print(f"{kind}: peak {said / 2**20:.0f} of {peak / 2**20:.0f} MiB, step {before:.3g} and {after:.3g} of {took:.3g} s")
        if max(before, after) < 1.15 * min(before, after):
            break
    assert said == pytest.approx(peak, rel=0.15)
    assert (before + after) / 2 == pytest.approx(took, rel=0.3)
