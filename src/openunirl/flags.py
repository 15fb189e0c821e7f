"""Reads a subcommand's argv into its dataclass, and says in our own words what is wrong with it.

In: a frozen dataclass and its defaults, argv. Out: the dataclass filled in, or a UsageError with one sentence that
names the flag, the value and the nearest valid name. tyro reads the flags and writes --help; torch is never imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

import tyro

HELP = ("-h", "--help")
FLAT = tyro.conf.arg(name="")
"""Marks a nested configuration whose flags carry no prefix of their own: --seed, not --run.seed."""

T = TypeVar("T")


class UsageError(Exception):
    """The command line cannot be carried out; the message is the sentence that the user reads."""


def parse(kind: type[T], argv: Sequence[str], default: T, prog: str, wants: str, note: str = "") -> T:
    """The dataclass `kind` from argv, by tyro; --help prints and exits. Errors: UsageError."""
    known = flags(kind, default)
    try:
        args, left = _tyro(kind, argv, default, prog, note)
    except SystemExit as stop:
        if not stop.code:
            raise
        told = _bad_value(kind, argv, default, known)
        raise UsageError(told or f"{prog} wants a {wants}: {prog} {wants} [flags]") from None
    if left:
        raise UsageError(_unexpected(left, argv, known, f"{prog} {wants}"))
    return args


def _tyro(kind: type[T], argv: Sequence[str], default: T, prog: str, note: str = "") -> tuple[T, list[str]]:
    """tyro's result and the tokens it knows nothing of; what it says of errors is dropped."""
    markers = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
    description = f"{kind.__doc__} {note}".strip()
    with contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(
            kind, args=argv, default=default, prog=prog, description=description, config=markers,
            return_unknown_args=True,
        )  # fmt: skip


def flags(kind: type, default: Any, prefix: str = "") -> dict[str, Any]:
    """Every flag without its dashes -> its type; positional fields are left out.

    Example: {"seed": int, "loss.beta": float, "reward.shuffle": bool, "reward.no-shuffle": bool}
    """
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        extras = getattr(hint, "__metadata__", ())
        hint = hint.__origin__ if extras else hint
        value, flag = getattr(default, name), name.replace("_", "-")
        if value is tyro.MISSING or tyro.conf.Positional in extras:
            continue
        if dataclasses.is_dataclass(hint):
            found |= flags(typing.cast(type, hint), value, prefix if FLAT in extras else f"{prefix}{flag}.")
            continue
        found[prefix + flag] = hint
        if hint is bool:
            found[f"{prefix}no-{flag}"] = hint
    return found


def given(argv: Sequence[str]) -> set[str]:
    """The flags that stand in argv, without dashes. Example: given(["x", "--num_images=2"]) == {"num-images"}"""
    return {_name(token) for token in argv if _is_flag(token)}


def wanted(hint: Any) -> str:
    """A type in words. Example: wanted(float | None) == "a number or None"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(wanted(arg) for arg in args)
    if origin is tuple:
        return f"any number of values, each {wanted(args[0])}"
    return {int: "a whole number", float: "a number", str: "a text", bool: "no value", types.NoneType: "None"}.get(
        hint, str(hint)
    )


def _bad_value(kind: type, argv: Sequence[str], default: Any, known: dict[str, Any]) -> str | None:
    """Which flag tyro refuses: each one is tried alone, behind a stand-in for the positional argument."""
    groups: list[list[str]] = []
    for token in argv:
        if _is_flag(token):
            groups.append(token.split("=", 1))
        elif groups:
            groups[-1].append(token)
    for flag, *values in groups:
        hint = known.get(_name(flag))
        if hint is None:
            continue
        try:
            _tyro(kind, ["stand-in", flag, *values], default, "")
        except SystemExit:
            if not values:
                return f"{flag} wants {wanted(hint)}, and nothing follows it"
            given = " ".join(values) if typing.get_origin(hint) is tuple else values[0]
            return f"{flag} wants {wanted(hint)}, not {given!r}"
    return None


def _unexpected(left: Sequence[str], argv: Sequence[str], known: dict[str, Any], usage: str) -> str:
    """The sentence for tokens that belong to nothing; a flag among them is the likely cause of the rest."""
    flag = next((token for token in left if _is_flag(token)), None)
    if flag is not None:
        name = _name(flag)
        near = nearest(name, known)
        told = f"did you mean {' or '.join(f'--{n}' for n in near)}?" if near else "--help lists all flags"
        return f"unknown flag {flag.partition('=')[0]}; {told}"
    token = str(left[0])
    attached = next((a for a in argv if a.endswith(f"={token}")), None)
    before = _name(attached or argv[len(argv) - 2 - argv[::-1].index(token)])
    if known.get(before) is bool:
        return f"--{before} takes no value, so drop {token!r}; --help shows the flag for the opposite"
    return f"did not expect {token!r}; usage: {usage} [flags]"


def _is_flag(token: str) -> bool:
    return token.startswith("-") and token.lstrip("-")[:1].isalpha() and token.lower() not in ("-inf", "-nan")


def _name(flag: str) -> str:
    return flag.partition("=")[0].lstrip("-").replace("_", "-")


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The valid names most like `name`, best first; those with the same last part count as near (--lr: optim.lr)."""
    known, last = list(known), name.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last]
    same.sort(key=lambda k: -difflib.SequenceMatcher(None, name, k).ratio())
    return (same or difflib.get_close_matches(name, known, n=1))[:most]


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is none of `known`, with the nearest of them."""
    known = list(known)
    near = nearest(name, known)
    told = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown {what} {name!r}; {told}Known: {', '.join(known)}"
