"""What the dense programs do before and around mmengine's Runner, without a training run."""

import json
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from elfatt.data import UserError
from elfatt.integrations import mm_models, mm_runner
from elfatt.ops import active_backend, set_default_backend
from segmentation import inference, test, train
from tests.integrations.dense import CONFIGS
from tests.integrations.miniature import options, segmentation_config, write_ade20k, write_coco


def build_dataloader(scope, dataset):
    mm_models._register(scope)
    loader = {"batch_size": 1, "num_workers": 0, "sampler": {"type": "DefaultSampler", "shuffle": False}}
    with DefaultScope.overwrite_default_scope(scope):
        return mm_runner.CheckedRunner.build_dataloader({**loader, "dataset": dataset})


def wrap(dataset):
    repeated = {"type": "RepeatDataset", "times": 2, "dataset": dataset}
    return {"type": "ConcatDataset", "datasets": [dataset, repeated]}


def test_wrapped_masks_are_read_and_checked(tmp_path):
    prefix = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    root = write_ade20k(tmp_path / "data")
    dataset = wrap({"type": "ADE20KDataset", "data_root": str(root), "data_prefix": prefix})
    assert len(build_dataloader("mmseg", dataset).dataset) == 4 + 2 * 4
    for path in (root / "images" / "training").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="images/training contains no usable image"):
        build_dataloader("mmseg", dataset)


def test_wrapped_instances_are_read_and_checked(tmp_path):
    root = write_coco(tmp_path / "data")
    file = root / "annotations" / "instances_val2017.json"
    dataset = wrap({"type": "CocoDataset", "ann_file": str(file), "data_prefix": {"img": str(root / "val2017")}})
    assert len(build_dataloader("mmdet", dataset).dataset) == 2 + 2 * 2
    content = json.loads(file.read_text())
    for categories, message in (
        ([{"id": 1, "name": "person"}], "names 1 of the 80 classes"),
        ([{**c, "name": c["name"].upper()} for c in content["categories"]], "names 0 of the 80 classes"),
        (None, "has no categories"),
    ):
        changed = {key: value for key, value in (content | {"categories": categories}).items() if value is not None}
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"val2017\.json {message}"):
            build_dataloader("mmdet", dataset)


@pytest.mark.parametrize("pipeline", ["train_pipeline", "test_pipeline"])
@pytest.mark.parametrize(
    ("image", "annotation", "message"),
    [
        ({"width": 95}, {}, r"0\.jpg has 96x64 pixels .* says 95x64"),
        (
            {},
            {"segmentation": {"size": [96, 64], "counts": [0, 6144]}},
            r"annotation 1, .* run lengths of size \[96, 64\]",
        ),
        ({}, {"segmentation": []}, "annotation 1, which has no valid segmentation, it is empty: write a list of"),
        ({}, {"segmentation": {"size": [64, 96], "counts": [0, 6144]}}, None),
    ],
    ids=["size", "run lengths", "none", "valid"],
)
def test_instances_belong_to_their_image(tmp_path, pipeline, image, annotation, message):
    root = write_coco(tmp_path / "data")
    file = root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["images"][0].update(image)
    content["annotations"][0].update(annotation)
    file.write_text(json.dumps(content))
    dataset = {"type": "CocoDataset", "ann_file": str(file), "data_prefix": {"img": str(root / "val2017")}}
    steps = Config.fromfile(CONFIGS / "detection" / "mask_rcnn_swin_tiny_elfatt_1x.py")[pipeline]
    if message:
        with pytest.raises(UserError, match=message):
            build_dataloader("mmdet", {**dataset, "pipeline": steps})
    else:
        dataset = build_dataloader("mmdet", {**dataset, "pipeline": steps}).dataset
        assert dataset[0]["data_samples"].gt_instances.masks.masks[0].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.py"], "config no.py is not a file"),
        (["CONFIG", "--data-dir", "nowhere"], "--data-dir nowhere is not a folder"),
        (["CONFIG", "--work-dir", "ROOTLESS"], "--work-dir .*rootless.py is a file: pass a folder"),
        (["CONFIG", "--pretrained", "no.pth"], "pretrained no.pth is not a file"),
        (["CONFIG", "--resume", "no.pth"], "resume no.pth is not a file"),
        (["CONFIG", "--launcher", "slurm"], "--launcher slurm needs one GPU .* scripts/slurm/train.sbatch"),
        (["CONFIG", "--cfg-options", "backend=fast"], "unknown backend 'fast': choose one of auto, "),
        (["CONFIG", "--backend", "flash_attn"], "backend 'flash_attn' cannot run: it "),
        (["ROOTLESS", "--data-dir", "."], "--data-dir overrides data_root, which .*rootless.py does not define"),
    ],
)
def test_what_cannot_be_trained_with_ends_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rootless = tmp_path / "rootless.py"
    rootless.write_text("model = dict()\n")
    files = {"CONFIG": str(segmentation_config(tmp_path)), "ROOTLESS": str(rootless)}
    with pytest.raises(SystemExit, match=f"^segmentation/train.py: error: {message}[^\n]*$"):
        train.main([files.get(word, word) for word in arguments])


