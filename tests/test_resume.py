"""A run that was ended goes on as if nothing had happened: the same metrics, samples and weights, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import resuming
from trimtab.cli import main
from trimtab.interrupt import Interrupted
from trimtab.runs.directory import RunDirectory
from trimtab.training import checkpoint
from trimtab.training.checkpoint import CheckpointConfig, Checkpoints, each_step


class Killed(BaseException):
    """Stands for a kill: nothing in the product catches it."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    resuming.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def die_after(monkeypatch: pytest.MonkeyPatch, step: int, *, saved: bool) -> None:
    """The process ends after a step, before or after its checkpoint."""
    own = Checkpoints.after

    def after(self: Checkpoints, taken: int, metrics: Any, *, last: bool = False) -> None:
        if taken < step or saved:
            own(self, taken, metrics, last=last)
        if taken == step:
            self.close()
            raise Killed

    monkeypatch.setattr(Checkpoints, "after", after)


@pytest.mark.parametrize("kind", resuming.KINDS)
@pytest.mark.parametrize(("step", "saved"), [(3, False)])
def test_goes_on_bit_for_bit(kind: str, step: int, saved: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(resuming.command(kind, "whole", "checkpoint.every=1")) == 0
    with monkeypatch.context() as patch:
        die_after(patch, step, saved=saved)
        with pytest.raises(Killed):
            main(resuming.command(kind, "ended", "checkpoint.every=1", "checkpoint.background=false"))
    assert main(["resume", "ended"]) == 0
    assert resuming.outcome(place / "ended") == resuming.outcome(place / "whole")
    resumed = [event for event in RunDirectory.open(place / "ended").events() if event["event"] == "resumed"]
    assert [event["step"] for event in resumed] == [step if saved else step - 1]
    evaluated = any(name.startswith("eval/") for name in RunDirectory.open(place / "ended").metrics()[-1])
    assert evaluated == any(word.startswith("fit.eval_every") for word in resuming.KINDS[kind])


def test_a_run_without_a_checkpoint_begins_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(resuming.command("sft", "whole")) == 0
    with monkeypatch.context() as patch:
        die_after(patch, 2, saved=True)
        with pytest.raises(Killed):
            main(resuming.command("sft", "ended"))
    assert main(resuming.command("sft", "ended", "resume=auto")) == 0
    assert resuming.outcome(place / "ended") == resuming.outcome(place / "whole")


def test_resuming_what_is_finished_changes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(resuming.command("sft", "run")) == 0
    before = resuming.outcome(place / "run")
    assert main(["resume", "run"]) == 0
    assert "nothing was left to do" in capsys.readouterr().err
    assert resuming.outcome(place / "run") == before


@pytest.mark.parametrize("fault", ["shorter", "bit", "missing", "manifest"])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_taken(fault: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(resuming.command("sft", "whole")) == 0
    with monkeypatch.context() as patch:
        die_after(patch, 4, saved=True)
        with pytest.raises(Killed):
            main(resuming.command("sft", "ended", "checkpoint.every=1", "checkpoint.keep_last=2"))
    newest = place / "ended/checkpoints/step-000004"
    weights = newest / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    if fault == "shorter":
        weights.write_bytes(content[:-10])
    elif fault == "bit":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif fault == "missing":
        (newest / "state.safetensors").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    assert main(["resume", "ended"]) == 0
    events = RunDirectory.open(place / "ended").events()
    assert next(event for event in events if event["event"] == "checkpoint damaged")["checkpoint"] == "step-000004"
    assert next(event for event in events if event["event"] == "resumed")["step"] == 3
    assert len(list((place / "ended/checkpoints").glob("step-000004.damaged-*"))) == 1
    assert resuming.outcome(place / "ended") == resuming.outcome(place / "whole")


def test_nothing_whole_is_said_and_left_as_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(resuming.command("sft", "run")) == 0
    (place / "run/checkpoints/step-000005/state.json").unlink()
    before = (place / "run/metrics.jsonl").read_bytes()
    assert main(["resume", "run"]) == 2
    assert "state.json is missing" in capsys.readouterr().err
    assert (place / "run/metrics.jsonl").read_bytes() == before


def test_changed_settings_are_named_and_need_a_word(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(resuming.command("sft", "run", "checkpoint.every=2")) == 0
    assert main(["resume", "run", "optim.lr=0.5", "fit.steps=7"]) == 2
    said = capsys.readouterr().err
    assert "optim.lr (was 0.01, is 0.5)" in said
    assert "fit.steps (was 5, is 7)" in said
    assert main(["resume", "run", "checkpoint.keep_last=2"]) == 0  # these change no number
    assert main(["resume", "run", "fit.steps=7", "--allow-changed"]) == 0
    assert [row["step"] for row in RunDirectory.open(place / "run").metrics()] == list(range(7))
    assert RunDirectory.open(place / "run").config()["fit"]["steps"] == 7


def test_auto_refuses_another_recipe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(resuming.command("sft", "run")) == 0
    assert main(resuming.command("sft", "run", "resume=auto", "seed=1")) == 2
    assert "seed (was 0, is 1)" in capsys.readouterr().err


def test_two_processes_do_not_share_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(resuming.command("sft", "run")) == 0
    held, _ = RunDirectory.resume(place / "run")
    try:
        assert main(["resume", "run"]) == 2
        assert main(resuming.command("sft", "run", "--overwrite")) == 2
        assert "another process works on this run" in capsys.readouterr().err
    finally:
        held.close()
    assert main(["resume", "run"]) == 0


def test_a_torn_line_is_cut_off(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(resuming.command("grpo", "whole")) == 0
    with monkeypatch.context() as patch:
        die_after(patch, 3, saved=True)
        with pytest.raises(Killed):
            main(resuming.command("grpo", "ended", "checkpoint.every=1"))
    for stream in ("metrics", "samples", "events"):
        with (place / "ended" / f"{stream}.jsonl").open("a") as file:
            file.write('{"step": 3, "rew')
    assert main(["resume", "ended"]) == 0
    assert resuming.outcome(place / "ended") == resuming.outcome(place / "whole")
    assert all("event" in event for event in RunDirectory.open(place / "ended").events())


def test_every_process_makes_the_same_run(place: Path) -> None:
    """Also where sets and dictionaries have another order: a continuation is always another process."""
    script = "import sys; from trimtab.cli import main; sys.exit(sum(main(words.split('|')) for words in sys.argv[1:]))"
    kinds = ("sft with an adapter", "reward, an ensemble", "ppo")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, *("|".join(resuming.command(kind, f"{number} {kind}")) for kind in kinds)],
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": number},
        )
        for number in ("1", "2")
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    for kind in kinds:
        assert resuming.outcome(place / f"1 {kind}") == resuming.outcome(place / f"2 {kind}"), kind


def test_an_end_while_a_checkpoint_is_removed_or_written_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("checkpoint.every=1", "checkpoint.background=false", "checkpoint.keep_best=loss/nll", "checkpoint.best=min")
    own = shutil.rmtree

    def half(path: Path, *args: Any, **options: Any) -> None:
        if found := [*Path(path).rglob("manifest.json")]:
            found[0].unlink()
            raise Killed
        own(path, *args, **options)

    assert main(resuming.command("sft", "whole", *words)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            main(resuming.command("sft", "ended", *words))
    (place / "ended/checkpoints/.step-000009-abc/model").mkdir(parents=True)
    assert main(["resume", "ended"]) == 0
    assert resuming.outcome(place / "ended") == resuming.outcome(place / "whole")
    for run in ("ended", "whole"):
        assert not list((place / run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("writer", ["_lock", "_writer", "_describe"])
def test_an_end_before_there_is_a_recipe_is_no_hindrance(writer: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: RunDirectory, *_: str) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, writer, killed)
        with pytest.raises(Killed):
            main(resuming.command("sft", "run", "resume=auto"))
    assert (place / "run/checkpoints").is_dir()
    assert main(resuming.command("sft", "run", "resume=auto")) == 0


@pytest.mark.parametrize("how", ["anew", "resume", "resume=auto", "overwrite"])
def test_a_run_killed_before_it_could_replace_another_loses_neither(
    how: str, place: Path, overwriting: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(overwriting, place, dirs_exist_ok=True)
    new = resuming.command("sft", "run", "seed=1")
    words = {"anew": new, "resume": ["resume", "run"], "resume=auto": [*new, "resume=auto"], "overwrite": [*new, "--overwrite"]}
    assert main(words[how]) == (2 if how == "anew" else 0)
    run = RunDirectory.open(place / "run")
    assert run.config()["seed"] == (0 if how == "anew" else 1)
    assert len(run.metrics()) == 5
    assert not list(place.glob(".run-*"))
    assert ("the earlier one is back" in capsys.readouterr().err) == (how in ("anew", "overwrite"))


@pytest.fixture(scope="module")
def overwriting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, set aside by a process that is killed while it loads its model."""
    place = tmp_path_factory.mktemp("overwriting")
    resuming.prepare(place)
    script = (
        "import os, sys\n"
        "from trimtab import cli\n"
        "from trimtab.models.language import LanguageModel\n"
        "assert cli.main(sys.argv[1].split('|')) == 0\n"
        "LanguageModel.load = lambda *words, **more: os.kill(os.getpid(), 9)\n"
        "cli.main(sys.argv[2].split('|'))\n"
    )
    words = ["|".join(resuming.command("sft", "run", *more)) for more in (["seed=0"], ["seed=1", "--overwrite"])]
    ended = subprocess.run([sys.executable, "-c", script, *words], cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(place.glob(".run-replaced-*"))) == 1
    return place


def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    values = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.5, 5: 0.4, 6: 0.3}
    for how, kept in (
        ({}, {6}),
        ({"keep_last": 2}, {5, 6}),
        ({"keep_every": 3}, {3, 6}),
        ({"keep_best": "eval/x"}, {2, 6}),
        ({"keep_best": "eval/x", "best": "min", "keep_every": 4}, {1, 4, 6}),
    ):
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        checkpoints = Checkpoints(run, CheckpointConfig(every=1, **how), _tracker(), {}, {})
        for step, value in values.items():
            checkpoints.after(step, {"eval/x": value}, last=step == 6)
        checkpoints.close()
        assert {int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*")} == kept
        assert (run / "checkpoints/last").resolve().name == "step-000006"


def test_a_checkpoint_follows_when_minutes_have_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(minutes=10, keep_last=100), _tracker(), {}, {})
    for step in range(1, 31):
        now[0] += 60
        checkpoints.after(step, {})
    checkpoints.close()
    assert sorted(int(path.name.split("-")[1]) for path in (tmp_path / "checkpoints").glob("step-*")) == [10, 20, 30]


def test_the_clock_going_back_does_no_harm(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(resuming.command("sft", "whole")) == 0
    then = iter(range(10**9, 0, -(10**5)))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(then)))
        die_after(patch, 3, saved=True)
        with pytest.raises(Killed):
            main(resuming.command("sft", "ended", "checkpoint.every=1"))
    assert main(["resume", "ended"]) == 0
    assert resuming.outcome(place / "ended") == resuming.outcome(place / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves_it(number: signal.Signals, place: Path) -> None:
    words = [word for word in resuming.command("ppo", "run") if not word.startswith("steps=")]
    process = _start([*words, "steps=100000"], place)
    _wait_for_lines(process, place / "run/metrics.jsonl", 3)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "finishing this step" in said
    assert "trimtab resume" in said
    run = RunDirectory.open(place / "run")
    assert (place / "run/checkpoints/last").resolve().name == f"step-{len(run.metrics()):06d}"


@pytest.mark.parametrize(("total", "saved"), [(10, 3), (2, 2)])
def test_a_signal_between_two_steps_loses_none(total: int, saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when it is decided already that the second step need not be saved."""
    own = Checkpoints.after

    def after(self: Checkpoints, taken: int, metrics: Any, *, last: bool = False) -> None:
        if taken == 2:
            os.kill(os.getpid(), signal.SIGINT)
        own(self, taken, metrics, last=last)

    monkeypatch.setattr(Checkpoints, "after", after)
    with pytest.raises(Interrupted):
        each_step(lambda step: {}, 0, total, Checkpoints(tmp_path, CheckpointConfig(), _tracker(), {}, {}))
    assert (tmp_path / "checkpoints/last").resolve().name == f"step-{saved:06d}"


def _tracker() -> Any:
    import tiny

    return tiny.Recorder()


def _start(words: list[str], place: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRIMTAB_CACHE": str(place / "cache")}
    return subprocess.Popen([sys.executable, "-m", "trimtab", *words], cwd=place, env=environment, stderr=subprocess.PIPE, text=True)


def _wait_for_lines(process: subprocess.Popen[str], path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_model_that_is_gone_is_named_and_nothing_is_lost(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(resuming.command("sft", "whole")) == 0
    with monkeypatch.context() as patch:
        die_after(patch, 3, saved=True)
        with pytest.raises(Killed):
            main(resuming.command("sft", "ended", "checkpoint.every=1"))
    (place / "model").rename(place / "elsewhere")
    assert main(["resume", "ended"]) == 2
    assert "model" in capsys.readouterr().err
    (place / "elsewhere").rename(place / "model")
    assert main(["resume", "ended"]) == 0
    assert resuming.outcome(place / "ended") == resuming.outcome(place / "whole")


def test_a_full_disk_is_said_and_the_checkpoint_before_is_taken(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    small = tmp_path_factory.mktemp("small")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("a small file system cannot be mounted here (it needs root)")
    try:
        assert main(resuming.command("sft", "whole")) == 0
        words = resuming.command("sft", str(small / "run"), "checkpoint.every=1", "checkpoint.keep_last=100")
        assert main(words) == 2  # five checkpoints do not fit
        assert "No space left on device" in capsys.readouterr().err
        kept = sorted(path.name for path in (small / "run/checkpoints").glob("step-*"))
        assert kept
        assert not list((small / "run/checkpoints").glob(".step-*"))  # nothing half-written is left
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        assert main(["resume", str(small / "run")]) == 0
        resumed = next(e for e in RunDirectory.open(small / "run").events() if e["event"] == "resumed")
        assert f"step-{resumed['step']:06d}" == kept[-1]
        assert resuming.outcome(small / "run") == resuming.outcome(place / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_folder_that_cannot_be_written_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "run").mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place / "run")], capture_output=True)
    if made.returncode != 0:
        pytest.skip("a read-only file system cannot be mounted here (it needs root)")
    try:
        assert main(resuming.command("sft", "run")) == 2
        assert "cannot write here" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", str(place / "run")], check=True)
