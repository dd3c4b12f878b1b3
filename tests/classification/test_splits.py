"""Which files are images of which class, and what is refused before the first one is read."""

import os
import shutil
import subprocess
import tarfile

import pytest
from PIL import Image

from classification.config import parse_args
from classification.splits import class_names, open_split
from classification.train import Trainer
from classification.train import main as train
from elfatt.data import UserError


@pytest.fixture
def copy(data_dir, tmp_path):
    return shutil.copytree(data_dir, tmp_path / "copy")


@pytest.fixture
def opened(options):
    """Opens a split and returns (file below the split's folder, label) of each image."""

    def run(root, *extra, train=True, trained=None):
        args = parse_args(options(*extra, data=root), train=True)
        dataset = open_split(args, train, trained)
        names = [dataset.filename(index, absolute=False) for index in range(len(dataset))]
        return list(zip(names, [dataset.reader[index][1] for index in range(len(dataset))], strict=True))

    return run


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(path)


def pack(root, name="train.tar", arcname="train"):
    with tarfile.open(root / name, "w") as file:
        file.add(root / "train", arcname=arcname)
    return ["--train-split", name]


@pytest.mark.parametrize("arcname", [None, "train", ".", "data/train"], ids=str)
def test_classes_are_the_visible_folders_of_the_first_level(copy, opened, caplog, arcname):
    before = opened(copy)
    draw(copy / "train/cat/lying/deep/8.png")  # a pose is no class
    for stray in (".ipynb_checkpoints/0-checkpoint.png", "cat/.ipynb_checkpoints/0.png", "dog/._0.png", "logo.png"):
        draw(copy / "train" / stray)
    for stray in ("cat/@eaDir/0.png/SYNOPHOTO_THUMB_XL.png", "@eaDir/0.png", "dog/#recycle/0.png", "__MACOSX/0.png"):
        draw(copy / "train" / stray)  # of file servers
    (copy / "train/dog/notes.txt").touch()
    (copy / "train/dog/@eaDir").mkdir()
    (copy / "train/dog/@eaDir/Thumbs.db").touch()
    after = opened(copy, *(pack(copy, arcname=arcname) if arcname else ()))
    assert [label for _, label in after] == sorted([*(label for _, label in before), 0])
    strays = ("checkpoint", "logo", "._0", "@eaDir", "#", "MACOSX")
    assert not any(stray in name for name, _ in after for stray in strays)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "skipped 8 file(s) (7 .png, 1 .txt), e.g. " in warning  # in a tar file as in a folder


def test_hidden_files_beside_the_split_of_a_tar_file_change_no_class(copy, opened):
    draw(copy / "x.png")
    extra = pack(copy)
    before = opened(copy, *extra)
    with tarfile.open(copy / "train.tar", "a") as file:
        for name in ("._train/0.png", ".cache/a/b/0.png", "__MACOSX/train/cat/._0.png"):
            file.add(copy / "x.png", arcname=name)
    assert opened(copy, *extra) == before


def test_links_in_a_tar_file_are_what_they_lead_to(copy, options, opened, caplog):
    before = opened(copy)
    cat = copy / "train/cat"
    os.link(sorted(cat.iterdir())[0], cat / "hard.png")
    (cat / "soft.png").symlink_to("hard.png")
    (copy / "train/dog/other.png").symlink_to("../cat/soft.png")
    folder = opened(copy)
    assert len(folder) == len(before) + 3
    extra = pack(copy)
    packed = opened(copy, *extra)
    assert [(name.removeprefix("train/"), label) for name, label in packed] == folder and not caplog.records
    reader = open_split(parse_args(options(*extra, data=copy), train=True), train=True).reader
    for (name, _), (file, _) in zip(folder, reader, strict=True):
        assert file.read() == (copy / "train" / name).read_bytes()
    (cat / "lost.png").symlink_to("nothing.png")
    (cat / "circle.png").symlink_to("circle.png")
    assert opened(copy, *pack(copy)) == packed
    assert "skipped 2 file(s) (2 .png (a link to nothing)), e.g. cat/circle.png" in caplog.text


