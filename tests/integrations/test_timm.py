"""Plans go into ViTs of timm and come out again without a trace."""

import copy
import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM

import elfatt
from elfatt.conversion import Head, LayerPlan, Plan
from elfatt.conversion.handle import Call
from elfatt.integrations import timm as adapter
from tests.integrations.reversal import check_orders

SIZE = 40, 56  # pixels: maps of 5 × 7 tokens of 8 × 8
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "num_classes": 5, "dynamic_img_size": True}


def vit(**options):
    return VisionTransformer(img_size=32, **{**SMALL, **options})


def eva(**options):
    return Eva(img_size=32, **{**SMALL, **options})


def entry(name, **options):
    return timm.create_model(name, **{**SMALL, "img_size": 32, **options})


def sam():
    options = {key: value for key, value in SMALL.items() if key != "dynamic_img_size"}
    relative = {"use_rel_pos": True, "window_size": 3, "global_attn_indexes": (1,)}
    return VisionTransformerSAM(img_size=SIZE, neck_chans=16, **relative, **options)


MODELS = {
    "class token": vit,
    "registers": lambda: vit(reg_tokens=3, init_values=1.0),
    "no class token": lambda: vit(class_token=False, global_pool="avg", reg_tokens=2),
    "qk-norm": lambda: vit(qk_norm=True, pre_norm=True, no_embed_class=True),
    "parallel scaling": lambda: vit(block_fn=ParallelScalingBlock),
    "parallel things": lambda: vit(block_fn=ParallelThingsBlock),
    "DINOv2": lambda: entry("vit_small_patch14_reg4_dinov2"),
    "CLIP": lambda: entry("vit_base_patch16_clip_224"),
    "SigLIP": lambda: entry("vit_base_patch16_siglip_224"),
    "MAE": lambda: entry("vit_base_patch16_224.mae"),
    "DeiT": lambda: entry("deit_tiny_distilled_patch16_224"),
    "DeiT III": lambda: entry("deit3_small_patch16_224"),
    "EVA": eva,
    "EVA-02": lambda: eva(use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    "DINOv3": lambda: entry("vit_small_patch16_dinov3"),
    "SAM": sam,
}
POSITIONS = {"EVA-02", "DINOv3", "SAM"}  # between queries and keys


@pytest.fixture(params=MODELS)
def built(request):
    """A model, a function from pictures to its output, and whether positions enter between queries and keys."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():  # layer scales and biases that are zero would hide everything
        if parameter.abs().max() < 0.1:
            torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, *SIZE)

    def run(model=model, images=images):
        with torch.no_grad():
            return model(images)

    run.images, run.positions = images, request.param in POSITIONS
    return model, run


def plan_of(model, *heads):
    return Plan(
        adapter.vit_of(model).name,
        {name: LayerPlan((heads * count)[:count]) for name, count in adapter.vit_of(model).heads.items()},
    )


def state(model):
    """Everything that convert could leave behind."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "hooks": {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()},
        "attributes": {name: {k: v for k, v in vars(m).items() if k[0] != "_"} for name, m in model.named_modules()},
    }


def assert_same_state(first, second):
    assert all(torch.equal(tensor, second["tensors"][name]) for name, tensor in first["tensors"].items())
    assert {**first, "tensors": list(first["tensors"])} == {**second, "tensors": list(second["tensors"])}


def test_exact_plans_change_no_bit_and_blocks_as_large_as_the_map_little(built):
    model, run = built
    before = run()
    with elfatt.convert(model, plan_of(model, Head())):
        assert torch.equal(run(), before)
    with elfatt.convert(model, plan_of(model, Head("block", 64))):
        torch.testing.assert_close(run(), before, rtol=1e-5, atol=1e-5)
    with elfatt.convert(model, plan_of(model, Head("block", 64), Head())):
        torch.testing.assert_close(run(), before, rtol=1e-5, atol=1e-5)


