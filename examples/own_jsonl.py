"""From your JSONL file to a trained scorer and a report: generate, train, evaluate.

    python examples/own_jsonl.py

Run it from the root of the clone. It writes to `runs/examples`; the next examples read the scorer from there.
Each line of the file is one instruction: {"instruction": "...", "references": ["..."], "dataset": "task name"}.
"""

import cappy

config = cappy.load_config("examples/tiny.yaml")

# Sample 5 responses for each instruction, label each with Rouge-L against the references, publish the regression set.
made = cappy.generate(config)
print(f"set      {made['uri']}: {made['instructions']} instructions, {made['sources']['sampled']} sampled responses")

# Fit the scorer to the labels.
trained = cappy.train(config)
print(f"scorer   {trained['uri']}")

# Compare the scorer's choice with greedy decoding, one sample, the LLM's own likelihood and the best possible choice (oracle).
report = cappy.evaluate(config)
for method, figures in report["averages"].items():
    print(f"{method:10} Rouge-L {figures['mean']:5.1f}")
print(f"report   {report['report']}")
