"""One row of the table: find the peer's fastest setting, check that both sides do the same work, then take turns step by step."""

from __future__ import annotations

import fcntl
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import flops
from bench.data import Row, in_steps, packed_tokens, plain_tokens, write_rows
from bench.link import ROOT, Reply, Worker, WorkerError
from bench.models import config_of, folder_of
from bench.works import TUNED_ALLOCATOR, Setting, Work

BUILD = ROOT / "build" / "bench"
TRL = ROOT / ".trl"
VLLM = ROOT / ".vllm" / "bin" / "python"

Say = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]

CHECKS: dict[str, list[tuple[str, str, float]]] = {
    "sft": [("loss/nll", "loss", 0.005)],
    "reward": [("loss", "loss", 0.05)],
    "dpo": [("logprob/chosen", "logps/chosen", 0.005), ("logprob/rejected", "logps/rejected", 0.005)],
    "grpo": [("response/length", "completions/mean_length", 0.02), ("policy/entropy", "entropy", 0.15)],
    "rloo": [("response/length", "completions/mean_length", 0.02), ("policy/entropy", "entropy", 0.15)],
    "ppo": [("policy/entropy", "policy/entropy_avg", 0.15)],
    "decode": [("response/tokens", "response/tokens", 0.02)],
}
"""Equal work, by kind: (our number, the peer's, largest relative difference) of the first step.

Supervised works compare losses or summed log-probabilities of the same rows; two bf16 forward passes agree to about 0.1 % there, a
forgotten token would show. A reward model's loss hangs on differences of scores, which bf16 knows to a few per cent. What was sampled
differs, so works that generate compare how many tokens there were (a model of random weights does sample the ending token, once in a
vocabulary) and, loosely, their entropy.
"""


SUSTAINED = 1.0
"""Seconds for which products alone are made between rounds, to know what the machine keeps up."""

WARM_UP = 2
"""Steps of each side before any time counts: the first takes its memory from the system page by page, the second what it lacks."""


class Missing(RuntimeError):
    """A peer that is not installed; the message says how to get it."""


@dataclass
class Timed:
    """What one side's steps took."""

    seconds: list[float]
    peak: int
    loaded: int
    bare: int
    first: dict[str, float]
    parts: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, ready: Reply, first: Reply) -> Timed:
        """From the replies to "prepare" and to the first step, whose time does not count."""
        on_gpu = "gpu_peak_bytes" in first
        return cls([], peak_of(first), 0 if on_gpu else ready["loaded_bytes"], 0 if on_gpu else ready["bare_bytes"], first["metrics"])

    def add(self, reply: Reply) -> None:
        """A step that counts; where it says what its time went into (`time/...`), that too."""
        self.seconds.append(reply["seconds"])
        self.peak = max(self.peak, peak_of(reply))
        for name, seconds in reply["metrics"].items():
            if name.startswith("time/"):
                self.parts.setdefault(name.removeprefix("time/"), []).append(seconds)

    def as_json(self) -> dict[str, Any]:
        parts = {"parts": self.parts} if self.parts else {}
        return {
            **parts,
            "seconds": self.seconds,
            "peak_bytes": self.peak,
            "loaded_bytes": self.loaded,
            "bare_bytes": self.bare,
            "first": self.first,
        }


