"""Tell what this machine can do and what stands in the way, or what an error message means.

python -m extras.doctor                      the whole examination, a picture included
python -m extras.doctor --explain-error LOG  what a failed run's output means, and what cures it
python -m extras.doctor --check_weights      every tensor of the checkpoint, read and finite?

Exit code 0: healthy, or explained; 1: a problem was found, or the error is not a known one; 2: bad
input.
"""

import dataclasses
import json
import sys
from pathlib import Path

from extras.doctor import advice
from extras.doctor.checks import Finding
from utils.benchmark_utils import create_parser
from utils.errors import UserError, run_script
from utils.quiet import quiet_libraries

MARKS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


def parse_arguments():
    """Take a run's own flags: the doctor looks at that run."""
    parser = create_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument_group("what to look at").add_argument
    add("--explain-error", metavar="FILE", help="a failed run's output, a PNG, or - for stdin")
    add("--check_weights", action="store_true", help="read the checkpoint's tensors, nothing else")
    add(
        "--skip_self_test",
        action="store_true",
        help="make no picture (seconds instead of a minute)",
    )
    add("--json", action="store_true", help="print the findings as JSON")
    return parser.parse_args()


def explain_error(source: str, as_json: bool) -> int:
    """Explain a log, or a picture. Returns: the exit code."""
    text = _read(source)
    found = advice.explain(text)
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
    elif found:
        print(advice.render(found))
    else:
        print(
            f"not known: nothing in these {len(text.splitlines())} line(s) is a failure that the "
            f"doctor knows.\n  last line  {advice.last_line(text) or '(empty)'}\n"
            "  do   python -m extras.doctor"
        )
    return 0 if found else 1


def _read(source: str) -> str:
    """Read a log; of a picture say what is wrong with it in the words of utils/quality.py."""
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"--explain-error {source}: cannot be read ({error.strerror})") from None
    if not content.startswith(b"\x89PNG"):
        return content.decode(errors="replace")
    import io

    import torch
    from PIL import Image

    from utils.quality import Result, check_sane

    try:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        check_sane(Result([picture], torch.zeros(1)))
    except (OSError, SyntaxError) as error:
        raise UserError(f"--explain-error {source}: no whole PNG ({error})") from None
    except RuntimeError as error:
        return str(error)
    return f"{source}: a picture that is not constant"


def examine(args) -> list[Finding]:
    """Look at everything; a checkpoint that cannot be had does not stop the rest."""
    from extras.doctor import availability, checks, self_test
    from utils import card
    from utils.prepare import settle_call

    found = []
    try:
        settle_call(args)
    except UserError as error:
        found += [_refusal(line) for line in str(error).splitlines()]
        args = _bundled(args)
    found += checks.hardware(args.machine, card.gpu_state(args).get("driver_version"))
    found += checks.versions()
    found.append(_memory(args))
    found += availability.steps(args)
    found.append(checks.cache_directory(args.cache_dir))
    found += checks.hub()
    if not args.skip_self_test:
        found += _self_test(args, self_test.run)
    return found


def _refusal(line: str) -> Finding:
    known = advice.explain(line)
    return Finding("call", "problem", line, known[0].commands[0] if known else "")


def _bundled(args):
    """Look at the rest with the bundled checkpoint, on the device if there is one."""
    from utils.hardware import detect
    from utils.prepare import settle_call

    flags = ["--ckpt", "tiny-schnell", "--cache-dir", args.cache_dir]
    try:
        detect(args.device)
        flags += ["--device", args.device] if args.device else []
    except UserError:
        flags += ["--device", "cpu"]
    skip, args = args.skip_self_test, create_parser().parse_args(flags)
    args.skip_self_test = skip
    settle_call(args)
    return args


def _memory(args) -> Finding:
    from extras.doctor.checks import free_gib

    return Finding(
        "memory", "ok", f"{free_gib(args.device):.1f} GiB free on {args.machine.short()}"
    )


def _self_test(args, run) -> list[Finding]:
    try:
        return run(["--device", args.device, "--cache-dir", args.cache_dir])
    except UserError as error:
        return [_refusal(line) for line in str(error).splitlines()]
    except Exception as error:  # whatever breaks here would break a run: a finding, not a crash
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        known = advice.explain(text)
        return [Finding("self-test", "problem", text, known[0].commands[0] if known else "")]


def main() -> None:
    """Parse, look, print, and tell by the exit code."""
    args = parse_arguments()
    if args.explain_error:
        sys.exit(explain_error(args.explain_error, args.json))
    quiet_libraries()
    if args.check_weights:
        from extras.doctor.checks import weights
        from utils.prepare import settle_call

        settle_call(args)
        found = weights(args.checkpoint)
    else:
        found = examine(args)
    healthy = not any(one.state == "problem" for one in found)
    if args.json:
        findings = [dataclasses.asdict(one) for one in found]
        print(json.dumps({"healthy": healthy, "findings": findings}, indent=1))
    else:
        for one in found:
            print(f"{MARKS[one.state]}  {one.topic:26s} {one.text}")
            if one.fix and one.state != "ok":
                print(f"{'':9s}{'':26s} do: {one.fix}")
        print("healthy" if healthy else "not healthy")
    sys.exit(0 if healthy else 1)


if __name__ == "__main__":
    run_script(main)
