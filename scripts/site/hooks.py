"""Generate the site's pages outside docs/: files of the repository root, the feature matrix and the API reference."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from elfatt.export.runtimes import RUNTIMES
from elfatt.ops import BACKENDS
from elfatt.ops.dispatch import AUTO, get_backend
from elfatt.ops.fused import FusedBackend
from elfatt.ops.pytorch import FlashAttnBackend, PyTorchBackend, dtype_name

ROOT = Path(__file__).resolve().parents[2]
FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
API = {  # page: title and documented modules
    "models": ("Models", ["elfatt.list_models", "elfatt.backbones.hierarchical", "elfatt.backbones.vmamba"]),
    "attention": ("Attention", ["elfatt.attention.registry", "elfatt.attention.base", "elfatt.attention.elfatt"]),
    "ops": ("Operations", ["elfatt.ops"]),
    "checkpoints": ("Checkpoints", ["elfatt.checkpoints", "elfatt.hub"]),
    "conversion": ("Conversion", ["elfatt.convert", "elfatt.conversion"]),
    "integrations": (
        "Integrations",
        [f"elfatt.integrations.{name}" for name in ("timm", "transformers", "diffusers", "openmmlab")],
    ),
    "export": ("Export", ["elfatt.export"]),
}
OPERATIONS = (
    "softmax_attention",
    "efficient_attention",
    "block_attention",
    "elfatt_attention",
    "depthwise_conv",
    "add_lepe",
)
BACKEND_HEADER = (
    "Backend",
    "Devices",
    "dtypes",
    "`torch.compile`",
    "`torch.export`, ONNX",
    "`torch.func.grad`",
    "Operations of its own",
)
RUNTIME_HEADER = ("`--to`", "Precisions", "Height and width", "Packages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=_as_page((ROOT / name).read_text())))
    files.append(File.generated(config, "features.md", content=features()))
    for page, (title, names) in API.items():
        blocks = "\n\n".join(f"::: {name}" for name in names)
        files.append(File.generated(config, f"api/{page}.md", content=f"# {title}\n\n{blocks}\n"))
    return files


def _as_page(text: str) -> str:
    """Rewrite links of a root file relative to docs/; links to other repository files become plain text."""
    text = text.replace("](docs/", "](")
    for name, page in FROM_ROOT.items():
        text = text.replace(f"]({name})", f"]({page})")
    return re.sub(r"\[([^]]*)\]\((?!https?:)(?![\w/]+\.(?:md|png)\))[^)]*\)", r"\1", text)


def features() -> str:
    """Return the feature matrix, generated from the backends and runtimes."""
    return f"""# Features

Generated from the code. `auto` selects `{AUTO["cuda"].name}` on a GPU and `{AUTO["cpu"].name}` on a CPU if they are
verified, otherwise `sdpa`; under `torch.export` it always selects `sdpa`.

## Backends

{_table(BACKEND_HEADER, map(_backend_row, BACKENDS[1:]))}

## Export

{_table(RUNTIME_HEADER, map(_runtime_row, RUNTIMES))}
"""


def _backend_row(name: str) -> tuple[str, ...]:
    backend = get_backend(name)
    fused = isinstance(backend, FusedBackend)
    limits = ("one graph", "custom operators", "refused") if fused else ("one graph", "plain operators", "yes")
    if isinstance(backend, FlashAttnBackend):
        limits = ("untested",) * 3
    own = [op for op in OPERATIONS if getattr(type(backend), op) is not getattr(PyTorchBackend, op)]
    return (
        f"`{name}`",
        ", ".join(backend.devices) or "any",
        ", ".join(map(dtype_name, backend.dtypes)) or "any floating point",
        *limits,
        ", ".join(f"`{op}`" for op in (own if type(backend) is not PyTorchBackend else OPERATIONS)),
    )


def _runtime_row(name: str) -> tuple[str, ...]:
    runtime = RUNTIMES[name]
    packages = sorted({package for needed in runtime.packages.values() for package in needed})
    return (
        f"`{name}`",
        ", ".join(runtime.packages),
        "dynamic" if runtime.dynamic else "`--size`",
        ", ".join(packages) or "–",
    )


def _table(header, rows) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
