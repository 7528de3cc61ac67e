"""All that is to be known on a GPU, in steps that run singly: right first, then fast. One JSON, which every run adds to.

    python benchmarks/gpu_suite.py [--steps kernels,linear] [--comfyui PATH] [--out FILE.json]     on a machine with an NVIDIA GPU
    python benchmarks/gpu_suite.py --dry-run [--comfyui PATH]     anywhere: tiny models, Triton's interpreter, no measurement
    python benchmarks/gpu_suite.py --report FILE.json     a table in Markdown, and FILE.png (needs matplotlib)

Each step is a process of its own with a time limit below 8 minutes; what it found until then is kept. benchmarks/gpu/README.md says
which steps to run in which order on a machine that is lent for half an hour.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import find_comfyui, find_python  # noqa: E402
from benchmarks.demo_report import cpu_name  # noqa: E402
from benchmarks.gpu.context import Context  # noqa: E402

# step -> (module of benchmarks.gpu, its function, seconds it may take, whether it needs ComfyUI); by value, correctness first.
STEPS = {
    "first": ("first", "run", 120, False),
    "ceilings": ("first", "ceilings", 200, False),
    "kernels": ("kernels", "run", 300, False),
    "memcheck": ("kernels", "memcheck", 300, False),
    "tests": ("tests", "run", 420, False),
    "tune": ("tune", "run", 300, False),
    "linear": ("linear", "run", 300, False),
    "profile": ("together", "profile", 300, True),
    "dynamic": ("together", "dynamic", 460, True),
    "full": ("together", "full", 400, True),
    "flux": ("comfyui", "flux", 460, True),
    "flux_full": ("comfyui", "flux_full", 470, True),
    "soak": ("soak", "run", 300, True),
    "modes": ("comfyui", "modes", 420, True),
    "memory": ("comfyui", "memory", 420, True),
    "wan": ("comfyui", "wan", 420, True),
    "sdxl": ("comfyui", "sdxl", 420, True),
    "aot": ("tests", "ahead_of_time", 420, False),
}
GROUPS = {"comfyui": ("flux", "flux_full", "memory", "wan", "sdxl"), "all": tuple(STEPS)}
DRY_LIMIT = 470
GRACE = 20  # seconds between a step's deadline, which it knows, and its end
FACTS = """
import importlib.metadata as m, json, torch
cuda = torch.cuda.is_available()
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
p = torch.cuda.get_device_properties(0) if cuda else None
print(json.dumps({"gpu": p.name if cuda else None, "capability": [p.major, p.minor] if cuda else None,
    "memory_gb": round(p.total_memory / 2**30, 1) if cuda else None, "multiprocessors": p.multi_processor_count if cuda else None,
    "torch": torch.__version__, "cuda": torch.version.cuda,
    **{n: version(n) for n in ("triton", "comfy-kitchen", "comfy-aimdo", "torchao")}}))
"""


def facts(python: str, dry: bool) -> dict:
    """Of the machine and the pack. A process of its own asks torch: this one takes no GPU memory."""
    asked = subprocess.run([python, "-c", FACTS], capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"{asked.stderr}{python} cannot import torch: run this with the Python that runs ComfyUI, or set COMFYUI_PYTHON.")
    found = json.loads(asked.stdout.splitlines()[-1])
    if dry and not found["gpu"]:
        found["note"] = "dry run on a CPU: tiny models, few repetitions. Times are no measurement."
    found |= {"device": found["gpu"] or "cpu", "processor": cpu_name(), "python": sys.version.split()[0], "driver": driver(),
              "commit": commit(), "dry_run": dry}
    return found


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return asked.stdout.strip().partition("\n")[0] or None


def commit() -> str:
    """The pack's commit; of a checkout or a machine without git a hash of its sources."""
    if shutil.which("git"):
        asked = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
        if asked.returncode == 0:
            return asked.stdout.strip()
    hashed = hashlib.sha256()
    for path in sorted(path for folder in ("int8", "compile", "nodes") for path in (ROOT / folder).rglob("*.py")):
        hashed.update(path.read_bytes())
    return f"sources {hashed.hexdigest()[:12]}"


