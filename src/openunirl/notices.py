"""Warnings on stderr, in one voice. In: a sentence. Out: a line that rich does not wrap. Torch-free."""

from __future__ import annotations

from rich.console import Console


def warn(told: str, console: Console | None = None) -> None:
    """`console`: the one that shows a progress bar now. Example: warn("--x does nothing")"""
    console = console or Console(stderr=True)
    console.print(f"warning: {told}", style="yellow", highlight=False, markup=False, soft_wrap=True)
