"""Benchmark training-free attention in diffusion models: time, memory and multiply-adds against the unpatched model.

Each variant has its own copy of the model, with shared weights, and variants are timed in turns. Variants that depend
on the step, such as Agent, are measured in each phase and averaged by the phases' shares.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from elfatt.analysis.arguments import add_speed_arguments, apply_speed_arguments
from elfatt.analysis.complexity import count_parameters, count_true
from elfatt.analysis.diffusion_models import CONFIGS, Meter, Source, Step, denoiser_folder, share_weights, total
from elfatt.analysis.environment import available_bytes, describe_environment, machine_name
from elfatt.analysis.memory import count_memory, measure_memory
from elfatt.analysis.results import RESULTS, format_number, save_rows, to_markdown
from elfatt.analysis.scaling import parse_size
from elfatt.analysis.timing import REFUSALS, RunSpec, Timing, summarize, time_in_turns
from elfatt.conversion import Agent, Plan
from elfatt.conversion.agent import EARLY

KEY = ("model", "height", "width", "part", "variant")
UNPATCHED = "unpatched"
NO_ATTENTION = "no attention"  # lower bound on the time of any variant


class Plans:
    """Attention plans shared by the variants of one model.

    Args:
        model: The model or its pipeline.
        run: Runs the model, for calibration.
        given: Plan to use instead of calibration.
        args: Command-line options.
    """

    def __init__(self, model: object, run: Callable[[], object], given: Plan | None, args: argparse.Namespace):
        self.model, self.run, self.given, self.args = model, run, given, args

    def options(self, variant: Variant) -> dict[str, Any]:
        """Return the arguments of ``apply`` for a variant."""
        from diffusers import DDIMScheduler

        options = {"block": self.args.block, "min_tokens": self.args.min_tokens, "merge_ratio": variant.merge_ratio}
        if not hasattr(self.model, "scheduler"):
            options["scheduler"] = DDIMScheduler()  # the phases' timesteps are among its 1,000
        return options | {"plan": variant.plan(self)}

    @property
    def exact(self) -> Plan:
        """Plan that leaves the model unpatched."""
        from elfatt.integrations.diffusers import denoiser, name_of

        return Plan(name_of(denoiser(self.model)))

    @cached_property
    def calibrated(self) -> Plan:
        """The given plan, or one calibrated to ``--cost`` on first use."""
        from elfatt.integrations import diffusers as adapter

        if self.given:
            return self.given
        weighing = {} if self.args.model else {"weigh_every": 0}  # weighing is meaningless with random weights
        measured = adapter.calibrate(
            self.model, lambda _: self.run(), [None], min_tokens=self.args.min_tokens, **weighing
        )
        return measured.plan(cost=self.args.cost)


@dataclass(frozen=True)
class Variant:
    """One replacement of attention.

    Attributes:
        plan: Selects the plan or attention function; ELFATT's uniform plan by default.
        merge_ratio: Fraction of tokens that tomesd merges.
        phases: Share and timestep of each phase.
    """

    plan: Callable[[Plans], Any] = lambda plans: None
    merge_ratio: float = 0.0
    phases: tuple[tuple[float, int], ...] = ((1.0, 500),)


def _values(layer, q, k, v, size, **_):
    return v


VARIANTS = {
    UNPATCHED: Variant(lambda plans: plans.exact),
    "ELFATT": Variant(),
    "ELFATT calibrated": Variant(lambda plans: plans.calibrated),
    "ToMe 0.5": Variant(lambda plans: plans.exact, 0.5),
    "Agent": Variant(lambda plans: Agent(), phases=((EARLY, 900), (1 - EARLY, 300))),
    "ELFATT + ToMe 0.5": Variant(merge_ratio=0.5),
    NO_ATTENTION: Variant(lambda plans: _values),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ``diffusion`` command."""
    add = parser.add_argument
    add("--config", nargs="+", choices=CONFIGS, default=["sd15"], help="models with random weights (default: sd15)")
    add("--model", type=Path, metavar="PATH", help="a pipeline saved by diffusers, instead of --config")
    add("--sizes", nargs="+", default=["512"], metavar="SIZE", help="side or HEIGHTxWIDTH in pixels (default: 512)")
    add("--layers", action="store_true", help="time single self-attention layers, one of each kind")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add("--block", type=int, default=8, help="block size of ELFATT in tokens (default: %(default)s)")
    add("--min-tokens", type=int, default=1024, help="layers with fewer stay exact in ELFATT (default: %(default)s)")
    text = "maximum share of attention's multiply-adds in the calibrated plan (default: %(default)s)"
    add("--cost", type=float, default=0.5, help=text)
    add("--plan", type=Path, metavar="FILE", help="load a plan instead of calibrating one")
    add("--memory", action="store_true", help="also measure peak memory, in fresh processes on a CPU")
    add("--prompts", type=Path, metavar="FILE", help="prompts for --model, one per line; adds image quality and images")
    add("--steps", type=int, default=50, help="sampling steps per image (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the first image, incremented for each further one")
    add("--clip", default="openai/clip-vit-base-patch16", help="CLIP model of the CLIP score, a name or folder")
    add("--grid", type=Path, default=Path("runs/diffusion.png"), metavar="FILE", help="default: %(default)s")
    add("--results", type=Path, help=f"results file to add to (default: {RESULTS}/MACHINE.json)")
    add_speed_arguments(parser)
    parser.set_defaults(run=run, batch_size=2, warm_up=1, repeats=3, precision="float32")


