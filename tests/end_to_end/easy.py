"""Problems and settings that even a tiny random model learns something from in seconds."""

import json
from pathlib import Path

SETTINGS = [
    "model.compute_dtype=float32", "model.prompt=plain", "rounds=2", "data.num_labelled=12", "data.dev_size=4",
    "lora.rank=8", "lora.alpha=16",
    "sft.learning_rate=1e-2", "sft.epochs=12", "sft.batch_size=8",
    "sampling.max_new_tokens=24", "sampling.samples_for_pairs=4", "sampling.samples_for_labels=3",
    "dpo.learning_rate=1e-3", "dpo.batch_size=8", "dpo.max_steps=4", "export.quant=q8_0",
]  # fmt: skip
NAMES = ["Ann", "Bob", "Eve", "Dan", "Fay", "Gus", "Ida", "Jon", "Kim", "Leo", "Mia", "Ned"]


def write_problems(path: Path) -> Path:
    """24 questions and two answers: half carry a rationale, half the number alone."""
    rows = []
    for i, name in enumerate(NAMES * 2):
        left, right = (2, 2) if i % 3 else (2, 5)
        answer = f"{left}+{right}=<<{left}+{right}={left + right}>>{left + right}\n#### {left + right}"
        place = "in" if i < len(NAMES) else "at"
        rows.append(
            {
                "question": f"{name} {place} {left} and {right}?",
                "answer": answer if i % 2 else str(left + right),
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
