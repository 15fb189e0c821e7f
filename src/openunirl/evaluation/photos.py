"""`openunirl evaluate MODEL --world geneval`: both tasks of one checkpoint on photographs, and their imbalance.

    prompts -> draw -> evaluation/00000/samples/0000.png         (generate.py)
            -> judge -> scores/results.jsonl                     (images_command.py: Mask2Former, CLIP, GenEval's rules)
            -> ask  -> answers/process-0000.jsonl                (answer.py)
    references -> judge -> ask about those that are right        (the same files under reference-*)
            -> match -> rows -> summary: GenEval, understanding, imbalance, self-reward, collusion gap

In: a model, prompts, on request a folder of reference pictures in GenEval's layout. Out, in --output-dir: the files
above, evaluation/results.jsonl, evaluation/references.jsonl and evaluation.json. The same call again continues after a
kill, and repeats nothing that is on disk. Under `accelerate launch` every process takes its share, but of a chat
model's judging: that the first one does.

Source: UniRL (arXiv 2505.23380), its released cycle scripts; METHOD 5-7. Departures: 1. the rules judge answers
(tasks/answers.py); on request a chat model does (llm_judge.py); 2. the model is asked about its pictures as they lie on
disk; 3. for P(image wrong | answer right), the first right reference picture of each prompt counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from openunirl.answer import Job, answer_jobs
from openunirl.config import EvalConfig, ModelConfig
from openunirl.distributed import Processes
from openunirl.evaluation.files import write_summary
from openunirl.evaluation.geneval import official_summary
from openunirl.evaluation.image_folder import check_names, read_folder, unknown_name
from openunirl.evaluation.images_command import score_folder, show_official
from openunirl.evaluation.journal import Rows, batches, complete
from openunirl.evaluation.judges import JUDGES, loaded_once
from openunirl.evaluation.left_out import LeftOut
from openunirl.evaluation.llm_judge import ChatModel, judge_answers
from openunirl.evaluation.no_score import no_answers
from openunirl.evaluation.output_folder import OutputFolder
from openunirl.evaluation.photo_world import placed
from openunirl.evaluation.run import summarize_rows
from openunirl.generate import (
    check_numbers,
    check_sampling,
    draw_missing,
    drawing_settings,
    progress_bar,
    share_of,
    tell_alone,
)
from openunirl.models.protocol import UnifiedModel, load_model
from openunirl.provenance import about
from openunirl.report_numbers import imbalance_table, summary_table, unsettled_lines
from openunirl.tasks.records import prompt_row, read_asked, read_jsonl, write_jsonl
from openunirl.tasks.worlds import WORLDS, first_of_each_task
from openunirl.types import AnswerSampling, Prompt
from openunirl.validate_model import check_sampling_of

Row = dict[str, Any]
_JUDGED = ("correct", "reason", "index", "sample", "digest", "metadata", "details")
_DETECTOR = "mask2former"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A judged picture and what is asked about it.

    Example: Asked(row={"filename": "00000/samples/0000.png", ...}, file=Path("..."), prompt=Prompt(...))
    """

    row: Row
    file: Path
    prompt: Prompt

    @property
    def key(self) -> tuple[str, str, str]:
        """The picture's name and content, and the question: what an answer on disk is known by."""
        return self.row["filename"], self.row["digest"], self.prompt.questions[0].question