def run(args: argparse.Namespace) -> None:
    """Measure every model at every size.

    Raises:
        ImportError: diffusers is not installed.
        OSError: A file cannot be read.
        ValueError: Prompts without a model, a file without prompts, plan or pipeline, or a number out of range.
    """
    import elfatt.integrations.diffusers  # noqa: F401  names the package to install

    if args.prompts and not args.model:
        raise ValueError(f"--prompts {args.prompts} needs the weights of --model PATH: random ones only draw noise")
    if not 0 < args.cost <= 1:
        raise ValueError(f"--cost {args.cost} must be a share above 0 and at most 1")
    if args.grid.suffix != ".png":
        raise ValueError(f"--grid {args.grid} must end in .png")
    if args.model:
        denoiser_folder(args.model)
    prompts = [line for line in args.prompts.read_text().splitlines() if line.strip()] if args.prompts else []
    if args.prompts and not prompts:
        raise ValueError(f"--prompts {args.prompts} contains no prompts: write one per line")
    if UNPATCHED not in args.variants:
        args.variants.insert(0, UNPATCHED)
    names = ("block", "min_tokens", "cost", *(["steps", "seed"] if prompts else []))
    settings = apply_speed_arguments(args) | {name: getattr(args, name) for name in names}
    plan = Plan.from_json(args.plan) if args.plan else None
    settings["plan"] = args.plan.name if plan else "calibrated"
    path = args.results or RESULTS / f"{machine_name(args.device)}.json"
    head = {"kind": "diffusion", "settings": settings, "environment": describe_environment(args.device)}
    rows = []
    for name in [str(args.model)] if args.model else args.config:
        for size in map(parse_size, args.sizes):
            source = Source(name, size, RunSpec(args.device, args.precision).dtype)
            for done in measure(source, prompts, plan, args):
                save_rows(path, head, done, KEY)
                rows += done
    print(format_rows(rows))
    print(f"\nadded to {path}", file=sys.stderr)