class Bench:
    """Everything the rows of one run share."""

    def __init__(self, say: Say, lock: Path | None = None, device: str = "cpu") -> None:
        self.say, self.lock, self.device = say, lock, device
        self.logs = BUILD / "logs"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this lasts, nothing else that honours the lock file uses the machine."""
        if self.lock is None:
            yield
            return
        with self.lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def prepare(self, work: Work, steps: int) -> tuple[Path, list[list[Row]]]:
        """Models and rows, made if they are not there."""
        wanted = [work.model] + ([f"{work.model}-reward"] if work.kind in ("reward", "ppo") else [])
        missing = [name for name in wanted if not (folder_of(name) / "config.json").exists()]
        if missing:
            self.say(f"making {', '.join(missing)}")
            environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "HF_HUB_OFFLINE": "1"}
            subprocess.run(
                [sys.executable, "-m", "bench.models", *missing], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
            )
        file = BUILD / "rows" / f"{folder_of(work.model).name}-{work.name}-{work.rows}x{steps}.json"
        return file, in_steps(write_rows(file, work, steps, config_of(work.model)["vocab_size"]), work.rows)

    def ours(
        self, work: Work, rows: Path, setting: Setting | None = None, environment: Mapping[str, str] = TUNED_ALLOCATOR
    ) -> tuple[Worker, Reply]:
        """Our side. The allocator keeps what was freed, as the peer's fastest setting does (see `TUNED_ALLOCATOR`)."""
        worker = Worker("bench.ours", self.logs / f"{work.name}-ours.log", environment=environment)
        return worker, self._started(worker, work, rows, setting or {})

    def peer(self, work: Work, rows: Path, setting: Setting) -> tuple[Worker, Reply]:
        worker = Worker(*module_of(work, self.logs), **environment_of(work, setting))
        return worker, self._started(worker, work, rows, setting)

    def _started(self, worker: Worker, work: Work, rows: Path, setting: Setting) -> Reply:
        model = folder_of(f"{work.model}-reward" if work.kind == "reward" else work.model)
        scorer = folder_of(f"{work.model}-reward")
        try:
            return worker.ask("prepare", work=work.as_json(), rows=str(rows), model=str(model), scorer=str(scorer), setting=setting)
        except WorkerError:
            worker.close()
            raise

    def search(
        self,
        work: Work,
        axes: Sequence[str] | None = None,
        steps: int = 2,
        *,
        trials: Sequence[dict[str, Any]] = (),
        keep: Keep | None = None,
    ) -> dict[str, Any]:
        """The peer's fastest setting, one axis after another from `work.start`.

        A trial is the last of `steps` steps (two: the first warms up); a first step half as slow again as the fastest's is not followed
        by another. axes: only these. trials: those of an earlier search, not repeated. keep: called with what is known after every trial.
        """
        rows, _ = self.prepare(work, steps)
        trials = list(trials)
        anchor: dict[str, float] = {}

        def measure(setting: Setting) -> float:
            known = next((t for t in trials if t["setting"] == setting), None)
            if known is None:
                with self.alone():
                    fastest = min((t["first_seconds"] for t in trials if "first_seconds" in t), default=float("inf"))
                    known = {"setting": setting, **self._trial(work, rows, setting, steps, give_up=1.5 * fastest)}
                first = known.pop("first", None)
                if first is not None and anchor and (wrong := unequal(work.kind, anchor, first, same=True)):
                    known = {"setting": setting, "refused": f"not the same work: {wrong}"}
                anchor.update(first or {} if not anchor else {})
                trials.append(known)
                if keep is not None:
                    keep({"setting": min(trials, key=seconds_of)["setting"], "trials": trials})
                self.say(f"  {work.peer} {brief(setting)}: {known.get('seconds', known.get('refused'))}")
            return seconds_of(known)

        best = dict(work.start)
        for axis, values in work.axes:
            if axes is not None and axis not in axes:
                continue
            best = min(({**best, axis: value} for value in values), key=measure)
        return {"setting": best, "trials": trials}

    def _trial(self, work: Work, rows: Path, setting: Setting, steps: int, give_up: float) -> dict[str, Any]:
        try:
            worker, _ = self.peer(work, rows, setting)
            with worker:
                first = last = worker.ask("step")
                for _ in range(steps - 1 if first["seconds"] < give_up else 0):
                    last = worker.ask("step")
            seconds = {"first_seconds": round(first["seconds"], 2), "seconds": round(last["seconds"], 2)}
            return {**seconds, "peak_bytes": peak_of(last), "first": first["metrics"]}
        except WorkerError as error:
            return {"refused": str(error)[-300:]}

    def compare(
        self, work: Work, setting: Setting, n: int, defaults: int, *, memory: bool = True, keep: Keep | None = None
    ) -> dict[str, Any]:
        """The row: n rounds against the peer's best setting, `defaults` steps of its plain defaults, and memory at equal micro-batches

        (without `memory`: that of the rounds). keep: called with the row as far as it is known after the rounds.
        """
        file, steps = self.prepare(work, WARM_UP + n)
        with self.alone(), Worker("bench.ceilings", self.logs / "ceilings.log") as gauge:
            ours, theirs, ceilings = self._rounds(work, file, setting, n, gauge)
        row = figures(work, steps[WARM_UP:], ours, theirs, ceilings)
        row |= {"peer_setting": setting, "first_step": {"ours": ours.first, "peer": theirs.first}}
        row |= {"ratio_default": None, "memory_ratio": row["peak_ratio"], "versions": versions(work), "machine": machine()}
        if keep is not None:
            keep(row)
        if defaults:
            with self.alone():
                row |= self._against_defaults(work, file, ours, setting, theirs, defaults)
        if memory:
            with self.alone():
                row |= self._memory(work, file, steps, setting, theirs)
        return row

    def _rounds(self, work: Work, file: Path, setting: Setting, n: int, gauge: Worker) -> tuple[Timed, Timed, list[Reply]]:
        sides: dict[str, Worker] = {}
        replies: dict[str, Timed] = {}
        ceilings: list[Reply] = []
        try:
            for name in ("ours", "peer"):
                sides[name], ready = self.ours(work, file) if name == "ours" else self.peer(work, file, setting)
                replies[name] = Timed.of(ready, sides[name].ask("step"))
            wrong = unequal(work.kind, replies["ours"].first, replies["peer"].first)
            if wrong:
                raise WorkerError(f"the two sides do not do the same work: {wrong}")
            for name in ("ours", "peer"):
                for _ in range(WARM_UP - 1):
                    sides[name].ask("step")
            for i in range(n):
                for name in ("ours", "peer") if i % 2 == 0 else ("peer", "ours"):
                    replies[name].add(sides[name].ask("step"))
                ceilings.append(gauge.ask("measure", device=self.device, sustained=SUSTAINED))
                self.say(f"  round {i + 1}: ours {replies['ours'].seconds[-1]:.2f} s, {work.peer} {replies['peer'].seconds[-1]:.2f} s")
        finally:
            for worker in sides.values():
                worker.close()
        return replies["ours"], replies["peer"], ceilings

    def _against_defaults(self, work: Work, file: Path, ours: Timed, best: Setting, theirs: Timed, n: int) -> dict[str, Any]:
        """The peer's plain defaults on the same first rows (not interleaved: both need the memory)."""
        if work.default == best:
            return {"default_seconds": theirs.seconds, "ratio_default": median_ratio(theirs.seconds, ours.seconds)}
        try:
            worker, _ = self.peer(work, file, work.default)
            with worker:
                replies = [worker.ask("step") for _ in range(WARM_UP + n)][WARM_UP:]
        except WorkerError as error:
            return {"ratio_default": None, "default_refused": str(error)[-300:]}
        seconds = [reply["seconds"] for reply in replies]
        self.say(f"  defaults: {', '.join(f'{s:.2f}' for s in seconds)} s")
        peak = max(map(peak_of, replies))
        return {"default_seconds": seconds, "ratio_default": median_ratio(seconds, ours.seconds), "default_peak_bytes": peak}

    def _memory(self, work: Work, file: Path, steps: list[list[Row]], setting: Setting, theirs: Timed) -> dict[str, Any]:
        """Our peak when a micro-batch holds no more tokens than the peer's largest, padding included."""
        budget = micro_tokens(work, steps, setting)
        worker, ready = self.ours(work, file, {"budget": budget})
        with worker:
            peak = max(peak_of(worker.ask("step")) for _ in range(2))
        above = (peak - (ready["bare_bytes"] if theirs.bare else 0)) / (theirs.peak - theirs.bare)
        return {"memory_ratio": peak / theirs.peak, "memory_ratio_above_imports": above, "memory_budget": budget, "memory_peak_bytes": peak}