def test_the_uniform_plan_changes_the_output_and_leaves_without_a_trace(built):
    model, run = built
    before, clean = run(), state(model)
    handle = elfatt.convert(model, block=2)
    branches = [head.branch for layer in handle.plan.layers.values() for head in layer.heads]
    assert set(branches) == ({"exact", "block"} if run.positions else {"linear", "block"})
    assert (run() - before).abs().max() > 1e-3 * before.abs().max()
    assert list(model.state_dict()) == list(clean["tensors"])
    handle.remove()
    assert torch.equal(run(), before)
    assert_same_state(state(model), clean)
    handle.remove()
    assert_same_state(state(model), clean)


def test_layers_get_the_map_and_its_prefix(built):
    model, run = built
    seen = {}

    def attend(layer, q, k, v, size, *, prefix, scale):
        seen[layer] = q.shape, size, prefix
        return torch.zeros_like(q)

    found = adapter.vit_of(model)
    with found.handle(found, attend, found.layers):
        run()
    prefix, width = getattr(model, "num_prefix_tokens", 0), 8 + (5 + 7) * isinstance(model, VisionTransformerSAM)
    assert set(seen) == set(found.layers)
    assert set(seen.values()) == {((2, prefix + 35, 4, width), (5, 7), prefix)}


def test_twenty_orders_of_convert_and_remove():
    torch.manual_seed(0)
    model, images = vit(reg_tokens=1).eval(), torch.randn(2, 3, *SIZE)
    clean = state(model)

    def run():
        with torch.no_grad():
            return model(images)

    plans = [plan_of(model, Head("block", 2)), plan_of(model, Head("linear")), plan_of(model, Head("block", 3), Head())]
    check_orders(run, partial(elfatt.convert, model), plans, lambda: assert_same_state(state(model), clean))


def test_calibration_keeps_to_its_budget(built):
    model, run = built
    before, images = run(), run.images
    model.blocks[0].train()
    calibration = adapter.calibrate(model, [images[:1], images[1:]], candidates=(Head("block", 2),))
    assert model.blocks[0].training and not model.blocks[1].training
    model.eval()
    plan = calibration.plan(cost=0.6)
    assert calibration.relative_cost(plan) <= 0.6
    assert all(layer.effect > 0 for layer in calibration.layers.values())
    with elfatt.convert(model, images=images, budget=0.6) as handle:
        assert {head.branch for layer in handle.plan.layers.values() for head in layer.heads} > {"exact"}
        assert not run.positions or "linear" not in str(handle.plan)
        assert not torch.equal(run(), before)
    assert torch.equal(run(), before)


def test_a_lepe_is_zero_at_first_and_adds_a_convolution_of_the_values(built):
    model, run = built
    clean, plan = state(model), plan_of(model, Head("block", 2))
    with elfatt.convert(model, plan):
        wanted = run()
    handle = elfatt.convert(model, dataclasses.replace(plan, lepe=True))
    assert torch.equal(run(), wanted)
    torch.manual_seed(0)
    layers = adapter.vit_of(model).layers
    prefix = getattr(model, "num_prefix_tokens", 0)
    v = torch.randn(2, prefix + 35, 4, 8)
    handle.enter(Call((5, 7), prefix))
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.lepe.weight)
        torch.nn.init.normal_(layer.lepe.bias)
        with torch.no_grad():
            out = handle.attention(name, layer, v, v, v, None) - handle.attend(name, v, v, v, (5, 7), prefix=prefix)
            map = v[:, prefix:].reshape(2, 5, 7, 32).permute(0, 3, 1, 2)
            convolved = layer.lepe(map).permute(0, 2, 3, 1).reshape(2, 35, 4, 8)
        torch.testing.assert_close(out[:, prefix:], convolved, rtol=1e-4, atol=1e-4)
        assert prefix == 0 or out[:, :prefix].abs().max() < 1e-5
    assert (run() - wanted).abs().max() > 1e-4
    handle.remove()
    assert_same_state(state(model), clean)


def test_plans_go_through_files_and_stay_with_their_model(tmp_path):
    model = vit()
    elfatt.convert(model, images=torch.randn(1, 3, *SIZE)).plan.to_json(tmp_path / "plan.json")
    elfatt.convert(model, Plan.from_json(tmp_path / "plan.json")).remove()
    with pytest.raises(ValueError, match="made for VisionTransformer-32-2, not for VisionTransformer-32-3"):
        elfatt.convert(vit(depth=3), Plan.from_json(tmp_path / "plan.json"))


