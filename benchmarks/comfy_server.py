"""Start a ComfyUI server of one's own, run prompts on it over HTTP, read back what it saved.

Standard library only, so that benchmarks, end-to-end tests and users' bug reports share one driver.
"""

import configparser
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).absolute().parent.parent
START_TIMEOUT = 180.0  # seconds
STOP_TIMEOUT = 10.0  # seconds between asking a server to end and killing it
POLL_INTERVAL = 0.03  # seconds
LOG_TAIL_LINES = 40

WANTED_FLAGS = {
    "--listen": "127.0.0.1",
    "--database-url": "sqlite:///:memory:",
    "--disable-api-nodes": None,
    "--disable-auto-launch": None,
}

# comfy-cli keeps config.ini and its default workspace at these places, see comfy_cli/constants.py.
CLI_CONFIG = {"win32": "AppData/Local/comfy-cli", "darwin": "Library/Application Support/comfy-cli"}
CLI_WORKSPACE = {"win32": "Documents/comfy/ComfyUI", "darwin": "Documents/comfy/ComfyUI"}

# A proxy set for the outside world must not see requests to 127.0.0.1.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class PromptRejected(Exception):
    """ComfyUI refused a prompt or some of its outputs: .status is the HTTP status, .body its parsed JSON."""

    def __init__(self, status: int, body: dict):
        self.status = status
        self.body = body
        super().__init__("\n".join(self._lines()))

    def _lines(self):
        if self.body.get("error"):
            yield _sentence(self.body["error"])
        for node_id, node in self.body.get("node_errors", {}).items():
            for error in node["errors"]:
                yield f"node {node_id} ({node['class_type']}): {_sentence(error)}"


def _sentence(error: dict) -> str:
    return f"{error['message']}: {error['details']}" if error.get("details") else error["message"]


@dataclass
class RunResult:
    """One finished prompt.

    status is "success", "error" or "interrupted"; seconds runs from the queueing to the end of the prompt.
    error holds exception_message, exception_type, node_id, node_type and traceback when status is "error".
    """

    prompt_id: str
    status: str
    seconds: float
    outputs: dict = field(repr=False)
    error: dict | None
    messages: list = field(repr=False)

    def files(self, where: "ComfyServer | Path") -> list[Path]:
        """Paths of every image and latent the prompt saved; where is the server or its base directory."""
        base_dir = where.base_dir if isinstance(where, ComfyServer) else Path(where)
        return [
            base_dir / item["type"] / item["subfolder"] / item["filename"]
            for node_output in self.outputs.values()
            for items in node_output.values()
            for item in items
            if isinstance(item, dict) and "filename" in item
        ]

    @property
    def failure(self) -> str:
        """Of a prompt that did not succeed: the node and its message, or the status."""
        return f"{self.error['node_type']}: {self.error['exception_message'].strip()}" if self.error else self.status

    @property
    def cached_nodes(self) -> list[str]:
        """Ids of the nodes that ComfyUI did not run again, since it still had their outputs."""
        return [node for name, data in self.messages if name == "execution_cached" for node in data["nodes"]]


