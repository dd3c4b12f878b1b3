"""Files of other programs: prefixes and parts of larger models, other names and layouts, what stands beside tensors."""

from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from mmengine.logging import HistoryBuffer

from elfatt.checkpoints import load_checkpoint
from elfatt.integrations import openmmlab
from elfatt.integrations.openmmlab import TimmBackbone
from tests.checkpoints.official import (
    SMALL,
    SOURCES,
    WINDOWS,
    drawn,
    norm,
    official,
    official_logits,
    official_maps,
    small_model,
    vmamba_logits,
    vmamba_maps,
    vmamba_shapes,
)

DIMS, DEPTHS = (16, 32, 64, 128), (1, 2, 1, 1)
IMAGE = torch.randn(1, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def nano():
    return timm.create_model("cswin_nano_elfatt", num_classes=5)


@pytest.fixture
def log(monkeypatch):
    """What TimmBackbone says of its weights."""
    lines = []
    monkeypatch.setattr(openmmlab, "print_log", lambda line, logger: lines.append(line))
    return lines


def prefixed(prefix, state, plus=0):
    return {f"{prefix}{key}": tensor + plus for key, tensor in state.items()}


def equal(model, state):
    return all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


# ------------------------------------------------------------------------------------------- parts of a larger model


@pytest.mark.parametrize("prefix", ["model.", "net.", "encoder.", "backbone.", "module.model._orig_mod."])
@pytest.mark.parametrize("name", ["own", "official"])
def test_the_prefix_is_that_of_the_models_names(prefix, name, tmp_path):
    own, (_, state) = small_model("swin_agent"), official("swin_agent")
    state = {"own": prefixed("", own.state_dict(), 1), "official": state}[name]
    torch.save({"state_dict": state}, tmp_path / "plain.pth")
    others = {"criterion.weight": torch.ones(2), "backbone2.stem.conv.weight": torch.ones(2)}
    torch.save({"state_dict": prefixed(prefix, state) | others}, tmp_path / "wrapped.pth")
    plain, wrapped = small_model("swin_agent"), small_model("swin_agent")
    report, expected = (load_checkpoint(m, tmp_path / f) for m, f in ((wrapped, "wrapped.pth"), (plain, "plain.pth")))
    assert equal(wrapped, plain.state_dict()) and not equal(wrapped, own.state_dict())
    assert (report.source, report.matched) == (expected.source, len(own.state_dict()))
    assert report.left_over == tuple(others) and expected.left_over == ()


@pytest.mark.parametrize("copy", ["ema_model.", "model_ema.module.", "ema."])
def test_an_averaged_copy_under_a_prefix(copy, nano, tmp_path):
    raw, averaged = prefixed("", nano.state_dict(), 1), prefixed("", nano.state_dict(), 2)
    torch.save({"state_dict": prefixed("model.", raw) | prefixed(copy, averaged)}, tmp_path / "both.ckpt")
    report = load_checkpoint(nano, tmp_path / "both.ckpt")
    assert report.weights == "ema" and equal(nano, averaged) and set(report.left_over) == set(prefixed("model.", raw))
    assert load_checkpoint(nano, tmp_path / "both.ckpt", use_ema=False).weights == "raw" and equal(nano, raw)
    torch.save({"state_dict": prefixed(copy, averaged)}, tmp_path / "averaged.ckpt")
    with pytest.raises(ValueError, match="only averaged weights: load it with use_ema=True"):
        load_checkpoint(nano, tmp_path / "averaged.ckpt", use_ema=False)


def test_mmengine_keeps_averaged_weights_in_place_of_the_raw_ones(nano, tmp_path):
    averaged, raw = prefixed("", nano.state_dict(), 1), prefixed("", nano.state_dict(), 2)
    copy = {"steps": torch.tensor(7), **prefixed("module.", raw)}  # as EMAHook.before_save_checkpoint leaves it
    torch.save({"state_dict": averaged, "ema_state_dict": copy}, tmp_path / "epoch_1.pth")
    assert load_checkpoint(nano, tmp_path / "epoch_1.pth").weights == "ema" and equal(nano, averaged)
    assert load_checkpoint(nano, tmp_path / "epoch_1.pth", use_ema=False).weights == "raw" and equal(nano, raw)


def test_half_of_the_names_is_not_enough_for_a_prefix(nano, tmp_path):
    state = {key: tensor for key, tensor in nano.state_dict().items() if key.startswith("stages.2.")}
    torch.save(prefixed("backbone.", state), tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"unexpected \(backbone\.stages\.2\."):
        load_checkpoint(nano, tmp_path / "part.pth")


def test_our_dense_checkpoint_goes_into_every_program(log, tmp_path):
    options = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 2, 2)}
    source = TimmBackbone("swin_tiny_elfatt", **options)
    for parameter in source.norms.parameters():
        torch.nn.init.normal_(parameter)
    heads = {f"{head}.conv.weight": torch.ones(2) for head in ("decode_head", "neck", "rpn_head", "roi_head")}
    logged = {"loss": HistoryBuffer([1.0, 2.0], [1, 1])}
    content = {"state_dict": prefixed("backbone.", source.state_dict()) | heads, "message_hub": {"log_scalars": logged}}
    path = tmp_path / "iter_1.pth"
    torch.save(content, path)

    dense = TimmBackbone("swin_tiny_elfatt", pretrained=str(path), **options)
    dense.init_weights()
    assert equal(dense, source.state_dict())
    total = len(source.features.model.state_dict())
    assert f"{total} of {total} tensors matched" in log[-1] and "output norms: loaded" in log[-1]
    assert log[-1].endswith("left over: 1 of decode_head, 1 of neck, 1 of rpn_head, 1 of roi_head)")

    few = TimmBackbone("swin_tiny_elfatt", out_indices=(0, 2), pretrained=str(path), **options)
    before = [parameter.clone() for parameter in few.norms.parameters()]
    few.init_weights()  # the third level's norm is not the second level's
    assert all(map(torch.equal, few.norms.parameters(), before)) and "output norms: new" in log[-1]

    model = timm.create_model("swin_tiny_elfatt", num_classes=3, **options)
    with pytest.raises(
        ValueError, match=r"4 missing \(norm\.weight, .*; dense models' checkpoints .* allow=\('head\.', 'norm\.'\)"
    ):
        load_checkpoint(model, path)
    report = load_checkpoint(model, path, allow=("head.", "norm."))
    assert report.matched == total and len(report.left_over) == len(heads) + 8
    own = source.features.model.state_dict()
    assert all(torch.equal(t, own[key]) for key, t in model.state_dict().items() if key in own)