def test_a_file_packed_twice_counts_once(copy, opened):
    before = opened(copy, *pack(copy))
    with tarfile.open(copy / "train.tar", "a") as file:
        file.add(copy / "train" / "cat", arcname="train/cat")
    assert opened(copy, "--train-split", "train.tar") == before


@pytest.mark.parametrize(
    ("mode", "suffix", "kind"), [("gz", "tar.gz", "gzip"), ("xz", "tar", "xz"), ("bz2", "x", "bzip2")]
)
def test_a_compressed_tar_file_is_named(copy, opened, mode, suffix, kind):
    with tarfile.open(copy / f"train.{suffix}", f"w:{mode}") as file:
        file.add(copy / "train", arcname="train")
    with pytest.raises(UserError, match=rf"train\.{suffix} is compressed \({kind}\), .* random order: unpack it"):
        opened(copy, "--train-split", f"train.{suffix}")


def test_names_of_two_unicode_forms(copy, options, opened, fails, tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (copy / "train/cat").rename(copy / "train" / composed)
    (copy / "val/cat").rename(copy / "val" / decomposed)
    line = fails(train, options(data=copy))
    hint = f"'{composed}' looks the same, but is in Unicode form NFC, not NFD: rename one"
    assert f"1 surplus ('{decomposed}'), 1 missing ('{composed}'); {hint}" in line
    (tmp_path / "map.txt").write_text(f"{composed}\ndog\n{decomposed}\n", encoding="utf-8")
    assert f"contains '{decomposed}'; {hint}" in fails(train, options("--class-map", tmp_path / "map.txt", data=copy))
    draw(copy / "train" / decomposed / "0.png")
    with pytest.raises(UserError, match=r"has the class folder '.*looks the same, but is in Unicode form"):
        opened(copy)


def test_names_that_differ_in_case_or_zeros_have_one_order(opened, write_images, tmp_path):
    names = ("b", "a", "B", "A", "1", "01", "001")
    root = write_images(tmp_path / "letters", train=1, val=1, classes=names)
    order = {name.split("/")[0]: label for name, label in opened(root)}
    assert sorted(order, key=order.get) == ["001", "01", "1", "A", "a", "B", "b"]


def test_a_tar_file_of_tar_files_has_a_class_each(copy, options):
    for name in ("cat", "dog", "fish"):
        with tarfile.open(copy / f"{name}.tar", "w") as file:
            for path in (copy / "train" / name).iterdir():
                file.add(path, arcname=path.name)
    with tarfile.open(copy / "train.tar", "w") as file:
        for name in ("cat", "dog", "fish"):
            file.add(copy / f"{name}.tar", arcname=f"{name}.tar")
    reader = open_split(parse_args(options("--train-split", "train.tar", data=copy), train=True), train=True).reader
    names = [archive.name.removesuffix(".tar") for _, _, archive in reader.samples]
    assert len(names) == 24
    assert [reader.class_to_idx[name] for name in names] == reader.targets.tolist()


def test_every_format_and_case_is_read(copy, opened):
    for name in ("a.webp", "b.JPG", "c.TIFF", "d.bmp", "e.gif", "f.avif"):
        draw(copy / "train/cat" / name)
    assert len(opened(copy)) == 24 + 6
    assert len(opened(copy, *pack(copy))) == 24 + 6


def test_missing_folders_and_splits(options, data_dir, tmp_path, fails):
    assert f"data folder {tmp_path / 'none'} does not exist" in fails(train, options(data=tmp_path / "none"))
    line = fails(train, options("--train-split", "training2"))
    assert "no split 'training2' in" in line and "it contains train, val" in line and "--train-split" in line
    only_train = tmp_path / "only"
    shutil.copytree(data_dir / "train", only_train / "train")
    assert "no split 'val' in" in fails(train, options(data=only_train))  # timm would evaluate on the root folder
    (tmp_path / "void" / "train").mkdir(parents=True)
    (tmp_path / "void" / "val").mkdir()
    assert "split 'train' has no images in class folders" in fails(train, options(data=tmp_path / "void"))
    assert "does not exist" in fails(train, options("--dataset", "wds/", data=tmp_path / "none"))
    (tmp_path / "void" / "train.tar").write_bytes(b"no tar")
    line = fails(train, options("--train-split", "train.tar", data=tmp_path / "void"))
    assert "train.tar is not a tar file of images" in line


def test_synonyms_of_a_split_are_found(copy, opened):
    (copy / "val").rename(copy / "validation")
    assert len(opened(copy, train=False)) == 15
    assert len(opened(copy / "train", "--train-split", ".")) == 24


def test_an_empty_class_folder_is_named(options, copy, fails):
    (copy / "val" / "bird").mkdir()
    (copy / "val" / ".cache").mkdir()
    line = fails(train, options(data=copy))
    assert f"class folder {copy / 'val' / 'bird'} contains no images" in line


def test_surplus_and_missing_classes_are_named_before_the_number(options, copy, fails):
    line = fails(train, options("--num-classes", 10))
    assert "the dataset has 3 classes ('cat', 'dog', 'fish'), the model has 10 outputs" in line
    assert "build a model with --num-classes 3" in line
    draw(copy / "train/archive/0.png")
    line = fails(train, options(data=copy))
    assert "the validation split has different classes from the training split: 1 missing ('archive')" in line
    shutil.rmtree(copy / "train/archive")
    (copy / "val" / "cat").rename(copy / "val" / "cats")
    line = fails(train, options(data=copy))
    assert "1 surplus ('cats'), 1 missing ('cat'); is 'cats' the same as 'cat'?" in line
    assert "--num-classes" not in line


def test_a_hidden_folder_is_no_class_of_torchvisions_reader(options, copy, fails):
    draw(copy / "train/.ipynb_checkpoints/0.png")
    line = fails(train, options("--dataset", "torch/image_folder", data=copy))
    assert "has the hidden folder '.ipynb_checkpoints' as a class: remove it" in line
    shutil.rmtree(copy / "train/.ipynb_checkpoints")
    draw(copy / "train/cat/@eaDir/0.png/SYNOPHOTO_THUMB_XL.png")
    line = fails(train, options("--dataset", "torch/image_folder", data=copy))
    assert "split 'train' has 1 hidden images, e.g. cat/@eaDir/0.png/SYNOPHOTO_THUMB_XL.png: remove them" in line


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_class_map_chooses_and_orders_classes(copy, opened, tmp_path, encoding, caplog):
    (tmp_path / "map.txt").write_bytes("fish\r\ncat\r\n".encode(encoding))
    found = opened(copy, "--class-map", tmp_path / "map.txt", train=False)
    assert [label for _, label in found] == [1] * 5 + [0] * 5  # in the order of the files
    assert "folders and classes differ: 1 surplus ('dog')" in caplog.text
    assert opened(copy, "--class-map", tmp_path / "map.txt", *pack(copy)) and "surplus ('dog')" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fish\ncta\ndog\n", "1 surplus ('cat'), 1 missing ('cta'); is 'cat' the same as 'cta'?"),
        ("fish\n\ncat\ndog\n", "line 2 is empty"),
        ("fish\ncat\ndog\ncat\n", "'cat' is on lines 2 and 4"),
        ("\n", "is empty"),
        (None, "does not exist"),
    ],
)
def test_a_class_map_that_cannot_be_right(options, tmp_path, fails, text, message):
    if text is not None:
        (tmp_path / "map.txt").write_text(text)
    line = fails(train, options("--class-map", tmp_path / "map.txt"))
    assert message in line and "map" in line


