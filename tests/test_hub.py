"""Models as timm keeps them: saved, pushed and built again, offline."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from timm.models import _hub

import elfatt
from elfatt import hub
from elfatt.conversion import Head, LayerPlan, Plan
from elfatt.hub import Card, push_to_hub, save_pretrained
from elfatt.integrations.timm import vit_of

NANO = {"img_size": 32, "num_classes": 3}
MODELS = {
    "options": ("cswin_nano_elfatt", {**NANO, "block_size": (4, 2, 2), "channel_split": 0.25, "levels": "EEVV"}),
    "grey": ("swin_nano_elfatt", {**NANO, "lepe": False, "in_chans": 1}),
    "no classifier": ("swin_nano_elfatt", {"img_size": 32, "num_classes": 0}),
    "of timm": ("vit_tiny_patch16_224", {**NANO, "depth": 2, "embed_dim": 32, "num_heads": 2, "reg_tokens": 2}),
}


def build(name):
    torch.manual_seed(0)
    model = timm.create_model(MODELS[name][0], **MODELS[name][1]).eval()
    return model, torch.randn(2, MODELS[name][1].get("in_chans", 3), 32, 32)


def assert_same(model, other, images):
    assert not other.training or other.eval()
    with torch.no_grad():
        assert torch.equal(model(images), other.eval()(images))
    assert list(model.state_dict()) == list(other.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_holds_the_model_with_its_options(tmp_path, name):
    model, images = build(name)
    mean = (0.1, 0.2, 0.3)[: images.shape[1]]
    folder = save_pretrained(model, tmp_path / "saved", data_config={"mean": mean, "crop_pct": 0.5})
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    other = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_same(model, other, images)
    assert (other.pretrained_cfg["crop_pct"], tuple(other.pretrained_cfg["mean"])) == (0.5, mean)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_pushed_comes_back_from_the_hub(tmp_path, monkeypatch, name):
    hosted = {}

    class Api:
        def __init__(self, token, library_name):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert private and exist_ok
            return SimpleNamespace(repo_id=f"user/{repo_id}")

        def upload_folder(self, repo_id, folder_path, revision, create_pr, commit_message):
            for path in Path(folder_path).iterdir():
                hosted[repo_id, path.name] = path.read_bytes()
            return "https://example.org/commit"

    def download(repo_id, filename, **_):
        if (repo_id, filename) not in hosted:
            raise hub_errors.EntryNotFoundError(filename)
        (tmp_path / filename).write_bytes(hosted[repo_id, filename])
        return str(tmp_path / filename)

    from huggingface_hub import errors as hub_errors

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(_hub, "hf_hub_download", download)
    model, images = build(name)
    assert push_to_hub(model, "digits", private=True, token="secret") == "https://example.org/commit"
    assert 'timm.create_model("hf-hub:user/digits", pretrained=True)' in hosted["user/digits", "README.md"].decode()
    assert_same(model, timm.create_model("hf-hub:user/digits", pretrained=True), images)


def test_the_card_says_what_it_was_given_and_no_more():
    text = Card("A sentence.", {"Epochs": 3}, "digits", 99.1666, None, "mit").render("name", "hf-hub:me/name")
    _, header, body = text.split("---\n", 2)
    values = yaml.safe_load(header)
    assert (values["library_name"], values["license"]) == ("timm", "mit")
    (result,) = values["model-index"][0]["results"]
    assert result["dataset"]["name"] == "digits"
    assert result["metrics"] == [{"type": "accuracy", "value": 99.167, "name": "Top-1 accuracy"}]
    assert "| Epochs | 3 |" in body and "| Top-1 accuracy | 99.167 % |" in body and "Top-5" not in text
    bare = Card().render("name", "hf-hub:me/name")
    assert "model-index" not in bare and "%" not in bare and "license" not in bare


def test_a_converted_model_comes_with_its_plan(tmp_path):
    model, images = build("of timm")
    found = vit_of(model)
    plan = Plan(found.name, {name: LayerPlan((Head("block", 2),) * heads) for name, heads in found.heads.items()})
    folder = save_pretrained(model, tmp_path / "saved", plan=plan)
    (example,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    names = {}
    exec(example, names)
    with torch.no_grad(), elfatt.convert(model, plan):
        assert torch.equal(names["model"](images), model(images))
    text = Card().render("name", "hf-hub:me/name", converted=True)
    assert 'Plan.from_json(hf_hub_download("me/name", "plan.json"))' in text
    assert "import timm\nfrom huggingface_hub import hf_hub_download\n" in text


def test_labels_are_kept(tmp_path):
    model, _ = build("options")
    folder = save_pretrained(model, tmp_path / "saved", label_names=["cat", "dog", "fish"])
    assert json.loads((folder / "config.json").read_text())["label_names"] == ["cat", "dog", "fish"]
    assert timm.create_model(f"local-dir:{folder}").pretrained_cfg["label_names"] == ["cat", "dog", "fish"]


def test_what_cannot_be_saved_is_named(tmp_path):
    model, _ = build("options")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full is not an empty folder: choose another"):
        save_pretrained(model, tmp_path / "full")
    with pytest.raises(ValueError, match="got 2 label names for 3 classes"):
        save_pretrained(model, tmp_path / "new", label_names=["a", "b"])
    with pytest.raises(TypeError, match="Linear was not created by timm.create_model"):
        save_pretrained(torch.nn.Linear(1, 1), tmp_path / "new")
