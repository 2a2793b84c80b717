"""One optimisation per file. Every step is a module with the same six names:

NAME       the same word in its flag, the card, the results and the docs
AFTER      names of the steps that must have been applied before it
PARTS      what it changes, of `PARTS` below
add_flags  adds its flags to the parser (the flag that turns it off among them)
check      looks at the arguments and the machine, before any weight is loaded, and gives a Verdict;
           it changes nothing (`lora` alone adds what it has read to the arguments)
apply      changes the pipeline; called only if the verdict is "on"

and a docstring with the method and why it stands where it stands. Torch is imported inside the
functions only, so that `--help` needs no torch. The order is `STEPS` in utils/pipeline_utils.py.
"""

import importlib
from dataclasses import dataclass, field

PARTS = (
    "blocks",  # the transformer's, and nothing else of it
    "decoder",  # the VAE's
    "text",  # T5 and CLIP
    "pictures",  # what becomes of the decoder's output
    "pipeline",  # anything else: whose weights, how components are called, compiled and kept
)


@dataclass(frozen=True)
class Verdict:
    """What a step will do in this run, and why."""

    state: str  # "on", "off" (by a flag), "unavailable" (hardware), "refused" (stops the program)
    reason: str = ""
    lossless: bool = True  # only meaningful when on
    settings: dict = field(default_factory=dict)  # what decides its result; enters the fingerprint
    missing_flag: str = ""  # the one that turns it on, where nobody has asked for it

    @property
    def is_on(self) -> bool:
        return self.state == "on"


def on(lossless: bool = True, **settings) -> Verdict:
    """The step runs, with these settings."""
    return Verdict("on", lossless=lossless, settings=settings)


def off(reason: str) -> Verdict:
    """The user's flags turn the step off, or leave nothing for it to do."""
    return Verdict("off", reason)


def not_given(flag: str) -> Verdict:
    """Nobody asked for the step."""
    return Verdict("off", f"no {flag}", missing_flag=flag)


def unavailable(reason: str) -> Verdict:
    """The hardware cannot do it: the run goes on without, and the card says so."""
    return Verdict("unavailable", reason)


def refused(reason: str) -> Verdict:
    """The run cannot start: what, found, expected, which flag."""
    return Verdict("refused", reason)


def components(pipeline) -> dict:
    """Name what is compiled, exported and recorded; a process of a server holds one of the two.

    `pipeline.further` holds what else is called, by name: extras/controlnet.py's nets.
    """
    decoder = pipeline.vae and pipeline.vae.decoder
    both = {"transformer": pipeline.transformer, "decoder": decoder}
    both |= getattr(pipeline, "further", {})
    return {name: module for name, module in both.items() if module is not None}


def own_class(pipeline, *mixins: type) -> None:
    """Put mixins before a pipeline's class, in a class of the same name: others keep theirs."""
    plain = type(pipeline)
    pipeline.__class__ = type(plain.__name__, (*mixins, plain), {"__module__": plain.__module__})


def import_problem(package: str, *parts: str) -> str:
    """Import a package, then parts of it: what was found instead; "" if nothing is wrong."""
    try:
        for module in (package, *parts):  # alone first: a missing package is no missing part
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{package}.".startswith(f"{error.name}."):  # or the package around it
            return f"no module {package}"
        return f"{package} is installed but broken: {error}"
    except Exception as error:  # a build for another torch or machine fails in many ways
        return f"{package} is installed but broken: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def uncompiled(args, flag: str, why: str = "") -> str:
    """Refuse a flag in one line where nothing is compiled; "" if something is."""
    if args.compile_export_mode != "disabled":
        return ""
    return f"{flag}: found --compile_export_mode disabled, expected compile or export_aoti{why}"


def missing_triton(flag: str) -> str:
    """Refuse a flag in one line without a usable triton; "" if there is one."""
    if not (problem := import_problem("triton", "triton.language")):
        return ""
    return (
        f"{flag}: found {problem}; expected the triton that belongs to torch: pip install triton, "
        f"or leave out {flag}"
    )
