"""A model that gives the log-probs it is told, and a rollout without content: what tests of the loss start from."""

import torch

from openunirl.draws import key
from openunirl.rollout import Rollout
from openunirl.types import AnswerRollout, AnswerScores, ImageRollout, ImageSampling, ImageScores


class Told:
    """A model that gives the log-probs it is told."""

    def __init__(self, logp_BN=None, logp_QT=None, mask_QT=None):
        self.logp_BN, self.logp_QT, self.mask_QT = logp_BN, logp_QT, mask_QT

    def score_images(self, rollout, one, *, logprob_guidance, relax):
        logp_BN = self.logp_BN.masked_fill(~one.scored_BN, 0)
        return ImageScores(logprobs_BN=logp_BN, entropy_BN=torch.zeros_like(logp_BN))

    def score_answers(self, images, questions, answers, *, temperature):
        return AnswerScores(
            logprobs_QT=self.logp_QT * self.mask_QT, entropy_QT=torch.zeros_like(self.logp_QT), mask_QT=self.mask_QT
        )


def untold_rollout(num_images, num_tokens):
    """As many images as that, of code 0, without prompts and answers."""
    nothing = torch.zeros(num_images, num_tokens)
    return Rollout(
        prompts=(),
        num_generations=3,
        num_questions=1,
        num_answers=1,
        images=ImageRollout(
            prompts=("",) * num_images,
            tokens_BN=nothing.long(),
            reveal_step_BN=nothing.long(),
            logprobs_BN=nothing,
            sampling=ImageSampling(),
        ),
        answers=AnswerRollout(
            questions=(), texts=(), tokens_QT=nothing.long(), mask_QT=nothing.bool(), logprobs_QT=nothing
        ),
        gold=(),
        scoring_seeds_B=key(1, torch.arange(num_images)),
    )
