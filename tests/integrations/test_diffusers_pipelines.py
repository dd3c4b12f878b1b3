"""Plans in pipelines: schedulers of every kind, adapters, offloading and processors that come and go."""

import copy
import pickle
import random
import warnings

import pytest
import torch

pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

import diffusers  # noqa: E402
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline  # noqa: E402

from elfatt.conversion import Agent, Head, agent  # noqa: E402
from elfatt.conversion.handle import handle_of  # noqa: E402
from elfatt.integrations import diffusers as adapter  # noqa: E402
from tests.integrations.test_diffusers import plan_of, unet, uniform  # noqa: E402

ORDERS = 10  # 25 for each of eight seeds pass, too, in two minutes
SCHEDULERS = {
    "DDIM": {},
    "PNDM": {"skip_prk_steps": True},
    "EulerDiscrete": {"use_karras_sigmas": True},
    "EulerAncestralDiscrete": {},
    "HeunDiscrete": {},
    "DPMSolverMultistep": {"use_karras_sigmas": True, "algorithm_type": "dpmsolver++"},
    "UniPCMultistep": {},
    "LCM": {},
    "EDMEuler": {},
}


def pipeline(kind=StableDiffusionPipeline, name="DDIM", model=None):
    torch.manual_seed(0)
    model = model or unet()[0].eval()
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old configurations
        pipe = kind(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            unet=model,
            scheduler=getattr(diffusers, f"{name}Scheduler")(**SCHEDULERS.get(name, {})),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, steps=10):
    image = isinstance(pipe, StableDiffusionImg2ImgPipeline)
    what = {"image": torch.zeros(1, 3, 8, 16), "strength": 0.5} if image else {"height": 8, "width": 16}
    pipe(
        prompt_embeds=torch.ones(1, 5, 8),
        negative_prompt_embeds=torch.zeros(1, 5, 8),
        num_inference_steps=steps,
        output_type="latent",
        **what,
    )


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline], ids=["text", "image"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_are_counted_in_the_schedulers_own(kind, name):
    """The first steps of each run, however its scheduler names them and wherever it begins."""
    pipe, calls = pipeline(kind, name), []

    def attend(layer, q, k, v, size, **_):
        if layer == first:
            calls[-1] = True
        return v

    first = next(iter(adapter.self_attention_layers(pipe.unet)))
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(False))
    with adapter.apply(pipe, attend, steps=(0, 0.6)):
        generate(pipe)
    early = sum(calls)
    assert calls == [True] * early + [False] * (len(calls) - early)
    assert early == pytest.approx(0.6 * len(calls), abs=1)


def test_a_scheduler_set_later_is_the_one_that_counts():
    pipe = pipeline()
    ran = []
    with adapter.apply(pipe, lambda layer, q, k, v, size, **_: (ran.append(layer), v)[1], steps=(0, 0.5)):
        pipe.scheduler = diffusers.EDMEulerScheduler()
        generate(pipe)
    assert len(ran) == 5 * len(set(ran))


def test_a_timestep_that_is_none_of_the_schedulers_stays_exact():
    model, call = unet()
    x = torch.randn(2, 4, 8, 12)
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(10)
    with torch.no_grad():
        wanted = call(model.eval(), x, torch.full((2,), 500))
        with (
            adapter.apply(model, block=2, min_tokens=0, steps=(0, 0.6), scheduler=scheduler),
            pytest.warns(UserWarning, match="timestep .*500.* is none of the scheduler's; pass its scheduler to apply"),
        ):
            assert torch.equal(call(model, x, torch.full((2,), 500)), wanted)


@pytest.mark.parametrize("name", ["DDIM", "EDMEuler"])
def test_agent_has_agents_in_image_to_image(name, monkeypatch):
    used = []
    attend = agent.agent_attention
    monkeypatch.setattr(agent, "agent_attention", lambda *a, **k: (used.append(1), attend(*a, **k))[1])
    pipe = pipeline(StableDiffusionImg2ImgPipeline, name)
    with adapter.apply(pipe, Agent()):
        generate(pipe)
    assert used


