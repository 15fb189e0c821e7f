"""Mask2Former behind the Detector protocol: sizes, padding, post-processing by hand; small checkpoints."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import Mask2FormerForUniversalSegmentation

from openunirl.evaluation.detectors import (
    GREY,
    MEAN,
    STD,
    InstanceNet,
    Mask2FormerDetector,
    boxes,
    by_class,
    full_precision,
    instances,
    padded,
    prepare,
    resized,
)
from openunirl.tasks.geneval import GENEVAL_OBJECTS
from photo_checkpoints import save_clip, save_mask2former


def logit(p):
    return math.log(p / (1 - p))


# ----------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("size", "inner", "outer"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((256, 256), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((333, 517), (800, 1242), (800, 1248)),  # 517 * 800 / 333 = 1242.04
        ((517, 333), (1242, 800), (1248, 800)),
        ((480, 640), (800, 1067), (800, 1088)),  # 1066.67 is rounded
        ((300, 900), (444, 1333), (448, 1344)),  # the long side decides: 300 * 1333 / 900 = 444.33
        ((1, 1), (800, 800), (800, 800)),
        ((1, 1000), (1, 1333), (32, 1344)),
    ],
)
def test_sizes(size, inner, outer):
    assert resized(size) == inner
    assert padded(inner) == outer


def test_a_picture_without_a_short_side_is_refused():
    with pytest.raises(ValueError, match="5000x1 pixels is too narrow"):
        resized((1, 5000))


# -------------------------------------------------------------------------------------------------- preparation


def test_padding_is_grey_before_normalisation_and_right_and_below_only():
    image = np.full((2, 3, 3), (255, 0, 128), dtype=np.uint8)  # 2x3 -> 800x1200 -> 800x1216
    pixels = prepare(image)
    assert pixels.shape == (3, 800, 1216) and pixels.dtype == torch.float32
    for channel, value in enumerate((255, 0, 128)):
        inside, outside = ((x - MEAN[channel]) / STD[channel] for x in (value, GREY))
        assert torch.allclose(pixels[channel, :, :1200], torch.tensor(inside))
        assert torch.allclose(pixels[channel, :, 1200:], torch.tensor(outside))
    tall = prepare(image.transpose(1, 0, 2).copy())  # 3x2 -> 1200x800
    assert torch.allclose(tall[1, 1200:], torch.tensor((GREY - MEAN[1]) / STD[1]))
    assert torch.allclose(tall[1, :1200], torch.tensor((0 - MEAN[1]) / STD[1]))


def test_enlarging_is_bilinear_with_half_pixel_centres_and_rounded():
    image = np.zeros((1, 2, 3), dtype=np.uint8)
    image[0, 1] = 100  # 1x2 -> 666.5: k = min(1333/2, 800) -> 667x1333; both columns 666.5 pixels wide
    pixels = prepare(image)[0] * STD[0] + MEAN[0]
    assert pixels.shape == (672, 1344)
    for column in (0, 300, 400, 666, 900, 1332):
        place = (column + 0.5) * 2 / 1333 - 0.5
        assert pixels[0, column].item() == pytest.approx(round(100 * min(max(place, 0), 1)), abs=1e-3)


def test_shrinking_does_not_smooth():
    """cv2 reads two neighbours; a smoothing resize would give about 85 everywhere for one bright column in three."""
    image = np.zeros((2400, 2400, 3), dtype=np.uint8)
    image[:, ::3] = 255
    shrunk = prepare(image)[0] * STD[0] + MEAN[0]
    assert shrunk[5].max().item() == pytest.approx(0, abs=1e-3)  # centres fall on columns 1, 4, 7, ...


# ---------------------------------------------------------------------------------------------- post-processing


def test_instances_by_hand():
    """Two queries, two classes; masks are at the picture's own size, so that nothing is interpolated."""
    big, low = logit(0.9), logit(0.1)
    mask = torch.full((2, 800, 800), low)
    mask[0, 100:300, 50:250] = big  # 200x200
    mask[1, 0, 0], mask[1, 799, 799] = logit(0.6), logit(0.8)  # two lone pixels
    classes = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]]).log()
    got = instances(classes, mask, inner=(800, 800), original=(800, 800), most=3)
    # the three best pairs: (q0, c0) 0.7, (q1, c1) 0.6, (q1, c0) 0.3; (q0, c1) 0.2 is not among them
    assert got.query_K.tolist() == [0, 1, 1] and got.class_K.tolist() == [0, 1, 0]
    assert got.score_K == pytest.approx([0.7 * 0.9, 0.6 * 0.7, 0.3 * 0.7], abs=1e-5)
    assert got.box_K4.tolist() == [[50, 100, 250, 300], [0, 0, 800, 800], [0, 0, 800, 800]]
    assert got.mask_K.tolist() == [0, 1, 1] and got.masks_UHW.dtype == bool
    assert got.masks_UHW.sum((1, 2)).tolist() == [40000, 2]


