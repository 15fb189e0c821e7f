"""Janus behind the UnifiedModel boundary: draws token by token over VQ codes, answers from pixels seen through SigLIP.

In: prompts, questions, images as tokens, pixels or one-hots. Out: rollouts and scores (types.py). Source: Janus (arXiv
2410.13848), Janus-Pro (2501.17811) and their released inference; METHOD 2 and 3 for log-probs and relaxed images.

Departures: 1. prompts of different lengths are batched, padded on the left, positions counting from the first id; each
distinct prompt, and one unconditional row per length, is computed once for its images, drawn (static_cache.py) and
scored (prefix.py); 2. at guidance 1 only conditional rows are computed; 3. answers are limited to text ids without
image specials; 4. the questions on one image share its prefix; 5. drawn images are read as float pixels, unrounded.

Shapes: B images, Q questions, R rows, N image tokens, T answer tokens, V codes, L positions, S selected positions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import JanusConfig

from openunirl.config import ModelConfig
from openunirl.draws import Draws, KeyedDraws
from openunirl.models import autoregressive, checkpoints, janus_files, janus_layout
from openunirl.models.adapter import Adapter
from openunirl.models.answering import answer_tokens, decode_answers, score_tokens
from openunirl.models.autoregressive import causal_mask, left_padded, positions
from openunirl.models.chunked import Reduce
from openunirl.models.janus_net import JanusNet, sizes_of
from openunirl.models.janus_prompting import SYSTEM, Prompting, read_picture, read_tokenizer, roles_of
from openunirl.models.masked import Estimator
from openunirl.models.packed_linear import packed_linears
from openunirl.models.packing import pack
from openunirl.models.policy import drawing_loss, log_policy, score
from openunirl.models.prefix import Prefix
from openunirl.models.protocol import PretrainBatch, Support
from openunirl.models.static_cache import StaticCache
from openunirl.models.vq import JanusVQ
from openunirl.relaxation import Relaxation
from openunirl.types import (
    AnswerRollout,
    AnswerSampling,
    AnswerScores,
    ImageQuestion,
    ImageRollout,
    Images,
    ImageSampling,
    ImageScores,
    ScorePass,
)


class Janus(Adapter):
    """The adapter. `net` is trained; `image_tokenizer` is frozen; `reference()` swaps in the frozen base.

    The vision tower is not trained on own pictures (gradients pass through it): what speaks and draws is."""

    trunk = "model.language_model"
    draws_tokens_in_turn = True
    unlearned = ("model.vision_model",)

    def __init__(self, net: JanusNet, image_tokenizer: JanusVQ, prompting: Prompting, config: JanusConfig) -> None:
        parts: Any = config
        if parts.text_config.vocab_size < prompting.embedded:
            raise ValueError(
                f"the checkpoint's vocabulary has {parts.text_config.vocab_size} entries and the tokenizer "
                f"{prompting.embedded}: one of them belongs to another model"
            )
        super().__init__(net, image_tokenizer)
        self.image_tokenizer = image_tokenizer
        self.prompting = prompting
        self.config = config
        self.image_size: int = parts.vision_config.image_size
        self.num_codes = image_tokenizer.num_codes
        self.num_image_tokens = (self.image_size // image_tokenizer.patch_size) ** 2

    # ------------------------------------------------------------------------------------------- load, save

    @classmethod
    def load(cls, path: Path, source: ModelConfig) -> Janus:
        """From a folder in deepseek-ai's layout, or in transformers', which is what `save` writes. Errors: ValueError
        for weights or sizes that do not fit, and for a field of config.json that cannot be."""
        if source.image_tokenizer is not None:
            raise ValueError("a Janus checkpoint holds its image tokenizer: leave --model.image-tokenizer out")
        config, state, file = checkpoints.read_config(path), checkpoints.read_state(path), checkpoints.config_file(path)
        own = janus_files.own_fields(config, file)
        if janus_layout.is_official(state):
            config, state = janus_layout.hf_config(config, state, source=file), janus_layout.to_hf(state)
        sizes: Any = sizes_of(config, file)
        trained, frozen = janus_layout.split(state)
        make = partial(JanusNet, sizes, attn_implementation=source.attn_implementation)
        net = checkpoints.build(make, trained, path, file)
        vq = checkpoints.build(partial(JanusVQ, sizes.vq_config), frozen, path, file)
        tokenizer = read_tokenizer(checkpoints.resolve(source.tokenizer) if source.tokenizer else path)
        user, assistant = source.roles or own.get("roles") or roles_of(source.weights, tokenizer, str(path.resolve()))
        seen = (sizes.vision_config.image_size // sizes.vision_config.patch_size) ** 2
        limit = own.get("max_text_len", sizes.text_config.max_position_embeddings - seen)
        prompting = Prompting(
            tokenizer,
            num_codes=vq.num_codes,
            num_image_tokens=seen,
            max_text_len=source.max_text_len or limit,
            roles=(user, assistant),
            system=own.get("system", SYSTEM),
        )
        model = cls(net, vq, prompting, sizes)
        if source.num_image_tokens not in (None, model.num_image_tokens):
            raise ValueError(
                f"{path} draws {model.num_image_tokens} tokens per image, not {source.num_image_tokens}: leave "
                "--model.num-image-tokens out"
            )
        return model

    def save(self, path: Path, dtype: torch.dtype | None = None) -> None:
        """A self-contained folder that transformers' JanusForConditionalGeneration loads too."""
        path.mkdir(parents=True, exist_ok=True)
        frozen = {janus_layout.VQ + name: value for name, value in self.image_tokenizer.state_dict().items()}
        checkpoints.write_state(path / "model.safetensors", self.trained_state() | frozen, dtype)
        self.prompting.tokenizer.save_pretrained(path)
        config = janus_files.own_config(self.config, self.prompting)
        (path / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        self.save_adapters(path)

    @staticmethod
    def read_trained(path: Path) -> dict[str, torch.Tensor]:
        return janus_layout.split(checkpoints.read_state(path))[0]

    # ---------------------------------------------------------------------------------------------- drawing

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self.prompting.t2i(prompt)

    @torch.no_grad()
    def sample_images(
        self,
        prompts: Sequence[str],
        seeds_B: torch.Tensor,
        sampling: ImageSampling,
        draws: Draws | None = None,
    ) -> ImageRollout:
        self.check_sampling(sampling)
        with packed_linears(self.net):
            return self._draw(prompts, draws or KeyedDraws(seeds_B.to(self.device)), sampling)

    def _draw(self, prompts: Sequence[str], draws: Draws, sampling: ImageSampling) -> ImageRollout:
        guided, num = sampling.guidance_scale != 1, self.num_image_tokens
        rows, rows_B = self._distinct_rows([self.prompting.t2i(prompt) for prompt in prompts], guided)
        ids_RL, real_RL = self._table(rows)
        length = ids_RL.shape[1]
        cache = StaticCache(length)
        first_RV = self.net(
            ids_RL,
            causal_mask(real_RL),
            positions_BL=positions(real_RL),
            cache=cache,
            select=torch.arange(1, len(rows) + 1, device=self.device)[:, None] * length - 1,
            head="image",
        )[:, 0]
        cache.keep(rows_B, length + num - 1)
        real_RL = real_RL.index_select(0, rows_B)
        count_R1 = real_RL.sum(1, keepdim=True)
        see_R11L = F.pad(real_RL, (0, num), value=True)[:, None, None]

        def next_logits(step: int, tokens_B1: torch.Tensor) -> torch.Tensor:
            return self.net(
                None,
                see_R11L[..., : length + step],
                positions_BL=count_R1 + step - 1,
                cache=cache,
                codes_BN=tokens_B1.repeat(2 if guided else 1, 1),
                head="image",
            )[:, 0]

        tokens_BN, logprobs_BN = autoregressive.sample(
            first_RV.index_select(0, rows_B), next_logits, draws, sampling, num
        )
        return ImageRollout(
            prompts=tuple(prompts),
            tokens_BN=tokens_BN,
            reveal_step_BN=torch.arange(num, device=self.device).repeat(len(prompts), 1),
            logprobs_BN=logprobs_BN,
            sampling=sampling,
        )

    def scoring_passes(self, rollout: ImageRollout, estimator: Estimator, seeds_B: torch.Tensor) -> list[ScorePass]:
        """One pass, whatever the estimator: teacher forcing scores every token exactly."""
        everything_BN = torch.ones_like(rollout.tokens_BN, dtype=torch.bool)
        return [ScorePass(shown_BN=everything_BN, scored_BN=everything_BN, weight_BN=everything_BN.float())]

    def score_images(
        self,
        rollout: ImageRollout,
        scoring_pass: ScorePass,
        *,
        logprob_guidance: bool = True,
        relax: Relaxation | None = None,
    ) -> ImageScores:
        scale = rollout.sampling.guidance_scale if logprob_guidance else 1.0
        rows = [self.prompting.t2i(prompt) for prompt in rollout.prompts]
        tokens_BN, scored_BN = rollout.tokens_BN, scoring_pass.scored_BN

        def score_rows(reduce: Reduce, groups: int) -> Any:
            return self._drawn_logits(rows, tokens_BN, scale, reduce=reduce, groups=groups)

        return score(score_rows, tokens_BN, scored_BN, rollout.sampling, scale, relax)

    def _drawn_logits(
        self, rows: Sequence[list[int]], tokens_BN: torch.Tensor, scale: float = 1.0, **reduced: Any
    ) -> Any:
        """Raw logits [B*N, V] of the image tokens after each row of ids, in one teacher-forced pass; guided, those of
        the unconditional rows follow: [2B*N, V]. Or what a reduction makes of them. Differentiable."""
        distinct, row_R = self._distinct_rows(rows, scale != 1)
        ids_DP, real_DP = self._table([row[:-1] for row in distinct])  # boi predicts the first token: a row's own
        own_R1, num = torch.tensor([[row[-1]] for row in distinct], device=self.device)[row_R], self.num_image_tokens
        seen_R11P = real_DP.index_select(0, row_R)[:, None, None]
        earlier = torch.ones(1, 1, num, num, dtype=torch.bool, device=self.device).tril()
        return self.net(
            own_R1,
            torch.cat([seen_R11P.expand(-1, -1, num, -1), earlier.expand(len(row_R), -1, -1, -1)], dim=-1),
            positions_BL=seen_R11P.sum(-1)[:, 0] + torch.arange(num, device=self.device),
            codes_BN=tokens_BN[:, :-1].repeat(len(row_R) // len(tokens_BN), 1),
            select=torch.arange(len(row_R) * num, device=self.device),
            head="image",
            prefix=Prefix(ids_DP=ids_DP, positions_DP=positions(real_DP), mask=causal_mask(real_DP), row_B=row_R),
            **reduced,
        )

    def _distinct_rows(self, rows: Sequence[list[int]], guided: bool) -> tuple[list[list[int]], torch.Tensor]:
        """Distinct rows of ids, and which of them each row of a batch is: those given, then (if guided) unconditional
        ones."""
        wanted = [tuple(row) for row in rows]
        if guided:
            wanted += [tuple(self.prompting.unconditional(len(row))) for row in rows]
        place = {row: i for i, row in enumerate(dict.fromkeys(wanted))}
        return [list(row) for row in place], torch.tensor([place[row] for row in wanted], device=self.device)

    def _table(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids_RL, real_RL = left_padded(rows, self.prompting.vocab.pad)
        return ids_RL.to(self.device), real_RL.to(self.device)

    # -------------------------------------------------------------------------------------------- answering

    @torch.no_grad()
    def sample_answers(
        self, images: Images, questions: Sequence[ImageQuestion], seeds_Q: torch.Tensor, sampling: AnswerSampling
    ) -> AnswerRollout:
        with packed_linears(self.net):
            return self._answer(images, questions, KeyedDraws(seeds_Q.to(self.device)), sampling)

    def _answer(
        self, images: Images, questions: Sequence[ImageQuestion], draws: KeyedDraws, sampling: AnswerSampling
    ) -> AnswerRollout:
        prompting = self.prompting
        prompt_ids = [prompting.question(q.question) for q in questions]
        prefix_BL, seen = self._image_prefix(images)
        cache = StaticCache(length := prefix_BL.shape[1])
        self.net(
            prefix_BL,
            causal_mask(torch.ones_like(prefix_BL[:1], dtype=torch.bool)),
            positions_BL=torch.arange(length, device=self.device)[None],
            cache=cache,
            select=torch.zeros(0, 0, dtype=torch.int64, device=self.device),  # only the cache is wanted
            rows=(0, 1),
            **seen,
        )
        return decode_answers(
            self._text_logits,
            cache,
            questions=tuple(questions),
            prompt_ids=prompt_ids,
            draws=draws,
            sampling=sampling,
            rows=(0, prompting.vocab.text_size),
            end=prompting.vocab.eos,
            pad=prompting.vocab.pad,
            text=lambda ids: prompting.tokenizer.decode(ids, skip_special_tokens=True).strip(),
        )

    def score_answers(
        self,
        images: Images,
        questions: Sequence[ImageQuestion],
        answers: AnswerRollout | Sequence[str],
        *,
        support: Support = "text",
        temperature: float = 1.0,
    ) -> AnswerScores:
        ids = answer_tokens(answers, self.prompting.answer)
        width = answers.tokens_QT.shape[1] if isinstance(answers, AnswerRollout) else max(map(len, ids))
        prefix_BL, seen = self._image_prefix(images)
        packed = pack(
            [q.image for q in questions],
            [self.prompting.question(q.question) for q in questions],
            ids,
            num_images=len(prefix_BL),
            prefix_len=prefix_BL.shape[1],
            width=width,
            pad=self.prompting.vocab.pad,
            causal_prefix=True,
        )
        device, text = self.device, support == "text"
        score = partial(
            self.net,
            torch.cat([prefix_BL, packed.text_BL.to(device)], dim=1),
            packed.mask.to(device),
            positions_BL=packed.positions_BL.to(device),
            select=packed.select_U.to(device),
            rows=(0, self.prompting.vocab.text_size) if text else None,
            **seen,
        )
        return score_tokens(
            lambda reduce: score(reduce=(lambda logits, at: reduce(self._no_images(logits), at)) if text else reduce),
            ids,
            packed,
            width,
            temperature,
            device,
        )

    def _text_logits(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The net's logits of text ids, with those of image specials as low as can be."""
        return self._no_images(self.net(*args, **kwargs))

    def _no_images(self, logits: torch.Tensor) -> torch.Tensor:
        banned = torch.tensor(self.prompting.vocab.image_ids, device=logits.device)
        return logits.index_fill(-1, banned, torch.finfo(logits.dtype).min)

    def _image_prefix(self, images: Images) -> tuple[torch.Tensor, dict[str, Any]]:
        """Ids [B, L] of the understanding prefix, and what the net needs to see the images."""
        pixels_BCHW = self._seen_pixels(images)
        prefix_BL = torch.tensor(self.prompting.image_prefix, device=self.device).expand(len(pixels_BCHW), -1)
        return prefix_BL, {"pixels_BCHW": pixels_BCHW, "pixels_start": self.prompting.pixels_start}

    # ----------------------------------------------------------------------------------------------- pixels

    def _seen_pixels(self, images: Images) -> torch.Tensor:
        """[B, 3, H, W] in 0..1; differentiable where the images are one-hots."""
        if images.onehots_BNV is not None:
            return self.image_tokenizer.decode_onehots(images.onehots_BNV.to(self.device))
        return self.decode(images).to(self.device)

    @torch.no_grad()
    def decode(self, images: Images) -> torch.Tensor:
        if images.pixels_BCHW is not None:
            return self._sized(images.pixels_BCHW)
        if images.tokens_BN is None:
            return self._seen_pixels(images)
        return self.decode_few(self.image_tokenizer.decode_tokens, images.tokens_BN, self.image_tokenizer.patch_size)

    @torch.no_grad()
    def encode(self, pixels_BCHW: torch.Tensor) -> Images:
        """Understanding sees pixels, so they stay pixels. Errors: ValueError for pictures of another size."""
        return Images(pixels_BCHW=self._sized(pixels_BCHW).to(self.device))

    def read_pictures(self, pictures: Sequence[Image.Image]) -> Images:
        """Pictures of any size and mode, scaled and centred on grey as the official processor does."""
        return self.encode(torch.stack([read_picture(picture, self.image_size) for picture in pictures]))

    @torch.no_grad()
    def tokenize(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Pictures in 0..1 -> code ids int64 [B, N], the targets of drawing."""
        return self.image_tokenizer.tokenize(self._sized(pixels_BCHW).to(self.device))

    def _sized(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        if tuple(pixels_BCHW.shape[1:]) != (3, self.image_size, self.image_size):
            raise ValueError(
                f"pictures of shape {list(pixels_BCHW.shape[1:])}: this model sees [3, {self.image_size}, "
                f"{self.image_size}]; read_pictures() takes any size"
            )
        return pixels_BCHW

    # ------------------------------------------------------------------------------------------ pre-training

    def tokenizer_loss(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.image_tokenizer.loss(pixels_BCHW.to(self.device))

    def settle_tokenizer(self, pixels_BCHW: torch.Tensor) -> None:
        self.image_tokenizer.merge_codes(pixels_BCHW.to(self.device))

    def pretrain_loss(self, batch: PretrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.score_answers(batch.asked, batch.questions, batch.answers, support="full")
        answer_loss = -scores.logprobs_QT.sum() / scores.mask_QT.sum()
        return self._pretrain_drawing(batch) if batch.prompts else torch.zeros(()), answer_loss

    def _pretrain_drawing(self, batch: PretrainBatch) -> torch.Tensor:
        assert batch.drawn.tokens_BN is not None
        tokens_BN = batch.drawn.tokens_BN.to(self.device)
        rows = self.prompting.t2i_with_dropped(batch.prompts, batch.seeds_B.tolist())
        teacher_SV = None
        if batch.teacher is not None:
            with self.reference(), torch.no_grad():
                scale = batch.teacher.guidance_scale
                teacher_SV = log_policy(self._drawn_logits(rows, tokens_BN, scale), batch.teacher, scale)
        return drawing_loss(self._drawn_logits(rows, tokens_BN), tokens_BN.flatten(), teacher_SV)
