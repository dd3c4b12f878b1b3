"""``python -m elfatt.checkpoints``: what it prints, what it writes, its exit code."""

import re
import subprocess
import sys

import pytest
import timm
import torch

from elfatt.checkpoints import load_checkpoint
from elfatt.checkpoints.__main__ import PROGRAM, main
from tests.checkpoints.official import SMALL as SMALL_OFFICIAL
from tests.checkpoints.official import (
    SOURCES,
    WINDOWS,
    convnext_shapes,
    drawn,
    official,
    randomized,
    small_model,
    vmamba_shapes,
)

DIMS, DEPTHS = (16, 32, 64, 128), (1, 2, 1, 1)
CONVNEXT = ["--model", "convnext_tiny", "--model-kwargs", f"dims={DIMS}", f"depths={DEPTHS}", "num_classes=5"]
SMALL = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 2, 2), "num_classes": 5}
ELFATT = ["--model", "cswin_tiny_elfatt", "--model-kwargs", *(f"{key}={value}" for key, value in SMALL.items())]


def save(tmp_path, state, name="in.pth"):
    path = tmp_path / name
    torch.save({"model": {key: tensor.float() for key, tensor in state.items()}}, path)
    return str(path)


def run(capsys, *arguments):
    """Exit code, output and errors."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_a_file_that_fits_is_converted(name, tmp_path, capsys):
    state = drawn(convnext_shapes(DIMS, DEPTHS, 5))
    path, out = save(tmp_path, state), tmp_path / name
    code, text, errors = run(capsys, path, *CONVNEXT, "--output", out)
    assert (code, errors) == (0, "")
    assert text.splitlines() == [
        f"{path}: {len(state)} tensors, Facebook ConvNeXt names, raw weights",
        f"convnext_tiny: {len(state)} of {len(state)} tensors matched",
        f"fits: wrote {out}",
    ]
    model = timm.create_model("convnext_tiny", dims=DIMS, depths=DEPTHS, num_classes=5)
    assert load_checkpoint(model, out).source == "Facebook ConvNeXt"  # noted: the names are the model's own
    assert torch.equal(model.stages[1].blocks[1].mlp.fc2.weight, state["stages.1.1.pwconv2.weight"].float())
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", SOURCES)
def test_each_repository_is_recognised(name, tmp_path, capsys):
    shell, mechanism = name.split("_")
    options = {**SMALL_OFFICIAL, "window_size": WINDOWS[shell], "img_size": 96}
    path, out = save(tmp_path, official(name)[1]), tmp_path / "out.safetensors"
    command = ["--model", f"{shell}_tiny_{mechanism}", "--output", out]
    command += ["--model-kwargs", *(f"{key}={value}" for key, value in options.items())]
    code, text, _ = run(capsys, path, *command)
    assert code == 0 and f"{SOURCES[name]} names" in text
    direct, converted = small_model(name), small_model(name)
    load_checkpoint(direct, path)
    assert load_checkpoint(converted, out) == load_checkpoint(direct, path)
    assert all(torch.equal(t, direct.state_dict()[key]) for key, t in converted.state_dict().items())


def test_a_file_is_checked_without_an_output(tmp_path, capsys):
    path = save(tmp_path, drawn(vmamba_shapes(DIMS, DEPTHS, 1.0, 5)))
    options = ["--model", "vmamba_tiny", "--model-kwargs", "embed_dim=16", f"depths={DEPTHS}", "num_classes=5"]
    code, text, _ = run(capsys, path, *options)
    assert code == 0 and text.endswith("\nfits\n") and "VMamba names" in text
    assert len(list(tmp_path.iterdir())) == 1


def test_every_misfit_is_named_and_nothing_written(tmp_path, capsys):
    state = drawn(convnext_shapes(DIMS, DEPTHS, 7))
    state["stages.0.0.pwconv1.extra"] = torch.zeros(3)
    del state["norm.bias"]
    state["downsample_layers.0.1.weight"][0] = float("nan")
    out = tmp_path / "out.pth"
    code, text, _ = run(capsys, save(tmp_path, state), *CONVNEXT, "--output", out)
    assert code == 1 and not out.exists()
    assert text.partition("matched\n")[2].splitlines() == [
        "missing (1):",
        "  head.norm.bias [128]",
        "left over (1):",
        "  stages.0.0.pwconv1.extra (here stages.0.blocks.0.mlp.fc1.extra) [3]",
        "mismatched (2):",
        "  head.weight (here head.fc.weight) [7, 128] for [5, 128]",
        "  head.bias (here head.fc.bias) [7] for [5]",
        "not finite (1):",
        "  stem.1.weight",
        f"does not fit: {out} not written",
    ]


def test_a_classifier_of_other_classes_is_allowed(tmp_path, capsys):
    out = tmp_path / "out.pth"
    path = save(tmp_path, drawn(convnext_shapes(DIMS, DEPTHS, 7)))
    code, text, _ = run(capsys, path, *CONVNEXT, "--output", out, "--allow", "head.fc.")
    assert code == 0 and "mismatched (2):" in text
    assert not any(key.startswith("head.fc.") for key in torch.load(out)["state_dict"])


def test_tables_are_resized(tmp_path, capsys):
    options = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
    path = save(tmp_path, timm.create_model("swin_tiny_local", window_size=12, **options).state_dict())
    command = ["--model", "swin_tiny_local", "--model-kwargs", *(f"{key}={value}" for key, value in options.items())]
    code, text, _ = run(capsys, path, *command)
    assert code == 0
    assert "resized (4):\n  stages.0.blocks.0.attn.relative_position_bias_table from [529, 2]\n" in text


def elfatt_state(model, names):
    """A model's tensors on CSWin's names, as far as CSWin has them, and ELFATT's two LePEs under invented ones."""
    state = {}
    for key, tensor in model.state_dict().items():
        for pattern, replacement in (
            (r"^stem\.conv\.", "stage1_conv_embed.0."),
            (r"^stem\.norm\.", "stage1_conv_embed.2."),
            (r"^head\.fc\.", "head."),
            (r"\.attn\.(qkv|proj)\.", r".\1."),
            (r"\.attn\.lepe\.", ".attns.0.get_v."),
            (r"\.attn\.lepe_global\.", f".{names[0]}."),
            (r"\.attn\.lepe_local\.", f".{names[1]}."),
        ):
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"^stages\.(\d+)\.downsample\.", r"merge\1.", key)
        key = re.sub(r"^stages\.(\d+)\.blocks\.", lambda match: f"stage{int(match[1]) + 1}.", key)
        state[key] = tensor
    return state