def test_the_order_is_by_score_then_query_then_class():
    mask = torch.full((3, 800, 800), logit(0.5 + 1e-3))
    mask[1] *= -1  # empty: score 0, box of zeros
    classes = torch.tensor([[0.4, 0.4, 0.2]] * 3).log()
    got = instances(classes, mask, inner=(800, 800), original=(800, 800))  # 6 pairs, fewer than 100
    assert got.query_K.tolist() == [0, 0, 2, 2, 1, 1] and got.class_K.tolist() == [0, 1, 0, 1, 0, 1]
    assert got.score_K[4:].tolist() == [0, 0] and got.box_K4[4:].tolist() == [[0] * 4] * 2


def test_no_object_takes_its_share_and_is_no_class():
    classes = torch.tensor([[1.0, 1.0, 5.0]])
    got = instances(classes, torch.full((1, 800, 800), 9.0), inner=(800, 800), original=(800, 800))
    assert got.class_K.tolist() == [0, 1]
    share = math.e / (2 * math.e + math.e**5)
    assert got.score_K == pytest.approx([share * torch.tensor(9.0).sigmoid().item()] * 2, rel=1e-5)


def test_padding_is_cut_off_before_the_mask_becomes_the_pictures():
    """A mask logit map of the padded 800x1248 at quarter size; only the 6 padded columns are inside the mask."""
    mask = torch.full((1, 200, 312), -50.0)
    mask[..., 311] = 50.0  # columns 1244.. of 1248: the picture ends at 1242
    classes = torch.tensor([[5.0, 0.0]])
    got = instances(classes, mask, inner=(800, 1242), original=(333, 517))
    # enlarged linearly, the logit is 0 halfway between the centres 1242 and 1246 of the last two columns: 1244
    assert not got.masks_UHW.any() and got.score_K[0] == 0
    mask[..., 310] = 50.0  # now it is 0 at 1240, so pixels 1240 and 1241 of 1242 are inside
    got = instances(classes, mask, inner=(800, 1242), original=(333, 517))
    assert got.masks_UHW.any((0, 1)).tolist() == [False] * 516 + [True]
    assert got.box_K4.tolist() == [[516, 0, 517, 333]]


def test_masks_are_resized_as_logits():
    """A binary mask, resized by nearest neighbours, would end elsewhere: the zero crossing moves with the logits."""
    mask = torch.full((1, 200, 200), -1.0)
    mask[..., :100] = 3.0
    got = instances(torch.tensor([[5.0, 0.0]]), mask, inner=(800, 800), original=(800, 800))
    # between centres 397.5 and 401.5 (in pixel indices) from 3 to -1: zero at 400.5, so columns 0..400 are inside
    assert got.box_K4.tolist() == [[0, 0, 401, 800]]


def test_many_masks_are_made_a_few_at_a_time(monkeypatch):
    torch.manual_seed(0)
    classes, masks = torch.randn(7, 4), torch.randn(7, 20, 20)
    whole = instances(classes, masks, inner=(80, 70), original=(31, 27))
    monkeypatch.setattr("openunirl.evaluation.detectors._PIXELS_AT_ONCE", 3 * 96 * 96)
    parts = instances(classes, masks, inner=(80, 70), original=(31, 27))
    assert np.array_equal(whole.masks_UHW, parts.masks_UHW) and np.array_equal(whole.box_K4, parts.box_K4)
    assert whole.score_K == pytest.approx(parts.score_K, abs=1e-6)


def test_boxes():
    masks = torch.zeros(4, 5, 6, dtype=torch.bool)
    masks[0, 1, 2] = True
    masks[1] = True
    masks[3, 4, 0] = masks[3, 0, 5] = True
    assert boxes(masks).tolist() == [[2, 1, 3, 2], [0, 0, 6, 5], [0, 0, 0, 0], [0, 0, 6, 5]]
    assert boxes(masks).dtype == torch.float32


