"""Plans in vision encoders of transformers, and the attention implementation of its own."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from elfatt.conversion import Head, LayerPlan, Plan  # noqa: E402
from elfatt.integrations import transformers as adapter  # noqa: E402

SIZE = 40, 56  # pixels: maps of 5 × 7 tokens of 8 × 8
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}

MODELS = {
    "ViT": lambda **options: ViTModel(ViTConfig(**VISION, **options), add_pooling_layer=False),
    "DINOv2": lambda **options: Dinov2Backbone(Dinov2Config(**VISION, **options)),
    "registers": lambda **options: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**VISION, num_register_tokens=3, **options)
    ),
    "DINOv3": lambda **options: DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=2, **options)),
    "CLIP": lambda **options: CLIPVisionModel(CLIPVisionConfig(**VISION, **options)),
    "SigLIP": lambda **options: SiglipVisionModel(SiglipVisionConfig(**VISION, **options)),
}
INTERPOLATE = ("ViT", "CLIP", "SigLIP")


@pytest.fixture(params=MODELS)
def built(request):
    """A model, and a function from images, by default no squares, to its output."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():  # small layer scales and biases would hide everything
        if parameter.abs().max() < 0.2:
            torch.nn.init.normal_(parameter, std=0.2)
    options = {"interpolate_pos_encoding": True} if request.param in INTERPOLATE else {}

    default = torch.randn(2, 3, *SIZE)

    def run(model=model, images=default):
        with torch.no_grad():
            out = model(pixel_values=images, **options)[0]
        return out[-1] if isinstance(out, tuple) else out

    run.name = request.param
    return model, run


def plan_of(model, *heads):
    found = adapter.vit_of(model)
    return Plan(found.name, {name: LayerPlan((heads * count)[:count]) for name, count in found.heads.items()})


def state(model):
    """Everything that convert could leave behind."""
    return {
        "implementation": model.config._attn_implementation,
        "hooks": {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
    }


def test_exact_plans_change_no_bit_and_blocks_as_large_as_the_map_little(built):
    model, run = built
    before = run()
    with adapter.convert(model, plan_of(model, Head())):
        assert torch.equal(run(), before)
    with adapter.convert(model, plan_of(model, Head("block", 64), Head())):
        torch.testing.assert_close(run(), before, rtol=1e-5, atol=1e-5)


def test_a_plan_changes_the_output_and_leaves_without_a_trace(built):
    model, run = built
    before, clean, keys = run(), state(model), list(model.state_dict())
    first = adapter.vit_of(model)
    one = Plan(first.name, dict([next(iter(plan_of(model, Head("block", 2)).layers.items()))]))
    handle = adapter.convert(model, one)
    alone = run()
    adapter.convert(model, block=2)
    both = run()
    assert len({x.flatten()[-1].item() for x in (before, alone, both)}) == 3
    assert list(model.state_dict()) == keys
    handle.remove()  # no longer applied
    assert torch.equal(run(), both)
    adapter.convert(model, block=2).remove()
    assert torch.equal(run(), before) and state(model) == clean


def test_layers_get_the_map_and_its_prefix(built):
    model, run = built
    seen = {}

    def attend(layer, q, k, v, size, *, prefix, scale):
        seen[layer] = q.shape, size, prefix, scale
        return torch.zeros_like(q)

    found = adapter.vit_of(model)
    with found.handle(found, attend, found.layers):
        run()
    prefix = {"registers": 4, "DINOv3": 3, "SigLIP": 0}.get(run.name, 1)
    assert set(seen) == set(found.layers)
    assert set(seen.values()) == {((2, prefix + 35, 4, 8), (5, 7), prefix, 8**-0.5)}


def test_a_layer_that_a_plan_leaves_out_runs_as_it_was():
    torch.manual_seed(0)
    model, images = MODELS["ViT"]().eval(), torch.randn(2, 3, 32, 32)
    layers = plan_of(model, Head("block", 4)).layers  # as large as the map
    plan = Plan(adapter.vit_of(model).name, dict([next(iter(layers.items()))]))
    with torch.no_grad(), adapter.convert(model, plan):
        found = model(images, output_hidden_states=True).hidden_states
    with torch.no_grad():
        wanted = model.layers[1](found[1]) if hasattr(model, "layers") else model.encoder.layer[1](found[1])
    assert torch.equal(found[2], wanted[0] if isinstance(wanted, tuple) else wanted)


def test_calibration_keeps_to_its_budget(built):
    model, run = built
    before, images = run(), torch.randn(2, 3, *SIZE)
    calibration = adapter.calibrate(model, [images], candidates=(Head("block", 2),))
    plan = calibration.plan(cost=0.6)
    assert calibration.relative_cost(plan) <= 0.6
    with adapter.convert(model, images=images, budget=0.6) as handle:
        assert run.name != "DINOv3" or "linear" not in str(handle.plan)
        assert not torch.equal(run(), before)
    assert torch.equal(run(), before)


def test_a_deep_copy_keeps_a_plan_of_its_own(built):
    model, run = built
    before = run()
    handle = adapter.convert(model, block=2)
    wanted, other = run(), copy.deepcopy(model)
    handle.remove()
    assert torch.equal(run(other), wanted) and torch.equal(run(), before)
    adapter.convert(other).remove()
    assert torch.equal(run(other), before)


def test_the_implementation_is_the_uniform_plan_at_the_size_of_the_configuration(built, tmp_path):
    model, run = built
    images = torch.randn(2, 3, 32, 32)
    with adapter.convert(model):
        wanted = run(images=images)
    before = run(images=images)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="elfatt").eval()
    assert torch.equal(run(loaded, images), wanted)
    if run.name != "DINOv3":  # exact heads, and blocks as large as the map
        assert not torch.equal(wanted, before)
    loaded.set_attn_implementation("sdpa")
    assert torch.equal(run(loaded, images), before)
    loaded.set_attn_implementation("elfatt")
    with pytest.raises(ValueError, match=r"tokens do not match the config's \d \+ 4 × 4: .*convert\(model\)"):
        run(loaded)
    with adapter.convert(loaded):
        run(loaded)


