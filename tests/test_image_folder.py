"""Folders in GenEval's layout: what is read, and every way in which they are refused."""

import contextlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openunirl.evaluation.image_folder import all_equal, check_names, decode, read_folder
from openunirl.tasks.geneval import COLORS, GENEVAL_OBJECTS, evaluation_prompts
from openunirl.tasks.records import write_jsonl

RECORDS = [prompt.metadata() for prompt in evaluation_prompts()[:4]]


def png(seed=0, size=(8, 6), mode="RGB", kind="PNG", **options):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format=kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Four prompts, two pictures each."""
    for index, record in enumerate(RECORDS):
        place = tmp_path / "made" / f"{index:05d}"
        (place / "samples").mkdir(parents=True)
        write_jsonl(place / "metadata.jsonl", [record])
        for sample in range(2):
            (place / "samples" / f"{sample:04d}.png").write_bytes(png(10 * index + sample))
    return tmp_path / "made"


@pytest.fixture
def prompt_file(tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", RECORDS)
    return tmp_path / "prompts.jsonl"


def names(pictures):
    return [picture.name for picture in pictures]


ALL = [f"{index:05d}/samples/{sample:04d}.png" for index in range(4) for sample in range(2)]


def test_by_prompt_and_sample(folder):
    pictures = read_folder(folder)
    assert names(pictures) == ALL
    assert [picture.prompt.metadata() for picture in pictures[::2]] == RECORDS
    assert [(p.index, p.sample) for p in pictures[:3]] == [(0, 0), (0, 1), (1, 0)]


def test_what_generation_tools_leave_is_passed_over(folder):
    (folder / "generate.json").write_text("{}")
    (folder / "00000" / "grid.png").write_bytes(png())
    (folder / "00000" / "samples" / "grid.png").write_bytes(png())
    (folder / "00000" / "samples" / ".0001.png.partial").write_bytes(b"half")
    (folder / "logs").mkdir()
    assert names(read_folder(folder)) == ALL


def test_numbers_count_and_not_names(folder):
    (folder / "00003").rename(folder / "3")
    (folder / "3" / "samples" / "0001.png").rename(folder / "3" / "samples" / "1.jpg")
    assert names(read_folder(folder))[-2:] == ["3/samples/0000.png", "3/samples/1.jpg"]


def test_the_prompt_file_stands_in_for_metadata_that_is_missing(folder, prompt_file):
    (folder / "00001" / "metadata.jsonl").unlink()
    write_jsonl(folder / "00002" / "metadata.jsonl", [{"prompt": RECORDS[2]["prompt"]}])  # as `generate --prompts` does
    assert [p.prompt.metadata() for p in read_folder(folder, prompt_file=prompt_file)[::2]] == RECORDS


def damage(folder, what):
    """One kind of damage to the folder `made`; a function of the folder."""
    exec_on = {
        "no folder": lambda: folder.rename(folder.with_name("elsewhere")),
        "no metadata": lambda: (folder / "00001/metadata.jsonl").unlink(),
        "only a prompt": lambda: write_jsonl(folder / "00001/metadata.jsonl", [{"prompt": "a photo of a dog"}]),
        "two records": lambda: write_jsonl(folder / "00001/metadata.jsonl", RECORDS[:2]),
        "bad metadata": lambda: (folder / "00001/metadata.jsonl").write_text('{"tag": "colors", "inc'),
        "no samples": lambda: [file.unlink() for file in (folder / "00001/samples").iterdir()],
        "one sample less": lambda: (folder / "00001/samples/0001.png").unlink(),
        "first sample gone": lambda: (folder / "00001/samples/0000.png").unlink(),
        "prompt folder gone": lambda: (folder / "00001").rename(folder.parent / "away"),
        "twice": lambda: (folder / "00001/samples/0000.jpg").write_bytes(png()),
        "twice a prompt": lambda: (folder / "1").mkdir(),
        "strange names": lambda: [
            file.rename(file.with_name(f"sample_{i}.png"))
            for i, file in enumerate(sorted((folder / "00001/samples").iterdir()))
        ],
    }
    exec_on[what]()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no folder", "there is no folder"),
        ("no metadata", r"00001.metadata\.jsonl is missing.*--prompt-file"),
        ("only a prompt", r"00001.metadata\.jsonl holds a prompt and not what .*--prompt-file"),
        ("two records", r"holds 2 lines; it should hold one"),
        ("bad metadata", r"metadata\.jsonl:1: not valid JSON at column"),
        ("no samples", "00001.samples holds no numbered picture: finish drawing"),
        ("one sample less", r"00001 holds 1 pictures and most prompts 2 \(1 differ\): finish drawing.*--partial"),
        ("first sample gone", r"00001.samples lacks picture 0 \(1 missing, numbers go up to 1\)"),
        ("prompt folder gone", r"lacks prompt folder 1 \(1 missing, numbers go up to 3\)"),
        ("twice", r"0000\.jpg and 0000\.png have the same number"),
        ("twice a prompt", r"00001 and .*1 have the same number"),
        ("strange names", r"sample_0\.png, which is not named by a number"),
    ],
)
def test_damage_is_named(folder, what, words):
    damage(folder, what)
    with pytest.raises(ValueError, match=words):
        read_folder(folder)


@pytest.mark.parametrize("what", ["no samples", "one sample less", "first sample gone", "prompt folder gone"])
def test_partial_scores_what_is_there(folder, what):
    damage(folder, what)
    left = names(read_folder(folder, partial=True))
    assert left == [name for name in ALL if (folder / name).exists()] and len(left) < 8


def test_a_time_for_a_number_costs_no_memory(folder):
    samples = folder / "00001" / "samples"
    (samples / "0001.png").rename(samples / "1714550000.png")
    with pytest.raises(ValueError, match=r"lacks picture 1 \(1714549999 missing, numbers go up to 1714550000\)"):
        read_folder(folder)


def test_a_folder_above_is_recognised(folder):
    with pytest.raises(ValueError, match=r"not in GenEval's layout.*did you mean .*made\?"):
        read_folder(folder.parent)
    (folder.parent / "empty").mkdir()
    with pytest.raises(ValueError, match="not in GenEval's layout"):
        read_folder(folder.parent / "empty")


def test_folders_of_another_prompt_file_are_refused(folder, prompt_file, tmp_path):
    first, second = (folder / f"0000{i}" / "metadata.jsonl" for i in (0, 1))
    write_jsonl(prompt_file, [RECORDS[1], RECORDS[0], *RECORDS[2:]])
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1 of .*in another order"):
        read_folder(folder, prompt_file=prompt_file)
    write_jsonl(prompt_file, RECORDS[:3])
    with pytest.raises(ValueError, match=r"00003 has no line in .*prompts\.jsonl, which holds 3"):
        read_folder(folder, prompt_file=prompt_file)
    write_jsonl(prompt_file, [*RECORDS, RECORDS[0]])
    with pytest.raises(ValueError, match=r"lacks 1 of the 5 prompts .*the first is 00004"):
        read_folder(folder, prompt_file=prompt_file)
    assert names(read_folder(folder, prompt_file=prompt_file, partial=True)) == ALL
    write_jsonl(prompt_file, RECORDS)
    write_jsonl(first, [RECORDS[0] | {"include": RECORDS[1]["include"]}])
    with pytest.raises(ValueError, match=r"asks for something else than .* under the same prompt"):
        read_folder(folder, prompt_file=prompt_file)
    assert second.exists()


def test_names_that_the_detector_does_not_know(folder):
    check_names(read_folder(folder), GENEVAL_OBJECTS, COLORS, "mask2former")
    with pytest.raises(ValueError, match="which the detector oracle does not know"):
        check_names(read_folder(folder), ("circle", "ring"), COLORS, "oracle")
    write_jsonl(
        folder / "00000/metadata.jsonl",
        [{"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "pink"}], "prompt": "a pink bus"}],
    )
    with pytest.raises(ValueError, match="asks for 'pink'"):
        check_names(read_folder(folder), GENEVAL_OBJECTS, ("red",), "oracle")


# --------------------------------------------------------------------------------------------------- pictures


def test_decoding():
    assert decode(png(3)).shape == (6, 8, 3) and decode(png(3)).dtype == np.uint8
    for mode in ("L", "P", "RGBA", "1", "LA"):
        assert decode(png(3, mode=mode)).shape == (6, 8, 3)
    assert np.array_equal(decode(png(3, mode="RGBA")), decode(png(3)))
    assert decode(png(3, kind="JPEG")).shape == (6, 8, 3)


def test_a_16_bit_rgb_png_is_read_as_8_bits_a_channel():
    """By Pillow, which keeps the high byte; docs/evaluation.md says so. A 16-bit grey one is refused, below."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header, line = (
        struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0),
        b"\0" + struct.pack(">6H", 0, 255, 256, 0xABCD, 1, 65535),
    )
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(line)) + chunk(b"IEND", b"")
    assert decode(b"\x89PNG\r\n\x1a\n" + parts).tolist() == [[[0, 0, 1], [0xAB, 0, 255]]]


