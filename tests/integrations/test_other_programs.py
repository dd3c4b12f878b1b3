"""Converted models in programs of others: threads, checkpointing, compilers, wrappers and patches."""

import copy
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from diffusers import DDIMScheduler  # noqa: E402

import elfatt  # noqa: E402
from elfatt.conversion.handle import ConvertedLayer, handle_of  # noqa: E402
from elfatt.integrations import diffusers as diffusers_adapter  # noqa: E402
from elfatt.integrations import transformers as transformers_adapter  # noqa: E402
from tests.integrations import test_diffusers, test_timm, test_transformers  # noqa: E402

SIZES = (40, 56), (56, 40), (24, 64)  # pixels of ViTs, two maps of equally many tokens; of latents, a quarter


class Case:
    """A model of each adapter, called in one way.

    Args:
        model: The model.
        call: Maps the model and an input to its output.
        convert: Converts the model.
        blocks: Modules that are checkpointed.
    """

    def __init__(self, model, call, convert, blocks, scale=1, channels=3):
        self.model, self.call, self.convert, self.blocks = model.eval(), call, convert, blocks
        self.scale, self.channels = scale, channels

    def inputs(self, size, batch=2):
        return torch.randn(batch, self.channels, *(side // self.scale for side in size))

    def run(self, x, model=None):
        with torch.no_grad():
            return self.call(self.model if model is None else model, x)


def timm_case():
    model = test_timm.vit(reg_tokens=1)
    return Case(model, lambda m, x: m(x), partial(elfatt.convert, block=2), list(model.blocks))


def eva_case():
    model = test_timm.eva(use_rot_pos_emb=True)
    return Case(model, lambda m, x: m(x), partial(elfatt.convert, block=2), list(model.blocks))


def transformers_case():
    model = test_transformers.MODELS["ViT"]()
    return Case(
        model,
        lambda m, x: m(pixel_values=x, interpolate_pos_encoding=True)[0],
        partial(transformers_adapter.convert, block=2),
        list(model.layers),
    )


def unet_case():
    model, call = test_diffusers.unet()
    blocks = [m for m in model.modules() if type(m).__name__ == "BasicTransformerBlock"]
    return Case(
        model,
        lambda m, x: call(m, x, torch.full((len(x),), 500)),
        partial(diffusers_adapter.apply, block=2, min_tokens=0),
        blocks,
        scale=4,
        channels=4,
    )


def pixart_case():
    model, call = test_diffusers.pixart()
    return Case(
        model,
        lambda m, x: call(m, x, torch.full((len(x),), 500)),
        partial(diffusers_adapter.apply, block=2, min_tokens=0),
        list(model.transformer_blocks),
        scale=4,
        channels=4,
    )


CASES = {
    builder.__name__.removesuffix("_case"): builder
    for builder in (timm_case, eva_case, transformers_case, unet_case, pixart_case)
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    found = CASES[request.param]()
    for parameter in found.model.parameters():  # small weights would hide everything
        if parameter.abs().max() < 0.2:
            nn.init.normal_(parameter, std=0.2)
    found.name = request.param
    return found


def test_threads_share_a_converted_model(case):
    inputs = [case.inputs(size) for size in SIZES]
    with case.convert(case.model):
        wanted = [case.run(x) for x in inputs]
        barrier = threading.Barrier(8)

        def serve(seed):
            chance = random.Random(seed)
            barrier.wait()
            picks = [chance.randrange(len(inputs)) for _ in range(25)]
            return [torch.equal(case.run(inputs[i]), wanted[i]) for i in picks]

        with ThreadPoolExecutor(8) as pool:
            answers = sum(pool.map(serve, range(8)), [])
    assert len(answers) == 200 and all(answers)


def test_threads_at_different_steps():
    torch.manual_seed(0)
    model, call = test_diffusers.unet()
    x = torch.randn(2, 4, 8, 12)
    times = (900, 500, 100)

    def run(t):
        with torch.no_grad():
            return call(model.eval(), x, torch.full((2,), t))

    with diffusers_adapter.apply(model, block=2, min_tokens=0, steps=(0, 0.6), scheduler=DDIMScheduler()):
        wanted = {t: run(t) for t in times}
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: torch.equal(run(times[i % 3]), wanted[times[i % 3]]), range(60)))
    assert all(found)


def gradients(case, inputs):
    case.model.zero_grad()
    for parameter in case.model.parameters():
        parameter.requires_grad_(True)
    sum(case.call(case.model, x).square().mean() for x in inputs).backward()
    return {name: p.grad.clone() for name, p in case.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_checkpointing_recomputes_each_call_with_its_own_map(case, reentrant, monkeypatch):
    inputs = [case.inputs(size) for size in SIZES]
    (kind,) = {type(block) for block in case.blocks}
    call = kind.__call__

    def checkpointed(self, *args, **kwargs):
        def run(*given):
            return call(self, *given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))

        return checkpoint(run, *args, *kwargs.values(), use_reentrant=reentrant)

    with case.convert(case.model):
        wanted = gradients(case, inputs)
        monkeypatch.setattr(kind, "__call__", checkpointed)
        found = gradients(case, inputs)
        monkeypatch.undo()
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_models_own_checkpointing(case):
    inputs = [case.inputs(size) for size in SIZES]
    case.model.train()
    with case.convert(case.model):
        wanted = gradients(case, inputs)
        if hasattr(case.model, "set_grad_checkpointing"):
            case.model.set_grad_checkpointing()
        elif hasattr(case.model, "gradient_checkpointing_enable"):
            case.model.gradient_checkpointing_enable()
        else:
            case.model.enable_gradient_checkpointing()
        found = gradients(case, inputs)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_recomputation_of_an_unknown_call_is_refused():
    case = timm_case()
    x = case.inputs(SIZES[0])
    with case.convert(case.model):
        tokens = case.model.patch_embed(x).flatten(1, 2)
        tokens = torch.cat([torch.zeros(2, 2, 32), tokens], dim=1).requires_grad_()
        out = checkpoint(lambda t: case.model.blocks[0].attn(t * 2), tokens, use_reentrant=False)
        with pytest.raises(RuntimeError, match="blocks.0.attn is recomputed in the backward pass of an unknown call"):
            out.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_conversion_reaches_a_model_compiled_before(case, how):
    if case.name in ("eva", "unet"):  # the same ways, slowly
        pytest.skip("as timm and pixart")
    torch._dynamo.reset()
    x = case.inputs((32, 32))
    before = case.run(x)
    compiled = case.model
    if how == "wrapper":
        compiled = torch.compile(case.model, backend="eager")
    else:
        case.model.compile(backend="eager")
    torch.testing.assert_close(case.run(x, compiled), before)
    with case.convert(case.model):
        found = case.run(x, compiled)
        assert (found - before).abs().max() > 1e-4 * before.abs().max()
    torch.testing.assert_close(case.run(x, compiled), before)
    case.model._compiled_call_impl = None
    with case.convert(case.model):
        torch.testing.assert_close(found, case.run(x), rtol=1e-4, atol=1e-5)


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, ConvertedLayer)]


