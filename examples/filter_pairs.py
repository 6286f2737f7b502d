"""Filter training data with a scorer: score given pairs, keep the best response of each instruction, export it for fine-tuning.

    python examples/filter_pairs.py [SCORER]

SCORER is a folder, an s3:// folder or a name. The default is cappy-minilm, the scorer of the package.
"""

import json
import sys
from pathlib import Path

import cappy

# Two responses for each instruction: its reference, and the reference of another one.
rows = [json.loads(line) for line in Path("examples/instructions.jsonl").read_text().splitlines()]
answers = [row["references"][0] for row in rows]
pairs = [
    {"prompt": row["instruction"], "completion": completion, "right": completion == answer}
    for row, answer, other in zip(rows, answers, answers[1:] + answers[:1], strict=True)
    for completion in (answer, other)
]
Path("runs/examples").mkdir(parents=True, exist_ok=True)
Path("runs/examples/pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

# The command line does the same: cappy score runs/examples/pairs.jsonl runs/examples/best --top-per-instruction 1
scorer = sys.argv[1] if len(sys.argv) > 1 else "cappy-minilm"
best = cappy.score("runs/examples/pairs.jsonl", "runs/examples/best", scorer=scorer, top_per_instruction=1, overwrite=True)
print(f"scored   {best['pairs']} pairs, kept {best['rows']}; mean score {best['scores']['mean']:.3f}")

# Columns of TRL's SFTTrainer.
sft = cappy.export("runs/examples/best", "runs/examples/sft", "sft", overwrite=True)
print(f"export   {sft['rows']} rows: {sft['uri']}")
