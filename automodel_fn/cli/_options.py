"""The options of the commands, with their help.

Each is named, and not after its parameter: typer before 0.29 takes the name from the metavar.
"""

from pathlib import Path
from typing import Annotated

import typer

Dtype = Annotated[
    str, typer.Option("--dtype", help="Target dtype: bf16, fp16 or fp32.", metavar="DTYPE")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else there.")]

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A folder with a checkpoint, or a transformers model type with a shrunken config. "
        "Without it: a small DeepSeek-V3 style mixture of experts.",
        metavar="MODEL",
        show_default=False,
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        help="File or folder to read as bytes (repeatable). Without it: the source of Python's "
        "standard library.",
        metavar="PATH",
        show_default=False,
    ),
]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Run folder; new or empty. [default: runs/DATE-TIME]",
        metavar="FOLDER",
        show_default=False,
    ),
]

KeepFp32 = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-fp32",
        help="Keep in fp32: an FQN, a glob or re:... (repeatable).",
        metavar="PATTERN",
        show_default=False,
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        help="Leave alone, in the same grammar (repeatable).",
        metavar="PATTERN",
        show_default=False,
    ),
]
Match = Annotated[
    str,
    typer.Option(
        "--match", help="How declared keywords match: substring, segment or hf.", metavar="RULE"
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html", help="Also write the plan as a page.", metavar="FILE", show_default=False
    ),
]

Backend = Annotated[
    Path | None,
    typer.Option(
        "--backend",
        help="A BackendConfig as YAML or JSON: which backend runs which modules.",
        metavar="FILE",
        show_default=False,
    ),
]


def _field(option: str, text: str) -> typer.models.OptionInfo:
    return typer.Option(option, help=text, metavar="VALUE", show_default=False)


Attn = Annotated[str | None, _field("--attn", "Attention: auto, te, sdpa, flex, eager.")]
Linear = Annotated[str | None, _field("--linear", "Linear layers: auto, torch, te.")]
RmsNorm = Annotated[str | None, _field("--rms-norm", "RMSNorms: torch, torch_fp32, te.")]
RopeFusion = Annotated[
    str | None, _field("--rope-fusion", "Rotary embeddings by one kernel: auto, true, false.")
]
AsyncMasks = Annotated[
    str | None, _field("--async-masks", "Masks without waiting for the GPU: auto, true, false.")
]
Swiglu = Annotated[str | None, _field("--swiglu", "SwiGLU: auto, torch, fused, recomputed.")]
Loss = Annotated[str | None, _field("--loss", "The loss: auto, torch, fused (no logits).")]
HeadPrecision = Annotated[
    str | None,
    _field("--lm-head-precision", "Products of the head, to float32 logits: fp32, bf16x3, bf16."),
]
Experts = Annotated[str | None, _field("--experts", "Experts: auto, torch, torch_mm, te, gmm.")]
Fp8 = Annotated[str | None, _field("--fp8", "FP8 in Transformer Engine: current, block, mxfp8.")]

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any other field of the backend: as gate_precision=fp32, compile_attn=true, "
        "te_fp8=none (repeatable).",
        metavar="FIELD=VALUE",
        show_default=False,
    ),
]

BenchmarkName = Annotated[
    str | None, typer.Argument(help="The benchmark. Without it: the list of them.", metavar="NAME")
]
Device = Annotated[
    str, typer.Option("--device", help="Where to measure: cpu or cuda.", metavar="DEVICE")
]
Subjects = Annotated[
    list[str] | None,
    typer.Option(
        "--subject",
        help="A subject or a glob (repeatable); ours is always measured. [default: all]",
        metavar="SUBJECT",
        show_default=False,
    ),
]
Cases = Annotated[
    list[str] | None,
    typer.Option(
        "--case",
        help="A case, a glob or a group (repeatable). [default: the group full]",
        metavar="CASE",
        show_default=False,
    ),
]
StoredResult = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="Show a result that --out wrote, instead of measuring.",
        metavar="FILE",
        show_default=False,
    ),
]
MarkdownFile = Annotated[
    Path | None,
    typer.Option(
        "--markdown", help="Also write the tables as Markdown.", metavar="FILE", show_default=False
    ),
]
SvgFile = Annotated[
    Path | None,
    typer.Option(
        "--svg",
        help="Also draw the result; needs the extra plots.",
        metavar="FILE",
        show_default=False,
    ),
]
ResultFile = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Also write the result as JSON.", metavar="FILE", show_default=False
    ),
]
