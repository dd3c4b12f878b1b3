"""Order, augmentation, broken images, and what is refused before the first image is read."""

import random
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader

from classification.config import UserError, parse_args
from classification.data import Broken, BrokenImages, Collate, EpochSampler, Loader, Samples, data_config, seeded
from classification.runtime import World, build_model
from classification.splits import open_split
from classification.train import main as train

CPU = torch.device("cpu")


def loader_of(options, train=True, limit=0):
    args = parse_args(options, train=True)
    dataset = open_split(args, train, 3)
    config = data_config(args, build_model(args))
    return Loader(dataset, args, config, World(CPU), BrokenImages(limit), train)


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seeded_repeats_and_leaves_the_callers_numbers_alone():
    with seeded(1, 2, 3):
        first = draw()
    with seeded(1, 2, 3):
        assert draw() == first
    with seeded(1, 2, 4):
        assert all(a != b for a, b in zip(draw(), first, strict=True))
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = draw()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    with seeded(5):
        draw()
    assert draw() == expected


def test_training_order_is_a_dealt_permutation_that_can_start_anywhere():
    samplers = [EpochSampler(23, World(CPU, rank, 2), seed=1, multiple=4) for rank in range(2)]
    parts = [list(sampler) for sampler in samplers]
    assert [len(part) for part in parts] == [10, 10]  # 23 cut to 20
    assert len({index for part in parts for _, index in part}) == 20
    joined = list(EpochSampler(23, World(CPU), seed=1, multiple=4))
    assert [item for pair in zip(*parts, strict=True) for item in pair] == joined  # a joined batch is the same images
    samplers[0].start = 6
    assert list(samplers[0]) == parts[0][6:] and len(samplers[0]) == 4
    samplers[1].epoch = 1
    assert [index for _, index in samplers[1]] != [index for _, index in parts[1]]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_evaluation_deals_each_image_once(processes):
    parts = [list(EpochSampler(5, World(CPU, rank, processes))) for rank in range(processes)]
    assert sorted(index for part in parts for _, index in part) == list(range(5))
    assert [len(EpochSampler(5, World(CPU, rank, processes))) for rank in range(processes)] == [len(p) for p in parts]


@pytest.mark.slow
def test_batches_do_not_depend_on_workers_or_on_where_the_epoch_starts(options):
    extra = ["--aa", "rand-m9-mstd0.5-inc1", "--batch-size", 6]
    loader = loader_of(options(*extra))
    epochs = []
    for epoch in range(2):
        loader.seek(epoch)
        epochs.append(list(loader))
    assert len(loader) == len(epochs[1]) == 4
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    for workers in (1, 3):
        other = loader_of(options(*extra, "--workers", workers))
        other.seek(0), list(other)  # persistent workers see the next epoch too
        other.seek(1, batch=2)
        rest = list(other)
        assert len(rest) == 2 and len(other) == 4
        for (images, labels), (same_images, same_labels) in zip(epochs[1][2:], rest, strict=True):
            assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


def test_training_and_accumulation_drop_the_incomplete_rest(options):
    assert len(loader_of(options("--batch-size", 5))) == 4
    assert len(loader_of(options("--batch-size", 5, "--grad-accum-steps", 3))) == 3
    val = loader_of(options("--batch-size", 4), train=False)
    val.seek(0)
    assert [len(labels) for _, labels in val] == [4, 4, 4, 3] and len(val) == 4


def test_tar_files_and_torchvision_folders_read_alike(options, data_dir, tmp_path):
    val = loader_of(options(), train=False)
    with tarfile.open(tmp_path / "val.tar", "w") as file:
        file.add(data_dir / "val", arcname="val")
    in_tar = loader_of([*options(data=tmp_path), "--val-split", "val.tar"], train=False)
    in_torch = loader_of(options("--dataset", "torch/image_folder"), train=False)
    for other in (in_tar, in_torch):
        for split in (val, other):
            split.seek(0)
        for (images, labels), (same, same_labels) in zip(val, other, strict=True):
            assert torch.equal(images, same) and torch.equal(labels, same_labels)


# --- broken images ---


@pytest.fixture
def broken_dir(data_dir, tmp_path):
    root = shutil.copytree(data_dir, tmp_path / "broken")
    for name in ("cat/0.png", "dog/1.png"):
        path = root / "train" / name
        path.write_bytes(path.read_bytes()[:200])
    (root / "val/fish/2.png").write_bytes(b"no image")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_run_and_is_named(options, broken_dir, fails, workers):
    line = fails(train, options("--workers", workers, data=broken_dir))
    assert "cannot be read" in line and "--max-broken-images N" in line
    assert "cat/0.png" in line or "dog/1.png" in line


@pytest.mark.slow
def test_broken_images_are_counted_once_logged_and_skipped_up_to_the_limit(options, broken_dir, fails, capsys):
    extra = ("--workers", 2, "--mixup", 0.8, "--max-broken-images")
    assert train(options(*extra, 3, data=broken_dir)) == 0  # two epochs, two evaluations: still three images
    output = capsys.readouterr().out
    assert output.count("skipped broken image") == 3
    for name in ("cat/0.png", "dog/1.png", "fish/2.png"):
        assert output.count(f"{name} (") == 1
    line = fails(train, options(*extra, 2, data=broken_dir, experiment="again"))
    assert "cannot be read after 2 others" in line


