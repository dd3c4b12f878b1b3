"""Files and containers, every way a load can fail, tables of another resolution, the report."""

import argparse
import logging
import sys
from types import ModuleType

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models.swin_transformer import SwinTransformer as TimmSwin

from elfatt.checkpoints import LoadReport, convert_state_dict, load_checkpoint
from tests.checkpoints.official import official, randomized, small_model

# ----------------------------------------------------------------------------------------------- containers and files


@pytest.fixture
def nano():
    return timm.create_model("cswin_nano_elfatt", num_classes=5)


def scaled(model, factor):
    return {key: tensor * factor for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("plain", ["state_dict", "model"])
def test_averaged_weights_win_unless_unwanted(nano, tmp_path, averaged, plain):
    raw, ema = scaled(nano, 2), scaled(nano, 3)
    torch.save({plain: raw, averaged: ema, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, tmp_path / "a.pth.tar")
    assert load_checkpoint(nano, tmp_path / "a.pth.tar").weights == "ema"
    assert torch.equal(nano.stem.conv.weight, ema["stem.conv.weight"])
    assert load_checkpoint(nano, tmp_path / "a.pth.tar", use_ema=False).weights == "raw"
    assert torch.equal(nano.stem.conv.weight, raw["stem.conv.weight"])


def test_averaged_weights_alone_are_not_taken_for_raw_ones(nano, tmp_path):
    torch.save({"state_dict_ema": nano.state_dict()}, tmp_path / "ema.pth")
    with pytest.raises(ValueError, match="only averaged weights: load it with use_ema=True"):
        load_checkpoint(nano, tmp_path / "ema.pth", use_ema=False)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_go(nano, tmp_path, prefix):
    state = scaled(nano, 2)
    torch.save({f"{prefix}{key}": tensor for key, tensor in state.items()}, tmp_path / "wrapped.pt")
    assert load_checkpoint(nano, tmp_path / "wrapped.pt").source == "native"
    assert torch.equal(nano.head.fc.weight, state["head.fc.weight"])


def test_safetensors(nano, tmp_path):
    state = scaled(nano, 2)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    report = load_checkpoint(nano, str(tmp_path / "model.safetensors"))
    assert report == LoadReport("native", "raw", len(state), (), ())
    assert torch.equal(nano.norm.weight, state["norm.weight"])


def test_any_timm_model_under_its_own_names(tmp_path):
    options = {"img_size": 56, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 3}
    source, target = randomized(TimmSwin(**options)), TimmSwin(**options)
    old = source.state_dict() | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    torch.save(old, tmp_path / "swin.pth")
    assert load_checkpoint(target, tmp_path / "swin.pth").source == "native"
    assert torch.equal(target.layers[1].downsample.norm.weight, source.layers[1].downsample.norm.weight)


def test_half_precision_fills_a_float32_model(nano, tmp_path):
    torch.save({key: tensor.half() for key, tensor in nano.state_dict().items()}, tmp_path / "half.pth")
    load_checkpoint(nano, tmp_path / "half.pth")
    assert {parameter.dtype for parameter in nano.parameters()} == {torch.float32}


@pytest.mark.parametrize("labels", [{"cat": 0, "dog": 1}, ["cat", "dog"], {0: "cat", 1: "dog"}])
def test_labels_are_names_with_numbers(nano, tmp_path, labels):
    torch.save({"state_dict": nano.state_dict(), "class_to_idx": labels}, tmp_path / "file.pth")
    found = load_checkpoint(nano, tmp_path / "file.pth").class_to_idx
    assert found == ({"cat": 0, "dog": 1} if isinstance(labels, dict) and "cat" in labels else None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(nano, tmp_path, value):
    state = {name: tensor.clone() for name, tensor in nano.state_dict().items()}
    state["head.fc.bias"][1] = value
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"has 1 non-finite tensors \(head\.fc\.bias\): take an earlier"):
        load_checkpoint(nano, tmp_path / "file.pth")
    assert nano.head.fc.bias.isfinite().all()


def test_missing_file(nano, tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_checkpoint(nano, path)


class Surprise:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_and_not_run(nano, tmp_path, zipped):
    content = {"model": nano.state_dict(), "config": Surprise(tmp_path / "ran")}
    torch.save(content, tmp_path / "unsafe.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"open.*save only its tensors with torch\.save") as error:
        load_checkpoint(nano, tmp_path / "unsafe.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


class CfgNode(dict):
    """As yacs has it: a dictionary with attributes."""

    def __init__(self, **values):
        super().__init__(**values)
        self.frozen = False


@pytest.mark.parametrize("zipped", [True, False])
def test_options_of_yacs_are_read_without_yacs(nano, tmp_path, zipped, monkeypatch):
    """The training checkpoints of Swin, FLatten, Agent and VMamba keep theirs beside the weights."""
    module = ModuleType("yacs.config")
    module.CfgNode, CfgNode.__module__ = CfgNode, "yacs.config"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        content = {"model": scaled(nano, 2), "config": CfgNode(MODEL=CfgNode(NAME="vssm", DEPTHS=[2, 2])), "epoch": 1}
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    load_checkpoint(nano, tmp_path / "a.pth")
    assert torch.equal(nano.head.fc.weight, content["model"]["head.fc.weight"])


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 1}, [torch.zeros(1)], {"model": [torch.zeros(1)]}])
def test_a_file_without_tensors(nano, tmp_path, content):
    torch.save(content, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="has no tensors: it must be a state dict"):
        load_checkpoint(nano, tmp_path / "empty.pth")


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04"])
def test_a_damaged_file(nano, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or not a checkpoint") as error:
        load_checkpoint(nano, tmp_path / name)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------- what does not fit


def save_changed(model, path, *, without=(), **more):
    state = {key: tensor + 1 for key, tensor in model.state_dict().items() if key not in without}
    torch.save({"state_dict": state | more}, path)


@pytest.mark.parametrize(
    ("without", "more", "message"),
    [
        (("stem.norm.bias",), {}, r"1 missing \(stem\.norm\.bias\); build the model"),
        (("norm.bias",), {}, r"1 missing \(norm\.bias\); dense models' checkpoints .* allow=\('head\.', 'norm\.'\)"),
        ((), {"extra": torch.zeros(1)}, r"1 unexpected \(extra\); build the model"),
        (
            (),
            {"stem.norm.bias": torch.zeros(7)},
            r"1 mismatched \(stem\.norm\.bias \[7\] for \[32\]\); build the model",
        ),
        ((), {"head.fc.bias": torch.zeros(7)}, r"1 mismatched \(head\.fc\.bias \[7\] for \[5\]\); use the .*num_class"),
    ],
)
def test_each_misfit_is_named_and_nothing_is_loaded(nano, tmp_path, without, more, message):
    before = {key: tensor.clone() for key, tensor in nano.state_dict().items()}
    save_changed(nano, tmp_path / "a.pth", without=without, **more)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(nano, tmp_path / "a.pth")
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in nano.state_dict().items())


def test_a_checkpoint_of_another_model(nano, tmp_path):
    for other in ("swin_nano_elfatt", "cswin_tiny_global"):
        torch.save(timm.create_model(other).state_dict(), tmp_path / "other.pth")
        with pytest.raises(ValueError, match="native names, raw weights.*does not fit CSWinTransformer") as error:
            load_checkpoint(nano, tmp_path / "other.pth")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 700


def test_an_official_checkpoint_of_another_mechanism(tmp_path):
    torch.save(official("cswin_flatten")[1], tmp_path / "flatten.pth")
    with pytest.raises(ValueError, match=r"FLatten-CSWin names.*missing \(stages\.0\.blocks\.0\.attn\.an_bias"):
        load_checkpoint(small_model("cswin_agent"), tmp_path / "flatten.pth")


def test_two_branches_do_not_pass_for_one(tmp_path):
    state = official("cswin_flatten")[1]
    state |= {key.replace("attns.0", "attns.1"): tensor for key, tensor in state.items() if "stage1.0.attns" in key}
    torch.save(state, tmp_path / "striped.pth")
    with pytest.raises(ValueError, match=r"unexpected \(stages\.0\.blocks\.0\.attn\.lepe_vertical"):
        load_checkpoint(small_model("cswin_flatten"), tmp_path / "striped.pth")


def test_unknown_keys_keep_their_names(nano):
    converted, source, *_ = convert_state_dict({"layers.0.downsample.x": torch.ones(1), "ape": torch.ones(1)}, nano)
    assert (source, list(converted)) == ("microsoft Swin", ["stages.1.downsample.x", "ape"])


def test_two_tensors_under_one_name(nano):
    with pytest.raises(ValueError, match=r"two tensors of the checkpoint map to norm\.bias: a\.bias and norm\.bias"):
        convert_state_dict({"a.bias": torch.ones(1), "norm.bias": torch.ones(1)}, nano, [("^a", "norm")])


def test_allow_skips_a_classifier_of_other_classes(nano, tmp_path, caplog):
    save_changed(timm.create_model("cswin_nano_elfatt", num_classes=7), tmp_path / "seven.pth")
    head = nano.head.fc.weight.clone()
    with caplog.at_level(logging.INFO, logger="elfatt"):
        report = load_checkpoint(nano, tmp_path / "seven.pth", allow=("head.",))
    assert report.skipped == ("head.fc.weight", "head.fc.bias")
    assert report.matched == len(nano.state_dict()) - 2
    assert torch.equal(nano.head.fc.weight, head)
    assert "skipped (head.fc.weight, head.fc.bias)" in caplog.text


def test_allow_covers_a_missing_and_an_unexpected_classifier(nano, tmp_path):
    torch.save(nano.state_dict(), tmp_path / "five.pth")
    headless = timm.create_model("cswin_nano_elfatt", num_classes=0)
    assert load_checkpoint(headless, tmp_path / "five.pth", allow=["head."]).matched == len(headless.state_dict())
    torch.save(headless.state_dict(), tmp_path / "headless.pth")
    assert load_checkpoint(nano, tmp_path / "headless.pth", allow=["head."]).matched == len(headless.state_dict())


def test_allow_is_no_string(nano, tmp_path):
    torch.save(nano.state_dict(), tmp_path / "a.pth")
    with pytest.raises(TypeError, match=r"allow='head\.' must be a sequence"):
        load_checkpoint(nano, tmp_path / "a.pth", allow="head.")


# ------------------------------------------------------------------------------------------- another resolution, log


@pytest.mark.parametrize("name", ["swin_agent", "cswin_agent", "swin_flatten", "cswin_flatten"])
@pytest.mark.parametrize("img_size", [(96, 96), (96, 64), (48, 48)])
def test_resized_tables_give_what_the_old_model_gives_on_the_new_image(name, img_size, tmp_path):
    old = randomized(small_model(name, img_size=64))
    new = small_model(name, img_size=img_size)
    torch.save(old.state_dict(), tmp_path / "old.pth")
    report = load_checkpoint(new, tmp_path / "old.pth")
    tables = ("ah_bias", "aw_bias", "ha_bias", "wa_bias") if "agent" in name else ("positional_encoding",)
    tables = tables[::2] if img_size == (96, 64) else tables  # the width is the old one
    assert set(report.resized) == {key for key in new.state_dict() if key.endswith(tables)}
    image = torch.randn(1, 3, *img_size, dtype=torch.float64)
    with torch.no_grad():
        difference = (old(image) - new(image)).abs().max()
    assert difference < 1e-5  # the tables are resized in float32


@pytest.mark.parametrize(("old", "new"), [(7, 12), (12, 7)])
def test_relative_position_bias_is_resized_as_microsoft_does(old, new, tmp_path):
    options = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "num_classes": 2}
    source = timm.create_model("swin_tiny_local", window_size=old, **options)
    target = timm.create_model("swin_tiny_local", window_size=new, **options)
    torch.save(source.state_dict(), tmp_path / "source.pth")
    assert len(load_checkpoint(target, tmp_path / "source.pth").resized) == 4
    table = source.stages[1].blocks[0].attn.relative_position_bias_table.detach()
    expected = resize_rel_pos_bias_table_simple(table, (new, new), ((2 * new - 1) ** 2, 2))
    found = target.stages[1].blocks[0].attn.relative_position_bias_table.detach()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "old", "new", "table"),
    [
        ("swin_flatten", {"img_size": (96, 64)}, {}, "positional_encoding"),  # no way to know its sides
        ("swin_flatten", {"embed_dim": 8}, {}, "positional_encoding"),
        ("cswin_agent", {"agents": 3}, {"agents": 2}, "ah_bias"),
        ("swin_local", {"num_heads": (4, 4, 4, 4)}, {}, "relative_position_bias_table"),
    ],
)
def test_a_table_that_differs_otherwise_is_a_misfit(name, old, new, table, tmp_path):
    torch.save(small_model(name, **old).state_dict(), tmp_path / "old.pth")
    model = small_model(name, **new)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="mismatched"):
        load_checkpoint(model, tmp_path / "old.pth")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    allowed = [key for key in before if not key.endswith(table)]
    with pytest.raises(ValueError, match=rf"fit \w+: \d+ mismatched \([\w.]+{table} \["):
        load_checkpoint(model, tmp_path / "old.pth", allow=allowed)


