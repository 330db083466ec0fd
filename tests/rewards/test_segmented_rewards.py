"""Rewards piece by piece: the pieces add up to the response's reward and lie on the tokens they end with."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bag
import tiny
from trimtab import rewards
from trimtab.batch import Batch
from trimtab.data.templates import Template
from trimtab.errors import ConfigError, RewardError
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.rewards.combination import CombinedReward
from trimtab.rewards.function import FunctionReward
from trimtab.rewards.length import LengthDebiased
from trimtab.rewards.model import ModelReward
from trimtab.rewards.segments import ProcessReward, SegmentedReward, SegmentsConfig, prefix, segment_ends
from trimtab.types import Group, Response, Score

TEMPLATE = Template.of(tiny.tokenizer())
PROMPT = TEMPLATE.prompt("q:")
VALUES = {"One.": 1.2, "Two.": -0.5, "Three.": 0.8, "Four.": -0.2}


def response(text: str, truncated: bool = False) -> Response:
    return TEMPLATE.response(PROMPT, text, truncated)


def piece_value(prompt: str, piece: str, row: object) -> float:
    return VALUES[piece.strip()]


def vowels(prompt: str, text: str, row: object) -> float:
    return float(sum(letter in "aeiou" for letter in text)) ** 1.5


@given(st.text(st.sampled_from("abe.! "), min_size=1, max_size=25), st.sampled_from(["sentence", "length", "marker"]), st.booleans())
@settings(deadline=None)
def test_pieces_cover_the_response_and_sum_to_its_reward(text: str, by: str, truncated: bool) -> None:
    config = SegmentsConfig(by=by, length=3, marker="b")
    member, answer = FunctionReward(vowels), response(text, truncated)
    ends = segment_ends(answer, TEMPLATE, config)
    assert ends == sorted(set(ends))
    assert ends[-1] == len(answer.tokens) - 1
    ((whole,),) = member.score([Group(PROMPT, (answer,))])
    ((given_out,),) = SegmentedReward(member, TEMPLATE, config).score([Group(PROMPT, (answer,))])
    assert given_out.total == whole.total
    assert [token for token, _ in given_out.placed] == ends
    assert sum(value for _, value in given_out.placed) == pytest.approx(whole.total, abs=1e-9)
    scores = [0.0, *(vowels("", prefix(answer, end, TEMPLATE).text, {}) for end in ends)]
    assert [value for _, value in given_out.placed] == pytest.approx([b - a for a, b in pairwise(scores)])
    alone = SegmentedReward(FunctionReward(lambda p, piece, row: float(len(piece))), TEMPLATE, config.model_copy(update={"score": "alone"}))
    ((sizes,),) = alone.score([Group(PROMPT, (answer,))])
    assert sizes.total == len(answer.text)  # the pieces are the response, cut


def test_four_segments_add_up() -> None:
    config = SegmentsConfig(by="sentence", score="alone")
    answer = response("One. Two. Three. Four.")
    ((score,),) = SegmentedReward(FunctionReward(piece_value), TEMPLATE, config).score([Group(PROMPT, (answer,))])
    assert [value for _, value in score.placed] == [1.2, -0.5, 0.8, -0.2]
    assert score.total == pytest.approx(1.3)
    pieces = [answer.text[: token + 1] for token, _ in score.placed[:-1]]  # one token per character here
    assert pieces == ["One. ", "One. Two. ", "One. Two. Three. "]
    assert score.placed[-1][0] == len(answer.tokens) - 1


def test_a_faulty_paragraph_gets_the_lowest_reward() -> None:
    def judge(prompt: str, paragraph: str, row: object) -> float:
        return 1.0 - 2.0 * paragraph.count("wrong") - 0.5 * paragraph.count("vague")

    text = "Right and clear. | The finding is wrong. | A vague end."
    config = SegmentsConfig(by="marker", marker=r"\| ", score="alone")
    ((score,),) = SegmentedReward(FunctionReward(judge), TEMPLATE, config).score([Group(PROMPT, (response(text),))])
    assert [value for _, value in score.placed] == [1.0, -1.0, 0.5]


def test_differences_of_a_models_prefix_scores_are_what_the_prefixes_score_alone() -> None:
    scorer = bag.scorer()
    torch.manual_seed(0)
    torch.nn.init.normal_(scorer.head.weight)
    member = ModelReward(scorer, policy=TEMPLATE)
    group = Group(PROMPT, (response("Ab. Cd! E"), response("none"), response("Cut. of", truncated=True)))
    (found,) = SegmentedReward(member, TEMPLATE, SegmentsConfig()).score([group])
    (whole,) = member.score([group])
    assert [s.total for s in found] == pytest.approx([s.total for s in whole], abs=1e-9)
    assert [len(s.placed) for s in found] == [3, 1, 2]
    first = Group(PROMPT, (response("Ab. ", truncated=True),))
    assert found[0].placed[0][1] == pytest.approx(member.score([first])[0][0].total, abs=1e-9)


def test_steps_are_placed_where_they_end_with_what_the_judge_says_there() -> None:
    scorer = bag.scorer()
    scorer.note = scorer.note.model_copy(update={"reads": "step"})
    torch.manual_seed(0)
    torch.nn.init.normal_(scorer.head.weight)
    answer = response("ab|cd|e")
    batch = Batch((Group(PROMPT, (answer,)),))
    logits = scorer.token_scores(batch).token_scores.detach()
    judged = logits[[1, 4, 6]]  # at b, d and e: the marker and EOS are none of a step
    for score, wanted in (("probability", judged.sigmoid()), ("log-probability", torch.nn.functional.logsigmoid(judged))):
        reward = ProcessReward(scorer, TEMPLATE, SegmentsConfig(by="marker", marker=r"\|", score=score), name="judge")
        ((found,),) = reward.score(batch.groups)
        assert [token for token, _ in found.placed] == [2, 5, 7]  # marker and EOS belong to the piece they end
        assert [value for _, value in found.placed] == pytest.approx(wanted.tolist())
        assert found.total == pytest.approx(float(wanted.sum()))
        assert found.parts["judge/lowest"] == pytest.approx(float(judged.sigmoid().min()))


def test_a_judge_with_another_template_reads_the_same_steps(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "base")
    scorer = Scorer.load(ModelConfig(path=str(tmp_path / "base"), dtype="float64"), head="normal")
    scorer.note = scorer.note.model_copy(update={"reads": "step"})
    config = SegmentsConfig(by="marker", marker=r"\|", score="probability")
    answer = Group(PROMPT, (response("ab|cd|e"),))
    same = ProcessReward(scorer, TEMPLATE, config, name="judge")
    anew = ProcessReward(scorer, TEMPLATE, config, name="judge")
    anew.same_tokens = False
    assert dict(same.score([answer])[0][0].placed) == pytest.approx(dict(anew.score([answer])[0][0].placed))
    other = Template.of(tiny.tokenizer(chat=True))
    chat = Group(other.prompt("q:"), (other.response(other.prompt("q:"), "ab|cd|e"),))
    assert ProcessReward(scorer, other, config, name="judge").same_tokens is False
    ((found,),) = ProcessReward(scorer, other, config, name="judge").score([chat])
    assert [token for token, _ in found.placed] == [2, 5, 7]


def test_models_are_read_only_where_they_were_trained() -> None:
    steps = bag.scorer()
    steps.note = steps.note.model_copy(update={"reads": "step"})
    with pytest.raises(ConfigError, match="judges steps, not responses"):
        ModelReward(steps)
    with pytest.raises(ConfigError, match="scores whole responses"):
        ProcessReward(bag.scorer(), TEMPLATE, SegmentsConfig(score="probability"), name="m")
    with pytest.raises(ConfigError, match="gives probabilities"):
        ProcessReward(steps, TEMPLATE, SegmentsConfig(), name="m")


def test_a_recipe_makes_a_segmented_reward(tmp_path: Path) -> None:
    (tmp_path / "value.py").write_text("def vowels(prompt, response, row):\n    return sum(c in 'aeiou' for c in response)\n")
    config = rewards.RewardConfig(function=f"{tmp_path / 'value.py'}:vowels", segments={"by": "length", "length": 2})
    ((score,),) = rewards.make(config, policy=TEMPLATE).score([Group(PROMPT, (response("aeb"),))])
    assert score.placed == ((1, 2.0), (3, 0.0))
    with pytest.raises(ConfigError, match="need the tokenizer of the policy"):
        rewards.make(config)
    with pytest.raises(ConfigError, match="needs a model"):
        rewards.make(config.model_copy(update={"segments": SegmentsConfig(score="probability")}), policy=TEMPLATE)
    with pytest.raises(ValueError, match="is not a regular expression"):
        SegmentsConfig(marker="(")


def test_a_combination_keeps_what_was_placed() -> None:
    answer = response("ab. cde")
    pieces = SegmentedReward(FunctionReward(vowels), TEMPLATE, SegmentsConfig())
    plain = FunctionReward(lambda p, r, row: 2.0, name="plain")
    group = [Group(PROMPT, (answer,))]
    ((mixed,),) = CombinedReward([pieces, plain], [1.0, 0.5], "mean").score(group)
    ((given_out,),) = pieces.score(group)
    assert mixed.placed[0] == (given_out.placed[0][0], 0.5 * given_out.placed[0][1])
    assert mixed.placed[1] == (7, 0.5 * given_out.placed[1][1] + 0.5 * 0.5 * 2.0)
    ((least,),) = CombinedReward([pieces, plain], [1.0, 0.5], "min").score(group)
    assert least.placed == ()


def test_what_length_explains_is_taken_from_the_end() -> None:
    pieces = SegmentedReward(FunctionReward(vowels), TEMPLATE, SegmentsConfig())
    group = [Group(PROMPT, (response("ab. ae"), response("a. ooo eee"), response("a")))]
    (before,), (after,) = pieces.score(group), LengthDebiased(pieces).score(group)
    for old, new in zip(before, after, strict=True):
        assert new.placed[:-1] == old.placed
        assert new.placed[-1] == (old.placed[-1][0], pytest.approx(new.total - old.total))


def test_placed_rewards_must_add_up() -> None:
    with pytest.raises(ValueError, match=r"add up to 1\.0, not to 2\.0"):
        Score(2.0, {}, ((0, 1.0),))


def test_errors_of_the_member_come_through() -> None:
    def broken(prompt: str, text: str, row: object) -> float:
        return float("nan")

    with pytest.raises(RewardError, match="returned nan"):
        SegmentedReward(FunctionReward(broken), TEMPLATE, SegmentsConfig()).score([Group(PROMPT, (response("a"),))])
