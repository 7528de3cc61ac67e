"""A user id without a home folder, as in a container that is started with any number: an image, and one line in the console."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.comfy_server import find_comfyui

pytestmark = [pytest.mark.comfy, pytest.mark.rotating, pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="needs root and setpriv, to start a program with a user id that nobody knows")]
NOBODY = 54321
LINE = "this user has no home folder, so not all is kept for the next start"


@pytest.fixture
def run(models_dir, tmp_path):
    """Runs without_home.py as that user: -> (what it says, the lines of its console)."""
    def run(**environment):
        temporary = tmp_path / "tmp"
        temporary.mkdir(exist_ok=True)
        for folder in (tmp_path, temporary):
            os.chown(folder, NOBODY, NOBODY)
        # ComfyUI itself does not start without a name of the user: torch asks for it (getpass.getuser).
        clean = {key: value for key, value in os.environ.items()
                 if key not in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR", "INT8_COMPILE_CACHE")
                 and not key.startswith(("XDG_", "INT8_COMPILE_CACHE_"))}
        # It may read what root may, such as this interpreter, and write nothing but its own.
        capability = "+dac_read_search"
        user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", f"--inh-caps={capability}",
                f"--ambient-caps={capability}"]
        checkpoint = models_dir / "models" / "diffusion_models" / "tiny_flux.safetensors"
        done = subprocess.run([*user, sys.executable, str(Path(__file__).with_name("without_home.py")), str(checkpoint)], text=True,
                              capture_output=True, cwd=tmp_path, timeout=900, env={**clean, "USER": "somebody",
                                                                                 "TMPDIR": str(temporary), **environment,
                                                                                 "COMFYUI_PATH": str(find_comfyui())})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr.splitlines()
    return run


def check(said, lines):
    assert 0 < said["int8"] < 0.05 and said["native"]
    # Inductor rounds otherwise in the last bit, which INT8 blows up to its own noise.
    assert all(found < 0.01 for found in said["compiled"].values()) and len(said["compiled"]) == 2
    assert all(status.startswith("ready") for statuses in said["status"].values() for status in statuses), said
    assert not [line for line in lines if "home directory" in line or "could not build" in line or "compile failed" in line], lines


@pytest.mark.rotating
@pytest.mark.parametrize("home", [None, "/", "/nonexistent"], ids=["unset", "not its own", "absent"])
def test_without_a_home_folder_there_is_an_image_and_one_line(run, tmp_path, home):
    said, lines = run(**({} if home is None else {"HOME": home}))
    check(said, lines)
    assert sum(LINE in line for line in lines) == 1 and not said["cache"]
    assert not list((tmp_path / "tmp").glob("int8-compile-*")), "the folder of that process goes with it"


def test_what_xdg_cache_home_says_is_where_things_are_kept(run, tmp_path):
    said, lines = run(XDG_CACHE_HOME=str(tmp_path / "caches"))
    check(said, lines)
    assert not any(LINE in line for line in lines)
    assert list((tmp_path / "caches" / "int8-compile" / "native").glob("*.so"))


def test_what_int8_compile_cache_dir_says_is_where_things_are_kept(run, tmp_path):
    said, lines = run(INT8_COMPILE_CACHE_DIR=str(tmp_path / "kept"))
    check(said, lines)
    assert said["cache"] and not any(LINE in line for line in lines)
    assert list((tmp_path / "kept" / "native").glob("*.so")) and (tmp_path / "kept" / "compiled").is_dir()
    # The key is outside of the cache that it signs.
    assert (tmp_path / "kept-home" / ".config" / "int8-compile" / "cache.key").stat().st_uid == NOBODY
