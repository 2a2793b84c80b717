"""What the text encoders see of a prompt, styles around it, and files of prompts.

python -m extras.prompts --prompt "..."                     tokens of CLIP and T5, and what is cut
python -m extras.prompts --prompt_file list.txt --style oil the same for each line, in a style
python -m extras.prompts --prompt_file list.txt --generate  and the pictures: one load for all

A prompt file has one prompt a line; blank lines and lines that begin with # do not count. Picture k
is seeded with --seed + k, so it equals that of gen_image.py with that prompt and seed.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

from utils.benchmark_utils import create_parser
from utils.errors import UserError, run_script
from utils.quiet import quiet_libraries

STYLES = Path(__file__).with_name("styles.yaml")
PLACE = "{prompt}"
ENCODERS = {"CLIP": "tokenizer", "T5": "tokenizer_2"}  # name -> folder of its tokenizer


@dataclass(frozen=True)
class Seen:
    """What one encoder gets of one prompt. Units: tokens, its own begin and end marks included."""

    encoder: str
    found: int
    window: int
    tokens: tuple[str, ...]  # those that are kept, marks included
    cut: str  # the end of the prompt that it never sees

    def __str__(self) -> str:
        about = f"{self.encoder:4s} {self.found} of {self.window} tokens"
        return f"{about}; cut: {self.cut!r}" if self.cut else about


def read_prompts(path: str | Path) -> list[str]:
    """Read a prompt file.

    Raises: UserError if it cannot be read or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"--prompt_file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file {path}: expected UTF-8 text ({error.reason})") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UserError(f"--prompt_file {path}: no prompt in {len(lines)} line(s)")
    return prompts


def read_styles(path: str | Path = STYLES) -> dict[str, str]:
    """Read a file of styles: names, each with a template that has {prompt} in it once.

    Raises: UserError in one line for anything else.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--styles {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes, a date
        raise UserError(f"--styles {path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"--styles {path}: found {type(found).__name__}, expected names: templates")
    for name, template in found.items():
        if not isinstance(template, str) or template.count(PLACE) != 1:
            raise UserError(f"--styles {path}: {name}: found {template!r}, expected {PLACE} once")
    return {str(name): template for name, template in found.items()}


def in_style(prompt: str, style: str | None, styles: dict[str, str]) -> str:
    """Put a prompt into a style's template; None leaves it as it is."""
    if style is None:
        return prompt
    if style not in styles:
        raise UserError(f"--style {style}: unknown (expected one of {', '.join(styles)})")
    return styles[style].replace(PLACE, prompt)


def load_tokenizers(checkpoint) -> dict:
    """Load both tokenizers of a checkpoint, and nothing else of it."""
    from transformers import AutoTokenizer

    from utils.checkpoints import BUNDLED_DIR

    source = checkpoint.path or checkpoint.name
    if checkpoint.random_weights:
        source = checkpoint.path or BUNDLED_DIR / "tiny-schnell"  # as utils/random_weights.py does
    try:
        return {
            name: AutoTokenizer.from_pretrained(source, subfolder=part)
            for name, part in ENCODERS.items()
        }
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"--ckpt {source}: its tokenizers cannot be loaded: {why}") from error


def look(prompt: str, tokenizers: dict, max_sequence_length: int) -> list[Seen]:
    """Tell what each encoder sees of a prompt, as FluxPipeline calls it."""
    seen = []
    for name, tokenizer in tokenizers.items():
        window = tokenizer.model_max_length if name == "CLIP" else max_sequence_length
        whole = tokenizer(prompt, verbose=False, return_offsets_mapping=True)
        kept, cut = list(whole.input_ids), ""
        if len(kept) > window:  # both encoders keep their end mark, so one word less
            cut = prompt[whole.offset_mapping[window - 1][0] :]
            kept = [*kept[: window - 1], kept[-1]]
        tokens = tuple(tokenizer.convert_ids_to_tokens(kept))
        seen.append(Seen(name, len(whole.input_ids), window, tokens, cut))
    return seen


def parse_arguments():
    """Add files and styles to a run's own flags."""
    parser = create_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt_file", metavar="FILE", help="one prompt a line; # begins a comment")
    add("--style", metavar="NAME", help="put every prompt into this template")
    add("--styles", metavar="YAML", default=str(STYLES), help="the templates, yours to edit")
    add("--list_styles", action="store_true", help="print the templates, nothing else")
    add("--tokens", action="store_true", help="print the tokens themselves, too")
    add("--generate", action="store_true", help="make the pictures, numbered, with one load")
    return parser.parse_args()


def main() -> None:
    """Parse, expand, show, and make the pictures if asked."""
    args = parse_arguments()
    styles = read_styles(args.styles)
    if args.list_styles:
        print("\n".join(f"{name:12s} {template}" for name, template in styles.items()))
        return
    if args.prompt and args.prompt_file:
        raise UserError("--prompt_file: found together with --prompt, expected one of them")
    if args.generate and args.swap_loras:
        raise UserError(
            "--swap_loras: a prompt is one call here; use --lora alone, or gen_image.py"
        )
    prompts = read_prompts(args.prompt_file) if args.prompt_file else args.prompt or []
    if not prompts:
        raise UserError("--prompt: none given (expected --prompt, or --prompt_file)")
    args.prompt = [in_style(prompt, args.style, styles) for prompt in prompts]

    quiet_libraries()
    from utils.prepare import prepare, settle_call

    (prepare if args.generate else settle_call)(args)
    tokenizers = load_tokenizers(args.checkpoint)
    for k, prompt in enumerate(args.prompt):
        print(f"{k}: {prompt}")
        for seen in look(prompt, tokenizers, args.max_sequence_length):
            print(f"   {seen}")
            if args.tokens:
                print("        " + " ".join(seen.tokens))
    if args.generate:
        _generate(args)


def _generate(args) -> None:
    """Load and optimise once, then make each prompt's pictures in a call of its own."""
    from utils.images import save_images
    from utils.pipeline_utils import generate, load_pipeline, optimize, reused_steps

    one, count = copy.copy(args), args.num_images_per_prompt
    one.prompt = args.prompt[:1]
    pipeline = optimize(load_pipeline(one), one)
    target = Path(args.output_file)
    for k, prompt in enumerate(args.prompt):
        one.prompt, one.seed = [prompt], args.seed + k * count
        if len(args.prompt) > 1:
            one.output_file = str(target.with_stem(f"{target.stem}_{k}"))
        for path in save_images(generate(pipeline, one), one, reused_steps(pipeline, one)):
            print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
