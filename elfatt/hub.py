"""Save models in timm's Hub format: safetensors, ``config.json`` and a model card, in a folder or on the Hub.

``timm.create_model`` loads them from ``hf-hub:USER/NAME`` or ``local-dir:FOLDER``, including all options. Arguments
follow huggingface_hub's ``PyTorchModelHubMixin``; ``classification/publish.py`` publishes a training run.
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
    """Contents of a model card. Unset fields are left out.

    Attributes:
        description: One-sentence description.
        details: Rows of the details table, by name.
        dataset: Dataset used for training and evaluation.
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent.
        license: License of the weights, by its Hub identifier.
    """

    description: str = "An image classifier of [ELFATT](https://arxiv.org/abs/2501.06098)'s codebase."
    details: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    top1: float | None = None
    top5: float | None = None
    license: str | None = None

    def render(self, name: str, source: str, converted: bool = False) -> str:
        """Return the card as Markdown with the Hub's metadata header.

        Args:
            name: Model name.
            source: Name to load it by with ``timm.create_model``.
            converted: Whether the example applies the ``plan.json`` saved with the weights.
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
    """Save a timm model in a folder, for ``local-dir:`` or the Hub.

    Args:
        model: Any model created by timm.
        save_directory: New or empty folder.
        card: Contents of the model card.
        label_names: Class names, in order.
        data_config: Preprocessing in timm's terms, if it differs from the model's ``pretrained_cfg``.
        plan: Plan that the model was trained with; saved with it and applied by the card's example.
        source: Name by which the card's example loads the model (default: ``local-dir:`` and the folder).

    Returns:
        The folder.

    Raises:
        TypeError: The model was not created by timm.
        ValueError: The folder is not empty, or ``label_names`` does not match the number of classes.
    """
    folder = Path(save_directory)
    if not hasattr(model, "pretrained_cfg"):
        raise TypeError(f"{type(model).__name__} was not created by timm.create_model, which could not reload it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: choose another")
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"got {len(label_names)} label names for {model.num_classes} classes")
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
    """Upload a model in the format of ``save_pretrained``, replacing an existing card.

    Args:
        model: As in ``save_pretrained``.
        repo_id: ``USER/NAME``; created if missing.
        commit_message: Commit message.
        private: Make a new repository private.
        token: Hub token (default: from ``hf auth login``).
        revision: Branch to push to.
        create_pr: Open a pull request.
        **options: ``card``, ``label_names``, ``data_config`` and ``plan`` of ``save_pretrained``.

    Returns:
        URL of the commit.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: The Hub rejected the request, e.g. without a valid token.
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
