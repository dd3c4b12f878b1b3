"""Open a dataset's splits and reject any that would train on wrong labels.

Folders and tar files are listed here, other sources by timm's readers. Classes are the visible top-level folders; files
outside them or in hidden folders are skipped and counted.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from timm.data import ImageDataset, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar, TarState
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from elfatt.data import UserError, is_hidden, is_image
from elfatt.data.archives import compression_of
from elfatt.data.classes import differences, mismatch, read_class_map, renumbered, shown
from elfatt.data.images import walk
from elfatt.suggest import form_clash

LOGGER = logging.getLogger("classification")
SYNONYMS = [("train", "training"), ("val", "valid", "validation", "eval", "evaluation")]


class FolderReader(ReaderImageFolder):
    """timm's ``ReaderImageFolder`` over given images.

    Args:
        root: Folder of the split.
        samples: Path and label of each image.
        class_to_idx: Label of each class.
    """

    def __init__(self, root: Path, samples: list[tuple[str, int]], class_to_idx: dict[str, int]) -> None:
        super(ReaderImageFolder, self).__init__()
        self.root, self.samples, self.class_to_idx = str(root), samples, class_to_idx


Member = tuple[tarfile.TarInfo, None, tarfile.TarInfo | None]  # as timm has it: member, its tar file's name, nested tar


class TarReader(ReaderImageInTar):
    """timm's ``ReaderImageInTar`` over given members.

    Args:
        root: Tar file.
        samples: Member and label of each image.
        class_to_idx: Label of each class.
    """

    def __init__(self, root: Path, samples: list[tuple[Member, int]], class_to_idx: dict[str, int]) -> None:
        super(ReaderImageInTar, self).__init__()
        self.root, self.class_to_idx = str(root), class_to_idx
        self.samples = np.empty(len(samples), object)
        self.samples[:] = [member for member, _ in samples]
        self.targets = np.array([label for _, label in samples])
        self.root_is_tar = self.cache_tarfiles = True
        self.tar_state = TarState()
        for _, _, archive in self.samples:
            if archive and archive.name not in self.tar_state.children:
                self.tar_state.children[archive.name] = TarState(ti=archive)


def open_split(args: argparse.Namespace, train: bool, trained: Mapping[str, int] | None = None) -> Dataset:
    """Open the training or validation split.

    Args:
        args: Parsed options.
        train: Open the training split instead of the validation split.
        trained: Class labels of a checkpoint. Folders are labelled by them and may be a subset.

    Raises:
        UserError: Missing folder or split, empty class folder, or classes that contradict the class map or ``trained``.
    """
    split = args.train_split if train else args.val_split
    class_map = None
    if args.class_map:
        inside = Path(args.data_dir or ".", args.class_map)
        try:
            class_map = read_class_map(inside if inside.exists() else args.class_map)
        except ValueError as error:
            raise UserError(f"--class-map: {error}") from error
    if "/" in args.dataset:
        dataset = _open_reader(args, train, split, class_map)
    else:
        root = _find_split(Path(args.data_dir), split, "--train-split" if train else "--val-split")
        dataset = _open_images(root, split, class_map, trained)
    classes = class_names(dataset) or {}
    if hidden := [name for name in classes if is_hidden([name])]:
        raise UserError(f"split '{split}' has the hidden folder {shown(hidden)} as a class: remove it")
    if root := getattr(dataset, "root", None):  # torchvision's, whose lists of images are not ours
        listed = (os.path.relpath(sample[0], root) for sample in getattr(dataset, "samples", ()))
        if hidden := [path for path in listed if is_hidden(path.split(os.sep))]:
            raise UserError(f"split '{split}' has {len(hidden):,} hidden images, e.g. {hidden[0]}: remove them")
    if trained and classes:
        _compare_with_checkpoint(split, classes, trained, mapped=class_map is not None)
    return dataset


def _compare_with_checkpoint(split: str, classes: dict[str, int], trained: Mapping[str, int], mapped: bool) -> None:
    shared = classes.keys() & trained.keys()
    if mapped and len(shared) < len(classes) == len(trained) and not renumbered(classes, trained):
        LOGGER.warning(
            "split '%s': --class-map renames the checkpoint's classes, which are matched by index",
            split,
        )
    elif len(shared) < len(classes):
        raise UserError(
            f"split '{split}' has different classes from the checkpoint: {differences(classes, trained)}; if only the "
            "names differ, list them all in the checkpoint's order with --class-map"
        )
    elif reason := renumbered(classes, trained):
        raise UserError(f"split '{split}' and the checkpoint number classes differently: {reason}; correct --class-map")


def class_names(dataset: Dataset) -> dict[str, int] | None:
    """Return a dataset's labels by class name, or None if its reader does not know them."""
    for holder in (getattr(dataset, "reader", None), dataset):
        if getattr(holder, "class_to_idx", None):
            return {str(name): int(label) for name, label in holder.class_to_idx.items()}
    return None


