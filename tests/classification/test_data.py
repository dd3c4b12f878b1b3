"""Order, augmentation, broken images, and what is refused before the first image is read."""

import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.loader import PrefetchLoader

from classification.config import parse_args
from classification.data import (
    Broken,
    BrokenImages,
    Collate,
    EpochSampler,
    Loader,
    Samples,
    StreamTransform,
    data_config,
)
from classification.runtime import World, build_model
from classification.splits import open_split
from classification.train import main as train
from elfatt.data import UserError

CPU = torch.device("cpu")


def loader_of(options, train=True, limit=0):
    args = parse_args(options, train=True)
    dataset = open_split(args, train)
    config = data_config(args, build_model(args))
    return Loader(dataset, args, config, World(CPU), BrokenImages(limit), train)


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
    with pytest.raises(UserError, match="all 8 images of a batch are unreadable"):
        loader = loader_of(options(data=root), limit=99)
        loader.seek(0)
        list(loader)
    val = loader_of(options(data=root), train=False, limit=99)
    val.seek(0)
    assert list(val) == []


def test_an_unreadable_image_is_never_replaced(broken_dir, options):
    args = parse_args(options(data=broken_dir), train=True)
    samples = Samples(open_split(args, True), lambda image: torch.zeros(1), seed=0)
    items = [samples[0, index] for index in range(len(samples))]
    assert sum(isinstance(item, Broken) for item in items) == 2
    assert [item.path for item in items if isinstance(item, Broken)] == [
        str(broken_dir / "train/cat/0.png"),
        str(broken_dir / "train/dog/1.png"),
    ]


def test_too_few_images_for_one_update(options, fails):
    line = fails(train, options("--batch-size", 16, "--grad-accum-steps", 2))
    assert "24 images, fewer than one update of 16 images × 1 processes × 2 accumulation steps" in line


RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0 … 255 in 8 bits
TURNED = Image.Exif()
TURNED[0x0112] = 8


@pytest.mark.parametrize("source", ["", "torch/image_folder", "tar"])
@pytest.mark.parametrize(("mode", "chans"), [("RGB", 3), ("L", 1)])
def test_16_bits_are_scaled_and_turned_images_upright_from_every_source(tmp_path, source, mode, chans):
    for name, image, exif in (("deep", Image.fromarray(RAMP), None), ("turned", Image.fromarray(RAMP), TURNED)):
        (tmp_path / "val" / name).mkdir(parents=True)
        image.save(tmp_path / "val" / name / "a.tif", **({"exif": exif} if exif else {}))
    argv = ["--model", "resnet18", "--data-dir", str(tmp_path), "--num-classes", "2"]
    if source == "tar":
        with tarfile.open(tmp_path / "val.tar", "w") as file:
            file.add(tmp_path / "val", arcname="val")
        argv += ["--val-split", "val.tar"]
    elif source:
        argv += ["--dataset", source]
    samples = Samples(open_split(parse_args(argv, True), False), np.asarray, seed=0, mode=mode)
    upright = RAMP // 257
    for index, expected in enumerate((upright, np.rot90(upright))):
        expected = np.stack([expected] * 3, axis=-1) if chans == 3 else expected
        np.testing.assert_array_equal(samples[0, index][0], expected)


def test_a_very_flat_image_counts_as_broken(write_images, options, tmp_path):
    root = write_images(tmp_path / "flat", train=1, val=1)
    Image.new("RGB", (3000, 1)).save(root / "val" / "cat" / "0.png")  # resized, it would take half a gigabyte
    samples = Samples(open_split(parse_args(options(data=root), True), False), np.asarray, seed=0)
    assert samples[0, 0].reason.startswith("it has 3000x1 pixels, one side more than 100 times the other")
    assert samples[0, 1][0].shape == (20, 20, 3)


def test_images_of_a_stream_are_read_alike():
    image = Image.fromarray(RAMP)
    np.testing.assert_array_equal(StreamTransform(np.asarray, "L")(image), RAMP // 257)
    broken = StreamTransform(np.asarray, "L")(Image.fromarray(RAMP.astype(np.float32)))
    assert "no known range" in broken.reason
    good = (torch.zeros(1, 2, 2), 1)
    images, _, lost = Collate(torch.utils.data.default_collate, even=False)([good, (broken, 0)])
    assert len(images) == 1 and lost == [broken]


def test_grey_models_see_grey_images(options, data_dir, fails):
    args = parse_args(options("--model-kwargs", "in_chans=1"), train=True)
    config = data_config(args, build_model(args))
    assert config["input_size"] == (1, 32, 32)
    assert config["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    loader = loader_of(options("--model-kwargs", "in_chans=1", "--crop-pct", 1), train=False)
    loader.seek(0)
    images, _ = next(iter(loader))
    with Image.open(data_dir / "val/cat/0.png") as image:
        grey = image.convert("L").resize((32, 32), Image.BICUBIC)
    expected = (np.asarray(grey) / 255 - config["mean"][0]) / config["std"][0]
    np.testing.assert_allclose(images[0, 0], expected, atol=1e-5)
    assert train(options("--model-kwargs", "in_chans=1", "--aa", "rand-m9-mstd0.5-inc1", "--epochs", 1)) == 0
    line = fails(train, options("--model-kwargs", "in_chans=4", experiment="four"))
    assert "in_chans=4: images are read as RGB (3 channels) or greyscale (1)" in line


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
            loader = Loader(open_split(args, training), args, config, World(device), BrokenImages(0), training)
            loader.seek(1, batch=1)
            batches.append(list(loader))
            assert len(loader) == (3 if training else 2)
        for (images, labels), (same, same_labels) in zip(*batches, strict=True):
            torch.testing.assert_close(images, same, rtol=1e-5, atol=1e-5)
            assert labels.tolist() == same_labels.tolist()


def test_a_picture_over_pillows_limit_counts_as_broken(write_images, options, tmp_path, monkeypatch):
    root = write_images(tmp_path / "large", train=1, val=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with tarfile.open(root / "train.tar", "w") as file:
        file.add(root / "train", arcname="train")
    for extra in ([], ["--train-split", "train.tar"]):
        args = parse_args(options(*extra, data=root), True)
        reason = Samples(open_split(args, True), np.asarray, seed=0)[0, 0].reason
        assert reason.startswith("it has more than 20 pixels, Pillow's limit: cut it into tiles")
