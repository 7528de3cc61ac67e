"""INT8 Compile Check from the command line, with the Python that runs ComfyUI:

    python ComfyUI/custom_nodes/int8-compile/check.py [--full | --width 3072 --tokens 4608] [--json FILE] [--plot FILE] [--device cpu]
    cd ComfyUI/custom_nodes/int8-compile && python -m check

COMFYUI_PATH: ComfyUI's folder, where this folder is not in its custom_nodes.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parent
PACKAGE = "int8_compile"  # whatever the folder is called


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="check.py", description="What INT8 and torch.compile can do on this machine.")
    parser.add_argument("--full", action="store_true", help="twelve layers instead of four, and a block, compiled: a minute or two")
    parser.add_argument("--width", type=int, metavar="CHANNELS", help="instead: the layers of a transformer block this wide, and that "
                        "block, compiled")
    parser.add_argument("--tokens", type=int, default=1024, help="of that block (1024)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the picture there (PNG; needs matplotlib)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: although there is a GPU")
    options = parser.parse_args(arguments)
    _load_pack()
    from int8_compile.compile.check.linear_table import sizes, sizes_of
    from int8_compile.compile.check.plot import plot, require_matplotlib

    try:
        if options.plot:
            require_matplotlib()
        chosen = sizes_of(options.width, options.tokens) if options.width else None
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    result = _run(lambda device: chosen or sizes("full" if options.full else "quick", device), options.device == "cpu")
    sys.stdout.write(result.text() + "\n")
    if options.json:
        options.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    if options.plot:
        from PIL import Image

        Image.fromarray((plot(result) * 255).byte().numpy()).save(options.plot, format="PNG")
    return 0


def _load_pack():
    # Beside this file are folders nodes and compile, which must not hide modules of those names.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").absolute() != ROOT]
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[PACKAGE] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _run(sizes, cpu: bool):
    """sizes(device): what to measure there."""
    import torch
    from int8_compile.compile.check.facts import WARNING, Fact
    from int8_compile.compile.check.machine import check

    shown = -1

    def tick(done: int, total: int):
        nonlocal shown
        if done != shown:
            shown = done
            sys.stderr.write(f"measuring: {done} of {total}\n")
    # torch.accelerator is of torch 2.6.
    found = None if cpu or not hasattr(torch, "accelerator") else torch.accelerator.current_accelerator(check_available=True)
    device = torch.device(found.type if found else "cpu")
    comfyui = _find_comfyui()
    if comfyui is None:
        fact = Fact("ComfyUI", "not found", WARNING, "Set COMFYUI_PATH to its folder to have it checked too.")
        return check(device, sizes(device), [fact], tick=tick)
    sys.path.insert(0, str(comfyui))
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = device.type == "cpu"
        from int8_compile.compile.comfyui.machine_check import run_check
    except Exception as error:  # any that ComfyUI raises at import: the machine can be checked without it
        fact = Fact("ComfyUI", f"{comfyui} cannot be imported: {type(error).__name__}: {error}", WARNING,
                    "Run this with the Python that runs ComfyUI.")
        return check(device, sizes(device), [fact], tick=tick)
    return run_check(sizes, tick=tick)


def _find_comfyui() -> Path | None:
    """COMFYUI_PATH, or the folder above the custom_nodes that this folder is in."""
    chosen = os.environ.get("COMFYUI_PATH")
    folder = Path(chosen) if chosen else ROOT.parent.parent
    return folder.absolute() if (folder / "main.py").exists() and (folder / "comfy").is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