def check_same_classes(train: Dataset, val: Dataset) -> None:
    """Check that two splits have the same classes.

    Raises:
        UserError: They differ, so a label would mean two classes.
    """
    first, second = class_names(train), class_names(val)
    if first and second and (reason := mismatch(second, first)):
        raise UserError(
            f"the validation split has different classes from the training split: {reason}; use the same class "
            "folders in both, or list the classes with --class-map"
        )


def check_class_count(dataset: Dataset, num_classes: int) -> None:
    """Check that the model has one output per class.

    Raises:
        UserError: It does not.
    """
    classes = class_names(dataset)
    if classes is None:
        return
    count = max(classes.values()) + 1
    if count != num_classes:
        raise UserError(
            f"the dataset has {count} classes ({shown(classes)}), the model has {num_classes} outputs: "
            f"remove folders that are not classes, list the classes with --class-map, or build a model with "
            f"--num-classes {count}"
        )


def check_labels(train: Dataset, val: Dataset) -> None:
    """Check the labels of the images, where the readers list them.

    Raises:
        UserError: All training images have the same label, so any model has no loss and is always right.
    """
    labels = _labels(train)
    if len(labels) == 1:
        raise UserError(
            f"all training images are of one class{_names(train, labels)}, so there is nothing to learn: "
            "correct --data-dir, which needs one folder of images per class"
        )
    if lacking := labels - (_labels(val) or labels):
        LOGGER.warning(
            "the validation split has no images of %d of the %d training classes%s: the accuracy does not cover them",
            *(len(lacking), len(labels), _names(train, lacking)),
        )


def _labels(dataset: Dataset) -> set[int]:
    """Return the labels of a dataset's images; empty if only reading them would tell."""
    for holder in (getattr(dataset, "reader", None), dataset):
        labels = getattr(holder, "targets", None)  # of tar files and torchvision
        if labels is None:
            labels = [label for _, label in getattr(holder, "samples", ())]
        if len(labels):
            return {int(label) for label in labels}
    return set()


def _names(dataset: Dataset, labels: set[int]) -> str:
    names = [name for name, label in (class_names(dataset) or {}).items() if label in labels]
    return f" ({shown(names)})" if names else ""


def _find_split(root: Path, split: str, option: str) -> Path:
    """Return the folder or tar file of a split, trying synonyms of its name."""
    if not root.exists():
        raise UserError(f"data folder {root} does not exist: correct --data-dir (see docs/data.md)")
    if root.is_file():
        return root
    names = split, *next((group for group in SYNONYMS if split in group), ())
    found = next((root / name for name in names if (root / name).exists()), None)
    if found is None:
        there = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise UserError(f"no split '{split}' in {root} (it contains {there}): correct --data-dir or {option}")
    return found


def _open_images(
    root: Path, split: str, class_map: dict[str, int] | None, trained: Mapping[str, int] | None
) -> ImageDataset:
    """Open the images of a folder or tar file."""
    files = _list_folder(root) if root.is_dir() else _list_tar(root)
    images = {
        path: source
        for path, source in files.items()
        if source and len(path) > 1 and is_image(path[-1]) and not is_hidden(path)
    }
    others = [
        "/".join(path) + " (a link to nothing)" * (source is None)
        for path, source in files.items()
        if path not in images and (is_image(path[-1]) or not is_hidden(path))
    ]
    if others:
        kinds = Counter(os.path.splitext(path)[1].lower() or "no extension" for path in others)
        kinds = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        LOGGER.warning("split '%s': skipped %d file(s) (%s), e.g. %s", split, len(others), kinds, others[0])

    # the name breaks ties of natural_key, such as A and a or 1 and 01
    found = dict.fromkeys(sorted({path[0] for path in images}, key=lambda name: (natural_key(name), name)))
    if clash := form_clash(found):
        raise UserError(f"split '{split}' has the class folder {clash}")
    labels = class_map or {name: label for label, name in enumerate(found)}
    if trained and not class_map and all(name in trained for name in found):
        labels = dict(trained)
    if root.is_dir():
        for entry in sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden([path.name])):
            if entry.name not in found and not class_map:
                raise UserError(
                    f"class folder {entry} contains no images: fill it, remove it, or list the classes with --class-map"
                )
    if not found:
        raise UserError(f"split '{split}' has no images in class folders of {root}: correct --data-dir")
    if difference := differences(found, labels):
        if class_map and not labels.keys() >= set(found) and not labels.keys() <= set(found):
            raise UserError(f"split '{split}' has different classes from --class-map: {difference}")
        LOGGER.warning("split '%s': folders and classes differ: %s", split, difference)

    samples = [(source, labels[path[0]]) for path, source in images.items() if path[0] in labels]
    reader = FolderReader(root, samples, labels) if root.is_dir() else TarReader(root, samples, labels)
    return ImageDataset(str(root), reader=reader)