@pytest.mark.parametrize("first", ["convert", "assign"])
def test_forward_methods_that_others_assign_are_kept(case, first):
    """As accelerate's hooks do, which keep the method they found."""
    x, calls = case.inputs(SIZES[0]), []
    with case.convert(case.model):
        wanted, layers = case.run(x), layers_of(case.model)
    before = case.run(x)

    def assign():
        for layer in layers:
            layer.forward = partial(lambda old, *a, **k: (calls.append(1), old(*a, **k))[1], layer.forward)

    if first == "assign":
        assign()
    handle = case.convert(case.model)
    if first == "convert":
        assign()
    assert torch.equal(case.run(x), wanted) and len(calls) == len(layers)
    handle.remove()
    assert torch.equal(case.run(x), before) and len(calls) == 2 * len(layers)


def test_replicas_use_their_own_weights(case):
    """As those of DataParallel, which copy each module's attributes."""
    x = case.inputs(SIZES[0])
    with case.convert(case.model):
        other = copy.deepcopy(case.model)
        for parameter in other.parameters():
            parameter.data.mul_(0.9)
        wanted = case.run(x, other)
        replicas = {module: module._replicate_for_data_parallel() for module in case.model.modules()}
        sources = dict(zip(case.model.modules(), other.modules(), strict=True))
        for module, replica in replicas.items():
            for name, child in module._modules.items():
                replica._modules[name] = child and replicas[child]
            for name, parameter in sources[module]._parameters.items():
                replica._parameters[name] = parameter
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(case.run, x, replicas[case.model]).result(), wanted)


