"""`openunirl answer`: rows, resumption, folders, pictures of any size, what is refused; with the bundled tiny model.

Pictures come from the world's renderer, which the tiny model reads right (its understanding is 0.98).
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from openunirl.answer import ask_about, read_picture
from openunirl.cli import main
from openunirl.evaluation.image_folder import decode
from openunirl.evaluation.run import to_pixels
from openunirl.models.protocol import load_model
from openunirl.tasks.records import prompt_row, write_jsonl
from openunirl.tasks.worlds import WORLDS
from openunirl.types import Prompt, Question

ASKED = ("what color is the circle?", "what color is the square?")
RED_CIRCLE = Prompt(
    tag="colors",
    include=({"class": "circle", "count": 1, "color": "red"},),
    prompt="a photo of a red circle",
    questions=(Question(question=ASKED[0], answer="red"),),
)
BLUE_SQUARE = Prompt(
    tag="colors",
    include=({"class": "square", "count": 1, "color": "blue"},),
    prompt="a photo of a blue square",
    questions=(Question(question=ASKED[1], answer="blue"),),
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-showo")


@pytest.fixture(scope="module")
def pictures():
    """uint8 [2, 64, 64, 3]: a red circle, a blue square."""
    return WORLDS["shapes"]().references([RED_CIRCLE, BLUE_SQUARE], 0)


@pytest.fixture
def flat(tmp_path, pictures):
    """A flat folder: circle.png, square.PNG, and what is no picture."""
    folder = tmp_path / "flat"
    folder.mkdir()
    Image.fromarray(pictures[0]).save(folder / "circle.png")
    Image.fromarray(pictures[1]).save(folder / "square.PNG")
    (folder / "notes.txt").write_text("mine")
    (folder / ".circle.png.partial").write_bytes(b"half")
    return folder


@pytest.fixture
def geneval(tmp_path, pictures):
    """GenEval's layout: prompt 9 is the circle, prompt 10 the square, two samples each."""
    for number, prompt, picture in ((9, RED_CIRCLE, pictures[0]), (10, BLUE_SQUARE, pictures[1])):
        folder = tmp_path / "layout" / str(number)
        (folder / "samples").mkdir(parents=True)
        write_jsonl(folder / "metadata.jsonl", [prompt_row(prompt)])
        for k in range(2):
            Image.fromarray(picture).save(folder / "samples" / f"{k:04d}.png")
    return tmp_path / "layout"


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def told(capsys, *argv):
    """The rows on stdout."""
    capsys.readouterr()
    assert main(["answer", "tiny-showo", *map(str, argv)]) == 0
    return rows_of(capsys.readouterr().out)


