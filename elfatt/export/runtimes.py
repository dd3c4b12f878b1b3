"""Writers and loaders for each runtime.

A writer takes a program, a path, a precision, calibration images and the batch size to tune for; a loader returns a
function that maps images ``[B, 3, H, W]`` to outputs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.export import ExportedProgram

from elfatt.export.trace import LARGEST

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20
LARGE = 1536 << 20  # bytes of weights that an .onnx file, limited to 2 GiB, keeps in a file of their own
TENSORRT_LARGEST = 128, 1024  # an engine reserves memory for its largest input
TENSORRT_TUNED = 224  # pixels a side, if dynamic
EXECUTORCH_LARGEST = 8  # as above, for its largest batch
Run = Callable[[torch.Tensor], np.ndarray]


def write_torch_export(
    program: ExportedProgram, path: Path, precision: str = "fp32", images: Sequence = (), batch_size: int = 1
) -> None:
    """Write a ``.pt2`` file."""
    torch.export.save(program, path)


def write_onnx(
    program: ExportedProgram, path: Path, precision: str = "fp32", images: Sequence = (), batch_size: int = 1
) -> None:
    """Write an ``.onnx`` file with float32 inputs and outputs, and its weights to ``.onnx.data`` if they are large.

    int8 uses onnxruntime's static quantisation.
    """
    exported = torch.onnx.export(
        program,
        (),
        input_names=["image"],
        output_names=["output"],
        dynamo=True,
        opset_version=OPSET,
        optimize=False,
        verbose=False,
    )
    assert exported is not None  # None only with dynamo=False
    _simplify(exported.model)
    weights = Path(f"{path}.data")
    tensors = [value.const_value for value in exported.model.graph.initializers.values()]
    large = sum(tensor.nbytes for tensor in tensors if tensor is not None) > LARGE
    exported.save(path, external_data=large)
    if precision == "fp16":
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        half = convert_float_to_float16(str(path), keep_io_types=True)  # a path, as models in memory are limited too
        weights.unlink(missing_ok=True)  # onnx appends
        onnx.save(half, path, save_as_external_data=large, location=weights.name)
    elif precision == "int8":
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder, "model.onnx")
            external = {"all_tensors_to_one_file": True, "external_data_location": f"{prepared.name}.data"}
            quant_pre_process(path, prepared, skip_symbolic_shape=True, save_as_external_data=large, **external)
            weights.unlink(missing_ok=True)
            quantize_static(
                prepared,
                path,
                _CalibrationReader(images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=large,
            )


def _simplify(model: onnx_ir.Model) -> None:
    """Fold constants, batch norms and redundant nodes in place.

    Replaces the exporter's ``optimize=True``, whose ``slice_split_rule`` compares all pairs of nodes.
    """
    from onnx_ir.passes import common as passes
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules import common as rules

    chosen = [
        rules.no_op_cast_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.reshape_reshape_rule,
        rules.squeeze_reshape_1d_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.materialize_reshape_shape_rule,
        rules.collapse_slice2_rule,
        rules.mul_by_1_rule,
        rules.fuse_batchnorm_into_conv_rule,
        rules.fuse_batchnorm_into_conv_transpose_rule,
        rules.fuse_batchnorm_into_gemm_rule,
    ]
    passes.InlinePass()(model)
    for _ in range(2):  # each makes work for the other
        fold_constants(model, onnx_shape_inference=True)
        rewrite(model, chosen)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.NameFixPass()(model)


class _CalibrationReader:
    """onnxruntime's ``CalibrationDataReader`` over a list of images."""

    def __init__(self, images: Sequence[torch.Tensor]):
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"image": image.numpy()}

    def __iter__(self):
        return iter(self.get_next, None)


