"""Breaks configs, adapter folders, data files and targets at random: nothing but LabErrors may come of it.

    python -m tests.fuzz --cases 20000 --seed 0
    python -m tests.fuzz --cases 3000 --kind artifact

Case n of a seed is always the same, so that `--first n --cases 1` shows it again. A case is at fault if it
raises what is no LabError, computes for more than 5 s, or takes more than 1 GB.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import string
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import pandas as pd
import peft
import torch
import yaml

from lora_lab import METHODS, inject, load_adapter, save_adapter
from lora_lab.artifacts import combine, export, merge
from lora_lab.bench.tiny_architectures import tiny_config
from lora_lab.config import compose
from lora_lab.data import FilesConfig, build_data
from lora_lab.errors import LabError
from lora_lab.models.conversion import save_model
from lora_lab.models.tiny import character_tokenizer
from tests.adapters.tiny import mixtral, tiny_llama

KINDS = {"config": 1, "overrides": 1, "folder": 4, "data": 3, "targets": 2, "artifact": 1}
"""What is broken, with how often; a case of the first two and the last takes ten times as long as another."""

SECONDS, BYTES = 5.0, 1 << 30

ODD = [
    None, True, False, 0, 1, -1, 3, 10**6, 10**30, -(10**30), 0.5, 1e-300, 1e308, float("inf"),
    float("nan"), "", " ", "0", "1e9", "-3", "yes", "null", "none", "query", "q_proj", "all", "all-linear",
    "experts", "lora", "ia3", "regex:", "regex:(", "regex:.*", "(.*)*(.*)*(.*)*x", "regex:(a|aa)+$", "^",
    "\\", "${oc.env:HOME}", "${name}", "???", "a.b.c", "..", "/", "/dev/zero", "~", "ü\u202e", "\x00",
    "\ud800", "x" * 5000, [], [[]], {}, {"": None}, [1, "a", None], {"rank": 4}, {"a": {"b": {"c": []}}},
    ["q_proj", "q_proj"], [-1, 10**12], [True], [{"a": 1}],
]  # fmt: skip
"""Values that stand where others should."""

CONFIG = """
name: broken
output: {output}
model: {{name: "random:bert"}}
data: {{source: files, train: {train}, text: [text], label: label, max_length: 16}}
adapter:
  {{method: lora, rank: 2, alpha: 4.0, targets: [query, value], rank_pattern: {{query: 3}}, layers: [0]}}
controllers: {{importance_pruning: {{target_rank: 1}}}}
optimization: {{learning_rate: 0.001, schedule: linear}}
trainer: {{max_epochs: 1, progress_bar: false}}
tracking: {{wandb: disabled}}
seed: 3
"""

KEYS = [
    "adapter.rank", "adapter.method", "adapter", "adapter.targets", "adapter.rank_pattern", "adapter.alpha",
    "data", "data.source", "data.text", "data.max_length", "model.name", "model", "model.task",
    "controllers", "controllers.rank_growth", "trainer.max_epochs", "trainer.max_steps",
    "trainer.precision", "tracking", "seed", "optimization.learning_rate", "optimization.schedule", "run",
    "name", "output", "extends", "continues", "", ".", "a..b", "adapter.rank.x", "nothing",
]  # fmt: skip
TEXT = "\"'{}[]()<>&*!|%@`:,#-?=~\\/\t\n\r\x00\x1b\ufeff\u2028 é漢🙂" + string.digits + "aeEnNoOxX.$_"
TARGET_WORDS = [
    "q_proj", "query", "all-linear", "value", "down_proj", "layers.0.mlp.up_proj", "regex:.*q_proj",
    "k_proj", "all", "mlp", "layers.0", "experts", "embed_tokens", "lm_head", "model", "", "norm", "gate",
    "0", "*", "regex:(", "regex:(.*)*(.*)*(.*)*x", "experts.down_proj",
]  # fmt: skip


def broken_text(text: str, rng: random.Random) -> str:
    """Changes, repeats, moves or drops a few pieces of a text."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        piece = text[at : min(to, at + 40)]
        new = {
            0: "", 1: piece * rng.choice([2, 50]), 2: rng.choice(TEXT) * rng.choice([1, 1, 3, 300]),
            3: json.dumps(rng.choice(ODD)), 4: piece[::-1],
            5: rng.choice(["- ", "&a ", "*a", "!!python/x ", "<<: "]),
        }[rng.randrange(6)]  # fmt: skip
        text = text[:at] + new + text[at + len(piece) :]
    return text