def test_a_pickled_model_stays_converted(case):
    x = case.inputs(SIZES[0])
    before = case.run(x)
    with case.convert(case.model):
        wanted, other = case.run(x), pickle.loads(pickle.dumps(case.model))
    assert torch.equal(case.run(x, other), wanted)
    case.convert(other).remove()
    assert torch.equal(case.run(x, other), before)
    assert [type(m) for m in other.modules()] == [type(m) for m in case.model.modules()]


def test_copies_of_single_layers_stay_with_the_model(case):
    """As peft makes them for modules that are trained in full."""
    x = case.inputs(SIZES[0])
    before = case.run(x)
    handle = case.convert(case.model)
    wanted = case.run(x)
    for layer in layers_of(case.model):
        parent, _, child = layer._elfatt_binding.name.rpartition(".")
        case.model.get_submodule(parent)._modules[child] = copy.deepcopy(layer)
    assert torch.equal(case.run(x), wanted)
    handle.remove()
    assert torch.equal(case.run(x), before)


def explicit(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    return torch.softmax(q @ k.mT * (scale or q.shape[-1] ** -0.5), dim=-1) @ v


def test_attention_that_is_not_pytorchs_is_an_error(case, monkeypatch):
    x = case.inputs(SIZES[0])
    original = F.scaled_dot_product_attention
    with case.convert(case.model):
        wanted = case.run(x)
        names = [layer._elfatt_binding.name for layer in layers_of(case.model)]
        monkeypatch.setattr(F, "scaled_dot_product_attention", explicit)
        with pytest.raises(RuntimeError, match="^the plan did not run in .*: no call of PyTorch's scaled_dot") as met:
            case.run(x)
        assert all(name in str(met.value) for name in names)
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: original(*args, **kwargs))
        assert torch.equal(case.run(x), wanted)  # one that ends in PyTorch's is intercepted there


def test_layers_that_the_model_passes_over_are_named(case):
    x = case.inputs(SIZES[0])
    with case.convert(case.model):
        (layer, *_) = layers = layers_of(case.model)
        name = layer._elfatt_binding.name
        parent = case.model.get_submodule(name.rpartition(".")[0])
        child = name.rpartition(".")[2]
        passes = {"forward": lambda self, x, *_, **__: (x, None) if case.name == "transformers" else x}
        parent._modules[child] = type("Other", (nn.Module,), passes)()
        with pytest.raises(RuntimeError, match=f"^{name} did not run in the model's forward"):
            case.run(x)
        parent._modules[child] = layer
        case.run(x)
        assert len(layers) > 1