@pytest.fixture(scope="module")
def small_elfatt():
    torch.manual_seed(0)
    return randomized(timm.create_model("cswin_tiny_elfatt", **SMALL))


@pytest.mark.parametrize("names", [("attns.0.get_v", "attns.1.get_v"), ("lepe1", "lepe2")])
def test_elfatts_two_lepes_are_not_guessed(names, small_elfatt, tmp_path, capsys):
    """They share their shape: the report says so, and both decisions load, into different models."""
    path = save(tmp_path, elfatt_state(small_elfatt, names))
    code, text, _ = run(capsys, path, *ELFATT, "--output", tmp_path / "out.pth")
    assert code == 1 and "microsoft CSWin names" in text
    assert "ambiguous, choose with --rename (6):" in text
    first = re.search(r"stages\.0\.blocks\.0\.attn\.lepe_global is one of: (.*)\n", text)
    assert first and "missing (" not in text
    candidates = [name.rpartition(".")[2] for name in re.findall(r"\(here (\S+)\)", first[1])]
    for targets, same in ((("lepe_global", "lepe_local"), True), (("lepe_local", "lepe_global"), False)):
        prefix = "" if "attns" in names[0] else "attn."
        renames = [
            part
            for old, new in zip(candidates, targets, strict=True)
            for part in ("--rename", f"\\.{old}\\.=.{prefix}{new}.")
        ]
        code, text, _ = run(capsys, path, *ELFATT, "--output", tmp_path / "out.pth", *renames)
        assert code == 0, text
        model = timm.create_model("cswin_tiny_elfatt", **SMALL)
        load_checkpoint(model, tmp_path / "out.pth")
        assert same == all(torch.equal(t, small_elfatt.state_dict()[k]) for k, t in model.state_dict().items())