def _list_folder(root: Path) -> dict[tuple[str, ...], str]:
    """Return the files of a folder by the parts of their relative paths, in natural order."""
    files = {}
    for folder, names in walk(root):
        parts = Path(folder).relative_to(root).parts
        files |= {(*parts, name): os.path.join(folder, name) for name in names}
    return dict(sorted(files.items(), key=lambda item: natural_key(item[1])))


def _list_tar(path: Path) -> dict[tuple[str, ...], Member | None]:
    """Return the files of a tar file by the parts of their paths, without the leading folders that all images share.

    A nested tar file counts as a folder, a link as the file it leads to, or as None if there is none.

    Raises:
        UserError: A compressed, truncated or unreadable file.
    """
    if kind := compression_of(path):
        raise UserError(f"{path} is compressed ({kind}), but images are read in random order: unpack it")
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        if file.read().strip(b"\0") and tarfile.is_tarfile(path):
            raise UserError(f"{path} is truncated (no end-of-archive marker): copy or pack it again")
    try:
        with tarfile.open(path, "r:") as archive:
            files = dict(_members(archive))
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UserError(f"{path} is not a tar file of images: correct --data-dir or the split's name") from error
    files = dict(sorted(files.items(), key=lambda item: natural_key(item[1][0].name if item[1] else item[0][-1])))
    folders = [parts[:-1] for parts in files if is_image(parts[-1]) and not is_hidden(parts)]
    shared = os.path.commonprefix(folders)
    if all(folder == shared for folder in folders):  # a single class
        shared = shared[:-1]
    length = len(shared)
    return {parts[length:] if parts[:length] == shared else parts: member for parts, member in files.items()}


def _members(archive: tarfile.TarFile, nested: tarfile.TarInfo | None = None) -> Iterator[tuple[tuple, Member | None]]:
    """Yield the parts of a path and the member of each file and link; of two with one path, the later counts."""
    above = os.path.splitext(nested.name)[0].split("/") if nested else ()
    found = {}
    for member in archive:
        if member.isfile() and member.name.lower().endswith(".tar") and not nested:
            with tarfile.open(fileobj=archive.extractfile(member)) as inner:
                yield from _members(inner, member)
        elif not member.isdir():
            found[posixpath.normpath(member.name)] = member
    for name, member in found.items():
        parts = tuple(part for part in (*above, *name.split("/")) if part not in ("", "."))
        target = _follow(member, found)
        if target and target is not member:
            target = copy.copy(target)
            target.name = member.name
        yield parts, target and (target, None, nested)


def _follow(member: tarfile.TarInfo, files: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """Return the file that a member is or links to, or None if it is not in the tar file."""
    target: tarfile.TarInfo | None = member
    for _ in files:  # at most, so that a circle of links ends
        if target is None or not (target.islnk() or target.issym()):
            break
        folder = posixpath.dirname(target.name) if target.issym() else ""
        target = files.get(posixpath.normpath(posixpath.join(folder, target.linkname)))
    return target if target and target.isfile() else None


def _open_reader(args: argparse.Namespace, train: bool, split: str, class_map: dict[str, int] | None) -> Dataset:
    """Open a dataset with one of timm's other readers."""
    kind = args.dataset.split("/")[0].lower()
    if args.data_dir and kind == "wds" and "://" not in args.data_dir and not os.path.isdir(args.data_dir):
        raise UserError(f"data folder {args.data_dir} does not exist: correct --data-dir")
    try:
        return create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=train,
            class_map=class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            num_samples=args.train_num_samples if train else args.val_num_samples,
            seed=getattr(args, "seed", 0),
            input_img_mode="RGB" if kind == "tfds" else "",  # TFDS decodes images itself, for others data.py does
            input_key=args.input_key,
            target_key=args.target_key,
            trust_remote_code=args.dataset_trust_remote_code,
        )
    except ImportError as error:
        raise UserError(f"--dataset {args.dataset} needs a package: pip install {error.name}") from error
    except (RuntimeError, OSError, TypeError, ValueError, KeyError, AssertionError) as error:
        where = f"--dataset '{args.dataset}', --data-dir {args.data_dir}, split {split}"
        raise UserError(f"cannot open {where}: {' '.join(str(error).split()) or type(error).__name__}") from error
