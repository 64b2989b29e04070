"""Pictures with captions, and everything random about an example, as a function of the seed and of the example's number.

The examples of a run are numbered: number n is the (n mod batch size)-th of step n // batch size. Which picture it is, its
crop, its noise, its timestep and what it goes without follow from (seed, n) alone. So a batch is the same however many
processes share it, and a run that is resumed needs no state of random generators.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .arguments import UsageError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Records(Protocol):
    """Pictures with captions, in an order that is always the same."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[Image.Image, str]: ...

    @property
    def fingerprint(self) -> str:
        """Changes with names, captions and sizes."""


@dataclass(frozen=True)
class Folder:
    """Picture files and their captions."""

    paths: Sequence[Path]
    captions: Sequence[str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        return read_picture(self.paths[i]), self.captions[i]


def read_folder(folder: Path, smallest: int) -> Folder:
    """The pictures of a folder, all of which have captions and at least `smallest` pixels on each side. Raises UsageError."""
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: no such folder")
    captions = _metadata(folder) if (folder / "metadata.jsonl").is_file() else _text_files(folder)
    if not captions:
        raise UsageError(f"--data {folder}: no pictures in it ({', '.join(sorted(PICTURES))})")
    digest = hashlib.sha256()
    small = []
    for path, caption in captions.items():
        size = _size(path)
        digest.update(json.dumps([path.relative_to(folder).as_posix(), caption, size, path.stat().st_size]).encode())
        if min(size) < smallest:
            small.append(path)
    if small:
        advice = "make them larger, leave them out or lower --resolution"
        raise UsageError(f"--data {folder}: {_some(small)} smaller than --resolution {smallest}: {advice}")
    return Folder(list(captions), list(captions.values()), digest.hexdigest())


def _metadata(folder: Path) -> dict[Path, str]:
    """The captions of metadata.jsonl: a line {"file_name": ..., "text": ...} for each picture."""
    captions = {}
    file = folder / "metadata.jsonl"
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path, captions_of = folder / entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f'{file}, line {number}: expected {{"file_name": ..., "text": ...}}') from error
        if not isinstance(captions_of, str):
            raise UsageError(f"{file}, line {number}: text is no string")
        captions[path] = captions_of
    missing = [path for path in captions if not path.is_file()]
    if missing:
        raise UsageError(f"{file}: {_some(missing)} not there")
    return captions


def _text_files(folder: Path) -> dict[Path, str]:
    """The captions of text files beside the pictures."""
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    missing = [path for path in pictures if not path.with_suffix(".txt").is_file()]
    if missing:
        advice = "each needs a .txt file of its name, or the folder a metadata.jsonl"
        raise UsageError(f"--data {folder}: {_some(missing)} without a caption: {advice}")
    return {path: path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in pictures}


class HubDataset:
    """A split of `datasets` with a column of pictures and one of captions."""

    def __init__(self, name: str, image_column: str, caption_column: str, smallest: int) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UsageError("--dataset needs the package datasets: pip install datasets") from error
        try:
            # what `save_to_disk` wrote is no folder that `load_dataset` reads
            saved = any((Path(name) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))
            loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
        except Exception as error:  # of files, of the hub, of builders, each with errors of its own
            raise UsageError(f"--dataset {name}: {error}") from error
        self.rows = loaded["train"] if isinstance(loaded, dict) else loaded
        self.columns = image_column, caption_column
        self.smallest = smallest
        missing = [column for column in self.columns if column not in self.rows.column_names]
        if missing:
            raise UsageError(f"--dataset {name}: no column {missing[0]!r}; it has {', '.join(self.rows.column_names)}")
        if not len(self.rows):
            raise UsageError(f"--dataset {name}: no rows in it")
        self.fingerprint = self.rows._fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        image, caption = (self.rows[i][column] for column in self.columns)
        if not isinstance(image, Image.Image) or not isinstance(caption, str):
            raise UsageError(f"row {i} of --dataset: expected a picture and a string, got {type(image)} and {type(caption)}")
        if min(image.size) < self.smallest:
            raise UsageError(f"row {i} of --dataset: {image.size[0]} by {image.size[1]} is below --resolution {self.smallest}")
        return _upright(image), caption


