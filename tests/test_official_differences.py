"""The benchmark that measures the differences to the official packages: what it needs, and how it pairs instances."""

import sys
import zipfile

import numpy as np
import pytest
import torch

from official_differences import PACKAGES, Blobs, imported_cv2, matched, official


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(SystemExit, match="pip install opencv-python-headless"):
        imported_cv2()
    with pytest.raises(SystemExit, match=f"{tmp_path} holds no wheel of mmdet: pip download"):
        official(tmp_path, "mmdet", "mask2bbox")


def test_one_function_is_taken_and_its_package_is_not_imported(tmp_path):
    code = """
import a_package_that_nobody_has
class Head(a_package_that_nobody_has.Base):
    @a_package_that_nobody_has.register
    def twice(self, x: a_package_that_nobody_has.Tensor) -> None:
        return factor * x
"""
    with zipfile.ZipFile(tmp_path / "mmdet-2.28.2-py3-none-any.whl", "w") as wheel:
        for file in PACKAGES["mmdet"]:
            wheel.writestr(file, code)
    assert official(tmp_path, "mmdet", "twice", factor=2)(None, 3) == 6
    with pytest.raises(ValueError, match="has no function thrice"):
        official(tmp_path, "mmdet", "thrice")


def test_instances_are_paired_within_their_class():
    assert matched(np.array([5, 2, 5, 7]), np.array([2, 5, 5, 5, 2])) == ([1, 0, 2], [0, 1, 2])


def test_blobs_differ_in_place_and_are_the_same_for_both_ends():
    (classes, masks), (again, _) = (Blobs(0)(torch.zeros(1, 3, 64, 96)) for _ in range(2))
    assert torch.equal(classes, again) and masks.shape == (1, 100, 16, 24)
    inside = (masks[0] > 0).flatten(1).float().mean(1)
    assert inside.min() < 0.1 and inside.max() > 0.3 and 0 < (masks[0, :, 0] > 0).any(1).float().mean() < 1
