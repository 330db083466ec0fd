"""Policy algorithms by name. Adding one: a file beside these, and a line here."""

from __future__ import annotations

from trimtab.algorithms.ppo import PPO

ALGORITHMS = {"ppo": PPO}
