"""Collation of examples into padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch

from snake_lora_pl.constants import IGNORE_INDEX
from snake_lora_pl.data.encoding import Example


class Batch(TypedDict):
    """Input of one step.

    There is no attention mask. Padding is on the right and the model is causal, so no token attends to padding except
    padding itself; without a mask, attention uses its faster causal kernel.

    Attributes:
        input_ids: Token ids, int64, shape (batch, length).
        labels: Token ids to predict, int64, same shape, not shifted; ``IGNORE_INDEX`` at prompt and padding positions.
        sources: ``path:line`` of each row.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    sources: list[str]


class PromptBatch(TypedDict):
    """Prompts to complete, in file order and not padded, because the generating code chooses the padding side.

    Attributes:
        input_ids: Token ids of each prompt.
        prompts: Text of each prompt, as in the row.
        sources: ``path:line`` of each row.
    """

    input_ids: list[list[int]]
    prompts: list[str]
    sources: list[str]


def collate(examples: Sequence[Example], pad_id: int, pad_to_multiple_of: int = 1) -> Batch:
    """Right-pad examples to the longest one.

    Without examples, return a *blank* batch: one padding token without a target. A rank that has no rows in the last
    global batch takes it, so that all ranks take the same number of steps.

    Args:
        examples: Encoded rows.
        pad_id: Id of the padding token. It may equal the EOS id; the EOS of an example keeps its label.
        pad_to_multiple_of: Round the padded length up to a multiple of this.
    """
    longest = max((len(example.input_ids) for example in examples), default=1)
    shape = (max(len(examples), 1), -(-longest // pad_to_multiple_of) * pad_to_multiple_of)
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    for i, (ids, num_prompt, _) in enumerate(examples):
        input_ids[i, : len(ids)] = ids
        labels[i, num_prompt : len(ids)] = ids[num_prompt:]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "sources": [example.source for example in examples],
    }


def split_batch(batch: Batch) -> list[Example]:
    """Return the examples of a batch: the inverse of ``collate``."""
    examples = []
    # A blank batch has a row but no source.
    for ids, labels, source in zip(batch["input_ids"].numpy(), batch["labels"].numpy(), batch["sources"], strict=False):
        targets = np.flatnonzero(labels != IGNORE_INDEX)
        examples.append(Example(ids[: targets[-1] + 1], int(targets[0]), source))
    return examples