def level_norms(shapes, template, first=0):
    return {f"{template}{i + first}.{kind}": (dim,) for i, dim in enumerate(shapes) for kind in ("weight", "bias")}


def largest_difference(dense, maps, norms, template, first=0):
    """Between a backbone's maps and the official ones behind the official norms."""
    with torch.no_grad():
        found = dense(IMAGE)
    expected = [norm(norms, f"{template}{i + first}", x).movedim(-1, 1) for i, x in enumerate(maps)]
    assert all(x.std() > 0.1 for x in expected)
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", SOURCES)
def test_an_official_dense_file_gives_the_official_maps(name, log, tmp_path):
    shell = name.split("_")[0]
    stages, state = official(name)
    norms = drawn(level_norms(DIMS, "norm", first=int(shell == "cswin")))
    backbone = {key: t for key, t in state.items() if not key.startswith(("head.", "norm."))} | norms
    path = tmp_path / "upernet.pth"
    torch.save({"state_dict": prefixed("backbone.", backbone) | {"decode_head.x": torch.ones(1)}}, path)
    options = {**SMALL, "window_size": WINDOWS[shell], "img_size": 96, "pretrained": str(path)}
    dense = TimmBackbone(f"{shell}_tiny_{name.split('_')[1]}", **options).double().eval()
    dense.init_weights()
    assert SOURCES[name] in log[-1] and log[-1].endswith("output norms: loaded; left over: 1 of decode_head)")
    maps = official_maps(shell, stages, state, IMAGE)
    assert largest_difference(dense, maps, norms, "norm", first=int(shell == "cswin")) < 1e-12


