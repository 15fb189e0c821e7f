"""Show-o's token layout: text and images in, token ids and attention masks out.

Source: Show-o (arXiv 2408.12528), conventions as observed from the released code:
  text-to-image   [PAD...] t2i bos words eos | soi image eoi        (text padded on the left to max_text_len + 1)
  understanding   mmu soi image eoi | bos words eos [PAD...]
  language        bos words eos [PAD...]
The vocabulary is text | PAD soi eoi sov eov t2i mmu t2v v2v lvg | codes | mask.

Departures: 1. a text that does not fit raises unless `truncate=True` (the official code cuts it silently);
2. the 2-D masks of the official code, which its callers ignore, are not built.

Shapes: B rows, L positions, N image tokens. Masks are boolean, True = may attend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

IGNORE = -100
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in ("soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg"))


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Where each kind of token lives. Example: Vocabulary(text_size=50295, num_codes=8192, bos=50256, eos=50256)"""

    text_size: int
    num_codes: int
    bos: int
    eos: int

    @property
    def pad(self) -> int:
        return self.text_size

    def special(self, name: str) -> int:
        """Id of a special token by its short name, such as "soi"."""
        return self.text_size + 1 + SPECIAL_TOKENS.index(f"<|{name}|>")

    @property
    def code_offset(self) -> int:
        return self.text_size + 1 + len(SPECIAL_TOKENS)

    @property
    def mask(self) -> int:
        return self.code_offset + self.num_codes

    @property
    def size(self) -> int:
        return self.mask + 1


