"""The seams, on one page. Whatever has these methods can be plugged in; nothing has to be inherited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from trimtab.batch import Batch, Counts, Loss, Outputs
from trimtab.types import Group, Prompt, Score


class Stateful(Protocol):
    """Something that decides the future of a run and so belongs in a checkpoint."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors and JSON values, in mappings and lists. What changes later reaches no value in it but tensors that are weights."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Engine(Protocol):
    """Samples responses. `seed` fixes every random draw: the same seed, weights and prompts give the same responses."""

    def generate(self, prompts: Sequence[Prompt], n: int, *, seed: int) -> list[Group]:
        """n responses to each prompt, with the sampler's log-probabilities, in the order of the prompts."""
        ...

    def load(self, parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over new policy weights (nothing to do where sampler and trainer share them)."""
        ...

    def sleep(self) -> None:
        """Free what only sampling needs, until the next `generate`."""
        ...


class Reward(Protocol):
    """Scores responses. A plain Python function becomes one with `rewards.function`."""

    name: str

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        """One Score per response, in the order of the groups and of their responses: finite, or with the reason why it failed."""
        ...


class Algorithm(Protocol):
    """Assigns credit and says which loss follows from it. Sees numbers only: no model, engine or disk."""

    config: Any
    uses_critic: bool
    greedy_baseline: bool

    @property
    def compares(self) -> bool:
        """Whether a response is credited by comparison with the others of its group, so that one alone teaches nothing."""
        ...

    def assign(self, batch: Batch, rewards: Tensor, values: Tensor | None) -> Tensor:
        """Unnormalised advantages of every token; linear in rewards and values."""
        ...

    def scale(self, batch: Batch, raw: Tensor) -> tuple[Tensor, Tensor]:
        """What is subtracted from them, and what they are then divided by."""
        ...

    def scores(self, batch: Batch) -> Tensor:
        """The shaped reward of every token: where the reward placed it, or at the last."""
        ...

    def surrogate(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Per-token loss terms, and where a clip cut the gradient off (None: never)."""
        ...

    def rewards(self, batch: Batch) -> Tensor:
        """Score and penalty of every token; their sum over a response is its return."""
        ...

    def credit(self, batch: Batch) -> Batch:
        """From rewards, log-probabilities and values to the token columns the losses need (advantages, returns)."""
        ...

    def policy_loss(self, outputs: Outputs, batch: Batch, counts: Counts) -> Loss: ...

    def value_loss(self, outputs: Outputs, batch: Batch, counts: Counts) -> Loss: ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future of a run (running statistics, adaptive coefficients), as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Tracker(Protocol):
    """Receives what a run reports. The run directory is one; TensorBoard, Weights & Biases and MLflow are others."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one step, by name."""
        ...

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Responses worth reading, one mapping each."""
        ...

    def event(self, kind: str, **details: Any) -> None:
        """Something that happened once (started, saved, stopped early)."""
        ...

    def rewind(self, step: int) -> None:
        """The run has gone back: what was said of steps from this one on does not hold, and is said again."""
        ...

    def close(self) -> None: ...