def evaluate_photos(
    model: ModelConfig,
    config: EvalConfig,
    *,
    prompt_file: Path | None = None,
    references: Path | None = None,
    detector_weights: str,
    color_weights: str,
    llm_judge: str = "",
    llm_cache: Path | None = None,
    seed: int,
    output_dir: Path,
    num_prompts: int | None = None,
    dtype: str = "float32",
    command: str = "",
) -> dict[str, Any] | None:
    """Does what `output_dir` lacks, and returns the summary (None in all processes but the main one).

    num_prompts: so many of the prompt file's, the task types taking turns; None: all. dtype: of the model's network.
    Errors: ValueError for settings other than those that `output_dir` was made with, for what cannot be read, and for
    pictures whose score would be none (images_command.score_folder).
    """
    numbers = {"num-images": config.num_images, "batch-size": config.batch_size, "num-prompts": config.num_prompts}
    check_numbers(at_least_one=numbers | {"max-new-tokens": config.max_new_tokens}, seed=seed)
    check_sampling(config.sampling)
    prompts = _prompts(config, prompt_file, num_prompts, seed)
    drawing = drawing_settings(model, [prompt_row(p) for p in prompts], seed=seed, sampling=config.sampling)
    settings = {
        "references": references is not None,  # which ones is compared by content, in reference-scores
        "llm_judge": llm_judge,
        "max_new_tokens": config.max_new_tokens,
        "dtype": dtype,
    }
    folder = OutputFolder(path=output_dir, settings=settings, drawing=drawing)
    pictures = folder.pictures
    folder.check()
    _check_judge(prompts, references, detector_weights, color_weights)
    processes = Processes()
    chat = ChatModel(llm_judge, processes.device) if llm_judge else None
    adapter = load_model(model).to(processes.device, getattr(torch, dtype))
    check_sampling_of(adapter, config.sampling)
    if processes.is_main:
        folder.open(adapter, command=command)
    processes.wait()
    share = {"rank": processes.rank, "processes": processes.count}
    options = {"num_images": config.num_images, "seed": seed, "batch_size": config.batch_size}
    draw_missing(adapter, drawing["prompts"], pictures, sampling=config.sampling, **options, **share)
    processes.wait()
    judged: dict[str, Any] = {"detector_weights": detector_weights, "color_weights": color_weights, "command": command}
    judged["judge"] = loaded_once(JUDGES[_DETECTOR](detector_weights, color_weights))
    scored = score_folder(pictures, output_dir=output_dir / "scores", show=False, origin="drawn", **judged)
    read_from = None
    if references is not None:
        judged |= {"output_dir": output_dir / "reference-scores", "origin": "references"}
        read_from = score_folder(references, partial=True, show=False, **judged)
    del judged  # and the networks with it
    processes.wait()
    own = asked_about(output_dir / "scores", pictures, prompts)
    right = [] if references is None else right_references(output_dir / "reference-scores", references, prompts)
    told = {
        name: _ask(adapter, asked, output_dir / place, processes, config)
        for name, place, asked in (("own", "answers", own), ("references", "reference-answers", right))
    }
    if not processes.is_main or scored is None:
        return None
    if chat is not None:
        tell_alone(processes.count, "judges the answers")
    del adapter  # a chat model wants the memory
    cache = llm_cache or output_dir / "judgements"
    generated, read = (matched(asked, told[name], chat, cache) for name, asked in (("own", own), ("references", right)))
    write_jsonl(pictures / "results.jsonl", generated)
    write_jsonl(pictures / "references.jsonl", read)
    if why := no_answers(generated, read, llm_judge):
        raise ValueError(f"{why}. {pictures / 'results.jsonl'} has them; {output_dir / 'scores'} scores the pictures")
    summary = summarize_rows(
        generated,
        read,
        scored["label"],
        seed=seed,
        sampling=asdict(config.sampling),
        max_new_tokens=config.max_new_tokens,
        detector={name: told for name, told in scored["detector"].items() if name.endswith("_fingerprint")},
        model=model.weights,
        official_prompts=scored["official_prompts"],
        dtype=dtype,
        left_out=scored["left_out"],
        warnings=scored["warnings"],
        reference_pictures=read_from and _reference_pictures(read_from, read, len(prompts)),
        answers_judged_by=llm_judge or "rules",
        images_read_from="the PNG files",
        **about(command),
    )
    path = write_summary(output_dir, "evaluation", summary)
    _show(summary, official_summary(generated), path)
    return summary


def _prompts(config: EvalConfig, prompt_file: Path | None, num_prompts: int | None, seed: int) -> list[Prompt]:
    if prompt_file is None:
        return WORLDS["geneval"]().evaluation_prompts(config.split, config.num_prompts, seed)
    prompts = read_asked(prompt_file)
    return prompts if num_prompts is None else first_of_each_task(prompts, num_prompts)


def _check_judge(prompts: Sequence[Prompt], references: Path | None, detector_weights: str, color_weights: str) -> None:
    """Before hours of drawing. Errors: ValueError for references that cannot be read or that nothing is asked about,
    for a detector or colour classifier that is not there or of another kind, and for prompts of what the detector does
    not know."""
    named = JUDGES[_DETECTOR](detector_weights, color_weights)
    for prompt in prompts:
        name = unknown_name(prompt, named.classes, named.colors)
        if name is not None:
            raise ValueError(
                f"the prompt {prompt.prompt!r} asks for {name!r}, which the detector {_DETECTOR} does not know, so "
                "that no picture of it could be right: leave it out of --prompt-file"
            )
    if references is not None:
        pictures, place = read_folder(references, partial=True), placed(prompts)
        check_names(pictures, named.classes, named.colors, _DETECTOR)
        for picture in pictures:
            place(picture)
    named.check()


# ----------------------------------------------------------------------------------------- what is asked


def asked_about(scores: Path, pictures: Path, prompts: Sequence[Prompt]) -> list[Asked]:
    """Every judged picture with its prompt's own question."""
    rows = read_jsonl(scores / "results.jsonl")
    return [Asked(row=row, file=pictures / row["filename"], prompt=prompts[row["index"]]) for row in rows]


def right_references(scores: Path, folder: Path, prompts: Sequence[Prompt]) -> list[Asked]:
    """The reference pictures that the detector calls right. Those of an evaluated prompt get its number and question;
    the others numbers beyond, and the question of their own record or ours."""
    place = placed(prompts)
    own = {picture.name: picture for picture in read_folder(folder, partial=True)}
    found: list[Asked] = []
    for row in read_jsonl(scores / "results.jsonl"):
        if row["correct"]:
            index, chosen = place(own[row["filename"]])
            found.append(Asked(row=row | {"index": index}, file=folder / row["filename"], prompt=chosen))
    return found


