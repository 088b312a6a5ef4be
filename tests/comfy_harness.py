"""A real ComfyUI server for the tests, and a client of its HTTP and websocket interface made of the standard library.

The checkout is looked for in COMFYUI_PATH, where this repository lies in a ComfyUI's custom_nodes, and where comfy-cli
installs to; its Python in COMFYUI_PYTHON and in virtual environments in and beside the checkout. COMFYUI_OPTIONS are
options for the server: "--cpu" unless told otherwise; "" is its own choice, the GPU where there is one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
GUARD = Path(__file__).resolve().parent / "guard"
PACK = "dream4d"


def find_comfyui() -> Path | None:
    """Return the folder of a ComfyUI checkout, or None."""
    places = [os.environ.get("COMFYUI_PATH"), REPOSITORY.parent.parent, Path.home() / "comfy" / "ComfyUI"]
    found = (Path(place) for place in places if place)
    return next((path for path in found if (path / "main.py").is_file() and (path / "comfy_api").is_dir()), None)


def find_python(comfyui: Path) -> str:
    """Return the Python that has ComfyUI's requirements."""
    given = os.environ.get("COMFYUI_PYTHON")
    names = [parent / name / "bin" / "python" for parent in (comfyui, comfyui.parent) for name in (".venv", "venv")]
    return given or next((str(path) for path in names if path.exists()), sys.executable)


def why_no_server() -> str | None:
    """Return why the server tests can't run here, or None."""
    comfyui = find_comfyui()
    if comfyui is None:
        return "no ComfyUI checkout found: set COMFYUI_PATH"
    needs = "import aiohttp, av, torch, torchvision, diffusers, transformers"
    done = subprocess.run([find_python(comfyui), "-c", needs], capture_output=True, text=True)
    return f"ComfyUI's Python lacks something: {done.stderr.strip().splitlines()[-1]}" if done.returncode else None


def why_no_meshes() -> str | None:
    """Return why no meshes can be made of scenes in the server, or None."""
    comfyui = find_comfyui()
    needs = "import skimage, fast_simplification, xatlas"
    done = subprocess.run([find_python(comfyui), "-c", needs], capture_output=True, text=True) if comfyui else None
    return None if done is None or not done.returncode else f"ComfyUI's Python lacks: {done.stderr.splitlines()[-1]}"