def measure(
    source: Source, prompts: list[str], plan: Plan | None, args: argparse.Namespace
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a model at a size: of images, then of a step or its layers, with the same plan."""
    what = f"{source.name} at {source.size[0]}x{source.size[1]}"
    head = {"model": Path(source.name).name, "height": source.size[0], "width": source.size[1]}
    if prompts:
        from elfatt.analysis.diffusion_quality import measure_pictures

        print(f"{what}: pictures", file=sys.stderr)
        rows, plan = measure_pictures(source, prompts, plan, args)
        yield [head | {"part": "pictures", "variant": name} | row for name, row in rows.items()]
    parts = {"step": (source, 1)}
    if args.layers:
        parts = {
            f"{math.prod(map)} tokens, {width} channels, {heads} heads": (
                replace(source, layer=names[0], map=map),
                len(names),
            )
            for (map, width, heads), names in source.kinds().items()
        }
    for part, (one, count) in parts.items():
        print(f"{what}: {part}", file=sys.stderr)
        rows = measure_part(one, plan, args)
        yield [head | {"part": part, "count": count, "variant": name} | row for name, row in rows.items()]


def measure_part(source: Source, plan: Plan | None, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Benchmark a step or a layer, and return the row of each variant."""
    from elfatt.integrations import diffusers as adapter

    how = RunSpec(args.device, args.precision, compile=args.compile, cuda_graph=args.cuda_graphs)
    empty = source.build("meta")
    shape = source.shape(args.batch_size, empty)
    weights = count_parameters(empty) * source.dtype.itemsize
    needed = weights + count_memory(Step(empty, text=source.text), shape, how.backend, how.dtype)
    free = available_bytes(args.device)
    if needed > free:
        text = f"skipped: it needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        print(text, file=sys.stderr)
        return {name: {"refused": text} for name in args.variants}
    model, eager = source.build(args.device), replace(how, compile=False, cuda_graph=False)
    plans = Plans(model, eager.prepare(Step(model, text=source.text), shape), plan, args)
    inside = how == eager  # hooks break graphs
    rows: dict[str, dict[str, Any]] = {}
    passes: dict[tuple[str, int], Callable[[], object]] = {}
    logs: dict[tuple[str, int], list] = {}
    with ExitStack() as stack:
        for name in args.variants:
            variant, row = VARIANTS[name], rows.setdefault(name, {})
            try:
                options = plans.options(variant)
                row |= count(source, variant, options, shape, how)
                own = share_weights(model)
                stack.enter_context(adapter.apply(own, **options))
                meter = Meter(adapter.self_attention_layers(own).values() if inside else [], clock_of(args.device))
                for _, timestep in variant.phases:
                    call = how.prepare(Step(own, timestep, source.text), shape)
                    call()
                    logs[name, timestep] = []
                    passes[name, timestep] = partial(log_call, call, meter, logs[name, timestep])
                if args.memory:
                    row["peak_memory_mib"] = max(
                        measure_memory(partial(_prepare, source, options, timestep, eager, shape), args.device)
                        for _, timestep in variant.phases
                    )
            except (ImportError, TypeError, ValueError, *REFUSALS) as error:
                print(f"{name} is not timed: {error}", file=sys.stderr)
                row["refused"] = str(error)
                for _, timestep in variant.phases:
                    passes.pop((name, timestep), None)
        steps = time_in_turns(passes, args.repeats, args.warm_up, args.device)
    timed = {} if source.layer else {"step": steps}
    if inside:
        timed["attention"] = {key: summarize(map(total, logs[key][args.warm_up :])) for key in steps}
    elif source.layer:
        timed["attention"] = steps
    for what, timings in timed.items():
        add_times(what, {name: _mean(timings, name) for name, row in rows.items() if "refused" not in row}, rows)
    return rows


def add_times(what: str, timings: dict[str, Timing], rows: dict[str, dict[str, Any]]) -> None:
    """Add milliseconds, quartiles and speed-ups to the rows of the variants."""
    for name, timing in timings.items():
        rows[name][f"{what}_ms"] = 1e3 * timing.median
        rows[name][f"{what}_ms_quartiles"] = [1e3 * timing.low, 1e3 * timing.high]
        if UNPATCHED in timings:
            rows[name][f"{what}_speedup"] = timings[UNPATCHED].median / timing.median


def count(
    source: Source, variant: Variant, options: dict[str, Any], shape: tuple[int, ...], how: RunSpec
) -> dict[str, float]:
    """Count the multiply-adds of a call and of its self-attention, and its live MiB, on the meta device."""
    from elfatt.integrations import diffusers as adapter

    found = {"macs": 0.0, "attention_macs": 0.0, "counted_memory_mib": 0.0}
    for share, timestep in variant.phases:
        model = source.build("meta")
        step = Step(model, timestep, source.text)
        with adapter.apply(model, **options):
            memory = count_memory(step, shape, how.backend, how.dtype) / 2**20
            with count_true() as read:
                meter = Meter(adapter.self_attention_layers(model).values(), read)
                step(torch.empty(shape, dtype=how.dtype, device="meta"))
                found["macs"] += share * read()
        found["attention_macs"] += share * total(meter.take())
        found["counted_memory_mib"] = max(found["counted_memory_mib"], memory)
    return found


def clock_of(device: str) -> Callable[[], Any]:
    """Return the clock that a ``Meter`` reads on a device."""
    return _event if device == "cuda" else time.perf_counter


def _event():
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def log_call(call: Callable[[], object], meter: Meter, log: list) -> None:
    """Run a call and log the meter's spans."""
    meter.take()
    call()
    log.append(meter.take())


def _prepare(source, options, timestep, how, shape):
    """Build and prepare in a fresh process, for memory measurement."""
    from elfatt.integrations import diffusers as adapter

    model = source.build(how.device)
    adapter.apply(model, **options)
    return how.prepare(Step(model, timestep, source.text), shape)


def _mean(timings: dict[tuple[str, int], Timing], name: str) -> Timing:
    """Average a variant's phases, weighted by their shares."""
    parts = [(share, timings[name, timestep]) for share, timestep in VARIANTS[name].phases]
    return Timing(*(sum(share * getattr(t, key) for share, t in parts) for key in ("median", "low", "high")))


def format_times(row: dict[str, Any], what: str) -> str:
    """Format the milliseconds and quartiles of a row."""
    if f"{what}_ms" not in row:
        return ""
    low, high = row[f"{what}_ms_quartiles"]
    return f"{format_number(row[f'{what}_ms'])} ({format_number(low)}–{format_number(high)})"


def _ratio(row, key):
    return f"{row[key]:.2f}×" if key in row else ""


COLUMNS = {
    "step, ms (quartiles)": lambda row: format_times(row, "step"),
    "speed-up": lambda row: _ratio(row, "step_speedup"),
    "self-attention layers, ms (quartiles)": lambda row: format_times(row, "attention"),
    "speed-up of them": lambda row: _ratio(row, "attention_speedup"),
    "GMACs": lambda row: format_number(row["macs"] / 1e9) if "macs" in row else "",
    "GMACs of them": lambda row: format_number(row["attention_macs"] / 1e9) if "macs" in row else "",
    "peak memory, MiB": lambda row: format_number(row.get("peak_memory_mib")),
    "counted, MiB": lambda row: format_number(row.get("counted_memory_mib")),
}
PICTURES = {
    "a picture, ms (quartiles)": lambda row: format_times(row, "picture"),
    "speed-up": lambda row: _ratio(row, "picture_speedup"),
    "PSNR, dB": lambda row: format_number(row.get("psnr_db"), 1),
    "LPIPS": lambda row: format_number(row.get("lpips"), 3),
    "CLIP score": lambda row: format_number(row.get("clip_score"), 2),
    "FID to unpatched": lambda row: format_number(row.get("fid"), 1),
}


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Format Markdown tables of steps and layers, and of images."""
    tables = []
    for columns, pictures in ((COLUMNS, False), (PICTURES, True)):
        lines = [
            [
                f"{row['model']} at {row['height']}×{row['width']}",
                f"{row['count']} × {row['part']}" if row.get("count", 1) > 1 else row["part"],
                row["variant"],
                *(cell(row) for cell in columns.values()),
            ]
            for row in rows
            if (row["part"] == "pictures") == pictures
        ]
        if lines:
            tables.append(to_markdown(["model", "part", "variant", *columns], lines))
    return "\n\n".join(tables)
