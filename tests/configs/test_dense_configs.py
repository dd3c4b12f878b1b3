"""Every configuration of segmentation and detection: its header, its recipe, its model."""

import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import DefaultScope

from elfatt.analysis.paper import load_table
from elfatt.analysis.rows import OTHERS
from elfatt.integrations.mm_models import build_model
from tests.integrations.dense import CONFIGS, ROOT

FILES = sorted(
    str(path.relative_to(CONFIGS))
    for task in ("segmentation", "detection")
    for path in (CONFIGS / task).glob("*_*_*.py")
)
RATES = {"cswin_base": 0.6, "convnext": 0.4, "vmamba": 0.2}  # stochastic depth in segmentation, else 0.3
AGENT = tuple(f"{table}_bias" for table in ("an", "na", "ah", "aw", "ha", "wa"))
SPARED = ("relative_position_bias_table", *AGENT)
SEGMENTATION = [name for name in FILES if name.startswith("segmentation")]
DETECTION = [name for name in FILES if name.startswith("detection")]


def load(name):
    return Config.fromfile(CONFIGS / name)


def expected_header(name):
    if name in DETECTION:
        model, _, schedule = name.removeprefix("detection/mask_rcnn_").removesuffix(".py").rpartition("_")
        rows = [r for r in load_table(6) if r["schedule"].lower() == schedule]
    else:
        model, rows = name.removeprefix("segmentation/upernet_").removesuffix(".py"), load_table(7)
    for row in rows:
        if model == (f"{row['backbone']}_{row['attention']}" if row["attention"] else OTHERS[row["model"]]):
            if "ap_box" in row:
                return f"# paper: {row['ap_box']} box AP, {row['ap_mask']} mask AP"
            return f"# paper: {row['miou_percent']} % mIoU, {row['macc_percent']} % mAcc"
    return "# paper: not reported"


def test_all_files_are_there():
    assert len(SEGMENTATION) == 4 * 6 + 2 and len(DETECTION) == 2 * (2 * 6 + 2)


@pytest.mark.parametrize("name", FILES)
def test_header(name):
    command, hardware, paper = (CONFIGS / name).read_text().splitlines()[:3]
    script, config = shlex.split(command.removeprefix("# "))[1:3]
    assert (ROOT / script).is_file() and ROOT / config == CONFIGS / name
    assert hardware == "# hardware: 8 GPUs"
    assert paper == expected_header(name)


