"""Memory that runs out, for real: a process whose address space is limited does the same mathematics in smaller pieces."""

from __future__ import annotations

import gc
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab import cli
from trimtab.errors import ResourceError
from trimtab.memory import fitted, ran_out
from trimtab.stages.policy_metrics import merged


@contextmanager
def at_most(more: int) -> Iterator[None]:
    """While this lasts, the process may map so many bytes more than it has mapped."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_sizes_are_halved_until_one_fits(tmp_path: Path) -> None:
    found = alone("sizes", tmp_path)
    assert found["tried"] == [16, 8, 4, 2]
    assert found["fitted"] == [2 * 2**30, 3]
    assert found["undone"] == 3


def test_the_smallest_size_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    assert re.match(r"memory has run out: .*allocate.*\n  fix: .*trimtab plan", alone("sizes", tmp_path)["error"])


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("bad_alloc"), False),
    ],
)
def test_what_is_taken_for_a_shortage(error: Exception, memory: bool) -> None:
    assert ran_out(error) is memory
    if not memory:

        def work(size: int) -> None:
            raise error

        with pytest.raises(type(error), match=str(error)):
            fitted(work, 4, lambda size: size // 2)


@pytest.mark.parametrize("first", [True, False])
def test_a_shortage_in_one_of_a_steps_updates_is_counted(first: bool) -> None:
    rows = [{"policy/loss": 1.0, "policy/out_of_memory": 2.0}, {"policy/loss": 3.0}]
    found = merged(rows if first else rows[::-1])
    assert found == {"policy/loss": 2.0, "policy/out_of_memory": 2.0, "progress/updates": 2.0}


def test_the_command_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_dispatch", lambda argv: torch.empty(2**50))
    assert cli.main(["sft"]) == 2
    assert capsys.readouterr().err.startswith("error: memory has run out: ")


# The rest runs in a process of its own, as `python test_memory.py WHAT`, because a heap that has once been large no longer asks for memory.


def alone(name: str, place: Path) -> Any:
    """What `main` finds out in a process of its own."""
    out = place / "found.json"
    subprocess.run([sys.executable, __file__, name, str(out)], check=True)
    return json.loads(out.read_text())


def sizes() -> dict[str, Any]:
    """Allocations by the GiB, of address space alone."""
    tried, undone = [], []

    def work(size: int) -> int:
        tried.append(size)
        return len(torch.empty(size * 2**30, dtype=torch.uint8))

    with at_most(3 * 2**30):
        found = fitted(work, 16, lambda size: size // 2, lambda: undone.append(1))
        try:
            fitted(lambda size: torch.empty(size * 2**30, dtype=torch.uint8), 16, lambda size: size // 2 if size > 8 else None)
            error = ""
        except ResourceError as caught:
            error = str(caught)
    return {"tried": tried, "fitted": found, "undone": len(undone), "error": error}


def batch() -> Any:
    from trimtab.batch import Batch
    from trimtab.types import Group, Prompt, Response

    draw = torch.Generator().manual_seed(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 120, (n,), generator=draw).tolist())

    groups = [Group(Prompt(tokens(20), ""), tuple(Response(tokens(100), "") for _ in range(2))) for _ in range(32)]
    return Batch(tuple(groups))


def language_model() -> Any:
    import tiny
    from trimtab.data.templates import Template
    from trimtab.models.language import LanguageModel

    made = tiny.model("llama", torch.float64, num_hidden_layers=4, hidden_size=64, intermediate_size=512)
    return LanguageModel(made, Template.of(tiny.tokenizer()))


def learnt() -> dict[str, Any]:
    """An update's weights and metrics."""
    from trimtab.stages.common import nll_loss
    from trimtab.training.optimiser import OptimConfig, Optimiser
    from trimtab.training.update import update

    model = language_model()
    metrics = update(batch(), model.forward, nll_loss("token"), [Optimiser(model.trainable(), OptimConfig(), 10)], at=0, token_budget=10**6)
    return {"numbers": torch.cat([p.detach().flatten() for p in model.trainable().values()]).tolist(), "metrics": metrics}


def looked() -> dict[str, Any]:
    """What is said of a batch that is learnt from next, and the update that follows."""
    from trimtab.stages.common import nll_loss
    from trimtab.training.optimiser import OptimConfig, Optimiser
    from trimtab.training.update import Ahead, update

    model, rows = language_model(), batch()
    ahead = Ahead(model.forward)
    said = ahead.look(rows, token_budget=10**6).logprobs
    optimisers = [Optimiser(model.trainable(), OptimConfig(), 10)]
    metrics = update(rows, ahead, nll_loss("token"), optimisers, at=0, token_budget=10**6)
    weights = [p.detach().flatten() for p in model.trainable().values()]
    return {"numbers": torch.cat([said, *weights]).tolist(), "metrics": metrics}


def sampled() -> dict[str, Any]:
    """Responses, many side by side."""
    from trimtab.engines.local import EngineConfig, LocalEngine
    from trimtab.engines.sampling import SamplingConfig

    engine = LocalEngine(language_model(), SamplingConfig(max_tokens=100), EngineConfig(rows=256))
    groups = engine.generate([group.prompt for group in batch().groups], 8, seed=1)
    return {"numbers": [t for g in groups for r in g.responses for t in r.tokens], "metrics": {}}


WORKS: dict[str, Callable[[], dict[str, Any]]] = {"learnt": learnt, "looked": looked, "sampled": sampled}


@pytest.mark.parametrize("name", WORKS)
def test_the_mathematics_is_the_same_in_less_memory(name: str, tmp_path: Path) -> None:
    short, plenty, asked = alone(name, tmp_path)
    assert asked, "everything fitted at once"
    if name == "sampled":
        assert short["numbers"] == plenty["numbers"]
        return
    assert torch.allclose(torch.tensor(short["numbers"]), torch.tensor(plenty["numbers"]), rtol=1e-9, atol=1e-12)
    assert "out_of_memory" not in plenty["metrics"]
    assert short["metrics"]["out_of_memory"] >= 1
    assert short["metrics"]["loss"] == pytest.approx(plenty["metrics"]["loss"], rel=1e-12)


def main(name: str, out: str) -> None:
    from trimtab import memory

    if name == "sizes":
        Path(out).write_text(json.dumps(sizes()))
        return
    torch.set_num_threads(1)
    tried: list[str] = []
    ran = memory.ran_out
    memory.ran_out = lambda error: ran(error) and not tried.append(str(error))  # type: ignore[func-returns-value]
    language_model().forward(batch().select([0]))  # what is made once
    gc.collect()
    with at_most((40 if name == "sampled" else 60) * 2**20):
        short = WORKS[name]()
    print(name, "short of memory", len(tried), "times", tried[:1])
    Path(out).write_text(json.dumps([short, WORKS[name](), tried]))


if __name__ == "__main__":
    main(*sys.argv[1:])