@pytest.mark.parametrize("first", ["apply", "tomesd"])
def test_tomesds_own_patch_in_either_order(first):
    """Its merged tokens have no map: they keep exact attention, whatever their number."""
    tomesd = pytest.importorskip("tomesd")
    model, call = unet()
    x, t = torch.randn(1, 4, 8, 16), torch.full((1,), 500)  # no map of another level is to fit by chance
    with torch.no_grad():
        tomesd.apply_patch(model.eval(), ratio=0.75)
        wanted = call(model, x, t)
        tomesd.remove_patch(model)
        plan = uniform(model, block=2)
        if first == "apply":
            handle = adapter.apply(model, plan)
        tomesd.apply_patch(model, ratio=0.75)
        if first == "tomesd":
            handle = adapter.apply(model, plan)
        with pytest.warns(UserWarning, match="32 tokens are not 8 × 16; tokens that are merged, dropped or added"):
            found = call(model, x, t)
        lower = {name: p for name, p in plan.layers.items() if not name.startswith(("down_blocks.0", "up_blocks.1"))}
        handle.remove()
        assert torch.equal(call(model, x, t), wanted)
        with adapter.apply(model, type(plan)(plan.model, lower)):
            assert torch.equal(call(model, x, t), found)
        tomesd.remove_patch(model)