@pytest.mark.parametrize("name", FILES)
def test_model_builds_and_norms_do_not_decay(name):
    config = load(name)
    model = build_model(config)
    settings = config.optim_wrapper
    assert settings.type == "AmpOptimWrapper" and settings.loss_scale == "dynamic"
    with DefaultScope.overwrite_default_scope(config.default_scope):
        construct = DefaultOptimWrapperConstructor(
            {"type": "OptimWrapper", "optimizer": settings.optimizer}, settings.paramwise_cfg
        )
        optimizer = construct(model).optimizer
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    found = {id(group["params"][0]): group["weight_decay"] for group in optimizer.param_groups}
    norms = {id(p) for m in model.backbone.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
    for key, parameter in model.named_parameters():
        spared = id(parameter) in norms or key.endswith(SPARED)
        assert found[id(parameter)] == (0 if spared else settings.optimizer.weight_decay), key


# of the first level; each further one has twice as many
CHANNELS = {"swin_tiny": 96, "swin_base": 128, "cswin_tiny": 64, "cswin_base": 96, "convnext_tiny": 96, "vmamba": 96}


def library_config(library, file):
    return Config.fromfile(Path(find_spec(library).submodule_search_locations[0], ".mim", "configs", file))


@cache
def library_model(library, file):
    """The model of a library's own base configuration, without its backbone."""
    return flatten(library_config(library, f"_base_/models/{file}").model)


def flatten(model, prefix=""):
    fields = {}
    for key, value in model.items():
        if prefix + key != "backbone":
            fields |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return fields


def differences(model, other):
    """The fields that only one of the two has, or that are not equal, with the values of the first."""
    return {key: model.get(key) for key in model.keys() | other.keys() if model.get(key) != other.get(key)}


def kind(type, **fields):
    return {"type": type, **fields}


ADE20K_IMAGE = [kind("LoadImage")]
ADE20K_MASK = [kind("LoadAnnotations", reduce_zero_label=True), kind("CheckMask", num_classes=150)]
ADE20K_TRAIN = [
    *ADE20K_IMAGE,
    *ADE20K_MASK,
    kind("RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    kind("RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75),
    kind("RandomFlip", prob=0.5),
    kind("PhotoMetricDistortion"),
    kind("PackSegInputs"),
]
ADE20K_TEST = [
    *ADE20K_IMAGE,
    kind("Resize", scale=(2048, 512), keep_ratio=True),
    *ADE20K_MASK,
    kind("PackSegInputs"),
]
ADE20K_SCALES = [(1024, 256), (1536, 384), (2048, 512), (2560, 640), (3072, 768), (3584, 896)]
ADE20K_TTA = [
    *ADE20K_IMAGE,
    kind(
        "TestTimeAug",
        transforms=[
            [kind("Resize", scale=scale, keep_ratio=True) for scale in ADE20K_SCALES],
            [kind("RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)],
            *([step] for step in ADE20K_MASK),
            [kind("PackSegInputs")],
        ],
    ),
]
ADE20K_SCHEDULE = [
    kind("LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    kind("PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000),
]


@pytest.mark.parametrize("name", SEGMENTATION)
def test_ade20k_recipe(name):
    config = load(name)
    assert config.optim_wrapper.optimizer == kind("AdamW", betas=(0.9, 0.999), lr=6e-5, weight_decay=0.01)
    assert config.param_scheduler == ADE20K_SCHEDULE
    assert config.train_cfg == kind("IterBasedTrainLoop", max_iters=160000, val_interval=16000)
    assert config.default_hooks.checkpoint.interval == 16000 and not config.default_hooks.checkpoint.by_epoch
    train, val = config.train_dataloader, config.val_dataloader
    assert (train.batch_size, train.dataset.pipeline) == (2, ADE20K_TRAIN)
    assert train.sampler == kind("InfiniteSampler", shuffle=True)
    assert (val.batch_size, val.dataset.pipeline) == (1, ADE20K_TEST) and config.test_dataloader == val
    assert (config.tta_pipeline, config.tta_model) == (ADE20K_TTA, kind("SegTTAModel"))
    assert config.val_evaluator == config.test_evaluator == kind("IoUMetric", iou_metrics=["mIoU"])
    assert config.sync_bn == "torch"
    first = next(channels for size, channels in CHANNELS.items() if f"_{size}" in name)
    in_channels = {
        "decode_head.in_channels": [first, 2 * first, 4 * first, 8 * first],
        "auxiliary_head.in_channels": 4 * first,
    }
    assert differences(flatten(config.model), library_model("mmseg", "upernet_swin.py") | in_channels) == {
        "data_preprocessor.size": (512, 512),
        "decode_head.norm_cfg.type": "BN",  # and sync_bn
        "auxiliary_head.norm_cfg.type": "BN",
        "decode_head.num_classes": 150,
        "auxiliary_head.num_classes": 150,
    }
    backbone = config.model.backbone
    assert backbone.get("block_size") == (14 if "swin" in name else None)
    assert backbone.drop_path_rate == next((rate for part, rate in RATES.items() if part in name), 0.3)


COCO_IMAGE = [kind("LoadImage")]
COCO_INSTANCES = [kind("CheckInstances"), kind("LoadAnnotations", with_bbox=True, with_mask=True)]
COCO_RESIZE = [kind("Resize", scale=(1333, 800), keep_ratio=True)]
COCO_FLIP = [kind("RandomFlip", prob=0.5)]
COCO_1X = [*COCO_IMAGE, *COCO_INSTANCES, *COCO_RESIZE, *COCO_FLIP, kind("PackDetInputs")]
COCO_META = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
COCO_TEST = [*COCO_IMAGE, *COCO_RESIZE, *COCO_INSTANCES, kind("PackDetInputs", meta_keys=COCO_META)]
# behind the annotations, the augmentation of mmdet's Swin, which ConvNeXt, Agent and VMamba train with too
COCO_3XMS = [
    *COCO_IMAGE,
    *COCO_INSTANCES,
    *library_config("mmdet", "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py").train_pipeline[2:],
]


@pytest.mark.parametrize("name", DETECTION)
def test_coco_recipe(name):
    config = load(name)
    pipeline, epochs, drops = (COCO_3XMS, 36, [27, 33]) if name.endswith("_3xms.py") else (COCO_1X, 12, [8, 11])
    assert config.optim_wrapper.optimizer == kind("AdamW", betas=(0.9, 0.999), lr=1e-4, weight_decay=0.05)
    assert config.param_scheduler == [
        kind("LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=1000),
        kind("MultiStepLR", begin=0, end=epochs, by_epoch=True, milestones=drops, gamma=0.1),
    ]
    assert config.train_cfg == kind("EpochBasedTrainLoop", max_epochs=epochs, val_interval=1)
    train, val = config.train_dataloader, config.val_dataloader
    assert (train.batch_size, train.dataset.pipeline) == (2, pipeline)
    assert (train.sampler, train.batch_sampler) == (
        kind("DefaultSampler", shuffle=True),
        kind("AspectRatioBatchSampler"),
    )
    assert train.dataset.filter_cfg == {"filter_empty_gt": True, "min_size": 32}
    assert (val.batch_size, val.dataset.pipeline) == (1, COCO_TEST) and config.test_dataloader == val
    assert config.val_evaluator.metric == ["bbox", "segm"] and config.test_evaluator == config.val_evaluator
    first = next(channels for size, channels in CHANNELS.items() if f"_{size}" in name)
    in_channels = {"neck.in_channels": [first, 2 * first, 4 * first, 8 * first]}
    assert differences(flatten(config.model), library_model("mmdet", "mask-rcnn_r50_fpn.py")) == in_channels
    assert config.model.backbone.drop_path_rate == 0.2
    assert config.model.backbone.get("block_size") == (14 if "swin" in name else None)
