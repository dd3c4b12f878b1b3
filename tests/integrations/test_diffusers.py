"""Plans go into diffusion models and come out again without a trace."""

import copy
import dataclasses
import gc
import weakref
from functools import partial

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (  # noqa: E402
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0  # noqa: E402

from elfatt.conversion import Agent, Head, LayerPlan, Plan  # noqa: E402
from elfatt.integrations import diffusers as adapter  # noqa: E402
from tests.integrations.reversal import check_orders  # noqa: E402

SIZE = 8, 12


def unet():
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ), lambda model, x, t: model(x, t, torch.ones(len(x), 5, 8, dtype=x.dtype)).sample


def unconditional(**changes):
    options = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return UNet2DModel(**options | changes), lambda model, x, t: model(x, t).sample


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
    ), lambda model, x, t: model(x, timestep=t, class_labels=torch.zeros(len(x), dtype=torch.long)).sample


def pixart():
    return (
        PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=8,
            patch_size=1,
            caption_channels=8,
            use_additional_conditions=False,
        ),
        lambda model, x, t: (
            model(
                x,
                encoder_hidden_states=torch.ones(len(x), 5, 8, dtype=x.dtype),
                timestep=t,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        ),
    )


MODELS = {builder.__name__: builder for builder in (unet, unconditional, dit, pixart)}


@pytest.fixture(params=MODELS)
def built(request):
    """A model, and a function from a time step to its output at a map that is no square."""
    torch.manual_seed(0)
    model, call = MODELS[request.param]()
    model.eval()
    for parameter in model.parameters():  # some last layers are zero at first, and would hide everything
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    size = (8, 8) if request.param == "dit" else SIZE  # diffusers' DiT takes squares only
    x = torch.randn(2, 4, *size)

    def run(t=500, x=x, model=model):
        with torch.no_grad():
            return call(model, x, torch.full((len(x),), t))

    run.x = x

    return model, run


