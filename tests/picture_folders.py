"""A folder of pictures of the shapes world, and `openunirl evaluate --images` on it, for the tests of that command."""

from PIL import Image

from openunirl.cli import main
from openunirl.tasks import shapes
from openunirl.tasks.records import read_jsonl, write_jsonl
from openunirl.tasks.shapes_oracle import Oracle
from openunirl.tasks.worlds import WORLDS

PROMPTS = 12


def draw(folder, *, seed=0):
    """12 prompts, two pictures each, in the shapes world: the first is right, the second is the next prompt's."""
    prompts = shapes.prompts("heldout", PROMPTS, seed)
    pictures = WORLDS["shapes"]().references(prompts, seed)
    for index, prompt in enumerate(prompts):
        (folder / f"{index:05d}" / "samples").mkdir(parents=True)
        write_jsonl(folder / f"{index:05d}" / "metadata.jsonl", [prompt.metadata()])
        for sample in range(2):
            Image.fromarray(pictures[(index + sample) % PROMPTS]).save(
                folder / f"{index:05d}" / "samples" / f"{sample:04d}.png"
            )
    return folder


def call(folder, out, *flags, code=0, detector="oracle"):
    argv = ["evaluate", "--images", str(folder), "--output-dir", str(out), "--detector", detector, *flags]
    assert main(argv) == code


def refused(capsys, folder, out, *flags, code=1, **more):
    """The one sentence that the command ends with."""
    capsys.readouterr()
    call(folder, out, *flags, code=code, **more)
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("openunirl: "), err
    return err


def rows(out):
    return read_jsonl(out / "results.jsonl")


def no_summary(out):
    return not (out / "evaluation.json").exists()


class Counting(Oracle):
    """Counts the pictures it sees; stops after `most`."""

    def __init__(self, most=10**9):
        self.seen, self.most = 0, most

    def detect(self, images):
        self.seen += len(images)
        if self.seen > self.most:
            raise KeyboardInterrupt
        return super().detect(images)
