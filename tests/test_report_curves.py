"""Learning curves are called what they are."""

from openunirl.compare import write_comparison
from openunirl.report import write_report
from report_runs import AFTER, Page, references, report_rows, write, write_side


def make_run(folder, rollout, **loss):
    folder.mkdir(exist_ok=True)
    write(folder / "metrics.jsonl", [{"step": s, "reward": 0.5, "frac_reward_zero_std": 1.0} for s in range(1, 5)])
    config = {"rollout": rollout, "reward": {"sources": ["self"]}, "loss": loss, "resumed": ["train --resume"]}
    write(folder / "config.json", [config])
    return folder


def test_groups_of_one_and_pictures_of_the_base_are_told_as_what_they_are(tmp_path):
    ours = Page(write_report(make_run(tmp_path / "ours", {"num_generations": 8, "drawn_by": "policy"}))).texts["curves"]
    assert "Groups without signal" in ours and "Self-reward in training" in ours and "Groups of one" not in ours
    page = Page(write_report(make_run(tmp_path / "theirs", {"num_generations": 1, "drawn_by": "base"})))
    theirs = page.texts["curves"]
    assert "Groups without signal" not in theirs and "Groups of one: each prompt was drawn once" in theirs
    assert "Reward in training, on the base’s pictures" in theirs and "Self-reward in training" not in theirs
    assert "train --resume" in page.texts["run"] and "resumed" not in [row[0] for row in page.rows["settings"]]


def test_steps_that_only_collect_are_told(tmp_path):
    told = "begin at that step: before it, pictures were only collected"
    plain, replayed = (
        Page(write_report(make_run(tmp_path / str(n), {"drawn_by": "base"}, replay_steps=n))).texts["curves"]
        for n in (0, 3)
    )
    assert told not in plain and f"kept in the last 3 steps, and {told}" in replayed


def test_a_comparison_says_whose_pictures_were_rewarded(tmp_path):
    runs = [make_run(tmp_path / who, {"drawn_by": who}) for who in ("policy", "base")]
    for run in runs:
        write_side(run, "after", report_rows(AFTER, 0.3, 2), references(3))
    page = write_comparison(runs, tmp_path / "comparison.html").read_text(encoding="utf-8")
    told = "the base drew its training pictures, which its reward in training is about"
    assert f"base: {told}" in page and f"policy: {told}" not in page and "Self-reward in training" not in page