def state(model):
    """Everything that apply could leave behind."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "processors": {name: id(layer.processor) for name, layer in adapter.self_attention_layers(model).items()},
        "hooks": {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
    }


def assert_same_state(first, second):
    assert all(torch.equal(tensor, second["tensors"][name]) for name, tensor in first["tensors"].items())
    assert {**first, "tensors": list(first["tensors"])} == {**second, "tensors": list(second["tensors"])}


def uniform(model, **options):
    heads = {name: layer.heads for name, layer in adapter.self_attention_layers(model).items()}
    return Plan.uniform(adapter.name_of(model), heads, **options)


def plan_of(model, head):
    return Plan(
        adapter.name_of(model),
        {name: LayerPlan((head,) * layer.heads) for name, layer in adapter.self_attention_layers(model).items()},
    )


def test_exact_plans_change_no_bit_and_blocks_as_large_as_the_map_little(built):
    model, run = built
    before = run()
    with adapter.apply(model, plan_of(model, Head())):
        assert torch.equal(run(), before)
    with adapter.apply(model, plan_of(model, Head("block", 64))):
        assert not torch.equal(run(), before)
        torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)


def test_a_plan_changes_the_output_and_leaves_without_a_trace(built):
    model, run = built
    before, clean = run(), state(model)
    handle = adapter.apply(model, block=2, min_tokens=0)
    changed = run()
    assert (changed - before).abs().max() > 1e-3 * before.abs().max()
    handle.remove()
    assert torch.equal(run(), before)
    assert_same_state(state(model), clean)
    handle.remove()
    assert_same_state(state(model), clean)


def test_a_deep_copy_keeps_a_plan_of_its_own(built):
    model, run = built
    before = run()
    handle = adapter.apply(model, block=2, min_tokens=0)
    wanted, other = run(), copy.deepcopy(model)
    handle.remove()
    assert torch.equal(run(model=other), wanted) and torch.equal(run(), before)
    adapter.apply(other, plan_of(other, Head())).remove()  # takes the copied plan out first
    assert torch.equal(run(model=other), before)
    assert_same_state({**state(other), "processors": 0}, {**state(model), "processors": 0})


def test_twenty_orders_of_apply_and_remove(built):
    model, run = built
    clean = state(model)
    plans = [uniform(model, block=2), plan_of(model, Head("linear")), plan_of(model, Head("block", 3))]
    check_orders(run, partial(adapter.apply, model), plans, lambda: assert_same_state(state(model), clean))


def test_short_maps_and_other_steps_stay_exact(built):
    model, run = built
    before = [run(900), run(100)]
    with adapter.apply(model, min_tokens=97):
        assert torch.equal(run(900), before[0])
    with adapter.apply(model, block=2, min_tokens=0, steps=(0.0, 0.5), scheduler=DDIMScheduler()):
        assert not torch.equal(run(900), before[0]) and torch.equal(run(100), before[1])


def test_guidance_doubles_the_batch_and_changes_nothing_else(built):
    model, run = built
    x = run.x[:1]
    with adapter.apply(model, block=2, min_tokens=0):
        torch.testing.assert_close(run(x=x.repeat(2, 1, 1, 1)), run(x=x).repeat(2, 1, 1, 1), rtol=1e-4, atol=1e-5)


def test_a_compiled_model_gives_the_same_in_one_graph(built):
    model, run = built
    with adapter.apply(model, block=2, min_tokens=0):
        wanted = run()
        model.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(built, dtype):
    model, run = built
    with adapter.apply(model, block=2, min_tokens=0):
        wanted = run()
        model.to(dtype)
        found = run(x=run.x.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_fused_projections_before_and_after():
    torch.manual_seed(0)
    model, call = unet()
    x, t = torch.randn(2, 4, *SIZE), torch.tensor([500, 500])
    model.eval()
    with torch.no_grad():
        before = call(model, x, t)
        with adapter.apply(model, block=2, min_tokens=0):
            wanted = call(model, x, t)
        model.fuse_qkv_projections()
        handle = adapter.apply(model, block=2, min_tokens=0)
        torch.testing.assert_close(call(model, x, t), wanted, rtol=1e-4, atol=1e-5)
        model.unfuse_qkv_projections()
        handle.remove()
        assert torch.equal(call(model, x, t), before)
        handle = adapter.apply(model, block=2, min_tokens=0)
        model.fuse_qkv_projections()  # puts its own processors in the place of ours, and keeps ours for later
        handle.remove()
        model.unfuse_qkv_projections()
        assert torch.equal(call(model, x, t), before)


@pytest.fixture
def noised():
    """A UNet and a function that runs it."""
    torch.manual_seed(0)
    model, call = unet()
    x, t = torch.randn(2, 4, *SIZE), torch.tensor([500, 500])

    def run():
        with torch.no_grad():
            return call(model.eval(), x, t)

    return model, run


def test_lora_before_and_after(noised):
    peft = pytest.importorskip("peft")
    model, run = noised
    before = run()
    handle = adapter.apply(model, block=2, min_tokens=0)
    replaced = run()
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    both = run()
    handle.remove()
    adapted = run()
    assert (both - replaced).abs().max() > 1e-2 and (adapted - before).abs().max() > 1e-2
    with adapter.apply(model, block=2, min_tokens=0):
        assert torch.equal(run(), both)
        model.delete_adapters("default")
        assert torch.equal(run(), replaced)
    assert torch.equal(run(), before)


@pytest.mark.parametrize("first", ["offload", "apply"])
def test_cpu_offload_before_and_after(noised, first):
    accelerate = pytest.importorskip("accelerate")
    model, run = noised
    before = run()
    handle = adapter.apply(model, block=2, min_tokens=0)
    wanted = run()
    if first == "offload":
        handle.remove()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}  # loaded at each call
    if first == "offload":
        handle = adapter.apply(model, block=2, min_tokens=0)
    assert torch.equal(run(), wanted)
    handle.remove()
    assert torch.equal(run(), before)


def test_other_processors_keep_their_own_attention():
    """diffusers' oldest processor makes explicit products, which nothing intercepts."""
    model, _ = unet()
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(TypeError, match="AttnProcessor .* use AttnProcessor2_0"):
        adapter.apply(model)
    model.set_attn_processor(AttnProcessor2_0())
    adapter.apply(model).remove()