def run_step(name: str, python: str, context: Context, limit: float, found: dict) -> dict:
    """Runs it in a process of its own: -> its entry in the JSON."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONPATH=path)
    if context.device == "cuda":
        environment.pop("TRITON_INTERPRET", None)
    else:
        environment["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    entry = {"status": "ok", "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "facts": found, "rows": []}
    start = time.monotonic()
    log = context.work / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen([python, __file__, "--run-step", name, "--context", context.to_json()], env=environment, cwd=ROOT,
                                   stdout=output, stderr=subprocess.STDOUT, start_new_session=os.name == "posix")
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            entry |= {"status": "timeout", "error": f"stopped after {limit:.0f} s; what it had found is in rows"}
            code = None
        finally:
            end(process)
    entry["seconds"] = round(time.monotonic() - start, 1)
    if context.rows.exists():
        for line in context.rows.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a process that was killed
                entry["rows"].append(json.loads(line))
    if code:
        entry |= {"status": "failed", "error": "\n".join(log.read_text(errors="replace").splitlines()[-25:])}
    elif any(row.get("ok") is False for row in entry["rows"]) and entry["status"] == "ok":
        entry |= {"status": "failed", "error": "rows with ok = false"}
    return entry


def end(process: subprocess.Popen) -> None:
    """The step and what it started in its process group. (A server has a group of its own and ends with its step: see comfyui.py.)"""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def add_to(path: Path, found: dict, name: str, entry: dict) -> None:
    """Puts the entry of a step into the JSON, in the place of an earlier one."""
    whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"facts": found, "steps": {}}
    whole["steps"][name] = entry
    whole["steps"] = {step: whole["steps"][step] for step in STEPS if step in whole["steps"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def work_folder() -> Path:
    """Models of 24 GB are made here: in memory where there is enough of it."""
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free if shared.is_dir() else 0
    return Path(tempfile.mkdtemp(prefix="gpu_suite_", dir=shared if room > 48 << 30 else None))


def selected(text: str) -> list[str]:
    names = []
    for name in filter(None, text.split(",")):
        if name not in (*STEPS, *GROUPS):
            sys.exit(f"There is no step {name}: choose from {', '.join((*STEPS, *GROUPS))}.")
        names += GROUPS.get(name, (name,))
    return list(dict.fromkeys(names))


def child(name: str, context: Context) -> int:
    """Runs a step in this process."""
    module, function, _, _ = STEPS[name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))  # servers are stopped on the way out
    try:
        getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(context)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="all", help=f"some of {', '.join((*STEPS, *GROUPS))}, with commas between")
    parser.add_argument("--comfyui", type=Path, help="folder of ComfyUI's main.py")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--cheap", action="store_true", help="of a dry run what takes seconds")
    parser.add_argument("--work", type=Path, help="folder for models and caches, kept; otherwise a temporary one")
    parser.add_argument("--report", type=Path, metavar="FILE.json")
    parser.add_argument("--run-step", help=argparse.SUPPRESS)
    parser.add_argument("--context", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_step:
        return child(options.run_step, Context.from_json(options.context))
    if options.report:
        from benchmarks.gpu.report import write
        print(write(options.report))
        return 0
    names = selected(options.steps)
    comfyui = options.comfyui or find_comfyui()
    python = find_python(comfyui) if comfyui else sys.executable
    found = facts(python, options.dry_run)
    if not found["gpu"] and not options.dry_run:
        sys.exit("torch sees no GPU here. --dry-run runs all steps with tiny models on the CPU.")
    day = datetime.date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    out = (options.out or ROOT / "benchmarks" / "results" / f"{slug}{'-dry-run' * options.dry_run}-{day}.json").absolute()
    work = options.work.absolute() if options.work else work_folder()
    work.mkdir(parents=True, exist_ok=True)
    statuses = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the step on the way out
    try:
        for name in names:
            needs_comfyui, limit = STEPS[name][3], DRY_LIMIT if options.dry_run else STEPS[name][2]
            print(f"{name} ...", flush=True)
            if needs_comfyui and comfyui is None:
                entry = {"status": "skipped", "error": "no ComfyUI: give --comfyui", "rows": []}
            else:
                rows = work / f"{name}.jsonl"
                rows.unlink(missing_ok=True)
                tables = work / "tables" if options.dry_run else ROOT / "int8" / "kernels" / "tables"
                context = Context("cuda" if found["gpu"] else "cpu", options.dry_run, options.cheap, comfyui and comfyui.absolute(), work,
                                  rows, time.time() + limit - GRACE, tables)
                entry = run_step(name, python, context, limit, found)
            add_to(out, found, name, entry)
            statuses[name] = entry["status"]
            print(f"  {entry['status']}, {len(entry['rows'])} rows, {entry.get('seconds', 0):.0f} s", flush=True)
            if entry["status"] in ("failed", "timeout"):
                print("  " + entry["error"].replace("\n", "\n  "), flush=True)
                if name == "first":
                    print("A layer is wrong or does not run: nothing else is worth its time.", flush=True)
                    break
    finally:
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{out}: " + ", ".join(f"{name} {status}" for name, status in statuses.items()))
    return 0 if all(status == "ok" for status in statuses.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
