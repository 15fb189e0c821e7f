"""A disk that refuses what is written: one sentence with the file's name and the fix, and nothing half-written."""

import errno
import json
import re
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from openunirl.cli import main
from openunirl.disk import is_occupied, naming, refusal, whole
from openunirl.models.checkpoints import write_state
from openunirl.models.tiny import build, word_tokenizer
from openunirl.tasks import shapes
from openunirl.tasks.records import write_jsonl

FULL = r"cannot be written: File too large; free some space"


@contextmanager
def files_up_to(size):
    """No file may grow beyond `size` bytes: what a full disk does, from the middle of a file on."""
    kept, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, kept)


@pytest.fixture
def small_files():
    with files_up_to(20_000):
        yield


def test_weights_are_written_whole_or_not_at_all(tmp_path, small_files):
    file = tmp_path / "model.safetensors"
    write_state(file, {"a": torch.ones(10)})
    with pytest.raises(OSError, match=FULL) as caught:
        write_state(file, {"a": torch.zeros(10_000)})
    assert caught.value.filename == str(file) and caught.value.errno == errno.EFBIG
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(file)["a"], torch.ones(10))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: (path / "text").write_text("a" * 30_000),
        lambda path: torch.save(torch.zeros(10_000), path / "optimizer.pt"),
        lambda path: write_state(path / "model.safetensors", {"a": torch.zeros(10_000)}),
        lambda path: word_tokenizer([f"w{i}" for i in range(5000)]).save_pretrained(path / "tokenizer"),
        lambda path: write_jsonl(path / "rows.jsonl", [{"a": "b" * 30_000}]),
    ],
    ids=["text", "torch", "safetensors", "tokenizer", "rows"],
)
def test_every_library_s_refusal_names_the_folder_and_leaves_the_old_one(tmp_path, small_files, write):
    target = tmp_path / "step"
    target.mkdir()
    (target / "kept").touch()
    with (
        pytest.raises(OSError, match=r"cannot be written: (File too large|No space left).*; free some space") as caught,
        whole(target) as partial,
    ):
        partial.mkdir()
        write(partial)
    assert caught.value.filename == str(target)
    assert [p.name for p in tmp_path.iterdir()] == ["step"] and [p.name for p in target.iterdir()] == ["kept"]


def test_a_bug_is_no_full_disk(tmp_path):
    assert refusal(tmp_path, RuntimeError("shape '[2]' is invalid")) is None
    with pytest.raises(RuntimeError, match="is invalid"), whole(tmp_path / "a") as partial:
        partial.touch()
        raise RuntimeError("shape '[2]' is invalid")
    assert not list(tmp_path.iterdir())


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    with pytest.raises(OSError, match="cannot be written: Is a directory"), whole(tmp_path / "mine") as partial:
        partial.touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "kept"]


def test_an_error_that_names_a_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path / "written"):
        (tmp_path / "read").read_text()
    assert caught.value.filename == str(tmp_path / "read")


def test_a_folder_of_leftovers_counts_as_empty(tmp_path):
    assert not is_occupied(tmp_path / "none") and not is_occupied(tmp_path)
    (tmp_path / "config.json.partial").touch()
    (tmp_path / "evaluation" / "before.partial").mkdir(parents=True)
    (tmp_path / "evaluation" / "before.partial" / "0000.png").touch()
    (tmp_path / f".{'0' * 32}.tmp").touch()
    assert not is_occupied(tmp_path)
    (tmp_path / "evaluation" / "mine").touch()
    assert is_occupied(tmp_path) and is_occupied(tmp_path / "evaluation" / "mine")


# ---------------------------------------------------------------------------------------------- through the commands

TINY_RUN = [
    *("--train.mixed-precision", "no", "--train.max-steps", "1", "--train.report-to", "--rollout.num-prompts", "1"),
    *("--rollout.num-generations", "2", "--rollout.sampling.num-timesteps", "2", "--eval.num-prompts", "6"),
    *("--eval.num-references", "6", "--eval.sampling.num-timesteps", "2"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    build("tiny-showo", shapes.vocabulary(), seed=9).save(folder)
    return str(folder)


def refused(capsys, argv, size):
    """The last line on stderr of a command whose files may not grow beyond `size`."""
    capsys.readouterr()
    with files_up_to(size):
        assert main(argv) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize(
    ("size", "file", "then"),
    [
        (1_000, "config.json", "start it again with the same command"),
        (6_000, "evaluation/before", "continue with: .* train --output-dir .*/run --resume"),
        (300_000, "checkpoints/step-000001", "continue with: .* train --output-dir .*/run --resume"),
    ],
)
def test_a_run_on_a_full_disk_says_how_it_goes_on_and_does(weights, tmp_path, capsys, size, file, then):
    argv = ["train", "tiny-showo-grpo", "--model.weights", weights, "--output-dir", str(tmp_path / "run"), *TINY_RUN]
    told = refused(capsys, argv, size)
    assert re.search(rf"{tmp_path}/run/{file}: cannot be written: .*; free some space, then {then}$", told), told
    assert not list(tmp_path.rglob("*.partial"))
    assert main([*argv, *(["--resume"] if "--resume" in told else [])]) == 0
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("size", "file"),
    [
        (2_000, "evaluation/generate.json"),
        (7_000, "journal/drawing/process-0000.jsonl"),
        (9_000, "evaluation.json"),
    ],
)
def test_an_evaluation_on_a_full_disk_can_be_repeated(tmp_path, capsys, size, file):
    argv = ["evaluate", "tiny-showo", "--num-prompts", "12", "--output-dir", str(tmp_path / "out")]
    argv += ["--num-references", "12", "--sampling.num-timesteps", "6"]
    told = refused(capsys, argv, size)
    assert f"{tmp_path}/out/{file}: cannot be written: File too large; free some space" in told, told
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "out" / "evaluation.json").exists()
    assert main(argv) == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 12
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["geneval"]["n"] == 12