def test_a_pipeline_is_applied_to_and_calibrated():
    torch.manual_seed(0)
    model, _ = dit()
    model.eval()

    pipe = DiTPipeline.__new__(DiTPipeline)
    pipe.transformer, pipe.scheduler = model, DDIMScheduler(num_train_timesteps=500)
    assert adapter.denoiser(pipe) is model
    run = lambda seed: model(  # noqa: E731
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)),
        timestep=torch.tensor([100 * seed]),
        class_labels=torch.tensor([0]),
    )
    clean = state(model)
    with torch.no_grad():
        calibrations = [
            adapter.calibrate(pipe, run, range(3), candidates=(Head("linear"), Head("block", 2))) for _ in range(2)
        ]
    assert_same_state(state(model), clean)
    plans = [calibration.plan(cost=0.5) for calibration in calibrations]
    assert plans[0] == plans[1] and calibrations[0].relative_cost(plans[0]) <= 0.5
    with adapter.apply(pipe, plans[0]):
        pass


def test_calibration_weighs_layers_by_the_output(built):
    model, run = built
    with torch.no_grad():
        calibration = adapter.calibrate(
            model, lambda t: run(t), [500] * adapter.WEIGH_EVERY, candidates=(Head("linear"),)
        )
        bare = adapter.calibrate(model, lambda t: run(t), [500], weigh_every=0)
    assert not any(layer.probe for layer in bare.layers.values())
    exact = run()
    for name, layer in adapter.self_attention_layers(model).items():
        alone = Plan(adapter.name_of(model), {name: LayerPlan((Head("linear"),) * layer.heads)})
        with adapter.apply(model, alone):
            effect = ((run() - exact).norm() / exact.norm()) ** 2
        assert calibration.layers[name].effect == pytest.approx(effect.item(), rel=1e-3) and effect > 0


def test_what_cannot_be_done_is_named():
    torch.manual_seed(0)
    model, call = unet()
    common = {"num_layers": 1, "num_attention_heads": 2, "in_channels": 4, "joint_attention_dim": 8}
    common |= {"pooled_projection_dim": 8, "attention_head_dim": 16}
    joint = SD3Transformer2DModel(
        sample_size=8, caption_projection_dim=32, out_channels=4, pos_embed_max_size=8, **common
    )
    flux = FluxTransformer2DModel(num_single_layers=1, axes_dims_rope=(4, 4, 8), **common)
    for other in (joint, flux):
        with pytest.raises(TypeError, match=f"{type(other).__name__} is not supported: .*joint attention"):
            adapter.apply(other)
    with pytest.raises(TypeError, match="Linear is not supported"):
        adapter.apply(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="plans with LePE are supported for ViTs only"):
        adapter.apply(model, dataclasses.replace(uniform(model), lepe=True))
    with pytest.raises(ValueError, match="the plan was made for UNet2DConditionModel-"):
        adapter.apply(dit()[0], uniform(model))
    for steps in ((0.5, 0.5), (-1, 1), (0, 2)):
        with pytest.raises(ValueError, match="must be two increasing fractions between 0 and 1"):
            adapter.apply(model, steps=steps)
    for options in ({"steps": (0, 0.6)}, {"plan": Agent()}):
        with pytest.raises(ValueError, match="counted in the scheduler's timesteps: pass the pipeline, or scheduler="):
            adapter.apply(model, **options)
    none, _ = unconditional(
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    with pytest.raises(TypeError, match="UNet2DModel has no self-attention"):
        adapter.apply(none)


def test_a_model_that_nobody_holds_goes_with_what_was_applied():
    model, _ = dit()
    adapter.apply(model, block=2, min_tokens=0)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