def write_openvino(
    program: ExportedProgram, path: Path, precision: str = "fp32", images: Sequence = (), batch_size: int = 1
) -> None:
    """Write an ``.xml`` file and its ``.bin`` weights: fp16 stores half-precision weights, int8 uses NNCF."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        write_onnx(program, Path(folder, "model.onnx"))
        model = openvino.convert_model(Path(folder, "model.onnx"))
        if precision == "int8":
            import nncf
            from nncf.quantization.advanced_parameters import QuantizationParameters

            # per-channel activations and SmoothQuant would fix the map size
            options = nncf.AdvancedQuantizationParameters(
                activations_quantization_params=QuantizationParameters(per_channel=False),
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(-1, -1),
            )
            data = nncf.Dataset([image.numpy() for image in images])
            kind = nncf.ModelType.TRANSFORMER
            model = nncf.quantize(model, data, subset_size=len(images), model_type=kind, advanced_parameters=options)
        openvino.save_model(model, path, compress_to_fp16=precision == "fp16")


def write_executorch(
    program: ExportedProgram, path: Path, precision: str = "fp32", images: Sequence = (), batch_size: int = 1
) -> None:
    """Write a ``.pte`` file for the XNNPACK backend."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def write_tensorrt(
    program: ExportedProgram, path: Path, precision: str = "fp32", images: Sequence = (), batch_size: int = 1
) -> None:
    """Build an engine for this device's GPU with ``trtexec``."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "model.onnx")
        write_onnx(program, source)
        number = "--fp16" if precision == "fp16" else "--noTF32"
        command = [f"--onnx={source}", f"--saveEngine={path}", number, "--skipInference"]
        (image,) = (node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
        _, _, *sides = image.meta["val"].shape
        low = [side if isinstance(side, int) else _range(program, side).lower for side in sides]
        high = [side if isinstance(side, int) else TENSORRT_LARGEST[1] for side in sides]
        tuned = [min(max(TENSORRT_TUNED, least), most) for least, most in zip(low, high, strict=True)]
        shapes = {"min": (1, low), "opt": (batch_size, tuned), "max": (TENSORRT_LARGEST[0], high)}
        for name, (count, (height, width)) in shapes.items():
            command.append(f"--{name}Shapes=image:{count}x3x{height}x{width}")
        trtexec(command)


def _range(program: ExportedProgram, side: torch.SymInt):
    return program.range_constraints[side.node.expr]


def load_torch_export(path: Path) -> Run:
    """Load a ``.pt2`` file."""
    module = torch.export.load(path).module()
    return lambda images: module(images).numpy()


def load_onnx(path: Path) -> Run:
    """Load an ``.onnx`` file in onnxruntime on the CPU, with PyTorch's number of threads.

    Sessions share one arena, so several models need the memory of the largest; it is kept until the process ends.
    Threads stop spinning after each call, as spinning slows down whatever runs next.
    """
    import onnxruntime

    _share_arena()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images.numpy()})[0]


@cache
def _share_arena() -> None:
    """Register the arena of sessions with ``session.use_env_allocators``, once per process."""
    import onnxruntime

    kind, memory = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", kind, 0, memory), None)


def load_openvino(path: Path) -> Run:
    """Load an ``.xml`` file in OpenVINO on the CPU, in float32 and with PyTorch's number of threads.

    Activations are freed after each call, so several models need the memory of the largest.
    """
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.Core().compile_model(path, "CPU", options)

    def run(images: torch.Tensor) -> np.ndarray:
        output = model(images.numpy())[0]
        model.release_memory()
        return output

    return run


def load_executorch(path: Path) -> Run:
    """Load a ``.pte`` file in ExecuTorch on the CPU."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda images: method.execute([images])[0].numpy()


def load_tensorrt(path: Path) -> Run:
    """Load an engine in ``trtexec``, exchanging tensors as files."""

    def run(images: torch.Tensor) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "image.bin"), Path(folder, "output.json")
            images.contiguous().numpy().tofile(source)
            shape = "x".join(map(str, images.shape))
            trtexec(
                [
                    f"--loadEngine={path}",
                    f"--shapes=image:{shape}",
                    f"--loadInputs=image:{source}",
                    f"--exportOutput={target}",
                    "--iterations=1",
                    "--warmUp=0",
                    "--duration=0",
                ]
            )
            (output,) = json.loads(target.read_text())
            return np.array(output["values"], np.float32).reshape([int(n) for n in output["dimensions"].split("x")])

    return run


def find_trtexec() -> None:
    """Check for TensorRT's command.

    Raises:
        RuntimeError: It is not on ``PATH``.
    """
    if not shutil.which("trtexec"):
        raise RuntimeError("tensorrt needs trtexec: install TensorRT and put its bin folder on PATH")


def trtexec(options: list[str]) -> str:
    """Run ``trtexec`` and return what it prints.

    Raises:
        RuntimeError: It is not on ``PATH``, or it fails.
    """
    find_trtexec()
    done = subprocess.run(["trtexec", *options], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        output = (done.stdout + done.stderr).splitlines()
        lines = [line for line in output if "[E]" in line] or output or [f"exit code {done.returncode}"]
        raise RuntimeError(f"trtexec failed: {lines[-1]}")
    return done.stdout


class Runtime(NamedTuple):
    """Export target.

    Attributes:
        packages: Required packages by precision.
        suffix: File extension.
        write: Writer.
        load: Loader.
        dynamic: Whether dynamic height and width are supported.
        largest: Largest batch and side in pixels of a dynamic model.
        check: Raises ``RuntimeError`` if something other than a package is missing.
    """

    packages: dict[str, tuple[str, ...]]
    suffix: str
    write: Callable[[ExportedProgram, Path, str, Sequence[torch.Tensor], int], None]
    load: Callable[[Path], Run]
    dynamic: bool = True
    largest: tuple[int, int] = (LARGEST, LARGEST)
    check: Callable[[], None] = lambda: None


_ONNX = ("onnx", "onnxscript")
RUNTIMES = {
    "torch-export": Runtime({"fp32": ()}, ".pt2", write_torch_export, load_torch_export),
    "onnx": Runtime(dict.fromkeys(("fp32", "fp16", "int8"), (*_ONNX, "onnxruntime")), ".onnx", write_onnx, load_onnx),
    "openvino": Runtime(
        {"fp32": (*_ONNX, "openvino"), "fp16": (*_ONNX, "openvino"), "int8": (*_ONNX, "openvino", "nncf")},
        ".xml",
        write_openvino,
        load_openvino,
    ),
    "executorch": Runtime(
        {"fp32": ("executorch",)},
        ".pte",
        write_executorch,
        load_executorch,
        dynamic=False,
        largest=(EXECUTORCH_LARGEST, LARGEST),
    ),
    "tensorrt": Runtime(
        dict.fromkeys(("fp32", "fp16"), _ONNX),
        ".engine",
        write_tensorrt,
        load_tensorrt,
        largest=TENSORRT_LARGEST,
        check=find_trtexec,
    ),
}
UNSUPPORTED = {"coreml": "its tensors have at most five dimensions, and cutting a map into blocks needs six"}