def test_a_checkpoints_classes_number_the_folders(copy, opened, tmp_path, caplog):
    trained = {"fish": 0, "dog": 1, "cat": 2, "cow": 3}
    shutil.rmtree(copy / "val" / "dog")
    found = opened(copy, train=False, trained=trained)
    assert [label for _, label in found] == [2] * 5 + [0] * 5
    assert "folders and classes differ: 2 missing ('dog', 'cow')" in caplog.text
    (copy / "val" / "cat").rename(copy / "val" / "Cat")
    with pytest.raises(UserError, match=r"different classes from the checkpoint: 1 surplus \('Cat'\), 3 missing"):
        opened(copy, train=False, trained=trained)
    (tmp_path / "map.txt").write_text("cat\ndog\nfish\n")
    with pytest.raises(UserError, match="'cat' is class 0 here and class 2 there"):
        opened(copy, "--class-map", tmp_path / "map.txt", trained=trained)
    wordnet = {"n02121808": 0, "n02084071": 1, "n02512053": 2}  # the same classes by other names
    with pytest.raises(UserError, match="if only the names differ, list them all"):
        opened(copy, trained=wordnet)
    found = opened(copy, "--class-map", tmp_path / "map.txt", trained=wordnet)
    assert [label for _, label in found] == [0] * 8 + [1] * 8 + [2] * 8
    assert "--class-map renames the checkpoint's classes" in caplog.text


