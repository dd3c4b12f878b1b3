"""check_data.py passes good folders and names each fault with its path."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import check_data

SCRIPTS = Path(check_data.__file__).parent
ADE20K = ("ade20k", "--any-size", "--classes", "10")
COCO = ("coco", "--any-size")
MASK = "annotations/training/train_00002.png"
IMAGE = "images/training/train_00002.jpg"
JSON = "annotations/instances_train2017.json"


@pytest.fixture
def folder(scenes_folder, tmp_path):
    return Path(shutil.copytree(scenes_folder, tmp_path / "data"))


def check(capsys, folder, dataset, *options, notes=False):
    """The lines of problems, or of notes."""
    code = check_data.main([dataset, str(folder), *options])
    *lines, last = capsys.readouterr().out.splitlines()
    problems = [line for line in lines if not line.startswith("note: ")]
    assert last.startswith(f"{folder}: {len(problems)} problem(s) found") and code == bool(problems)
    return [line for line in lines if line not in problems] if notes else problems


def edit(folder, change, name=JSON):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("dataset", [ADE20K, COCO])
@pytest.mark.parametrize("full", [(), ("--full",)])
def test_good_scenes(capsys, scenes_folder, dataset, full):
    assert check(capsys, scenes_folder, *dataset, *full) == []


def test_counts_are_expectations(capsys, scenes_folder):
    lines = check(capsys, scenes_folder, "ade20k", "--splits", "training")
    assert len(lines) == 1 and "has 12 images, expected 20,210" in lines[0] and "--any-size" in lines[0]
    lines = check(capsys, scenes_folder, "coco", "--splits", "val2017")
    assert len(lines) == 2 and "10 categories, expected 80" in lines[0] and "has 6 images, expected 5,000" in lines[1]


def remove(name):
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def truncate(name):
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-400])


def write_mask(name, labels):
    return lambda root: Image.fromarray(labels).save(root / name)


@pytest.mark.parametrize(
    ("damage", "path", "words"),
    [
        (remove("images/validation"), "images/validation", "is not a folder"),
        (remove("annotations/training"), "annotations/training", "is not a folder"),
        (remove(MASK), IMAGE, "has no mask"),
        (remove(IMAGE), MASK, "has no image"),
        (truncate(IMAGE), IMAGE, "cannot be read"),
        (truncate(MASK), MASK, "cannot be read"),
        (lambda root: (root / IMAGE).write_bytes(b""), IMAGE, "cannot be read"),
        (write_mask(MASK, np.full((128, 128), 11, np.uint8)), MASK, "holds label 11"),
        (write_mask(MASK, np.zeros((128, 127), np.uint8)), IMAGE, "has 128x128 pixels (width x height), but"),
        (write_mask(MASK, np.zeros((128, 128, 3), np.uint8)), MASK, "is a picture of mode RGB"),
    ],
)
def test_ade20k_faults(capsys, folder, damage, path, words):
    damage(folder)
    (line,) = check(capsys, folder, *ADE20K)
    assert str(folder / path) in line.split()[:2] and words in line and ": " in line


def every_mask(change):
    def damage(root):
        for path in (root / "annotations" / "training").iterdir():
            Image.fromarray(change(np.array(Image.open(path)))).save(path)

    return damage


def turn(name, orientation, size=(128, 128)):
    def damage(root):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(root / name).resize(size).save(root / name, exif=exif)

    return damage


def copy(name, other):
    return lambda root: Image.open(root / name).save(root / other)


@pytest.mark.parametrize(
    ("damage", "path", "words"),
    [
        (every_mask(lambda labels: 255 * (labels > 0).astype(np.uint8)), "annotations/training", "contain none"),
        (every_mask(lambda labels: (labels > 0).astype(np.uint8)), "annotations/training", "contain only '1'"),
        (write_mask(MASK, np.zeros((128, 128), np.uint16)), MASK, "is a picture of mode I;16"),
        (turn(MASK, 3), MASK, "EXIF orientation 3"),
        (copy(IMAGE, "images/training/train_00002.JPG"), "images/training/train_00002.jpg", "has the same name as"),
    ],
)
def test_what_stops_training_on_masks(capsys, folder, damage, path, words):
    damage(folder)
    (line,) = check(capsys, folder, *ADE20K)
    assert str(folder / path) in line.split()[:2] and words in line


def test_masks_of_one_class_in_a_sample_are_a_note(capsys, folder, monkeypatch):
    every_mask(lambda labels: (labels > 0).astype(np.uint8))(folder)
    monkeypatch.setattr(check_data, "SAMPLE", 2)
    assert check(capsys, folder, *ADE20K) == []
    (line,) = check(capsys, folder, *ADE20K, notes=True)
    assert "the 4 masks read contain only '1'" in line
    assert len(check(capsys, folder, *ADE20K, "--full")) == 1


def test_images_that_exif_turns(capsys, folder):
    turn(IMAGE, 6)(folder)
    (note,) = check(capsys, folder, *ADE20K, notes=True)
    assert note.startswith("note: 1 of the images opened are rotated") and str(folder / IMAGE) in note
    turn(IMAGE, 6, (128, 96))(folder)
    write_mask(MASK, np.zeros((96, 128), np.uint8))(folder)
    (line,) = check(capsys, folder, *ADE20K)
    assert "orientation 6" in line and "exiftool -Orientation=" in line


def test_every_extension_is_checked(capsys, folder):
    (folder / IMAGE).rename((folder / IMAGE).with_suffix(".JPG"))
    copy(MASK, MASK.replace(".png", ".tif"))(folder)
    (folder / MASK).unlink()
    (folder / "images" / "training" / "notes.txt").touch()
    (note,) = check(capsys, folder, *ADE20K, notes=True)
    assert "1 files are skipped" in note and check(capsys, folder, *ADE20K) == []


def test_ignored_pixels_are_no_label(capsys, folder):
    write_mask(MASK, np.full((128, 128), 255, np.uint8))(folder)
    assert check(capsys, folder, *ADE20K) == []


def test_labels_up_to_150_by_default(capsys, folder):
    write_mask(MASK, np.full((128, 128), 150, np.uint8))(folder)
    assert check(capsys, folder, "ade20k", "--any-size") == []
    write_mask(MASK, np.full((128, 128), 151, np.uint8))(folder)
    assert len(check(capsys, folder, "ade20k", "--any-size")) == 1


def change(table, number, **values):
    return lambda root: edit(root, lambda content: content[table][number].update(values))


@pytest.mark.parametrize(
    ("damage", "path", "words"),
    [
        (remove("val2017"), "val2017", "is not a folder"),
        (remove(JSON), JSON, "No such file"),
        (lambda root: (root / JSON).write_text(""), JSON, "is empty"),
        (lambda root: (root / JSON).write_text('{"images": ['), JSON, "is not JSON"),
        (lambda root: edit(root, lambda content: content["annotations"].clear()), JSON, "has no annotations"),
        (lambda root: edit(root, lambda content: content.pop("categories")), JSON, "has no categories"),
        (lambda root: edit(root, lambda content: content["annotations"][3].pop("bbox")), JSON, "annotations[3]"),
        (change("images", 2, width="128"), JSON, "has no valid 'width' in images[2]"),
        (change("images", 2, id=1), JSON, "has id 1 in images 2 times"),
        (remove("train2017/train_00002.jpg"), "train2017/train_00002.jpg", "is listed in instances_train2017.json"),
        (truncate("train2017/train_00002.jpg"), "train2017/train_00002.jpg", "cannot be read"),
        (change("images", 1, width=200, height=200), "train2017/train_00002.jpg", "has 128x128 pixels"),
        (change("annotations", 0, category_id=11), JSON, "annotation 1, which has the unknown category 11"),
        (change("annotations", 0, image_id=99), JSON, "annotation 1, which is of the unknown image 99"),
        (
            lambda root: edit(
                root, lambda content: content["annotations"][0].update(id=0), JSON.replace("train", "val")
            ),
            JSON.replace("train", "val"),
            "has an annotation of id 0",
        ),
        (change("annotations", 0, bbox=[100, 0, 40, 20]), JSON, "outside train_00001.jpg of 128×128"),
        (change("annotations", 0, bbox=[-5, 0, 40, 20]), JSON, "outside train_00001.jpg"),
        (change("annotations", 0, bbox=[5, 5, -4, 20]), JSON, "outside train_00001.jpg"),
        (change("annotations", 0, bbox=[5, float("nan"), 4, 20]), JSON, "which has the box [5, nan, 4, 20]"),
        (change("annotations", 0, bbox=[5, 5, 4]), JSON, "has the box [5, 5, 4]"),
        (change("annotations", 0, segmentation=[]), JSON, "has no valid segmentation"),
        (change("annotations", 0, segmentation={"counts": [9], "size": [3, 3]}), JSON, "has no valid segmentation"),
    ],
)
def test_coco_faults(capsys, folder, damage, path, words):
    damage(folder)
    lines = check(capsys, folder, *COCO)
    assert any(line.startswith(f"{folder / path} ") and words in line and ": " in line for line in lines)
    assert all(str(folder / path) in line or "segmentation" in line for line in lines)


def every_annotation(**values):
    return lambda root: edit(root, lambda content: [entry.update(values) for entry in content["annotations"]])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (every_annotation(area=0), "each has an area of 0"),
        (every_annotation(bbox=[0.1, 0.1, 0.4, 0.5]), "each has a box in 0…1"),
        (every_annotation(segmentation=[[]]), "each has no polygon of three or more points"),
        (every_annotation(segmentation=[[1, 1, 9, 9]]), "each has no polygon of three or more points"),
        (every_annotation(iscrowd=1), "each is a crowd"),
    ],
)
def test_annotations_that_mmdet_loses(capsys, folder, damage, words):
    damage(folder)
    (line,) = check(capsys, folder, *COCO)
    assert line.startswith(f"{folder / JSON} has ") and "no object to learn" in line and words in line


def test_some_lost_annotations_are_a_note(capsys, folder):
    change("annotations", 2, area=0)(folder)
    (note,) = check(capsys, folder, *COCO, notes=True)
    assert "annotations are lost: 1 because each has an area of 0, the first with id 3" in note


@pytest.mark.parametrize("shape", [[1, 1, 9, 1, 9, 9], [[[1, 1], [9, 1], [9, 9]]]])
def test_polygons_of_another_nesting(capsys, folder, shape):
    change("annotations", 0, segmentation=shape)(folder)
    (line,) = check(capsys, folder, *COCO)
    assert "has the annotation 1, which has no valid segmentation, polygons are lists of numbers in one list" in line


def test_masks_that_pycocotools_would_misread_or_never_finish(capsys, folder):
    for counts, words in (("0", "has run lengths of 0 pixels, its image has 16,384"), ([-1], "neither whole numbers")):
        change("annotations", 0, segmentation={"size": [128, 128], "counts": counts})(folder)
        (line,) = check(capsys, folder, *COCO)
        assert f"{JSON} has the annotation 1, which has" in line and words in line
    change("annotations", 0, segmentation=[[1, 1, 9, 9], [1, 1, 9, 1, 9, 9]], bbox=[1, 1, 8, 8])(folder)
    (note,) = check(capsys, folder, *COCO, notes=True)
    assert "1 annotations lose polygons of fewer than three points, the first with id 1" in note


def test_boxes_that_contradict_their_masks(capsys, folder, monkeypatch):
    monkeypatch.setattr(check_data, "SHOWN", 1000)

    def to_corners(content):
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, x + w, y + h]

    change("annotations", 0, bbox=[1, 1, 2, 2])(folder)
    (note,) = check(capsys, folder, *COCO, notes=True)
    assert "boxes contradict their masks, the first with id 1" in note
    edit(folder, to_corners)
    assert any(
        "boxes that contradict their masks, e.g. of annotation 1: its box is" in line
        for line in check(capsys, folder, *COCO)
    )


def test_small_images_and_files_under_several_ids_are_notes(capsys, folder):
    def damage(content):
        content["images"].append({**content["images"][0], "id": 99})
        content["annotations"].append({**content["annotations"][0], "id": 999, "image_id": 99})
        content["images"].append({"id": 100, "file_name": "small.png", "width": 31, "height": 128})

    edit(folder, damage)
    Image.new("RGB", (31, 128)).save(folder / "train2017" / "small.png")
    several, dropped = check(capsys, folder, *COCO, notes=True)
    assert "1 files are listed under several ids" in several and "e.g. train_00001.jpg under [1, 99]" in several
    assert "training drops 1 of 14 images: 1 without objects of the classes" in dropped
    edit(
        folder,
        lambda content: content["annotations"][-1].update(
            image_id=100, bbox=[1, 1, 5, 5], segmentation=[[1, 1, 6, 1, 6, 6]]
        ),
    )
    dropped = check(capsys, folder, *COCO, notes=True)[-1]
    assert "1 with a side under 32 pixels, e.g. small.png, 1 without objects of the classes" in dropped


def test_files_of_servers_and_systems_are_no_images(capsys, folder):
    for name in ("Thumbs.db", "@eaDir/train_00001.jpg/SYNOPHOTO_THUMB_XL.jpg"):
        for place in ("train2017", "images/training"):
            (folder / place / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / place / name, "JPEG")
    lines = check(capsys, folder, "coco", "--splits", "train2017")
    assert len(lines) == 2 and "has 12 images, expected 118,287" in lines[1]
    assert check(capsys, folder, *ADE20K) == []
    (note,) = check(capsys, folder, *ADE20K, notes=True)
    assert "2 files are skipped, first" in note


def test_a_picture_over_pillows_limit(capsys, folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8000)
    for dataset in ((*ADE20K, "--splits", "validation"), (*COCO, "--splits", "val2017")):
        lines = check(capsys, folder, *dataset)
        assert any("has more than 16,000 pixels, Pillow's limit: cut it into tiles" in line for line in lines)


def test_a_category_listed_twice(capsys, folder):
    edit(folder, lambda content: content["categories"].append({"id": 99, "name": "zero"}))
    (line,) = check(capsys, folder, *COCO, "--splits", "train2017")
    assert "lists the category [zero] more than once" in line


def test_a_file_name_of_another_unicode_form(capsys, folder):
    (folder / "train2017" / "train_00001.jpg").rename(folder / "train2017" / "cafe\u0301.jpg")
    change("images", 0, file_name="caf\u00e9.jpg")(folder)
    (line,) = check(capsys, folder, *COCO)
    assert "missing; 'cafe\u0301.jpg' looks the same, but is in Unicode form NFD, not NFC: rename one" in line


def test_both_files_have_the_same_categories(capsys, folder):
    edit(folder, lambda content: content["categories"].reverse())
    (line,) = check(capsys, folder, *COCO)
    assert "instances_val2017.json lists its categories in a different order" in line
    edit(folder, lambda content: content["categories"].pop(0))
    assert any(
        "has the category nine, missing in instances_train2017.json" in line for line in check(capsys, folder, *COCO)
    )


def test_boxes_of_coco_itself(capsys, folder):
    """COCO has boxes without a height, and some that its rounding puts just outside."""
    change("annotations", 0, bbox=[9.98, 120.0, 15.52, 0.0])(folder)
    change("annotations", 1, bbox=[0.0, 0.0, 128.4, 128.01], segmentation=[[0, 0, 9.5, 0, 9.5, 9]])(folder)
    assert check(capsys, folder, *COCO) == []


def test_a_sample_is_opened_and_full_opens_all(capsys, folder, monkeypatch):
    monkeypatch.setattr(check_data, "SAMPLE", 2)
    for number in range(1, 13):
        truncate(f"images/training/train_{number:05d}.jpg")(folder)
    assert len(check(capsys, folder, *ADE20K)) == 4
    assert len(check(capsys, folder, *ADE20K, "--full")) == 12


def test_many_of_a_kind_are_counted(capsys, folder, monkeypatch):
    monkeypatch.setattr(check_data, "SHOWN", 3)
    for number in range(1, 13):
        remove(f"annotations/training/train_{number:05d}.png")(folder)
    assert check_data.main([*ADE20K[:1], str(folder), *ADE20K[1:]]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[3].startswith("… and 9 more") and "12 problem(s)" in lines[4]


def test_command_line(folder):
    def run(*command):
        return subprocess.run([*map(str, command)], capture_output=True, text=True)

    program = "-m", "scripts.check_data"
    assert run(sys.executable, *program, "coco", folder, "--any-size").returncode == 0
    assert run(sys.executable, *program, "coco", folder / "nothing").returncode == 1
    wrong = run(sys.executable, *program, "coco", folder, "--splits", "val")
    assert wrong.returncode == 2 and "coco has no split 'val': pass train2017 or val2017" in wrong.stderr
    for dataset in ("ade20k", "coco"):
        script = SCRIPTS / f"prepare_{dataset}.sh"
        for arguments, code in (((), 2), (("--help",), 0)):
            result = run("bash", script, *arguments)
            assert result.returncode == code and result.stdout.startswith(f"usage: bash scripts/prepare_{dataset}.sh ")


def test_zero_may_be_a_class_and_masks_may_be_missing(capsys, folder):
    for path in (folder / "annotations").glob("*/*.png"):  # the scenes' background is 0
        Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8)).save(path)
    (line,) = check(capsys, folder, "ade20k", "--any-size", "--classes", "2")
    assert "leaves nothing to learn" in line
    assert check(capsys, folder, "ade20k", "--any-size", "--classes", "2", "--keep-zero") == []
    line = check(capsys, folder, "ade20k", "--any-size", "--classes", "1", "--keep-zero", "--splits", "validation")[0]
    assert "holds label 1, but 0 to 0 and 255 are known: labels are 0 to 0, see --classes and --keep-zero" in line
    edit(folder, lambda content: content["annotations"][0].pop("segmentation"))
    assert any("no valid 'segmentation'" in line for line in check(capsys, folder, *COCO))
    assert check(capsys, folder, *COCO, "--no-masks") == []
