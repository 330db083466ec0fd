"""Numbers that are not finite: whose they are, so that an error can name the samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from trimtab.batch import Batch, Outputs
from trimtab.errors import NumericalError

Row = dict[str, Any]


def check(batch: Batch, token_budget: int) -> None:
    """Raises NumericalError, with the samples, if a column of a batch is not finite."""
    columns = {**batch.tokens, **batch.responses}
    if all(_finite(column).all() for column in columns.values()):
        return
    pieces = enumerate(batch.micro_batches(token_budget))
    rows = [row for number, micro in pieces for row in suspects(micro, {**micro.tokens, **micro.responses}, number)]
    names = ", ".join(dict.fromkeys(name for row in rows for name in row["numbers"]))
    raise refusal(f"not finite: {names}", rows)


def suspects(batch: Batch, columns: Mapping[str, Tensor], micro_batch: int) -> list[Row]:
    """The responses with a number that is not finite: which numbers, and at which tokens (response columns: none)."""
    wrong: list[dict[str, list[int]]] = [{} for _ in batch.lengths]
    owner, starts = batch.response_of_token, batch.last_token - torch.tensor(batch.lengths) + 1
    for name, column in columns.items():
        places = (~_finite(column)).nonzero().flatten()
        of_tokens = name in batch.tokens or len(column) != len(batch.lengths)
        for place in places.tolist():
            response = int(owner[place]) if of_tokens else place
            wrong[response].setdefault(name, []).extend([place - int(starts[response])] if of_tokens else [])
    return [row for row, numbers in zip(all_of(batch, "", micro_batch), wrong, strict=True) if numbers and not row.update(numbers=numbers)]


def all_of(batch: Batch, name: str, micro_batch: int) -> list[Row]:
    """Every response, where one number belongs to them all."""
    return [
        {
            "prompt": group.prompt.as_text,
            "response": response.text,
            "prompt_tokens": list(group.prompt.tokens),
            "tokens": list(response.tokens),
            "numbers": {name: []},
            "micro_batch": micro_batch,
        }
        for group in batch.groups
        for response in group.responses
    ]


def said(outputs: Outputs) -> dict[str, Tensor]:
    """What a model said, by name."""
    columns = {field.name: getattr(outputs, field.name) for field in fields(Outputs)}
    return {name: column.detach().cpu() for name, column in columns.items() if column is not None}


def refusal(what: str, rows: list[Row]) -> NumericalError:
    """The error that names the samples, and says that no step was taken."""
    shown = " | ".join(f"{row['prompt'][:40]!r} -> {row['response'][:40]!r}" for row in rows[:3])
    where = f"micro-batch {rows[0]['micro_batch']}, {len(rows)} responses: {shown}" if rows else None
    fix = "lower the learning rate, or look at the samples"
    return NumericalError(f"{what}; the step was not taken", where=where, fix=fix, samples=rows)


def _finite(column: Tensor) -> Tensor:
    finite = torch.isfinite(column)
    return finite.flatten(1).all(1) if finite.dim() > 1 else finite