def test_pictures_are_turned_as_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    turned = decode(png(3, exif=exif.tobytes()))
    assert np.array_equal(turned, np.rot90(decode(png(3)), -1))


def test_a_flipped_bit_in_the_pixels_of_a_png_is_refused():
    """Pillow alone reads some of them, as another picture."""
    file, ramp = io.BytesIO(), np.linspace(0, 255, 24 * 24, dtype=np.uint8).reshape(24, 24)
    Image.fromarray(np.stack([ramp, ramp.T, ramp // 2], axis=-1)).save(file, format="PNG")
    content, silent = file.getvalue(), 0
    start, end = content.index(b"IDAT") + 4, content.index(b"IEND") - 8
    for bit in range(8 * start, 8 * end):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(Exception), Image.open(io.BytesIO(damaged)) as picture:
            picture.load()
            silent += 1
        with pytest.raises(ValueError, match="damaged, or no picture"):
            decode(bytes(damaged))
    assert silent > 0


def test_what_cannot_be_read_says_why():
    deep = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(deep, format="PNG")
    narrow = io.BytesIO()
    Image.new("RGB", (1, 2000)).save(narrow, format="PNG")
    for content, words in (
        (b"", "empty"),
        (b"<html>", "damaged, or no picture: no known picture format$"),
        (png()[:60], "damaged, or no picture"),
        (deep.getvalue(), "more than 8 bits"),
        (narrow.getvalue(), "1x2000 pixels are too narrow"),
    ):
        with pytest.raises(ValueError, match=words):
            decode(content)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused_in_one_line(data):
    content = bytearray(png(1, kind=data.draw(st.sampled_from(["PNG", "JPEG", "BMP", "WEBP"]))))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        assert decode(bytes(content)).ndim == 3
    except ValueError as error:
        assert "\n" not in str(error)


@settings(max_examples=150, deadline=None)
@given(line=st.binary(max_size=80) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")))
def test_damaged_metadata_is_refused_in_one_line(line, tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzz") / "00000"
    (place / "samples").mkdir(parents=True)
    (place / "samples" / "0000.png").write_bytes(png())
    (place / "metadata.jsonl").write_bytes(line)
    with pytest.raises(ValueError) as raised:
        read_folder(place.parent)
    assert str(raised.value).isprintable()


def test_all_equal(folder):
    pictures = read_folder(folder)
    assert not all_equal(pictures)
    for picture in pictures[:-1]:
        picture.file.write_bytes(png(0, compress_level=1))  # the same pixels in other bytes
    assert not all_equal(pictures) and all_equal(pictures[:-1])
    pictures[-1].file.write_bytes(png(0))
    assert all_equal(pictures)
    pictures[2].file.write_bytes(b"damaged")
    assert all_equal(pictures)
    assert not all_equal(pictures[:1]) and not all_equal([pictures[0], pictures[2]])
    assert json.loads(pictures[0].file.parent.parent.joinpath("metadata.jsonl").read_text()) == RECORDS[0]
