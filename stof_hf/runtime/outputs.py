"""What a model returns, taken apart and put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.utils import ModelOutput

__all__ = ["rebuild"]

Change = Callable[[Any, str | None], Any]


def rebuild(output: Any, change: Change) -> Any:
    """An output with something else in the place of all that is no container.

    What is the same object twice, such as the last hidden state, stays so.

    Args:
        change: (what is there, the name of the field that holds it or None) -> what comes there.

    >>> from transformers.modeling_outputs import BaseModelOutput
    >>> output = BaseModelOutput(last_hidden_state=2, hidden_states=(1, 2))
    >>> rebuild(output, lambda x, name: f"{x} of {name}").hidden_states
    ('1 of hidden_states', '2 of last_hidden_state')
    """
    return _rebuild(output, None, change, {})


# Not a function within the other, which would refer to itself: then results would be gone when
# Python looks for circles, not when nobody has them.
def _rebuild(x: Any, name: str | None, change: Change, made: dict[int, Any]) -> Any:
    if isinstance(x, ModelOutput):
        return type(x)(**{key: _rebuild(one, key, change, made) for key, one in x.items()})
    if type(x) in (tuple, list):
        return type(x)(_rebuild(one, name, change, made) for one in x)
    if id(x) not in made:
        made[id(x)] = change(x, name)
    return made[id(x)]