def refused(capsys, *argv, code=1):
    capsys.readouterr()
    assert main(["answer", *map(str, argv)]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("openunirl: "), err
    assert err.count("\n") == 1, err
    return err


# ----------------------------------------------------------------------------------------------------- rows


def test_every_question_on_every_picture(flat, capsys):
    rows = told(capsys, "--images", flat / "circle.png", flat / "square.PNG", "--questions", *ASKED)
    assert rows == [
        {"image": f"{flat}/circle.png", "question": ASKED[0], "answer": "red"},
        {"image": f"{flat}/circle.png", "question": ASKED[1], "answer": "none"},
        {"image": f"{flat}/square.PNG", "question": ASKED[0], "answer": "none"},
        {"image": f"{flat}/square.PNG", "question": ASKED[1], "answer": "blue"},
    ]


def test_a_flat_folder_is_its_pictures(flat, capsys):
    rows = told(capsys, "--images", flat, "--questions", ASKED[0])
    assert [(row["image"], row["answer"]) for row in rows] == [
        (f"{flat}/circle.png", "red"),
        (f"{flat}/square.PNG", "none"),
    ]


def test_what_is_asked_twice_is_answered_once(flat, capsys):
    rows = told(capsys, "--images", flat, flat / "circle.png", "--questions", ASKED[0], ASKED[0])
    assert len(rows) == 2


def test_geneval_prompts_bring_their_own_questions(geneval, capsys):
    rows = told(capsys, "--images", geneval)
    assert [(row["image"], row["question"], row["answer"]) for row in rows] == [
        (f"{geneval}/{n}/samples/{k:04d}.png", question, answer)  # 9 before 10: by number
        for n, question, answer in ((9, ASKED[0], "red"), (10, ASKED[1], "blue"))
        for k in range(2)
    ]


def test_given_questions_go_before_the_prompts_own(geneval):
    jobs = ask_about([str(geneval)], ["what is this?"])
    assert [job.question for job in jobs] == ["what is this?"] * 4 and [job.number for job in jobs] == [0, 1, 2, 3]


def test_what_generate_writes_can_be_asked_about(tmp_path, capsys):
    write_jsonl(tmp_path / "prompts.jsonl", [prompt_row(RED_CIRCLE), prompt_row(BLUE_SQUARE)])
    flags = ["--prompt-file", str(tmp_path / "prompts.jsonl"), "--output-dir", str(tmp_path / "out")]
    assert main(["generate", "tiny-showo", *flags, "--num-images", "1", "--sampling.num-timesteps", "2"]) == 0
    rows = told(capsys, "--images", tmp_path / "out")
    assert [row["question"] for row in rows] == list(ASKED)
    assert [row["image"] for row in rows] == [f"{tmp_path}/out/0000{i}/samples/0000.png" for i in range(2)]


def test_a_question_file(flat, capsys):
    asked = [
        {"image": "flat/circle.png", "question": ASKED[0], "id": 7},
        {"image": str(flat / "square.PNG"), "question": ASKED[1]},
    ]
    write_jsonl(flat.parent / "questions.jsonl", asked)
    rows = told(capsys, "--question-file", flat.parent / "questions.jsonl")
    assert [(row["image"], row["answer"]) for row in rows] == [
        ("flat/circle.png", "red"),
        (f"{flat}/square.PNG", "blue"),
    ]


def test_batches_change_nothing(geneval, capsys):
    sampled = ["--images", geneval, "--questions", *ASKED, "--temperature", "9", "--max-new-tokens", "4"]
    whole = told(capsys, *sampled, "--batch-size", "8")
    assert told(capsys, *sampled, "--batch-size", "5") == whole  # a picture's questions fall into two batches
    assert told(capsys, *sampled, "--seed", "1") != whole


def test_answers_end_where_they_must(flat, capsys):
    asked = ["--images", flat / "circle.png", "--questions", "what is the main item in this image?", "--temperature"]
    long = told(capsys, *asked, "99", "--max-new-tokens", "12")[0]["answer"].split()
    short = told(capsys, *asked, "99", "--max-new-tokens", "2")[0]["answer"].split()
    assert len(long) > 2 and short == long[:2]


# ---------------------------------------------------------------------------------------------- output file


def test_an_output_file_is_continued(flat, capsys, tmp_path):
    output = tmp_path / "rows.jsonl"
    ask = ["answer", "tiny-showo", "--images", str(flat), "--questions", *ASKED, "--output", str(output)]
    assert main(ask) == 0
    assert capsys.readouterr().out == ""
    whole = output.read_bytes()
    assert len(rows_of(whole.decode())) == 4
    settings = json.loads((tmp_path / "rows.jsonl.settings.json").read_text())
    assert settings["sampling"] == {"max_new_tokens": 8, "temperature": 0.0} and settings["weights"]
    for cut in (len(whole) - 1, len(whole) - 9, whole.index(b"\n") + 1, 5, 0):
        output.write_bytes(whole[:cut])
        assert main(ask) == 0
        assert output.read_bytes() == whole, cut
    assert "0 questions answered, 4 were answered before" not in capsys.readouterr().err
    assert main(ask) == 0
    assert "0 questions answered, 4 were answered before" in capsys.readouterr().err
    assert output.read_bytes() == whole


def test_rows_that_are_there_stay_and_are_not_asked_again(flat, capsys, tmp_path):
    output = tmp_path / "rows.jsonl"
    ask = ["answer", "tiny-showo", "--images", str(flat), "--output", str(output), "--questions"]
    assert main([*ask, ASKED[0]]) == 0
    kept = output.read_text().replace('"red"', '"kept"')
    output.write_text(kept)
    assert main([*ask, *ASKED]) == 0
    text = output.read_text()
    assert text.startswith(kept)
    assert [(row["question"], row["answer"]) for row in rows_of(text)[2:]] == [(ASKED[1], "none"), (ASKED[1], "blue")]


def test_answers_drawn_after_a_break_are_those_without_one(flat, capsys, tmp_path):
    output = tmp_path / "rows.jsonl"
    ask = ["answer", "tiny-showo", "--images", str(flat), "--output", str(output), "--questions", *ASKED]
    ask += ["--temperature", "9", "--max-new-tokens", "4"]
    assert main(ask) == 0
    whole = output.read_text()
    output.write_text("".join(whole.splitlines(keepends=True)[:2]))
    assert main(ask) == 0
    assert output.read_text() == whole


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "0.5"], "sampling.temperature 0.0, not 0.5"),
        (["--max-new-tokens", "3"], "sampling.max_new_tokens 8, not 3"),
        (["--seed", "3"], "seed 0, not 3"),
    ],
)
def test_other_settings_are_refused(flat, capsys, tmp_path, flags, words):
    output = tmp_path / "rows.jsonl"
    ask = ["tiny-showo", "--images", str(flat / "circle.png"), "--questions", ASKED[0], "--output", str(output)]
    assert main(["answer", *ask]) == 0
    output.write_bytes(output.read_bytes() + b'{"image": "ha')
    before = output.read_bytes()
    err = refused(capsys, *ask, *flags)
    assert f"{output} was made with {words}: choose another --output" in err
    assert output.read_bytes() == before


