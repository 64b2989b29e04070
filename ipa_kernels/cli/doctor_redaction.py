"""What others say (exceptions, warnings) without what is nobody's business: paths, names of user and machine, secrets."""

import contextlib
import getpass
import os
import platform
import re
import sys
import tempfile
import textwrap
from pathlib import Path

_SECRET_NAME = re.compile(r"token|key|secret|passw|auth|cred|cookie", re.IGNORECASE)
_QUOTED = re.compile(r"IPA_KERNELS_DISABLE|TRITON_INTERPRET|\w+_VISIBLE_DEVICES|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
"""Variables whose values libraries quote in warnings, whatever somebody has put there."""
_SECRETS = (
    re.compile(r"\b(?:hf|ghp|gho|ghs|github_pat|glpat|sk|pypi)[-_][\w-]{6,}"),
    re.compile(r"(?<=//)[^/\s@]+(?=@)"),
    re.compile(r"(?<=bearer )\S+", re.IGNORECASE),
    re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+"),
)
_ASSIGNED = re.compile(r"((?:token|key|secret|password|signature)=)[^\s&'\"]+", re.IGNORECASE)
_ABSOLUTE = r"(?:<path>|~|\b[A-Za-z]:(?=[\\/])|(?<![\w.:/\\<])(?=[\\/]))"
_QUOTED_PATH = re.compile(rf"(['\"]){_ABSOLUTE}[\\/](?:[^'\"\n]*[\\/])?([^'\"\n]*)\1")
_PATH = re.compile(rf"{_ABSOLUTE}[\\/](?:[^'\"<>|:;,()\[\]\\/\n]*[\\/])*([^\s'\"<>|:;,()\[\]\\/]*)")


def said(kind: type[BaseException], message: str) -> str:
    """The kind of an exception or a warning and its message, redacted, in one ASCII line of at most 300 characters."""
    text = redacted(message).encode("ascii", "backslashreplace").decode()
    return textwrap.shorten(f"{kind.__name__}: {text}", 300, placeholder=" ...")


def redacted(text: str) -> str:
    """The text with `<secret>`, `<user>`, `<host>` and `<path>` in place of them; of a path to a file its name is left.

    Values of environment variables whose names speak of a secret are one, and so is what looks like a token or an address.
    """
    hidden = {v for name, v in os.environ.items() if _SECRET_NAME.search(name) or _QUOTED.fullmatch(name)}
    for value in sorted((v for v in hidden if len(v) > 3 and v.lower() not in ("true", "false")), key=len, reverse=True):
        text = text.replace(value, "<secret>")
    for pattern in _SECRETS:
        text = pattern.sub("<secret>", text)
    text = _ASSIGNED.sub(r"\1<secret>", text)
    for root in _roots():
        text = re.sub(re.escape(root) + r"(?![\w.-])", "<path>", text, flags=re.IGNORECASE if os.name == "nt" else 0)
    text = _QUOTED_PATH.sub(lambda path: f"{path[1]}{_file(path[2])}{path[1]}", text)
    text = _PATH.sub(lambda path: _file(path[1]), text)
    for name, shown in _names().items():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", shown, text)
    return text


def _file(last: str) -> str:
    return f"<path>/{last}" if "." in last.strip(".") else "<path>"


def _roots() -> list[str]:
    """Folders that are known, the longest first: they may have spaces in them."""
    places = {sys.prefix, sys.base_prefix, tempfile.gettempdir(), str(Path(__file__).parents[2])}
    places |= {os.environ.get(name, "") for name in ("HOME", "USERPROFILE", "VIRTUAL_ENV", "CONDA_PREFIX")}
    for find in (Path.home, Path.cwd):
        try:
            places.add(str(find()))
        except (OSError, RuntimeError):  # no home, or the folder was deleted
            continue
    return sorted((place for place in places if len(place) > 3), key=len, reverse=True)


def _names() -> dict[str, str]:
    """Names of the user and of the machine, and what is shown for them."""
    users = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "HOME", "USERPROFILE")}
    with contextlib.suppress(OSError, KeyError, ImportError):  # nobody that the system knows
        users.add(getpass.getuser())
    users = {re.split(r"[\\/]", user.rstrip("\\/"))[-1] for user in users}
    hosts = {platform.node(), platform.node().split(".")[0], os.environ.get("HOSTNAME", ""), os.environ.get("COMPUTERNAME", "")}
    return {name: shown for names, shown in ((hosts, "<host>"), (users, "<user>")) for name in names if len(name) > 2}
