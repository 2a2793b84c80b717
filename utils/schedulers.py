"""The solver between noise and picture, and the noise levels (sigmas) at which it asks the model.

Those of diffusers that solve FLUX.1's flow; what was tried and does not: docs/schedulers.md, with
the table of quality against steps. FLUX.1's own is `euler`, one forward a step. `heun` runs two
forwards in every step but the last; the multistep solvers reuse earlier ones and run one.

FluxPipeline passes every scheduler a shift `mu` made of the number of image tokens; the solvers
that were written for diffusion take it only as dynamic shifting, so Schnell, which shifts nothing,
gets a dynamic shift of 0. They also lose their sigmas in FluxPipeline and make their own, so a
written schedule needs `euler` or `heun`.
"""

import importlib.util
import itertools
import math
from dataclasses import dataclass, field

TRAINING_TIMESTEPS = 1000  # of FLUX.1's scheduler config: more steps repeat them
EULER = "FlowMatchEulerDiscreteScheduler"
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@dataclass(frozen=True)
class Solver:
    """One value of --scheduler."""

    cls: str  # of diffusers, or ShiftedHeun
    schedules: tuple[str, ...] = ("default",)
    written: bool = False  # takes sigmas that are written out
    evaluations: int = 1  # of the velocity in a step; the last step has one
    config: dict = field(default_factory=dict)


SCHEDULES_LOST = "diffusers' other solvers ignore it or take a diffusion model's noise levels"
NAMED = ("default", "karras", "exponential", "beta")
SOLVERS = {
    "euler": Solver(EULER, NAMED, written=True),
    "heun": Solver("ShiftedHeun", written=True, evaluations=2),
    "dpm": Solver("DPMSolverMultistepScheduler", config=FLOW | {"solver_order": 2}),
    "unipc": Solver("UniPCMultistepScheduler", config=FLOW | {"solver_order": 2}),
}


def add_flags(add) -> None:
    """Add the solver and its sigmas; `add` is a parser's add_argument."""
    add(
        "--scheduler",
        choices=tuple(SOLVERS),
        help="solver of the flow (the checkpoint's own, euler): heun takes two forwards a step; "
        "quality against steps: docs/schedulers.md",
    )
    add(
        "--sigmas",
        metavar="NAME_OR_LIST",
        help=f"noise levels: {', '.join(NAMED)} (euler), or written out before the checkpoint's "
        "shift, such as 1,0.75,0.5,0.25, a step each (euler, heun)",
    )


def is_default(args) -> bool:
    """Whether the run takes the checkpoint's own scheduler as it is."""
    return args.scheduler in (None, "euler") and args.sigmas in (None, "default")


def written(args) -> list[float] | None:
    """Give the sigmas that are written out; None for a named schedule."""
    if args.sigmas in (None, *NAMED):
        return None
    return [float(word) for word in args.sigmas.split(",")]


def problems(args) -> list[str]:
    """Refuse sigmas that the solver cannot take."""
    name, text = args.scheduler or "euler", args.sigmas
    if text is None:
        return []
    solver = SOLVERS[name]
    if text in NAMED:
        if text in solver.schedules:
            absent = text == "beta" and importlib.util.find_spec("scipy") is None
            return ["--sigmas beta: no module scipy; pip install scipy==1.17.1"] * absent
        return [f"--sigmas {text}: found --scheduler {name}, expected euler ({SCHEDULES_LOST})"]
    try:
        values = written(args)
    except ValueError:
        return [f"--sigmas {text}: expected {', '.join(NAMED)} or numbers such as 1,0.75,0.5,0.25"]
    falling = all(a > b for a, b in itertools.pairwise(values))
    if not (falling and values[-1] > 0 and values[0] <= 1 and all(map(math.isfinite, values))):
        return [f"--sigmas {text}: expected numbers that fall from at most 1, all above 0"]
    if not solver.written:
        return [
            f"--sigmas {text}: found --scheduler {name}, expected euler or heun (diffusers' "
            f"FluxPipeline passes {name} no sigmas)"
        ]
    if args.num_inference_steps not in (None, len(values)):
        return [f"--num_inference_steps {args.num_inference_steps}: --sigmas has {len(values)}"]
    return []


def settle(args) -> None:
    """Take a step for each of the sigmas that are written out."""
    if values := written(args):
        args.num_inference_steps = len(values)


def loop_problem(args) -> str:
    """Say why a loop that knows its steps beforehand cannot follow the solver; "" if it can."""
    name = args.scheduler or "euler"
    if name == "euler":
        return ""
    why = "runs the transformer twice a step" if name == "heun" else "keeps earlier outputs"
    return f"{name} {why}, Euler's steps were expected; leave one of the two out"


def evaluations(args) -> int:
    """Count the forwards of a call's loop, without those of true CFG."""
    steps = args.num_inference_steps
    return 1 + (steps - 1) * SOLVERS[args.scheduler or "euler"].evaluations


def call(args) -> dict:
    """Give what the pipeline's call takes for it."""
    values = written(args)
    return {} if values is None else {"sigmas": values}


def install(pipeline, args) -> None:
    """Replace a loaded pipeline's scheduler by the chosen one, with the same shift."""
    if is_default(args):
        return
    import diffusers

    solver, config = SOLVERS[args.scheduler or "euler"], dict(pipeline.scheduler.config)
    if "use_flow_sigmas" in solver.config and not config.get("use_dynamic_shifting"):
        config |= {"use_dynamic_shifting": True, "base_shift": 0.0, "max_shift": 0.0}
    extra = {f"use_{args.sigmas}_sigmas": True} if args.sigmas in NAMED[1:] else {}
    if solver.cls == "ShiftedHeun":
        from utils.heun import ShiftedHeun as cls
    else:
        cls = getattr(diffusers, solver.cls)
    pipeline.scheduler = cls.from_config(config, **solver.config, **extra)