def test_another_model_is_refused(flat, capsys, tmp_path, model):
    output = tmp_path / "rows.jsonl"
    ask = ["--images", str(flat / "circle.png"), "--questions", ASKED[0], "--max-new-tokens", "8"]
    ask += ["--output", str(output)]
    assert main(["answer", "tiny-showo", *ask]) == 0
    other = load_model("tiny-showo")
    with torch.no_grad():
        next(other.net.parameters()).mul_(1.001)
    other.save(tmp_path / "tuned")
    assert f"the model tiny-showo, not {tmp_path / 'tuned'}" in refused(capsys, tmp_path / "tuned", *ask)


def test_files_of_others_are_refused(flat, capsys, tmp_path):
    ask = ["tiny-showo", "--images", flat, "--questions", ASKED[0], "--output"]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("mine")
    assert "mine.jsonl.settings.json beside it" in refused(capsys, *ask, mine)
    assert "choose another --output" in refused(capsys, *ask, flat)
    assert mine.read_text() == "mine"
    assert main(["answer", *map(str, ask), str(tmp_path / "rows.jsonl")]) == 0
    (tmp_path / "rows.jsonl").write_text('{"image": "a", "question": "b", "answer": "c"}\n{"image": "a"}\n')
    assert 'rows.jsonl:2: "question" is missing' in refused(capsys, *ask, tmp_path / "rows.jsonl")


# ---------------------------------------------------------------------------------------- sizes and formats


def test_pictures_of_the_models_size_are_encoded_as_they_are(model, pictures):
    read = model.read_pictures([Image.fromarray(picture) for picture in pictures])
    assert torch.equal(read.tokens_BN, model.encode(to_pixels(pictures)).tokens_BN)


