"""Launches past Triton's own: the driver is given what Triton would have given it. Without a GPU, on a driver that does nothing."""
from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import CUDA

SCRIPT = Path(__file__).with_name("bound_launches.py")
PROMISES = [node.name for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef) and any(getattr(decorator, "id", "") == "promise" for decorator in node.decorator_list)]

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed on this platform"),
              pytest.mark.skipif(CUDA, reason="a GPU's driver is there, and test_triton_gemm launches on it"),
              pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="the driver is made with gcc, for Linux")]


@pytest.fixture(scope="module")
def wrong():
    """{promise: what is wrong}"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("promise", PROMISES)
def test(wrong, promise):
    assert not wrong[promise], "\n".join(wrong[promise])
