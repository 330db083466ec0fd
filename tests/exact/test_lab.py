"""The lab: the frontier bounds every policy, and `trimtab exact --quick` holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trimtab.exact.cases import BETA, TABLES, cases
from trimtab.exact.frontier import best_reward, frontier
from trimtab.exact.pairs import TASK, write_choices
from trimtab.exact.task import exact_logprobs, from_row, standing
from trimtab.maths.optimum import optimal_logprobs

FIELDS = {"algorithm", "kl", "policy", "task", "seed", "optimum", "value", "gap", "reference_gap", "bar", "ok"}


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    return exact_logprobs(TABLES[0], TABLES[0].start("tabular", 0))


def test_the_optimum_stands_at_the_optimum_and_on_the_frontier(reference: torch.Tensor) -> None:
    best = optimal_logprobs(TABLES[0].reward_table[0], reference[0], BETA)[None]
    there = standing(TABLES[0], best, reference, BETA)
    assert abs(there.gap) < 1e-12
    assert there.identity_error < 1e-9
    assert there.reward == pytest.approx(best_reward(TABLES[0], reference, there.kl), abs=1e-9)
    for kl, reward in frontier(TABLES[0], reference, points=12):
        assert reward == pytest.approx(best_reward(TABLES[0], reference, kl), abs=1e-6)


def test_no_policy_lies_above_the_frontier(reference: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 3.0):
        noise = torch.randn(reference.shape, dtype=torch.float64, generator=generator) * scale
        policy = torch.log_softmax(reference + noise + TABLES[0].reward_table, dim=1)
        at = standing(TABLES[0], policy, reference, BETA)
        assert at.reward < best_reward(TABLES[0], reference, at.kl)
        assert at.gap > 0
        assert at.identity_error < 1e-9


def test_rewards_are_looked_up_by_text(tmp_path: Path) -> None:
    TABLES[1].write_prompts(tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    for row, table in zip(rows, TABLES[1].reward_table, strict=True):
        assert [from_row(row["prompt"], r.text, row) for r in TABLES[1].responses] == table.tolist()
    assert len({r.text for r in TABLES[1].responses}) == len(TABLES[1].responses)


def test_choices_follow_bradley_terry(tmp_path: Path) -> None:
    write_choices(tmp_path / "c.jsonl", 20_000, 0)
    index = {r.text: i for i, r in enumerate(TASK.responses)}
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    chosen, rejected = (torch.tensor([index[row[name]] for row in rows]) for name in ("chosen", "rejected"))
    assert (chosen != rejected).all()
    difference = (TASK.reward_table[0][chosen] - TASK.reward_table[0][rejected]).abs()
    won = (TASK.reward_table[0][chosen] > TASK.reward_table[0][rejected]).double()
    for low, high in ((0.0, 0.5), (0.5, 1.5), (1.5, 4.0)):
        some = (difference >= low) & (difference < high)
        expected, n = torch.sigmoid(difference[some]).mean(), int(some.sum())
        assert abs(float(won[some].mean() - expected)) < 4 * 0.5 / n**0.5


def test_every_exact_algorithm_has_five_seeds_two_tasks_and_a_transformer() -> None:
    for name in ("ppo", "a2c", "reinforce", "rloo"):
        own = [c for c in cases() if c.algorithm == name and c.expects == "exact" and c.kl == "k1 in the reward"]
        tables = {(c.task.name, c.seed) for c in own if c.policy == "tabular"}
        assert len(tables) == 10
        assert all(c.bar == 1e-3 for c in own if c.policy == "tabular")
        assert len({c.task.name for c in own if c.policy == "transformer"}) == 2


@pytest.mark.timeout(900)  # one to four minutes, by the machine
def test_quick_holds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trimtab", "exact", "--quick", "--json", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert all(row.keys() >= FIELDS for row in rows)
    assert all(row["ok"] for row in rows)
    exact = [row for row in rows if row.get("expects") == "exact"]
    biased = [row for row in rows if row.get("expects") == "biased"]
    assert {row["algorithm"] for row in exact} == {"ppo", "a2c", "reinforce", "rloo"}
    assert all(row["gap"] < 1e-3 for row in exact)
    assert biased
    assert all(row["gap"] > 0.1 for row in biased)
    dpo, reward_model = (next(row["gap"] for row in rows if row["algorithm"] == name) for name in ("dpo", "bradley-terry"))
    assert dpo == pytest.approx(reward_model, rel=0.01)  # the same likelihood, the same policy
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "results.json").read_text())["policies"]
