"""Learning from pairs, held against the optimum: how far N noisy choices lead, by DPO and by a reward model.

Choices follow Bradley-Terry on the true reward. Both methods maximise the same likelihood, so on a table they must end at the same
policy, and the gap J* - J must fall as 1 / N: N * gap is flat, at the value that the theory of maximum likelihood gives.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trimtab import seeds
from trimtab.data.records import write_jsonl
from trimtab.exact.task import Quiet, Task, exact_logprobs, standing
from trimtab.maths.optimum import optimal_logprobs
from trimtab.types import Response

TASK = Task("pairs", vocabulary=3, length=3, prompts=(".",), rewards="random")
BETA = 0.5
SIZES = (1_000, 3_000, 9_000)
SEEDS = 12
FLAT = 2.0
"""The largest N * gap (mean over seeds) may be this many times the smallest, and each as far from its expectation. A single run varies
by about its own size, because few responses decide; the mean of twelve by a quarter of it."""

Method = Literal["dpo", "bradley-terry"]


@dataclass(frozen=True)
class PairsCase:
    method: Method
    pairs: int
    seed: int


@dataclass(frozen=True)
class PairsResult:
    """Where one run ended: `dpo`: the trained policy; `bradley-terry`: the exact optimum under the trained reward model."""

    method: str
    pairs: int
    seed: int
    optimum: float
    gap: float
    reference_gap: float
    expected_n_gap: float

    @property
    def n_gap(self) -> float:
        return self.pairs * self.gap


def pairs_cases(*, quick: bool = False) -> Iterator[PairsCase]:
    """All runs; with `quick` the smallest size and one seed, where both methods must agree."""
    for method in ("dpo", "bradley-terry"):
        for size in SIZES[:1] if quick else SIZES:
            for seed in range(1 if quick else SEEDS):
                yield PairsCase(method, size, seed)  # type: ignore[arg-type]


def write_choices(path: Path, count: int, seed: int) -> Path:
    """`count` pairs of different responses, drawn evenly, each chosen with probability sigma(r_a - r_b)."""
    rewards, n = TASK.reward_table[0], len(TASK.responses)
    generator = seeds.generator(seed, "pairs of an exact task", count)
    first = torch.randint(n, (count,), generator=generator)
    second = (first + 1 + torch.randint(n - 1, (count,), generator=generator)) % n
    wins = torch.rand(count, dtype=torch.float64, generator=generator) < torch.sigmoid(rewards[first] - rewards[second])
    chosen, rejected = torch.where(wins, first, second).tolist(), torch.where(wins, second, first).tolist()

    def answer(name: str, response: Response) -> dict[str, object]:
        return {name: response.text, f"{name}_truncated": response.truncated}

    rows = zip(chosen, rejected, strict=True)
    write_jsonl(
        path, [{"prompt": TASK.prompts[0], **answer("chosen", TASK.responses[a]), **answer("rejected", TASK.responses[b])} for a, b in rows]
    )
    return path


def run_pairs(case: PairsCase) -> PairsResult:
    """Train through the real stage and measure exactly."""
    from trimtab.batch import Batch
    from trimtab.config import load_recipe
    from trimtab.models.language import LanguageModel
    from trimtab.models.loading import ModelConfig
    from trimtab.models.scorer import Scorer
    from trimtab.models.tabular import register
    from trimtab.stages.preference import preference, preference_config
    from trimtab.stages.reward import RewardModelConfig, reward

    register()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder, run = Path(place), Path(place) / "run"
        start = TASK.write_model(folder / "start", "tabular", seed=0)
        data = write_choices(folder / "choices.jsonl", case.pairs, case.seed)
        fit = [f"fit.batch_size={min(case.pairs, 2000)}", "fit.steps=120", "fit.micro_batch_tokens=100000"]
        files = [f"model.path={start}", "model.dtype=float64", f"data.path={data}", f"output={run}", f"seed={case.seed}", *fit]
        model = ModelConfig(path=str(start), dtype="float64")
        reference = exact_logprobs(TASK, LanguageModel.load(model, trainable=False))
        trained = model.model_copy(update={"path": str(run / "checkpoints" / "last" / "model")})
        logprobs: Tensor
        if case.method == "dpo":
            settings = [
                f"algorithm.beta={BETA}",
                "optim.lr=0.2",
                "optim.max_grad_norm=1000",
                "optim.betas=[0.8,0.9]",
                "reference_cache=null",
            ]
            preference("dpo", load_recipe(preference_config("dpo"), None, [*files, *settings]), run, Quiet())
            logprobs = exact_logprobs(TASK, LanguageModel.load(trained, trainable=False))
        else:
            settings = ["loss.centring=0", "head_optim.lr=0.2", "head_optim.max_grad_norm=1000", "head_optim.betas=[0.8,0.9]"]
            reward(load_recipe(RewardModelConfig, None, [*files, *settings]), run, Quiet())
            scores = Scorer.load(trained, head="saved", trainable=False).scores(Batch(TASK.groups)).scores
            assert scores is not None
            logprobs = optimal_logprobs(scores.detach().double(), reference[0], BETA)[None]
    begin, end = (standing(TASK, policy, reference, BETA) for policy in (reference, logprobs))
    return PairsResult(case.method, case.pairs, case.seed, end.optimum, end.gap, begin.gap, expected_n_gap(reference[0]))


def expected_n_gap(logprobs_ref: Tensor) -> float:
    """tr(C F^+) / (2 beta): what N * gap tends to, with C the covariance of an indicator of the response under pi*, and F the Fisher

    information of one choice about the rewards. The rewards' error is N(0, F^+ / N), and J* - J = beta KL(pi || pi*), to second order
    the variance of the error under pi* over 2 beta.
    """
    rewards, n = TASK.reward_table[0], len(TASK.responses)
    p = torch.sigmoid(rewards[:, None] - rewards[None, :])
    weight = (2 * p * (1 - p) / (n * (n - 1))).fill_diagonal_(0.0)
    fisher = torch.diag(weight.sum(1)) - weight
    best = optimal_logprobs(rewards, logprobs_ref, BETA).exp()
    covariance = torch.diag(best) - torch.outer(best, best)
    return float(torch.trace(covariance @ torch.linalg.pinv(fisher))) / (2 * BETA)


def flatness(results: list[PairsResult]) -> dict[str, float]:
    """For each method the largest mean N * gap over the smallest, or how far one is from its expectation, if that is more.

    With one run per size only the ratio of sizes is looked at.
    """
    found: dict[str, float] = {}
    for method in sorted({r.method for r in results}):
        means = []
        for size in sorted({r.pairs for r in results}):
            own = [r for r in results if (r.method, r.pairs) == (method, size)]
            means.append(sum(r.n_gap for r in own) / len(own))
            means += [own[0].expected_n_gap] if len(own) > 1 else []
        found[method] = max(means) / min(means)
    return found
