"""Damaged inputs give one clear error or a counted skip: a share of benchmarks/damaged_inputs.py, and a command."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openunirl.models.checkpoints import read_state
from picture_folders import draw, refused

FILE = Path(__file__).parent.parent / "benchmarks" / "damaged_inputs.py"
sys.path.insert(0, str(FILE.parent))  # the parts of the script, which it imports
spec = importlib.util.spec_from_file_location("damaged_inputs", FILE)
assert spec is not None and spec.loader is not None
damaged = importlib.util.module_from_spec(spec)
spec.loader.exec_module(damaged)


SLOW = {"detector": 6, "color_classifier": 6, "summary": 12, "drawn_journal": 15}
SLOW |= {"janus_folder": 10, "showo_folder": 10, "chat_model": 6}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return damaged.Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("kind", damaged.KINDS)
def test_a_damaged_input_is_an_error_or_a_counted_skip(inputs, kind):
    @settings(max_examples=SLOW.get(kind, 60), deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**32).map(str))
    def holds(seed):
        found, told = damaged.outcome(inputs, kind, seed)
        assert found != "FAILURE", told

    holds()


@pytest.mark.parametrize(
    ("kind", "seed", "outcome"),
    [
        ("color_classifier", "0-821", "error"),  # an id of the tokenizer beyond the network's
        ("detector", "0-958", "sound"),  # a backbone that is told to answer in a tuple
        ("showo_folder", "0-1424", "error"),  # a longest text that is no number
    ],
)
def test_what_a_long_run_found(inputs, kind, seed, outcome):
    found, told = damaged.outcome(inputs, kind, seed)
    assert found == outcome, told


def test_a_tokenizer_of_which_nothing_fits_is_told_shortly(inputs):
    """Once each shape was listed, without end."""
    found, told = damaged.outcome(inputs, "image_tokenizer", "0-4412")
    assert found == "error" and "size mismatch" in told and len(told) < 700, told


def test_an_empty_weight_file_is_told(tmp_path):
    for name in ("a.bin", "a.safetensors", "a.pth"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=rf"{name} cannot be read as weights: \S"):
            read_state(tmp_path / name)


def test_a_damaged_folder_is_no_score(tmp_path, capsys):
    """Through the command: no evaluation.json, one sentence."""
    folder = draw(tmp_path / "pictures")
    (folder / "00003" / "metadata.jsonl").write_text(json.dumps({"prompt": "a", "tag": 3}))
    assert "00003/metadata.jsonl:1" in refused(capsys, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