@pytest.mark.parametrize(
    ("program", "arguments"), [(train, ["CONFIG"]), (test, ["CONFIG", "x"]), (inference, ["CONFIG", "x", "y", "z"])]
)
def test_an_unknown_backend_takes_one_line(program, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main([*arguments, "--backend", "fast"])
    assert stop.value.code == 2
    assert "error: argument --backend: invalid choice: 'fast'" in capsys.readouterr().err.splitlines()[-1]


def test_the_backend_is_the_options_or_the_configs_or_the_ambient_one(tmp_path):
    def chosen(*options, more=""):
        config = str(segmentation_config(tmp_path, more=more))
        name = mm_runner._config(mm_runner.parse_train([config, *options], "segmentation"), "segmentation").backend
        assert active_backend() == name
        return name

    set_default_backend("sdpa")
    assert chosen() == "sdpa"
    assert chosen(more="backend = 'math'") == "math"
    assert chosen("--backend", "reference", more="backend = 'math'") == "reference"


def test_without_tensorboard_the_other_logs_are_written(tmp_path, monkeypatch, capsys):
    args = mm_runner.parse_train([str(segmentation_config(tmp_path))], "segmentation")
    assert len(mm_runner._config(args, "segmentation").visualizer.vis_backends) == 2
    monkeypatch.setattr(mm_runner, "find_spec", lambda name: None)
    (kept,) = mm_runner._config(args, "segmentation").visualizer.vis_backends
    assert kept.type == "LocalVisBackend"
    assert capsys.readouterr().err == "warning: no TensorBoard logs: pip install tensorboard\n"


def test_resume_takes_a_value():
    with pytest.raises(SystemExit):
        train.main(["--resume"])


def test_augmented_evaluation_needs_a_pipeline(tmp_path):
    weights = tmp_path / "weights.pth"
    weights.touch()
    with pytest.raises(SystemExit, match=r"error: --tta: .*scenes_nano\.py has no tta_pipeline"):
        test.main([str(CONFIGS / "segmentation" / "scenes_nano.py"), str(weights), "--tta"])


def test_no_worker_is_kept_where_there_is_none(tmp_path):
    more = "train_dataloader.update(num_workers=2)\nval_dataloader.update(num_workers=0)"
    config = segmentation_config(tmp_path, more=more)
    keep = "test_dataloader.num_workers=1"
    args = mm_runner.parse_train(options(config, tmp_path, tmp_path / "run", "--cfg-options", keep), "segmentation")
    loaded = mm_runner._config(args, "segmentation")
    kept = [loaded[f"{name}_dataloader"].persistent_workers for name in ("train", "val", "test")]
    assert kept == [True, False, True]


AMP = {"type": "AmpOptimWrapper", "loss_scale": "dynamic"}
PLAIN = {"type": "OptimWrapper"}


@pytest.mark.parametrize(
    ("gpu", "configured", "amp", "expected"),
    [
        (True, AMP, None, AMP),
        (True, PLAIN, None, PLAIN),
        (True, PLAIN, True, AMP),
        (True, {**AMP, "dtype": "bfloat16"}, True, {**AMP, "dtype": "bfloat16"}),
        (True, {**AMP, "dtype": "bfloat16"}, False, PLAIN),
        (False, AMP, None, PLAIN),
        (False, AMP, False, PLAIN),
    ],
)
def test_precision(monkeypatch, gpu, configured, amp, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    wrapper = ConfigDict(configured)
    mm_runner._choose_precision(wrapper, amp)
    assert wrapper == expected


def test_mixed_precision_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--amp needs a GPU"):
        mm_runner._choose_precision(ConfigDict(AMP), True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="mixed precision needs a GPU")
def test_a_step_in_mixed_precision(tmp_path):
    data = write_ade20k(tmp_path / "data")
    runner = train.main(options(segmentation_config(tmp_path, steps=1), data, tmp_path / "run", "--amp"))
    wrapper = runner.optim_wrapper
    assert type(wrapper).__name__ == "AmpOptimWrapper" and wrapper.loss_scaler.get_scale() > 1
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in runner.model.parameters())


def test_a_checkpoint_without_optimizer_is_not_resumed(monkeypatch):
    runner = object.__new__(mm_runner.CheckedRunner)
    runner._resume, runner._train_loop, runner.visualizer = True, {}, SimpleNamespace(dataset_meta=None)
    monkeypatch.setattr(Runner, "load_checkpoint", lambda *args, **kwargs: {"state_dict": {}})
    with pytest.raises(UserError, match=r"best\.pth has no optimizer state: .* --cfg-options load_from=best\.pth"):
        runner.load_checkpoint("best.pth")
    runner._resume = False
    assert runner.load_checkpoint("best.pth") == {"state_dict": {}}


@pytest.mark.parametrize("given", [None, 3, 4])
def test_the_seed_is_the_resumed_runs(tmp_path, monkeypatch, given):
    lines, path = [], tmp_path / "iter_1.pth"
    monkeypatch.setattr(mm_runner, "warn", lines.append)
    torch.save({"meta": {"seed": 3}}, path)
    config = Config(
        {"load_from": str(path)} | ({"randomness": {"seed": given, "deterministic": True}} if given else {})
    )
    mm_runner._resume_seed(config)
    assert config.randomness == {"seed": 3} | ({"deterministic": True} if given else {})
    assert lines == (["randomness.seed=4 has no effect: the resumed run's seed is 3"] if given == 4 else [])


@pytest.mark.parametrize(
    ("out_dir", "folder"), [(None, "runs/a"), ("elsewhere", "elsewhere/a"), ("WORK_DIR", "runs/a")]
)
def test_checkpoints_are_sought_where_mmengine_writes_them(tmp_path, monkeypatch, out_dir, folder):
    monkeypatch.chdir(tmp_path)
    out_dir = str(tmp_path / "runs/a") if out_dir == "WORK_DIR" else out_dir
    config = Config({"work_dir": "runs/a/", "default_hooks": {"checkpoint": {"out_dir": out_dir}}})
    assert mm_runner._checkpoint_folder(config).resolve() == tmp_path / folder
