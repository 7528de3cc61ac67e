"""Says which bundles of compiled code Load Compile Cache may load on this machine. As the user that runs ComfyUI, with its environment:

    cd ComfyUI/custom_nodes/int8-compile && python -m trust FILE-or-DIGEST     trust that bundle
    cd ComfyUI/custom_nodes/int8-compile && python -m trust --remove DIGEST    no longer
    cd ComfyUI/custom_nodes/int8-compile && python -m trust                    which are trusted

Needs neither ComfyUI nor torch. A bundle is code that will run with your rights.
"""
from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).absolute().parent
PACKAGE = "int8_compile"  # whatever the folder is called


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trust", description="Which bundles of compiled code may be loaded on this machine.")
    parser.add_argument("bundle", nargs="?", metavar="FILE-or-DIGEST", help="a bundle that you trust, or the whole digest that Save "
                        "Compile Cache showed for it; nothing: print the list")
    parser.add_argument("--remove", action="store_true", help="trust it no longer")
    options = parser.parse_args(arguments)
    _load_pack()
    from int8_compile.compile.artifacts import trusted_bundles
    from int8_compile.compile.artifacts.bundle import read_bundle
    from int8_compile.compile.artifacts.store import CacheError

    try:
        if options.bundle is None:
            for digest, note in trusted_bundles.trusted().items():
                sys.stdout.write(f"{digest}  {note}\n")
            return 0
        digest, note = options.bundle.strip().lower(), ""
        if not trusted_bundles.is_digest(digest):
            path = Path(options.bundle)
            if options.remove:  # of any content
                digest = trusted_bundles.digest_of(path)
            else:
                with (found := read_bundle(path, Path(tempfile.gettempdir()))).copy:
                    digest, note = found.digest, path.name
                    sys.stdout.write(f"{found.contents()}\n")
        written = trusted_bundles.set_trusted(digest, note, not options.remove)
    except (CacheError, OSError, ValueError) as error:
        sys.stderr.write(f"trust: {error}\n")
        return 1
    sys.stdout.write(f"{digest} is {'no longer ' if options.remove else ''}trusted, says {written}\n")
    return 0


def _load_pack():
    # Beside this file are folders nodes and compile, which must not hide modules of those names.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").absolute() != ROOT]
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[PACKAGE] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    sys.exit(main())
