"""Answer a file of prompts: sample candidates, let the scorer of the package choose, publish the answers as Parquet.

    python examples/answer_prompts.py

The program trains nothing.
"""

import json
from pathlib import Path

import pandas

import cappy

# Prompts without references. Other columns, such as `ticket`, are kept.
rows = [json.loads(line) for line in Path("examples/instructions.jsonl").read_text().splitlines()]
prompts = [{"prompt": row["instruction"], "ticket": number} for number, row in enumerate(rows[:8])]
Path("runs/examples").mkdir(parents=True, exist_ok=True)
Path("runs/examples/prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))

# An own workspace, so that the scorer is cappy-minilm and not one that another example trained. Without references there are no shots.
settings = {
    "workspace": "runs/examples/answering",
    "source": {"kind": "files", "path": "runs/examples/prompts.jsonl"},
    "sampler.prompt.shots": 0,
}
done = cappy.answer("examples/tiny.yaml", settings=settings, overwrite=True)
print(f"answered {done['answers']} prompts from {done['candidates']} candidates: {done['uri']}")

answers = pandas.read_parquet(f"{done['uri']}/data/answers")
for row in answers.itertuples():
    print(f"{row.score:8.3f} {row.ticket} {row.response!r}")
