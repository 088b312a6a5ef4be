"""Prompts to tokens: CLIP's, T5's and Llama's text encoders, loaded for one call and freed afterwards."""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...documents import as_object, describe, disguise, field, read_document
from ..errors import PriorError, reason

logger = logging.getLogger(__name__)

T5_TOKENS = 77  # IF was trained with as many although its T5 could read more
CLIP_TOKENS = 77

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_OPEN_CLIP_PAD, _T5_PAD = "!", "<pad>"


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of transformers, and what it pads with."""

    words: Any  # of transformers, one of _CLASSES
    pad_id: int  # the token that fills a row up; read here and not asked of `words` (see read_tokenizer)

    @property
    def max_length(self) -> int:
        """How many tokens it makes at the most."""
        return self.words.model_max_length

    def tokens(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask (1: no padding), both [n, length] int64; what does not fit is cut."""
        rows = self._ids(list(prompts), max_length=length, truncation=True)
        ids = torch.full((len(rows), length), self.pad_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return ids, mask

    def _ids(self, text: Any, **options: Any) -> Any:
        try:
            return self.words(text, **options).input_ids
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # letters that can't be encoded, damaged files, the panics of tokenizers
            raise PriorError(f"the prompt can't be split into tokens ({reason(error)})") from error

    def cut(self, prompt: str, length: int) -> str:
        """Return the end of a prompt that does not fit into `length` tokens; "" if all of it fits."""
        ids = self._ids(prompt, add_special_tokens=False, truncation=False, verbose=False)
        room = length - self.words.num_special_tokens_to_add()  # the marks of start and end take theirs
        return self.words.decode(ids[room:], skip_special_tokens=True).strip() if len(ids) > room else ""


def encode_prompts(tokenizer: Tokenizer, encoder: nn.Module, prompts: Sequence[str]) -> Tensor:
    """Return the encoder's last hidden states [n, L, D], float32. What does not fit into L tokens is cut, and said."""
    is_t5 = type(encoder).__name__.startswith("T5")
    # IF was trained on lower case; CLIP's tokenizers lower it themselves
    texts = [prompt.lower().strip() for prompt in prompts] if is_t5 else list(prompts)
    config: Any = encoder.config  # of transformers
    length = min(tokenizer.max_length, T5_TOKENS if is_t5 else config.max_position_embeddings)
    ids, mask = token_rows(tokenizer, encoder, texts, length)
    with torch.no_grad():
        # CLIP was trained with its padding in sight, T5 without
        return encoder(ids, attention_mask=mask if is_t5 else None)[0].float()


def token_rows(tokenizer: Tokenizer, encoder: nn.Module, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask [n, length] for an encoder, where it is. What does not fit is cut, and said."""
    config: Any = encoder.config  # of transformers
    for end in dict.fromkeys(tokenizer.cut(text, length) for text in texts):
        if end:
            logger.warning("the prompt is longer than the text encoder's %d tokens; this end is cut: %r", length, end)
    ids, mask = tokenizer.tokens(texts, length)
    known = config.vocab_size
    if not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise PriorError(
            f"the tokenizer gives token {int(ids.max())}, the text encoder knows {known:,}: they are not of one model"
        )
    device = next(encoder.parameters()).device
    return ids.to(device), mask.to(device)


# ---- CLIP's tokenizer --------------------------------------------------------------------------------------------


def clip_merges() -> list[str]:
    """Return the pairs that CLIP's tokenizer merges, in their order."""
    with gzip.open(Path(__file__).parent / "clip_bpe" / "merges.txt.gz", "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def clip_vocabulary(merges: Sequence[str]) -> dict[str, int]:
    """Return CLIP's vocabulary: the 256 bytes, the bytes that end a word, what the merges make, two marks."""
    # each byte is a letter: printable ones stand for themselves and come first, the others are those from 256 on
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = list(map(chr, [*printable, *range(256, 512 - len(printable))]))
    words = [*letters, *(letter + _WORD_END for letter in letters), *("".join(m.split()) for m in merges), START, END]
    return {word: i for i, word in enumerate(words)}


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


# ---- Any tokenizer's folder --------------------------------------------------------------------------------------

_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "special_tokens_map.json", "added_tokens.json")
_SETTINGS, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
_MARKS = ("bos_token", "eos_token", "unk_token", "pad_token")
_KEPT = {
    **dict.fromkeys(("do_lower_case", "add_prefix_space", "legacy", "clean_up_tokenization_spaces"), bool),
    **dict.fromkeys(("extra_ids", "model_max_length"), int),
    **dict.fromkeys(("additional_special_tokens",), list),
    **dict.fromkeys(("added_tokens_decoder",), dict),
}
_CLASSES = {
    "CLIPTokenizer": ("CLIPTokenizerFast", "CLIPTokenizer"),
    "T5Tokenizer": ("T5TokenizerFast", "T5Tokenizer"),
    # Llama's as its tokenizer.json has it: the class of that name is of Llama 2 in newer versions
    **dict.fromkeys(("PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer"), ("PreTrainedTokenizerFast",)),
}
"""By the name in the folder, without "Fast": those of transformers, of which a version has the first or the second."""
_MOST_BYTES = 2**25  # of one file; Llama 3's tokenizer.json, the largest that is known, has half
_MOST_GROWTH = 64  # letters that the replacements may make of one
LEAST_LENGTH, MOST_LENGTH = 4, 10**30  # what transformers writes where there is no limit is a little more than that


def read_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a folder: CLIP's, T5's or the tokenizers library's (Llama's), by its data alone.

    A folder may name programs of its own (`auto_map`), which transformers offers to run, and other places to load
    from. So the class is chosen here, and reads a copy of the known files with the known settings.
    """
    if not folder.is_dir():
        raise PriorError(f"{folder.parent} is not a complete diffusers folder: {folder.name}/ is missing")
    settings = _read_object(folder / _SETTINGS)
    special = _read_object(folder / _SPECIAL)
    class_name = _class_of(folder, settings)
    kept = _kept_settings(settings, folder / _SETTINGS)
    for content, name in ((settings, _SETTINGS), (special, _SPECIAL)):
        for mark in _MARKS:
            said = content.get(mark)
            if said is not None and not isinstance(_content_of(said), str):
                raise PriorError(f"{folder / name}: {mark} must be text, got {describe(said)}")
    # Stable Diffusion 2 pads with token 0, which is "!"; its folders say so in special_tokens_map.json alone, and not
    # every version of transformers reads that. Where it is read, "!" becomes a mark that is cut out of every word (a
    # prompt's "!!" is then two paddings, which the model never saw in training), and what such a version saves has it
    # among the added tokens, too: so it is kept out of the tokenizer.
    side = field(settings, "padding_side", str, folder / _SETTINGS, PriorError, "right")
    if side != "right":
        raise PriorError(f"{folder / _SETTINGS}: padding_side is {describe(side)}; models are told words first")
    pads = [_content_of(content.get("pad_token")) for content in (special, settings)]
    plain = {"pad_token": END} if _OPEN_CLIP_PAD in pads else {}
    left_out = _OPEN_CLIP_PAD if plain else None
    kept |= plain
    if "added_tokens_decoder" in kept:
        added = kept["added_tokens_decoder"]
        kept["added_tokens_decoder"] = {i: token for i, token in added.items() if _content_of(token) != left_out}
    with tempfile.TemporaryDirectory() as place:
        _copy_data(folder, Path(place), left_out)
        (Path(place) / _SETTINGS).write_text(json.dumps(kept), encoding="utf-8")
        words = _load_words(class_name, Path(place), folder, plain)
    if settings.get("add_bos_token") is True and words("a").input_ids[:1] != [words.bos_token_id]:
        raise PriorError(
            f"{folder / 'tokenizer.json'} puts no bos_token before a text, which {_SETTINGS} asks for (add_bos_token): "
            "its files are not of one model"
        )
    pad = 0 if plain else words.pad_token_id
    if pad is None:  # a tokenizer.json alone doesn't say it
        known = words.get_vocab()
        pad = next((known[mark] for mark in (END, _T5_PAD) if mark in known), None)
    if pad is None:
        raise PriorError(f"{folder / _SETTINGS}: pad_token is missing, or none of the tokenizer's words")
    return Tokenizer(words, pad)


def _read_object(path: Path) -> dict[str, Any]:
    most = _MOST_BYTES if path.name == "tokenizer.json" else None
    return as_object(read_document(path, PriorError, most), path, PriorError) if path.is_file() else {}


def _class_of(folder: Path, settings: dict[str, Any]) -> str:
    """Choose the class by the folder's settings, or by its files where it doesn't say; PriorError for any other."""
    where = folder / _SETTINGS
    declared = field(settings, "tokenizer_class", str, where, PriorError, "")
    name = declared.removesuffix("Fast")
    if name not in _CLASSES and (declared or "auto_map" in settings):
        said = f"tokenizer_class is {describe(declared)}" if declared else "tokenizer_class is missing"
        program = (
            "; it comes with a program of its own (auto_map), which is never run" if "auto_map" in settings else ""
        )
        raise PriorError(f"{where}: {said}{program}: the tokenizers of CLIP, T5 and Llama can be used")
    here = {file for file in _FILES if (folder / file).is_file()}
    if _CLASSES.get(name) == _CLASSES["PreTrainedTokenizer"] and "tokenizer.json" not in here:
        raise PriorError(f"{folder} is not a complete tokenizer: tokenizer.json is missing")
    if name in _CLASSES:
        return name
    if {"vocab.json", "merges.txt"} <= here:
        return "CLIPTokenizer"
    if "spiece.model" in here:
        return "T5Tokenizer"
    if "tokenizer.json" in here:
        return "PreTrainedTokenizer"
    raise PriorError(f"{folder} is not a complete tokenizer: vocab.json and merges.txt, or tokenizer.json, are missing")


def _kept_settings(settings: dict[str, Any], where: Path) -> dict[str, Any]:
    """The settings that are known, each of its kind; nothing that names a program or a place."""
    kept = {mark: settings[mark] for mark in _MARKS if settings.get(mark) is not None}
    for name, kind in _KEPT.items():
        if settings.get(name) is not None:
            kept[name] = field(settings, name, kind, where, PriorError, None)
    if not LEAST_LENGTH <= kept.get("model_max_length", LEAST_LENGTH) <= 2 * MOST_LENGTH:
        raise PriorError(
            f"{where}: model_max_length is {describe(kept['model_max_length'])}, it must be {LEAST_LENGTH} or more"
        )
    if not 0 <= kept.get("extra_ids", 0) <= 1000:
        raise PriorError(f"{where}: extra_ids is {describe(kept['extra_ids'])}; 0 to 1000 can be meant")
    return kept


def _content_of(mark: Any) -> Any:
    """The text of a special token, which may be written with how it is to be cut out."""
    return mark.get("content") if isinstance(mark, dict) else mark


def _copy_data(folder: Path, place: Path, left_out: str | None) -> None:
    """Copy the tokenizer's files of data, the JSON among them read and looked through; `left_out`: no mark here."""
    for path in (folder / name for name in _FILES if (folder / name).is_file()):
        if path.suffix == ".json":
            content = _read_object(path)
            if path.name == "tokenizer.json":
                _check_pieces(content, path)
                content |= {"truncation": None, "padding": None}  # chosen at each call
                added = field(content, "added_tokens", list, path, PriorError, [])
                content["added_tokens"] = [
                    token for token in added if left_out is None or _content_of(token) != left_out
                ]
            elif path.name == "added_tokens.json" and left_out is not None:
                content.pop(left_out, None)
            (place / path.name).write_text(json.dumps(content), encoding="utf-8")
            continue
        try:
            size, text = path.stat().st_size, path.read_bytes()[: _MOST_BYTES + 1]
        except OSError as error:
            raise PriorError(f"{path} can't be read: {error.strerror or error}") from error
        strange = disguise(text[:512])
        if strange is not None or size > _MOST_BYTES:
            raise PriorError(f"{path} {strange or f'holds {size:,} bytes: no known tokenizer has as many'}")
        (place / path.name).write_bytes(text)


def _check_pieces(content: dict[str, Any], where: Path) -> None:
    """Refuse a tokenizer.json whose replacements, one after the other, make a prompt grow without end."""
    # replacements follow one another, so in the worst case their factors multiply
    growth, waiting = 1, [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            text = next((node[name] for name in ("content", "prepend", "replacement") if name in node), "")
            growth *= max(len(text), 1) if isinstance(text, str) else 1
            waiting += node.values()
        if growth > _MOST_GROWTH:
            raise PriorError(f"{where}: its replacements make a text {growth:,} times as long: it can't be meant")


def _load_words(class_name: str, place: Path, folder: Path, plain: dict[str, str]) -> Any:
    """Load one of transformers' tokenizers from a folder that was looked through."""
    import transformers

    # which class reads it without them, and what is then said, differs from version to version
    alone = class_name == "T5Tokenizer" and not (place / "tokenizer.json").is_file()
    if alone and importlib.util.find_spec("sentencepiece") is None:
        raise PriorError(
            f"the tokenizer in {folder} is there as spiece.model alone, which takes two more packages to read: "
            "pip install sentencepiece protobuf"
        )
    names = _CLASSES[class_name]
    words_class = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    try:
        return words_class.from_pretrained(place, local_files_only=True, trust_remote_code=False, **plain)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # damaged files: whatever transformers raises, and the panics of tokenizers
        raise PriorError(
            f"the tokenizer in {folder} can't be read: its files are damaged or don't belong together "
            f"({type(error).__name__})"
        ) from error
