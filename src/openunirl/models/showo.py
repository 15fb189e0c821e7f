"""Show-o behind the UnifiedModel boundary: draws by masked diffusion over MAGVIT-v2 codes, answers autoregressively.

In: prompts, questions, images as tokens. Out: rollouts and scores (types.py). Source: Show-o (arXiv 2408.12528) and
UniRL's release for inference; METHOD 2 for log-probs of a masked sampler.

Departures: 1. the text prefix is computed once per distinct prompt and the unconditional one once per batch (text never
looks at the image, so this is exact), and so is the first step, at which no image shows anything; 2. only code rows of
the head at masked positions, and text rows at answer positions, are computed; 3. answers are limited to text ids (the
official code can emit image ids) and batched with a key/value cache; 4. pads common to a batch are cut off (positions
stay absolute, and pads are never attended).

Shapes: B images, Q questions, N image tokens, T answer tokens, V codes, L positions, S selected positions, H hidden.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer

from openunirl.config import ModelConfig
from openunirl.draws import KeyedDraws
from openunirl.models import checkpoints, masked
from openunirl.models.adapter import Adapter
from openunirl.models.answering import answer_tokens, decode_answers, score_tokens
from openunirl.models.layers import PrefixCache
from openunirl.models.magvit import Magvit, MagvitConfig, preprocess, quantizer_losses
from openunirl.models.masked import MASKED, Estimator
from openunirl.models.packed_linear import packed_linears
from openunirl.models.packing import pack
from openunirl.models.policy import drawing_loss, log_policy, score
from openunirl.models.prefix import Prefix
from openunirl.models.protocol import PretrainBatch, Support
from openunirl.models.showo_drawing import DrawingPasses
from openunirl.models.showo_net import ShowoNet, ShowoSizes
from openunirl.models.showo_prompting import Prompting
from openunirl.models.static_cache import StaticCache
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

MOST = 2**16
"""Of image tokens, and of a prompt's: a row of so many is never drawn, and a damaged number may be larger."""


