"""10,000 damaged inputs: each gives one clear error or a counted skip, never a traceback and never a silent result.

    python benchmarks/damaged_inputs.py --cases 10000 --seed 0

Sound inputs - JSONL files, prompt files, pictures, GenEval folders, configurations, report rows, journals, settings,
answers, a chat model's replies, checkpoints, folders of models and of a chat model, tokenizer files, detectors, colour
classifiers, summaries, GenEval's own results - are damaged at random (damage.py: bytes flipped, cut, doubled, replaced;
JSON values exchanged; files removed, renamed, emptied or added) and handed to the code that reads them. An outcome is
"error" (ValueError or OSError in one sentence, at most 1,000 characters), "skip" (the reader counted it: how much is
missing or ignored is compared with what is), "sound" (the damage left a sound input: what was read is checked), or a
failure: any other exception, an empty or vague message, or a result that does not hold. Prints a table; exit code 1 on
any failure.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

from damage import Rng, damaged_bytes, damaged_folder, damaged_json, damaged_lines
from damaged_evaluations import EvaluationInputs
from openunirl.cli import read_config
from openunirl.config import to_dict
from openunirl.evaluation.image_folder import decode, read_folder
from openunirl.evaluation.image_scores import check_moved, rows_of, score_pictures
from openunirl.evaluation.journal import mend
from openunirl.evaluation.left_out import left_out
from openunirl.evaluation.llm_judge import read_replies, verdict_of
from openunirl.evaluation.photos import read_answers
from openunirl.flags import UsageError
from openunirl.generate import check_settings, read_records
from openunirl.models.checkpoints import load_strictly, read_state
from openunirl.models.checkpoints import read_config as read_model_config
from openunirl.models.magvit import MagvitConfig
from openunirl.models.showo_net import ShowoNet, ShowoSizes
from openunirl.presets import PRESETS
from openunirl.provenance import commit
from openunirl.report import read_rows
from openunirl.tasks import shapes
from openunirl.tasks.answers import match
from openunirl.tasks.geneval import evaluation_prompts
from openunirl.tasks.records import prompt_row, read_jsonl, read_prompts, write_jsonl
from openunirl.tasks.shapes_oracle import Oracle
from openunirl.tasks.worlds import WORLDS
from openunirl.validate import check

LONGEST = 1000
VAGUE = ("values to unpack", "invalid literal", "index out of range", "could not convert", "object has no attribute")
"""What Python says of a mistake in a reader."""
SHOWN = (".png", ".jpg", ".gif")

# ---------------------------------------------------------------------------------------- what is read, and how


class Inputs(EvaluationInputs):
    """Sound inputs, made once, and for each kind a function that damages one and reads it."""

    def __init__(self, place: Path):
        super().__init__(place)
        self.prompts = [prompt_row(prompt) for prompt in evaluation_prompts()[::97]]
        noise = self.noise
        self.pictures: dict[str, bytes] = {}
        for kind in ("png", "jpeg", "webp", "bmp"):
            Image.fromarray(noise).save(self.file, format=kind)
            self.pictures[kind] = self.file.read_bytes()
        self.folder = self._folder(place / "folder")
        net = ShowoNet(ShowoSizes(vocab_size=40, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2))
        self.net, self.state = net, {name: value.clone() for name, value in net.state_dict().items()}
        save_file(self.state, place / "w.safetensors")
        torch.save(self.state, place / "w.bin")
        self.result = {"tag": "colors", "prompt": "p", "answer_correct": True, "index": 0, "correct": True}
        self.result |= {"question": "q", "expected": "e", "answer": "a", "reason": ""}
        self.row = {"filename": "0/samples/0.png", "tag": "colors", "prompt": "p", "correct": True, "reason": ""}
        self.row |= {"metadata": "{}", "details": "{}", "index": 0, "sample": 0, "digest": "0" * 16}

    @staticmethod
    def _folder(folder: Path) -> Path:
        prompts = shapes.prompts("heldout", 3, 0)
        write_jsonl(folder.parent / "prompts.jsonl", [prompt.metadata() for prompt in prompts])
        for index, (prompt, picture) in enumerate(zip(prompts, WORLDS["shapes"]().references(prompts, 0), strict=True)):
            (folder / f"{index:05d}" / "samples").mkdir(parents=True)
            write_jsonl(folder / f"{index:05d}" / "metadata.jsonl", [prompt.metadata()])
            for sample in range(2):
                Image.fromarray(picture).save(folder / f"{index:05d}" / "samples" / f"{sample:04d}.png")
        return folder

    # Each returns "sound" or "skip", or raises.

    def jsonl(self, rng: Rng) -> str:
        self.file.write_bytes(damaged_lines(self.prompts, rng))
        rows = read_jsonl(self.file)
        write_jsonl(self.file, rows)
        assert read_jsonl(self.file) == rows
        return "sound"

    def prompt_file(self, rng: Rng) -> str:
        self.file.write_bytes(damaged_lines(self.prompts, rng))
        for prompt in read_prompts(self.file):
            assert prompt.prompt.strip() and (prompt.include or prompt.exclude)
            assert all(clause["count"] >= 1 for clause in (*prompt.include, *prompt.exclude))
        return "sound"

    def prompts_to_draw(self, rng: Rng) -> str:
        file = self.place / rng.choice(("p.jsonl", "p.txt", "p.csv"))
        file.write_bytes(damaged_lines(self.prompts, rng))
        assert all(record["prompt"].strip() for record in read_records(file))
        return "sound"

    def picture(self, rng: Rng) -> str:
        """A PNG that is read shows what it showed; the other formats hold no checksum that could tell."""
        kind = rng.choice(list(self.pictures))
        pixels = decode(damaged_bytes(self.pictures[kind], rng))
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size
        assert kind != "png" or np.array_equal(pixels, self.noise), "another picture than the one that was written"
        return "sound"

    def geneval_folder(self, rng: Rng) -> str:
        """Damaged in one or two places, then read and scored; an unreadable picture is a counted row, and what is
        missing or ignored is counted. (That the last prompts' folders are gone only a prompt file tells.)"""
        copy = self.place / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder, copy)
        for _ in range(rng.randint(1, 2)):
            damaged_folder(copy, rng)
        file, partial = rng.choice((None, self.place / "prompts.jsonl")), rng.random() < 0.5
        pictures = read_folder(copy, prompt_file=file, partial=partial)
        rows = [row for part in score_pictures(Oracle(), pictures, 4) for row in part]
        assert len(rows) == len(pictures) > 0
        unreadable = sum("unreadable" in row for row in rows)
        assert all(row["unreadable"] if "unreadable" in row else row["correct"] in (True, False) for row in rows)
        told = left_out(copy, pictures, None if file is None else 3)
        last = 3 if file else max(int(each.name) for each in copy.iterdir() if each.name.isdigit()) + 1
        assert 2 * told.missing_prompts + told.missing_samples == 2 * last - len(rows), "fewer rows, and not counted"
        assert partial or not (told.missing_prompts or told.missing_samples), "fewer rows, and no error"
        known = {picture.file for picture in pictures} | {copy / f"0000{i}" / "metadata.jsonl" for i in range(3)}
        others = [each for each in copy.rglob("*") if each.is_file() and each not in known]
        shown = [each for each in others if each.suffix in SHOWN or each.parent.name == "samples"]
        assert told.ignored_files + told.ignored_folders > 0 or not shown, f"{shown} ignored, and not counted"
        return "skip" if unreadable or told.ignored() or told.missing() else "sound"

    def configuration(self, rng: Rng) -> str:
        content = json.loads(json.dumps(to_dict(rng.choice(list(PRESETS.values())))))
        damaged = json.dumps(damaged_json(content, rng)).encode()
        self.file.write_bytes(damaged if rng.random() < 0.7 else damaged_bytes(damaged, rng))
        check(read_config(self.file))
        return "sound"

    def report_rows(self, rng: Rng) -> str:
        self.file.write_bytes(damaged_lines([self.result] * 3, rng))
        problems: list[str] = []
        rows = read_rows(self.file, {name: type(value) for name, value in self.result.items()}, problems)
        assert all(set(self.result) <= set(row) for row in rows)
        return "skip" if problems else "sound"

    def journal(self, rng: Rng) -> str:
        self.file.write_bytes(damaged_lines([self.row] * 3, rng))
        mend([self.file])
        for row in rows_of([self.file]):
            places = [] if "unreadable" in row else [row["index"], row["sample"]]
            assert isinstance(row["filename"], str) and all(type(place) is int for place in places)
        return "sound"

    def settings(self, rng: Rng) -> str:
        """settings.json of `evaluate --images`, and generate.json, whose nested values are compared, too."""
        place, file = self.place / "scores", self.place / "scores" / "settings.json"
        place.mkdir(exist_ok=True)
        write_jsonl(place / "results.jsonl", [self.row])
        settings = {"protocol": 1, "detector": "oracle", "sampling": {"num_timesteps": 8}, "prompts": self.prompts[:2]}
        damaged = json.dumps(damaged_json(settings | {"images": str(self.folder), "commit": None}, rng)).encode()
        file.write_bytes(damaged if rng.random() < 0.6 else damaged_bytes(damaged, rng))
        check_settings(file, settings, made=place, flag="--output-dir")
        known = json.loads(file.read_bytes())
        assert all(known[name] == settings[name] for name in ("protocol", "detector", "prompts"))
        assert known["sampling"]["num_timesteps"] == 8  # what the file holds besides is not compared
        check_moved(file, self.folder, lambda: read_folder(self.folder))
        return "sound"

    def answers(self, rng: Rng) -> str:
        folder = self.place / "answers"
        folder.mkdir(exist_ok=True)
        row = {"image": "0/samples/0.png", "question": "q", "answer": "a", "digest": "0" * 16}
        (folder / "process-0000.jsonl").write_bytes(damaged_lines([row] * 3, rng))
        mend(folder.glob("*.jsonl"))
        told = read_answers(folder)
        assert all(isinstance(text, str) for pair in told.items() for text in (*pair[0], pair[1]))
        return "sound"

    def replies(self, rng: Rng) -> str:
        """The chat model's, kept by content."""
        self.file.write_bytes(damaged_lines([{"key": "0" * 64, "reply": "same"}] * 3, rng))
        mend([self.file])
        assert all(verdict_of(reply) in (True, False, None) for reply in read_replies(self.file).values())
        return "sound"

    def checkpoint(self, rng: Rng) -> str:
        """Weights cut, renamed, reshaped or with damaged bytes; what loads has to be all there."""
        kind, file = rng.randrange(3), self.place / "d.safetensors"
        if kind == 0:
            state = dict(self.state)
            name = rng.choice(list(state))
            state[name + "s"] = state.pop(name)
            save_file(state, file)
        elif kind == 1:
            state = dict(self.state)
            name = rng.choice(list(state))
            state[name] = torch.zeros([rng.randint(0, 5) for _ in range(rng.randint(0, 4))])
            save_file(state, file)
        else:
            whole = self.place / rng.choice(("w.safetensors", "w.bin"))
            file = self.place / f"d{whole.suffix}"
            file.write_bytes(damaged_bytes(whole.read_bytes(), rng))
        state = read_state(file)
        ShowoSizes.from_state_dict(state)
        load_strictly(self.net, state, file.name)
        return "sound"  # flipped bits within a number leave a number

    def image_tokenizer(self, rng: Rng) -> str:
        state = dict(self.state) if rng.random() < 0.2 else self._magvit()
        for name in rng.sample(sorted(state), rng.randint(1, 3)):
            if rng.random() < 0.5:
                del state[name]
            else:
                state[name] = torch.zeros([rng.randint(1, 4) for _ in range(rng.randint(0, 4))])
        MagvitConfig.from_state_dict(state, norm_groups=rng.choice((8, 32, 0)))
        return "sound"

    def _magvit(self) -> dict[str, torch.Tensor]:
        if not hasattr(self, "_magvit_state"):
            from openunirl.models.magvit import Magvit

            flat: dict[str, Any] = {"encoder_ch": 8, "decoder_ch": 8, "norm_groups": 8, "codebook_bits": 3}
            flat |= {
                f"{side}_{name}": (1, 1) for side in ("encoder", "decoder") for name in ("ch_mult", "num_res_blocks")
            }
            self._magvit_state = dict(Magvit(MagvitConfig(**flat)).state_dict())
        return dict(self._magvit_state)

    def model_configuration(self, rng: Rng) -> str:
        (self.place / "config.json").write_bytes(damaged_lines([{"family": "showo", "num_vq_tokens": 64}], rng))
        assert isinstance(read_model_config(self.place), dict)
        return "sound"

    def answer(self, rng: Rng) -> str:
        """An answer is any text: the matcher has to settle it or say that it does not."""
        tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
        gold = rng.choice(("bench", "a dog and a cat", "two dogs", "red", "The cow is left of the laptop", ""))
        text = damaged_bytes(b"The red dog is left of two blue cats.", rng).decode("utf-8", "replace")
        found = match(rng.choice(tags), gold, text)
        assert not (found.same and not found.settled) and found.why
        return "sound"