# ---------------------------------------------------------------------------------------------- other names and layouts


def old_vmamba(state):
    """VMamba's first names, from the change_name calls of vmamba.py."""
    renamed = {}
    for key, tensor in state.items():
        for new, old in (
            (".op.", ".self_attention."),
            ("classifier.norm", "classifier.norm"),
            ("classifier.head", "head"),
        ):
            key = key.replace(new, old)
        parts = key.split(".")
        if parts[0] == "layers" and parts[4:5] == ["norm"]:
            parts[4] = "ln_1"
        renamed[".".join(parts)] = tensor
    return renamed


def convolutions(state):
    """Where the maps have their channels first, VMamba's linear layers were convolutions of 1 x 1."""
    linear = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    return {key: t[:, :, None, None] if key.endswith(linear) else t for key, t in state.items()}


@pytest.mark.parametrize("change", [old_vmamba, convolutions])
def test_vmambas_other_files_give_its_output(change, tmp_path):
    state = drawn(vmamba_shapes(DIMS, DEPTHS, 1.0, 5))
    changed = change(state)
    assert any(key not in state or t.shape != state[key].shape for key, t in changed.items())
    torch.save({"model": changed}, tmp_path / "vmamba.pth")
    model = timm.create_model("vmamba_tiny", embed_dim=16, depths=DEPTHS, num_classes=5).double().eval()
    assert load_checkpoint(model, tmp_path / "vmamba.pth").source == "VMamba"
    with torch.no_grad():
        assert (model(IMAGE) - vmamba_logits(state, DEPTHS, IMAGE)).abs().max() < 1e-12


def test_a_dense_vmamba_gives_its_maps(tmp_path):
    state = drawn(vmamba_shapes(DIMS, DEPTHS, 1.0, 5))
    norms = drawn(level_norms(DIMS, "outnorm"))
    backbone = {key: t for key, t in state.items() if not key.startswith("classifier.")} | norms
    torch.save({"state_dict": prefixed("backbone.", backbone)}, tmp_path / "dense.pth")
    path = str(tmp_path / "dense.pth")
    dense = TimmBackbone("vmamba_tiny", pretrained=path, embed_dim=16, depths=DEPTHS).double().eval()
    dense.init_weights()
    assert largest_difference(dense, vmamba_maps(state, DEPTHS, IMAGE), norms, "outnorm") < 1e-12


SWIN = {"depths": (1, 2, 3, 1), "num_heads": (2, 2, 4, 4), "window_size": 3}


def test_mmdets_swin_gives_mmdets_maps(log, tmp_path):
    """The other implementation itself, with random weights in its own names and its own order of channels."""
    from mmdet.models.backbones.swin import SwinTransformer

    theirs = SwinTransformer(embed_dims=16, **SWIN).double()
    theirs.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    path = tmp_path / "mask_rcnn.pth"
    torch.save({"state_dict": prefixed("backbone.", theirs.state_dict())}, path)
    ours = TimmBackbone("swin_tiny_local", embed_dim=16, img_size=96, pretrained=str(path), **SWIN).double().eval()
    ours.init_weights()
    assert "(source open-mmlab Swin, raw weights" in log[-1] and log[-1].endswith(
        "output norms: loaded; left over: nothing)"
    )
    with torch.no_grad():
        differences = [(a - b).abs().max().item() for a, b in zip(ours(IMAGE), theirs(IMAGE), strict=True)]
    assert max(differences) < 1e-12


