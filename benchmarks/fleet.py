"""Two workers on one machine that share what was compiled: by one directory, and by torch's Redis cache (web/docs/SaveCompileCache.md).

    python benchmarks/fleet.py [--redis-server COMMAND] [--json FILE]

Each worker is a ComfyUI server with its own folders and its own compilers' caches. In the directory the second compiles nothing, whether
the first has finished or both start at once; of Redis it loads every graph (Redis counts what it found). ComfyUI's Python needs the package
redis for that, and the machine redis-server; without either that part says so and is left out.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.beside_packs import commit_of  # noqa: E402
from benchmarks.comfy_server import (  # noqa: E402
    ComfyServer,
    find_comfyui,
    find_python,
    free_port,
    load_latent,
    relative_difference,
)
from benchmarks.tiny_models import cache_dir, make_models  # noqa: E402
from benchmarks.workflows import flux_prompt, reports  # noqa: E402

BUILD_SECONDS = 600
SAME = 1e-3
LAZY = "INT8LazyTorchCompile", {"background": True}
COMPILE = "CompileModel", {}


@dataclass
class Row:
    """One worker. difference: of its image to its own uncompiled one. graphs: that it compiled, from_cache: that it had from torch's cache.
    entries: in the directory. found, missed: of what Redis was asked for."""

    way: str
    worker: str
    seconds: float  # of its first image
    difference: float
    graphs: int
    last: dict
    from_cache: int = 0
    entries: int = 0
    found: int = 0
    missed: int = 0


class Fleet:
    def __init__(self, folder: Path):
        self.comfyui = find_comfyui()
        if self.comfyui is None:
            raise SystemExit("ComfyUI was not found: set COMFYUI_PATH to its folder")
        self.folder, self.models = folder, make_models(self.comfyui, cache_dir())

    @contextlib.contextmanager
    def worker(self, name: str, **environment: str) -> Iterator[ComfyServer]:
        own = {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / name / "inductor"), "HOME": str(self.folder / name / "home"), **environment}
        os.makedirs(own["HOME"], exist_ok=True)
        with ComfyServer(self.comfyui, self.folder / name / "base", models=self.models, env=own) as server:
            yield server


def prompt(server: ComfyServer, nodes) -> dict:
    return flux_prompt(width=64, height=64, steps=2, model_nodes=[(name, {**server.defaults(name), **inputs}) for name, inputs in nodes])


def sampled(server: ComfyServer, nodes):
    """(latent, report of the last node, seconds)"""
    result = server.run(prompt(server, nodes))
    if result.status != "success":
        raise SystemExit(f"{result.failure}\n{server.log_text()[-2000:]}")
    latent = load_latent(next(path for path in result.files(server) if path.suffix == ".latent"))
    return latent, (reports(result.outputs) or [{}])[-1], result.seconds


def row_of(server: ComfyServer, way: str, worker: str, nodes) -> Row:
    plain = sampled(server, [])[0]
    latent, report, seconds = sampled(server, nodes)
    details = report["details"]
    last = {name: count for name, count in details["last_calls"].items() if count}
    return Row(way, worker, seconds, relative_difference(latent, plain), details["graphs"], last, details["cache_hits"])


def by_directory(fleet: Fleet) -> list[Row]:
    key = fleet.folder / "keys" / "cache.key"
    key.parent.mkdir(mode=0o700)
    key.touch(0o600)
    key.write_bytes(os.urandom(32))
    rows = []
    for way, at_once in (("directory, one after the other", False), ("directory, both at once", True)):
        shared = {"INT8_COMPILE_CACHE_DIR": str(fleet.folder / ("shared_at_once" if at_once else "shared")),
                  "INT8_COMPILE_CACHE_KEY_FILE": str(key)}
        names = f"first_{at_once}", f"second_{at_once}"
        with contextlib.ExitStack() as stack:
            servers = []
            for name in names:
                servers.append(stack.enter_context(fleet.worker(name, **shared)))
                if not at_once:
                    rows.append(row_of(servers[-1], way, name.partition("_")[0], [LAZY]))
                    servers[-1].wait_for_builder(BUILD_SECONDS)
            if at_once:
                queued = [server.queue(prompt(server, [LAZY])) for server in servers]
                for server, prompt_id in zip(servers, queued):
                    server.wait(prompt_id)
                    server.wait_for_builder(BUILD_SECONDS)
                rows += [row_of(server, way, name.partition("_")[0], [LAZY]) for server, name in zip(servers, names)]
        rows[-1].entries = len(list(Path(shared["INT8_COMPILE_CACHE_DIR"]).rglob("artifact.pt2")))
    return rows


def asked_of_redis(port: int) -> tuple[int, int]:
    """(keys found, keys missed) since it started."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"INFO stats\r\n")
        text = connection.recv(1 << 16).decode()
    return tuple(int(re.search(rf"keyspace_{name}:(\d+)", text).group(1)) for name in ("hits", "misses"))


def by_redis(fleet: Fleet, command: str) -> list[Row]:
    port, rows = free_port(), []
    redis = subprocess.Popen([command, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(fleet.folder)],
                             stdout=subprocess.DEVNULL)
    try:
        time.sleep(1)
        before = asked_of_redis(port)
        for name in ("first", "second"):
            with fleet.worker(f"{name}_redis", INT8_COMPILE_CACHE="0", TORCHINDUCTOR_FX_GRAPH_REMOTE_CACHE="1",
                              TORCHINDUCTOR_AUTOGRAD_REMOTE_CACHE="1", TORCHINDUCTOR_AUTOTUNE_REMOTE_CACHE="1",
                              TORCHINDUCTOR_REDIS_HOST="127.0.0.1", TORCHINDUCTOR_REDIS_PORT=str(port)) as server:
                rows.append(row_of(server, "Redis", name, [COMPILE]))
            after = asked_of_redis(port)
            rows[-1].found, rows[-1].missed = after[0] - before[0], after[1] - before[1]
            before = after
    finally:
        redis.terminate()
        redis.wait()
    return rows


def is_right(rows: list[Row]) -> bool:
    """Of Flux's two block classes each is compiled once: for the directory, or for Redis by the first worker."""
    for row in rows:
        of_second = row.worker == "second"
        if row.way == "Redis":
            right = row.graphs == 2 and (not of_second or row.from_cache >= row.graphs)  # what warms the compiler up is not kept
        else:
            right = not row.graphs and (not of_second or (set(row.last) == {"artifact"} and row.entries == 2))
        if not right or row.difference > SAME:
            return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis-server", default=shutil.which("redis-server"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder))
        rows = by_directory(fleet)
        has_package = subprocess.run([find_python(fleet.comfyui), "-c", "import redis"], capture_output=True).returncode == 0
        if options.redis_server and has_package:
            rows += by_redis(fleet, options.redis_server)
        else:
            sys.stdout.write("Redis was left out: it needs redis-server, and the package redis for ComfyUI's Python\n")
    for row in rows:
        sys.stdout.write(f"{asdict(row)}\n")
    right = is_right(rows)
    sys.stdout.write("right\n" if right else "WRONG\n")
    if options.json:
        options.json.write_text(json.dumps({"date": str(datetime.date.today()), "commit": commit_of(ROOT).split()[0], "right": right,
                                            "rows": list(map(asdict, rows))}, indent=1) + "\n")
    raise SystemExit(not right)


if __name__ == "__main__":
    main()
