"""Opens a data set's splits through timm's readers, and refuses what would train on wrong labels."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from timm.data import create_dataset
from torch.utils.data import Dataset

from classification.config import UserError

SYNONYMS = [("train", "training"), ("val", "valid", "validation", "eval", "evaluation")]  # as timm searches


def open_split(args: argparse.Namespace, train: bool, num_classes: int) -> Dataset:
    """Opens the training or the validation split through timm's readers, and checks what is in it.

    Args:
        args: Parsed options.
        train: The training split, or the validation split.
        num_classes: Outputs of the model.

    Raises:
        UserError: No such folder or split, an empty class folder, or another number of classes than the model has.
    """
    split = args.train_split if train else args.val_split
    if "/" not in args.dataset:
        _check_split(Path(args.data_dir), split, "--train-split" if train else "--val-split")
    elif args.data_dir and args.dataset.split("/")[0].lower() == "wds" and "://" not in args.data_dir:
        if not os.path.isdir(args.data_dir):
            raise UserError(f"data folder {args.data_dir} does not exist: correct --data-dir")
    try:
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=train,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            num_samples=args.train_num_samples if train else args.val_num_samples,
            seed=getattr(args, "seed", 0),
            input_key=args.input_key,
            target_key=args.target_key,
            trust_remote_code=args.dataset_trust_remote_code,
        )
    except ImportError as error:
        raise UserError(f"--dataset {args.dataset} needs a package: pip install {error.name}") from error
    except (RuntimeError, OSError, TypeError, ValueError, KeyError, AssertionError) as error:
        where = f"--dataset '{args.dataset}', --data-dir {args.data_dir}, split {split}"
        raise UserError(f"cannot open {where}: {' '.join(str(error).split()) or type(error).__name__}") from error
    _check_classes(dataset, args, split, num_classes)
    return dataset


def _check_split(root: Path, split: str, option: str) -> None:
    if not root.exists():
        raise UserError(f"data folder {root} does not exist: correct --data-dir (see docs/data.md)")
    names = next((group for group in SYNONYMS if split in group), (split,))
    if root.is_dir() and not any((root / name).exists() for name in names):
        there = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise UserError(f"no split '{split}' in {root} (it holds {there}): correct --data-dir or {option}")


def class_names(dataset: Dataset) -> dict[str, int] | None:
    """Returns the data set's class names and their indices, or None where its reader does not know them."""
    for holder in (getattr(dataset, "reader", None), dataset):
        if getattr(holder, "class_to_idx", None):
            return holder.class_to_idx
    return None


def _check_classes(dataset: Dataset, args: argparse.Namespace, split: str, num_classes: int) -> None:
    reader = getattr(dataset, "reader", None)
    root = getattr(reader, "root", None)
    if not args.class_map and root and os.path.isdir(root) and hasattr(reader, "samples"):
        prefix = len(os.path.join(root, ""))
        filled = {path[prefix:].split(os.sep, 1)[0] for path, _ in reader.samples}
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if entry.is_dir() and not entry.name.startswith(".") and entry.name not in filled:
                raise UserError(f"class folder {entry.path} holds no image: fill it or remove it")
    classes = class_names(dataset)
    if classes is None:
        return
    count = max(classes.values()) + 1
    if count != num_classes:
        raise UserError(
            f"split '{split}' has {count} classes, the model has {num_classes} outputs: "
            f"pass --num-classes {count} or correct --data-dir {args.data_dir}"
        )


def check_same_classes(train: Dataset, val: Dataset) -> None:
    """Compares the class names of two splits.

    Raises:
        UserError: They differ, so one index would mean two classes.
    """
    first, second = class_names(train), class_names(val)
    if first is None or second is None or first == second:
        return
    odd = sorted(set(first) ^ set(second))
    raise UserError(
        f"the training and validation splits disagree on {len(odd)} classes, e.g. '{odd[0] if odd else ''}': "
        f"their class folders must have the same names"
    )
