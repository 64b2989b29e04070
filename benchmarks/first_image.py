"""Time to the first image: from a pipeline in memory to its latents, with empty compiler caches (cold) and full ones (warm).

    python -m benchmarks.first_image [--device cuda] [--ways stock enabled prepared graphed compiled] [--json FILE]

Each way is a process of its own, twice in turn on caches of its own: Triton's and Inductor's. "first" is what a user waits for
once: the first generation, with `prepare`, `graphed` or the compilation before it; "second" is the generation after that. The
pipeline is a small one with random weights and SD-like layers: on a GPU the time is that of compilers and launches, hardly of
arithmetic. That enabled and stock give the same picture is checked in each process (`ipa_kernels.benchmarking.first_image`).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from ipa_kernels.benchmarking.first_image import WAYS, Job, in_process
from ipa_kernels.benchmarking.machine import machine_facts

STEPS = 4


def main() -> int:
    """Print a line per way; 1 if one gave another picture or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path, help="write facts about the machine and every number")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    facts = machine_facts(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    rows = []
    for way in arguments.ways:
        job = Job(way, "tiny", STEPS, "float16" if device.type == "cuda" else "float32", arguments.device)
        with tempfile.TemporaryDirectory() as folder:
            for caches in ("cold", "warm"):
                row = {"way": way, "caches": caches, **in_process(job, Path(folder))}
                rows.append(row)
                seconds = f"first {row['first']:7.2f} s, second {row['second']:7.3f} s" if "first" in row else row["reason"]
                print(f"{way:9} {caches:5} {seconds}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"benchmark": "first_image", "machine": facts, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