@pytest.mark.parametrize(
    ("width", "height", "middle"),
    [(256, 256, (0, 0)), (200, 128, (18, 0)), (64, 161, (0, 48)), (40, 32, (8, 0)), (64, 64, (0, 0))],
)
def test_other_sizes_are_scaled_and_cropped_as_officially(model, width, height, middle):
    """Worked by hand: the short side becomes 64 (200x128 -> 100x64; 40x32 -> 80x64), and the middle 64 are taken;
    an odd margin of 97 is halved to 48 (48.5 rounds to even)."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    short = min(width, height)
    scaled = Image.fromarray(noise).resize((64 * width // short, 64 * height // short), Image.Resampling.BICUBIC)
    left, top = middle
    cropped = np.array(scaled.crop((left, top, left + 64, top + 64)))
    read = model.read_pictures([Image.fromarray(noise)])
    assert torch.equal(read.tokens_BN, model.encode(to_pixels(cropped[None])).tokens_BN)


def test_a_big_wide_picture_is_understood(flat, capsys, pictures):
    wide = Image.new("RGB", (640, 320), tuple(int(c) for c in pictures[0][0, 0]))
    wide.paste(Image.fromarray(pictures[0]).resize((320, 320), Image.Resampling.BICUBIC), (160, 0))
    wide.save(flat / "wide.jpg", quality=95)
    Image.fromarray(pictures[1]).convert("P").save(flat / "palette.gif")
    rows = told(capsys, "--images", flat / "wide.jpg", flat / "palette.gif", "--questions", *ASKED)
    assert [row["answer"] for row in rows] == ["red", "none", "none", "blue"]


def test_modes_become_rgb(tmp_path):
    Image.new("RGBA", (3, 2), (9, 8, 7, 0)).save(tmp_path / "a.png")
    Image.new("L", (3, 2), 5).save(tmp_path / "b.png")
    assert read_picture(tmp_path / "a.png").getpixel((0, 0)) == (9, 8, 7)
    assert read_picture(tmp_path / "b.png").getpixel((0, 0)) == (5, 5, 5)


# ------------------------------------------------------------------------------------------------- refusals


def test_bad_pictures(flat, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("openunirl.answer.load_model", lambda _: pytest.fail("loaded"))
    ask = ["tiny-showo", "--questions", "a", "--images"]
    assert f"there is no picture or folder {flat / 'no.png'}" in refused(capsys, *ask, flat / "no.png")
    err = refused(capsys, *ask, flat / "circle.png", flat / "notes.txt")
    assert f"{flat / 'notes.txt'} cannot be read as a picture" in err
    Image.new("I;16", (4, 4), 40000).save(flat / "deep.png")
    assert "deep.png has more than 8 bits a channel" in refused(capsys, *ask, flat / "deep.png")
    (tmp_path / "empty").mkdir()
    assert "empty holds no pictures (.png .jpg" in refused(capsys, *ask, tmp_path / "empty")
    assert "--questions, number 2" in refused(capsys, "tiny-showo", "--images", flat, "--questions", "a", "")
    assert "circle.png has no question of its own: give --questions" in refused(capsys, "tiny-showo", "--images", flat)


def test_the_model_sees_a_picture_turned_as_the_detector_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.array(read_picture(tmp_path / "a.png")), np.rot90(pixels, -1))
    assert np.array_equal(np.array(read_picture(tmp_path / "a.png")), decode((tmp_path / "a.png").read_bytes()))


def test_a_damaged_picture_keeps_the_rows_before_it(flat, capsys, tmp_path):
    content = (flat / "square.PNG").read_bytes()
    (flat / "square.PNG").write_bytes(content[: len(content) // 2])
    output = tmp_path / "rows.jsonl"
    ask = ["answer", "tiny-showo", "--images", str(flat), "--questions", ASKED[0], "--output", str(output)]
    assert main([*ask, "--batch-size", "1"]) == 1
    assert f"openunirl: {flat / 'square.PNG'}: damaged, or no picture: " in capsys.readouterr().err
    assert [row["answer"] for row in rows_of(output.read_text())] == ["red"]
    (flat / "square.PNG").write_bytes(content)
    assert main(ask) == 0
    assert [row["answer"] for row in rows_of(output.read_text())] == ["red", "none"]


def test_a_prompt_without_a_question_is_named(geneval, capsys):
    write_jsonl(geneval / "10" / "metadata.jsonl", [{"prompt": "a photo of a blue square"}])
    assert f"{geneval}/10/metadata.jsonl holds no question" in refused(capsys, "tiny-showo", "--images", geneval)
    shutil.rmtree(geneval / "9" / "samples")
    (geneval / "10" / "metadata.jsonl").unlink()
    assert "0000.png has no question of its own" in refused(capsys, "tiny-showo", "--images", geneval)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"image": "flat/circle.png", "question": "a"}\n{"image": "no.png", "question": "a"}',
            ":2: there is no picture",
        ),
        ('{"image": "flat", "question": "a"}', ":1: there is no picture"),
        ('{"image": "flat/circle.png"}', ':1: "question" is missing'),
        ('{"image": 3, "question": "a"}', ':1: "image" is 3'),
        ('{"image": }', ":1: not valid JSON at column 11"),
        ("", ": the file is empty"),
    ],
)
def test_bad_question_files(flat, capsys, content, words):
    path = flat.parent / "questions.jsonl"
    path.write_text(content)
    assert f"{path}{words}" in refused(capsys, "tiny-showo", "--question-file", path)


@pytest.mark.parametrize(
    ("argv", "words", "code"),
    [
        ([], "openunirl answer wants a MODEL", 2),
        (["tiny-showo"], "and there is neither", 2),
        (["tiny-showo", "--images", "a", "--question-file", "b"], "--question-file FILE, not both", 2),
        (["tiny-showo", "--questions", "a", "--question-file", "b"], "b holds the questions; drop --questions", 2),
        (["tiny-showo", "--image", "a"], "unknown flag --image; did you mean --images?", 2),
        (["tiny-showo", "--images", "a", "--temperature", "hot"], "--temperature wants a number, not 'hot'", 2),
        (["tiny-shwo", "--images", "a"], "did you mean tiny-showo?", 2),
        (["tiny-showo", "--images", "a", "--temperature", "-1"], "--temperature is -1.0, wanted 0", 1),
        (["tiny-showo", "--images", "a", "--temperature", "nan"], "--temperature is nan", 1),
        (["tiny-showo", "--images", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0", 1),
        (["tiny-showo", "--images", "a", "--batch-size", "-2"], "--batch-size is -2", 1),
    ],
    ids=str,
)
def test_bad_command_lines(capsys, argv, words, code):
    assert words in refused(capsys, *argv, code=code)
