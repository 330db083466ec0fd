"""`trimtab demo`: from a language model and some opinions to a better model, and a report that shows it honestly.

    sample pairs -> the simulated annotator compares them -> reward model -> PPO against it
                                                          -> DPO on the same pairs
    -> evaluate start, DPO, PPO and best-of-n on held-out prompts

Each step is a stage that anyone can run alone; its recipe is left in its folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from trimtab.algorithms import PREFERENCES
from trimtab.config import Config, to_yaml
from trimtab.data.readers import read_rows
from trimtab.data.records import DataConfig, write_jsonl
from trimtab.demo.annotate import AnnotateConfig, annotate
from trimtab.demo.annotator import SimulatedAnnotator
from trimtab.demo.page import write_demo_report
from trimtab.engines.local import EngineConfig
from trimtab.engines.sampling import SamplingConfig
from trimtab.errors import RunError
from trimtab.maths.statistics import mean_interval
from trimtab.models.language import LanguageModel
from trimtab.models.loading import DEFAULT, ModelConfig, resolve_path
from trimtab.rewards import RewardConfig
from trimtab.rewards import make as make_reward
from trimtab.runs.session import session
from trimtab.stages.evaluate import Measured, against, measure, sample_rows
from trimtab.stages.policy import policy, policy_config
from trimtab.stages.preference import preference, preference_config
from trimtab.stages.reward import RewardModelConfig, reward
from trimtab.stages.sample import SampleConfig, sample
from trimtab.training.fit import FitConfig
from trimtab.training.optimiser import OptimConfig
from trimtab.types import Prompt

PROMPTS = Path(__file__).parent / "prompts.jsonl"
HELD_OUT = 120


class DemoConfig(Config):
    """The settings of `trimtab demo`. The defaults are made for two CPU cores and seven minutes."""

    output: str = Field("runs/demo", description="the folder to write; an earlier demo there is replaced")
    seed: int = Field(0, ge=0, description="decides every random draw; another seed repeats the experiment")
    model: str = Field(DEFAULT, description="the model to improve")
    max_tokens: int = Field(24, gt=0, description="length of a response")
    prompts: int | None = Field(None, gt=0, description="training prompts to use (null: all)")
    responses_per_prompt: int = Field(6, ge=2, description="responses sampled per prompt for the annotator to rank")
    reward_layers: int | None = Field(6, gt=0, description="layers of the reward model: the first of the model's own")
    annotator_temperature: float = Field(0.2, gt=0, description="noise of the simulated annotator")
    ppo_steps: int = Field(22, gt=0, description="rollout batches of PPO")
    best_of: int = Field(4, gt=1, description="n of best-of-n")
    held_out: int = Field(HELD_OUT, gt=0, le=HELD_OUT, description="held-out prompts to evaluate on")


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the whole story; writes stage folders, summary.json and report.html, and prints the table. Returns the summary."""
    folder, seconds = Path(config.output), Stopwatch()
    start_over(folder)
    print(f"trimtab demo, seed {config.seed}: the annotator is simulated (VADER sentiment with Bradley-Terry noise)")
    with seconds("prepare"):
        model = ModelConfig(path=resolve_path(config.model))
        prompts = [dict(row.values) for row in read_rows(str(PROMPTS))]
        write_jsonl(folder / "prompts.jsonl", prompts[:-HELD_OUT][: config.prompts])
        write_jsonl(folder / "held_out.jsonl", prompts[-HELD_OUT:][: config.held_out])
    sampling = SamplingConfig(max_tokens=config.max_tokens)
    prompt_data = DataConfig(path=str(folder / "prompts.jsonl"), template="plain")

    with seconds("sample"):
        wide = SampleConfig(
            model=model, data=prompt_data, sampling=sampling, engine=EngineConfig(rows=128), n=config.responses_per_prompt,
            seed=config.seed, output=str(folder / "samples.jsonl"),
        )  # fmt: skip
        keep_recipe(folder / "sample.yaml", wide)
        sample(wide)
    with seconds("annotate"):
        opinions = AnnotateConfig(
            samples=str(folder / "samples.jsonl"), output=str(folder / "comparisons.jsonl"),
            temperature=config.annotator_temperature, seed=config.seed,
        )  # fmt: skip
        keep_recipe(folder / "annotate.yaml", opinions)
        annotate(opinions)

    comparisons = DataConfig(path=str(folder / "comparisons.jsonl"), template="plain", holdout=0.2)
    recipes = stage_recipes(config, folder, model, prompt_data, comparisons, sampling)
    stages: dict[str, Path] = {}
    accuracy: dict[str, float] = {}
    for name, recipe in recipes.items():
        with seconds(name), session(name, recipe.output, to_yaml(recipe), trackers=(), overwrite=True) as run:
            stages[name] = run.path
            if name == "reward":
                accuracy = reward(recipe, run.path, run)
            elif name in PREFERENCES:
                preference(name, recipe, run.path, run)
            else:
                policy(name, recipe, run.path, run)

    with seconds("evaluate"):
        evaluated = evaluate_all(config, folder, model, sampling)
    summary = {
        "seed": config.seed,
        **evaluated,
        "stage_seconds": seconds.parts,
        "reward_model_accuracy": {
            "accuracy": accuracy["eval/accuracy"],
            "low": accuracy["eval/accuracy_low"],
            "high": accuracy["eval/accuracy_high"],
            "pairs": int(accuracy["eval/pairs"]),
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report = write_demo_report(folder, summary, stages)
    print_table(summary)
    print(f"report: {report}")
    return summary


def stage_recipes(
    config: DemoConfig, folder: Path, model: ModelConfig, prompts: DataConfig, comparisons: DataConfig, sampling: SamplingConfig
) -> dict[str, Any]:
    """The recipes of the three training stages; each is left in its run directory and runs by itself."""
    common: dict[str, Any] = {"seed": config.seed, "model": model}
    small = model.model_copy(update={"layers": config.reward_layers})
    return {
        "reward": RewardModelConfig(
            seed=config.seed, model=small, output=str(folder / "reward"), data=comparisons,
            fit=FitConfig(batch_size=8, epochs=3, eval_every=10), optim=OptimConfig(lr=1e-4, warmup_steps=2),
        ),
        "ppo": policy_config("ppo").model_validate(
            {
                **common, "output": str(folder / "ppo"), "data": prompts, "sampling": sampling, "steps": config.ppo_steps,
                "prompts_per_step": 8, "responses_per_prompt": 8,
                "reward": {"model": str(folder / "reward"), "name": "proxy"},
                "algorithm": {"epochs": 1, "minibatches": 2, "kl": {"beta": 0.1}},
                "optim": {"lr": 3e-5, "warmup_steps": 1, "schedule": "constant"},
                "critic": {"optim": {"lr": 1e-3, "schedule": "constant"}},
            }
        ),
        "dpo": preference_config("dpo").model_validate(
            {
                **common, "output": str(folder / "dpo"), "data": comparisons, "algorithm": {"beta": 0.1},
                "fit": {"batch_size": 8, "epochs": 1}, "optim": {"lr": 1e-4, "warmup_steps": 2},
            }
        ),
    }  # fmt: skip


def evaluate_all(config: DemoConfig, folder: Path, base: ModelConfig, sampling: SamplingConfig) -> dict[str, dict[str, float]]:
    """Start, DPO, PPO and best-of-n on the held-out prompts, all with the same random numbers."""
    start = LanguageModel.load(base, template="plain", trainable=False)
    rows = read_rows(str(folder / "held_out.jsonl"))
    prompts: list[Prompt] = [start.template.prompt(row.values["prompt"]) for row in rows]
    gold = SimulatedAnnotator()
    proxy = make_reward(RewardConfig(model=str(folder / "reward"), name="proxy"))
    common: dict[str, Any] = {"seed": config.seed, "rows": 128}
    measured: dict[str, Measured] = {"start": measure(start, start.forward, prompts, [proxy, gold], sampling, **common)}
    for name in ("dpo", "ppo"):
        trained = LanguageModel.load(base.model_copy(update={"path": resolve_path(str(folder / name))}), template="plain", trainable=False)
        measured[name] = measure(trained, start.forward, prompts, [proxy, gold], sampling, **common)
    measured["best_of_n"] = measure(start, start.forward, prompts, [proxy, gold], sampling, n=config.best_of, selector=proxy, **common)
    write_jsonl(folder / "evaluation.jsonl", [{"model": n, **row} for n, m in measured.items() for row in sample_rows(m, "gold")])
    return {name: summarise(m, measured["start"]) for name, m in measured.items()}


def summarise(measured: Measured, start: Measured) -> dict[str, float]:
    """One row of the table."""
    compared = against(measured, start, "gold")
    return {
        "prompts": len(measured.groups),
        "proxy_reward": mean_interval(measured.scores["proxy"]).estimate,
        "gold_reward": mean_interval(measured.scores["gold"]).estimate,
        "gold_delta": compared["delta"],
        "gold_delta_low": compared["delta_low"],
        "gold_delta_high": compared["delta_high"],
        "win_rate": compared["win_rate"],
        "win_rate_low": compared["win_rate_low"],
        "win_rate_high": compared["win_rate_high"],
        "kl": mean_interval(measured.kl).estimate,
        "distinct2_ratio": measured.distinct2 / start.distinct2 if start.distinct2 else 1.0,
        "perplexity_under_reference": measured.perplexity,
    }


class Stopwatch:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.parts[stage] = round(time.perf_counter() - begin, 2)
        print(f"{stage}: {self.parts[stage]:.0f} s", flush=True)


def start_over(folder: Path) -> None:
    """Make room for the demo; a folder that holds something else is left alone."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "prompts.jsonl").exists():
        raise RunError("this folder holds something other than a demo", where=str(folder), fix="choose another output")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)


def keep_recipe(path: Path, recipe: Config) -> None:
    """Leave a step's recipe beside its output, so that it can be run alone."""
    path.write_text(to_yaml(recipe), encoding="utf-8")


def print_table(summary: dict[str, Any]) -> None:
    """The result in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out prompts, gold = simulated annotator", title_justify="left")
    for heading in ("", "proxy", "gold", "change (95 %)", "wins", "KL", "dist-2", "ppl"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name in ("start", "dpo", "ppo", "best_of_n"):
        row = summary[name]
        table.add_row(
            name.replace("_", " "), f"{row['proxy_reward']:.2f}", f"{row['gold_reward']:.2f}",
            f"{row['gold_delta']:+.2f} [{row['gold_delta_low']:+.2f}, {row['gold_delta_high']:+.2f}]",
            f"{row['win_rate']:.2f}", f"{row['kl']:.2f}", f"{row['distinct2_ratio']:.2f}", f"{row['perplexity_under_reference']:.0f}",
        )  # fmt: skip
    Console().print(table)
    a = summary["reward_model_accuracy"]
    print(f"reward model: {a['accuracy']:.3f} of {a['pairs']} held-out pairs [{a['low']:.3f}, {a['high']:.3f}]")
    print(f"stages: {sum(summary['stage_seconds'].values()):.0f} s")