def test_what_structure_decides_is_paired_and_reported(small_elfatt, tmp_path, capsys):
    """With one LePE under its own name, the other one is certain."""
    state = elfatt_state(small_elfatt, ("unknown", "attn.lepe_local"))
    out = tmp_path / "out.pth"
    code, text, _ = run(capsys, save(tmp_path, state), *ELFATT, "--output", out)
    assert code == 0
    assert "paired by structure (6):\n  stages.0.blocks.0.attn.lepe_global.bias is stage1.0.unknown.bias\n" in text
    model = timm.create_model("cswin_tiny_elfatt", **SMALL)
    load_checkpoint(model, out)
    assert all(torch.equal(t, small_elfatt.state_dict()[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("renames", "names"),
    [
        ([], "Facebook ConvNeXt"),  # the prefix is found
        ([r"^body_\d\.=", r"_of_convnext\.=."], "Facebook ConvNeXt"),  # before names are recognised
        ([r"^body_\d\.=", r"_of_convnext\.=.", r"^head\.norm\.=head.norm."], "Facebook ConvNeXt"),  # after
    ],
)
def test_renames_come_first_where_the_file_has_such_names(renames, names, tmp_path, capsys):
    state = drawn(convnext_shapes(DIMS, DEPTHS, 5))
    if renames:  # no prefix that is common to all: every tensor would be left over
        state = {f"body_{i % 2}.{key.replace('.', '_of_convnext.', 1)}": t for i, (key, t) in enumerate(state.items())}
    else:
        state = {f"backbone.{key}": t for key, t in state.items()} | {"decode_head.conv.weight": torch.ones(2)}
    path = save(tmp_path, state)
    options = [part for rename in renames for part in ("--rename", rename)]
    code, text, _ = run(capsys, path, *CONVNEXT, *options, "--output", tmp_path / "out.safetensors")
    assert code == 0 and f"{path}: {len(state)} tensors, {names} names" in text
    assert ("other parts (1):\n  decode_head.conv.weight\n" in text) == (not renames)
    model = timm.create_model("convnext_tiny", dims=DIMS, depths=DEPTHS, num_classes=5)
    load_checkpoint(model, tmp_path / "out.safetensors")
    expected = next(t for key, t in state.items() if key.endswith("1.1.pwconv2.weight"))
    assert torch.equal(model.stages[1].blocks[1].mlp.fc2.weight, expected.float())


def test_source_and_labels_survive_conversions(tmp_path, capsys):
    path, labels = tmp_path / "in.pth", {"cat": 0, "dog": 1}
    torch.save({"model": drawn(convnext_shapes(DIMS, DEPTHS, 5)), "class_to_idx": labels}, path)
    for target in ("a.safetensors", "b.pth", "c.safetensors"):
        assert run(capsys, path, *CONVNEXT, "--output", tmp_path / target)[0] == 0
        path = tmp_path / target
        report = load_checkpoint(timm.create_model("convnext_tiny", dims=DIMS, depths=DEPTHS, num_classes=5), path)
        assert (report.source, report.class_to_idx) == ("Facebook ConvNeXt", labels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "vmamba_tinny"], "unknown model 'vmamba_tinny'; did you mean 'vmamba_tiny'?"),
        (["--model", "xyzzy"], "unknown model 'xyzzy'"),
        (["--model", "swin_tiny_local", "--model-kwargs", "depth=3"], "unexpected keyword argument 'depth'"),
        ([*CONVNEXT, "--rename", "(=x"], "invalid regular expression in rename '(' to 'x'"),
        ([*CONVNEXT, "--rename", r"stages\.\d+=stages.0"], "two tensors of the checkpoint map to"),
        ([*CONVNEXT, "--no-ema"], "only averaged weights"),
    ],
)
def test_errors_take_one_line(options, words, tmp_path, capsys):
    path = tmp_path / "in.pth"
    torch.save({"model_ema": drawn(convnext_shapes(DIMS, DEPTHS, 5))}, path)
    code, _, errors = run(capsys, path, *options)
    assert code == 2 and words in errors
    assert errors.startswith(f"{PROGRAM}: error: ") and errors.count("\n") == 1


def test_the_checkpoint_is_not_overwritten(tmp_path, capsys):
    path = save(tmp_path, drawn(convnext_shapes(DIMS, DEPTHS, 5)))
    code, _, errors = run(capsys, path, *CONVNEXT, "--output", path)
    assert code == 2 and "is the checkpoint itself" in errors
    code, _, errors = run(capsys, tmp_path / "none.pth", *CONVNEXT)
    assert code == 2 and "none.pth does not exist" in errors


def test_usage_errors(capsys):
    for arguments in ([], ["a.pth"], ["a.pth", "--model", "x", "--rename", "y"], ["a.pth", "--model-kwargs", "y"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "argument --rename: 'y' has no '='" in errors
    assert "argument --model-kwargs: expected KEY=VALUE, got 'y'" in errors


def test_the_help_page():
    found = subprocess.run([sys.executable, "-m", "elfatt.checkpoints", "--help"], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith(f"usage: {PROGRAM} ")
    assert "microsoft Swin," in " ".join(found.stdout.split()) and "exit code: 0" in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 120