def module_of(work: Work, logs: Path) -> tuple[str, Path]:
    if work.peer.startswith("trl"):
        module = "bench.trl_ppo_worker" if work.kind == "ppo" else "bench.trl_worker"
    else:
        module = "bench.decode_vllm" if work.peer.startswith("vllm") else "bench.decode_transformers"
    return module, logs / f"{work.name}-peer.log"


def environment_of(work: Work, setting: Setting) -> dict[str, Any]:
    """Interpreter, search path and environment of a peer. Raises Missing if it is not installed."""
    options: dict[str, Any] = {"environment": TUNED_ALLOCATOR if setting.get("allocator") == "tuned" else {}}
    if work.peer.startswith("trl"):
        folder = TRL / work.peer.split()[1]
        if not (folder / "trl").is_dir():
            raise Missing(f"{work.peer} is not in .trl/: `make bench` fetches it, which needs a package index")
        options["path"] = [folder]
    if work.peer.startswith("vllm"):
        if not VLLM.exists():
            raise Missing(f"{work.peer} is not in .vllm/: `make .vllm/.installed` makes that environment, which needs a package index")
        options["python"] = str(VLLM)
        if setting["threads"] == "all":
            cores = os.cpu_count() or 1
            threads = {"OMP_NUM_THREADS": str(cores), "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}"}
            options["environment"] = {**options["environment"], **threads}
    return options


