"""Selection of feature levels by index, with timm's conventions."""

from __future__ import annotations

from collections.abc import Sequence


def level_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Indices from 0 to count - 1 of the levels that `indices` selects.

    Args:
        count: number of levels.
        indices: None for all, an int for the last that many, or the levels themselves; negative ones count from
            the end.

    Raises:
        ValueError: a selection that is empty or out of range.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"indices={indices} selects the last {indices} levels; expected 1 to {count}")
        return list(range(count - indices, count))
    wrong = [index for index in indices if not -count <= index < count]
    if wrong or len(indices) == 0:
        raise ValueError(f"indices must hold levels from {-count} to {count - 1}, got {list(indices)}")
    return [index % count for index in indices]
