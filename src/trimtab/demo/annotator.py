"""A simulated annotator, so that the demo needs no people. It is labelled as simulated wherever it appears.

Its taste is the sentiment of the response: gold(y) = VADER's compound score in [-1, 1] (Hutto and Gilbert 2014), of the
response alone. Its opinions are noisy as people's are: it ranks responses by gold(y) / temperature + Gumbel noise, so that
every pair within a ranking follows Bradley-Terry exactly:

    P(a preferred to b) = sigmoid((gold(a) - gold(b)) / temperature)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from trimtab import seeds
from trimtab.errors import ConfigError
from trimtab.types import Comparison, Group, Score


class SimulatedAnnotator:
    """Knows the gold reward, and says noisily which responses it prefers."""

    name = "gold"

    def gold(self, text: str) -> float:
        """VADER's compound sentiment, in [-1, 1]; 0 for text without sentiment."""
        return float(self._vader.polarity_scores(text)["compound"])

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        """The gold reward of every response: the annotator's taste without its noise."""
        return [[Score(value, {self.name: value}) for value in (self.gold(r.text) for r in group.responses)] for group in groups]

    def rank(self, groups: Sequence[Group], temperature: float, seed: int) -> list[Comparison]:
        """Rank the distinct responses of each group, best first; a group of equal responses says nothing and is left out.

        A group's ranking depends on the seed and its prompt only, not on the company it comes in.
        """
        ranked = []
        for group in groups:
            distinct = {(r.text, r.truncated): i for i, r in reversed(list(enumerate(group.responses)))}
            kept = group.only(sorted(distinct.values()))
            if len(kept.responses) < 2:
                continue
            generator = np.random.default_rng(seeds.derive(seed, f"annotate {group.prompt.as_text}"))
            utility = [self.gold(r.text) / temperature + generator.gumbel() for r in kept.responses]
            order = sorted(range(len(utility)), key=lambda i: -utility[i])
            ranked.append(Comparison(kept.only(order), tuple(float(len(order) - 1 - place) for place in range(len(order))), "ranking"))
        return ranked

    def agreement(self, comparisons: Sequence[Comparison]) -> float:
        """How often the noisy preference agrees with the gold reward, over pairs that differ in it: a reward model's ceiling."""
        agreed = []
        for comparison in comparisons:
            golds = [self.gold(r.text) for r in comparison.group.responses]
            agreed += [golds[i] > golds[j] for i, j in combinations(range(len(golds)), 2) if golds[i] != golds[j]]
        return sum(agreed) / len(agreed) if agreed else float("nan")

    @cached_property
    def _vader(self) -> Any:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise ConfigError("the simulated annotator needs vaderSentiment", fix="pip install 'trimtab[demo]'") from None
        return SentimentIntensityAnalyzer()
