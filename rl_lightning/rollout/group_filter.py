"""GroupFilter: the user's say in which groups are trained on."""

from __future__ import annotations

from collections.abc import Callable

from rl_lightning.rollout.errors import GroupFilterError
from rl_lightning.types import RolloutGroup

GroupFilter = Callable[[RolloutGroup], bool]
"""Whether a group may be trained on."""


def passes(group_filter: GroupFilter | None, group: RolloutGroup) -> bool:
    """What `group_filter` says of `group`; without one all pass.

    Raises:
        GroupFilterError: it raised, and would again.
    """
    try:
        return group_filter is None or bool(group_filter(group))
    except Exception as error:  # a user's predicate may raise anything
        name = getattr(group_filter, "__qualname__", type(group_filter).__qualname__)
        raise GroupFilterError(
            f"data.group_filter {name} raised {type(error).__name__}: {error} on prompt group {group.index} "
            f"({group.prompt.query_id}); mend it, or set group_filter to null"
        ) from error