def test_classes_are_mapped_by_index_to_genevals_names():
    classes = torch.full((3, 81), -20.0)
    for query, index in enumerate((3, 65, 79)):
        classes[query, index] = 10.0
    found = by_class(instances(classes, torch.ones(3, 800, 800), inner=(800, 800), original=(40, 40), most=3))
    assert set(found) == {"motorcycle", "tv remote", "toothbrush"}
    (detection,) = found["tv remote"]
    assert detection.box == (0.0, 0.0, 40.0, 40.0) and detection.mask.shape == (40, 40)


# --------------------------------------------------------------------------------------------------- the network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_mask2former(tmp_path_factory.mktemp("mask2former") / "net")


@pytest.fixture(scope="module")
def detector(checkpoint):
    return Mask2FormerDetector(str(checkpoint))


def picture(height, width, seed=0):
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (smooth.permute(1, 2, 0) * 255).to(torch.uint8).numpy()


def test_the_net_is_transformers_own(checkpoint, monkeypatch):
    """Built by transformers itself, whose loss asks for scipy without using it here."""
    module = "transformers.models.mask2former.modeling_mask2former.requires_backends"
    monkeypatch.setattr(module, lambda *_: None)
    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(checkpoint).eval()
    ours = InstanceNet.from_pretrained(checkpoint).eval()
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, (classes, masks) = theirs(pixel_values=pixels), ours(pixels)
    assert torch.equal(classes, wanted.class_queries_logits) and classes.shape == (2, 20, 81)
    assert torch.equal(masks, wanted.masks_queries_logits) and masks.shape == (2, 20, 16, 24)


def test_detections_of_a_batch_are_those_of_each_picture(detector):
    images = [picture(40, 60), picture(60, 40), picture(40, 60, seed=3)]
    together = detector.detect(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = detector.detect([image])
        assert set(found) <= set(GENEVAL_OBJECTS) and sum(map(len, found.values())) == 100
        assert alone.keys() == found.keys()
        for name in found:
            assert [d.score for d in found[name]] == pytest.approx([d.score for d in alone[name]], abs=1e-5)
        for detection in (d for objects in found.values() for d in objects):
            assert detection.mask.shape == image.shape[:2] and detection.mask.dtype == bool
            assert 0 <= detection.score <= 1
            x0, y0, x1, y1 = map(int, detection.box)
            assert detection.mask[y0:y1, x0:x1].sum() == detection.mask.sum()
    assert together[0] != together[2]


@pytest.mark.parametrize("bad", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))])
def test_other_arrays_are_refused(detector, bad):
    with pytest.raises(ValueError, match="pass uint8 RGB"):
        detector.detect([bad])


def test_full_precision_is_put_back():
    def state():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled

    at_first = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # otherwise "highest" is what it was, and nothing is shown
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            before = state()
            with full_precision():
                assert state() == ("highest", False, False)
            assert state() == before == ("medium", True, True)
    finally:
        torch.set_float32_matmul_precision(at_first)


# ------------------------------------------------------------------------------------------- other checkpoints


def refused(folder, words):
    with pytest.raises(ValueError, match=words) as raised:
        Mask2FormerDetector(str(folder))
    assert "\n" not in str(raised.value)


def test_another_number_of_classes_is_refused(tmp_path):
    refused(save_mask2former(tmp_path / "ade", classes=150), "of 150 classes, not of COCO's 80 things")


def test_another_network_is_refused(tmp_path):
    refused(save_clip(tmp_path / "clip"), "of the kind 'clip', not 'mask2former'")


def test_missing_weights_are_not_drawn_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_mask2former(tmp_path / "net")
    weights = load_file(folder / "model.safetensors")
    del weights["class_predictor.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"lacks 1 weights of InstanceNet, such as class_predictor\.weight")


def test_weights_of_another_shape_are_refused(tmp_path):
    folder = save_mask2former(tmp_path / "net")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_queries": 30}))
    refused(folder, "cannot be read as InstanceNet|lacks")


def test_damaged_and_absent_checkpoints_are_refused(tmp_path):
    folder = save_mask2former(tmp_path / "net")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(folder, "cannot be read as InstanceNet")
    (folder / "config.json").write_text("{")
    refused(folder, "cannot be read as AutoConfig")
    refused(tmp_path / "nowhere", "nowhere cannot be read")
