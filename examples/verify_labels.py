"""Label with a function of yours: an arithmetic verifier instead of Rouge-L.

    python examples/verify_labels.py

Run it from the root of the clone. It writes to `runs/examples-verified`.

Rouge-L compares texts: it gives "It is 12." a low label for the reference "12", although it is right. The verifier computes the answer
from the instruction. A function that runs the unit tests of a program has the same form; run such programs in a sandbox.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from pathlib import Path

import cappy

VERSION = "1"  # in the manifest of the set; change it with the function
FOLDER = Path("runs/examples-verified")
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def arithmetic(responses: list[str], references: list[list[str]], instructions: list[str]) -> list[float]:
    """Return 1.0 for each response whose last number is the value of the expression in its instruction, else 0.0."""
    labels = []
    for response, instruction in zip(responses, instructions, strict=True):
        numbers = re.findall(r"-?\d+", response)
        labels.append(float(bool(numbers) and int(numbers[-1]) == value(instruction)))
    return labels


def value(instruction: str) -> int:
    """Return the value of an expression such as `3 + 4` in an instruction."""
    node = ast.parse(re.findall(r"\d+ [-+*] \d+", instruction)[0], mode="eval").body
    return OPERATIONS[type(node.op)](node.left.value, node.right.value)  # type: ignore[attr-defined,no-any-return]


def main() -> None:
    """Sample sums, label them with the verifier, then by equality."""
    sums = [f"{left} {sign} {right}" for left in range(1, 5) for right in range(1, 4) for sign in "+*"]
    rows = [{"instruction": f"Calculate {each}.", "references": [str(value(each))], "dataset": "arithmetic"} for each in sums]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "workspace": str(FOLDER),
        "source": {"kind": "files", "path": str(FOLDER / "sums.jsonl"), "validation_fraction": 0.25},
        "generate": {"label": {"metric": "verify_labels:arithmetic"}},
    }
    made = cappy.generate("examples/tiny.yaml", settings=settings)
    counts = made["source_labels"]["sampled"]
    print(f"verified {counts[-1]} of {sum(counts)} sampled responses are right")

    # The same candidates with labels by text, without sampling again.
    text = cappy.annotate(made["uri"], f"{FOLDER}/text", settings={"generate.label.metric": "exact_match"})
    print(f"equal    {text['source_labels']['sampled'][-1]} of them equal the reference")


if __name__ == "__main__":
    main()
