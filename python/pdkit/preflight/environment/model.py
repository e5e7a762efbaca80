"""Is a model complete on this disk? Answered without network."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from pdkit.models.cuda.store import to_be_made
from pdkit.preflight.finding import Finding, error, ok

WHY = "the servers would download it while their start-up time runs out, or fail"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tiktoken.model")


def cache_directory(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps repositories."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(environ[name]).expanduser()
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home, "hub").expanduser()


def locate(model: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The directory that a model would be loaded from: itself, or the snapshot of `main` in the cache."""
    if Path(model).is_dir():
        return Path(model)
    repository = cache_directory(environ) / f"models--{model.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    snapshot = repository / "snapshots" / revision
    return snapshot if snapshot.is_dir() else None


def check(model: str, environ: Mapping[str, str] = os.environ, weights: bool = True) -> Iterator[Finding]:
    """Findings on one model; without `weights`, as with --load-format dummy, only config and tokenizer are needed."""
    if to_be_made(model):
        yield ok("model", f"{model} is yet to be made: tests do so, with random weights, or skip what needs training")
        return
    directory = locate(model, environ)
    if directory is None:
        if model.startswith(("/", ".", "~")):
            yield error("model", f"{model}: no such directory", "it is what the servers load", "correct the path")
        else:
            do = f"hf download {model}, or name a directory (SGLANG_PD_MODEL)"
            yield error("model", f"{model} is not in {cache_directory(environ)}", WHY, do)
        return
    problems = list(_problems(directory, weights))
    for problem in problems:
        do = f"copy or download it again ({'hf download ' + model if not Path(model).is_dir() else directory})"
        yield error("model", f"{model}: {problem}", WHY, do)
    if not problems:
        yield ok("model", f"{model} is complete at {directory}")


def _problems(directory: Path, weights: bool) -> Iterator[str]:
    config = directory / "config.json"
    if not config.is_file():
        yield "config.json is missing"
    elif _json(config) is None:
        yield "config.json is not JSON"
    if not any((directory / name).is_file() for name in TOKENIZERS):
        yield f"no tokenizer ({', '.join(TOKENIZERS)})"
    if weights:
        yield from _weight_problems(directory)


def _weight_problems(directory: Path) -> Iterator[str]:
    indices = sorted(directory.glob("*.safetensors.index.json")) or sorted(directory.glob("*.bin.index.json"))
    if not indices:
        shards = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
        if not any(shard.is_file() for shard in shards):
            yield "no weights (*.safetensors)"
    else:
        index = _json(indices[0])
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names:
            yield f"{indices[0].name} has no weight_map"
            return
        shards = [directory / name for name in sorted(set(names.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        yield f"{len(missing)} of {len(shards)} shards missing: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
    for shard in shards:
        if shard.name not in missing and shard.suffix == ".safetensors" and (short := _shortfall(shard)):
            yield f"{shard.name} {short}"


def _shortfall(shard: Path) -> str | None:
    """What is wrong with the size of a safetensors file: 8 bytes, little-endian N; N bytes of JSON; the tensors."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 + header_size:
            return f"is cut off after {size} bytes"
        try:
            header = json.loads(file.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            return "is no safetensors file"
    expected = 8 + header_size + max(ends, default=0)
    return f"has {size} of {expected} bytes" if size < expected else None


def _json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