def broken_tree(tree, rng: random.Random):
    """Replaces, drops, renames or nests one or two values of a document, at any depth."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 2)):
        node, places = tree, []
        stack = [tree]
        while stack:
            node = stack.pop()
            items = (
                node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            )
            for key, value in items:
                places.append((node, key))
                stack.append(value)
        if not places:
            return rng.choice(ODD)
        node, key = rng.choice(places)
        what = rng.randrange(6)
        if what < 3:
            node[key] = rng.choice(ODD)
        elif what == 3:
            node[key] = [node[key]] if rng.random() < 0.5 else {"x": node[key]}
        elif what == 4 and isinstance(node, dict):
            node[rng.choice([*node, "new", "r", "rank", "target_parameters", "modules_to_save"])] = node.pop(
                key
            )
        else:
            del node[key]
    return tree


def broken_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cuts, flips, repeats or inserts bytes."""
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        what = rng.randrange(4)
        if what == 0:
            data = data[:at] + data[min(end, at + 100) :]
        elif what == 1:
            data = data[:at] + rng.randbytes(rng.choice([1, 1, 4, 64])) + data[at + 1 :]
        elif what == 2:
            data = data[:end] + data[at : min(end, at + 200)] + data[end:]
        else:
            data = data[:end]
    return data


def written(value) -> str:
    try:
        return yaml.safe_dump(value)
    except yaml.YAMLError:
        return json.dumps(value)


