"""Set-up and runs for people: `nox -s demo`, `nox -s bench`, `nox -s tests`, `nox -s quick`, `nox -s fuzz`, `nox -s release`,
`nox -s lint`.

Needs Python 3.10 or later, pip and nox; everything else is installed here. Environment variables:
COMFYUI_PATH      folder of ComfyUI's main.py; otherwise looked for in the usual places, see benchmarks/comfy_server.py
COMFYUI_PYTHON    a Python that can run that ComfyUI; otherwise ComfyUI's own, or one made under .nox
INT8_COMPILE_TORCH       what pip installs for the one under .nox, such as "torch==2.9.1 torchvision==0.24.1 torchaudio==2.9.1"
INT8_COMPILE_MATRIX_COMFYUI  for `nox -s matrix`: folders of ComfyUIs, separated as in PATH; otherwise COMFYUI_PATH's
INT8_COMPILE_MATRIX_PYTHON   for `nox -s matrix`: Pythons that can run them, separated as in PATH; otherwise COMFYUI_PYTHON's
INT8_COMPILE_NO_INSTALL  set: do not try to install ComfyUI where there is none (also under CI)
"""
from __future__ import annotations

import hashlib
import itertools
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import find_comfyui, find_python  # noqa: E402

nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests"]

TORCH = "torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0"
# What the demo and the tests use besides; all three are in ComfyUI's requirements too.
WITHOUT_COMFYUI = ("numpy", "Pillow", "safetensors")
TEST_TOOLS = ("pytest>=8", "scikit-learn>=1.3", "matplotlib")
# What one of the two test processes runs, but for some files; the other runs the rest, which takes about as long.
FIRST_PART = ("tests/compile", "tests/nodes")
BUT_FOR = ("tests/compile/test_right_under_change_rare.py", "tests/compile/test_lowered_blocks.py", "tests/nodes/test_mode_orders.py",
           "tests/nodes/test_cache.py")
# Plain torch: no ComfyUI, no server, no compiler; under 3 minutes on two cores.
QUICK = ("tests/test_pack.py", "tests/test_errors.py", "tests/internals", "tests/modes",
         *(f"tests/int8/test_{name}.py" for name in ("kernels", "quantize", "tables", "tuning", "bound")),
         *(f"tests/compile/test_{name}.py" for name in ("options", "expressions", "cache_store", "cache_bundle")),
         *(f"tests/security/test_{name}.py" for name in ("options", "store_key", "store_windows")))
# What users have: the oldest and the newest torch that the pack is made for and those between that changed much.
RELEASES = ("torch==2.8.*", "torch==2.11.*", "torch==2.13.*", "torch==2.14.*", "torch==2.15.*", "comfy-kitchen==0.2.31",
            "comfy-kitchen==0.2.40", "triton==3.4.*", "triton==3.6.*", "triton==3.8.*", "triton==3.9.*")
NO_TESTS_COLLECTED = 5  # pytest's exit code
COMFYUI_GIT = "https://github.com/comfyanonymous/ComfyUI"  # what comfy-cli clones
# torch.compile and other processes do not get to see the test tools: they are put at the end of this process's path only. It has the
# lowest priority, as the pack's builders have, which two busy test processes would starve.
RUN_PYTEST = ("import os, sys; getattr(os, 'SCHED_IDLE', None) and os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); "
              "sys.path.append(sys.argv.pop(1)); import pytest; sys.exit(pytest.main())")
RUN_SCRIPT = "import runpy, sys; sys.path.append(sys.argv.pop(1)); sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"


@nox.session(venv_backend="virtualenv")  # for its pip
def demo(session: nox.Session):
    """Eager, compiled and INT8 + compiled, side by side: pictures, times and differences in demo_output."""
    python, env = environment(session)
    session.run(python, "benchmarks/demo.py", *session.posargs, env=env, external=True)


@nox.session(venv_backend="virtualenv")  # for its pip
def bench(session: nox.Session):
    """A checkpoint or workflow of yours: eager, each INT8 method, compiled or not; speed beside quality. Arguments: nox -s bench -- -h"""
    python, env = environment(session)
    tools = test_tools(session, python)
    session.run(python, "-c", RUN_SCRIPT, str(tools), "benchmarks/bench.py", *session.posargs, env=env, external=True)