def test_other_forms_of_a_model():
    torch.manual_seed(0)
    model = vit().eval()
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad(), elfatt.convert(model, block=2):
        wanted = model.forward_intermediates(images, intermediates_only=True)
        other = copy.deepcopy(model)
    with torch.no_grad():
        for found, map in zip(other.forward_intermediates(images, intermediates_only=True), wanted, strict=True):
            assert torch.equal(found, map)  # a copy keeps a plan of its own
        elfatt.convert(other).remove()
        assert torch.equal(other(images), model(images))
        features = timm.create_model(
            "vit_tiny_patch16_224", features_only=True, out_indices=1, **{**SMALL, "img_size": 32}
        ).eval()
        before = features(images)[-1]
        with elfatt.convert(features, block=2):
            assert not torch.equal(features(images)[-1], before)
        assert torch.equal(features(images)[-1], before)


def test_gradients_are_those_of_the_exact_model_where_the_plan_is_exact():
    model, images = vit(), torch.randn(2, 3, *SIZE)
    model(images).sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    for plan, close in ((plan_of(model, Head("block", 64)), True), (plan_of(model, Head("linear")), False)):
        model.zero_grad()
        with elfatt.convert(model, plan):
            model(images).sum().backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(gradient.isfinite().all() for gradient in found)
        same = [torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(found, wanted, strict=True)]
        assert all(same) == close


def test_explicit_products_are_replaced_as_well():
    torch.manual_seed(0)
    set_fused_attn(False)
    try:
        model = vit().eval()
    finally:
        set_fused_attn(True)
    assert not model.blocks[0].attn.fused_attn
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        before = model(images)
        with elfatt.convert(model, block=2):
            assert (model(images) - before).abs().max() > 1e-5
        assert not model.blocks[0].attn.fused_attn and torch.equal(model(images), before)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_in_one_graph():
    torch.manual_seed(0)
    model, images = vit(reg_tokens=1).eval(), torch.randn(2, 3, *SIZE)
    with torch.no_grad(), elfatt.convert(model, block=2):
        wanted = model(images)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), wanted, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_done_is_named():
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, depths=(1, 1), num_heads=(1, 1), img_size=56)
    with pytest.raises(
        TypeError, match="SwinTransformer contains no supported ViTs, expected one of timm's VisionTransformer"
    ):
        elfatt.convert(swin)
    with pytest.raises(TypeError, match="ModuleList contains 2 supported ViTs"):
        elfatt.convert(torch.nn.ModuleList([vit(), vit()]))
    with pytest.raises(TypeError, match="blocks.0.attn has attn_drop=0.1: build the model with attn_drop_rate=0"):
        elfatt.convert(vit(attn_drop_rate=0.1))
    model = eva(use_rot_pos_emb=True)
    with pytest.raises(ValueError, match="blocks.0.attn has rotary or relative positions, .* use exact or block"):
        elfatt.convert(model, plan_of(model, Head("linear")))
    with pytest.raises(ValueError, match="has layer 'blocks.9.attn'"):
        elfatt.convert(vit(), Plan("VisionTransformer-32-2", {"blocks.9.attn": LayerPlan((Head(),) * 4)}))
    with pytest.raises(ValueError, match="pass either a plan or images to calibrate one, not both"):
        elfatt.convert(vit(), plan_of(vit(), Head()), images=torch.randn(1, 3, *SIZE))
    with pytest.raises(TypeError, match="plan='plan.json' must be a Plan: read a file with Plan.from_json"):
        elfatt.convert(vit(), "plan.json")
    with pytest.raises(ValueError, match=r"cost=1.5 .* must be in \(0, 1\]"):
        elfatt.convert(vit(), images=torch.randn(1, 3, *SIZE), budget=1.5)


@pytest.mark.slow
def test_the_guide_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[2] / "docs" / "pretrained.md").read_text()
    for example in re.findall(r"```python\n(.*?)```", guide, re.S):
        if "transformers" in example:
            pytest.importorskip("transformers")
        exec(example, {})
