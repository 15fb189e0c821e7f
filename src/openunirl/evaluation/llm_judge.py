"""A chat model of transformers that judges whether an answer means the gold answer, instead of the rules.

    rows (question, expected, answer) -> PROMPT -> chat model, greedy -> reply -> verdict_of -> True, False or None

In: rows, a checkpoint with a chat template (without one the prompt is sent as it is). Out: one reply and verdict a row;
None where the reply is neither "same" nor "different": it counts as wrong, and as unsettled. Replies are kept in a
folder by content - weights, chat template, dtype, prompt, question, both answers - so that no question is put twice, by
this evaluation or another; the network is read when the first question is new.

Source: UniRL (arXiv 2505.23380), whose judge is Qwen2.5-7B-Instruct. Departures: 1. the wording is ours; 2. greedy
decoding; 3. officially every reply but "same" is "not same"; here, what cannot be read is counted; 4. models that think
are told not to, and what they think all the same is left out.
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from openunirl.evaluation.journal import append_rows, mend
from openunirl.evaluation.weights import check_files, pretrained
from openunirl.generate import progress_bar
from openunirl.models.checkpoints import weight_files
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
        """Reads the configuration and the tokenizer, and whether a folder's weight files are whole. Errors: ValueError
        for what is no chat model."""
        self.weights, self.device = weights, torch.device(device)
        self.dtype = "float32" if self.device.type == "cpu" else "auto"
        pretrained(AutoConfig, weights)
        self.tokenizer = pretrained(AutoTokenizer, weights, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token is None:
            raise ValueError(f"{weights}: the tokenizer has neither a pad nor an end token, so it is no chat model's")
        check_files(AutoModelForCausalLM, weights)

    @cached_property
    def net(self) -> Any:
        """Errors: ValueError for weights that cannot be read."""
        return pretrained(AutoModelForCausalLM, self.weights, dtype=self.dtype).to(self.device).eval()

    @cached_property
    def fingerprint(self) -> str:
        """Of the files, which need not be loaded for it: a folder's weights, or a hub id's commit."""
        if not Path(self.weights).expanduser().exists():
            return Path(snapshot_download(self.weights, allow_patterns=["config.json"])).name
        return fingerprint_of_files(weight_files(Path(self.weights).expanduser()))

    def key_of(self, row: Mapping[str, Any]) -> str:
        """64 hex digits of all that a reply depends on."""
        content = [self.fingerprint, self.tokenizer.chat_template, self.dtype, PROMPT, MAX_NEW_TOKENS]
        content += [row["question"], row["expected"], row["answer"]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @torch.inference_mode()
    def replies(self, prompts: Sequence[str]) -> list[str]:
        """Greedy, the prompts as one turn of a user's."""
        texts = list(prompts)
        chat = bool(self.tokenizer.chat_template)
        if chat:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            texts = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        ids = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat)
        ids = {name: ids[name].to(self.device) for name in ("input_ids", "attention_mask")}
        pad = self.tokenizer.pad_token_id
        out = self.net.generate(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=pad)
        return self.tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)


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