class ComfyServer:
    """A ComfyUI process on a free port of 127.0.0.1, with base_dir as its models, output and custom_nodes.

    device "cpu" adds --cpu; "cuda" leaves the choice to ComfyUI. pack is served as custom_nodes/<pack_folder>
    (None: no pack), extra_packs maps further folder names to packs. models is another base directory whose
    models are offered as well, such as make_models' result. Flags that this ComfyUI does not know are left out.
    The log is base_dir/server.log and starts anew with every server.
    Entering raises RuntimeError, with the end of the log, when the process dies or is silent for START_TIMEOUT.
    """

    def __init__(
        self,
        comfyui: Path,
        base_dir: Path,
        *,
        pack: Path | None = REPO,
        pack_folder: str = "int8-compile",
        extra_packs: Mapping[str, Path] | None = None,
        models: Path | None = None,
        device: str = "cpu",
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        python: str | None = None,
    ):
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', not {device!r}")
        self.comfyui = Path(comfyui)
        self.base_dir = Path(base_dir).absolute()
        self.packs = {pack_folder: pack, **(extra_packs or {})}
        self.models = None if models is None else Path(models).absolute() / "models"
        self.device = device
        self.extra_args = list(extra_args)
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **(env or {})}
        self.python = python or find_python(self.comfyui)
        self.log_path = self.base_dir / "server.log"
        self.models_config = self.base_dir / "shared_models.yaml"
        self.process: subprocess.Popen | None = None
        self.port = 0
        self._queued_at: dict[str, float] = {}

    def __enter__(self) -> "ComfyServer":
        custom_nodes = self.base_dir / "custom_nodes"
        custom_nodes.mkdir(parents=True, exist_ok=True)
        for folder, pack in self.packs.items():
            _remove(custom_nodes / folder)
            if pack is not None:
                _place(Path(pack).resolve(), custom_nodes / folder)
        if self.models:
            folders = {path.name: path.name for path in self.models.iterdir() if path.is_dir()}
            shared = {"shared": {"base_path": str(self.models), **folders}}
            self.models_config.write_text(json.dumps(shared), encoding="utf-8")  # JSON is YAML
        self.port = free_port()
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=self.comfyui, env=self.env, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=os.name == "posix",
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info):
        self.stop()

    def command(self) -> list[str]:
        """The command line, with the flags that this ComfyUI's comfy/cli_args.py names."""
        known = (self.comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        command = [self.python, "main.py", "--base-directory", str(self.base_dir), "--port", str(self.port)]
        for flag, value in WANTED_FLAGS.items():
            if f'"{flag}"' in known:
                command += [flag] if value is None else [flag, value]
        if self.models:
            command += ["--extra-model-paths-config", str(self.models_config)]
        if self.device == "cpu":
            command.append("--cpu")
        return command + self.extra_args

    def stop(self):
        """End the server and every process that it started in its group."""
        if self.process is None:
            return
        _signal_tree(self.process, force=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT)
        _signal_tree(self.process, force=True)
        self.process.wait()
        self.process = None
        for folder in self.packs:
            _remove(self.base_dir / "custom_nodes" / folder)

    def _wait_until_up(self):
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            self._check_alive()
            try:
                self.get("/system_stats")
                return
            except OSError:  # nobody listens yet
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI was silent for {START_TIMEOUT:.0f} s. Its log ends with:\n{self._log_tail()}")

    def _check_alive(self):
        code = self.process.poll()
        if code is not None:
            raise RuntimeError(f"ComfyUI ended with exit code {code}. Its log ends with:\n{self._log_tail()}")

    def log_text(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def _log_tail(self) -> str:
        return "\n".join(self.log_text().splitlines()[-LOG_TAIL_LINES:])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def comfyui_version(self) -> str:
        return self.get("/system_stats")["system"]["comfyui_version"]

    def get(self, path: str):
        with _opener.open(self.url + path, timeout=60) as response:
            return json.load(response)

    def _post(self, path: str, body: dict) -> bytes:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with _opener.open(request, timeout=60) as response:
            return response.read()

    def object_info(self, node_id: str | None = None) -> dict:
        """Every node's schema by id, or one node's schema; KeyError when the server has no such node."""
        if node_id is None:
            return self.get("/object_info")
        return self.get(f"/object_info/{urllib.parse.quote(node_id, safe='')}")[node_id]

    def defaults(self, node_id: str) -> dict:
        """The default of every required input of a node that has one: what the frontend fills in."""
        required = self.object_info(node_id)["input"]["required"]
        return {name: spec[1]["default"] for name, spec in required.items() if len(spec) > 1 and "default" in spec[1]}

    def queue(self, prompt: dict) -> str:
        """Queue an API-format prompt and return its id.

        Raises PromptRejected when ComfyUI refuses it (status 400), and also when it refuses only some of the
        outputs (status 200; it runs the others), as a test that lost an output should not pass.
        """
        queued_at = time.time()
        try:
            answer = json.loads(self._post("/prompt", {"prompt": prompt}))
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRejected(error.code, json.load(error)) from None
        if answer["node_errors"]:
            raise PromptRejected(200, answer)
        self._queued_at[answer["prompt_id"]] = queued_at
        return answer["prompt_id"]

    def history(self, prompt_id: str) -> dict | None:
        """The finished prompt's history entry, or None while it is queued or running."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def wait(self, prompt_id: str, timeout: float = 600) -> RunResult:
        """Wait for a queued prompt; TimeoutError after timeout seconds, RuntimeError if the server dies."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                entry = self.history(prompt_id)
            except OSError:
                time.sleep(0.2)  # a dying process closes its socket before it can be reaped
                self._check_alive()
                raise
            if entry is not None:
                return self._result(prompt_id, entry)
            time.sleep(POLL_INTERVAL)
        raise TimeoutError(f"prompt {prompt_id} did not finish within {timeout:.0f} s")

    def _result(self, prompt_id: str, entry: dict) -> RunResult:
        messages = entry["status"]["messages"]
        by_name = dict(messages)
        status = "interrupted" if "execution_interrupted" in by_name else entry["status"]["status_str"]
        # ComfyUI stamps its messages in ms of the same clock, so polling adds nothing to the time.
        ended_at = messages[-1][1]["timestamp"] / 1000
        return RunResult(
            prompt_id=prompt_id, status=status, seconds=ended_at - self._queued_at[prompt_id],
            outputs=entry["outputs"], error=by_name.get("execution_error"), messages=messages,
        )

    def run(self, prompt: dict, timeout: float = 600) -> RunResult:
        """queue() and wait()."""
        return self.wait(self.queue(prompt), timeout)

    def wait_for_builder(self, timeout: float):
        """Until everything that the log says was begun is built; at once where nothing is built."""
        end = time.monotonic() + timeout
        while self.log_text().count(": building: ") > self.log_text().count(": built: "):
            if time.monotonic() > end or "not kept in the compile cache" in self.log_text():
                raise RuntimeError(f"the builder did not finish, see {self.log_path}")
            time.sleep(0.5)

    def interrupt(self):
        """Interrupt the prompt that is running, if any."""
        self._post("/interrupt", {})

    def free(self):
        """Unload every model and forget all cached node outputs, so that the next prompt runs every node."""
        self._post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(0.2)  # the idle worker acts on the flags when it wakes; no route tells when it has


def find_comfyui() -> Path | None:
    """The folder of ComfyUI's main.py: COMFYUI_PATH, the one around this pack, comfy-cli's, or None.

    FileNotFoundError when COMFYUI_PATH is set but holds no main.py.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        if not (Path(named) / "main.py").is_file():
            raise FileNotFoundError(f"set COMFYUI_PATH to the folder of ComfyUI's main.py: {named} has no main.py")
        return Path(named)
    candidates = [parent.parent for parent in REPO.parents if parent.name == "custom_nodes"]
    home = Path.home()
    config = configparser.ConfigParser(interpolation=None)
    config.read(home / CLI_CONFIG.get(sys.platform, ".config/comfy-cli") / "config.ini", encoding="utf-8")
    workspaces = [config.defaults().get(key) for key in ("default_workspace", "recent_workspace")]
    candidates += [Path(workspace) for workspace in workspaces if workspace]
    candidates += [home / CLI_WORKSPACE.get(sys.platform, "comfy/ComfyUI"), home / "comfy" / "ComfyUI"]
    return next((path for path in candidates if (path / "main.py").is_file()), None)


def find_python(comfyui: Path) -> str:
    """The Python of this ComfyUI: COMFYUI_PYTHON, its own venv, Windows portable's, else the running one."""
    if os.environ.get("COMFYUI_PYTHON"):
        return os.environ["COMFYUI_PYTHON"]
    comfyui = Path(comfyui).absolute()
    in_venv = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    candidates = [comfyui / ".venv" / in_venv, comfyui / "venv" / in_venv]
    candidates.append(comfyui.parent / "python_embeded" / "python.exe")
    return next((str(path) for path in candidates if path.is_file()), sys.executable)


def load_latent(path: Path):
    """The numpy array of a SaveLatent file: [B, C, H, W] for images, [B, C, T, H, W] for video."""
    from safetensors.numpy import load_file

    return load_file(path)["latent_tensor"]


def relative_difference(a, b) -> float:
    """||a - b|| / ||b|| in float64, b being the reference. ValueError when the shapes differ."""
    import numpy as np

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _place(pack: Path, target: Path):
    try:
        target.symlink_to(pack, target_is_directory=True)
    except OSError:  # Windows without developer mode
        shutil.copytree(pack, target, ignore=shutil.ignore_patterns(".*", "__pycache__", "node_modules"))


def _remove(target: Path):
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)


def _signal_tree(process: subprocess.Popen, force: bool):
    if os.name == "posix":
        # The whole group may be gone; macOS calls a group of zombies a PermissionError.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)
    elif process.poll() is None:
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