class Server:
    """A ComfyUI server with folders of its own and this repository as its only pack.

    It can't reach other machines, and it has a second pack that looks inside and makes things fail (see tests/guard).
    """

    def __init__(self, base: Path) -> None:
        self.base, self.port = base, _free_port()
        for name in ("custom_nodes", "input", "output", "models", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        for name, place in ((PACK, REPOSITORY), ("guard_pack", GUARD / "guard_pack")):
            pack = base / "custom_nodes" / name
            if not pack.exists():
                pack.symlink_to(place, target_is_directory=True)
        self.log, self.connections = base / "server.log", base / "connections.jsonl"
        self._process: subprocess.Popen | None = None

    @property
    def runs(self) -> Path:
        """Where the pack keeps unfinished and finished runs."""
        return self.base / "output" / "dream4d" / "runs"

    def start(self, seconds: float = 180.0) -> Server:
        """Start it and wait until it answers."""
        comfyui = find_comfyui()
        words = [find_python(comfyui), "main.py", "--port", str(self.port), "--base-directory", str(self.base)]
        words += ["--disable-auto-launch", "--database-url", "sqlite:///:memory:"]
        words += os.environ.get("COMFYUI_OPTIONS", "--cpu").split()
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | os.environ
        environment |= {"PYTHONPATH": str(GUARD), "DREAM4D_TEST_CONNECTIONS": str(self.connections)}
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(words, cwd=comfyui, env=environment, stdout=log, stderr=log)
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at once:\n{self.text()[-3000:]}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return self
            time.sleep(0.5)
        raise TimeoutError(f"ComfyUI did not answer:\n{self.text()[-3000:]}")

    def stop(self) -> None:
        """End it politely."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(how)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def text(self) -> str:
        """What the server has said so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> dict:
        """GET some JSON."""
        return json.loads(self.read(path))

    def read(self, path: str) -> bytes:
        """GET anything."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read()

    def post(self, path: str, body: dict) -> tuple[int, dict]:
        """POST some JSON; return the status and the answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else {}
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def queue(self, graph: dict, client: str = "") -> str:
        """Queue a graph; return the prompt's id. Refusals raise AssertionError."""
        status, answer = self.post("/prompt", {"prompt": graph, "client_id": client})
        assert status == 200, json.dumps(answer, indent=1)[:3000]
        return answer["prompt_id"]

    def refused(self, graph: dict) -> str:
        """Queue a graph that has to be refused; return the whole answer as text."""
        status, answer = self.post("/prompt", {"prompt": graph})
        assert status == 400, answer
        return json.dumps(answer, ensure_ascii=False)

    def wait(self, prompt: str, seconds: float = 300.0) -> dict:
        """Wait for the end of a prompt; return its entry of the history."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            entry = self.get(f"/history/{prompt}").get(prompt)
            if entry is not None:
                return entry
            time.sleep(0.1)
        raise TimeoutError(f"the prompt did not end:\n{self.text()[-3000:]}")

    def run(self, graph: dict, seconds: float = 300.0) -> dict:
        """Queue a graph and wait until it has succeeded; return its outputs by node."""
        entry = self.wait(self.queue(graph), seconds)
        assert entry["status"]["status_str"] == "success", json.dumps(entry["status"], indent=1)[-4000:]
        return entry["outputs"]

    def error(self, graph: dict, seconds: float = 120.0) -> str:
        """Queue a graph that fails while it runs; return the message on its node."""
        entry = self.wait(self.queue(graph), seconds)
        messages = [m for name, m in entry["status"]["messages"] if name == "execution_error"]
        assert messages, entry["status"]
        return messages[0]["exception_message"]

    @property
    def on_gpu(self) -> bool:
        """Whether ComfyUI works on an NVIDIA GPU."""
        return any(device["type"] == "cuda" for device in self.get("/system_stats")["devices"])

    def inside(self) -> dict:
        """What the guard pack sees: "libraries", "networks" (alive), "held" (by ComfyUI's memory management)."""
        return self.get("/dream4d_test/inside")

    def attempts(self) -> list[dict]:
        """The connections to other machines that were tried."""
        return (
            [json.loads(line) for line in self.connections.read_text().splitlines()]
            if self.connections.exists()
            else []
        )

    def interrupt(self) -> None:
        """Press Cancel."""
        self.post("/interrupt", {})

    @contextlib.contextmanager
    def listen(self) -> Iterator[Listener]:
        """Open a websocket."""
        listener = Listener(self.port)
        try:
            yield listener
        finally:
            listener.close()


class Listener:
    """A websocket: events as (kind, content), where binary ones are ("text", str) and ("image", bytes)."""

    def __init__(self, port: int) -> None:
        self.client = uuid.uuid4().hex
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET /ws?clientId={self.client} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket"]
        lines += ["Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""]
        self._socket.sendall("\r\n".join(lines).encode())
        self._buffer = b""
        while b"\r\n\r\n" not in self._buffer:
            self._buffer += self._socket.recv(4096)
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        assert b" 101 " in head.splitlines()[0], head
        features = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        self._send(1, json.dumps(features).encode())

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def until(self, enough: Callable[[str, object], bool], seconds: float = 120.0) -> list[tuple[str, object]]:
        """Collect events up to the first that is enough."""
        events, limit = [], time.monotonic() + seconds
        while time.monotonic() < limit:
            event = self._event()
            if event is not None:
                events.append(event)
                if enough(*event):
                    return events
        raise TimeoutError(f"the event did not come; the last ones were {events[-5:]}")

    def _event(self) -> tuple[str, object] | None:
        code, content = self._message()
        if code == 9:  # a ping wants its content back
            self._send(10, content)
        if code == 1:
            message = json.loads(content)
            return message["type"], message["data"]
        if code != 2:
            return None
        (kind,), rest = struct.unpack(">I", content[:4]), content[4:]
        (size,) = struct.unpack(">I", rest[:4])
        if kind == 3:  # a node's line of text
            return "text", rest[4 + size :].decode()
        return "image", rest[4 + size :] if kind == 4 else rest[4:]

    def _message(self) -> tuple[int, bytes]:
        """Read one message, of one frame or several."""
        code, parts = 0, []
        while True:
            first, second = self._take(2)
            size = second & 127
            if size > 125:
                (size,) = struct.unpack(">H" if size == 126 else ">Q", self._take(2 if size == 126 else 8))
            code = first & 15 or code
            parts.append(self._take(size))
            if first & 128:
                return code, b"".join(parts)

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            more = self._socket.recv(65536)
            if not more:
                raise ConnectionError("the server hung up")
            self._buffer += more
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _send(self, code: int, content: bytes) -> None:
        mask = os.urandom(4)
        size = struct.pack(">B", 128 | len(content)) if len(content) < 126 else struct.pack(">BH", 254, len(content))
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(content))
        self._socket.sendall(struct.pack(">B", 128 | code) + size + mask + masked)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- graphs as the front end sends them --------------------------------------------------------------------------


def node(class_type: str, /, **inputs) -> dict:
    """One node; the inputs of a dynamic choice are written with __ for the dot."""
    return {"class_type": class_type, "inputs": {name.replace("__", "."): value for name, value in inputs.items()}}


def static_nodes(steps: int = 3, prompt: str = "a red cube", seed: int = 0, **changes) -> dict:
    """Nodes 1 and 2: a prior and a still scene."""
    given = {"prompt": prompt, "recipe": "toy", "recipe__steps": steps, "seed": seed, "negative": ""}
    given |= {"resume": "resume automatically", "preview_seconds": 0.0, "multiview_prior": ["1", 0]}
    given |= {"mask_shows": "automatic"}
    return {
        "1": node("Dream4DLoadToyPrior", kind="multiview"),
        "2": node("Dream4DOptimizeStaticScene", **(given | changes)),
    }


def motion_nodes(steps: int = 3, prompt: str = "a red cube is jumping", seed: int = 0, **changes) -> dict:
    """Nodes 3 and 4: a prior and the scene of node 2 in motion."""
    given = {"scene": ["2", 0], "video_prior": ["3", 0], "prompt": prompt, "recipe": "toy", "recipe__steps": steps}
    given |= {"recipe__hifa_steps": 1, "deformation_scale": 1.0, "seed": seed, "negative": ""}
    given |= {"resume": "resume automatically", "preview_seconds": 0.0}
    return {
        "3": node("Dream4DLoadToyPrior", kind="video"),
        "4": node("Dream4DAnimateScene", **(given | changes)),
    }


def render_node(scene: list, **changes) -> dict:
    """A small rendering."""
    given = {"cameras": "fixed view", "frames": 4, "width": 32, "height": 24, "frame_rate": 8.0, "normals": False}
    given |= {"azimuth": 0.0, "elevation": 15.0, "distance": 3.0, "field_of_view": 40.0, "scene": scene}
    return node("Dream4DRender", **(given | changes))
