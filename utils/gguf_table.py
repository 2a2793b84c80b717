"""The measured rows of GGUF files as the table of docs/memory.md (written by utils/readme.py)."""

from pathlib import Path

from utils.report_rows import get, read

ROWS = Path(__file__).resolve().parent.parent / "results" / "gguf" / "tiny-schnell.jsonl"


def rows() -> str:
    """List what each type and mode takes and gives, against the checkpoint in bf16 eager."""
    from utils.readme import table

    found = []
    for row in read(ROWS):
        about = get(row, "steps", "gguf", "settings") or {"types": "-", "mode": "the checkpoint"}
        scores, total = row["quality"], row["total_s"]
        found.append(
            (
                about["types"],
                about["mode"],
                f"{get(row, 'memory_gib', 'weights'):.3f}",
                f"{get(row, 'memory_gib', 'host_peak'):.2f}",
                f"{scores['psnr_db_mean']:.1f} (worst {scores['psnr_db_worst']:.1f})",
                f"{scores['latents_relative_l2']:.4f}",
                f"{total['median']:.2f} ({total['min']:.2f}-{total['max']:.2f})",
            )
        )
    header = ("matrices", "mode", "weights GiB", "host peak GiB", "PSNR dB", "latents' error")
    return table((*header, "s per call"), found)
