"""How far a command is: a bar of tqdm, which comes with diffusers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields what to call, with its name, before each of `total` pieces of work.

    Nothing is shown where stderr is no terminal, and with torch alone, where there is no tqdm.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield lambda name: None
        return
    with tqdm(total=total, leave=False, disable=None, dynamic_ncols=True) as bar:

        def step(name: str) -> None:
            bar.update()
            bar.set_postfix_str(name)

        yield step