def read_picture(path: Path) -> Image.Image:
    """As it is meant to be seen, in RGB. Raises UsageError."""
    try:
        with Image.open(path) as image:
            return _upright(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: no picture that can be read: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image).convert("RGB")


def _size(path: Path) -> tuple[int, int]:
    """Width and height, from the header alone."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: no picture that can be read: {error}") from error


def _some(paths: Sequence[Path]) -> str:
    """The number of paths and the first of them."""
    names = ", ".join(path.name for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
    return f"{len(paths)} picture{'s' * (len(paths) > 1)} ({names})"


def generator(*key: object) -> torch.Generator:
    """A generator on the CPU, so that its numbers do not depend on the device, for a key of numbers and strings."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@functools.lru_cache(maxsize=4)
def _epoch(seed: str, epoch: int, length: int) -> list[int]:
    order: list[int] = torch.randperm(length, generator=generator(seed, "order", epoch)).tolist()
    return order


@dataclass(frozen=True)
class Recipe:
    """How an example is made of a picture and a caption.

    drops: the shares that go without image, without text, without either; to_embedder: from a picture to what the image
    encoder reads; stream: names the random numbers, so that validation has others than training.
    """

    seed: int
    resolution: int
    latent_shape: tuple[int, int, int]
    timesteps: int
    to_embedder: Any
    drops: tuple[float, float, float] = (0.0, 0.0, 0.0)
    random_crop: bool = False
    random_flip: bool = False
    stream: str = "training"


class Examples(Dataset[dict[str, Any]]):
    """Example number n, for any n."""

    def __init__(self, records: Records, recipe: Recipe) -> None:
        self.records = records
        self.recipe = recipe

    def __getitem__(self, n: int) -> dict[str, Any]:
        recipe = self.recipe
        key = f"{recipe.seed}/{recipe.stream}"
        epoch, place = divmod(n, len(self.records))
        image, caption = self.records[_epoch(key, epoch, len(self.records))[place]]
        random = generator(key, n)
        timestep = torch.randint(recipe.timesteps, (), generator=random)
        noise = torch.randn(recipe.latent_shape, generator=random)
        posterior = torch.randn(recipe.latent_shape, generator=random)
        drop, left, top, flip = torch.rand(4, generator=random).tolist()
        image_only, text_only, both = accumulate(recipe.drops)
        drop_image = drop < image_only or text_only <= drop < both
        drop_text = image_only <= drop < both
        pixels, time_ids = _crop(
            image,
            recipe.resolution,
            (left, top) if recipe.random_crop else (0.5, 0.5),
            recipe.random_flip and flip < 0.5,
        )
        return {
            "pixels": pixels,
            "time_ids": time_ids,
            "embedder_pixels": recipe.to_embedder(images=image, return_tensors="pt").pixel_values[0],
            "caption": caption,
            "drop_image": drop_image,
            "drop_text": drop_text,
            "timestep": timestep,
            "noise": noise,
            "posterior": posterior,
        }


def _crop(image: Image.Image, side: int, place: tuple[float, float], flip: bool) -> tuple[Tensor, Tensor]:
    """[3, side, side] in -1..1, and the six numbers about size and crop that SDXL is told."""
    scale = side / min(image.size)
    width, height = (max(side, round(scale * length)) for length in image.size)
    left, top = round(place[0] * (width - side)), round(place[1] * (height - side))
    resized = image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))
    if flip:
        resized = ImageOps.mirror(resized)
        left = width - side - left
    flat = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    pixels = flat.view(side, side, 3).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, torch.tensor([image.height, image.width, top, left, side, side], dtype=torch.float32)


@dataclass(frozen=True)
class ShareOfBatches(Sampler[list[int]]):
    """The numbers of the examples that one process takes at once, from step `start` to `stop`.

    The parts of a step follow each other in the order of accumulation, then of processes: together they are the step's
    batch, whatever their size.
    """

    start: int
    stop: int
    batch_size: int
    share: int
    processes: int = 1
    process: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        width = self.share * self.processes
        for first in range(self.start * self.batch_size, self.stop * self.batch_size, width):
            mine = first + self.process * self.share
            yield list(range(mine, mine + self.share))

    def __len__(self) -> int:
        return (self.stop - self.start) * self.batch_size // (self.share * self.processes)