KINDS: dict[str, Callable[[Inputs, Rng], str]] = {
    name: getattr(Inputs, name)
    for name in (
        "jsonl", "prompt_file", "prompts_to_draw", "picture", "geneval_folder", "configuration", "report_rows",
        "journal", "settings", "answers", "replies", "checkpoint", "image_tokenizer", "model_configuration", "answer",
        "detector", "color_classifier", "summary", "geneval_results", "drawn_journal",
        "janus_folder", "showo_folder", "chat_model",
    )
}  # fmt: skip


def outcome(inputs: Inputs, kind: str, seed: str) -> tuple[str, str]:
    """("error", "skip", "sound" or "FAILURE", what was said)."""
    try:
        return KINDS[kind](inputs, random.Random(seed)), ""
    except (ValueError, OSError, UsageError) as error:  # what the command line turns into one sentence
        told = " ".join(str(error).split())
        if isinstance(error, UnicodeError) or not told or len(told) > LONGEST or any(words in told for words in VAGUE):
            return "FAILURE", f"{type(error).__name__}: {told[:300]} ({len(told)} characters)"
        return "error", told
    except Exception:
        return "FAILURE", traceback.format_exc()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    failures: list[str] = []
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        inputs = Inputs(Path(place))
        for case in range(args.cases):
            kind = args.kinds[case % len(args.kinds)]
            found, told = outcome(inputs, kind, f"{args.seed}-{case}")
            counts[kind][found] += 1
            if found == "FAILURE":
                failures.append(f"case {args.seed}-{case} ({kind}): {told}")
    print(shlex.join(["python", *sys.argv]), "commit", commit())
    columns = ("error", "skip", "sound", "FAILURE")
    print(f"| input | cases | {' | '.join(columns)} |\n|---|---|---|---|---|---|")
    for kind, told in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"| {kind} | {told.total()} | {' | '.join(str(told[column]) for column in columns)} |")
    print("\n".join(failures[:10]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
