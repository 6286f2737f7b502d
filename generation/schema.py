"""The Arrow columns of the regression set, of its pairs, of prepared rows, and of logged candidates. Imports only PyArrow.

`docs/explanation/architecture.md` describes each column for users of a set.
"""

from __future__ import annotations

import pyarrow as pa

SPLITS = ("train", "validation")

CANDIDATE = pa.struct(
    [
        pa.field("response", pa.string(), nullable=False),
        pa.field("label", pa.float64(), nullable=False),  # in [0, 1]; float64 keeps every bit of rouge_score's value
        pa.field("source", pa.string(), nullable=False),  # reference | choice | mismatched | sampled
        pa.field("model", pa.string()),  # this field and the fields below are null unless `source` is sampled
        pa.field("decoding", pa.string()),
        pa.field("tokens", pa.int32()),
        pa.field("finish_reason", pa.string()),  # stop | length
        pa.field("logprob", pa.float64()),  # sum over the sampled tokens, in nats
    ]
)

_INSTRUCTION = [
    pa.field("id", pa.string(), nullable=False),  # 32 hex digits, a hash of dataset, template, instruction and references
    pa.field("dataset", pa.string(), nullable=False),
    pa.field("template", pa.string()),
    pa.field("instruction", pa.string(), nullable=False),
    pa.field("references", pa.list_(pa.string()), nullable=False),
    pa.field("answer_choices", pa.list_(pa.string())),
]

SAMPLED = pa.list_(
    pa.struct(
        [
            ("response", pa.string()),
            ("decoding", pa.string()),
            ("tokens", pa.int32()),
            ("finish_reason", pa.string()),
            ("logprob", pa.float64()),
        ]
    )
)
"""The sampled candidates of a row before they have labels."""

DATASET = pa.schema([*_INSTRUCTION, pa.field("candidates", pa.list_(CANDIDATE), nullable=False)])
"""A row of a published set: one instruction with all its candidates."""

PAIRS = pa.schema(
    [
        pa.field("instruction", pa.string(), nullable=False),
        *(CANDIDATE.field(name) for name in ("response", "label", "source")),
        *_INSTRUCTION[1:3],
        _INSTRUCTION[0],
        *(CANDIDATE.field(name) for name in ("model", "decoding", "logprob", "tokens")),
    ]
)
"""A row of a table of pairs (`cappy push --pairs`): one candidate with its instruction."""

PREPARED = pa.schema(
    [
        *_INSTRUCTION,
        pa.field("shots", pa.list_(pa.struct([pa.field("instruction", pa.string()), pa.field("response", pa.string())])), nullable=False),
        pa.field("mismatched", pa.list_(pa.string()), nullable=False),
    ]
)
"""A row before sampling: with the config, it determines the row's candidates."""

REUSED = pa.list_(pa.struct([*SAMPLED.value_type, ("model", pa.string()), ("label", pa.float64())]))
"""The candidates of a row from earlier sets. `label` is null if it is computed again."""

PREPARED_WITH_REUSE = PREPARED.append(pa.field("reused", REUSED)).append(pa.field("draw", pa.list_(pa.int32())))
"""A row before sampling, with its candidates from earlier sets (null without any).

`draw` has the number of candidates to sample for each decoding of the config, in order; null samples all of them.
"""

CANDIDATE_LOG = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # the id of the answer
        pa.field("prompt", pa.int32(), nullable=False),  # number of the prompt in its request, from 0
        pa.field("time", pa.timestamp("s", "UTC"), nullable=False),
        pa.field("instruction", pa.string(), nullable=False),  # as the scorer reads it
        pa.field(
            "candidates",
            pa.list_(
                pa.struct(
                    [
                        *SAMPLED.value_type,
                        pa.field("score", pa.float64()),  # raw logit of the scorer; null without one
                        pa.field("picked", pa.int32()),  # 0 for the first choice of the answer; null for other candidates
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field("model", pa.string()),  # `model` of the request
        pa.field("llm", pa.string()),  # `sampler.model`
        pa.field("scorer", pa.string()),
        pa.field("scorer_version", pa.string()),
        pa.field("selection", pa.string()),  # the selection or the fallback that ranked the candidates
    ]
)
"""A row of the log of served candidates (`serving.log_candidates`): one prompt with its candidates."""
