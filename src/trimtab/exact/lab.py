"""Run every algorithm through the policy stage on tasks whose optimum is known, and hold the result against it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from trimtab.exact.cases import BETA, Case
from trimtab.exact.frontier import best_reward
from trimtab.exact.pairs import PairsCase, PairsResult, run_pairs
from trimtab.exact.task import Quiet, exact_logprobs, standing

ABOVE = 1e-9
"""A method above the frontier by more than this is a bug in the measurement of KL or reward."""


@dataclass(frozen=True)
class Result:
    """One case and where its policy ended. `above`: how far its reward lies above the frontier at its KL (must not be positive)."""

    algorithm: str
    kl: str
    policy: str
    task: str
    seed: int
    expects: str
    optimum: float
    value: float
    gap: float
    reference_gap: float
    bar: float | None
    reward: float
    divergence: float
    above: float
    identity_error: float
    ok: bool


def run(case: Case) -> Result:
    """Write the task's files, run the real policy stage on them, load the saved policy, and measure it exactly."""
    import torch

    from trimtab.config import load_recipe
    from trimtab.models.language import LanguageModel
    from trimtab.models.loading import ModelConfig
    from trimtab.models.tabular import register
    from trimtab.stages.policy import policy, policy_config

    register()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start = case.task.write_model(folder / "start", case.policy, case.seed)
        data = case.task.write_prompts(folder / "prompts.jsonl")
        files = [f"model.path={start}", f"data.path={data}", f"output={folder / 'run'}"]
        policy(case.algorithm, load_recipe(policy_config(case.algorithm), None, [*files, *case.recipe]), folder / "run", Quiet())

        def load(path: Path) -> LanguageModel:
            return LanguageModel.load(ModelConfig(path=str(path), dtype="float64"), trainable=False)

        reference, trained = (exact_logprobs(case.task, load(path)) for path in (start, folder / "run"))
    begin, end = standing(case.task, reference, reference, BETA), standing(case.task, trained, reference, BETA)
    above = end.reward - best_reward(case.task, reference, end.kl)
    bar = None if case.bar is None else case.bar * (begin.gap if case.relative else 1.0)
    error = max(begin.identity_error, end.identity_error)
    met = bar is None or (end.gap > bar if case.expects == "biased" else end.gap < bar)
    return Result(
        case.algorithm, case.kl, case.policy, case.task.name, case.seed, case.expects, end.optimum, end.value, end.gap, begin.gap, bar,
        end.reward, end.kl, above, error, ok=met and above < ABOVE and end.gap > -ABOVE and error < ABOVE,
    )  # fmt: skip


def run_any(case: Case | PairsCase) -> Result | PairsResult:
    return run(case) if isinstance(case, Case) else run_pairs(case)


def run_all(cases: Iterable[Case | PairsCase]) -> Iterator[Result | PairsResult]:
    """All cases, as many side by side as there are processors, in the order in which they end."""
    context = get_context("spawn")  # a forked torch may hang
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0)), mp_context=context, initializer=_prepare) as pool:
        for done in as_completed([pool.submit(run_any, case) for case in cases]):
            yield done.result()


def _prepare() -> None:
    os.environ.update(TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    from transformers.utils import logging

    logging.disable_progress_bar()
