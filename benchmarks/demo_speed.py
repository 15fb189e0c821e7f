"""Whether training became faster or slower between two commits: the same steps of the same run, by turns.

    python benchmarks/demo_speed.py BEFORE [--after HEAD] [--preset tiny-showo-sft] [--steps 8] [--repeats 3]
        [--flags "..."] [--before-flags "..."] [--after-flags "..."]

Both commits are checked out into a folder of their own that is deleted at the end, and `openunirl train` runs in each
with this environment's libraries. Presets change: name with the flags what both shall do, each in its own spelling, and
the weights of one of them ({before} and {after} stand for the two folders). Compared are the medians of the steps'
`seconds` in metrics.jsonl, without the first two steps; evaluations are not part of it. The rewards of the first step
are printed: where both draw the same pictures they are equal.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import header, parser

WARM_UP = 2  # steps
SMALL = "--eval.num-images 1 --eval.num-prompts 6 --eval.num-references 6"


def check_out(commit: str, folder: Path) -> Path:
    root = Path(__file__).resolve().parents[1]
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", str(root), str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", "--detach", commit], check=True)
    return folder


def train(code: Path, out: Path, preset: str, flags: list[str]) -> list[dict[str, float]]:
    """The run's metrics, one entry a step."""
    command = [sys.executable, "-m", "openunirl.cli", "train", preset, "--output-dir", str(out), *flags]
    environment = os.environ | {"PYTHONPATH": str(code / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} with {code} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [step for step in steps if "seconds" in step]


def main() -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("before", help="a commit")
    options.add_argument("--after", default="HEAD")
    options.add_argument("--preset", default="tiny-showo-sft")
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--flags", default="")
    options.add_argument("--before-flags", default="")
    options.add_argument("--after-flags", default="")
    args = options.parse_args()
    args.steps = WARM_UP + 1 if args.short else args.steps
    assert args.steps > WARM_UP, f"--steps {args.steps}: the first {WARM_UP} are not counted"
    header(args.seed)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        sides = {
            name: (check_out(commit, work / name), f"{args.flags} {own}")
            for name, commit, own in (
                ("before", args.before, args.before_flags),
                ("after", args.after, args.after_flags),
            )
        }
        folders = {name: str(code) for name, (code, _) in sides.items()}
        for name, code in folders.items():
            told = subprocess.run(["git", "-C", code, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
            print(f"{name}: {told.stdout.strip()}")
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(args.repeats):
            for name, (code, flags) in sides.items():
                told = shlex.split(
                    f"{SMALL} --train.max-steps {args.steps} --seed {args.seed} {flags}".format(**folders)
                )
                steps = train(code, work / f"{name}-{turn}", args.preset, told)
                taken[name].append(statistics.median(step["seconds"] for step in steps[WARM_UP:]))
                print(f"{name:<7} {taken[name][-1]:.3f} s a step, first reward {steps[0].get('reward')}", flush=True)
    faster = sorted(a / b for a, b in zip(taken["before"], taken["after"], strict=True))
    print(f"\ntimes faster: {statistics.median(faster):.2f} [{faster[0]:.2f} .. {faster[-1]:.2f}]")


if __name__ == "__main__":
    main()
