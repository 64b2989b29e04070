"""Code in an interpreter of its own, where chosen packages are not installed."""

import os
import subprocess
import sys
import textwrap

# As where they are not installed: a package may also ask whether another one could be imported.
BLOCK = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name.split(".")[0] in {blocked!r} else find(name, *where)
import torch
"""


def run(code: str, *blocked: str) -> str:
    source = BLOCK.format(blocked=blocked) + textwrap.dedent(code)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
