"""Real ComfyUI servers: started with the pack, driven over HTTP, stopped afterwards."""
from __future__ import annotations

import pytest
from older_comfyui import needs_for

from benchmarks.comfy_server import ComfyServer, find_comfyui, load_latent


@pytest.fixture(scope="session")
def serve(models_dir, tmp_path_factory):
    """serve(**ComfyServer arguments) -> a context manager: a server with the small models and a base directory of its own."""
    def serve(**arguments):
        return ComfyServer(find_comfyui(), tmp_path_factory.mktemp("comfyui"), models=models_dir, **arguments)
    return serve


@pytest.fixture(scope="session")
def server(serve):
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def defaults(server):
    """The contract's defaults of a node, as /object_info tells them: what the frontend fills in."""
    def defaults(node_id, **inputs):
        needs_for(node_id)
        return node_id, {**server.defaults(node_id), **inputs}
    return defaults


def latent(server, result):
    """The saved latent of a finished prompt; fails with ComfyUI's own error where it did not succeed."""
    assert result.status == "success", f"{result.error}\n{server.log_text()[-3000:]}"
    (path,) = (p for p in result.files(server) if p.suffix == ".latent")
    return load_latent(path)
