"""The report's content: pictures, curves, escaping, what is missing."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openunirl.evaluation.intervals import paired_shares, wilson
from openunirl.report import in_words, write_report
from report_runs import (
    AFTER,
    BEFORE,
    EVIL,
    TAGS,
    Page,
    edit,
    references,
    report_rows,
    write,
    write_run,
    write_side,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo")


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
    mean, _, high = paired_shares(3, 5, 0, 4)  # widened to 0: of 5 that changed, the exact test gives p = 0.0625
    assert change == f"{100 * mean:+.1f}+0.0 to {100 * high:+.1f}"
    assert page.row("geneval-table", "overall")[4:6] == ["36", "12"]
    _, before, after, change, n, *_ = page.row("understanding-table", "overall")
    assert (before[:6], after[:6], change[:4], n) == ("94.4 %", "91.7 %", "−2.8", "36")


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
    write(run / "config.json", [{"reward": {"shuffle": True}}])
    assert "This is a control." in Page(write_report(run)).texts["control"]


def test_everything_is_escaped(run: Path) -> None:
    evil = dict.fromkeys(("prompt", "question", "expected", "answer", "reason"), EVIL)
    for when in ("before", "after"):
        edit(run / "evaluation" / when / "results.jsonl", lambda row: row | evil)
    parts = {"command": EVIL, "commit": EVIL, "versions": {EVIL: EVIL}, EVIL: [EVIL], "loss": {EVIL: EVIL}}
    edit(run / "config.json", lambda config: config | parts)
    page = Page(write_report(run))
    assert "script" not in {tag for tag, _ in page.elements} and "<script" not in page.source
    assert page.body.count(EVIL) > 20 and all(set(attrs) <= {"src", "alt", "class"} for attrs in page.images)
    assert {attrs["alt"] for attrs in page.images} == {f"before: {EVIL}", f"after: {EVIL}"}
    edit(run / "evaluation" / "after" / "results.jsonl", lambda row: row | {"answer": "\ud800 lone"})
    assert "? lone" in Page(write_report(run)).body


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


def test_large_pictures_are_reduced(run: Path) -> None:
    write_side(run, "after", report_rows(AFTER, 0.3, 2), references(3), size=600)
    image = Page(write_report(run)).images[1]
    assert _pixels(image).shape == (256, 256, 3) and "class" not in image


def test_pictures_outside_the_run_missing_or_damaged(run: Path) -> None:
    Image.new("RGB", (8, 8)).save(run.parent / "secret.png")
    edit(run / "evaluation" / "after" / "results.jsonl", lambda row: row | {"filename": "../../../secret.png"})
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
    shown = ["Self-reward in training", "Small evaluations", "Collusion gap", "Imbalance"]
    shown += ["KL to the base", "Gradient norm"]
    assert [label.split(" over ")[0] for label, _ in drawn] == shown
    assert drawn[0][0].endswith("over 30 steps: from 0.025 to 0.75")
    assert len(re.findall(r"h0", drawn[0][1])) == 30
    for _, body in drawn:
        assert ">step</text>" in body
        paths = " ".join(re.findall(r'class="(?:curve|dots)[^>]*', body))
        for x, y in re.findall(r"[ML]([\d.e+-]+) ([\d.e+-]+)", paths):
            assert 49.9 <= float(x) <= 346.1 and 25.9 <= float(y) <= 168.1


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