@nox.session(venv_backend="virtualenv")
def tests(session: nox.Session):
    """All tests, in two processes side by side; further arguments go to both of them: nox -s tests -- -k cache. Of tests with several
    parameters each value runs, in combinations that change daily, and what takes longest rotates; all: nox -s tests -- --all"""
    python, env = environment(session)
    tools = test_tools(session, python)
    env["COMFY_CLI"] = str(comfy_cli(session))
    pytest = [python, "-c", RUN_PYTEST, str(tools), "-c", "tests/pytest.ini", "--rootdir=tests"]
    # Most of the time goes into Python and g++, which use one core; what the parts share (models, compilers' caches) is made to be shared.
    env = {**os.environ, **env, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    with tempfile.TemporaryFile() as output:
        files = [str(path.relative_to(ROOT)) for folder in FIRST_PART for path in (ROOT / folder).glob("test_*.py")]
        of_first = [f"--ignore={file}" for file in sorted(files) if Path(file).as_posix() not in BUT_FOR]
        quiet = subprocess.Popen([*pytest, "tests", *of_first, *session.posargs], env=env, stdout=output, stderr=subprocess.STDOUT)
        first = subprocess.run([*pytest, *FIRST_PART, *(f"--ignore={file}" for file in BUT_FOR), *session.posargs], env=env)
        codes = {first.returncode, quiet.wait()}
        output.seek(0)
        sys.stdout.flush()
        shutil.copyfileobj(output, sys.stdout.buffer)
    if codes - {0, NO_TESTS_COLLECTED} or codes == {NO_TESTS_COLLECTED}:
        session.error("tests failed" if codes != {NO_TESTS_COLLECTED} else "no test was chosen")


@nox.session(venv_backend="virtualenv")
def quick(session: nox.Session):
    """The tests that need no ComfyUI, no server and no compiler, in a minute or two; further arguments go to pytest."""
    python, env = environment(session)
    tools = test_tools(session, python)
    session.run(python, "-c", RUN_PYTEST, str(tools), "-c", "tests/pytest.ini", "--rootdir=tests", *QUICK, "-m", "not comfy and not e2e",
                *session.posargs, env=env, external=True)


@nox.session(venv_backend="virtualenv")
def fuzz(session: nox.Session):
    """Generated inputs for everything that a prompt, a workflow, a file or a setting can say, with another seed each time:
    nox -s fuzz -- 1000000 [seed]. The default is 300000 inputs, a quarter of an hour."""
    python, env = environment(session)
    tools = test_tools(session, python)
    count, seed = [*session.posargs, *("300000", str(random.randrange(10**6)))[len(session.posargs):]][:2]
    session.log(f"{count} inputs, seed {seed}")
    env = {**os.environ, **env, "INT8_COMPILE_FUZZ": count, "INT8_COMPILE_FUZZ_SEED": seed}
    session.run(python, "-c", RUN_PYTEST, str(tools), "-c", "tests/pytest.ini", "--rootdir=tests", "tests/security/test_fuzz.py", env=env,
                external=True)


@nox.session(venv_backend="virtualenv")  # for its pip
def matrix(session: nox.Session):
    """Every ComfyUI with every Python: what of the pack holds there, as a table; further arguments go to benchmarks/matrix.py."""
    comfyuis = [folder for folder in os.environ.get("INT8_COMPILE_MATRIX_COMFYUI", "").split(os.pathsep) if folder]
    pythons = [python for python in os.environ.get("INT8_COMPILE_MATRIX_PYTHON", "").split(os.pathsep) if python]
    if not (comfyuis and pythons):
        python, env = environment(session)
        if not comfyuis and "COMFYUI_PATH" not in env:
            session.error("Set INT8_COMPILE_MATRIX_COMFYUI to the folders of ComfyUIs.")
        comfyuis, pythons = comfyuis or [env["COMFYUI_PATH"]], pythons or [python]
    for python in {version_of(python): python for python in pythons}.values():
        test_tools(session, python)
    session.run(sys.executable, "benchmarks/matrix.py", *(f"--comfyui={folder}" for folder in comfyuis),
                *(f"--python={python}" for python in pythons), "--tools", str(ROOT / ".nox" / "test-tools-{version}"), *session.posargs,
                external=True)


@nox.session(venv_backend="virtualenv")  # for its pip
def release(session: nox.Session):
    """A release tried before it is published: packed, installed by comfy-cli into an empty ComfyUI, over the version before, and
    uninstalled. Nothing is uploaded. Further arguments go to benchmarks/release.py."""
    python, env = environment(session)
    if "COMFYUI_PATH" not in env:
        session.error("There is no ComfyUI to install it into: set COMFYUI_PATH.")
    session.run(python, "benchmarks/release.py", "--comfy-cli", str(comfy_cli(session)), *session.posargs, env=env, external=True)


@nox.session(venv_backend="virtualenv")
def names(session: nox.Session):
    """Looks up what the pack uses of torch's, Triton's and comfy_kitchen's internals in their releases, which are downloaded one by one
    (60 to 200 MB each), read, not run, and deleted. Other releases: nox -s names -- torch==2.9.*"""
    session.run("python", "tests/internals/releases.py", *(session.posargs or RELEASES))


@nox.session
def lint(session: nox.Session):
    """ruff and mypy; further arguments go to ruff."""
    session.install("ruff", "mypy>=2,<3")
    session.run("ruff", "check", ".", *session.posargs)
    session.run("mypy")


def test_tools(session: nox.Session, python: str) -> Path:
    """The folder of the test tools for a Python's version, installed."""
    tools = ROOT / ".nox" / f"test-tools-{version_of(python)}"
    install(session, python, ["--target", str(tools), "--upgrade", *TEST_TOOLS], tools)
    return tools


def environment(session: nox.Session) -> tuple[str, dict]:
    """(a Python that can run ComfyUI and import torch, the variables that tell the rest of the repository about both)."""
    try:
        comfyui = find_comfyui()
    except FileNotFoundError as error:
        session.error(str(error))
    if comfyui is None:
        comfyui = install_comfyui(session)
    python = own_python(session, comfyui) if comfyui else None
    if python is None:
        python = make_python(session, comfyui)
    session.log(f"ComfyUI: {comfyui or 'none'}, run by {python}")
    env = {"COMFYUI_PYTHON": python}
    if comfyui:
        env["COMFYUI_PATH"] = str(comfyui)
    return python, env


def own_python(session: nox.Session, comfyui: Path) -> str | None:
    """The Python that ComfyUI comes with, where it has torch."""
    python = find_python(comfyui)
    named = bool(os.environ.get("COMFYUI_PYTHON"))
    if not named and python == sys.executable:  # find_python's last resort
        return None
    if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0:
        return python
    if named:
        session.error(f"COMFYUI_PYTHON={python} cannot import torch: set it to the Python that runs ComfyUI, or unset it.")
    session.warn(f"{python} cannot import torch; making another environment.")
    return None


def make_python(session: nox.Session, comfyui: Path | None) -> str:
    """The Python of an environment under .nox with torch and what ComfyUI requires."""
    folder = ROOT / ".nox" / f"comfyui-{version_of(sys.executable)}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        # --clear: what is left of an environment whose base Python has gone is of no use.
        session.run(sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(folder), external=True)
    wanted = shlex.split(os.environ.get("INT8_COMPILE_TORCH") or TORCH)
    wanted += ["-r", str(comfyui / "requirements.txt")] if comfyui else WITHOUT_COMFYUI
    install(session, str(python), wanted, folder)
    return str(python)


def install(session: nox.Session, python: str, wanted: list[str], folder: Path):
    """pip install, unless the same was installed into folder before."""
    texts = [Path(after).read_text() for option, after in itertools.pairwise(wanted) if option == "-r"]
    key = hashlib.sha256("\n".join([*wanted, *texts]).encode()).hexdigest()
    marker = folder / "installed.sha256"
    if marker.exists() and marker.read_text() == key:
        return
    session.log(f"Installing into {folder}: {shlex.join(wanted)}")
    # The session's pip works on that Python: environments that uv made have none of their own.
    session.run("python", "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet", *wanted)
    marker.write_text(key)


def version_of(python: str) -> str:
    """Such as 3.12."""
    command = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", command], capture_output=True, text=True, check=True).stdout.strip()


def install_comfyui(session: nox.Session) -> Path | None:
    """ComfyUI, put with a Python of its own into comfy-cli's default workspace; None, and why, where that cannot be done."""
    if os.environ.get("CI") or os.environ.get("INT8_COMPILE_NO_INSTALL"):
        warn_without_comfyui(session, "not installed, as CI or INT8_COMPILE_NO_INSTALL is set")
        return None
    # Asked first: comfy-cli answers what goes wrong here with a page of traceback.
    if reason := unreachable(COMFYUI_GIT):
        warn_without_comfyui(session, f"and it cannot be installed: {reason}")
        return None
    session.log("There is no ComfyUI here: installing it with comfy-cli into its default workspace.")
    try:
        # comfy-cli installs into an activated environment; without one it makes .venv in the workspace.
        apart = {"VIRTUAL_ENV": None, "CONDA_PREFIX": None, "GIT_TERMINAL_PROMPT": "0", "DO_NOT_TRACK": "1"}
        session.run(str(comfy_cli(session)), "--skip-prompt", "install", hardware(), env=apart, external=True)
    except nox.command.CommandFailed:
        if find_comfyui() is None:  # it may be there, and only its packages missing, which the caller then installs
            warn_without_comfyui(session, "and installing it failed: see above")
    return find_comfyui()


def comfy_cli(session: nox.Session) -> Path:
    """comfy-cli's command, in an environment of its own: what it requires is not what ComfyUI does."""
    folder = ROOT / ".nox" / "comfy-cli"
    if not (folder / "installed.sha256").exists():
        session.run(sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(folder), external=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    install(session, str(scripts / "python"), ["comfy-cli"], folder)
    return scripts / "comfy"


def unreachable(repository: str) -> str:
    """Why git cannot clone this repository; empty if it can."""
    if shutil.which("git") is None:
        return "there is no git"
    command = ["git", "ls-remote", repository, "HEAD"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"})
    except subprocess.TimeoutExpired:
        return f"{repository} does not answer"
    return asked.stderr.strip() if asked.returncode else ""


def hardware() -> str:
    """comfy-cli's flag for the torch that this machine needs."""
    if sys.platform == "darwin":
        return "--m-series"
    return "--nvidia" if shutil.which("nvidia-smi") else "--cpu"


def warn_without_comfyui(session: nox.Session, why: str):
    line = "=" * 100
    session.warn(f"\n{line}\nComfyUI WAS NOT FOUND ({why}).\nSet COMFYUI_PATH to the folder of its main.py. Until then the demo runs "
                 f"the repository's own small model, and the tests leave out\nall that needs ComfyUI.\n{line}")
