"""Reproducible data loading with any timm reader; unreadable images are never replaced silently.

1. A training image is a pure function of (seed, epoch, index): the sampler yields (epoch, index) and the worker seeds
   its RNGs with them, so results are independent of the number of workers and of restarts.
2. The order is a permutation seeded with (seed, epoch) and dealt round-robin to the processes; a run can start at any
   batch. Evaluation deals images in order without padding: each counts once, on any number of processes.
3. An unreadable image passes through the loader as a ``Broken`` record and is counted in the main process.

Iterable readers (WebDataset, TFDS, streaming Hugging Face) have their own order and cannot seek.
"""

from __future__ import annotations

import argparse
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from classification.runtime import World
from elfatt.data import UserError, check_shape, read_image, standard_image
from elfatt.processes import start_worker
from elfatt.randomness import seeded

LOGGER = logging.getLogger("classification")
IMAGE_MODES = {3: "RGB", 1: "L"}  # by the model's input channels


@dataclass(frozen=True)
class Broken:
    """An unreadable image."""

    path: str
    reason: str


class BrokenImages:
    """Count the distinct unreadable images of this process and stop the run above a limit.

    Args:
        limit: Maximum number to skip.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.paths: set[str] = set()

    def report(self, images: list[Broken]) -> None:
        """Log each new broken image.

        Raises:
            UserError: More than ``limit`` so far.
        """
        for image in images:
            if image.path in self.paths:
                continue
            self.paths.add(image.path)
            if len(self.paths) > self.limit:
                already = f" after {self.limit} others" if self.limit else ""
                raise UserError(
                    f"image {image.path} cannot be read{already} ({image.reason}); "
                    f"repair or remove it, or skip up to N such images with --max-broken-images N"
                )
            LOGGER.warning("skipped broken image %d: %s (%s)", len(self.paths), image.path, image.reason)


class Samples(Dataset):
    """Map-style dataset whose items are pure functions of (seed, epoch, index).

    Args:
        dataset: timm or torchvision dataset without a transform.
        transform: Image to array or tensor.
        seed: Run seed.
        mode: Image mode: RGB, or L for greyscale.
    """

    def __init__(self, dataset: Dataset, transform: Callable, seed: int, mode: str = "RGB") -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.mode = mode

    def __len__(self) -> int:
        return len(self.dataset)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if hasattr(self.dataset, "reader"):  # timm's dataset[index] replaces unreadable images
            file, label = self.dataset.reader[index]
            with file:
                return read_image(file, self.mode), label
        if samples := getattr(self.dataset, "samples", None):  # torchvision's own loader clips 16-bit images
            path, label = samples[index]
            return read_image(path, self.mode), label
        image, label = self.dataset[index]
        return standard_image(image, self.mode), label

    def _name(self, index: int) -> str:
        try:
            return str(self.dataset.filename(index, absolute=True))
        except AttributeError:  # torchvision
            samples = getattr(self.dataset, "samples", None)
            return str(samples[index][0]) if samples else f"number {index}"

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int] | Broken:
        epoch, index = key
        try:
            image, label = self._read(index)
            check_shape("it", image.size)
        except Exception as error:  # Pillow raises almost anything on a broken file
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            return Broken(self._name(index), f"{kind}{error}")
        with seeded(self.seed, epoch, index):
            return self.transform(image), label


class StreamTransform:
    """Transform for iterable readers that turns bad images into ``Broken`` records.

    Args:
        transform: Image to array or tensor.
        mode: Image mode: RGB, or L for greyscale.
    """

    def __init__(self, transform: Callable, mode: str) -> None:
        self.transform = transform
        self.mode = mode

    def __call__(self, image: Image.Image) -> Any:
        """Transform the image, or return it as ``Broken``."""
        try:
            return self.transform(standard_image(image, self.mode))
        except (OSError, SyntaxError, ValueError) as error:
            return Broken(f"{zlib.crc32(image.tobytes()):08x} (CRC-32) of the stream", str(error))


class EpochSampler(Sampler[tuple[int, int]]):
    """Sampler of this process's (epoch, index) pairs; can start at any sample.

    Args:
        num_images: Size of the dataset.
        world: This process.
        seed: Seed of the permutations; None for sequential order (evaluation).
        multiple: Truncate epochs to a multiple of this (the images per update over all processes).
    """

    def __init__(self, num_images: int, world: World, seed: int | None = None, multiple: int = 1) -> None:
        self.num_images = num_images
        self.world = world
        self.seed = seed
        self.total = num_images // multiple * multiple
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.seed is None:
            order = range(self.num_images)
        else:
            seed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
            order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(seed)).tolist()
        mine = order[self.world.rank : self.total : self.world.size]
        return ((self.epoch, index) for index in mine[self.start :])

    def __len__(self) -> int:
        return len(range(self.world.rank, self.total, self.world.size)) - self.start


class Collate:
    """Collate function that stacks readable samples and lists the broken ones.

    Args:
        stack: Collate function for the readable samples.
        even: Drop one readable sample if their number is odd (timm's Mixup needs pairs).
    """

    def __init__(self, stack: Callable, even: bool) -> None:
        self.stack = stack
        self.even = even

    def __call__(self, batch: list) -> tuple[Tensor | None, Tensor | None, list[Broken]]:
        """Return images and labels (None if all samples are broken) and the broken samples."""
        batch = [
            sample[0] if isinstance(sample, tuple) and isinstance(sample[0], Broken) else sample for sample in batch
        ]
        broken = [sample for sample in batch if isinstance(sample, Broken)]
        good = [sample for sample in batch if not isinstance(sample, Broken)]
        if self.even and len(good) % 2:
            good.pop()
        images, labels = self.stack(good) if good else (None, None)
        return images, labels, broken


class _Checked:
    """Yield a DataLoader's (images, labels), reporting broken images."""

    def __init__(self, loader: DataLoader, broken: BrokenImages, train: bool) -> None:
        self.loader = loader
        self.broken = broken
        self.train = train

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, broken in self.loader:
            self.broken.report(broken)
            if images is not None:
                yield images, labels
            elif self.train:
                raise UserError(f"all {len(broken)} images of a batch are unreadable, the last: {broken[-1].path}")


class Loader:
    """Loader of normalised images ``[B, 3 or 1, H, W]`` and labels ``[B]`` on the device.

    Args:
        dataset: Dataset from ``splits.open_split``.
        args: Parsed options.
        config: timm's data config of the model.
        world: This process.
        broken: Counter of unreadable images.
        train: Shuffle, augment and drop the incomplete last update; otherwise load every image once, in order.

    Raises:
        UserError: The training split is smaller than one update.
    """

    def __init__(
        self,
        dataset: Dataset,
        args: argparse.Namespace,
        config: dict[str, Any],
        world: World,
        broken: BrokenImages,
        train: bool,
    ) -> None:
        on_gpu = world.device.type == "cuda"
        batch_size = args.batch_size if train else getattr(args, "validation_batch_size", None) or args.batch_size
        self.world, self.batch_size = world, batch_size
        self.accum = args.grad_accum_steps if train else 1
        self.seed = args.seed if train else 0
        self.seekable = not isinstance(dataset, IterableDataset)
        transform = _checked_transform(args, config, train, on_gpu)
        mode = IMAGE_MODES[len(config["mean"])]
        collate = Collate(fast_collate if on_gpu else default_collate, train and bool(args.mixup or args.cutmix))
        self.generator = torch.Generator()  # seeds the workers independently of the global RNG
        common = {
            "batch_size": batch_size,
            "num_workers": args.workers,
            "collate_fn": collate,
            "pin_memory": on_gpu,
            "generator": self.generator,
            "worker_init_fn": partial(start_worker, None),
        }
        if self.seekable:
            multiple = batch_size * world.size * self.accum if train else 1
            if train and len(dataset) < multiple:
                raise UserError(
                    f"the training split has {len(dataset)} images, fewer than one update of {batch_size} images × "
                    f"{world.size} processes × {self.accum} accumulation steps: lower --batch-size"
                )
            self.sampler = EpochSampler(len(dataset), world, self.seed if train else None, multiple)
            samples = Samples(dataset, transform, self.seed, mode)
            loader = DataLoader(
                samples, sampler=self.sampler, drop_last=train, persistent_workers=train and args.workers > 0, **common
            )
        else:
            self.dataset = dataset
            dataset.transform = StreamTransform(transform, mode)
            dataset.set_loader_cfg(num_workers=args.workers)
            loader = DataLoader(dataset, drop_last=train, **common)
        self.loader: Any = _Checked(loader, broken, train)
        if on_gpu:
            channels = len(config["mean"])
            self.loader = PrefetchLoader(self.loader, config["mean"], config["std"], channels, device=world.device)

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Set the epoch, and the batch of this process, that the next iteration starts at."""
        seed = int(np.random.SeedSequence((self.seed, epoch, self.world.rank)).generate_state(1)[0])
        self.generator.manual_seed(seed)
        if self.seekable:
            self.sampler.epoch, self.sampler.start = epoch, batch * self.batch_size
        else:
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the batches of a full epoch, whatever was sought; in training a multiple of the accumulation steps."""
        if not self.seekable:
            return len(self.loader) // self.accum * self.accum
        return -(-(len(self.sampler) + self.sampler.start) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)


def _checked_transform(args: argparse.Namespace, *rest: Any) -> Callable:
    try:
        return _transform(args, *rest)
    except (AssertionError, KeyError, TypeError, ValueError) as error:  # timm asserts the syntax of policies
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot build the transform with --aa {args.aa}: {reason}") from error


def _transform(args: argparse.Namespace, config: dict[str, Any], train: bool, on_gpu: bool) -> Callable:
    shared = {"input_size": config["input_size"], "mean": config["mean"], "std": config["std"]}
    if not train:
        return create_transform(
            **shared,
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            use_prefetcher=on_gpu,
        )
    return create_transform(  # train.py erases on the device, as it needs normalised batches
        **shared,
        is_training=True,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        use_prefetcher=on_gpu,
    )


def data_config(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Return timm's data config of a model (input size, mean, std, crop, interpolation) with the options applied.

    Raises:
        UserError: The model takes neither RGB nor greyscale images.
    """
    names = ("img_size", "crop_pct", "crop_mode", "interpolation")
    config = resolve_data_config({name: getattr(args, name) for name in names}, model=model)
    channels = args.model_kwargs.get("in_chans", 3)
    if channels not in IMAGE_MODES:
        raise UserError(f"in_chans={channels}: images are read as RGB (3 channels) or greyscale (1)")
    if channels == 1:
        config["input_size"] = (1, *config["input_size"][1:])
        config |= {name: (sum(config[name]) / len(config[name]),) for name in ("mean", "std")}
    return config