class Prompting:
    """Builds id tensors. `tokenizer` is a transformers tokenizer, with or without the ten special tokens."""

    def __init__(self, tokenizer: Any, *, num_codes: int, max_text_len: int) -> None:
        if tokenizer.convert_tokens_to_ids("[PAD]") in (None, tokenizer.unk_token_id):
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
            tokenizer.add_tokens(list(SPECIAL_TOKENS))  # ordinary tokens, as in the official code
        self.tokenizer = tokenizer
        self.max_text_len = max_text_len
        text_size = tokenizer.convert_tokens_to_ids("[PAD]")
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no beginning or end token, so it is not Show-o's: get tokenizer_config.json again, "
                "or name another tokenizer with --model.tokenizer"
            )
        self.vocab = Vocabulary(
            text_size=text_size, num_codes=num_codes, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id
        )
        if tokenizer.convert_tokens_to_ids("<|soi|>") != self.vocab.special("soi"):
            raise ValueError("the tokenizer's special tokens are not in Show-o's order: [PAD] first, then <|soi|>, ...")
        if max(tokenizer.get_vocab().values()) >= self.vocab.code_offset:
            raise ValueError(
                f"the tokenizer has ids from {self.vocab.code_offset} on, which are image codes: get it again, or name "
                "another with --model.tokenizer"
            )

    # ------------------------------------------------------------------------------------------- rows of ids

    def words(self, text: str) -> list[int]:
        """Token ids of `text` with bos in front (once) and no eos."""
        ids = self.tokenizer(text)["input_ids"]
        return ids if ids[:1] == [self.vocab.bos] else [self.vocab.bos, *ids]

    def _fit(self, ids: list[int], limit: int, text: str, truncate: bool) -> list[int]:
        if len(ids) <= limit:
            return ids
        if not truncate:
            raise ValueError(
                f"the text {text[:60]!r} takes {len(ids)} tokens and only {limit} fit: shorten it, "
                f"or raise max_text_len (now {self.max_text_len})"
            )
        return [*ids[: limit - 1], self.vocab.eos]

    def t2i_prefix(self, texts: Sequence[str], *, truncate: bool = False) -> torch.Tensor:
        """[B, max_text_len + 1]: task token and text, padded on the left. The empty text is the unconditional
        prompt."""
        limit, rows = self.max_text_len + 1, []
        for text in texts:
            ids = [self.vocab.special("t2i"), *self.words(text), self.vocab.eos]
            ids = self._fit(ids, limit, text, truncate)
            rows.append([self.vocab.pad] * (limit - len(ids)) + ids)
        return torch.tensor(rows, dtype=torch.int64).view(len(texts), limit)

    def distinct_prefixes(self, prompts: Sequence[str], guided: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """[D, L], common pads cut, and (if guided) the unconditional one last; and which of them each row of a batch
        has: the prompts', then as many unconditional ones."""
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        prefix_DL = self.t2i_prefix([*place, *[""] * guided])
        rows = [place[prompt] for prompt in prompts] + [len(place)] * (len(prompts) * guided)
        leading_D = (prefix_DL == self.vocab.pad).cumprod(1).sum(1)  # a text may hold pads of its own
        return prefix_DL[:, int(leading_D.min()) :], torch.tensor(rows)

    def text_positions(self, prefix_BL: torch.Tensor) -> torch.Tensor:
        """[1, L] of prefixes whose leading pads were cut: they end where whole ones would."""
        length = prefix_BL.shape[1]
        return torch.arange(length, device=prefix_BL.device)[None] + self.max_text_len + 1 - length

    def block_positions(self, block_BL: torch.Tensor) -> torch.Tensor:
        """[1, L] of image blocks, which stand behind whole prefixes."""
        return torch.arange(block_BL.shape[1], device=block_BL.device)[None] + self.max_text_len + 1

    def image_block(self, image_ids_BN: torch.Tensor) -> torch.Tensor:
        """soi, image ids (offset included), eoi: [B, N + 2]."""
        soi, eoi = (torch.full_like(image_ids_BN[:, :1], self.vocab.special(name)) for name in ("soi", "eoi"))
        return torch.cat([soi, image_ids_BN, eoi], dim=1)

    def t2i(self, texts: Sequence[str], image_ids_BN: torch.Tensor, *, truncate: bool = False) -> torch.Tensor:
        prefix = self.t2i_prefix(texts, truncate=truncate).to(image_ids_BN.device)
        return torch.cat([prefix, self.image_block(image_ids_BN)], dim=1)

    def mmu_prefix(self, image_ids_BN: torch.Tensor) -> torch.Tensor:
        """mmu, soi, image ids, eoi: [B, N + 3]."""
        mmu = torch.full_like(image_ids_BN[:, :1], self.vocab.special("mmu"))
        return torch.cat([mmu, self.image_block(image_ids_BN)], dim=1)

    def mmu(self, texts: Sequence[str], image_ids_BN: torch.Tensor, *, truncate: bool = False) -> torch.Tensor:
        limit, rows = self.max_text_len, []
        for text in texts:
            ids = self._fit([*self.words(text), self.vocab.eos], limit, text, truncate)
            rows.append(ids + [self.vocab.pad] * (limit - len(ids)))
        text_BL = torch.tensor(rows, dtype=torch.int64, device=image_ids_BN.device).view(len(texts), limit)
        return torch.cat([self.mmu_prefix(image_ids_BN), text_BL], dim=1)

    def lm(self, texts: Sequence[str], length: int) -> torch.Tensor:
        """Plain text rows [B, length]; a longer text is cut without an eos, as in the official code."""
        rows = []
        for text in texts:
            ids = [*self.words(text), self.vocab.eos][:length]
            rows.append(ids + [self.vocab.pad] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).view(len(texts), length)

    def question(self, question: str) -> list[int]:
        """What follows the image in an understanding prompt; the answer comes next."""
        return [self.vocab.bos, *self.tokenizer(f"USER: \n{question} ASSISTANT:")["input_ids"]]

    def answer(self, answer: str) -> list[int]:
        """Ids of an answer and its end token."""
        return [*self.tokenizer(f" {answer}")["input_ids"], self.vocab.eos]

    # ---------------------------------------------------------------------------------------------- labels

    def t2i_labels(self, ids_BL: torch.Tensor, image_labels_BN: torch.Tensor) -> torch.Tensor:
        """Pads ignored; text, soi and eoi stay, image positions take `image_labels_BN`."""
        labels = ids_BL.masked_fill(ids_BL == self.vocab.pad, IGNORE)
        labels[:, self.max_text_len + 2 : -1] = image_labels_BN
        return labels

    def mmu_labels(self, ids_BL: torch.Tensor, num_image_tokens: int) -> torch.Tensor:
        """Everything up to eoi and pads ignored."""
        labels = ids_BL.masked_fill(ids_BL == self.vocab.pad, IGNORE)
        labels[:, : num_image_tokens + 3] = IGNORE
        return labels

    def lm_labels(self, ids_BL: torch.Tensor) -> torch.Tensor:
        return ids_BL.masked_fill(ids_BL == self.vocab.pad, IGNORE)

    # ----------------------------------------------------------------------------------------------- masks

    def t2i_mask(self, ids_BL: torch.Tensor, *, hide_pads: bool = True) -> torch.Tensor:
        """[B, 1, L, L]. Text is causal; soi, image and eoi see the text and the whole image block, never the pads.

        A pad row still sees earlier pads, so that no row is empty. Rows without soi (language rows) stay causal.
        """
        length = ids_BL.shape[1]
        inside = (ids_BL == self.vocab.special("soi")).cumsum(1) > 0
        after = (ids_BL == self.vocab.special("eoi")).cumsum(1) - (ids_BL == self.vocab.special("eoi")).int() > 0
        block = inside & ~after
        causal = torch.ones(length, length, dtype=torch.bool, device=ids_BL.device).tril()
        allowed = causal | (block[:, :, None] & block[:, None, :])
        if hide_pads:
            pad = ids_BL == self.vocab.pad
            allowed = allowed & (~pad[:, None, :] | pad[:, :, None])
        return allowed[:, None]

    def block_mask(self, prefix_BL: torch.Tensor, length: int) -> torch.Tensor:
        """[B, 1, 1, L + length]. What soi, image and eoi see behind a prefix, all the same: the text, not its pads, and
        the whole block of `length`."""
        return F.pad(prefix_BL != self.vocab.pad, (0, length), value=True)[:, None, None]

    def mmu_mask(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """[B, 1, L, L]. Every row sees everything up to eoi; after that causal. Pads are on the right and stay
        visible."""
        length = ids_BL.shape[1]
        first_eoi = int((ids_BL[0] == self.vocab.special("eoi")).int().argmax())
        allowed = torch.ones(length, length, dtype=torch.bool, device=ids_BL.device).tril()
        allowed[:, : first_eoi + 1] = True
        return allowed.expand(ids_BL.shape[0], 1, length, length)
