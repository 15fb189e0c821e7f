"""A chat model of transformers that judges whether an answer means the gold answer, instead of the rules.

    rows (question, expected, answer) -> PROMPT -> chat model, greedy -> reply -> verdict_of -> True, False or None

In: rows, a checkpoint with a chat template (without one the prompt is sent as it is). Out: one reply and verdict a row;
None where the reply is neither "same" nor "different": it counts as wrong, and as unsettled. Replies are kept in a
folder by what they depend on (ChatModel.key_of), so that no question is put twice, by this evaluation or another; the
weights' numbers are read when the first question is new.

Source: UniRL (arXiv 2505.23380), whose judge is Qwen2.5-7B-Instruct. Departures: 1. the wording is ours; 2. greedy
decoding, for which the end tokens are all that is taken of the checkpoint's generation_config.json; 3. officially every
reply but "same" is "not same"; here, what cannot be read is counted; 4. models that think are told not to, and what
they think all the same is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from openunirl.evaluation.journal import append_rows, mend
from openunirl.evaluation.weights import check_whole, load_whole, pretrained
from openunirl.generate import progress_bar
from openunirl.models.checkpoints import weight_files
from openunirl.tasks.geneval import COLORS, GENEVAL_OBJECTS
from openunirl.tasks.records import read_jsonl

PROMPT = (
    "A picture was asked about: {question}\nThe right answer: {expected}\nThe answer that was given: {answer}\n"
    "Does the given answer mean the right answer? Other words for the same thing are fine. "
    'Reply with one word: "same" or "different".'
)
MAX_NEW_TOKENS = 512
"""Room for a model that thinks although it is told not to; any other ends after a word."""
BATCH = 16
_SAMPLES = 4096  # pieces of 64 bytes that a weight file is known by
_BESIDE = ("*.json", "*.txt", "*.model", "*.tiktoken")  # a folder's configuration, and its tokenizer's files
_GENERATION = "generation_config.json"


def verdict_of(reply: str) -> bool | None:
    """The verdict of a reply, after what stands in <think>...</think>. It counts if its first word is a verdict, "same"
    or "yes" (True), "different", "no" or "not (the) same" (False), and no other word is the opposite one; else None.

    Example: verdict_of('"Same."') is True; verdict_of("Not the same") is False; verdict_of("Same? No, different") is
    None; verdict_of("Well") is None
    """
    told = re.sub(r"^.*</think>", "", reply.lower(), flags=re.DOTALL)
    words = re.findall(r"[a-z]+", re.sub(r"\bnot (the )?same\b", "different", told))
    said = {word in ("same", "yes") for word in words if word in ("same", "yes", "different", "no")}
    first = words[0] if words else ""
    if len(said) != 1 or "difference" in words or first not in ("same", "yes", "different", "no"):
        return None
    return said.pop()


class ChatModel:
    """Example: ChatModel("Qwen/Qwen2.5-7B-Instruct", "cuda").replies(["Say yes"]) -> ["Yes."]"""

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        """Reads all but the weights' numbers, and puts a question into tokens. Errors: ValueError for what is no chat
        model, for missing weights, and for a tokenizer, chat template or end tokens that do not fit the network."""
        self.weights, self.device = weights, torch.device(device)
        self.dtype = "float32" if self.device.type == "cpu" else "auto"
        config = pretrained(AutoConfig, weights)
        self.tokenizer = pretrained(AutoTokenizer, weights, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token is None:
            raise ValueError(f"{weights}: the tokenizer has neither a pad nor an end token, so it is no chat model's")
        check_whole(AutoModelForCausalLM, weights)
        self.vocabulary: int = getattr(config.get_text_config(), "vocab_size", 0)
        things = ", ".join([*COLORS, *GENEVAL_OBJECTS])
        example = PROMPT.format(question="What is in the picture?", expected=things, answer="2")
        if example not in self._texts([example])[0]:
            raise ValueError(f"{weights}: the chat template leaves out what the user says; get it again")
        self._tokens([example, "padded"])
        self.ends = self._end_tokens(config)

    @cached_property
    def folder(self) -> Path:
        """Where the files beside the weights lie: for a hub id the snapshot, whose name is its commit."""
        place = Path(self.weights).expanduser()
        return place if place.exists() else Path(snapshot_download(self.weights, allow_patterns=["*config.json"]))

    def _end_tokens(self, config: Any) -> list[int]:
        """Of generation_config.json, else of config.json, else of the tokenizer: transformers' order."""
        known = (self.folder / _GENERATION).is_file()
        read = pretrained(GenerationConfig, self.weights) if known else config.get_text_config()
        told = getattr(read, "eos_token_id", None)
        told = self.tokenizer.eos_token_id if told is None else told
        ends = told if isinstance(told, list) else [] if told is None else [told]
        for end in ends:
            if type(end) is not int or not 0 <= end < self.vocabulary:
                raise ValueError(
                    f"{self.weights}: the end token {end!r} is none of the network's {self.vocabulary} tokens; get "
                    f"{_GENERATION if known else 'config.json'} again"
                )
        return ends

    @cached_property
    def net(self) -> Any:
        """Errors: ValueError for weights that cannot be read, or are not all there."""
        return load_whole(AutoModelForCausalLM, self.weights, self.dtype).to(self.device)

    @cached_property
    def fingerprint(self) -> str:
        """Of the files, which need not be loaded for it: a hub id's commit, or samples of a folder's weights and all of
        its configuration and tokenizer. generation_config.json is left out: of it, `ends` are all that is used."""
        if not Path(self.weights).expanduser().exists():
            return self.folder.name
        digest = hashlib.sha256(fingerprint_of_files(weight_files(self.folder)).encode())
        for file in sorted({file for pattern in _BESIDE for file in self.folder.glob(pattern)}):
            if file.name != _GENERATION:
                digest.update(json.dumps([file.name, hashlib.sha256(file.read_bytes()).hexdigest()]).encode())
        return digest.hexdigest()[:16]

    def key_of(self, row: Mapping[str, Any]) -> str:
        """64 hex digits of what a reply depends on: the fingerprint, the chat template, the end tokens, the dtype, the
        prompt and the row."""
        content = [self.fingerprint, self.tokenizer.chat_template, self.ends, self.dtype, PROMPT, MAX_NEW_TOKENS]
        content += [row["question"], row["expected"], row["answer"]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        """Each prompt as one turn of a user's. Errors: ValueError for a chat template that does not work."""
        if self.tokenizer.chat_template is None:
            return list(prompts)
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # a template is a program
            raise ValueError(f"{self.weights}: the chat template fails{_reason(error)}; get it again") from None

    def _tokens(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask, both [prompts, longest]. Errors: ValueError where the tokenizer cannot read
        them, or knows tokens that the network does not."""
        texts, plain = self._texts(prompts), self.tokenizer.chat_template is None
        try:
            read = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=plain)
            ids = {name: read[name] for name in ("input_ids", "attention_mask")}
            least, most = (int(end) for end in ids["input_ids"].aminmax())
        except Exception as error:  # whatever a value of another kind leads to
            raise ValueError(
                f"{self.weights}: the tokenizer cannot read a question{_reason(error)}; get its files again"
            ) from None
        if least < 0 or most >= self.vocabulary:
            raise ValueError(
                f"{self.weights}: the tokenizer gives token {most if least >= 0 else least}, and the network has "
                f"{self.vocabulary} tokens; get the tokenizer's files again"
            )
        return ids

    @torch.inference_mode()
    def replies(self, prompts: Sequence[str]) -> list[str]:
        """Greedy, the prompts as one turn of a user's. Errors: ValueError for what the network cannot answer."""
        ids = self._tokens(prompts)
        how = GenerationConfig(
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=self.ends or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.net.generation_config = how  # else transformers fills in the checkpoint's, such as a repetition penalty
        try:
            out = self.net.generate(**{name: each.to(self.device) for name, each in ids.items()}, generation_config=how)
            return self.tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        except Exception as error:  # of a damaged configuration, or of the device's memory
            raise ValueError(
                f"{self.weights}: the network cannot answer{_reason(error)}; get the checkpoint again, or take a "
                "smaller one where memory is short"
            ) from None


def _reason(error: Exception) -> str:
    """Its kind and the first line of what it says, in brackets."""
    said = str(error).strip().splitlines()
    return f" ({': '.join([type(error).__name__, *said[:1]])})"


def fingerprint_of_files(files: Sequence[Path]) -> str:
    """16 hex digits of each file's size and of pieces at equal distances, its beginning and its end among them."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with open(file, "rb") as opened:
            for place in range(_SAMPLES):
                opened.seek(max(0, size - 64) * place // (_SAMPLES - 1))
                digest.update(opened.read(64))
    return digest.hexdigest()[:16]


def judge_answers(rows: Sequence[Mapping[str, Any]], model: ChatModel, cache: Path) -> list[tuple[str, bool | None]]:
    """One reply and its verdict a row. Errors: ValueError for weights that cannot be read, or a cache that is not
    ours."""
    file = cache / "replies.jsonl"
    if file.exists():
        mend([file])
    known = read_replies(file)
    keys = [model.key_of(row) for row in rows]
    wanted = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    with progress_bar(Console(stderr=True)) as progress:
        bar = progress.add_task("judging answers", total=len(set(keys)), completed=len(set(keys)) - len(wanted))
        pairs = list(wanted.items())
        for start in range(0, len(pairs), BATCH):
            part = pairs[start : start + BATCH]
            asked = ("question", "expected", "answer")
            replies = model.replies([PROMPT.format(**{name: row[name] for name in asked}) for _, row in part])
            told = [{"key": key, "reply": reply} for (key, _), reply in zip(part, replies, strict=True)]
            append_rows(file, told)
            known |= {each["key"]: each["reply"] for each in told}
            progress.advance(bar, len(part))
    return [(known[key], verdict_of(known[key])) for key in keys]


def read_replies(file: Path) -> dict[str, str]:
    """key -> reply; the file need not be there. Errors: ValueError "file:line: ..." for a row that is not ours."""
    known: dict[str, str] = {}
    for number, row in enumerate(read_jsonl(file) if file.exists() and file.stat().st_size else [], start=1):
        if not isinstance(row.get("key"), str) or not isinstance(row.get("reply"), str):
            raise ValueError(f"{file}:{number} is no reply of a judge: delete it, or choose another --llm-cache")
        known[row["key"]] = row["reply"]
    return known
