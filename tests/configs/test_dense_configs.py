"""Every configuration of segmentation and detection: its header, its recipe, its model."""

import shlex

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import DefaultScope

from elfatt.analysis.paper import OTHERS, load_table
from tests.integrations.dense import CONFIGS, ROOT, build

FILES = sorted(
    str(path.relative_to(CONFIGS))
    for task in ("segmentation", "detection")
    for path in (CONFIGS / task).glob("*_*_*.py")
)
RATES = {"cswin_base": 0.6, "convnext": 0.4, "vmamba": 0.2}  # stochastic depth in segmentation, else 0.3
SPARED = ("relative_position_bias_table", "A_logs", "Ds", "dt_projs_bias")
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
    return "# paper: no figure"


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
    model = build(config)
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


@pytest.mark.parametrize("name", SEGMENTATION)
def test_ade20k_recipe(name):
    config = load(name)
    assert (config.optim_wrapper.optimizer.lr, config.optim_wrapper.optimizer.weight_decay) == (6e-5, 0.01)
    warm_up, decay = config.param_scheduler
    assert (warm_up.start_factor, warm_up.end, decay.power, decay.eta_min, decay.end) == (1e-6, 1500, 1.0, 0.0, 160000)
    assert (config.train_cfg.max_iters, config.train_cfg.val_interval) == (160000, 16000)
    assert config.default_hooks.checkpoint.interval == 16000
    assert (config.train_dataloader.batch_size, config.val_dataloader.batch_size) == (2, 1)
    assert config.sync_bn == "torch"
    head, auxiliary = config.model.decode_head, config.model.auxiliary_head
    assert (head.channels, head.pool_scales, head.dropout_ratio, head.num_classes) == (512, (1, 2, 3, 6), 0.1, 150)
    assert (auxiliary.in_index, auxiliary.channels, auxiliary.num_convs) == (2, 256, 1)
    assert (head.loss_decode.loss_weight, auxiliary.loss_decode.loss_weight) == (1.0, 0.4)
    backbone = config.model.backbone
    assert "swin" not in name or backbone.block_size == 14
    rate = next((rate for part, rate in RATES.items() if part in name), 0.3)
    assert backbone.drop_path_rate == rate
    scales = [t.scale for t in config.tta_pipeline[1].transforms[0]]
    assert scales == [(1024, 256), (1536, 384), (2048, 512), (2560, 640), (3072, 768), (3584, 896)]


@pytest.mark.parametrize("name", DETECTION)
def test_coco_recipe(name):
    config = load(name)
    long = name.endswith("_3xms.py")
    assert (config.optim_wrapper.optimizer.lr, config.optim_wrapper.optimizer.weight_decay) == (1e-4, 0.05)
    warm_up, steps = config.param_scheduler
    assert (warm_up.start_factor, warm_up.end, warm_up.by_epoch) == (1e-3, 1000, False)
    assert steps.milestones == ([27, 33] if long else [8, 11])
    assert (config.train_cfg.max_epochs, config.train_cfg.val_interval) == (36 if long else 12, 1)
    assert config.train_dataloader.batch_size == 2
    assert config.model.backbone.drop_path_rate == 0.2
    assert config.val_evaluator.metric == ["bbox", "segm"]
    pipeline = config.train_dataloader.dataset.pipeline
    if long:
        resize = {"type": "RandomChoiceResize", "scales": [(s, 1333) for s in range(480, 801, 32)], "keep_ratio": True}
        plain, cropped = pipeline[3].transforms
        assert plain == [resize] and cropped[2] == resize
        assert [s[0] for s in cropped[0].scales] == [400, 500, 600] and cropped[1].crop_size == (384, 600)
    else:
        assert pipeline[2].scale == (1333, 800) and pipeline[3].prob == 0.5
