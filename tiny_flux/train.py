"""Train tiny-schnell from nothing: `python -m tiny_flux.train`.

Everything is scheduled by step count, saved as it goes, and resumed from the work folder when
the command is given again.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

HERE = Path(__file__).parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "tiny-schnell", help="the checkpoint")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="states to resume from")
    parser.add_argument("--procs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-vae", type=int, default=1000, help="encoder and decoder")
    parser.add_argument("--steps-decoder", type=int, default=600, help="decoder alone")
    parser.add_argument("--steps-text", type=int, default=300, help="text encoders alone")
    parser.add_argument("--steps-flow", type=int, default=9600)
    parser.add_argument("--steps-finish", type=int, default=300, help="decoder on drawn latents")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--pool", type=int, default=12000, help="pictures the flow learns from")
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=2.5e-3)
    parser.add_argument("--no-compile", action="store_true", help="needs no C++ compiler")
    return parser.parse_args(argv)


def main() -> None:
    """Train the autoencoder, then text encoders and transformer, then finish the decoder."""
    args = parse_args()
    from .train_decoder import train_decoder
    from .train_flow import train_flow
    from .train_vae import train_vae

    args.work.mkdir(parents=True, exist_ok=True)
    vae = args.work / "vae"
    clock = time.perf_counter()
    if not (vae / "config.json").exists():
        train_vae(vae, args.procs, args.seed, args.steps_vae, args.steps_decoder)
    plan = {
        "text": args.steps_text,
        "flow": args.steps_flow,
        "save_every": args.save_every,
        "pool": args.pool,
        "lr": args.lr,
        "muon_lr": args.muon_lr,
        "compile": not args.no_compile,
    }
    train_flow(vae, args.out, args.work, args.procs, args.seed, plan)
    train_decoder(args.out, args.procs, args.seed, args.steps_finish)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = used.ru_utime + used.ru_stime
    print(f"done: {time.perf_counter() - clock:.0f} s, {cpu_s:.0f} CPU-seconds")


if __name__ == "__main__":
    main()