def test_class_names_are_those_of_the_reader(options, data_dir, copy):
    names = {"cat": 0, "dog": 1, "fish": 2}
    for extra in ([], ["--dataset", "torch/image_folder"], pack(copy)):
        assert class_names(open_split(parse_args(options(*extra, data=copy), train=True), True)) == names


def test_a_link_without_end_and_half_a_tar_file_stop(copy, opened):
    pack(copy)
    (copy / "train.tar").write_bytes((copy / "train.tar").read_bytes()[:30_000])
    with pytest.raises(UserError, match=r"train\.tar is truncated \(no end-of-archive marker\)"):
        opened(copy, "--train-split", "train.tar")
    (copy / "train" / "cat" / "loop").symlink_to("..")
    with pytest.raises(UserError, match="cat/loop is a link to one of its parent folders"):
        opened(copy)


@pytest.mark.parametrize("reader", ["folder", "tar", "torch/image_folder", "class-map"])
def test_one_class_is_not_trained(options, write_images, tmp_path, fails, reader):
    """Its loss is 0 and its accuracy 100 % from the first step."""
    data, extra = write_images(tmp_path / "data", 4, 2, classes=("cat",)), ["--num-classes", 1]
    if reader == "tar":
        for split in ("train", "val"):
            subprocess.run(["tar", "cf", f"{split}.tar", split], cwd=data, check=True)
        extra += ["--train-split", "train.tar", "--val-split", "val.tar"]
    elif reader == "torch/image_folder":
        extra += ["--dataset", reader]
    elif reader == "class-map":
        (tmp_path / "map.txt").write_text("cat\ndog\n")
        extra = ["--num-classes", 2, "--class-map", tmp_path / "map.txt"]
    line = fails(train, options(*extra, data=data))
    assert "all training images are of one class ('cat'), so there is nothing to learn: correct --data-dir" in line


def test_classes_that_the_validation_split_lacks_are_counted(options, data_dir, tmp_path, monkeypatch, capsys):
    data = shutil.copytree(data_dir, tmp_path / "data")
    shutil.rmtree(data / "val" / "dog")
    (tmp_path / "map.txt").write_text("cat\ndog\nfish\n")
    monkeypatch.setattr(Trainer, "fit", lambda self: None)
    assert train(options("--class-map", tmp_path / "map.txt", data=data)) == 0
    assert "has no images of 1 of the 3 training classes ('dog'): the accuracy" in capsys.readouterr().out
