"""Models as timm keeps them on the Hugging Face Hub or in a folder: safetensors, ``config.json``, a model card.

``timm.create_model("hf-hub:USER/NAME", pretrained=True)`` and ``"local-dir:FOLDER"`` build them again with all options.
Arguments are named as in huggingface_hub's ``PyTorchModelHubMixin``; ``classification/publish.py`` publishes a run.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from timm.models import save_for_hf
from torch import nn

from elfatt.conversion import Plan

if "data_config" not in inspect.signature(save_for_hf).parameters:
    raise ImportError("elfatt.hub needs timm 1.0.31 or newer: pip install --upgrade timm")

PLAN = "plan.json"
BODY = """
# {name}

{description}

```python
import timm
{imports}
import elfatt  # registers the architecture with timm

model = timm.create_model("{source}", pretrained=True).eval()
{convert}```

{details}
## Citation

```bibtex
@article{{wu2025elfatt,
  title   = {{ELFATT: Efficient Linear Fast Attention for Vision Transformers}},
  author  = {{Wu, Chong and Che, Maolin and Xu, Renjie and Ran, Zhuoheng and Yan, Hong}},
  journal = {{arXiv preprint arXiv:2501.06098}},
  year    = {{2025}}
}}
```
"""


@dataclass(frozen=True)
class Card:
    """What a model card says beside how to load the model; nothing is said that is not given.

    Attributes:
        description: A sentence.
        details: Lines of a table, by name.
        dataset: What the model was trained and evaluated on.
        top1: Accuracy in percent.
        top5: Likewise.
        license: Of the weights, by the Hub's name.
    """

    description: str = "An image classifier of [ELFATT](https://arxiv.org/abs/2501.06098)'s codebase."
    details: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    top1: float | None = None
    top5: float | None = None
    license: str | None = None

    def render(self, name: str, source: str, converted: bool = False) -> str:
        """The card as Markdown with the header that the Hub reads.

        Args:
            name: Of the model.
            source: What ``timm.create_model`` takes.
            converted: The attention is that of the ``plan.json`` beside it.
        """
        scores = {"accuracy": ("Top-1 accuracy", self.top1), "top-5-accuracy": ("Top-5 accuracy", self.top5)}
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=self.dataset,
                dataset_name=self.dataset,
                metric_type=kind,
                metric_name=title,
                metric_value=round(value, 3),
            )
            for kind, (title, value) in scores.items()
            if value is not None and self.dataset
        ]
        header = ModelCardData(
            library_name="timm",
            tags=["image-classification", "timm", "elfatt"],
            pipeline_tag="image-classification",
            license=self.license,
            model_name=name,
            eval_results=results or None,
        )
        details = self.details | {title: f"{value:.3f} %" for title, value in scores.values() if value is not None}
        table = "\n".join(f"| {key} | {value} |" for key, value in details.items())
        table = f"| | |\n|---|---|\n{table}\n" if table else ""
        kind, _, place = source.partition(":")
        plan = f'hf_hub_download("{place}", "{PLAN}")' if kind == "hf-hub" else f'"{place}/{PLAN}"'
        convert = f"elfatt.convert(model, elfatt.conversion.Plan.from_json({plan}))\n" if converted else ""
        imports = "from huggingface_hub import hf_hub_download\n" if converted and kind == "hf-hub" else ""
        body = BODY.format(
            name=name, description=self.description, source=source, imports=imports, convert=convert, details=table
        )
        return f"---\n{header.to_yaml()}\n---\n{body}"


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    *,
    card: Card | None = None,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    plan: Plan | None = None,
    source: str | None = None,
) -> Path:
    """Write a model of ``timm.create_model`` for ``local-dir:`` or the Hub.

    Args:
        model: Ours or any other of timm.
        save_directory: A new or empty folder.
        card: What the model card says.
        label_names: Of the classes, in order.
        data_config: How images were prepared, by timm's names, where it is not as the model's ``pretrained_cfg`` says.
        plan: Of a model that was trained with converted attention; saved beside it, and the card applies it.
        source: Under which the card loads the model; by default ``local-dir:`` and the folder.

    Returns:
        The folder.

    Raises:
        TypeError: A model that timm did not build.
        ValueError: A folder with something in it, or another number of names than of classes.
    """
    folder = Path(save_directory)
    if not hasattr(model, "pretrained_cfg"):
        raise TypeError(f"{type(model).__name__} was not built by timm.create_model, which alone could load it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: choose another folder")
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"{len(label_names)} label names are not the {model.num_classes} classes of the model")
    labels = {"label_names": list(label_names)} if label_names else {}
    save_for_hf(model, str(folder), model_config=labels, data_config=data_config, safe_serialization=True)
    name = (source or folder.name).rpartition("/")[2]
    if plan:
        plan.to_json(folder / PLAN)
    text = (card or Card()).render(name, source or f"local-dir:{folder}", converted=plan is not None)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str = "Add model",
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **options: Any,
) -> str:
    """Upload what ``save_pretrained`` writes; a card that is there is replaced.

    Args:
        model: As in ``save_pretrained``.
        repo_id: ``USER/NAME``; created where it is missing.
        commit_message: Of the upload.
        private: Of a new repository.
        token: Of the Hub; by default that of ``hf auth login``.
        revision: Branch.
        create_pr: Open a pull request.
        **options: ``card``, ``label_names``, ``data_config`` and ``plan`` of ``save_pretrained``.

    Returns:
        Address of the commit.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses, such as without a token.
    """
    api = HfApi(token=token, library_name="elfatt")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder, "model"), source=f"hf-hub:{repo_id}", **options)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(folder, "model"),
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