class Showo(Adapter):
    """The adapter. `net` is trained; `image_tokenizer` is frozen; `reference()` swaps in the frozen base."""

    trunk = "showo.model"
    draws_tokens_in_turn = False

    def __init__(self, net: ShowoNet, image_tokenizer: Magvit, prompting: Prompting, num_image_tokens: int) -> None:
        if net.sizes.vocab_size != prompting.vocab.size:
            raise ValueError(
                f"the checkpoint's vocabulary has {net.sizes.vocab_size} entries, the tokenizer and image tokenizer "
                f"make {prompting.vocab.size}: one of them belongs to another model"
            )
        super().__init__(net, image_tokenizer)
        self.image_tokenizer = image_tokenizer
        self.prompting = prompting
        self.num_codes = prompting.vocab.num_codes
        self.num_image_tokens = num_image_tokens

    # ------------------------------------------------------------------------------------------- load, save

    @classmethod
    def load(cls, path: Path, source: ModelConfig) -> Showo:
        """From our folder (config.json, model, image_tokenizer, tokenizer/) or the official layout plus its two
        parts."""
        if source.roles is not None:
            raise ValueError("Show-o's prompts call nobody user or assistant: leave --model.roles out")
        config = checkpoints.read_config(path)
        own = path.is_dir() and (path / "image_tokenizer.safetensors").exists()
        state = checkpoints.read_state(path, "model" if own else None)
        with checkpoints.telling(path, "give a folder in Show-o's layout, or get the file again"):
            sizes = ShowoSizes.from_state_dict(state)
        make = partial(ShowoNet, sizes, attn_implementation=source.attn_implementation)
        net = checkpoints.build(make, state, path, path)
        if not own and (source.image_tokenizer is None or source.tokenizer is None):
            raise ValueError(
                f"{path} holds the language model only: name its parts with --model.image-tokenizer "
                "(such as showlab/magvitv2) and --model.tokenizer (such as microsoft/phi-1_5)"
            )
        magvit_path = checkpoints.resolve(source.image_tokenizer) if source.image_tokenizer else path
        magvit_state = checkpoints.read_state(magvit_path, None if source.image_tokenizer else "image_tokenizer")
        groups = checkpoints.read_config(magvit_path).get("norm_groups", 32)  # leaves no trace in the weights
        _check_number("norm_groups", groups, checkpoints.config_file(magvit_path))
        with checkpoints.telling(magvit_path, "get the image tokenizer again, or name one: --model.image-tokenizer"):
            magvit_config = MagvitConfig.from_state_dict(magvit_state, norm_groups=groups)
        magvit = Magvit(magvit_config)
        checkpoints.load_strictly(
            magvit, magvit_state, magvit_path, optional=("quantize.embedding", "quantize.power_vals")
        )
        place = checkpoints.resolve(source.tokenizer) if source.tokenizer else path / "tokenizer"
        length = source.max_text_len or config.get("max_text_len", 128)
        _check_number("max_text_len", length, checkpoints.config_file(path))
        prompting = Prompting(
            checkpoints.read_tokenizer(place, AutoTokenizer), num_codes=magvit_config.codebook_size, max_text_len=length
        )
        count = source.num_image_tokens or config.get("num_vq_tokens")
        if count is None:
            raise ValueError(
                f"{path} has no config.json with num_vq_tokens: say how many tokens an image has with "
                "--model.num-image-tokens (256 for show-o, 1024 for show-o-512x512)"
            )
        _check_number("num_vq_tokens", count, checkpoints.config_file(path))
        return cls(net, magvit, prompting, count)

    def save(self, path: Path, dtype: torch.dtype | None = None) -> None:
        """A self-contained folder; language model and image tokenizer keep their official key names."""
        path.mkdir(parents=True, exist_ok=True)
        checkpoints.write_state(path / "model.safetensors", self.trained_state(), dtype)
        checkpoints.write_state(path / "image_tokenizer.safetensors", self.image_tokenizer.state_dict(), dtype)
        self.prompting.tokenizer.save_pretrained(path / "tokenizer")
        vocab = self.prompting.vocab
        config = {
            "family": "showo",
            "vocab_size": vocab.size,
            "llm_vocab_size": vocab.text_size,
            "num_new_special_tokens": vocab.code_offset - vocab.text_size,
            "codebook_size": vocab.num_codes,
            "num_vq_tokens": self.num_image_tokens,
            "max_text_len": self.prompting.max_text_len,
            "norm_groups": self.image_tokenizer.config.norm_groups,
        }
        (path / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        self.save_adapters(path)

    @staticmethod
    def read_trained(path: Path) -> dict[str, torch.Tensor]:
        return checkpoints.read_state(path, "model")

    # ---------------------------------------------------------------------------------------------- drawing

    def check_prompts(self, prompts: Sequence[str]) -> None:
        self.prompting.t2i_prefix(prompts)

    @torch.no_grad()
    def sample_images(
        self,
        prompts: Sequence[str],
        seeds_B: torch.Tensor,
        sampling: ImageSampling,
        draws: masked.Draws | None = None,
    ) -> ImageRollout:
        self.check_sampling(sampling)
        text_DL, rows_R = self._prefixes(prompts, sampling.guidance_scale != 1)
        texts, mask = PrefixCache(), self.prompting.t2i_mask(text_DL)
        positions_1L = self.prompting.text_positions(text_DL)
        start_BN = torch.full((len(prompts), self.num_image_tokens), MASKED, device=self.device)
        with packed_linears(self.net):
            self.net(text_DL, mask, positions_BL=positions_1L, cache=texts, **self._nothing)
            texts.frozen = True
            passes = DrawingPasses(
                net=self.net,
                prompting=self.prompting,
                image_ids=self._image_ids,
                texts=texts,
                text_DL=text_DL,
                rows_R=rows_R,
                rows=self._code_rows,
                guidance_scale=sampling.guidance_scale,
                num_image_tokens=self.num_image_tokens,
            )
            drawn = masked.sample(passes, draws or KeyedDraws(seeds_B.to(self.device)), start_BN, sampling)
        return ImageRollout(
            prompts=tuple(prompts),
            tokens_BN=drawn.tokens_BN,
            reveal_step_BN=drawn.reveal_step_BN,
            logprobs_BN=drawn.logprobs_BN,
            sampling=sampling,
        )

    def scoring_passes(self, rollout: ImageRollout, estimator: Estimator, seeds_B: torch.Tensor) -> list[ScorePass]:
        return masked.scoring_passes(rollout, estimator, seeds_B)

    def score_images(
        self,
        rollout: ImageRollout,
        scoring_pass: ScorePass,
        *,
        logprob_guidance: bool = True,
        relax: Relaxation | None = None,
    ) -> ImageScores:
        scale = rollout.sampling.guidance_scale if logprob_guidance else 1.0
        shown_BN = rollout.tokens_BN.masked_fill(~scoring_pass.shown_BN, MASKED)
        picked_S = scoring_pass.scored_BN.flatten().nonzero()[:, 0]
        return score(
            lambda reduce, groups: self._masked_logits(
                rollout.prompts, shown_BN, picked_S, scale, reduce=reduce, groups=groups
            ),
            rollout.tokens_BN,
            scoring_pass.scored_BN,
            rollout.sampling,
            scale,
            relax,
        )

    def _masked_logits(
        self, prompts: Sequence[str], shown_BN: torch.Tensor, picked_S: torch.Tensor, scale: float, **reduced: Any
    ) -> Any:
        """Raw logits [S, V] (guided: [2S, V]) at flat places `picked_S` of partly masked images, or what a reduction
        makes of them; differentiable.

        Rows of one text (of none: all unconditional ones) that show the same (at the first step: nothing) are computed
        once.
        """
        num, shown = self.num_image_tokens, [one.tobytes() for one in shown_BN.cpu().numpy()]
        wanted = [*zip(prompts, shown, strict=True)] + [("", one) for one in shown] * (scale != 1)
        place = {row: i for i, row in enumerate(dict.fromkeys(wanted))}
        image_R = torch.tensor([wanted.index(row) % len(shown) for row in place], device=shown_BN.device)
        prefix_DL, text_R = self._prefixes([text for text, _ in place], guided=False)
        block_RL = self.prompting.image_block(self._image_ids(shown_BN.index_select(0, image_R)))
        row_GB = torch.tensor([place[row] for row in wanted], device=picked_S.device).view(-1, len(shown))
        row_GS = row_GB.index_select(1, picked_S // num)
        return self.net(
            block_RL,
            self.prompting.block_mask(prefix_DL.index_select(0, text_R), block_RL.shape[1]),
            positions_BL=self.prompting.block_positions(block_RL),
            select=(row_GS * block_RL.shape[1] + 1 + picked_S % num).flatten(),
            rows=self._code_rows,
            prefix=Prefix(
                ids_DP=prefix_DL,
                positions_DP=self.prompting.text_positions(prefix_DL),
                mask=self.prompting.t2i_mask(prefix_DL),
                row_B=text_R,
            ),
            **reduced,
        )

    def _prefixes(self, prompts: Sequence[str], guided: bool) -> tuple[torch.Tensor, torch.Tensor]:
        prefix_DL, rows = self.prompting.distinct_prefixes(prompts, guided)
        return prefix_DL.to(self.device), rows.to(self.device)

    def _image_ids(self, tokens_BN: torch.Tensor) -> torch.Tensor:
        vocab = self.prompting.vocab
        return torch.where(tokens_BN == MASKED, vocab.mask, tokens_BN + vocab.code_offset)

    @property
    def _nothing(self) -> dict[str, Any]:
        """Arguments of a forward that only fills the cache: no position is selected, so the head costs nothing."""
        return {"select": torch.zeros(0, 0, dtype=torch.int64, device=self.device), "rows": (0, 1)}

    @property
    def _code_rows(self) -> tuple[int, int]:
        return self.prompting.vocab.code_offset, self.prompting.vocab.mask

    # -------------------------------------------------------------------------------------------- answering

    @torch.no_grad()
    def sample_answers(
        self, images: Images, questions: Sequence[ImageQuestion], seeds_Q: torch.Tensor, sampling: AnswerSampling
    ) -> AnswerRollout:
        prefix_BL, soft = self._image_prefix(images)
        length = prefix_BL.shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.device)
        cache, prompt_ids = StaticCache(length), [self.prompting.question(q.question) for q in questions]
        vocab = self.prompting.vocab
        with packed_linears(self.net):
            self.net(prefix_BL, mask, cache=cache, **soft, **self._nothing)
            return decode_answers(
                self.net,
                cache,
                questions=tuple(questions),
                prompt_ids=prompt_ids,
                draws=KeyedDraws(seeds_Q.to(self.device)),
                sampling=sampling,
                rows=(0, vocab.text_size),
                end=vocab.eos,
                pad=vocab.pad,
                text=lambda ids: self.prompting.tokenizer.decode(ids, skip_special_tokens=True).strip(),
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
        prefix_BL, soft = self._image_prefix(images)
        packed = pack(
            [q.image for q in questions],
            [self.prompting.question(q.question) for q in questions],
            ids,
            num_images=len(prefix_BL),
            prefix_len=prefix_BL.shape[1],
            width=width,
            pad=self.prompting.vocab.pad,
        )
        device = self.device
        score = partial(
            self.net,
            torch.cat([prefix_BL, packed.text_BL.to(device)], dim=1),
            packed.mask.to(device),
            positions_BL=packed.positions_BL.to(device),
            select=packed.select_U.to(device),
            rows=(0, self.prompting.vocab.text_size) if support == "text" else None,
            **soft,
        )
        return score_tokens(lambda reduce: score(reduce=reduce), ids, packed, width, temperature, device)

    def _image_prefix(self, images: Images) -> tuple[torch.Tensor, dict[str, Any]]:
        """Ids [B, N + 3] of the understanding prefix, and what the net needs to mix relaxed one-hots in."""
        if images.onehots_BNV is not None:
            start = {"onehots_start": 2, "onehots_row": self.prompting.vocab.code_offset}
            tokens_BN = images.onehots_BNV.argmax(-1)
            return self.prompting.mmu_prefix(self._image_ids(tokens_BN)), {"onehots_BNV": images.onehots_BNV, **start}
        if images.pixels_BCHW is not None:
            images = self.encode(images.pixels_BCHW)
        assert images.tokens_BN is not None
        return self.prompting.mmu_prefix(self._image_ids(images.tokens_BN.to(self.device))), {}

    # ----------------------------------------------------------------------------------------------- pixels

    @torch.no_grad()
    def decode(self, images: Images) -> torch.Tensor:
        if images.pixels_BCHW is not None:
            return images.pixels_BCHW
        tokens_BN = images.tokens_BN if images.tokens_BN is not None else images.onehots_BNV.argmax(-1)  # type: ignore[union-attr]
        tokenizer = self.image_tokenizer
        pixels = self.decode_few(tokenizer.decode, tokens_BN, tokenizer.config.patch_size)
        return ((pixels.float() + 1) / 2).clamp(0, 1)

    def encode(self, pixels_BCHW: torch.Tensor) -> Images:
        return Images(tokens_BN=self.tokenize(pixels_BCHW))

    @torch.no_grad()
    def tokenize(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.image_tokenizer.encode(pixels_BCHW.to(self.device) * 2 - 1)

    @torch.no_grad()
    def read_pictures(self, pictures: Sequence[Image.Image]) -> Images:
        size = math.isqrt(self.num_image_tokens) * self.image_tokenizer.config.patch_size
        pixels_BCHW = torch.stack([preprocess(picture, size) for picture in pictures])  # -1..1
        return Images(tokens_BN=self.image_tokenizer.encode(pixels_BCHW.to(self.device)))

    # ------------------------------------------------------------------------------------------ pre-training

    def tokenizer_loss(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        pixels = pixels_BCHW.to(self.device) * 2 - 1
        latents = self.image_tokenizer.encode_latents(pixels)
        error = self.image_tokenizer.decoder(self.image_tokenizer.quantize(latents)).float() - pixels
        commit, entropy = quantizer_losses(latents)
        # A stronger commitment drives all bits to the side of the background before they carry anything.
        return error.abs().mean() + error.square().mean() + 0.1 * commit + entropy

    def pretrain_loss(self, batch: PretrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.score_answers(batch.asked, batch.questions, batch.answers, support="full")
        answer_loss = -scores.logprobs_QT.sum() / scores.mask_QT.sum()
        return self._pretrain_drawing(batch) if batch.prompts else torch.zeros(()), answer_loss

    def _pretrain_drawing(self, batch: PretrainBatch) -> torch.Tensor:
        tokens_BN = batch.drawn.tokens_BN
        assert tokens_BN is not None
        hidden_BN = masked.random_mask(batch.seeds_B, self.num_image_tokens).to(tokens_BN.device)
        picked_S = hidden_BN.flatten().nonzero()[:, 0]
        shown_BN = tokens_BN.masked_fill(hidden_BN, MASKED)
        logits_SV = self._masked_logits(batch.prompts, shown_BN, picked_S, 1.0)
        teacher_SV = None
        if batch.teacher is not None:
            with self.reference(), torch.no_grad():
                scale = batch.teacher.guidance_scale
                taught = self._masked_logits(batch.prompts, shown_BN, picked_S, scale)
                teacher_SV = log_policy(taught, batch.teacher, scale)
        return drawing_loss(logits_SV, tokens_BN.flatten().index_select(0, picked_S), teacher_SV)


def _check_number(name: str, value: Any, file: Path) -> None:
    """Of a field that the weights tell nothing of."""
    if type(value) is not int or not 0 < value <= MOST or (name == "num_vq_tokens" and math.isqrt(value) ** 2 != value):
        wanted = f"a {'square ' if name == 'num_vq_tokens' else ''}number from 1 to {MOST}"
        raise ValueError(f"{file}: {name} is {value!r:.80}, wanted {wanted}: correct it, or get the file again")