def unequal(kind: str, ours: dict[str, float], theirs: dict[str, float], *, same: bool = False) -> str:
    """What differs more than it may, in words; empty if the work is the same. same: both sides are the peer's."""
    faults = []
    for our_name, their_name, tolerance in CHECKS[kind]:
        a, b = ours[their_name if same else our_name], theirs[their_name]
        if abs(a - b) > tolerance * abs(b):
            faults.append(f"{our_name} {a:.5g} against {their_name} {b:.5g} (tolerance {tolerance:.1%})")
    return "; ".join(faults)


def figures(work: Work, steps: list[list[Row]], ours: Timed, theirs: Timed, ceilings: list[Reply]) -> dict[str, Any]:
    """What the rounds say."""
    shape = flops.Shape.of(config_of(work.model))
    gemm = [c["gemm_bfloat16"] for c in ceilings]
    if work.kind == "decode":
        bounds = [
            flops.decode_bound(shape, rows, gemm=g, bandwidth=c["read_bytes"]) for rows, g, c in zip(steps, gemm, ceilings, strict=True)
        ]
    else:
        bounds = [flops.step(shape, work, rows) / g for rows, g in zip(steps, gemm, strict=True)]
    sustained: dict[str, float] = {}
    if work.kind != "decode" and all("gemm_bfloat16_sustained" in c for c in ceilings):
        rates = [flops.step(shape, work, rows) / s for rows, s in zip(steps, ours.seconds, strict=True)]
        kept_up = [c["gemm_bfloat16_sustained"] for c in ceilings]
        sustained["share_of_sustained"] = statistics.median(rate / g for rate, g in zip(rates, kept_up, strict=True))
    tokens = [work.rows * work.responses * work.new if work.generates else plain_tokens(rows) for rows in steps]
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    learnt = [a + b for a, b in zip(ours.parts.get("observe", ()), ours.parts.get("update", ()), strict=True)]
    needed = [flops.learning(shape, work, rows) / g for rows, g in zip(steps, gemm, strict=True)] if learnt else []
    learning = {"share_of_ceiling_learning": statistics.median(a / b for a, b in zip(needed, learnt, strict=True))} if learnt else {}
    return {
        "work": work.name,
        "peer": work.peer,
        "promised": work.promised,
        "ratio": statistics.median(ratios),
        "n": len(ratios),
        "spread": [min(ratios), max(ratios)],
        "share_of_ceiling": statistics.median(bound / s for bound, s in zip(bounds, ours.seconds, strict=True)),
        **sustained,
        **learning,
        "peer_share_of_ceiling": statistics.median(bound / s for bound, s in zip(bounds, theirs.seconds, strict=True)),
        "tokens_per_second": statistics.median(t / s for t, s in zip(tokens, ours.seconds, strict=True)),
        "peer_tokens_per_second": statistics.median(t / s for t, s in zip(tokens, theirs.seconds, strict=True)),
        "packed_tokens": [packed_tokens(rows) for rows in steps],
        "tokens": tokens,
        "ours": ours.as_json(),
        "theirs": theirs.as_json(),
        "peak_ratio": ours.peak / theirs.peak,
        "ceilings": {name: statistics.median(c[name] for c in ceilings) for name in ceilings[0]},
    }


def peak_of(reply: Reply) -> int:
    """The step's highest memory: of the GPU where there is one, else of the process."""
    return int(reply["gpu_peak_bytes"] if "gpu_peak_bytes" in reply else reply["peak_bytes"])


def seconds_of(trial: Mapping[str, Any]) -> float:
    """What a trial took; one that was refused took for ever."""
    return float(trial.get("seconds", float("inf")))


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=False))


def micro_tokens(work: Work, steps: list[list[Row]], setting: Setting) -> int | None:
    """Tokens of the peer's largest micro-batch, padding included; None where it has none (decoding)."""
    if "micro" not in setting:
        return None
    if work.generates:
        samples = [len(row["prompt"]) + work.new for step in steps for row in step for _ in row["responses"]]
        sizes = [samples]
    else:
        sizes = [[len(row["prompt"]) + len(r) for row in step for r in row["responses"]] for step in steps]
    per: int = setting["micro"] * (1 if work.generates else work.responses)
    return max(max(lengths[i : i + per]) * per for lengths in sizes for i in range(0, len(lengths), per))


def brief(setting: Setting) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def versions(work: Work) -> dict[str, str]:
    known = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), **known, "peer": work.peer}


def machine() -> dict[str, Any]:
    """What the figures depend on; no names."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), platform.machine())
    memory = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    bf16 = "amx_bf16" if "amx_bf16" in info else "avx512_bf16" if "avx512_bf16" in info else "none"
    return {"cpu": model, "cores": os.cpu_count(), "memory_gb": round(memory / 2**20, 1), "bf16": bf16, "load": os.getloadavg()[0]}
