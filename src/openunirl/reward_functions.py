"""The user's own rewards: finds them, calls them, and says which sample a bad result belongs to.

In: "module:function" and columns, one entry per sampled answer. Out: one number or None per entry, checked; or one
ValueError that names the reward and the sample. A reward has the shape of TRL's reward functions:

    def red_share(prompts, images, answers, **columns):  # or async def
        return [float(np.asarray(image)[..., 0].mean() / 255) for image in images]

Source: TRL's GRPOTrainer (columns as keyword lists, None where a reward does not apply). Departures: 1. `images` (PIL)
and `answers` (texts) stand for TRL's `completions`; 2. a result that is no finite number or None is an error, and a
reward that raises is called again on single samples until it is known which one it was.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

COLUMNS = ("questions", "gold", "tags", "metadata", "image_indices")
"""What a reward gets beside prompts, images and answers: the question asked, its gold answer, the task type, the
prompt's GenEval record, and the image's number on this process (the answers to one image share one PIL object)."""

LARGEST = 1e12
"""Size of a reward. Float32 ends at 3e38, and advantages square weighted sums of rewards (validate.LARGEST_WEIGHT)."""

Columns = Mapping[str, Sequence[Any]]
Values = Sequence[float | None]


def load_function(name: str) -> Callable[..., Any]:
    """The function behind "module:function"; modules of the working directory are found, too.

    Errors: ValueError for a module that cannot be imported, a function that is not there, or of another shape.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"reward {name}: the module {module} cannot be imported: {_told(error)}") from error
    function = getattr(found, attribute, None)
    if not callable(function):
        raise ValueError(f"reward {name}: {found.__file__ or module} has no function {attribute!r}")
    try:
        inspect.signature(function).bind(prompts=(), images=(), answers=(), **dict.fromkeys(COLUMNS, ()))
    except TypeError as error:
        told = f"it is called with prompts, images, answers, {', '.join(COLUMNS)}; take (prompts, images, answers, **_)"
        raise ValueError(f"reward {name} has another shape ({error}): {told}") from error
    return function


def user_rewards(name: str, columns: Columns) -> Values:
    """What the function says of the columns, checked. Errors: ValueError naming the reward and a sample."""
    function = load_function(name)
    try:
        values = _call(function, columns)
    except Exception as error:
        raise ValueError(f"reward {name} raised {_told(error)}; {_culprit(function, columns)}") from error
    return checked(name, values, columns)


def checked(name: str, values: Any, columns: Columns) -> Values:
    """`values` as a list of one finite float or None per sample. Errors: ValueError naming the reward and a sample."""
    count = len(columns["prompts"])
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple):
        raise ValueError(f"reward {name} returned {values!r:.100}, wanted a list of {count} numbers, one per sample")
    if len(values) != count:
        told = f"; the first without one is {sample(columns, len(values))}" if len(values) < count else ""
        raise ValueError(f"reward {name} returned {len(values)} values for {count} samples{told}")
    found: list[float | None] = []
    for i, value in enumerate(values):
        value = _plain(value)
        if value is not None and (not isinstance(value, numbers.Real) or not math.isfinite(value)):
            raise ValueError(
                f"reward {name} returned {value!r:.100} for {sample(columns, i)}; wanted a finite number, or None "
                "where the reward does not apply"
            )
        if value is not None and abs(float(value)) > LARGEST:
            raise ValueError(
                f"reward {name} returned {value!r:.100} for {sample(columns, i)}; wanted at most {LARGEST:g} in size, "
                "or float32 could not compare it with others: divide it"
            )
        found.append(None if value is None else float(value))
    return found


def _plain(value: Any) -> Any:
    """A number out of a tensor or array that holds one; anything else as it is."""
    try:
        return value.item()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return value


def sample(columns: Columns, i: int) -> str:
    """How messages name a sample."""
    told = (f"{word} {columns[column][i]!r:.100}" for word, column in _WORDS.items())
    return f"sample {i} ({', '.join(told)})"


_WORDS = {"prompt": "prompts", "question": "questions", "answer": "answers"}


def _culprit(function: Callable[..., Any], columns: Columns) -> str:
    count = len(columns["prompts"])
    for i in range(count):
        try:
            _call(function, {name: values[i : i + 1] for name, values in columns.items()})
        except Exception as error:
            return f"the first sample that it fails on alone is {sample(columns, i)}: {_told(error)}"
    return f"on each of the {count} samples alone it does not"


def _call(function: Callable[..., Any], columns: Columns) -> Any:
    result = function(**{name: list(values) for name, values in columns.items()})
    return _loop().run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


@functools.cache
def _loop() -> asyncio.Runner:
    """One event loop for the whole run, so that a reward may keep its connections open."""
    return asyncio.Runner()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