def test_mmpretrains_swin_gives_the_official_logits(tmp_path):
    stages, state = official("swin_local")
    theirs = {}
    for key, tensor in state.items():
        for ours, other in (
            ("patch_embed.proj.", "patch_embed.projection."),
            ("layers.", "stages."),
            (".attn.", ".attn.w_msa."),
            (".mlp.fc1.", ".ffn.layers.0.0."),
            (".mlp.fc2.", ".ffn.layers.1."),
        ):
            key = key.replace(ours, other)
        if ".downsample." in key:
            channels, unfolded = tensor.shape[-1] // 4, torch.empty_like(tensor)
            for corner, (row, column) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
                for channel in range(channels):  # nn.Unfold: channel, then row, then column
                    unfolded[..., 4 * channel + 2 * row + column] = tensor[..., corner * channels + channel]
            tensor = unfolded
        if key.startswith("head."):
            theirs[key.replace("head.", "head.fc.")] = tensor
        else:
            theirs["backbone." + (f"norm3.{key[5:]}" if key.startswith("norm.") else key)] = tensor
    torch.save({"state_dict": theirs}, tmp_path / "mmpretrain.pth")
    model = small_model("swin_local")
    report = load_checkpoint(model, tmp_path / "mmpretrain.pth")
    assert report.source == "open-mmlab Swin" and report.left_over == ()
    with torch.no_grad():
        assert (model(IMAGE) - official_logits("swin", stages, state, IMAGE)).abs().max() < 1e-12


def test_another_number_of_heads_is_named(tmp_path):
    torch.save(official("swin_local")[1], tmp_path / "swin.pth")
    model = small_model("swin_local", num_heads=(4, 4, 4, 4))
    with pytest.raises(ValueError, match=r"table \[25, 2\] for \[25, 4\].*set the checkpoint's num_heads$"):
        load_checkpoint(model, tmp_path / "swin.pth")


# ------------------------------------------------------------------------------------------- what stands beside tensors


@pytest.mark.parametrize("arch", ["CSWin_64_12211_tiny_224", "swin_tiny_patch4_window7_224", "resnet18", None])
def test_a_foreign_name_of_an_architecture_is_no_obstacle(arch, tmp_path):
    stages, state = official("cswin_local")
    torch.save({"arch": arch, "state_dict": state}, tmp_path / "model_best.pth.tar")
    model = small_model("cswin_local")
    load_checkpoint(model, tmp_path / "model_best.pth.tar")
    with torch.no_grad():
        assert (model(IMAGE) - official_logits("cswin", stages, state, IMAGE)).abs().max() < 1e-12


@pytest.mark.parametrize("core", ["_core", "core"])  # numpy 2 and numpy 1
def test_numbers_and_arrays_of_numpy_are_passed_over(core, nano, tmp_path):
    state, path = prefixed("", nano.state_dict(), 1), tmp_path / "a.pth"
    content = {"best": np.float64(81.2), "epoch": np.int64(3), "curve": np.arange(3.0), "ok": np.True_, "model": state}
    torch.save(content, path, _use_new_zipfile_serialization=False)  # a zip file would have checksums
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", f"numpy.{core}.multiarray".encode()))
    load_checkpoint(nano, path)
    assert equal(nano, state)


class Surprise:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("hide", ["array", "buffer"])
def test_code_is_not_run_from_within_an_array_or_a_buffer(hide, nano, tmp_path):
    surprise = Surprise(tmp_path / "ran")
    buffer = HistoryBuffer([1.0], [1])
    buffer.surprise = surprise
    beside = {"array": np.array([surprise], dtype=object), "buffer": buffer}[hide]
    torch.save({"model": nano.state_dict(), "beside": beside, "order": OrderedDict()}, tmp_path / "unsafe.pth")
    with pytest.raises(ValueError, match=r"contains more than tensors .*save only its tensors"):
        load_checkpoint(nano, tmp_path / "unsafe.pth")
    assert not (tmp_path / "ran").exists()