def _ask(
    model: UnifiedModel, asked: Sequence[Asked], folder: Path, processes: Processes, config: EvalConfig
) -> dict[tuple[str, str, str], str]:
    """key -> the model's answer, greedy; answers that are on disk are not asked for again."""
    jobs = {
        each.key: (Job(number=i, image=each.row["filename"], file=each.file, question=each.key[2]), each.row["digest"])
        for i, each in enumerate(asked)
    }
    sampling = AnswerSampling(max_new_tokens=config.max_new_tokens)

    def answers(missing: list[tuple[Job, str]]) -> Iterator[list[Row]]:
        told = answer_jobs(model, [job for job, _ in missing], sampling, seed=0, batch_size=config.batch_size)
        for rows, part in zip(told, batches(missing, config.batch_size), strict=True):
            yield [row | {"digest": content} for row, (_, content) in zip(rows, part, strict=True)]

    with progress_bar(Console(stderr=True), disable=not processes.is_main or not asked) as progress:
        bar = progress.add_task(f"asking ({folder.name}{share_of(processes.count)})")
        return complete(
            jobs,
            Rows.in_files(folder, processes.rank, read_answers),
            answers,
            peers=processes,
            report=lambda done, total: progress.update(bar, completed=done, total=total),
        )


def read_answers(folder: Path) -> dict[tuple[str, str, str], str]:
    """key -> answer, of all files of a folder. Errors: ValueError "file:line: ..." for a row that is not ours."""
    found: dict[tuple[str, str, str], str] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for number, row in enumerate(read_jsonl(file) if file.stat().st_size else [], start=1):
            if not all(isinstance(row.get(name), str) for name in ("image", "digest", "question", "answer")):
                raise ValueError(f"{file}:{number} is no row of this command: delete it")
            found[row["image"], row["digest"], row["question"]] = row["answer"]
    return found


# ----------------------------------------------------------------------------------------- what it is worth


def matched(
    asked: Sequence[Asked], told: dict[tuple[str, str, str], str], chat: ChatModel | None, cache: Path
) -> list[Row]:
    """The rows of an evaluation: verdict, question, answer, and whether the answer is the gold one; where a chat model
    judges, with its reply, and what the rules say."""
    match, rows = WORLDS["geneval"]().match, []
    for each in asked:
        question = each.prompt.questions[0]
        verdict = match(each.prompt.tag, question.answer, told[each.key])
        rows.append(
            {
                **{name: each.row[name] for name in ("filename", "tag", "prompt")},
                "question": question.question,
                "expected": question.answer,
                "answer": told[each.key],
                "answer_correct": verdict.same,
                "settled": verdict.settled,
                "why": verdict.why,
                **{name: each.row[name] for name in _JUDGED},
            }
        )
    if chat is not None and rows:
        for row, (reply, said) in zip(rows, judge_answers(rows, chat, cache), strict=True):
            row |= {"rules": row["answer_correct"], "answer_correct": said is True, "settled": said is not None}
            row["reply"] = reply
    return rows


def _reference_pictures(scored: dict[str, Any], read: Sequence[Row], prompts: int) -> dict[str, Any]:
    """How many are right, how many of these show one of the evaluated prompts, and what their folder holds besides."""
    shown = sum(row["index"] < prompts for row in read)
    about = {"folder": scored["images"], "left_out": scored["left_out"]}
    return {**about, "right": len(read), "of_evaluated_prompts": shown}


def _show(summary: dict[str, Any], official: str, path: Path) -> None:
    console = Console()
    console.print(f"{summary['label']}; answers judged by {summary['answers_judged_by']}", highlight=False)
    console.print(summary_table(summary))
    console.print(imbalance_table(summary))
    for line in unsettled_lines(summary):
        console.print(line, highlight=False)
    if read := summary["reference_pictures"]:
        shown = read["of_evaluated_prompts"]
        without = "" if shown else "; without any, there is no second imbalance rate"
        told = f"{read['right']} reference pictures are right, and {shown} of these show an evaluated prompt{without}"
        console.print(told, highlight=False, soft_wrap=True)
        if besides := LeftOut(**read["left_out"]).ignored():  # that some of them are missing is usual
            console.print(f"of the references, {besides}", markup=False, highlight=False, soft_wrap=True)
    elif not summary["understanding"]["n"]:
        console.print("understanding and the second imbalance rate want --references DIR", highlight=False)
    own = LeftOut(**summary["left_out"])
    for line in filter(None, (own.ignored(), own.missing(), *summary["warnings"])):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    show_official(console, official)
    console.print(f"written: {path}", soft_wrap=True)
