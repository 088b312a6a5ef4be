"""Prompts to tokens: CLIP's and T5's text encoders, loaded for one call and freed afterwards."""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PriorError

logger = logging.getLogger(__name__)

# IF was trained with 77 text tokens although its T5 could read more.
T5_TOKENS = 77
CLIP_TOKENS = 77

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_OPEN_CLIP_PAD = "!"


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of transformers, and what it pads with."""

    words: Any
    pad_id: int

    @property
    def max_length(self) -> int:
        """How many tokens it makes at the most."""
        return self.words.model_max_length

    def tokens(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask (1: no padding), both [n, length] int64; what does not fit is cut."""
        rows = self.words(list(prompts), max_length=length, truncation=True).input_ids
        ids = torch.full((len(rows), length), self.pad_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return ids, mask

    def cut(self, prompt: str, length: int) -> str:
        """Return the end of a prompt that does not fit into `length` tokens; "" if all of it fits."""
        ids = self.words(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
        room = length - self.words.num_special_tokens_to_add()
        return self.words.decode(ids[room:], skip_special_tokens=True).strip() if len(ids) > room else ""


def encode_prompts(tokenizer: Tokenizer, encoder: nn.Module, prompts: Sequence[str]) -> Tensor:
    """Return the encoder's last hidden states [n, L, D], float32. What does not fit into L tokens is cut, and said.

    As in the models' own training: CLIP reads its padding, T5 masks it and reads lower case.
    """
    is_t5 = type(encoder).__name__.startswith("T5")
    texts = [prompt.lower().strip() for prompt in prompts] if is_t5 else list(prompts)
    length = min(tokenizer.max_length, T5_TOKENS if is_t5 else encoder.config.max_position_embeddings)
    for end in dict.fromkeys(tokenizer.cut(text, length) for text in texts):
        if end:
            logger.warning("the prompt is longer than the text encoder's %d tokens; this end is cut: %r", length, end)
    ids, mask = tokenizer.tokens(texts, length)
    device = next(encoder.parameters()).device
    with torch.no_grad():
        return encoder(ids.to(device), attention_mask=mask.to(device) if is_t5 else None)[0].float()


# ---- CLIP's tokenizer --------------------------------------------------------------------------------------------


def clip_merges() -> list[str]:
    """Return the pairs that CLIP's tokenizer merges, in their order."""
    with gzip.open(Path(__file__).parent / "clip_bpe" / "merges.txt.gz", "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def clip_vocabulary(merges: Sequence[str]) -> dict[str, int]:
    """Return CLIP's vocabulary: the 256 bytes, the bytes that end a word, what the merges make, two marks."""
    letters = list(_byte_letters())
    words = [*letters, *(letter + _WORD_END for letter in letters), *("".join(m.split()) for m in merges), START, END]
    return {word: i for i, word in enumerate(words)}


def _byte_letters() -> str:
    """The 256 letters that stand for bytes: printable ones for themselves first, then the others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return "".join(map(chr, printable)) + "".join(chr(256 + i) for i in range(256 - len(printable)))


def write_clip_tokenizer(folder: Path, pad_token: str, length: int = CLIP_TOKENS) -> None:
    """Write CLIP's tokenizer as a folder that transformers reads.

    Args:
        pad_token: Stable Diffusion 1 pads with END, OpenCLIP (Stable Diffusion 2) with token 0, which is "!".
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = clip_merges()
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    files = {
        "vocab.json": clip_vocabulary(merges),
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": length,
            "do_lower_case": True,
            **special,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def clip_tokenizer(pad_token: str, length: int = CLIP_TOKENS) -> Tokenizer:
    """Return CLIP's tokenizer for checkpoints, which come without one."""
    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(Path(folder), pad_token, length)
        return read_tokenizer(Path(folder))


def read_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a folder.

    Stable Diffusion 2 pads with token 0, which is "!"; its folders say so in special_tokens_map.json alone, and not
    every version of transformers reads that. Where it is read, "!" becomes a mark that is cut out of every word (a
    prompt's "!!" is then two paddings, which the model never saw in training): so it is kept out of the tokenizer.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise PriorError(f"{folder.parent} is not a complete diffusers folder: {folder.name}/ is missing")
    pad = _declared_pad_token(folder)
    plain = {"pad_token": END} if pad == _OPEN_CLIP_PAD else {}
    try:
        words = AutoTokenizer.from_pretrained(folder, local_files_only=True, **plain)
    except ImportError as error:  # sentencepiece, for some of T5's
        raise PriorError(f"the tokenizer in {folder} needs another package: {error}") from error
    except Exception as error:  # whatever transformers raises for files that are missing or damaged
        raise PriorError(f"cannot load the tokenizer in {folder}: {error}") from error
    return Tokenizer(words, 0 if plain else words.pad_token_id)


def _declared_pad_token(folder: Path) -> str | None:
    path = folder / "special_tokens_map.json"
    if not path.is_file():
        return None
    try:
        pad = json.loads(path.read_text(encoding="utf-8")).get("pad_token")
    except (ValueError, AttributeError):
        return None
    return pad.get("content") if isinstance(pad, dict) else pad
