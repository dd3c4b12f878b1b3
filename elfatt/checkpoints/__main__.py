"""Convert a published checkpoint to a model's names and check every tensor; see ``--help``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import timm
import torch

from elfatt.backbones import check_model
from elfatt.checkpoints.loading import Checkpoint, Fit, fit_tensors, read_checkpoint
from elfatt.checkpoints.names import CROPS, StateDict
from elfatt.checkpoints.structure import pair_by_structure
from elfatt.console import replace_unprintable
from elfatt.keywords import Keywords

PROGRAM = "python -m elfatt.checkpoints"
DESCRIPTION = """\
Convert a published checkpoint to a model's names, and check that every tensor fits.

Supported names: {sources}, and the model's own.
A prefix (module., model., backbone. ...) is detected as the one that matches most of the model's tensors. Tensors
outside it, such as a detector's heads, are left out. The report lists every tensor that was resized, paired by
structure, left out or does not fit. Nothing is written unless all fit. The output works wherever weights are loaded
(--initial-checkpoint, --checkpoint, --pretrained) and records its source, from which validate.py takes the crop."""
EPILOG = """\
Unrecognised modules are paired with the model's missing ones if block and shapes leave one choice. Ambiguous ones are
not guessed: the report lists the candidates for you to choose with --rename; only an evaluation can confirm the choice.

A --rename whose PATTERN matches a name in the file is applied before names are detected; any other is applied to the
converted names, shown in the report after "here".

examples:
  {program} swin_tiny_patch4_window7_224.pth --model swin_tiny_local
  {program} cswin_tiny_224.pth --model cswin_tiny_local --model-kwargs "depths=(1,2,21,1)"
  {program} vssm1_tiny_0230s.pth --model vmamba_tiny --output vmamba_tiny.safetensors
  {program} cswin_elfatt_tiny_224.pth --model cswin_tiny_elfatt --output cswin_tiny_elfatt.pth \\
      --rename lepe_vertical=lepe_global --rename lepe_horizontal=lepe_local

exit code: 0 all tensors fit, 1 some do not, 2 invalid file or options"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: Arguments; by default the command line's.
    """
    replace_unprintable()
    args = _parse(argv)
    try:
        return _run(args)
    except (OSError, TypeError, ValueError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2


def _parse(argv):
    sources = textwrap.fill(", ".join(CROPS), 90)
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION.format(sources=sources),
        epilog=EPILOG.format(program=PROGRAM),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", type=Path, help="checkpoint, .safetensors or torch.save")
    add("--model", required=True, help="timm model, e.g. cswin_tiny_elfatt")
    add("--model-kwargs", nargs="+", default={}, action=Keywords, metavar="KEY=VALUE", help="the model's keywords")
    add("--output", type=Path, help="where to write the converted tensors, as .safetensors or else by torch.save")
    add("--no-ema", action="store_true", help="use the raw weights even if the file has averaged ones")
    add(
        "--rename",
        action="append",
        default=[],
        type=_pair,
        metavar="PATTERN=NAME",
        help="regular expression to replace in names; repeatable",
    )
    add("--allow", nargs="+", default=[], metavar="PREFIX", help="prefixes of tensors that need not fit, e.g. head.")
    return parser.parse_args(argv)


def _pair(text: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no '='")
    return left, right


def _run(args: argparse.Namespace) -> int:
    if args.output and args.output.resolve() == args.file.resolve():
        raise ValueError(f"--output {args.output} is the checkpoint itself: choose another path")
    check_model(args.model)
    with torch.device("meta"):  # only names and shapes are needed
        model = timm.create_model(args.model, **args.model_kwargs)
    own = model.state_dict()

    checkpoint = read_checkpoint(args.file, model, use_ema=not args.no_ema, allow=args.allow, renames=args.rename)
    converted, origins = dict(checkpoint.tensors), dict(checkpoint.origins)
    first = fit_tensors(converted, model)
    pairs, choices = pair_by_structure(first.missing, first.unexpected, own)
    for name, left_over in pairs.items():
        converted[name], origins[name] = converted.pop(left_over), origins[left_over]
    fit = fit_tensors(converted, model)

    count = len(origins) - len(pairs) + len(checkpoint.left_over)
    print(f"{args.file}: {count} tensors, {checkpoint.names} names, {checkpoint.weights} weights")
    print(f"{args.model}: {len(fit.tensors)} of {len(own)} tensors matched")
    broken = [name for name, tensor in fit.tensors.items() if not tensor.isfinite().all()]
    sections = _sections(fit, origins, pairs, choices)
    for title, lines in {"other parts": checkpoint.left_over, **sections, "not finite": broken}.items():
        if lines:
            print(f"{title} ({len(lines)}):", *lines, sep="\n  ")
    if broken or any(fit.misfits(args.allow).values()):
        print("does not fit" + (f": {args.output} not written" if args.output else ""))
        return 1
    if args.output:
        _write(args.output, args.model, checkpoint, fit.tensors)
    print("fits" + (f": wrote {args.output}" if args.output else ""))
    return 0


def _sections(
    fit: Fit, origins: Mapping[str, str], pairs: Mapping[str, str], choices: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return the tensors that were not simply copied, one line each, grouped by outcome."""

    def both(old, new):
        return new if old == new else f"{old} (here {new})"

    modules = {name.rpartition(".")[0]: origins[name].rpartition(".")[0] for name in fit.unexpected}
    undecided = {name for name in fit.missing if name.rpartition(".")[0] in choices}
    return {
        "resized": [f"{name} from {shape}" for name, shape in fit.resized.items()],
        "paired by structure": [f"{name} is {origins[name]}" for name in sorted(pairs)],
        "ambiguous, choose with --rename": [
            f"{name} is one of: {', '.join(both(modules[other], other) for other in names)}"
            for name, names in choices.items()
        ],
        "missing": [f"{name} {shape}" for name, shape in fit.missing.items() if name not in undecided],
        "left over": [f"{both(origins[name], name)} {shape}" for name, shape in fit.unexpected.items()],
        "mismatched": [f"{both(origins[name], name)} {shapes}" for name, shapes in fit.mismatched.items()],
    }


def _write(path: Path, model: str, checkpoint: Checkpoint, tensors: StateDict) -> None:
    """Write the file atomically, with the metadata that evaluation needs."""
    # copies, as safetensors cannot store views of shared storage
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if path.suffix == ".safetensors":
        classes = json.dumps(checkpoint.class_to_idx)
        safetensors.torch.save_file(tensors, part, {"source": checkpoint.source, "class_to_idx": classes})
    else:
        notes = {"arch": model, "source": checkpoint.source, "class_to_idx": checkpoint.class_to_idx}
        torch.save({**notes, "state_dict": tensors}, part)
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
