"""Prepares the two recipes `tiny_from_scratch_*.yaml`: a random model in models/tiny, and sums to imitate in data/.

    python recipes/tiny_from_scratch.py [ROOT]

Only some of the sums are right, so that imitation teaches the form of an answer and leaves the rest to reinforcement
learning.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from rl_lightning.models.tiny import write_tiny_model

N_EXAMPLES = 4096
RIGHT = 0.4
"""Share of right answers among the examples; the others are sums of other numbers."""


def examples(seed: int) -> list[dict[str, str]]:
    """`{"prompt": "3+4=", "answer": "7"}`, right or not."""
    rng = random.Random(seed)
    lines = []
    for _ in range(N_EXAMPLES):
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        answer = a + b if rng.random() < RIGHT else rng.randint(0, 9) + rng.randint(0, 9)
        lines.append({"prompt": f"{a}+{b}=", "answer": str(answer)})
    return lines


def main(root: Path) -> None:
    """Writes both."""
    write_tiny_model(root / "models" / "tiny")
    (root / "data").mkdir(exist_ok=True)
    for name, seed in (("train", 0), ("val", 1)):
        lines = [json.dumps(example) for example in examples(seed)]
        (root / "data" / f"tiny_sums_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
