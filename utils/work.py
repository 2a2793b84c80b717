"""The layers of FLUX.1's networks in the order in which they run, from their configs alone.

Written down once more instead of traced, so that every number is there in milliseconds, without
torch and without weights; a test compares it with `torch.utils.flop_counter` on the real modules.
What is counted is told in utils/layers.py.

Source: diffusers 0.42 (transformer_flux.py), transformers 5 (modeling_t5.py, modeling_clip.py).
"""

from dataclasses import dataclass

from utils.layers import Layer, Precision, attention, elementwise, linear, lookup, modulation, place
from utils.prompts import count_images
from utils.work_vae import vae_decoder, vae_encoder

STAGES = {  # as run_benchmark.py names them -> what runs in it
    "prompt_encoding": ("clip", "t5"),
    "image_encoding": ("vae_encoder",),  # Kontext's image
    "before_the_loop": ("constants",),  # what step `modulation` takes out of it; not timed
    "denoising_step": ("transformer",),
    "decoding": ("vae_decoder",),
}
TRANSFORMER = {  # FluxTransformer2DModel's own defaults: FLUX.1's sizes
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
}
MLP_RATIO = 4  # of the transformer's blocks; not in its config
CONSTANT = ("txt in", "RoPE table")  # of the transformer: the same in every step
SINUSOID = 256  # channels of timestep and guidance before their MLPs; not in its config


@dataclass(frozen=True)
class Call:
    """The shapes of one call of the pipeline."""

    height: int  # pixels
    width: int
    text_tokens: int
    steps: int  # evaluations of the velocity: with Heun's method more than steps of the schedule
    prompts: int = 1
    images: int = 1  # of all prompts together
    reference: tuple[int, int] | None = None  # height and width of Kontext's image, pixels
    modulation_once: bool = False  # before the loop, for all steps
    subpixel_upsampling: bool = False  # the decoder's upsamplings inside of their convolutions
    true_cfg: bool = False  # text encoders and transformer run once more, with a negative prompt

    @classmethod
    def of(cls, args, text_tokens: int, steps: int, **others: bool) -> "Call":
        """Collect what settled arguments say of it."""
        prompts, images, image = len(args.prompt), count_images(args), args.pil_image
        reference = image and (image.height, image.width)
        edges = args.height, args.width
        return cls(*edges, text_tokens, steps, prompts, images, reference, **others)


@dataclass(frozen=True)
class Work:
    """Every layer of a call, by component; a component without work (no image to encode) is ()."""

    call: Call
    layers: dict[str, tuple[Layer, ...]]

    def stage(self, name: str) -> list[Layer]:
        """Give the layers of one run of a stage (one step of denoising_step)."""
        return [layer for component in STAGES[name] for layer in self.layers[component]]

    def runs(self, name: str) -> int:
        """Say how often a stage runs in the call."""
        often = 1 + (self.call.true_cfg and name in ("prompt_encoding", "denoising_step"))
        return often * self.call.steps if name == "denoising_step" else often


def transformer(config: dict, batch: int, image: int, text: int, precision: Precision) -> list:
    """List the layers of one forward of FluxTransformer2DModel.

    `image` counts all image tokens, Kontext's reference among them.
    """
    config = TRANSFORMER | config
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    d, base, fast = heads * head, precision.base, precision.linear
    mlp, both = MLP_RATIO * d, image + text
    channels, outer = config["in_channels"], precision.other
    pooled = config["pooled_projection_dim"]

    embedders = [
        linear("img in", batch * image, channels, d, base, outer),
        linear("txt in", batch * text, config["joint_attention_dim"], d, base, outer),
        elementwise("RoPE table", both, 0, 2 * head, base, "fp32"),
    ]
    for name, inputs in (("time", SINUSOID), ("guidance", SINUSOID), ("CLIP", pooled)):
        if name != "guidance" or config["guidance_embeds"]:
            embedders.append(modulation(f"{name} MLP 1", batch, inputs, d, precision))
            embedders.append(modulation(f"{name} MLP 2", batch, d, d, precision))

    double = []
    for stream, rows in (("img", batch * image), ("txt", batch * text)):
        double += [
            modulation(f"{stream} AdaLN", batch, d, 6 * d, precision),
            elementwise(f"{stream} norm + modulate", rows, d, d, base, fast),
            linear(f"{stream} QKV", rows, d, 3 * d, base, fast),
            elementwise(
                f"{stream} QK norm + RoPE", rows, 3 * d, 3 * d, base, precision.attention, 2 * head
            ),
        ]
    double.append(attention(batch, both, heads, head, base, precision.attention))
    for stream, rows in (("img", batch * image), ("txt", batch * text)):
        if fast:
            double.append(elementwise(f"{stream} cast", rows, d, d, base, fast))
        double += [
            linear(f"{stream} out", rows, d, d, base, fast),
            elementwise(f"{stream} gate + residual", rows, 2 * d, d, base),
            elementwise(f"{stream} norm + modulate", rows, d, d, base, fast),
            linear(f"{stream} MLP up", rows, d, mlp, base, fast),
            elementwise(f"{stream} GELU", rows, mlp, mlp, base, fast),
            linear(f"{stream} MLP down", rows, mlp, d, base, fast),
            elementwise(f"{stream} gate + residual", rows, 2 * d, d, base),
        ]

    rows, seen = batch * both, 3 * d if precision.attention else 2 * d
    single = [
        modulation("AdaLN", batch, d, 3 * d, precision),
        elementwise("norm + modulate", rows, d, d, base, fast),
        linear("QKV", rows, d, 3 * d, base, fast),
        linear("MLP up", rows, d, mlp, base, fast),
        # V passes through this only to be cast; in a double block to be joined with the other V
        elementwise("QK norm + RoPE", rows, seen, seen, base, precision.attention, 2 * head),
        attention(batch, both, heads, head, base, precision.attention),
        elementwise("GELU + concatenation", rows, d + mlp, d + mlp, base, fast),
        linear("out", rows, d + mlp, d, base, fast),
        elementwise("gate + residual", rows, 2 * d, d, base),
    ]
    outputs = config["out_channels"] or channels
    last = [
        modulation("AdaLN", batch, d, 2 * d, precision),
        elementwise("norm + modulate", batch * image, d, d, base, outer),
        linear("img out", batch * image, d, outputs, base, outer),
    ]
    return [
        *place("embedders", 1, embedders),
        *place("double blocks", config["num_layers"], double),
        *place("single blocks", config["num_single_layers"], single),
        *place("output", 1, last),
    ]


