"""Numbers that are not finite never reach a weight, and a run comes back from a spike as if the learning rate had been lower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import resuming
import tiny
from trimtab.batch import Batch, Loss
from trimtab.cli import main
from trimtab.data.templates import Template
from trimtab.errors import NumericalError
from trimtab.models.language import LanguageModel
from trimtab.runs.directory import RunDirectory
from trimtab.training.checkpoint import Checkpoints
from trimtab.training.guards import Guards, GuardsConfig
from trimtab.training.optimiser import OptimConfig, Optimiser
from trimtab.training.update import update
from trimtab.types import Group, Prompt, Response

ROW = ("data.holdout=0", "fit.eval_every=null", "fit.batch_size=1", "optim.schedule=constant")
"""One row at a time: in eight steps every row comes once."""


def group(prompt: str, *responses: str) -> Group:
    encode = tiny.tokenizer().encode
    return Group(Prompt(tuple(encode(prompt)), prompt), tuple(Response((*encode(text), 0), text) for text in responses))


GROUPS = (group("one", "ab", "abc"), group("two", "azb", "ab"), group("three", "b"), group("four", "zz"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    resuming.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def untied() -> LanguageModel:
    return LanguageModel(tiny.model("llama", scale=1.0, tie_word_embeddings=False), Template.of(tiny.tokenizer()))


def token(character: str) -> int:
    [number] = tiny.tokenizer().encode(character)
    return int(number)


def poison(folder: Path, character: str) -> None:
    """Give a saved model an embedding that is infinite for one character: every state from it on is not finite."""
    tiny.folder(folder, tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token(character)] = float("inf")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def nll(outputs: Any, batch: Batch, counts: Any) -> Loss:
    return Loss(-outputs.logprobs.sum() / counts.tokens)


def failures(run: Path) -> dict[int, list[dict[str, Any]]]:
    """What a run wrote down, by step."""
    return {int(path.stem.split("-")[1]): [json.loads(line) for line in path.open()] for path in sorted((run / "failures").iterdir())}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in RunDirectory.open(run).events() if event["event"] == kind]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:06d}/model/model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)


def test_a_log_probability_that_is_not_finite_is_traced_to_its_tokens() -> None:
    model = untied()
    optimiser = Optimiser(model.trainable(), OptimConfig(), 10)
    model.model.get_input_embeddings().weight.data[token("z")] = float("inf")
    with pytest.raises(NumericalError, match=r"micro-batch 1, 1 responses: 'two' -> 'azb'") as caught:
        update(Batch(GROUPS), model.forward, nll, [optimiser], at=0, token_budget=1)
    [row] = caught.value.samples
    assert (row["prompt"], row["response"], row["micro_batch"]) == ("two", "azb", 1)
    assert row["tokens"] == [*tiny.tokenizer().encode("azb"), 0]
    assert {2, 3} <= set(row["numbers"]["logprobs"]) < {0, 1, 2, 3}  # what follows the z


def test_a_gradient_that_is_not_finite_is_traced_to_its_groups() -> None:
    model = untied()
    optimiser = Optimiser(model.trainable(), OptimConfig(), 10)
    before = {name: p.clone() for name, p in model.trainable().items()}

    def steep(outputs: Any, batch: Batch, counts: Any) -> Loss:
        """Finite, but for responses with a z it has no derivative: that of a root at 0."""
        spelt = torch.tensor(["z" in r.text for g in batch.groups for r in g.responses])[batch.response_of_token]
        root = (outputs.logprobs - outputs.logprobs.detach()).square().sqrt()
        return Loss(nll(outputs, batch, counts).value + torch.where(spelt, root, 0.0).sum())

    with pytest.raises(NumericalError, match="norm is") as caught:
        update(Batch(GROUPS), model.forward, steep, [optimiser], at=0, token_budget=20)
    named = {row["prompt"] for row in caught.value.samples}
    assert named >= {"two", "four"}
    assert all(row["numbers"] == {"gradient": []} for row in caught.value.samples)
    assert all(torch.equal(before[name], p) for name, p in model.trainable().items())
    assert all(p.grad is None for p in model.trainable().values())


def test_a_column_that_is_not_finite_is_named_before_anything_is_computed() -> None:
    model = untied()
    optimiser = Optimiser(model.trainable(), OptimConfig(), 10)
    advantages = torch.zeros(sum(Batch(GROUPS).lengths))
    advantages[-1] = float("nan")
    with pytest.raises(NumericalError, match="not finite: advantages") as caught:
        update(Batch(GROUPS).with_tokens(advantages=advantages), lambda _: pytest.fail("ran"), nll, [optimiser], at=0, token_budget=1)
    assert [(row["prompt"], row["numbers"], row["micro_batch"]) for row in caught.value.samples] == [("four", {"advantages": [2]}, 3)]


def test_by_default_a_run_stops_and_its_samples_are_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poison(place / "model", "x")
    assert main(resuming.command("sft", "run", *ROW, "fit.steps=8")) == 2
    said = capsys.readouterr().err
    [(step, rows)] = failures(place / "run").items()
    assert [row["prompt"] for row in rows] == ["six:"]
    assert f"failures/step-{step:06d}.jsonl" in said.replace("\n", "")
    assert "'six:'" in said


def test_a_step_that_is_skipped_changes_no_weight_and_is_counted(place: Path) -> None:
    poison(place / "model", "x")
    assert main(resuming.command("sft", "run", *ROW, "fit.steps=8", "guards.skip=1", "checkpoint.every=1", "checkpoint.keep_last=9")) == 0
    [bad] = failures(place / "run")
    skipped = [row["guard/skipped"] for row in RunDirectory.open(place / "run").metrics()]
    assert skipped == [float(step >= bad) for step in range(8)]
    assert [event["step"] for event in events(place / "run", "step skipped")] == [bad]
    for step in range(1, 8):
        assert same(weights(place / "run", step), weights(place / "run", step + 1)) == (step == bad)


def test_past_the_budget_the_run_stops(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poison(place / "model", "x")
    assert main(resuming.command("sft", "run", *ROW, "fit.steps=40", "guards.skip=2")) == 2
    assert "2 were left out before: guards.skip=2" in capsys.readouterr().err.replace("\n", "")
    assert len(failures(place / "run")) == 3


@pytest.mark.parametrize("kind", ["grpo", "ppo, critic of its own", "grpo, overlapping"])
def test_a_reward_that_is_not_finite_is_written_down_and_skipped(kind: str, place: Path) -> None:
    (place / "reward.py").write_text("def letters(prompt, response, row):\n    return float('nan') if 'six' in prompt else len(response)\n")
    assert main(resuming.command(kind, "stopped")) == 2
    [(step, rows)] = failures(place / "stopped").items()
    assert [row["prompt"] for row in rows] == ["say six"]
    more = () if "overlapping" in kind else ("guards.skip=2",)
    assert main(resuming.command(kind, "run", *more)) == (0 if more else 2)
    if more:
        metrics = RunDirectory.open(place / "run").metrics()
        assert ["reward/mean" in row for row in metrics] == [row["step"] not in failures(place / "run") for row in metrics]
        assert step in failures(place / "run")


def test_a_policy_that_says_nothing_finite_reaches_no_running_statistic(place: Path) -> None:
    from trimtab.cli.commands import config_of
    from trimtab.config import load_recipe
    from trimtab.stages.policy import PolicyLearning

    words = resuming.command("ppo, critic of its own", "run", "shaping.normalise=true")[1:]
    learner = PolicyLearning("ppo", load_recipe(config_of("ppo"), None, words))
    sample, shaping, algorithm = learner.sample, learner.shaping.state_dict(), learner.algorithm.state_dict()

    def then_break(*given: Any) -> Any:
        made = sample(*given)
        next(iter(learner.actor.policy.trainable().values())).data.fill_(float("inf"))
        return made

    learner.sample = then_break  # type: ignore[method-assign]
    with pytest.raises(NumericalError) as caught:
        learner.step(0)
    assert all("logprobs_old" in row["numbers"] for row in caught.value.samples)
    assert len(caught.value.samples) == 6
    assert (learner.shaping.state_dict(), learner.algorithm.state_dict()) == (shaping, algorithm)


SPIKING = (*ROW, "fit.steps=12", "checkpoint.every=3", "guards.window=3", "guards.loss_spike=2", "guards.backoff=0.25")


def spiking(place: Path) -> tuple[str, ...]:
    """Rows that are easy, and a learning rate at which what was learnt is lost again."""
    (place / "sft.jsonl").write_text("".join(json.dumps({"prompt": f"{word}:", "completion": "aaaa"}) + "\n" for word in resuming.WORDS))
    return (*SPIKING, "optim.lr=0.1", "guards.rollbacks=5")


def test_after_a_spike_it_is_the_run_with_the_lower_rate(place: Path) -> None:
    """Bit for bit: what was done since the checkpoint leaves no trace."""
    words = spiking(place)
    assert main(resuming.command("sft", "run", *words, "checkpoint.keep_last=9")) == 0
    [first, *_] = back = events(place / "run", "rolled back")
    last = back[-1]
    assert first["number"] == "loss"
    assert first["value"] > 2 * first["median"]
    assert first["lr_factor"] == 0.25
    rows = RunDirectory.open(place / "run").metrics()
    assert [row["step"] for row in rows] == list(range(12))
    assert {row["optim/lr"] for row in rows[last["to"] :]} == {0.1 * last["lr_factor"]}
    shutil.copytree(place / "run", place / "lower", symlinks=True)
    for path in (place / "lower/checkpoints").glob("step-*"):
        if int(path.name.split("-")[1]) > last["to"]:
            shutil.rmtree(path)
    then = json.loads((place / f"run/checkpoints/step-{last['to']:06d}/state.json").read_text())["guards"]["lr_factor"]
    rate = f"optim.lr={0.1 * last['lr_factor'] / then!r}"
    assert main(["resume", "lower", rate, "guards.loss_spike=null", "--allow-changed"]) == 0
    timeless = [
        [
            {name: value for name, value in row.items() if name.split("/")[0] not in ("time", "guard")}
            for row in RunDirectory.open(run).metrics()
        ]
        for run in (place / "run", place / "lower")
    ]
    assert timeless[0] == timeless[1]
    assert same(weights(place / "run", 12), weights(place / "lower", 12))


def test_a_run_that_went_back_resumes_bit_for_bit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = spiking(place)
    assert main(resuming.command("sft", "whole", *words)) == 0
    own = Checkpoints.after
    with monkeypatch.context() as patch:

        def after(self: Checkpoints, taken: int, metrics: Any, *, last: bool = False) -> None:
            own(self, taken, metrics, last=last)
            if taken == 10:
                self.close()
                raise KeyboardInterrupt

        patch.setattr(Checkpoints, "after", after)
        assert main(resuming.command("sft", "ended", *words)) == 130
    assert main(["resume", "ended"]) == 0
    assert resuming.outcome(place / "ended") == resuming.outcome(place / "whole")


def test_it_goes_back_no_more_often_than_allowed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = spiking(place)
    assert main(resuming.command("sft", "run", *words, "guards.rollbacks=0")) == 2
    assert "the run has gone back 0 times before" in capsys.readouterr().err.replace("\n", "")


def test_only_a_full_window_knows_a_spike(tmp_path: Path) -> None:
    guards = Guards(tmp_path, GuardsConfig(kl_spike=3, window=3), tiny.Recorder(), [])
    for step, (kl, spikes) in enumerate([(1, False), (100, False), (1, False), (2.9, False), (8.8, True), (-50, False), (9, True)]):
        guards.begin(step)
        guards.see(loss=1e9, kl=kl)
        assert (guards.spike is not None) == spikes, step


@pytest.mark.parametrize("kind", ["ppo", "grpo", "dpo, reference moving", "rejection"])
def test_every_stage_can_go_back(kind: str, place: Path) -> None:
    """With a factor just above 1 nearly every rise is a spike: the run goes back until it may no more."""
    words = ["guards.loss_spike=1.0001", "guards.kl_spike=1.0001", "guards.window=2", "guards.rollbacks=2", "checkpoint.every=1"]
    status = main(resuming.command(kind, "run", *words))
    back = events(place / "run", "rolled back")
    assert back
    assert status in (0, 2)
    steps = [row["step"] for row in RunDirectory.open(place / "run").metrics()]
    assert steps == list(range(len(steps)))