@pytest.mark.parametrize("change", ["dropped", "added"])
def test_tokens_without_a_map_keep_exact_attention(case, change):
    """As patch dropout, masked autoencoders, prompts and grounding tokens leave them."""
    if case.name == "eva":
        pytest.skip("its rotary embeddings fit no other tokens")
    x = case.inputs(SIZES[0])

    def alter(block, args, kwargs):
        tokens = args[0]
        tokens = tokens[:, : tokens.shape[1] // 2] if change == "dropped" else torch.cat([tokens, tokens[:, :3]], 1)
        return (tokens, *args[1:]), kwargs

    def leave(block, args, out):
        raise Stop(out)

    block = case.blocks[0]
    hook = block.register_forward_pre_hook(alter, with_kwargs=True)
    stop = block.register_forward_hook(leave)
    try:
        outputs = []
        for converted in (False, True):
            handle = case.convert(case.model) if converted else None
            with pytest.raises(Stop) as met:
                if converted:
                    with pytest.warns(UserWarning, match=r"keeps exact attention: \d+ tokens are not .* have no map"):
                        case.run(x)
                else:
                    case.run(x)
            out = met.value.args[0]
            outputs.append(out[0] if isinstance(out, tuple) else out)
            if handle:
                handle.remove()
    finally:
        hook.remove()
        stop.remove()
    assert torch.equal(*outputs)


class Stop(Exception):
    """Ends a forward with a block's output."""


def test_a_layer_called_alone_stays_exact():
    case = timm_case()
    tokens = torch.randn(2, 37, 32)
    with torch.no_grad():
        wanted = case.model.blocks[0](tokens)
        with (
            case.convert(case.model),
            pytest.warns(UserWarning, match="blocks.0.attn keeps exact attention: it runs outside its model's forward"),
        ):
            assert torch.equal(case.model.blocks[0](tokens), wanted)


class Orders:
    """A ViT and what programs do to it besides converting it."""

    def __init__(self, build):
        torch.manual_seed(0)
        self.case, self.lora, self.offloaded = build(), False, False

    def offload(self):
        if self.offloaded:
            accelerate.hooks.remove_hook_from_submodules(self.case.model)
        else:
            accelerate.cpu_offload(self.case.model, execution_device=torch.device("cpu"))
        self.offloaded = not self.offloaded

    def adapt(self):
        if not self.lora and not self.offloaded:
            torch.manual_seed(1)
            config = peft.LoraConfig(r=2, target_modules=["qkv", "q_proj", "o_proj"], init_lora_weights=False)
            peft.inject_adapter_in_model(config, self.case.model)
            self.lora = True

    def copy(self):
        if not self.offloaded:
            self.case.model = copy.deepcopy(self.case.model)

    def checkpoint(self):
        model = self.case.model
        (getattr(model, "set_grad_checkpointing", None) or model.gradient_checkpointing_enable)()

    def run(self, size):
        torch.manual_seed(2)
        return self.case.run(self.case.inputs(size))


@pytest.mark.slow
@pytest.mark.parametrize("build", [timm_case, transformers_case])
def test_random_orders_of_what_programs_do(build):
    """The output is that of a conversion made anew, and in the end that of a twin that never had one."""
    chance = random.Random(0)
    for _ in range(20):
        subject, twin, block = Orders(build), Orders(build), 0
        for _ in range(chance.randint(2, 8)):
            operation = chance.choice(["convert", "convert", "remove", "offload", "adapt", "copy", "checkpoint"])
            if operation == "convert":
                block = chance.choice([2, 3, 4])
                subject.case.convert(subject.case.model, block=block)
            elif operation == "remove":
                handle = handle_of(subject.case.model)
                if handle:
                    handle.remove()
                block = 0
            else:
                getattr(subject, operation)()
                getattr(twin, operation)()
            size = chance.choice(SIZES)
            found = subject.run(size)
            with twin.case.convert(twin.case.model, block=block) if block else nullcontext():
                assert torch.equal(found, twin.run(size))
        if handle := handle_of(subject.case.model):
            handle.remove()
        assert torch.equal(subject.run(SIZES[0]), twin.run(SIZES[0]))
        for one, other in zip(subject.case.model.modules(), twin.case.model.modules(), strict=True):
            assert type(one) is type(other) and vars(one).keys() == vars(other).keys()


class Other(nn.Module):
    """Attention that no adapter knows."""

    def forward(self, x, *args, **kwargs):
        return (x, None) if args or kwargs.keys() >= {"attention_mask"} else x


@pytest.mark.parametrize("build", [timm_case, transformers_case])
def test_blocks_that_cannot_be_converted_are_named(build):
    case = build()
    block = case.blocks[1]
    name = "attn" if hasattr(block, "attn") else "attention"
    setattr(block, name, Other())
    with pytest.warns(UserWarning, match=r"no attention in \w+.1 of \w+-32-1 can be converted: it stays as it is"):
        case.convert(case.model)
    case.run(case.inputs(SIZES[0]))


def test_symbolic_tracing_is_refused():
    model = test_timm.vit(dynamic_img_size=False).eval()
    torch.fx.symbolic_trace(model)
    with (
        elfatt.convert(model),
        pytest.raises(TypeError, match="torch.fx cannot trace the converted blocks.0.attn: use torch.export"),
    ):
        torch.fx.symbolic_trace(model)


def test_layers_that_others_cut_off_are_not_missed():
    case = timm_case()
    elfatt.convert(case.model, block=2)
    case.model.prune_intermediate_layers([0])
    case.run(case.inputs(SIZES[0]))


@pytest.mark.parametrize("part", ["layer", "block"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_forward_methods_that_are_checkpointed(case, part, reentrant):
    inputs = [case.inputs(size) for size in SIZES]
    with case.convert(case.model):
        wanted = gradients(case, inputs)
        for module in layers_of(case.model) if part == "layer" else case.blocks:
            module.forward = checkpointed(module.forward, reentrant)
        found = gradients(case, inputs)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def checkpointed(forward, reentrant):
    def run(*args, **kwargs):
        def call(*given):
            return forward(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))

        return checkpoint(call, *args, *kwargs.values(), use_reentrant=reentrant)

    return run


def test_a_forward_checkpointed_before_the_conversion_is_refused():
    case = timm_case()
    for block in case.model.blocks:
        block.attn.forward = checkpointed(block.attn.forward, True)
    with (
        case.convert(case.model),
        pytest.raises(RuntimeError, match="blocks.0.attn.forward was replaced before the conversion .* convert first"),
    ):
        case.model.train()(case.inputs(SIZES[0]))


@pytest.mark.slow
@pytest.mark.parametrize("build", [timm_case, pixart_case])
def test_blocks_that_are_compiled_and_checkpointed(build):
    torch._dynamo.reset()
    torch.manual_seed(0)
    case = build()
    inputs = [case.inputs(size) for size in SIZES]
    case.model.train()
    with case.convert(case.model):
        wanted = gradients(case, inputs)
        for block in case.blocks:
            block.compile(backend="eager")
        (getattr(case.model, "set_grad_checkpointing", None) or case.model.enable_gradient_checkpointing)()
        found = gradients(case, inputs)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_attention_in_hooks_is_not_replaced():
    case, other, seen = timm_case(), test_timm.vit().blocks[0].attn.eval(), []
    x = case.inputs(SIZES[0])
    case.model.blocks[0].attn.register_forward_pre_hook(lambda layer, args: seen.append(other(args[0])))
    case.run(x)
    with case.convert(case.model):
        case.run(x)
    assert torch.equal(*seen)


def test_images_embedded_one_after_the_other():
    """Their blocks cannot tell whose map is theirs, although the numbers of tokens are equal."""
    case = timm_case()
    model, inputs = case.model, [case.inputs(size) for size in SIZES[:2]]

    def interleaved():
        with torch.no_grad():
            tokens = [model._pos_embed(model.patch_embed(x)) for x in inputs]
            return [model.blocks(x) for x in tokens]

    wanted = interleaved()
    with case.convert(model), pytest.warns(UserWarning, match="images of several sizes were embedded before"):
        assert all(torch.equal(*pair) for pair in zip(interleaved(), wanted, strict=True))
    with torch.no_grad(), case.convert(model):
        features = [model.forward_features(x) for x in inputs]
        assert torch.equal(model.forward_head(features[0]), model(inputs[0]))


def test_layers_of_another_converted_model_are_refused():
    first, second = timm_case(), timm_case()
    second.model.blocks = first.model.blocks
    with (
        first.convert(first.model),
        pytest.raises(ValueError, match="blocks.0.attn is shared with a converted VisionTransformer: remove()"),
    ):
        second.convert(second.model)


def test_a_copy_whose_blocks_come_before_their_model(case):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.net = nn.ModuleList(case.blocks), case.model

    x = case.inputs(SIZES[0])
    with case.convert(case.model):
        wanted, copied = case.run(x), copy.deepcopy(Wrapper()).net
    assert torch.equal(case.run(x, copied), wanted)
    before = case.run(x)
    handle_of(copied).remove()
    assert torch.equal(case.run(x, copied), before)


def test_a_mask_that_a_program_passes_is_kept():
    case = transformers_case()
    x = case.inputs((32, 32))
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[:, 5] = 0
    with torch.no_grad():
        wanted = case.model(x, attention_mask=mask)[0]
        for run in (case.model, case.model.forward):
            with case.convert(case.model), pytest.warns(UserWarning, match="it has a mask"):
                assert torch.equal(run(x, attention_mask=mask)[0], wanted)