def test_the_log_line_tells_what_was_done(tmp_path, caplog):
    torch.save({"state_dict_ema": official("swin_agent", img_size=48)[1]}, tmp_path / "agent.pth")
    model = small_model("swin_agent")
    with caplog.at_level(logging.INFO, logger="elfatt.checkpoints"):
        report = load_checkpoint(model, tmp_path / "agent.pth")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    message = record.getMessage()
    assert message.startswith(
        f"{tmp_path / 'agent.pth'}: Agent-Swin names, ema weights, {report.matched} tensors matched, "
        f"{len(report.resized)} resized (stages.0.blocks.0.attn.ah_bias, "
    )
    assert "\n" not in message


def test_the_report_cannot_be_changed():
    with pytest.raises(AttributeError):
        LoadReport("native", "raw", 1, (), ()).matched = 2


def test_a_training_checkpoint_of_a_model_with_the_same_tensors_is_refused(tmp_path):
    """EFFATT and GLOBAL share every name and shape; the file says which of the two it is."""
    options = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "num_classes": 3}
    source, other = (timm.create_model(name, **options) for name in ("cswin_tiny_effatt", "cswin_tiny_global"))
    path = tmp_path / "last.pth.tar"
    torch.save({"arch": "cswin_tiny_effatt", "state_dict": source.state_dict()}, path)
    load_checkpoint(source, path)
    with pytest.raises(ValueError, match="is a checkpoint of cswin_tiny_effatt, not of cswin_tiny_global"):
        load_checkpoint(other, path)
    load_checkpoint(other, path, allow=("arch",))


def test_a_model_built_with_other_options_is_noticed(tmp_path):
    model = timm.create_model("cswin_nano_elfatt", block_size=4, num_classes=2)
    path = tmp_path / "trained.pth"
    torch.save({"state_dict": model.state_dict(), "args": {"model_kwargs": {"block_size": 4}}}, path)
    report = load_checkpoint(timm.create_model("cswin_nano_elfatt", num_classes=2), path)
    assert report.other_options({}).endswith("other model options: pass block_size=4")
    assert report.other_options({"block_size": 4}) is None
    torch.save({"state_dict": model.state_dict(), "args": {"model_kwargs": {}}}, path)
    assert load_checkpoint(model, path).other_options({"block_size": 4}).endswith("options: omit block_size")
    torch.save(model.state_dict(), path)
    assert load_checkpoint(model, path).other_options({}) is None