def test_collate_drops_the_broken_and_keeps_batches_even():
    good = [(torch.full((3, 2, 2), float(i)), i) for i in range(4)]
    broken = Broken("x.png", "gone")
    stack = torch.utils.data.default_collate
    images, labels, lost = Collate(stack, even=False)([good[0], broken, *good[1:]])
    assert labels.tolist() == [0, 1, 2, 3] and len(images) == 4 and lost == [broken]
    assert Collate(stack, even=True)([*good[:3], broken])[1].tolist() == [0, 1]
    assert Collate(stack, even=True)([good[0], broken]) == (None, None, [broken])


def test_a_batch_without_a_readable_image_stops_training_but_not_evaluation(options, data_dir, tmp_path):
    root = shutil.copytree(data_dir, tmp_path / "all")
    for path in root.glob("*/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="a whole batch of 8 images cannot be read"):
        loader = loader_of(options(data=root), limit=99)
        loader.seek(0)
        list(loader)
    val = loader_of(options(data=root), train=False, limit=99)
    val.seek(0)
    assert list(val) == []


def test_an_unreadable_image_is_never_replaced(broken_dir, options):
    args = parse_args(options(data=broken_dir), train=True)
    samples = Samples(open_split(args, True, 3), lambda image: torch.zeros(1), seed=0)
    items = [samples[0, index] for index in range(len(samples))]
    assert sum(isinstance(item, Broken) for item in items) == 2
    assert [item.path for item in items if isinstance(item, Broken)] == [
        str(broken_dir / "train/cat/0.png"),
        str(broken_dir / "train/dog/1.png"),
    ]


# --- what is refused ---


def test_missing_folders_and_splits(options, data_dir, tmp_path, fails):
    assert f"data folder {tmp_path / 'none'} does not exist" in fails(train, options(data=tmp_path / "none"))
    line = fails(train, options("--train-split", "training2"))
    assert "no split 'training2' in" in line and "it holds train, val" in line and "--train-split" in line
    only_train = tmp_path / "only"
    shutil.copytree(data_dir / "train", only_train / "train")
    assert "no split 'val' in" in fails(train, options(data=only_train))  # timm would evaluate on the root folder
    (tmp_path / "void" / "train").mkdir(parents=True)
    (tmp_path / "void" / "val").mkdir()
    assert "Found 0 images" in fails(train, options(data=tmp_path / "void"))
    assert "does not exist" in fails(train, options("--dataset", "wds/", data=tmp_path / "none"))


def test_an_empty_class_folder_is_named(options, data_dir, tmp_path, fails):
    root = shutil.copytree(data_dir, tmp_path / "empty")
    (root / "val" / "bird").mkdir()
    (root / "val" / ".cache").mkdir()
    line = fails(train, options(data=root))
    assert f"class folder {root / 'val' / 'bird'} holds no image" in line


def test_the_number_of_classes_must_fit(options, write_images, data_dir, tmp_path, fails):
    line = fails(train, options("--num-classes", 10))
    assert "split 'train' has 3 classes, the model has 10 outputs: pass --num-classes 3" in line
    root = shutil.copytree(data_dir, tmp_path / "less")
    shutil.rmtree(root / "val" / "dog")
    assert "split 'val' has 2 classes, the model has 3 outputs" in fails(train, options(data=root))
    (root / "val" / "cat").rename(root / "val" / "cow")
    shutil.copytree(root / "val" / "cow", root / "val" / "zebra")
    assert "disagree on 4 classes, e.g. 'cat'" in fails(train, options(data=root))


def test_a_class_map_chooses_and_orders_classes(options, data_dir, tmp_path):
    (tmp_path / "map.txt").write_text("fish\ncat\ndog\n")
    val = loader_of(options("--class-map", tmp_path / "map.txt", "--batch-size", 15), train=False)
    val.seek(0)
    ((_, labels),) = val
    assert labels.tolist() == [1] * 5 + [2] * 5 + [0] * 5


def test_too_few_images_for_one_update(options, fails):
    line = fails(train, options("--batch-size", 16, "--grad-accum-steps", 2))
    assert "24 images, fewer than one update of 16 images × 1 processes × 2 accumulation steps" in line


def test_images_of_any_mode_become_rgb(tmp_path):
    for mode, name in (("L", "a.png"), ("RGBA", "a.png"), ("P", "a.png"), ("1", "a.png"), ("CMYK", "a.jpg")):
        folder = tmp_path / "val" / mode
        folder.mkdir(parents=True)
        Image.new(mode, (9, 7)).save(folder / name)
    argv = ["--model", "resnet18", "--data-dir", str(tmp_path), "--num-classes", "5"]
    samples = Samples(open_split(parse_args(argv, True), False, 5), np.asarray, seed=0)
    shapes = {item[0].shape for item in DataLoader(samples, sampler=EpochSampler(5, World(CPU)), batch_size=None)}
    assert shapes == {(7, 9, 3)}


def test_the_gpu_path_gives_the_same_batches(options, data_dir, monkeypatch):
    """On a GPU timm's prefetcher normalizes; here it does so on the CPU."""
    args = parse_args(options("--aa", "rand-m9-mstd0.5-inc1"), train=True)
    config = data_config(args, build_model(args))
    monkeypatch.setattr(
        "classification.data.PrefetchLoader", lambda *given, device, **more: PrefetchLoader(*given, device=CPU, **more)
    )
    for training in (True, False):
        batches = []
        for device in (CPU, torch.device("cuda")):
            loader = Loader(open_split(args, training, 3), args, config, World(device), BrokenImages(0), training)
            loader.seek(1, batch=1)
            batches.append(list(loader))
            assert len(loader) == (3 if training else 2)
        for (images, labels), (same, same_labels) in zip(*batches, strict=True):
            torch.testing.assert_close(images, same, rtol=1e-5, atol=1e-5)
            assert labels.tolist() == same_labels.tolist()
