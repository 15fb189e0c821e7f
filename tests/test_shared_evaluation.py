"""Processes that share an evaluation: all get what one alone would have made, and each made as many batches."""

import threading

import numpy as np
import pytest

from openunirl.config import EvalConfig
from openunirl.evaluation.kept import Kept
from openunirl.evaluation.run import evaluate
from openunirl.models import adapter
from openunirl.models.tiny import build
from openunirl.tasks import shapes
from openunirl.tasks.worlds import WORLDS
from openunirl.types import ImageSampling

CONFIG = EvalConfig(num_images=1, sampling=ImageSampling(num_timesteps=2), max_new_tokens=2, batch_size=2)


class Peer:
    """One of several threads that hand each other what they have."""

    count = 2
    meeting = threading.Barrier(count, timeout=60)
    handed = [None] * count

    def __init__(self, rank):
        self.rank = rank

    def gather_objects(self, own):
        self.handed[self.rank] = own
        self.meeting.wait()
        found = list(self.handed)
        self.meeting.wait()
        return found


def evaluated(model, kept, asked):
    draw, answer = model.sample_images, model.sample_answers
    model.sample_images = lambda prompts, *more: (asked.append(len(prompts)), draw(prompts, *more))[1]
    model.sample_answers = lambda images, questions, *more: (asked.append(0), answer(images, questions, *more))[1]
    prompts = shapes.prompts("heldout", 7, 0)
    return evaluate(model, WORLDS["shapes"](), prompts, CONFIG, seed=1, kept=kept)


def test_two_share_what_one_does(monkeypatch):
    monkeypatch.setattr(adapter, "PIXELS_AT_ONCE", 1)  # a convolution of more at once may round otherwise
    first, *models = (build("tiny-showo", shapes.vocabulary(), seed=5) for _ in range(1 + Peer.count))
    alone, found, asked = evaluated(first, Kept(), []), {}, ([], [])

    def work(rank):
        found[rank] = evaluated(models[rank], Kept(peers=Peer(rank)), asked[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(Peer.count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert asked[0] == asked[1] == [2, 0, 2, 0, 0, 0]  # 7 of each: 4 for the first, 3 and the first one again
    for rank in range(Peer.count):
        assert found[rank].generated == alone.generated and found[rank].references == alone.references
        assert found[rank].summary == alone.summary and np.array_equal(found[rank].pictures, alone.pictures)


def test_a_folder_is_not_shared_in_memory(tmp_path):
    with pytest.raises(AssertionError, match="take turns"):
        Kept(tmp_path, Peer(0))
