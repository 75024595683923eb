"""What a merge costs compared with copying the base's files, and what a killed merge leaves.

    python -m lora_lab.bench.merge_cost OUTPUT.csv

The base has Llama's shapes and random float32 weights, 2 GB in files of 500 MB; the adapter is a LoRA of
rank 16 on all linear maps of its blocks. Each round copies the base's folder, adds up W + ΔW of all modules
without writing anything (the arithmetic), and merges in a separate process. All of them flush files to the
disk. Before each, a file as large as the base is written and deleted, so that all find free memory alike: the
host of a virtual machine takes unused memory back, and who uses it first waits for it. Seconds are those of
the clock and of the CPU. Memory is the peak of the process minus its memory after all imports. Then ten
merges are killed, at ten different times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lab.adapters import LoRASpec, inject
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.bench.results import about, write_rows
from lora_lab.documents.writing import new_folder
from lora_lab.linalg.lazy import LazyTensor
from lora_lab.models.build import ModelConfig, build_model
from lora_lab.models.conversion import save_model
from lora_lab.models.tiny import character_tokenizer

SHARD, RANK, ROUNDS, KILLS = "500MB", 16, 5, 10
CHILD = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers.models.llama import modeling_llama
from lora_lab.artifacts.merging import merge
from lora_lab.bench.merge_cost import warm

def megabytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024

warm(Path(sys.argv[2]).parent, int(sys.argv[4]))
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = megabytes("VmRSS")
print("ready", flush=True)
start = time.perf_counter(), time.process_time()
merge(Path(sys.argv[1]), Path(sys.argv[2]), shard_size=sys.argv[3])
seconds = time.perf_counter() - start[0], time.process_time() - start[1]
print(json.dumps({"seconds": seconds[0], "cpu": seconds[1], "megabytes": megabytes("VmHWM") - before}))
"""


def make(folder: Path, layers: int) -> tuple[Path, Path]:
    """Writes a base of 220 MB and 201 MB a layer, and an adapter; returns their folders."""
    config = LlamaConfig(
        vocab_size=13440,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    weights = {
        name: LazyTensor.of(lambda shape=tensor.shape: 0.02 * torch.rand(shape), tensor.shape, tensor.dtype)  # type: ignore[misc]
        for name, tensor in model.state_dict().items()
    }
    base, adapter = folder / "base", folder / "adapter"
    save_model(model, base, SHARD, changed=weights)
    character_tokenizer(config).save_pretrained(base)
    adapters = inject(opened(base), LoRASpec(rank=RANK, targets="all-linear"))
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter.normal_(std=0.01)
    save_adapter(adapters, adapter, str(base), "CAUSAL_LM")
    return base, adapter


def opened(base: Path) -> Any:
    """Returns the base."""
    return build_model(ModelConfig(name=str(base), task="causal_lm"))


def child(adapter: Path, out: Path, count: int) -> subprocess.Popen[str]:
    """Starts a merge of a base of this many bytes in a separate process; returns when all is imported."""
    command = [sys.executable, "-c", CHILD, str(adapter), str(out), SHARD, str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def copied(base: Path, out: Path) -> tuple[float, float]:
    """Returns the seconds of a copy of the base's files, and those of the CPU."""
    warm(out.parent, size(base))
    start = time.perf_counter(), time.process_time()
    with new_folder(out) as fresh:
        for path in base.iterdir():
            shutil.copy(path, fresh)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def added(base: Path, adapter: Path) -> tuple[float, float]:
    """Returns the seconds of W + ΔW for all modules, with the weights already in memory, and the CPU's."""
    model = opened(base)
    adapters = load_adapter(model, adapter)
    warm(adapter.parent, size(base))
    wall = cpu = 0.0
    for own in adapters:
        weight: Any = own.base
        weight.weight.sum()  # reads the file
        start = time.perf_counter(), time.process_time()
        own.merged_module()
        wall, cpu = wall + time.perf_counter() - start[0], cpu + time.process_time() - start[1]
    return wall, cpu


def warm(folder: Path, count: int) -> None:
    """Writes this many bytes to a file and deletes it."""
    path, piece = folder / "warm", bytes(1 << 16)
    with path.open("wb") as file:
        for _ in range(count // len(piece)):
            file.write(piece)
    path.unlink()


def fresh(action: Callable[[Path], Any], out: Path) -> Any:
    """Runs an action that makes a folder, and deletes the folder."""
    found = action(out)
    shutil.rmtree(out)
    return found


def merged(adapter: Path, out: Path, count: int) -> dict[str, float]:
    """Returns seconds and megabytes of a merge; `count` as in `child`."""
    process = child(adapter, out, count)
    text, _ = process.communicate()
    return {name: float(value) for name, value in json.loads(text).items()}


def killed(adapter: Path, out: Path, after: float, whole: dict[str, list[int]]) -> str:
    """Kills a merge this many seconds after its start; returns the state of its folder.

    Args:
        adapter: the adapter's folder.
        out: the folder of the merge.
        after: seconds.
        whole: the shapes of a complete model.
    """
    process = child(adapter, out, size(adapter.parent / "base"))
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = "none"
    if out.exists():
        left = "whole" if shapes(out) == whole and (out / "README.md").is_file() else "broken"
    for path in out.parent.glob(f"*{out.name}*"):
        shutil.rmtree(path)
    return left


def size(folder: Path) -> int:
    """Returns the bytes of a model's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def shapes(folder: Path) -> dict[str, list[int]]:
    """Returns the shapes of a model's tensors, or of none if one of its files is not complete."""
    found: dict[str, list[int]] = {}
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError:
        return {}
    return found


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description="Measures what a merge costs.")
    parser.add_argument("output", type=Path, help="CSV file to write")
    parser.add_argument("--layers", type=int, default=9, help="blocks of the base (%(default)s: 2 GB)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    origin = about(["torch", "transformers", "safetensors"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, adapter = make(folder, options.layers)
        rows = []
        for number in range(ROUNDS):
            copy = fresh(lambda out: copied(base, out), folder / "copy")
            arithmetic = added(base, adapter)
            cost = fresh(lambda out: merged(adapter, out, size(base)), folder / "merged")
            rows.append(
                {
                    "round": number + 1,
                    "base_megabytes": round(size(base) / 1e6, 1),
                    "copy_seconds": round(copy[0], 3),
                    "arithmetic_seconds": round(arithmetic[0], 3),
                    "merge_seconds": round(cost["seconds"], 3),
                    "ratio": round(cost["seconds"] / (copy[0] + arithmetic[0]), 4),
                    "copy_cpu_seconds": round(copy[1], 3),
                    "arithmetic_cpu_seconds": round(arithmetic[1], 3),
                    "merge_cpu_seconds": round(cost["cpu"], 3),
                    "cpu_ratio": round(cost["cpu"] / (copy[1] + arithmetic[1]), 4),
                    "merge_peak_megabytes": round(cost["megabytes"], 1),
                }
            )
            print(rows[-1], flush=True)
        typical = statistics.median(row["merge_seconds"] for row in rows)
        whole = shapes(base)
        left = [
            killed(adapter, folder / "killed", typical * (number + 0.5) / KILLS, whole)
            for number in range(KILLS)
        ]
        print(f"folders left by {KILLS} killed merges: {left}")
        counts = {f"killed_{state}": left.count(state) for state in ("none", "whole", "broken")}
        rows = [row | counts for row in rows]
    write_rows(options.output, [origin | row for row in rows])


if __name__ == "__main__":
    main()
