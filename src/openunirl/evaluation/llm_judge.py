"""A chat model of transformers that judges whether an answer means the gold answer, instead of the rules.

    rows (question, expected, answer) -> PROMPT -> chat model, greedy -> reply -> verdict_of -> True, False or None

In: rows, a checkpoint with a chat template (without one the prompt is sent as it is). Out: one verdict a row; None
where the reply is neither "same" nor "different": it counts as wrong, and as unsettled. Replies are kept in a folder by
content - weights, prompt, question, both answers - so that no question is put twice, by this evaluation or another.

Source: UniRL (arXiv 2505.23380), whose judge is Qwen2.5-7B-Instruct. Departures: 1. the wording is ours; 2. greedy
decoding; 3. officially every reply but "same" is "not same"; here, what cannot be read is counted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from openunirl.evaluation.detectors import pretrained
from openunirl.evaluation.image_scores import append_rows, mend
from openunirl.generate import fingerprint_of, progress_bar
from openunirl.tasks.records import read_jsonl

PROMPT = (
    "A picture was asked about: {question}\nThe right answer: {expected}\nThe answer that was given: {answer}\n"
    "Does the given answer mean the right answer? Other words for the same thing are fine. "
    'Reply with one word: "same" or "different".'
)
MAX_NEW_TOKENS = 8
BATCH = 16


def verdict_of(reply: str) -> bool | None:
    """True for "same" or "yes", False for "different", "not (the) same" or "no", by the reply's first words.

    Example: verdict_of('"Same."') is True; verdict_of("Not the same") is False; verdict_of("Well") is None
    """
    words = re.findall(r"[a-z]+", reply.lower())
    if words[:1] in (["different"], ["no"]) or words[:2] == ["not", "same"] or words[:3] == ["not", "the", "same"]:
        return False
    return True if words[:1] in (["same"], ["yes"]) else None


class ChatModel:
    """Example: ChatModel("Qwen/Qwen2.5-7B-Instruct", "cuda").replies(["Say yes"]) -> ["Yes."]"""

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        """Errors: ValueError for what cannot be read as a chat model."""
        self.tokenizer = pretrained(AutoTokenizer, weights, padding_side="left")
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        net: Any = pretrained(AutoModelForCausalLM, weights, dtype=dtype)
        self.net = net.to(device).eval()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token is None:
            raise ValueError(f"{weights}: the tokenizer has neither a pad nor an end token, so it is no chat model's")
        self.fingerprint = fingerprint_of(self.net.parameters())

    @torch.inference_mode()
    def replies(self, prompts: Sequence[str]) -> list[str]:
        """Greedy, the prompts as one turn of a user's."""
        texts = list(prompts)
        chat = bool(self.tokenizer.chat_template)
        if chat:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            texts = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat)
        ids = {name: ids[name].to(self.net.device) for name in ("input_ids", "attention_mask")}
        pad = self.tokenizer.pad_token_id
        out = self.net.generate(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=pad)
        return self.tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def key_of(fingerprint: str, row: Mapping[str, Any]) -> str:
    """64 hex digits of all that a reply depends on."""
    content = [fingerprint, PROMPT, MAX_NEW_TOKENS, row["question"], row["expected"], row["answer"]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def judge_answers(
    rows: Sequence[Mapping[str, Any]], weights: str, cache: Path, device: torch.device | str = "cpu"
) -> list[bool | None]:
    """One verdict a row. Errors: ValueError for weights that cannot be read, or a cache that is not ours."""
    file = cache / "replies.jsonl"
    if file.exists():
        mend([file])
    known = _read(file)
    model = ChatModel(weights, device)
    keys = [key_of(model.fingerprint, row) for row in rows]
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
    return [verdict_of(known[key]) for key in keys]


def _read(file: Path) -> dict[str, str]:
    """key -> reply."""
    known: dict[str, str] = {}
    for number, row in enumerate(read_jsonl(file) if file.exists() and file.stat().st_size else [], start=1):
        if not isinstance(row.get("key"), str) or not isinstance(row.get("reply"), str):
            raise ValueError(f"{file}:{number} is no reply of a judge: delete it, or choose another --llm-cache")
        known[row["key"]] = row["reply"]
    return known