class Fuzzer:
    """The good files and models, and one method for each kind of case."""

    def __init__(self, place: Path, kinds: dict[str, int]):
        self.place, self.kinds = place, kinds
        self.models = [tiny_llama(), mixtral()]
        save_model(self.models[0], place / "base")
        character_tokenizer(self.models[0].config).save_pretrained(place / "base")
        self.tokenizer = character_tokenizer(tiny_config("bert"))
        self.good = CONFIG.format(output=place / "runs", train=place / "train.csv")
        rows = [(f"a {word} film", f"{i % 2}") for i, word in enumerate(["good", "bad", "fine", "dull"] * 4)]
        frame = pd.DataFrame(rows, columns=["text", "label"])
        frame.to_csv(place / "train.csv", index=False)
        frame.to_csv(place / "train.tsv", index=False, sep="\t")
        frame.to_json(place / "train.jsonl", orient="records", lines=True)
        frame.to_parquet(place / "train.parquet")
        self.folders = [(0, self._theirs(0, "peft_lora", peft.LoraConfig(
            r=3, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"],
            rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5},
        )))]  # fmt: skip
        for kind, config in {
            "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=5, r=0),
            "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
            "lokr": peft.LoKrConfig(r=2, target_modules=["q_proj", "down_proj"]),
            "adalora": peft.AdaLoraConfig(init_r=3, total_step=10, target_modules=["v_proj"]),
            "fourierft": peft.FourierFTConfig(n_frequency=9, target_modules=["q_proj"]),
        }.items():
            self.folders.append((0, self._theirs(0, f"peft_{kind}", config)))
        experts = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "gate.weight"]}
        self.folders.append((1, self._theirs(1, "peft_experts", peft.LoraConfig(r=2, **experts))))
        for method in METHODS:
            options = {
                "oft": {"oft_block_size": 5},
                "boft": {"boft_block_size": 5},
                "road": {"group_size": 6},
            }
            options |= {"pissa": {"rank": 2}, "psoft": {"rank": 4}, "antipasto": {"rank": 4}}
            try:
                adapters = inject(self.models[0], METHODS[method].Spec(**options.get(method, {})))
            except LabError:
                continue
            save_adapter(adapters, place / method, str(place / "base"), "CAUSAL_LM")
            adapters.remove()
            self.folders.append((0, place / method))

    def _theirs(self, model: int, name: str, config) -> Path:
        peft.get_peft_model([tiny_llama, mixtral][model](), config).save_pretrained(self.place / name)
        return self.place / name

    def run(self, rng: random.Random) -> str:
        """Runs one case; returns its kind and what became of it."""
        (kind,) = rng.choices(list(self.kinds), list(self.kinds.values()))
        try:
            getattr(self, kind)(rng)
        except LabError as error:
            message = str(error)
            if not 1 < len(message) < 20_000:
                raise ValueError(f"a message of {len(message)} characters") from error
            return f"{kind} refused"
        return f"{kind} accepted"

    def config_file(self, text: str) -> Path:
        path = self.place / "experiment.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return path

    def config(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            text = broken_text(self.good, rng)
        else:
            text = written(broken_tree(yaml.safe_load(self.good), rng))
        compose(self.config_file(text))

    def overrides(self, rng: random.Random) -> None:
        settings = []
        for _ in range(rng.randint(1, 3)):
            key = rng.choice(KEYS) if rng.random() < 0.8 else broken_text(rng.choice(KEYS), rng)
            value = rng.choice(ODD)
            text = value if isinstance(value, str) else json.dumps(value)
            settings.append(f"{key}={broken_text(text, rng) if rng.random() < 0.3 else text}")
        compose(self.config_file(self.good), settings)

    def folder(self, rng: random.Random) -> None:
        number, folder = self._broken_folder(rng)
        load_adapter(self.models[number], folder).remove()

    def artifact(self, rng: random.Random) -> None:
        """Merges, exports or mixes a broken folder; nothing but the target may be written."""
        _, folder = self._broken_folder(rng)
        out = self.place / "out"
        shutil.rmtree(out, ignore_errors=True)
        before = _listing(self.place)
        base, any_base = str(self.place / "base"), rng.random() < 0.5
        try:
            what = rng.choice(["merge", "export", "combine"])
            if what == "merge":
                merge(folder, out, base, rank=rng.choice([None, None, 1]), any_base=any_base)
            elif what == "export":
                export(folder, out, rank=rng.choice([None, 1]), base=base, any_base=any_base)
            else:
                _, good = rng.choice([own for own in self.folders if own[0] == 0])
                method = rng.choice(["weighted", "cat", "ties", "magnitude_prune", "peft_ties"])
                density = None if method in ("weighted", "cat") else 0.5
                paths = [folder, good] if rng.random() < 0.5 else [good, folder]
                combine(paths, out, method=method, density=density, base=base, any_base=any_base)
        except LabError:
            assert not out.exists(), "a refused folder left something"
            raise
        finally:
            assert _listing(self.place) == before, "something else was written"

    def _broken_folder(self, rng: random.Random) -> tuple[int, Path]:
        number, good = rng.choice(self.folders)
        folder = self.place / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        if rng.random() < 0.3:
            (folder / "lora_lab.yaml").unlink(missing_ok=True)
        paths = sorted(path for path in folder.iterdir() if path.suffix != ".md")
        for path in rng.sample(paths, rng.choice([1, 1, 2]) if len(paths) > 1 else 1):
            if path.suffix == ".safetensors":
                path.write_bytes(self._broken_tensors(path.read_bytes(), rng))
            elif rng.random() < 0.3:
                path.write_bytes(broken_bytes(path.read_bytes(), rng))
            elif path.suffix == ".json":
                found = json.loads(path.read_text())
                path.write_text(json.dumps(broken_tree(found, rng)) if isinstance(found, dict) else "{}")
            elif path.suffix == ".yaml":
                tree = broken_tree(yaml.safe_load(path.read_text()) or {}, rng)
                path.write_bytes(written(tree).encode("utf-8", "surrogatepass"))
        return number, folder

    def _broken_tensors(self, data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return broken_bytes(data, rng)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        text = json.dumps(broken_tree(header, rng)).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    def data(self, rng: random.Random) -> None:
        suffix = rng.choice([".csv", ".tsv", ".jsonl", ".parquet"])
        path = self.place / f"broken{suffix}"
        good = self.place / f"train{suffix}"
        if suffix == ".parquet" and rng.random() < 0.7:
            try:
                frame = pd.DataFrame({
                    name: [rng.choice([value, rng.choice(ODD)]) for value in ["a", "b"] * 4]
                    for name in ("text", "label")
                })  # fmt: skip
                (frame if rng.random() < 0.5 else frame.astype(str)).to_parquet(path)
            except Exception:  # not all that stands in ODD fits into a column
                path.write_bytes(b"PAR1")
        elif suffix == ".jsonl" and rng.random() < 0.5:
            rows = [json.loads(line) for line in good.read_text().splitlines()]
            rows = broken_tree(rows, rng)
            path.write_text(
                "\n".join(json.dumps(row) for row in (rows if isinstance(rows, list) else [rows]))
            )
        elif suffix == ".parquet" or rng.random() < 0.3:
            path.write_bytes(broken_bytes(good.read_bytes(), rng))
        else:
            path.write_bytes(broken_text(good.read_text(), rng).encode("utf-8", "surrogatepass"))
        task = rng.choice(["classification", "classification", "regression", "causal_lm"])
        config = FilesConfig(
            train=str(path),
            text=rng.choice([["text"]] * 12 + [["label"], ["text", "label"], ["txt"], []]),
            label=rng.choice(["label"] * 12 + ["text", "nothing", None]) if task != "causal_lm" else None,
            max_length=rng.choice([16] * 12 + [4, 5, 1]),
        )
        data = build_data(config, self.tokenizer, task, seed=0)
        data.setup("fit")
        next(iter(data.val_dataloader()))

    def targets(self, rng: random.Random) -> None:
        def words(count):
            found = [rng.choice(TARGET_WORDS[: rng.choice([8, 8, 99])]) for _ in range(count)]
            return [broken_text(word, rng) if rng.random() < 0.15 else word for word in found]

        method = rng.choice([name for name in METHODS if name != "clover"])
        options = {"targets": rng.choice([words(1)[0], words(1), words(2), words(0)])}
        if rng.random() < 0.3:
            options["exclude"] = words(rng.randint(1, 2))
        if rng.random() < 0.2:
            options["layers"] = [rng.choice([0, 1, 2, -1, 10**9])]
        if rng.random() < 0.2:
            options["modules_to_save"] = words(1)
        spec = METHODS[method].Spec(**options)
        for name, value in (
            ("rank", 2),
            ("rank_pattern", {words(1)[0]: 3}),
            ("alpha_pattern", {words(1)[0]: 3.0}),
        ):
            if hasattr(spec, name) and rng.random() < 0.4:
                setattr(spec, name, value)
        inject(rng.choice(self.models), spec).remove()


def _listing(place: Path) -> dict[str, int]:
    """Returns the files of a folder but the target's, with the time of their last change."""
    return {
        str(path): path.stat().st_mtime_ns
        for path in place.rglob("*")
        if path.is_file() and path.relative_to(place).parts[0] != "out"
    }


def run_case(fuzzer: Fuzzer, seed: int, number: int) -> tuple[str, str]:
    """Runs one case under its limits; returns what became of it, and the fault's traceback or ""."""
    rng = random.Random(f"{seed}:{number}")
    random.seed(number)
    torch.manual_seed(number)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + BYTES
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return fuzzer.run(rng), ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "fault", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _too_long(number, frame):
    raise TimeoutError(f"computed longer than {SECONDS} s")


def fuzz(
    seed: int, first: int, cases: int, place: Path, kinds: dict[str, int] = KINDS
) -> tuple[dict[str, int], list[str], float]:
    """Runs cases; returns how often what happened, the faults, and the longest case in CPU seconds."""
    counts: dict[str, int] = {}
    faults, longest = [], 0.0
    earlier = signal.signal(signal.SIGPROF, _too_long)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fuzzer = Fuzzer(place, kinds)
            for number in range(first, first + cases):
                start = time.process_time()
                outcome, fault = run_case(fuzzer, seed, number)
                longest = max(longest, time.process_time() - start)
                counts[outcome] = counts.get(outcome, 0) + 1
                if fault:
                    faults.append(f"case {number} of seed {seed}:\n{fault}")
                    print(faults[-1], flush=True)
    finally:
        signal.signal(signal.SIGPROF, earlier)
    return counts, faults, longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), help="this kind alone")
    given = parser.parse_args()
    kinds = {given.kind: 1} if given.kind else KINDS
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        counts, faults, longest = fuzz(given.seed, given.first, given.cases, Path(place), kinds)
    print(counts, f"longest case {longest:.2f} s; {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
