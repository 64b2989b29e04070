"""Cost as work grows: one row of cases for each of queries, adapters and image tokens, around SDXL's 64x64 layer."""

from dataclasses import replace

from ipa_kernels.testing.layer_cases import CASES, Case

BASE = CASES["sdxl_1024_64x64"]
QUERIES = (64, 256, 1024, 4096, 16384)
ADAPTERS = (1, 2, 3, 4, 6, 8)
TOKENS = (4, 16, 64, 257, 512, 1024)
SMALL_QUERIES = 256
"""What a CPU can run of the rows whose queries do not grow."""


def sweeps(small: bool) -> dict[str, list[tuple[int, Case]]]:
    """(x, case) for each row of x; small: two heads and fewer queries."""
    base = replace(BASE, heads=2, queries=SMALL_QUERIES) if small else BASE

    def case(name: str, x: int, **changes: object) -> tuple[int, Case]:
        return x, replace(base, name=f"{name}_{x}", **changes)  # type: ignore[arg-type]

    return {
        "queries": [case("queries", n, queries=n) for n in QUERIES if not small or n <= 4 * SMALL_QUERIES],
        "adapters of 4 tokens": [case("adapters_of_4", n, images=(4,) * n) for n in ADAPTERS],
        "adapters of 16 tokens": [case("adapters_of_16", n, images=(16,) * n) for n in ADAPTERS],
        "image tokens": [case("tokens", n, images=(n,)) for n in TOKENS if not small or n <= SMALL_QUERIES + 1],
    }