def ip_adapter(model):
    """Weights of an IP-Adapter for a model, as a file has them."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: 0.5 * torch.randn(*shape, generator=generator)  # noqa: E731
    crossed = [name for name in model.attn_processors if "attn2" in name]
    weights = {
        f"{1 + 2 * index}.{key}.weight": draw(model.get_submodule(name.removesuffix(".processor")).inner_dim, 8)
        for index, name in enumerate(crossed)
        for key in ("to_k_ip", "to_v_ip")
    }
    project = {"proj.weight": draw(32, 6), "proj.bias": draw(32), "norm.weight": draw(8), "norm.bias": draw(8)}
    return {"image_proj": project, "ip_adapter": weights}


class Subject:
    """A pipeline with what is loaded into it; ``handle`` is the conversion, if any."""

    def __init__(self):
        self.pipe, self.handle = pipeline(), None
        self.lora = self.ip = self.fused = self.sliced = self.offloaded = False

    def is_explicit(self):
        """Whether some processor makes explicit products."""
        layers = adapter.self_attention_layers(self.pipe.unet).values()
        return any(type(layer.processor).__name__ in adapter.EXPLICIT for layer in layers)

    def run(self):
        x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
        extra = {"added_cond_kwargs": {"image_embeds": [torch.ones(2, 1, 6)]}} if self.ip else {}
        with torch.no_grad():
            return self.pipe.unet(x, 500, torch.ones(2, 5, 8), **extra).sample


def toggle_lora(s):
    if s.lora:
        s.pipe.unet.delete_adapters("default")
    else:
        torch.manual_seed(5)
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        s.pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    s.lora = not s.lora


def toggle_ip_adapter(s):
    if s.ip:
        s.pipe.unload_ip_adapter()
    else:
        s.pipe.load_ip_adapter(ip_adapter(s.pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    s.ip = not s.ip
    s.fused = s.sliced = False  # diffusers' own doing


def toggle_fused(s):
    (s.pipe.unet.unfuse_qkv_projections if s.fused else s.pipe.unet.fuse_qkv_projections)()
    s.fused = not s.fused


def toggle_slicing(s):
    (s.pipe.disable_attention_slicing if s.sliced else s.pipe.enable_attention_slicing)()
    s.sliced = not s.sliced


def toggle_offload(s):
    if s.offloaded:
        accelerate.hooks.remove_hook_from_submodules(s.pipe.unet)
    else:
        accelerate.cpu_offload(s.pipe.unet, execution_device=torch.device("cpu"))
    s.offloaded = not s.offloaded


def reset_processors(s):
    s.pipe.unet.set_default_attn_processor()
    s.fused = s.sliced = False


def toggle_checkpointing(s):
    model = s.pipe.unet
    (model.disable_gradient_checkpointing if model.is_gradient_checkpointing else model.enable_gradient_checkpointing)()


def copy_model(s):
    model = copy.deepcopy(s.pipe.unet)
    s.pipe.register_modules(unet=model)
    s.handle = handle_of(model)


def allowed(operation, s):
    """Whether diffusers itself, without any conversion, does it in this state."""
    return {
        toggle_ip_adapter: not (s.fused or s.sliced or s.offloaded or s.lora),
        toggle_fused: not (s.ip or s.sliced or s.offloaded or s.lora),
        toggle_slicing: not (s.ip or s.fused),
        toggle_lora: not (s.fused or s.offloaded),
        reset_processors: not (s.ip or s.fused),
        copy_model: not s.offloaded,
    }.get(operation, True)


OPERATIONS = (
    toggle_lora,
    toggle_ip_adapter,
    toggle_fused,
    toggle_slicing,
    toggle_offload,
    reset_processors,
    toggle_checkpointing,
    copy_model,
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_random_orders_of_what_programs_do(seed):
    """The output is that of a plan applied anew, and in the end that of a twin that never had one."""
    chance = random.Random(seed)
    model = pipeline().unet
    plans = [uniform(model, block=2), plan_of(model, Head("linear")), plan_of(model, Head("block", 3))]
    for _ in range(ORDERS):
        subject, twin, plan = Subject(), Subject(), None
        done = []
        for _ in range(chance.randint(2, 8)):
            operation = chance.choice(["apply", "apply", "remove", *OPERATIONS])
            done.append(getattr(operation, "__name__", operation))
            if operation == "apply":
                if subject.is_explicit():
                    continue
                plan = chance.choice(plans)
                subject.handle = adapter.apply(subject.pipe, plan)
            elif operation == "remove":
                if subject.handle:
                    subject.handle.remove()
                plan = None
            elif allowed(operation, twin):
                operation(subject)
                operation(twin)
            if chance.random() < 0.3:
                check(subject, twin, plan, done)
        check(subject, twin, plan, done)
        if subject.handle:
            subject.handle.remove()
        check(subject, twin, None, done)
        for one, other in zip(subject.pipe.unet.named_modules(), twin.pipe.unet.named_modules(), strict=True):
            assert (
                one[0] == other[0] and type(one[1]) is type(other[1]) and vars(one[1]).keys() == vars(other[1]).keys()
            )


def check(subject, twin, plan, done):
    if plan is None:
        assert torch.equal(subject.run(), twin.run()), done
    elif subject.is_explicit():
        with pytest.raises(RuntimeError, match="the plan did not run in"):
            subject.run()
    else:
        with adapter.apply(twin.pipe, plan):
            wanted = twin.run()
        assert torch.equal(subject.run(), wanted), done


@pytest.mark.parametrize("options", [{"merge_ratio": 0.5}, {"plan": Agent(), "scheduler": diffusers.DDIMScheduler()}])
def test_merging_is_repeated_when_it_is_recomputed(options):
    torch.manual_seed(0)
    model, call = unet()
    x = [torch.randn(2, 4, *size) for size in ((8, 12), (12, 8), (8, 8))]
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        with adapter.apply(model.train(), **{"block": 2, "min_tokens": 0} | options):
            torch.manual_seed(1)
            model.zero_grad()
            sum(call(model, y, torch.full((2,), 900)).square().mean() for y in x).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_copies_and_pickles_of_every_option():
    torch.manual_seed(0)
    pipe = pipeline()
    x = torch.randn(1, 4, 8, 12)

    def run(model):
        with torch.no_grad():
            return model(x, 500, torch.ones(1, 5, 8)).sample

    for options in ({"merge_ratio": 0.5}, {"steps": (0, 0.6)}, {"plan": Agent()}):
        with adapter.apply(pipe, **{"block": 2, "min_tokens": 0} | options):
            wanted = run(pipe.unet)
            for other in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
                assert torch.equal(run(other), wanted)
        assert not torch.equal(run(pipe.unet), wanted)
