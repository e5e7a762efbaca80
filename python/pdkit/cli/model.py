"""Makes the small models and their data again: they are generated, seeded, and trained by this project.
Each of `data`, `train`, `kernel-random` and `kernel-train` has options of its own: pdkit model NAME --help.
"""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from pdkit.core.command import Parser, count, natural, positive
from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.paths import ASSETS
from pdkit.models.cuda import store
from pdkit.models.cuda.config import HIDDEN


def add_arguments(parser: Parser) -> None:
    models = parser.add_subparsers(title="what is made", metavar="NAME", dest="model", required=True)
    data = models.add_parser("data", help="data set and tokenizer of the nano models")
    data.add_argument("--out", type=Path, default=ASSETS, metavar="DIR", help="default: the package's assets")
    _add_train(models.add_parser("train", help="the nano model of the embedded engine, trained and scored"))
    random = models.add_parser(
        "kernel-random",
        help="a random one of the size that SGLang's kernels demand",
        description="28.5 M parameters and an MTP layer of 8.9 M, in seconds. It solves nothing; what it is for is "
        "parity, integrity and the acceptance of drafts.",
    )
    random.add_argument("--out", type=Path, metavar="DIR", help=f"default: {store.cached('random')}, or the like")
    store.add_hidden_size(random)
    random.add_argument("--seed", type=natural, default=1, help="of the weights (default: %(default)s)")
    _add_kernel_train(models.add_parser("kernel-train", help="the same, trained with its MTP layer and scored"))


def _add_train(parser: Parser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/nano-dsv4"), metavar="DIR", help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    add(
        "--scale", type=positive, default=1.0, metavar="F", help="length of training; 0.01 for a smoke run (default: 1)"
    )
    add("--index-topk", type=count, default=8, metavar="N", help="compressed entries a query selects (default: 8)")
    add("--threads", type=count, default=os.cpu_count(), metavar="N", help="CPU threads (default: all)")
    add("--score-rows", type=count, default=200, metavar="N", help="to score at the end, at most 1314 (default: 200)")


def _add_kernel_train(parser: Parser) -> None:
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help=f"default: {store.cached('trained')}, or the like")
    store.add_hidden_size(parser)
    add("--few-heads", action="store_true", help="the one that is served on CPU, too: 4 heads, bfloat16, 9 MB")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="default: %(default)s")
    add("--seconds", type=positive, default=240, help="for training (default: %(default)s)")
    add("--save-every", type=positive, default=60, help="seconds (default: %(default)s)")
    add("--seed", type=natural, default=0, help="of weights and data (default: %(default)s)")
    add("--workers", type=count, default=4, help="processes that draw batches (default: %(default)s)")
    add("--score-rows", type=count, default=200, help="of the evaluation file (default: %(default)s)")


def main(args: Namespace) -> ExitCode:
    """Raises UsageError, and NotReady where there is no GPU that was asked for."""
    {"data": _data, "train": _train, "kernel-random": _kernel_random, "kernel-train": _kernel_train}[args.model](args)
    return ExitCode.PASSED


def _data(args: Namespace) -> None:
    from pdkit.models.problems import EVALUATION_ROWS, evaluation_set, write_jsonl
    from pdkit.models.tokenizer import nano_tokenizer

    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(evaluation_set(EVALUATION_ROWS), args.out / "gsm8k_nano.jsonl")
    tokenizer = nano_tokenizer()
    for model in ("nano-dsv4", "random-dsv4"):
        tokenizer.save_pretrained(args.out / model)
    print(f"wrote {EVALUATION_ROWS} problems and a tokenizer of {len(tokenizer)} tokens below {args.out}")


def _train(args: Namespace) -> None:
    from pdkit.models.cpu import fit  # imports torch and transformers, which takes seconds

    _interruptible(fit.run, args, "nothing was written")


def _kernel_random(args: Namespace) -> None:
    from pdkit.models.cuda.checkpoint import save
    from pdkit.models.cuda.config import fields
    from pdkit.models.cuda.model import KernelNano, randomize

    began = time.monotonic()
    model = KernelNano(fields(args.hidden_size))
    randomize(model, args.seed)
    path = save(model, args.out or store.cached("random", args.hidden_size))
    size = (path / store.WEIGHTS).stat().st_size / 1e6
    print(f"wrote {path} ({size:.1f} MB, hash {store.digest(path)}) in {time.monotonic() - began:.0f} s")


def _kernel_train(args: Namespace) -> None:
    if args.few_heads and args.hidden_size != HIDDEN:
        raise UsageError("--few-heads is for the narrow model: leave --hidden-size out")
    args.out = args.out or store.cached(store.FEW_HEADS if args.few_heads else "trained", args.hidden_size)
    from pdkit.models.cuda import fit

    _interruptible(fit.run, args, "the last checkpoint stays, without training.json")


def _interruptible(run: Callable[[Namespace], None], args: Namespace, left: str) -> None:
    try:
        run(args)
    except KeyboardInterrupt:
        print(f"pdkit model {args.model}: interrupted; {left}", file=sys.stderr)
        raise
