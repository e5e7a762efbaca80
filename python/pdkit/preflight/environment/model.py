"""Is a model complete on this disk? Answered without network."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from pdkit.models.cuda.store import to_be_made
from pdkit.preflight.finding import Finding, error, ok

WHY = "the servers would download it while their start-up time runs out, or fail"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tiktoken.model")


def locate(model: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The directory that a model would be loaded from: itself, or the snapshot of `main` in the cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download  # of the extra `suite`, and 0.3 s: only a repository needs it
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, cache_dir=environ.get("HF_HUB_CACHE"), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


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
            yield error("model", f"{model} is not in the cache of huggingface_hub (HF_HOME, HF_HUB_CACHE)", WHY, do)
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
    """What is wrong with header or size of a safetensors file; the tensors are not read."""
    from safetensors import SafetensorError, safe_open  # of the extra `suite`

    try:
        with safe_open(shard, framework="numpy"):
            return None
    except (SafetensorError, OSError) as error:
        return f"is cut off or no safetensors file, with {shard.stat().st_size} bytes ({error})"


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
