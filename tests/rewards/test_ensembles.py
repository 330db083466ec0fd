"""Ensembles: how opinions become one score, from heads of one model and from separate rewards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bag
from trimtab.errors import ConfigError
from trimtab.maths.ensembles import combine
from trimtab.rewards import RewardConfig, make
from trimtab.rewards.combination import CombinedReward
from trimtab.rewards.function import FunctionReward
from trimtab.rewards.model import ModelReward
from trimtab.types import Group

TEMPLATE = bag.scorer().template
PROMPT = TEMPLATE.prompt("q:")
GROUP = Group(PROMPT, tuple(TEMPLATE.response(PROMPT, text) for text in ("abc", "dd", "e")))
numbers = st.lists(st.floats(-20, 20), min_size=1, max_size=6)


@given(numbers, st.floats(0, 3))
@settings(deadline=None)
def test_pessimists_never_score_above_the_mean(members: list[float], penalty: float) -> None:
    table = torch.tensor([members], dtype=torch.float64)
    mean = combine(table, "mean")
    assert combine(table, "min") <= mean + 1e-12
    assert combine(table, "uncertainty", penalty=penalty) <= mean + 1e-12
    variance = sum((r - sum(members) / len(members)) ** 2 for r in members) / len(members)
    assert combine(table, "uncertainty", penalty=penalty).item() == pytest.approx(mean.item() - penalty * variance, abs=1e-8)
    assert combine(table, "weighted", torch.ones(len(members), dtype=torch.float64)).item() == pytest.approx(mean.item(), abs=1e-12)
    assert combine(table, "uncertainty", penalty=0.0) == mean


def test_where_all_agree_every_reading_is_the_same() -> None:
    table = torch.full((2, 4), 1.5)
    for how in ("mean", "min", "uncertainty"):
        assert combine(table, how, penalty=2.0).tolist() == [1.5, 1.5]


@pytest.fixture
def scorer() -> object:
    made = bag.scorer(3)
    torch.manual_seed(0)
    torch.nn.init.normal_(made.head.weight)
    return made


def test_a_models_heads_are_read_in_one_pass_and_shown(scorer: object) -> None:
    readings = {
        how: ModelReward(scorer, name="rm", reading=how, uncertainty_weight=0.5, weights=[1.0, 0.0, 2.0] if how == "weighted" else None)
        for how in ("mean", "weighted", "min", "uncertainty")
    }
    before = scorer.model.passes
    found = {how: reward.score([GROUP])[0] for how, reward in readings.items()}
    assert scorer.model.passes == before + len(readings)
    for i in range(3):
        heads = [found["mean"][i].parts[f"rm/{k}"] for k in range(3)]
        mean = sum(heads) / 3
        variance = sum((r - mean) ** 2 for r in heads) / 3
        assert found["mean"][i].total == pytest.approx(mean)
        assert found["min"][i].total == min(heads)
        assert found["weighted"][i].total == pytest.approx((heads[0] + 2 * heads[2]) / 3)
        assert found["uncertainty"][i].total == pytest.approx(mean - 0.5 * variance)
        assert found["mean"][i].parts["rm/sd"] == pytest.approx(variance**0.5)
    with pytest.raises(ConfigError, match="2 weights for 3 heads"):
        ModelReward(scorer, weights=[1.0, 2.0])


def test_separate_rewards_lose_what_they_disagree_on() -> None:
    members = [FunctionReward(lambda p, r, row, k=k: float(len(r) * k), name=f"r{k}") for k in (1, 3)]
    (scores,) = CombinedReward(members, [1.0, 1.0], "uncertainty", uncertainty_weight=0.25).score([GROUP])
    assert [s.total for s in scores] == pytest.approx([2 * n - 0.25 * n**2 for n in (3, 2, 1)])
    assert [s.parts["sd"] for s in scores] == pytest.approx([3, 2, 1])
    assert scores[0].parts["r3"] == 9


def test_a_recipe_asks_for_uncertainty_and_weights_need_their_reading() -> None:
    member = {"function": "math:dist"}
    made = make(RewardConfig(members=[member, member], combine="uncertainty", uncertainty_weight=0.7))
    assert isinstance(made, CombinedReward)
    assert (made.how, made.uncertainty_weight) == ("uncertainty", 0.7)
    for settings_ in ({"ensemble": "weighted"}, {"ensemble_weights": [1.0]}):
        with pytest.raises(ValueError, match="go together"):
            RewardConfig(model="m", **settings_)
