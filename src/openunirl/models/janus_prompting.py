"""Janus' chat format: texts and pictures in, token ids and pixels out.

Source: the conversation template, chat processor and image processor of deepseek-ai/Janus, as observed:
  text-to-image   bos User: words \\n\\n Assistant: boi | image tokens
  understanding   bos system \\n\\n User: boi image eoi | \\n question \\n\\n Assistant: answer eos
The unconditional row of a prompt has its length, and pads in place of all but the first and the last id.

Departures: 1. a prompt that does not fit raises; 2. the empty prompt stands for an unconditional row. Note that the
tokenizer is read from tokenizer.json as it is: transformers' Llama class, which the checkpoints name, splits otherwise.

Shapes: L positions, H height, W width. Ids are lists; padding is up to the caller.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from openunirl.models import checkpoints
from openunirl.notices import warn

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
PLACEHOLDER, BEGIN_IMAGE, END_IMAGE = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
PLAIN_ROLES = ("User", "Assistant")
TAGGED_ROLES = ("<|User|>", "<|Assistant|>")
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
BACKGROUND = 127  # int(0.5 * 255), around a picture that is not square
SHORTEST_SIDE = 14


def read_tokenizer(path: Path, flag: str = "--model.tokenizer") -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, or beside a file; `flag` names another on the command line. Errors: ValueError where
    there is no tokenizer.json, or a damaged one."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} holds no tokenizer.json: name a folder that does with {flag}")
    return checkpoints.read_tokenizer(folder, PreTrainedTokenizerFast, flag)


def roles_of(
    name: str, tokenizer: Any, *others: str, fix: str = "give --model.roles User Assistant"
) -> tuple[str, str]:
    """What a checkpoint calls user and assistant: Janus-1.3B writes words, Janus-Pro its tokenizer's own role tokens.

    The tokenizers alone do not tell the two apart, but the checkpoint's name and `others` (its whole path, its base
    model) may: the last mention counts. Where none does, it is taken for Janus-Pro, with a warning that tells the fix.

    Example: roles_of("abc", tokenizer, "/hub/models--deepseek-ai--Janus-1.3B/snapshots/abc") == PLAIN_ROLES
    """
    if not set(TAGGED_ROLES) <= tokenizer.get_vocab().keys():
        return PLAIN_ROLES
    told = re.findall(r"janus[-_](1\.3b|pro)", " ".join((name, *others)).lower())
    if not told:
        warn(
            f"no name tells whether {name} is a Janus-Pro, so its prompts say {' and '.join(TAGGED_ROLES)}: "
            f'if it comes from Janus-1.3B, {fix}, or write "roles": {json.dumps(PLAIN_ROLES)} into its config.json'
        )
    return PLAIN_ROLES if told[-1:] == ["1.3b"] else TAGGED_ROLES


def chat(turns: Sequence[tuple[str, str]], system: str) -> str:
    """Turns (role, content) as one text; an empty content is left for the model to fill.

    Example: chat([("User", "a red circle"), ("Assistant", "")], "") == "User: a red circle\\n\\nAssistant:"
    """
    text = system + "\n\n" if system else ""
    for i, (role, content) in enumerate(turns):
        content = content.strip()
        text += f"{role}: {content}{EOS if i % 2 else chr(10) * 2}" if content else f"{role}:"
    return text.strip()


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Special ids, the number of text ids (rows of the head beyond them belong to no text) and of image codes."""

    bos: int
    eos: int
    pad: int
    placeholder: int
    boi: int
    eoi: int
    text_size: int
    num_codes: int

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Text ids that no answer may hold."""
        return tuple(sorted((self.pad, self.placeholder, self.boi, self.eoi)))


class Prompting:
    """Builds ids. `roles` and `system` are the checkpoint's own words; `max_text_len` counts everything before the
    image tokens of a text-to-image row."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        num_codes: int,
        num_image_tokens: int,
        max_text_len: int,
        roles: tuple[str, str],
        system: str = SYSTEM,
    ) -> None:
        known = tokenizer.get_vocab()
        for token in (BOS, EOS, PAD, PLACEHOLDER, BEGIN_IMAGE, END_IMAGE):
            if token not in known:
                raise ValueError(f"the tokenizer does not know {token}: it is not Janus' (see --model.tokenizer)")
        self.tokenizer, self.roles, self.system = tokenizer, roles, system
        self.num_image_tokens, self.max_text_len = num_image_tokens, max_text_len
        self.embedded = max(len(tokenizer), 1 + max(known.values()))  # a damaged one may skip ids
        self.vocab = Vocabulary(
            bos=known[BOS],
            eos=known[EOS],
            pad=known[PAD],
            placeholder=known[PLACEHOLDER],
            boi=known[BEGIN_IMAGE],
            eoi=known[END_IMAGE],
            text_size=len(tokenizer),
            num_codes=num_codes,
        )
        self.image_prefix = self._understanding("")[0]

    def ids(self, text: str) -> list[int]:
        """Ids of `text` without bos."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def conversation(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of an understanding prompt; each placeholder becomes boi, one placeholder per image token, eoi."""
        ids = [self.vocab.bos]
        for id_ in self.ids(chat(turns, self.system)):
            ids += self._image if id_ == self.vocab.placeholder else [id_]
        return ids

    def t2i(self, prompt: str) -> list[int]:
        """Ids up to and with boi; image tokens come next. The empty prompt gives the shortest unconditional row.

        Errors: ValueError naming a prompt that does not fit.
        """
        words = self.ids(chat([(self.roles[0], prompt), (self.roles[1], "")], ""))
        ids = [self.vocab.bos, *self._without_images(words, prompt), self.vocab.boi]
        if len(ids) > self.max_text_len:
            raise ValueError(
                f"the text {prompt[:60]!r} takes {len(ids)} tokens and only {self.max_text_len} fit: shorten it, or "
                "raise --model.max-text-len"
            )
        return ids if prompt.strip() else self.unconditional(len(ids))

    def unconditional(self, length: int) -> list[int]:
        """The unconditional row of a prompt of `length` ids."""
        return [self.vocab.bos, *[self.vocab.pad] * (length - 2), self.vocab.boi]

    def t2i_with_dropped(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[list[int]]:
        """`t2i` of each prompt; an empty one becomes the unconditional row at the length of another prompt, picked by
        its seed: at inference unconditional rows have their prompt's length."""
        rows = [self.t2i(prompt) for prompt in prompts]
        lengths = [len(row) for row, prompt in zip(rows, prompts, strict=True) if prompt.strip()]
        dropped = [b for b, prompt in enumerate(prompts) if lengths and not prompt.strip()]
        for b in dropped:
            rows[b] = self.unconditional(lengths[seeds[b] % len(lengths)])
        return rows

    def question(self, question: str) -> list[int]:
        """What follows the image in an understanding prompt; the answer comes next."""
        prefix, ids = self._understanding(question)
        assert prefix == self.image_prefix, "the tokenizer joins what stands before an image with what follows it"
        return self._without_images(ids, question)

    def answer(self, answer: str) -> list[int]:
        """Ids of an answer and its end token."""
        return [*self.ids(f" {answer.strip()}"), self.vocab.eos]

    @property
    def pixels_start(self) -> int:
        """Where the image's own positions begin in `image_prefix`."""
        return len(self.image_prefix) - 1 - self.num_image_tokens

    @property
    def _image(self) -> list[int]:
        return [self.vocab.boi, *[self.vocab.placeholder] * self.num_image_tokens, self.vocab.eoi]

    def _without_images(self, ids: list[int], text: str) -> list[int]:
        if {self.vocab.placeholder, self.vocab.boi, self.vocab.eoi} & set(ids):
            raise ValueError(f"the text {text[:60]!r} holds {PLACEHOLDER}, {BEGIN_IMAGE} or {END_IMAGE}: take it out")
        return ids

    def _understanding(self, question: str) -> tuple[list[int], list[int]]:
        """Ids before (image included) and after the image."""
        ids = self.conversation([(self.roles[0], f"{PLACEHOLDER}\n{question}"), (self.roles[1], "")])
        end = ids.index(self.vocab.eoi) + 1
        return ids[:end], ids[end:]


def read_picture(picture: Image.Image, size: int) -> torch.Tensor:
    """A picture of any size -> float [3, size, size] in 0..1: longest side to `size`, the other in proportion (cut to
    whole pixels, at least 14), bicubic, centred on grey."""
    picture = picture.convert("RGB")
    longest = max(picture.size)
    width, height = (max(int(side / longest * size), SHORTEST_SIDE) for side in picture.size)
    square = Image.new("RGB", (size, size), (BACKGROUND,) * 3)
    square.paste(picture.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    pixels_HWC = np.asarray(square).astype(np.float64) * (1 / 255)
    return torch.from_numpy(pixels_HWC.astype(np.float32)).permute(2, 0, 1).contiguous()
