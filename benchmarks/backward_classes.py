"""What the backward kernel is compiled for in a report: lengths of the branches, text first, and the gradients asked for."""

from collections.abc import Iterator

from ipa_kernels.kernels.launch_table import LaunchConfig
from ipa_kernels.kernels.specialization_backward import Wanted

LONG = 1000
"""A length that every config loops over."""

Class = tuple[tuple[int, ...], Wanted]


def of_images(branches: int) -> Wanted:
    """What training an adapter asks for."""
    wanted = (False, *(True,) * (branches - 1))
    return Wanted(wanted, wanted, (False,) * (branches - 1))


def everything(branches: int) -> Wanted:
    """What a LoRA on the text and trained scales ask for beside that."""
    return Wanted((True,) * branches, (True,) * branches, (True,) * (branches - 1))


def hardest(config: LaunchConfig) -> Iterator[Class]:
    """Lengths that reach every path of a config, at its limits and a key below: a tile that is not full may spill more."""
    text, image = config.whole_keys, config.whole_image_keys
    if text and image:
        yield (text, image, image, image), of_images(4)
        yield (text, image, image, image), everything(4)
        yield (text - 1, image - 1, image - 1, image - 1), everything(4)
    if image:
        yield (LONG, image, image, image), everything(4)
        yield (LONG, image - 1, image - 1, image - 1), everything(4)
    if config.max_image_keys >= LONG:
        yield (LONG, LONG, LONG), everything(3)


def used(config: LaunchConfig) -> Iterator[Class]:
    """Lengths that training has: one and three adapters, every token of a face, a LoRA on the text."""
    for lengths in ((77, 4), (77, 16, 16, 16), (256, 16), *(((77, 257),) if config.max_image_keys >= 257 else ())):
        yield lengths, of_images(len(lengths))
    yield (77, 4), everything(2)
