"""How much memory a run needs in each tier, from the configs alone, and which tier fits.

Weights are counted exactly. What is live beside them is a number of copies of the widest tensor,
measured on the eager modules at FLUX.1's full size (tests/test_memory.py counts again):

transformer  17.2 tensors (B, tokens, d), in the single blocks, whose MLP and QKV stand side by side
VAE          3 tensors of the last block's input, at full resolution
GGUF         what decoding one matrix takes: 12 bytes a weight

Compiled code needs less than eager, CUDA graphs a pool of their own, kernels workspaces: RESERVE.
"""

from dataclasses import dataclass

from utils.errors import UserError
from utils.layers import WIDTH, Precision, total
from utils.random_weights import configs_of
from utils.work import Call, Work, count, vae_encoder

GIB = 2**30
TIERS = ("full", "encoders", "tiled", "group", "sequential")
ON_A_CPU = ("full", "tiled")  # weights that leave go where they are
TILED = TIERS[2:]
OFFLOADED = TIERS[3:]  # the transformer's weights move in every step
TENSORS_OF_A_STEP = 17.2
TENSORS_OF_THE_VAE = 3.0
GGUF_BYTES_OF_A_WEIGHT = 12
BLOCKS_AT_ONCE = 2  # the one that runs, and the next on its way
RESERVE_GIB = {"cuda": 1.0, "cpu": 0.75}  # workspaces, graphs, fragmentation; torch itself
TILES = 2  # along an edge of the checkpoint's own size


@dataclass(frozen=True)
class Estimate:
    """What a tier keeps on the device and what comes on top at its widest moment. Units: bytes."""

    weights: int
    moment: int
    reserve: int

    @property
    def gib(self) -> float:
        """Give the peak. Units: GiB"""
        return (self.weights + self.moment + self.reserve) / GIB

    def __str__(self) -> str:
        parts = {"weights": self.weights, "tensors": self.moment, "reserve": self.reserve}
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        return f"{self.gib:.2f}GiB ({listed})"


def work_of(args, linear: str, text: str = "") -> Work:
    """List the run's layers before there is a plan; one step, since memory knows no steps."""
    call = Call.of(args, args.max_sequence_length, steps=1)
    everything = linear if args.quant_filter == "all" else ""
    base = "fp32" if args.disable_bf16 else "bf16"
    precision = Precision(base, linear=linear, other=everything, text=text)
    configs = configs_of(args.checkpoint)
    try:
        return count(configs, call, precision)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"[:200]
        raise UserError(
            f"--ckpt {args.ckpt}: its configs describe no FLUX.1 model ({why})"
        ) from None


def estimate(
    args,
    tier: str,
    linear: str = "",
    gguf_bytes: int | None = None,
    text: str = "",
    encoders_loaded: bool = True,
) -> Estimate:
    """Estimate the peak on the device.

    `linear`: the blocks' Linears, "" for the run's own dtype; `gguf_bytes`: the transformer's,
    where it stays compressed; `text`: T5's Linears, as `linear`; without `encoders_loaded` the
    text's embeddings are there already.
    """
    work = work_of(args, linear, text)
    configs, layers = configs_of(args.checkpoint), work.layers
    base = WIDTH["fp32" if args.disable_bf16 else "bf16"]
    transformer = gguf_bytes or _bytes(layers["transformer"])
    scale = transformer / total(layers["transformer"], "parameters")
    encoders = sum(_bytes(layers[name]) for name in ("t5", "clip"))
    encoder = vae_encoder(configs["vae"], 1, (work.call.height, work.call.width), "bf16")
    vae = base * (total(layers["vae_decoder"], "parameters") + total(encoder, "parameters"))

    on_cpu = args.machine.device == "cpu"
    text_bytes = _text_bytes(configs["text_encoder_2"], work.call, base)
    if not encoders_loaded:
        encoders = text_bytes = 0
    weights = vae + transformer + encoders
    if encoders_loaded and tier != "full" and not on_cpu:
        weights -= encoders
        text_bytes += max(x.parameters * WIDTH[x.dtype] for x in layers["t5"])
    step = _step_bytes(work, base)
    if gguf_bytes:
        step += GGUF_BYTES_OF_A_WEIGHT * _largest(layers["transformer"])
    if tier in OFFLOADED and not on_cpu:
        weights -= transformer
        held = _largest(layers["transformer"])
        if tier == "group":
            blocks = [
                _block(layers["transformer"], part) for part in ("double blocks", "single blocks")
            ]
            embedders = total(layers["transformer"], "parameters") - sum(n * b for n, b in blocks)
            held = embedders + BLOCKS_AT_ONCE * max(size for _, size in blocks)
        step += int(scale * held)
    moments = (
        text_bytes,
        step,
        _vae_bytes(configs["vae"], args, work.call, tier, base),
    )
    reserve = int(RESERVE_GIB[args.machine.device] * GIB)
    return Estimate(int(weights), int(max(moments)), reserve)


def _bytes(layers) -> int:
    return sum(x.count * x.parameters * WIDTH[x.dtype] for x in layers)


def _largest(layers) -> int:
    return max(layer.parameters for layer in layers)


def _block(layers, part: str) -> tuple[int, int]:
    """Give number of blocks and parameters of one."""
    here = [layer for layer in layers if layer.part == part]
    number = next(layer.count for layer in here if layer.kind == "attention")
    return number, total(here, "parameters") // number


def _step_bytes(work: Work, base: int) -> float:
    rows = next(x for x in work.layers["transformer"] if x.kind == "attention").shape.split(" x ")
    batch, heads, tokens, head = (int(n) for n in rows)
    return TENSORS_OF_A_STEP * base * batch * heads * tokens * head


def _text_bytes(config: dict, call: Call, base: int) -> int:
    """Give T5's widest moment: scores and bias of all heads (fp32 softmax), or the gated MLP."""
    scores = config["num_heads"] * call.text_tokens**2 * (2 * base + 4)
    return call.prompts * max(scores, 4 * base * call.text_tokens * config["d_ff"])


def _vae_bytes(config: dict, args, call: Call, tier: str, base: int) -> float:
    edges, images = (call.height, call.width), call.images
    if tier in TILED:  # slices of one image, tiles of half the checkpoint's own size
        tile = args.checkpoint.native_size // TILES
        edges, images = (min(edge, tile) for edge in edges), 1
    height, width = edges
    channels = config["block_out_channels"]
    widest = max(channels[0], channels[1])  # the last block's input, behind its upsampling
    picture = 3 * 4 * call.images * call.height * call.width  # what the tiles are put into, fp32
    return TENSORS_OF_THE_VAE * base * images * height * width * widest + picture
