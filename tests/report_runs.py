"""Run directories to report on, and report pages read back with html.parser."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openunirl.evaluation.run import summarize_rows

TAGS = ("single_object", "counting", "position")
PROMPTS_PER_TAG, Rows = 12, list[dict[str, Any]]
VOID = {"meta", "img", "br", "path", "circle"}
EVIL = "<script>alert('x')</script> & \"quoted\""


class Page(HTMLParser):
    """Elements in order, text by id, table cells by id; fails on tags that do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source, self.body = path.read_text(encoding="utf-8"), ""
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.open: list[tuple[str, dict[str, Any]]] = []
        self.rows: dict[str, list[list[str]]] = defaultdict(list)
        self.texts: dict[str, str] = {}
        self.feed(self.source)
        assert not self.open, f"never closed: {self.open}"
        self.images = [attrs for tag, attrs in self.elements if tag == "img"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open += [(tag, dict(attrs))] if tag not in VOID else []
        table = next((a["id"] for t, a in reversed(self.open) if t == "table" and a.get("id")), None)
        if table and tag == "tr":
            self.rows[table].append([])
        elif table and tag in ("td", "th"):
            self.rows[table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or (self.open and self.open.pop()[0] == tag), f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        data = data.replace("\xa0", " ") if all(tag != "style" for tag, _ in self.open) else ""
        self.body += data
        for tag, name in [(tag, attrs["id"]) for tag, attrs in self.open if attrs.get("id")]:
            self.texts[name] = self.texts.get(name, "") + data
            if tag == "table" and any(t in ("td", "th") for t, _ in self.open):
                self.rows[name][-1][-1] += data

    def row(self, table: str, name: str) -> list[str]:
        return next(row for row in self.rows[table] if row and row[0].strip() == name)


def report_rows(right: dict[str, int], answered: float, seed: int, samples: int = 1) -> Rows:
    """The first `right[tag]` slots of each tag are right; share `answered` of the others is answered as if it were."""
    rng, rows = np.random.default_rng(seed), []
    for index, sample in itertools.product(range(PROMPTS_PER_TAG * len(TAGS)), range(samples)):
        tag, place = TAGS[index % len(TAGS)], index // len(TAGS)
        correct = place < right[tag]
        agrees = correct or bool(rng.random() < answered)
        asked = {"tag": tag, "prompt": f"a photo of {tag} {place % 4}", "question": "what is there?"}
        told = {"expected": "circle", "answer": "circle" if agrees else "star", "answer_correct": agrees}
        judged = {"correct": correct, "reason": "" if correct else "expected circle>=1, found 0"}
        place = {"filename": f"{index:05d}/samples/{sample:04d}.png", "index": index, "sample": sample}
        rows.append({**asked, **told, **judged, **place})
    return rows


def references(wrong: int) -> Rows:
    keep = ("tag", "prompt", "question", "expected", "answer", "index")
    rows = [{key: row[key] for key in keep} for row in report_rows(dict.fromkeys(TAGS, 99), 0, 0)]
    return [row | {"answer_correct": i >= wrong} for i, row in enumerate(rows)]


def write(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    write(path, [change(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()])


def write_side(run: Path, when: str, rows: Rows, references: Rows, size: int = 16) -> None:
    folder = run / "evaluation" / when
    for row in rows:
        path = folder / row["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (40 if when == "before" else 200, row["index"], 0)).save(path)
    write(folder / "results.jsonl", rows)
    write(folder / "references.jsonl", references)
    summary = summarize_rows(rows, references, "oracle", seed=0, sampling={"num_timesteps": 16})
    write(run / "evaluation" / f"{when}.json", [summary])


BEFORE = {"single_object": 6, "counting": 3, "position": 2}
AFTER = {"single_object": 11, "counting": 8, "position": 6}


def write_run(run: Path) -> Path:
    """A run directory with both evaluations, metrics and configuration; returns it."""
    write_side(run, "before", report_rows(BEFORE, 0.3, 1), references(2))
    write_side(run, "after", report_rows(AFTER, 0.3, 2), references(3))
    small = {"eval/geneval": 0.4, "eval/collusion_gap": 0.1, "eval/imbalance": 0.3}
    metrics = [{"step": s, "reward": s / 40, "kl": 0.1, "grad_norm": 1.0, "images": 64 * s} for s in range(1, 31)]
    write(run / "metrics.jsonl", metrics + [{"step": s, **small} for s in (10, 20)])
    config = {"model": {"weights": "tiny-showo", "family": None}, "loss": {"beta": 0.02}, "seed": 7}
    config |= {"command": "openunirl train tiny --seed 7", "commit": "abc1234", "versions": {"torch": "9.9.9"}}
    write(run / "config.json", [config])
    return run
