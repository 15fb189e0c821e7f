"""The report's content, read back with html.parser: numbers, intervals, pictures, curves, escaping, what is missing."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from openunirl.evaluation.intervals import paired_difference, wilson
from openunirl.evaluation.run import summarize_rows
from openunirl.report import choose, curve, in_words, write_report
from openunirl.report_numbers import paired_changes, summary_table

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


def _rows(right: dict[str, int], answered: float, seed: int, samples: int = 1) -> Rows:
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


def _references(wrong: int) -> Rows:
    keep = ("tag", "prompt", "question", "expected", "answer", "index")
    rows = [{key: row[key] for key in keep} for row in _rows(dict.fromkeys(TAGS, 99), 0, 0)]
    return [row | {"answer_correct": i >= wrong} for i, row in enumerate(rows)]


def _write(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    _write(path, [change(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()])


def _write_side(run: Path, when: str, rows: Rows, references: Rows, size: int = 16) -> None:
    folder = run / "evaluation" / when
    for row in rows:
        path = folder / row["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (40 if when == "before" else 200, row["index"], 0)).save(path)
    _write(folder / "results.jsonl", rows)
    _write(folder / "references.jsonl", references)
    summary = summarize_rows(rows, references, "oracle", seed=0, sampling={"num_timesteps": 16})
    _write(run / "evaluation" / f"{when}.json", [summary])


BEFORE = {"single_object": 6, "counting": 3, "position": 2}
AFTER = {"single_object": 11, "counting": 8, "position": 6}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "demo"
    _write_side(run, "before", _rows(BEFORE, 0.3, 1), _references(2))
    _write_side(run, "after", _rows(AFTER, 0.3, 2), _references(3))
    small = {"eval/geneval": 0.4, "eval/collusion_gap": 0.1}
    metrics = [{"step": s, "reward": s / 40, "kl": 0.1, "grad_norm": 1.0, "images": 64 * s} for s in range(1, 31)]
    _write(run / "metrics.jsonl", metrics + [{"step": s, **small} for s in (10, 20)])
    config = {"model": {"weights": "tiny-showo", "family": None}, "loss": {"beta": 0.02}, "seed": 7}
    config |= {"command": "openunirl train tiny --seed 7", "commit": "abc1234", "versions": {"torch": "9.9.9"}}
    _write(run / "config.json", [config])
    return run


def test_page_is_self_contained(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    assert page.source == write_report(run).read_text(encoding="utf-8")
    assert path == run / "report.html" and path.stat().st_size < 3_000_000
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    for name, value in ((name, str(value)) for _, attrs in page.elements for name, value in attrs.items()):
        assert name not in ("src", "href", "srcset", "data", "action") or value.startswith(("data:image/", "#"))
        assert not name.startswith("on")
    assert "@import" not in page.source and "url(" not in page.source and "http:" not in page.source
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "evaluation", "metrics.jsonl", "report.html"]
    ids = Counter(attrs["id"] for _, attrs in page.elements if "id" in attrs)
    links = {attrs["href"][1:] for tag, attrs in page.elements if tag == "a"}
    assert set(ids.values()) == {1} and links and links <= ids.keys()


def test_verdict_states_the_numbers(run: Path) -> None:
    verdict = " ".join(Page(write_report(run)).texts["verdict"].split())
    before, after = (sum(side.values()) / 36 for side in (BEFORE, AFTER))
    shares = f"from {100 * before:.1f} % to {100 * after:.1f} % (+{100 * (after - before):.1f} points"
    assert verdict.startswith(f"Drawing rose {shares}, 95 % interval +")
    assert "understanding did not measurably change: 94.4 % before, 91.7 % after (−2.8 points" in verdict
    assert "imbalance score fell from" in verdict and "collusion gap" in verdict
    assert verdict.count(". ") == 0 and verdict.endswith(".")


def test_tables(run: Path) -> None:
    page = Page(write_report(run))
    assert [row[0] for row in page.rows["geneval-table"][1:]] == ["single object", "counting", "position", "overall"]
    _, before, after, change, n, prompts, _ = page.row("geneval-table", "counting")
    low, high = wilson(8, 12)
    assert (before[:6], after, n, prompts) == ("25.0 %", f"66.7 %{100 * low:.1f} to {100 * high:.1f}", "12", "4")
    a, b = ([place < side["counting"] for place in range(12)] for side in (AFTER, BEFORE))
    mean, low, high = paired_difference(a, b, rng=np.random.default_rng(0), num_resamples=5000)
    assert change == f"{100 * mean:+.1f}{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−")
    assert page.row("geneval-table", "overall")[4:6] == ["36", "12"]
    _, before, after, change, n, *_ = page.row("understanding-table", "overall")
    assert (before[:6], after[:6], change[:4], n) == ("94.4 %", "91.7 %", "−2.8", "36")


def test_imbalance_counts_rates_and_score(run: Path) -> None:
    page = Page(write_report(run))
    summary = json.loads((run / "evaluation" / "after.json").read_text(encoding="utf-8"))["imbalance"]
    cells = page.row("imbalance-table", "overall")
    assert cells[4].startswith(f"{100 * summary['image_wrong_given_answer_right']:.1f} %") and "n = 33" in cells[4]
    assert cells[6].startswith(f"{100 * summary['score']:.1f} %")
    quads = re.findall(r'<table class="quad"><caption>(.*?)</caption>(.*?)</table>', page.source, re.DOTALL)
    assert len(quads) == 4 * (1 + len(TAGS))
    numbers = {title: [int(x) for x in re.findall(r">(\d+)</td>", table)] for title, table in quads[:4]}
    order = [f"image_{i}_answer_{a}" for i in ("right", "wrong") for a in ("right", "wrong")]
    assert numbers["own pictures, after"] == [summary["own_images"][key] for key in order]
    assert numbers["reference pictures, after"] == [summary["reference_images"][key] for key in order]


def test_configuration_command_and_versions(run: Path) -> None:
    page = Page(write_report(run))
    assert {row[0]: row[1] for row in page.rows["settings"]} == {
        "loss.beta": "0.02",
        "model.weights": "tiny-showo",
        "model.family": "–",
        "seed": "7",
    }
    assert "openunirl train tiny --seed 7" in page.texts["run"]
    assert "abc1234" in page.texts["run"] and "torch 9.9.9" in page.texts["run"] and "control" not in page.texts
    _write(run / "config.json", [{"reward": {"shuffle": True}}])
    assert "This is a control." in Page(write_report(run)).texts["control"]


def test_everything_is_escaped(run: Path) -> None:
    evil = dict.fromkeys(("prompt", "question", "expected", "answer", "reason"), EVIL)
    for when in ("before", "after"):
        _edit(run / "evaluation" / when / "results.jsonl", lambda row: row | evil)
    parts = {"command": EVIL, "commit": EVIL, "versions": {EVIL: EVIL}, EVIL: [EVIL], "loss": {EVIL: EVIL}}
    _edit(run / "config.json", lambda config: config | parts)
    page = Page(write_report(run))
    assert "script" not in {tag for tag, _ in page.elements} and "<script" not in page.source
    assert page.body.count(EVIL) > 20 and all(set(attrs) <= {"src", "alt", "class"} for attrs in page.images)
    assert {attrs["alt"] for attrs in page.images} == {f"before: {EVIL}", f"after: {EVIL}"}
    _edit(run / "evaluation" / "after" / "results.jsonl", lambda row: row | {"answer": "\ud800 lone"})
    assert "? lone" in Page(write_report(run)).body


@pytest.mark.parametrize("before, after, grows", [(0, 1, True), (1, 0, False), (1, 1, False), (0, 0, False)])
def test_a_growing_gap_is_called_collusion(run: Path, before: float, after: float, grows: bool) -> None:
    for when, answered in (("before", before), ("after", after)):
        _write_side(run, when, _rows(BEFORE, answered, 2), _references(3))
    page = Page(write_report(run))
    assert ("this run shows collusion" in page.texts["verdict"]) == grows
    assert ("This run shows collusion." in page.body) == grows == ("collusion" in page.texts)
    if grows:
        assert "grew from 0.0 to 69.4 points (+69.4 points, 95 % interval" in page.texts["collusion"]
        assert "may be chance" not in page.texts["collusion"]
        rows = _rows(BEFORE, 0, 2)
        next(row for row in rows if not row["correct"])["answer_correct"] = True
        _write_side(run, "after", rows, _references(3))
        assert "may be chance" in Page(write_report(run)).texts["collusion"]


def test_changes_average_the_images_of_a_prompt_and_weigh_tasks_equally() -> None:
    few = {i for i in range(18, 36) if TAGS[i % 3] == "counting"}  # so that tasks have different sizes
    before, after = ([r for r in _rows(x, 0, 0, samples=2) if r["index"] not in few] for x in (BEFORE, AFTER))
    after = [row | {"correct": row["correct"] or row["sample"] == 1} for row in after]
    found = paired_changes({"generated": before, "references": []}, {"generated": after, "references": []})
    old, new = (summarize_rows(rows, _references(0), "oracle")["geneval"] for rows in (before, after))
    mean, low, high = found["geneval", ""]
    assert mean == pytest.approx(new["overall"] - old["overall"]) and low < mean < high
    a, b = ([1.0 if place < 6 else 0.5 for place in range(12)], [place < 2 for place in range(12)])
    assert found["geneval", "position"] == paired_difference(a, b, rng=np.random.default_rng(0), num_resamples=5000)
    assert ("understanding", "") not in found


def test_sides_that_do_not_belong_together(run: Path) -> None:
    for field, value in [("prompt", "other"), ("correct", True)]:
        _write(run / "evaluation" / "after" / "results.jsonl", [row | {field: value} for row in _rows(AFTER, 0.3, 2)])
        page = Page(write_report(run))
        assert page.row("geneval-table", "overall")[3].endswith("no interval")
        assert not page.row("understanding-table", "overall")[3].endswith("no interval")
    _edit(run / "evaluation" / "after.json", lambda side: side | {"sampling": {"num_timesteps": 8}, "seed": 5})
    page = Page(write_report(run))
    assert "differ in sampling" in page.texts["problems"] and "in seed: 0 before, 5 after" in page.texts["problems"]
    assert "same prompts with the same seeds" not in page.body


def _pixels(image: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].split(";base64,")[1]))))


def test_pictures_are_pairs_of_the_same_prompt(run: Path) -> None:
    images = Page(write_report(run)).images
    assert len(images) == 2 * 4 * len(TAGS)
    for before, after in zip(images[::2], images[1::2], strict=True):
        old, new = (_pixels(image)[0, 0].tolist() for image in (before, after))
        assert (old[0], new[0]) == (40, 200) and old[1] == new[1]  # each side's own picture, of the same index
        assert before["alt"].removeprefix("before: ") == after["alt"].removeprefix("after: ")
        assert before["class"] == after["class"] == "hard"


def test_cards_carry_both_verdicts(run: Path) -> None:
    source = write_report(run).read_text(encoding="utf-8")
    outcomes = Counter(re.findall(r'<span class="outcome">([^<0-9]*)</span></p>', source))
    assert outcomes == {"stayed wrong": 4, "wrong → right": 4, "stayed right": 4}  # 11, 14 and 11 of 36 happened
    assert "12 prompts and seeds: 1 stayed wrong, 5 wrong → right, 6 stayed right" in source
    assert source.count('<span class="mark no">✗ wrong</span><small>circle: wanted 1, found 0</small>') == 12
    assert source.count('<span class="mark yes">✓ circle</span>') + source.count("✗ star</span>") == 24


def test_choice_is_in_proportion() -> None:
    rng = np.random.default_rng(0)
    for number, offset in ((4, 0.5), (7, 0.1), (10, 0.99)):
        outcomes = rng.integers(4, size=57).tolist()
        chosen = choose(outcomes, number, offset)
        assert len(set(chosen)) == number
        for outcome in range(4):
            share = outcomes.count(outcome) * number / len(outcomes)
            assert math.floor(share) <= sum(outcomes[i] == outcome for i in chosen) <= math.ceil(share)
    assert (sorted(choose([1, 0], 4, 0.9)), choose([], 4, 0.5)) == ([0, 1], [])


def test_large_pictures_are_reduced(run: Path) -> None:
    _write_side(run, "after", _rows(AFTER, 0.3, 2), _references(3), size=600)
    image = Page(write_report(run)).images[1]
    assert _pixels(image).shape == (256, 256, 3) and "class" not in image


def test_pictures_outside_the_run_missing_or_damaged(run: Path) -> None:
    Image.new("RGB", (8, 8)).save(run.parent / "secret.png")
    _edit(run / "evaluation" / "after" / "results.jsonl", lambda row: row | {"filename": "../../../secret.png"})
    shutil.rmtree(run / "evaluation" / "before" / "00000")
    for picture in (run / "evaluation" / "before").glob("*/samples/*.png"):
        picture.write_bytes(b"no picture")
    page = Page(write_report(run))
    assert not page.images and page.body.count("no picture") >= 24
    assert "is no readable picture" in page.texts["problems"] and "more" in page.texts["problems"]


def test_reasons_in_words() -> None:
    words = {
        "expected circle>=1, found 0": "circle: wanted 1, found 0",
        "expected red cup>=1, found 0 red; and 1 blue, 2 tan": "red cup: wanted 1, found 0; seen: 1 blue, 2 tan",
        "expected star<4, found 5": "star: wanted fewer than 4, found 5",
        "expected ring left of target, found above and below target": "ring: not left of but above and below the other",
        "expected ring above target, found  target": "ring: not clearly above the other",
        "no target for ring to be left of": "ring: nothing to be left of",
        "expected a>=1, found 0\nexpected b>=1, found 0": "a: wanted 1, found 0; b: wanted 1, found 0",
        "something else": "something else",
    }
    assert {reason: in_words(reason) for reason in words} == words


def test_curves_draw_what_was_recorded(run: Path) -> None:
    source = write_report(run).read_text(encoding="utf-8")
    drawn = re.findall(r'<svg viewBox="0 0 360 206" role="img" aria-label="(.*?)">(.*?)</svg>', source, re.DOTALL)
    shown = ["Self-reward in training", "Small evaluations", "Collusion gap", "KL to the base", "Gradient norm"]
    assert [label.split(" over ")[0] for label, _ in drawn] == shown
    assert drawn[0][0].endswith("over 30 steps: from 0.025 to 0.75")
    assert len(re.findall(r"h0", drawn[0][1])) == 30
    for _, body in drawn:
        assert ">step</text>" in body
        paths = " ".join(re.findall(r'class="(?:curve|dots)[^>]*', body))
        for x, y in re.findall(r"[ML]([\d.e+-]+) ([\d.e+-]+)", paths):
            assert 49.9 <= float(x) <= 346.1 and 25.9 <= float(y) <= 168.1


def test_curve_smooths_skips_and_thins() -> None:
    rows: list[dict[str, Any]] = [{"step": s, "reward": float(s % 2)} for s in range(3000)]
    rows += [{"step": step, "reward": value} for step, value in ((7, 5.0), (8, math.nan), (9, "x"), ("10", 1.0))]
    found = curve(rows, {"reward": "own"})
    (line,) = found["lines"]
    assert len(line["raw"]) <= 401 and line["raw"][-1] == (2999, 1.0)
    assert np.std([v for _, v in line["smooth"]][50:]) < 0.1 * np.std([v for _, v in line["raw"]])
    assert line["smooth"][-1][1] == pytest.approx(0.5, abs=0.05)
    assert found["y"][1] >= 5  # the last telling of step 7
    assert curve(rows, {"nothing": ""}) is None
    found = curve([{"step": 3, "kl": 0.0}], {"kl": ""}, (0,))
    assert found["y"][0] <= 0 < found["y"][1] and found["x"][0] == 3 < found["x"][1]
    assert found["lines"][0]["raw"] == [(3, 0.0)]


def test_damaged_lines_are_counted_and_a_damaged_summary_is_as_none(run: Path) -> None:
    assert "problems" not in Page(write_report(run)).texts
    (run / "evaluation" / "before.json").write_text('{"geneval": 5, "understanding": {"tasks": []}, "sampling": 3}')
    results, metrics = run / "evaluation" / "after" / "results.jsonl", run / "metrics.jsonl"
    results.write_bytes(results.read_bytes() + b'{"tag": "counting"}\n')
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 31, "rew\n\n[1]\n{"reward": 1}\n{"step": "4"}\n\xff\xfe\n')
    page = Page(write_report(run))
    assert "metrics.jsonl: 5 damaged lines skipped" in page.texts["problems"]
    assert "evaluation/after/results.jsonl: 1 damaged line skipped" in page.texts["problems"]
    assert page.row("geneval-table", "overall")[1] == "–"


def test_without_the_evaluation_before(run: Path) -> None:
    shutil.rmtree(run / "evaluation" / "before")
    (run / "evaluation" / "before.json").unlink()
    page = Page(write_report(run))
    assert "evaluation/before.json is missing" in page.texts["problems"]
    assert "After training the model drew 69.4 % right" in page.texts["verdict"]
    assert len(page.images) == 4 * len(TAGS)
    assert page.row("geneval-table", "overall")[1] == "–"


def test_without_any_evaluation_then_without_anything(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    (run / "config.json").write_text("{broken", encoding="utf-8")
    page = Page(write_report(run))
    for problem in ("config.json is damaged", "evaluation/before.json is missing", "evaluation/after.json is missing"):
        assert problem in page.texts["problems"]
    assert "training curves only" in page.texts["verdict"] and "not recorded" in page.texts["run"]
    (run / "report.html").unlink()
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    for folder, metrics in ((run, ""), (run / "absent", "metrics.jsonl is missing.*")):
        wanted = f"{re.escape(str(folder))} .*{metrics}evaluation/before.json is missing.*after.json is missing"
        with pytest.raises(ValueError, match=wanted):
            write_report(folder)
        assert not (folder / "report.html").exists()


def test_summary_table(run: Path) -> None:
    before, after = (json.loads((run / "evaluation" / f"{when}.json").read_text()) for when in ("before", "after"))
    after["geneval"]["tasks"]["[red]odd"] = after["geneval"]["tasks"]["counting"]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(summary_table(before, after))
    printed = console.export_text()
    assert "…" not in printed  # nothing is cut off at 80 columns
    lines = {line.strip().split("  ")[0]: line.split() for line in printed.splitlines()}
    low, high = (f"{100 * end:.0f}" for end in wilson(8, 12))
    assert lines["counting"] == ["counting", "25.0", "(9..53)", "12", "66.7", f"({low}..{high})", "12", "+41.7"]
    assert lines["Collusion gap"][2] == f"{100 * before['collusion_gap']:.1f}" and lines["Collusion gap"][4] == "36"
    assert {"[red]odd", "Drawing (GenEval)", "Understanding", "Self-reward", "Imbalance score"} <= lines.keys()
    console.print(summary_table({}, after))
    assert re.search(r"Drawing \(GenEval\) +- +- +69\.4 \(\d+\.\.\d+\) +36 +-", console.export_text())
