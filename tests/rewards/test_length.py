"""A price for length, and the removal of a planted length bias."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from trimtab import rewards
from trimtab.config import load_recipe
from trimtab.errors import ConfigError
from trimtab.rewards.function import FunctionReward
from trimtab.rewards.length import LengthDebiased
from trimtab.types import Group, Prompt, Response, Score


def response(tokens: int, text: str = "") -> Response:
    return Response((1,) * tokens, text)


def totals(reward: rewards.Reward, groups: Sequence[Group]) -> list[float]:
    return [score.total for row in reward.score(groups) for score in row]


def make(*settings: str) -> rewards.Reward:
    return rewards.make(load_recipe(rewards.RewardConfig, None, list(settings)))


def test_length_costs_beyond_the_free_part_or_away_from_the_target() -> None:
    groups = [Group(Prompt((1,), "p"), (response(3, "a" * 10), response(6, "b" * 4)))]
    assert totals(make("length={weight: 0.5}"), groups) == [-1.5, -3]
    assert totals(make("length={weight: 0.5, free: 4}"), groups) == [0, -1]
    assert totals(make("length={weight: 0.5, target: 4}"), groups) == [-0.5, -1]
    assert totals(make("length={weight: 1, per: character, free: 4}"), groups) == [-6, 0]
    with pytest.raises(ConfigError, match="free or target"):
        make("length={free: 4, target: 5}")


def test_it_combines_with_other_rewards_as_a_member() -> None:
    combined = make("members=[{verifier: {kind: exact}}, {length: {weight: 0.1}, weight: 2}]")
    (row,) = combined.score([Group(Prompt((1,), "p", {"answer": "yes"}), (response(2, "yes"), response(3, "no")))])
    assert [score.total for score in row] == pytest.approx([0.6, -0.6])
    assert row[0].parts == {"exact": 1.0, "length": -0.2}


def planted(seed: int, batches: int = 10, size: int = 100, bias: float = 0.08) -> tuple[list[list[Group]], np.ndarray, np.ndarray]:
    """Batches of groups of four whose gold reward (in the row) knows nothing of length; lengths and gold rewards, flat."""
    generator = np.random.default_rng(seed)
    lengths, gold = generator.integers(1, 60, (batches, size)), generator.normal(size=(batches, size))
    made = []
    for i in range(batches):
        answers = [response(int(n), f"{g + bias * n}") for n, g in zip(lengths[i], gold[i], strict=True)]
        made.append([Group(Prompt((1,), "p"), tuple(answers[j : j + 4])) for j in range(0, size, 4)])
    return made, lengths, gold


def biased() -> FunctionReward:
    return FunctionReward(lambda prompt, text, row: float(text), name="biased")


def ranks(x: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(x))


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_length_bias_is_removed_and_the_gold_order_comes_back(seed: int) -> None:
    batches, lengths, gold = planted(seed)
    reward = LengthDebiased(biased())
    found = np.array([totals(reward, batch) for batch in batches])
    raw = np.array([totals(biased(), batch) for batch in batches])
    later, x, g = found[1:].ravel(), lengths[1:].ravel(), gold[1:].ravel()
    assert np.corrcoef(raw[1:].ravel(), x)[0, 1] > 0.7
    assert abs(np.corrcoef(later, x)[0, 1]) < 3 / np.sqrt(len(x))
    assert np.corrcoef(ranks(later), ranks(g))[0, 1] > 0.95 > np.corrcoef(ranks(raw[1:].ravel()), ranks(g))[0, 1]
    assert reward.line.slope == pytest.approx(0.08, abs=0.02)


def test_the_first_batch_is_uncorrelated_exactly_and_keeps_its_mean_and_parts() -> None:
    (batch, *_), lengths, _ = planted(0)
    rows = LengthDebiased(biased()).score(batch)
    flat: list[Score] = [score for row in rows for score in row]
    found = np.array([score.total for score in flat])
    assert abs(np.corrcoef(found, lengths[0])[0, 1]) < 1e-9
    assert found.mean() == pytest.approx(np.mean(totals(biased(), batch)))
    assert all(score.total == pytest.approx(score.parts["biased"] - score.parts["biased_by_length"]) for score in flat)


def test_the_line_is_least_squares_over_everything_seen_and_its_state_goes_through_json() -> None:
    batches, lengths, _ = planted(3)
    reward, half = LengthDebiased(biased()), LengthDebiased(biased())
    for batch in batches[:5]:
        half.score(batch)
    again = LengthDebiased(biased())
    again.load_state_dict(json.loads(json.dumps(half.state_dict())))
    found = [totals(reward, batch) for batch in batches]
    assert [totals(again, batch) for batch in batches[5:]] == found[5:]
    everything = np.array([totals(biased(), batch) for batch in batches]).ravel()
    assert reward.line.slope == pytest.approx(np.polyfit(lengths.ravel().astype(float), everything, 1)[0], abs=1e-9)


def test_equal_lengths_change_nothing() -> None:
    groups = [Group(Prompt((1,), "p"), (response(4, "1.5"), response(4, "2.5")))]
    assert totals(LengthDebiased(biased()), groups) == [1.5, 2.5]


def test_any_reward_of_a_recipe_can_be_debiased_by_characters_too() -> None:
    reward = make("length_debias=character", "length={weight: 1, per: character}")
    groups = [Group(Prompt((1,), "p"), tuple(response(1, "x" * n) for n in (1, 5, 9)))]
    assert totals(reward, groups) == pytest.approx([-5, -5, -5])