def parted(config: dict, call: Call, image: int, precision: Precision) -> tuple[list, list]:
    """List the transformer's layers that run once before the loop, and those of each step."""
    step = transformer(config, call.images, image, call.text_tokens, precision)
    if not call.modulation_once:
        return [], step
    once = [layer for layer in step if layer.name in CONSTANT]
    at_once = transformer(config, call.images * call.steps, image, call.text_tokens, precision)
    once += [layer for layer in at_once if layer.kind == "modulation"]
    names = {(layer.part, layer.name) for layer in once}
    return once, [layer for layer in step if (layer.part, layer.name) not in names]


def t5(config: dict, batch: int, tokens: int, precision: Precision) -> list[Layer]:
    """List the layers of T5's encoder; padding is computed like words, there is no mask."""
    d, ff, rows = config["d_model"], config["d_ff"], batch * tokens
    base, fast = precision.base, precision.text
    heads, head = config["num_heads"], config["d_kv"]
    halves = 1 + config["feed_forward_proj"].startswith("gated")
    norm = elementwise("RMS norm", rows, d, d, base, fast, parameters=d)
    cast = [elementwise("cast", rows, heads * head, heads * head, base, fast)] * bool(fast)
    add = elementwise("residual", rows, 2 * d, d, base)
    buckets = config.get("relative_attention_num_buckets", 32)
    block = [
        norm,
        linear("QKV", rows, d, 3 * heads * head, base, fast, bias=False),
        attention(batch, tokens, heads, head, base),
        *cast,
        linear("out", rows, heads * head, d, base, fast, bias=False),
        add,
        norm,
        linear("MLP up", rows, d, halves * ff, base, fast, bias=False),
        elementwise("GELU", rows, halves * ff, ff, base, fast),
        linear("MLP down", rows, ff, d, base, fast, bias=False),
        add,
    ]
    first = [
        lookup("embedding", rows, d, config["vocab_size"], base),
        elementwise("position bias", heads, 0, tokens**2, base, parameters=buckets * heads),
    ]
    return [
        *place("input", 1, first),
        *place("blocks", config["num_layers"], block),
        *place("output", 1, [elementwise("RMS norm", rows, d, d, base, parameters=d)]),
    ]


def clip(config: dict, batch: int, base: str) -> list[Layer]:
    """List the layers of CLIP's text model; all its tokens are computed, one is used."""
    d, tokens, heads = (
        config[name] for name in ("hidden_size", "max_position_embeddings", "num_attention_heads")
    )
    mlp, rows = config["intermediate_size"], batch * tokens
    norm = elementwise("layer norm", rows, d, d, base, parameters=2 * d)
    add = elementwise("residual", rows, 2 * d, d, base)
    block = [
        norm,
        linear("QKV", rows, d, 3 * d, base),
        attention(batch, tokens, heads, d // heads, base),
        linear("out", rows, d, d, base),
        add,
        norm,
        linear("MLP up", rows, d, mlp, base),
        elementwise("GELU", rows, mlp, mlp, base),
        linear("MLP down", rows, mlp, d, base),
        add,
    ]
    first = [
        lookup("embedding", rows, d, config["vocab_size"], base),
        lookup("positions", tokens, d, tokens, base),
    ]
    return [
        *place("input", 1, first),
        *place("blocks", config["num_hidden_layers"], block),
        *place("output", 1, [norm]),
    ]


def image_tokens(vae: dict, size: tuple[int, int]) -> int:
    """Count the tokens of a picture: the VAE shrinks it (by 8), packing takes 2x2 latents each.

    Units: pixels.
    """
    edge = 2 ** len(vae["block_out_channels"])
    return (size[0] // edge) * (size[1] // edge)


def count(configs: dict[str, dict], call: Call, precision: Precision) -> Work:
    """List the work of a call.

    `configs` are the four networks', named as in FluxPipeline (random_weights gives them).
    """
    vae, base = configs["vae"], precision.base
    shrink = 2 ** (len(vae["block_out_channels"]) - 1)
    size, reference = (call.height, call.width), call.reference
    image = image_tokens(vae, size) + (image_tokens(vae, reference) if reference else 0)
    latents = (size[0] // shrink, size[1] // shrink)
    once, step = parted(configs["transformer"], call, image, precision)
    layers = {
        "clip": clip(configs["text_encoder"], call.prompts, base),
        "t5": t5(configs["text_encoder_2"], call.prompts, call.text_tokens, precision),
        "vae_encoder": vae_encoder(vae, 1, reference, base) if reference else [],
        "constants": once,
        "transformer": step,
        "vae_decoder": vae_decoder(vae, call.images, latents, base, call.subpixel_upsampling),
    }
    return Work(call, {name: tuple(found) for name, found in layers.items()})
