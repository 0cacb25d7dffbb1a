"""`python -m tests.benchmarks [NAME …]`: print one flat JSON object of figures; progress on stderr."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys

NAMES = ("dp_step", "noise", "secagg", "rounds", "server_memory", "ledger", "import", "generate")


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wanted = sys.argv[1:] or list(NAMES)
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        print(f"expected benchmarks among {', '.join(NAMES)}, got {unknown[0]!r}", file=sys.stderr)
        return 2
    figures: dict[str, float] = {}
    for name in wanted:
        module = f"tests.benchmarks.{'import_' if name == 'import' else name}"
        if importlib.util.find_spec(module) is None:
            print(f"{name}: not built yet", file=sys.stderr)
            continue
        print(f"{name}: running", file=sys.stderr, flush=True)
        figures |= importlib.import_module(module).run(
            lambda line: print(f"  {line}", file=sys.stderr, flush=True)
        )
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
