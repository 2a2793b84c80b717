"""What the model folders share: flags, one part of the pipeline, tensors in and out of Triton.

Each model loads only its own part of the checkpoint, through the same parser, checks and steps as
gen_image.py. Their flags stand in config.pbtxt under `parameters`, as they would be typed.
"""

import json
import locale
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("clip_encoder", "t5_encoder", "dit_transformer", "vae_decoder", "bls_orchestrator")
HEALTH = "deep_health"
PARTS = {  # model -> components of FluxPipeline that it holds; every one can have the scheduler
    "clip_encoder": ("text_encoder", "tokenizer"),
    "t5_encoder": ("text_encoder_2", "tokenizer_2"),
    "dit_transformer": ("transformer",),
    "vae_decoder": ("vae",),
    "bls_orchestrator": (),
}
WHOLE_CALL = (  # flags of steps that change a pipeline's call, or more than one component
    "gguf_file",
    "cache_dit_config",
    "step_mask",
    "modulation_once",
    "compile_image_encoder",
    "compile_text_encoders",
    "drop_text_padding",
    "true_cfg_scale",
    "scheduler",
    "sigmas",
    "lora",
)
COMPONENTS = tuple(name for names in PARTS.values() for name in names)


def settings(flags: str | list[str]):
    """Turn flags, as gen_image.py takes them, into checked arguments.

    Raises: UserError with one line per problem; SystemExit for an unknown flag.
    """
    from utils.benchmark_utils import create_parser
    from utils.errors import UserError
    from utils.prepare import prepare
    from utils.quiet import quiet_libraries

    quiet_libraries()
    words = shlex.split(flags) if isinstance(flags, str) else list(flags)
    args = create_parser("serve").parse_args(words)
    if args.memory == "auto":
        args.memory = "full"  # a process holds one part, not what the estimates are about
    prepare(args)
    if args.checkpoint.defaults.takes_image:
        raise UserError(f"--ckpt {args.ckpt}: edits an image; the server takes text prompts only")
    if args.memory != "full":
        raise UserError(
            f"--memory {args.memory}: every process of the server keeps its part; leave it out"
        )
    for flag in WHOLE_CALL:
        if getattr(args, flag):
            raise UserError(
                f"--{flag}: needs the whole call of a pipeline, which the server splits; leave it "
                "out"
            )
    return args


def load_part(args, model: str):
    """Load what one model needs as a FluxPipeline whose other components are None.

    Raises: UserError if the weights are missing, damaged or not to be had.
    """
    import diffusers

    absent = {name: None for name in COMPONENTS if name not in PARTS[model]}
    if args.checkpoint.random_weights:
        from utils.random_weights import build

        pipeline = build(args.checkpoint, args.dtype, args.device, args.seed)
        for name in absent:
            setattr(pipeline, name, None)
        return pipeline
    from utils.errors import UserError

    source = args.checkpoint.path or args.checkpoint.name
    try:
        pipeline = diffusers.FluxPipeline.from_pretrained(source, dtype=args.dtype, **absent)
    except (OSError, ValueError) as error:
        raise UserError(f"--ckpt {args.ckpt}: {' '.join(str(error).split())[:300]}") from error
    return pipeline.to(args.device)


def begin(arguments: dict):
    """Read a model's parameters as Triton hands them to `initialize`.

    Returns: the checked arguments and the other parameters, name -> string
    Raises: RuntimeError in one line if this process cannot serve.
    """
    import numpy
    import torch

    if int(numpy.__version__.split(".")[0]) >= 2:  # loads, reports READY, returns wrong values
        raise RuntimeError(
            f"found numpy {numpy.__version__}, expected 1.x: Triton's Python stub was built for "
            "it; install triton_models/requirements.txt into an environment of its own"
        )
    # The stub's Python ignores the environment's locale and would read files, Inductor's own
    # templates among them, as ASCII
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    found = json.loads(arguments["model_config"])["parameters"]
    values = {name: value["string_value"] for name, value in found.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(int(values.get("threads", "1")))  # before packages are looked for
    args = settings(values.pop("flags"))
    if args.machine.device != "cpu":
        torch.set_num_threads(threads)
    return args, values


def batch_sizes(values: dict[str, str]) -> tuple[int, ...]:
    """Read the rows that one forward may have: each size is a graph or a package of its own."""
    return tuple(sorted(int(size) for size in values["batch_sizes"].split(",")))


class Inputs:
    """One Triton request's inputs by name, as torch tensors or Python values."""

    def __init__(self, request) -> None:
        self.tensors = {tensor.name(): tensor for tensor in request.inputs()}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str):
        """Give a tensor without a copy, where Triton has it (host or GPU); None if it is absent."""
        import torch

        if name not in self.tensors:
            return None
        return torch.from_dlpack(self.tensors[name].to_dlpack())

    def values(self, name: str, default=None) -> list:
        """Give the flat values of a small input; strings as bytes."""
        if name not in self.tensors:
            return [] if default is None else [default]
        return self.tensors[name].as_numpy().reshape(-1).tolist()

    def value(self, name: str, default=None):
        """Give the only value of an input, or the default where it is absent."""
        found = self.values(name, default)
        return found[0] if found else default


def outgoing(name: str, tensor):
    """Give a Triton tensor that shares memory with a torch tensor."""
    import triton_python_backend_utils as pb_utils

    # from_dlpack ignores the stride of the first dimension: an expanded tensor would pass, wrong
    return pb_utils.Tensor.from_dlpack(name, tensor.detach().contiguous())


def send(sender, response=None, last: bool = False) -> None:
    """Send one response; the last one, which may be none, also closes the request.

    Triton's stub (2.51) drops the tensors that the caller did not ask for after it has let go of
    Python's lock: were they its own alone by then, it would free their arrays beside running
    threads, which damages the heap.
    """
    import triton_python_backend_utils as pb_utils

    held = [] if response is None else response.output_tensors()
    flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
    sender.send(*([] if response is None else [response]), flags=flags)
    del held


def send_last(sender, response) -> None:
    """Send a request's last response; where it cannot be sent (shared memory is full), an error.

    The final flag comes by itself: a sender that was given it takes nothing more, even if the
    response that came with it was never sent, and its request would not end. But with an error it
    has to come: of two messages a calling model's iteration never ends (Triton 2.51).
    """
    import triton_python_backend_utils as pb_utils

    if response.has_error():
        send(sender, response, last=True)
        return
    try:
        send(sender, response)
    except Exception as error:
        send(sender, pb_utils.InferenceResponse([], error=failure(error)), last=True)
    else:
        send(sender, last=True)


def failure(error: Exception, code: str = "INTERNAL"):
    """Give a Triton error of one line that begins with gRPC's name of its code."""
    import triton_python_backend_utils as pb_utils

    text = " ".join(str(error).split()) or type(error).__name__
    value = getattr(pb_utils.TritonError, "INVALID_ARG" if code == "INVALID_ARGUMENT" else code)
    return pb_utils.TritonError(f"{code}: {text}", value)
