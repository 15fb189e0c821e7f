"""The colour classifier: crops worked out by hand, prompts and prototypes restated, a small CLIP checkpoint."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from openunirl.evaluation.color import ClipColors, cut_out, square, to_clip
from openunirl.evaluation.judges import META_DETECTOR, META_LABEL, OPENAI_CLIP, PhotoJudge, label
from openunirl.tasks.geneval import COLORS
from openunirl.types import Detection
from photo_checkpoints import save_clip, save_mask2former


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "net")


@pytest.fixture(scope="module")
def classifier(checkpoint):
    return ClipColors(str(checkpoint))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------------ crops


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((224, 224), (224, 224), (0, 0)),
        ((100, 50), (448, 224), (112, 0)),
        ((50, 100), (224, 448), (0, 112)),
        ((225, 224), (225, 224), (0, 0)),  # margin 1: round(0.5) = 0
        ((227, 224), (227, 224), (2, 0)),  # margin 3: round(1.5) = 2, where others cut at 1
        ((224, 229), (224, 229), (0, 2)),  # margin 5: round(2.5) = 2
        ((7, 3), (522, 224), (149, 0)),  # 224 * 7 / 3 = 522.67 is cut off
        ((1, 40), (224, 8960), (0, 4368)),
    ],
)
def test_square_by_hand(size, resized, corner):
    picture = Image.fromarray(noise(size[1], size[0]))
    expected = picture.resize(resized, Image.Resampling.BICUBIC).crop((*corner, corner[0] + 224, corner[1] + 224))
    assert np.array_equal(square(picture, 224), expected)


def test_what_is_not_the_object_is_grey():
    image, mask = noise(6, 8), np.zeros((6, 8), dtype=bool)
    mask[2:4, 3:7] = True
    mask[2, 3] = False
    crop = np.array(cut_out(image, Detection(box=(3.0, 2.0, 7.0, 4.0), score=1.0, mask=mask)))
    expected = image[2:4, 3:7].copy()
    expected[0, 0] = (153, 153, 153)
    assert np.array_equal(crop, expected)
    wider = np.array(cut_out(image, Detection(box=(0, 0, 8, 6), score=1.0, mask=mask)))
    assert (wider[~mask] == 153).all() and np.array_equal(wider[mask], image[mask])


def test_without_a_mask_the_box_is_cut_out_as_it_is():
    image = noise(6, 8)
    assert np.array_equal(np.array(cut_out(image, Detection(box=(1.0, 0.0, 5.0, 6.0), score=1.0))), image[:, 1:5])


def test_a_box_without_area_and_a_foreign_mask_are_refused():
    with pytest.raises(ValueError, match="without area"):
        cut_out(noise(6, 8), Detection(box=(3.0, 2.0, 3.0, 4.0), score=0.0))
    with pytest.raises(ValueError, match=r"\(5, 5\) for a picture of shape \(6, 8, 3\)"):
        cut_out(noise(6, 8), Detection(box=(0, 0, 4, 4), score=1.0, mask=np.ones((5, 5), dtype=bool)))


def test_normalisation():
    pixels = to_clip([Image.new("RGB", (2, 2), (255, 0, 51))])
    assert pixels.shape == (1, 3, 2, 2) and pixels.dtype == torch.float32
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (0.2 - 0.40821073) / 0.27577711]
    assert pixels[0, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------------------------------------------- the network


def test_prototypes_are_means_of_normalised_prompts(checkpoint, classifier):
    net, tokenizer = CLIPModel.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    prototypes = classifier.prototypes("tv remote")
    assert prototypes.shape == (10, 16)
    for index, color in enumerate(COLORS):
        total = torch.zeros(16)
        for prompt in (
            f"a photo of a {color} tv remote",
            f"a photo of a {color}-colored tv remote",
            f"a photo of a {color} object",
        ):
            with torch.no_grad():
                told = net.get_text_features(**tokenizer([prompt], return_tensors="pt")).pooler_output[0]
            total += told / told.norm()
        assert prototypes[index].tolist() == pytest.approx((total / total.norm()).tolist(), abs=1e-5)
    assert classifier.prototypes("tv remote") is prototypes  # asked once


def test_the_color_is_the_nearest_prototype(checkpoint, classifier):
    image = noise(40, 60)
    detections = [
        Detection(box=(0, 0, 30, 40), score=0.9),
        Detection(box=(10, 5, 60, 25), score=0.8, mask=np.triu(np.ones((40, 60), dtype=bool))),
    ]
    net = CLIPModel.from_pretrained(checkpoint).eval()
    pixels = to_clip([square(cut_out(image, each), 32) for each in detections])
    with torch.no_grad():
        features = net.get_image_features(pixel_values=pixels).pooler_output
    expected = [COLORS[i] for i in (features @ classifier.prototypes("bus").T).argmax(1).tolist()]
    assert classifier.colors(image, detections, "bus") == expected
    assert classifier.colors(image, detections[1:], "bus") == expected[1:]
    assert classifier.colors(image, [], "bus") == []


def test_other_and_damaged_checkpoints_are_refused(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="of the kind 'mask2former', not 'clip'"):
        ClipColors(str(save_mask2former(tmp_path / "net")))
    bare = save_clip(tmp_path / "bare")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(ValueError, match=r"bare: the tokenizer knows \d+ tokens and the network 190; add"):
        ClipColors(str(bare))
    with pytest.raises(ValueError, match="nowhere cannot be read as AutoConfig"):
        ClipColors(str(tmp_path / "nowhere"))


def test_merges_that_were_cut_off_are_noticed(tmp_path):
    """The tokens and their number stay the same; "red" just falls into pieces that the network never saw."""
    whole = save_clip(tmp_path / "net", words=("red",))
    assert ClipColors(str(whole)).tokenizer("red", add_special_tokens=False).input_ids == [189]
    merges = (whole / "merges.txt").read_text().splitlines(keepends=True)
    (whole / "merges.txt").write_text("".join(merges[:-1]))
    with pytest.raises(ValueError, match=r"net: the tokenizer splits 'red', which .*merges\.txt"):
        ClipColors(str(whole))


@pytest.mark.parametrize("value", [[], "77"])
def test_a_tokenizer_of_damaged_settings_is_named(tmp_path, value):
    """transformers reads them, and stumbles later."""
    place = save_clip(tmp_path / "net", words=("red",))
    (place / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": value})
    )
    with pytest.raises(ValueError, match=r"net: the tokenizer cannot read 'red' \(TypeError\).*tokenizer_config\.json"):
        ClipColors(str(place))


def test_scores_that_are_not_finite_name_no_color(checkpoint):
    broken = ClipColors(str(checkpoint))
    with torch.no_grad():
        broken.net.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        broken.colors(noise(8, 8), [Detection(box=(0, 0, 8, 8), score=1.0)], "bus")


@pytest.mark.parametrize("part", ["", "text_projection", "text_model", "visual_projection"])
def test_dead_weights_name_no_color(checkpoint, part):
    """Otherwise every object would be of the first colour."""
    broken = ClipColors(str(checkpoint))
    with torch.no_grad():
        for name, weight in broken.net.named_parameters():
            if name.startswith(part):
                weight.zero_()
    with pytest.raises(ValueError, match="are equal for all 10 colors: its weights are damaged"):
        broken.colors(noise(8, 8), [Detection(box=(0, 0, 8, 8), score=1.0)], "bus")


# ----------------------------------------------------------------------------------------------------- the judge


def test_the_label_is_metas_only_for_metas_weights():
    assert label(META_DETECTOR, OPENAI_CLIP) == META_LABEL == "GenEval protocol, Meta weights"
    for weights in (("my/copy", OPENAI_CLIP), (META_DETECTOR, "laion/clip")):
        assert label(*weights) == f"GenEval protocol, weights {weights[0]} and {weights[1]}"


@pytest.mark.parametrize("name", [META_DETECTOR, OPENAI_CLIP])
def test_a_local_folder_of_the_hubs_name_is_not_metas(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert label(META_DETECTOR, OPENAI_CLIP) == META_LABEL
    (tmp_path / name).mkdir(parents=True)
    assert label(META_DETECTOR, OPENAI_CLIP) == f"GenEval protocol, weights {META_DETECTOR} and {OPENAI_CLIP}"


def test_a_photo_judge_is_both(classifier):
    class Finds:
        def detect(self, images):
            return [{"bus": [Detection(box=(0, 0, 8, 8), score=0.9)]} for _ in images]

    judge = PhotoJudge(Finds(), classifier)
    (found,) = judge.detect([noise(8, 8)])
    assert judge.colors(noise(8, 8), found["bus"], "bus") == classifier.colors(noise(8, 8), found["bus"], "bus")