def test_the_vision_side_alone_of_a_model_of_images_and_text():
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 20, "bos_token_id": 18, "eos_token_id": 19}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).eval()
    inputs = {"input_ids": torch.tensor([[18, 3, 4, 19]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad():
        before = model(**inputs)
        with adapter.convert(model, block=2):
            found = model(**inputs)
        assert not torch.equal(found.image_embeds, before.image_embeds)
        assert torch.equal(found.text_embeds, before.text_embeds)
        model.set_attn_implementation({"vision_config": "elfatt"})
        assert torch.equal(model(**inputs).text_embeds, before.text_embeds)
        model.set_attn_implementation("elfatt")
        with pytest.raises(ValueError, match="CLIPAttention is not part of a vision encoder supported by elfatt"):
            model(**inputs)


@pytest.mark.parametrize(
    "text",
    [CLIPTextModel(CLIPTextConfig(**SMALL, vocab_size=20)), SiglipTextModel(SiglipTextConfig(**SMALL, vocab_size=20))],
    ids=["causal", "padded"],
)
def test_text_is_refused(text):
    text.set_attn_implementation("elfatt")
    with pytest.raises(ValueError, match="Attention is not part of a vision encoder supported by elfatt: use .*'sdpa'"):
        text(torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[1, 1, 0]]))


def test_masked_attention_stays_exact_and_dropout_is_refused():
    torch.manual_seed(0)
    model, images = MODELS["ViT"]().eval(), torch.randn(1, 3, 32, 32)
    mask = torch.ones(1, 17, dtype=torch.long)
    mask[:, 5] = 0
    with torch.no_grad():
        wanted = model(images, attention_mask=mask)[0]
        with (
            adapter.convert(model, block=2),
            pytest.warns(UserWarning, match="layers.0.attention keeps exact attention: it has a mask"),
        ):
            assert torch.equal(model(images, attention_mask=mask)[0], wanted)
    model.set_attn_implementation("elfatt")
    with pytest.raises(ValueError, match="elfatt supports no masks, causal attention or dropout"):
        model(images, attention_mask=mask)
    dropping = MODELS["ViT"](attention_probs_dropout_prob=0.1).train()
    with adapter.convert(dropping), pytest.raises(ValueError, match="drops attention weights, .* set the rate to 0"):
        dropping(images)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="ModuleList contains 2 supported vision encoders"):
        adapter.convert(torch.nn.ModuleList([MODELS["ViT"](), MODELS["CLIP"]()]))
    with pytest.raises(
        TypeError, match="Linear contains no supported vision encoders, expected one of ViT, Dinov2, .*Siglip"
    ):
        adapter.convert(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the plan was made for ViTModel-32-2, not for CLIPVision"):
        adapter.convert(MODELS["CLIP"](), plan_of(ViTForImageClassification(ViTConfig(**VISION)), Head()))


def test_a_shared_config_is_not_changed():
    config = ViTConfig(**VISION)
    torch.manual_seed(0)
    first, second = (ViTModel(config, add_pooling_layer=False).eval() for _ in range(2))
    kept, implementation = config.to_dict(), config._attn_implementation
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = [model(images)[0] for model in (first, second)]
        one = adapter.convert(first, block=2)
        assert torch.equal(second(images)[0], wanted[1]) and not torch.equal(first(images)[0], wanted[0])
        two = adapter.convert(second, block=2)
        one.remove()
        assert torch.equal(first(images)[0], wanted[0]) and not torch.equal(second(images)[0], wanted[1])
        two.remove()
        assert torch.equal(second(images)[0], wanted[1])
    assert config.to_dict() == kept and config._attn_implementation == implementation


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_any_implementation_is_converted(built, implementation):
    model, run = built
    with adapter.convert(model, block=2):
        wanted = run()
    model.set_attn_implementation(implementation)
    before = run()
    with adapter.convert(model, block=2):
        assert torch.equal(run(), wanted)
        assert model.config._attn_implementation == implementation
    assert torch.equal(run(), before)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["convert", "implementation"])
def test_compiled_and_exported_without_a_mask(built, how):
    """transformers makes a mask while it traces, which no caller passed."""
    model, run = built
    if how == "implementation" and run.name not in ("ViT", "DINOv3"):
        pytest.skip("as ViT")
    images, options = torch.randn(1, 3, 32, 32), {"interpolate_pos_encoding": True} if run.name in INTERPOLATE else {}
    if how == "convert":
        adapter.convert(model, block=2)
    else:
        model.set_attn_implementation("elfatt")

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            out = self.model(pixel_values=x, **options)[0]
            return out[-1] if isinstance(out, tuple) else out

    features = Features()
    with torch.no_grad():
        wanted = features(images)
        torch._dynamo.reset()
        compiled = torch.compile(features, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), wanted, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(features, (images,), strict=False).module()
        torch.testing.assert_close(exported(images), wanted, rtol=1e-4, atol=1e-5)
        traced = torch.jit.trace(features, (images,))
        torch.testing.assert_close(traced(images), wanted, rtol=1e-4, atol=1e-5)
