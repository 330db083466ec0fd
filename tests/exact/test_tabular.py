"""The tabular model is an ordinary model to every part of trimtab, and can represent every policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimtab.batch import Batch
from trimtab.engines.local import LocalEngine
from trimtab.engines.sampling import SamplingConfig
from trimtab.exact.task import Task, exact_logprobs
from trimtab.models.language import plain_logprobs
from trimtab.models.loading import ModelConfig, plain_attention
from trimtab.models.scorer import Scorer

TASK = Task("t", vocabulary=4, length=4, prompts=(".b", ".cb"), rewards="random")


@pytest.mark.parametrize("kind", ["tabular", "transformer"])
def test_probabilities_of_all_responses_sum_to_one(kind: str) -> None:
    logprobs = exact_logprobs(TASK, TASK.start(kind, 0))
    assert logprobs.shape == (2, 121)
    assert torch.allclose(logprobs.exp().sum(1), torch.ones(2, dtype=torch.float64), atol=1e-12)


def test_every_prefix_has_a_row_of_its_own() -> None:
    model = TASK.start("tabular", 0)
    seen = set()
    with plain_attention(model.plain) as plain:
        for prefix in plain.config.prefixes:
            state = plain.base_model(torch.tensor([prefix])).last_hidden_state[0, -1]
            assert float(state.sum()) == 1
            seen.add(int(state.argmax()))
    assert len(seen) == len(model.plain.config.prefixes)
    assert 0 not in seen  # the row of prefixes that are not in the table


def test_packed_plain_and_sampled_log_probabilities_agree() -> None:
    model = TASK.start("tabular", 3)
    groups = LocalEngine(model, SamplingConfig(max_tokens=4)).generate([g.prompt for g in TASK.groups], 20, seed=1)
    packed = model.forward(Batch(tuple(groups))).logprobs
    sampled = [x for g in groups for r in g.responses for x in r.logprobs]
    assert packed.tolist() == pytest.approx(sampled, abs=1e-12)
    with plain_attention(model.plain) as plain:
        direct = torch.cat([plain_logprobs(plain, g.prompt.tokens, r.tokens) for g in groups for r in g.responses])
    assert torch.allclose(packed, direct, atol=1e-12)


def test_a_tabular_scorer_has_a_score_for_every_response(tmp_path: Path) -> None:
    TASK.write_model(tmp_path / "m", "tabular", 0)
    scorer = Scorer.load(ModelConfig(path=str(tmp_path / "m"), dtype="float64"), head="zero")
    scorer.scores(Batch(TASK.groups)).scores.sum().backward()
    touched = scorer.head.weight.grad[0].nonzero()[:, 0]
    assert len(touched) == 2 * len(TASK.responses)
