"""What a message to a client repeats of its input, and what it leaves out."""
from __future__ import annotations

import json
import re
from collections.abc import Sequence

MAX_CHARACTERS = 200
OF_A_PROMPT = "of_a_prompt"  # what a log record is marked with that may hold somebody's text or the name of a file: no client gets it
# A POSIX path of two parts or more, also behind a compiler's -I, a Windows path, a share. Not an address (http://...), a unit (GB/s) or
# a choice (float/int).
_PATH = re.compile(r"""(?:(?<![\w/.~-])|(?<=\s-[A-Za-z])|(?<=file://))(?:~?/(?:[^\s/'"():,;]+/)+|[A-Za-z]:[\\/](?:[^\\/'"():,;\n]+[\\/])*|"""
                   r"""\\\\(?:[^\\'"():,;\n]+\\)+)""")

# But for line ends and tabs; and what turns the order of a line's characters round, or ends it.
_UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# As inductor and Triton write it, and as subprocess does.
_COMMAND = re.compile(r"^Command:\s.*?(?=^Output:|\Z)|^Repro command:[^\n]*|(?<=Command )'.{,8000}?'(?= (?:returned|died|timed out))",
                      re.DOTALL | re.MULTILINE)
_MAX_OUTPUT = 20_000  # characters of a compiler's that are looked at


def echo(value, limit: int = MAX_CHARACTERS) -> str:
    """value as a message may repeat it: text as it is, anything else as JSON; control characters escaped, limit characters at most."""
    if not isinstance(value, str):
        try:
            # A long container is not written out to be cut off.
            value = json.dumps(value) if not isinstance(value, (list, tuple, dict)) or len(value) <= limit else f"a {type(value).__name__}"
        except (TypeError, ValueError, RecursionError):
            value = f"a {type(value).__name__}"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in value[:limit + 1])
    return text if len(text) <= limit else f"{text[:limit - 3]}..."


def writable(text: str, lines: bool = True) -> str:
    """text as any console can show it: what UTF-8 cannot write (halves of surrogate pairs) and control characters are escaped. lines: but
    for line ends."""
    text = _UNWRITABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
    return text if lines else text.replace("\n", "\\n")


def without_commands(text: str) -> str:
    """The beginning of text, without compilers' command lines."""
    return _COMMAND.sub("", text[:_MAX_OUTPUT])


def without_folders(text: str, known: Sequence[str] = ()) -> str:
    """text with absolute paths reduced to their last part: where things are on the server is not a client's business. known: folders
    whose names may have spaces."""
    for folder in known:  # as a path that the pattern sees the whole of
        name = re.split(r"[/\\]", folder)[-1]
        text = text.replace(folder, f"/./{name.replace(' ', '_')}")
    return _PATH.sub("", text)
