"""The scorer and the released files against the golden GenEval cases (verdicts of the official code)."""

import json
import os
from pathlib import Path

import pytest

from openunirl.evaluation.geneval import ScoreParams, iou, keep, official_summary, relations, score, summarize
from openunirl.tasks.geneval import evaluation_prompts
from openunirl.tasks.records import read_jsonl, read_prompts, write_jsonl, write_prompts
from openunirl.types import Detection

GOLDEN = Path(os.environ.get("OPENUNIRL_GOLDEN") or Path(__file__).parents[1] / "golden")


def rows(name):
    return [json.loads(line) for line in (GOLDEN / name).read_text("utf-8").splitlines()]


def objects(case):
    """Detections by class, and the forced color of each by identity (two detections may be equal)."""
    detections, color_by_id = {}, {}
    for name, raws in case["detections"].items():
        detections[name] = [Detection(box=tuple(raw["box"]), score=raw["score"]) for raw in raws]
        color_by_id |= {id(found): raw["color"] for found, raw in zip(detections[name], raws, strict=True)}
    return detections, color_by_id


@pytest.mark.parametrize("case", rows("geneval_cases.jsonl"), ids=lambda case: f"{case['id']}-{case['kind']}")
def test_kept_verdict_and_reason(case):
    params = ScoreParams(**case["params"])
    detections, color_by_id = objects(case)
    kept = {name: keep(found, case["metadata"]["tag"], params) for name, found in detections.items()}
    assert {name: indices for name, indices in kept.items() if indices} == case["expected"]["kept"]
    verdict = score(case["metadata"], detections, lambda _, found: [color_by_id[id(each)] for each in found], params)
    assert (verdict.correct, verdict.reason) == (case["expected"]["correct"], case["expected"]["reason"])


def test_geometry():
    for case in rows("geneval_geometry_cases.jsonl"):
        a, b = case["box_a"], case["box_b"]
        assert list(relations(a, b, case["position_threshold"])) == case["relations"], case
        assert iou(a, b) == pytest.approx(case["iou"], abs=1e-6), case


def test_summary_equals_the_official_one():
    for case in rows("geneval_summary_cases.jsonl"):
        summary = summarize(case["results"])
        scores = {tag: task.accuracy for tag, task in summary.tasks.items()}
        assert list(scores) == list(case["task_scores"])
        assert scores == pytest.approx(case["task_scores"], abs=1e-12)
        assert summary.overall == pytest.approx(case["overall"], abs=1e-12)
        assert official_summary(case["results"]) == case["official_stdout"]


def test_evaluation_prompts_equal_the_official_file(tmp_path):
    write_jsonl(tmp_path / "ours.jsonl", [prompt.metadata() for prompt in evaluation_prompts()])
    assert (tmp_path / "ours.jsonl").read_bytes() == (GOLDEN / "geneval_evaluation_metadata.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["geneval_evaluation_metadata.jsonl", "geneval_evaluation_metadata_qa.jsonl"])
def test_released_files_are_read_and_written_back(name, tmp_path):
    prompts = read_prompts(GOLDEN / name)
    assert [prompt.metadata() for prompt in prompts] == rows("geneval_evaluation_metadata.jsonl")
    assert {len(prompt.questions) for prompt in prompts} == {1 if "_qa" in name else 0}
    write_prompts(tmp_path / name, prompts)
    assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()
    assert read_jsonl(tmp_path / name) == rows(name)
