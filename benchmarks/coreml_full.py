"""Export one segment of each kind in full size to Core ML and compare it: seconds, bytes, memory, error.

    python benchmarks/coreml_full.py [--work DIR]

The networks are the released ones with one block each and random weights; each segment is converted and
evaluated in a process of its own, whose peak is its memory. Needs coremltools, 4 GB of disk, 6 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks._results import table, write
from blockstream.cli.main import main as blockstream
from blockstream.run.config import make_config
from movd.released import OPENSORA_VAE, STDIT3_XL_2, T5_V1_1_XXL
from movd_coreml.compare import TOLERANCES, Opened, difference
from movd_coreml.convert import Form, convert, example
from movd_coreml.int8 import dequantised, is_quantised
from movd_coreml.interpreter import FiniteWatch
from movd_coreml.manifest import Program, Tensor, describe_package
from movd_coreml.networks import Networks, What
from movd_coreml.segments import HIDDEN
from movd_coreml.tools import coremltools

COMMAND = "python benchmarks/coreml_full.py"
SIZE = (68, 256, 256)
#: (what, segment, form); "largest" is that part of the VAE.
CASES = (
    ("T5-XXL block", "t5.block.00", Form()),
    ("T5-XXL block, int8 weights", "t5.block.00", Form(int8=True)),
    ("STDiT3-XL pair", "dit.pair.00", Form()),
    ("STDiT3-XL pair, half precision", "dit.pair.00", Form(precision="fp16")),
    ("STDiT3-XL pair, merged", "dit.pair.00/merged", Form()),
    ("largest part of the VAE", "largest", Form()),
)


def configure(work):
    """Write the checkpoints that are not there; return a config that names them."""
    configs = {
        "t5": {**T5_V1_1_XXL, "num_layers": 1, "vocab_size": 64, "architectures": ["T5EncoderModel"]},
        "dit": {**STDIT3_XL_2, "depth": 1},
        "vae": dict(OPENSORA_VAE),
    }
    for name, settings in configs.items():
        if not (work / name).exists():
            (work / f"{name}.json").write_text(json.dumps(settings))
            assert blockstream(["synth", str(work / f"{name}.json"), str(work / name)]) == 0
    frames, height, width = SIZE
    return make_config(
        {
            "pipeline": "movd",
            "prompt": "none",
            "frames": frames,
            "height": height,
            "width": width,
            "threads": 1,
            "attention": ["tdtm"],
            **{name: {"path": str(work / name)} for name in configs},
        }
    )


def measure(work, segment, form):
    """Convert and evaluate one segment; return what is reported of it."""
    torch.set_num_threads(1)
    coremltools()
    name, _, variant = segment.partition("/")
    with Networks(configure(work), What()) as networks, tempfile.TemporaryDirectory(dir=work) as folder:
        recipes = {recipe.name: recipe for stage in networks.stages for recipe in stage.segments}
        if name == "largest":
            vae = networks.network("vae")
            parts = [recipe for recipe in recipes.values() if recipe.network == "vae"]
            name = max(parts, key=lambda recipe: vae.nbytes(recipe.modules)).name
        recipe = recipes[name]
        network = networks.network(recipe.network)
        function = recipe.function(networks.sizes.presets[0].name, variant or "plain")
        package = Path(folder) / "x.mlpackage"
        before = peak()
        with network.weights(recipe.modules), function.during(function.example), torch.no_grad():
            began, busy = time.perf_counter(), time.process_time()
            shapes = convert(name, function.build(), function.inputs, function.output_names(), form, package)
            convert_s, convert_cpu_s = time.perf_counter() - began, time.process_time() - busy
        converting = peak()
        error, evaluate_s, nonfinite = compare(network, recipe, function, form, package, shapes)
        return {
            "segment": name,
            "parameters": network.nbytes(recipe.modules) // 4,
            "shape": list(function.inputs[0].shape),
            "convert_s": convert_s,
            "convert_cpu_s": convert_cpu_s,
            "package_nbytes": describe_package(package.parent, package.name).nbytes,
            "before_nbytes": before,
            "peak_nbytes": converting,
            "peak_with_evaluation_nbytes": peak(),
            "evaluate_s": evaluate_s,
            "error": error,
            "tolerance": TOLERANCES[form.precision],
            "nonfinite": nonfinite,
        }


def compare(network, recipe, function, form, package, shapes):
    """Return the difference of a package from its module, the seconds it took, and what is no number."""
    values = {t.value: example(t, seed) for seed, t in enumerate(function.inputs)}
    if recipe.network == "dit":
        values["bias"] = torch.zeros_like(values["bias"])
        values["bias"][:, -100:] = HIDDEN

    def change(path, weight):
        return dequantised(weight) if form.int8 and is_quantised(network.module, path) else weight

    with network.weights(recipe.modules, change), function.during(function.example), torch.no_grad():
        out = function.build().eval()(*(values[t.value] for t in function.inputs))
    outputs = tuple(
        Tensor(name=name, value=value, shape=shape)
        for name, value, shape in zip(function.output_names(), function.outputs, shapes, strict=True)
    )
    program = Program(package=package.name, inputs=function.inputs, outputs=outputs)
    began, watch = time.perf_counter(), FiniteWatch()
    with Opened(package, program) as opened:
        got = opened(values, watch)
    evaluate_s = time.perf_counter() - began
    (value,) = function.outputs
    return difference(got[value], out, values.get(value)), evaluate_s, [str(c) for c in watch.causes]


def peak():
    """Return the most bytes this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="where the checkpoints are made, and left")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        _, segment, form = CASES[args.case]
        print(json.dumps(measure(args.work, segment, form)))
        return
    with tempfile.TemporaryDirectory() as made:
        work = args.work or Path(made)
        work.mkdir(parents=True, exist_ok=True)
        configure(work)
        results = {what: child(work, n) for n, (what, _, _) in enumerate(CASES)}
    rows = [
        (
            what,
            r["segment"],
            r["parameters"] / 1e6,
            r["convert_s"],
            r["convert_cpu_s"],
            r["package_nbytes"] / 1e6,
            r["peak_nbytes"] / 2**30,
            r["evaluate_s"],
            f"{r['error']:.1e}",
            f"{r['tolerance']:.0e}",
        )
        for what, r in results.items()
    ]
    head = (
        *("what", "segment", "parameters, M", "convert, s", "of processor", "package, MB", "peak, GiB"),
        *("evaluate, s", "error", "tolerance"),
    )
    page = (
        f"coremltools {metadata.version('coremltools')}. "
        f"Random weights, {SIZE[0]} frames of {SIZE[1]} x {SIZE[2]}, one thread, each in its own process. "
        "The peak is that of converting, coremltools and torch included. The error is that of the saved "
        "file, evaluated, against the torch module, in units of the change the segment makes; with int8 "
        f"weights the module holds our own int8 weights.\n\n{table(head, rows)}\n"
    )
    write("coreml", COMMAND, "Core ML segments in full size", page, {"results": results})


def child(work, n):
    """Return what one case gives, measured in a process of its own."""
    argv = [sys.executable, __file__, "--work", str(work), "--case", str(n)]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{CASES[n][0]}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
