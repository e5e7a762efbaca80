"""Generate the nano models' data set and tokenizer from their seed, and the random model's configuration.

    PYTHONPATH=python python scripts/make_nano_data.py [--out DIR]

writes ``gsm8k_nano.jsonl``, the tokenizer files of ``nano-dsv4/`` and ``random-dsv4/``, and the
latter's ``config.json`` below DIR (default: the package's assets); what is committed there is
what it writes. ``train_nano.py`` makes the rest of ``nano-dsv4/``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pdkit.models.cpu.config import nano_config
from pdkit.models.problems import EVALUATION_ROWS, evaluation_set, write_jsonl
from pdkit.models.tokenizer import nano_tokenizer

ASSETS = Path(__file__).resolve().parent.parent / "python" / "pdkit" / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="assets directory (default: %(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(evaluation_set(EVALUATION_ROWS), out / "gsm8k_nano.jsonl")
    tokenizer = nano_tokenizer()
    for model in ("nano-dsv4", "random-dsv4"):
        tokenizer.save_pretrained(out / model)
    nano_config(index_topk=16, initializer_range=0.2).save_pretrained(out / "random-dsv4")
    print(f"wrote {EVALUATION_ROWS} problems and a tokenizer of {len(tokenizer)} tokens below {out}")


if __name__ == "__main__":
    main()
