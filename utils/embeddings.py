"""Text embeddings with a memory: gen_image.py --embedding_cache DIR

A prompt that was encoded before loads neither T5 nor CLIP, 9.1 GiB of FLUX.1's 31.4. What an entry
belongs to is everything that its numbers depend on: the texts, their length and copies, the
weights, the machine, the versions, the steps on T5 with their settings, and the sources of these.
Seed, size and the other steps are not among it. Entries are packages of utils/artifacts: a folder
of one's own, digests that are checked before use, atomic writes.

Timed runs never come here: run_benchmark.py does not know the flag. extras/cached.py stores whole
requests, and their text by this.
"""

from pathlib import Path

from utils import artifacts, guidance
from utils.errors import UserError
from utils.steps import PARTS, text_padding, text_quant

ENCODERS = ("text_encoder", "text_encoder_2")
ENDING = ".safetensors"
NAMES = ("prompt_embeds", "pooled_prompt_embeds", "text_ids")  # as encode_prompt gives them
CODE = (Path(__file__), Path(__file__).parent / "prompts.py")


def add_flag(parser) -> None:
    """Add the flag of scripts that time nothing."""
    parser.add_argument(
        "--embedding_cache",
        metavar="DIR",
        help="keep the prompt's embeddings in this folder, and load no text encoder where they are",
    )


def open_cache(args, flag: str = "--embedding_cache") -> Path:
    """Make or check the folder that the flag names.

    Raises: UserError for a folder that is not one's own, and for what cannot be remembered.
    """
    folder = getattr(args, flag.removeprefix("--"))
    if problem := artifacts.cache_problem(folder):
        raise UserError(problem.replace("--cache-dir", flag, 1))
    if args.compile_text_encoders:
        raise UserError(
            f"{flag}: found --compile_text_encoders, expected encoders that need not be there; "
            "leave out one of the two"
        )
    try:
        return artifacts.open_cache(folder)
    except UserError as error:
        raise UserError(str(error).replace("--cache-dir", flag, 1)) from None


def are_known(args) -> bool:
    """Tell of a call that has no plan yet whether it will load no text encoder.

    A folder that is not there is not made: the call may still be refused.
    """
    folder = getattr(args, "embedding_cache", None)
    if not folder or not Path(folder).expanduser().is_dir():
        return False
    return bool(Remembered(args, open_cache(args)).unneeded)


def identity_of(args, texts: list[str]) -> dict:
    """Say what the embeddings of one call of encode_prompt depend on."""
    early = artifacts.known_early(args, {})
    plan = getattr(args, "plan", None)  # it is made once the memory tier is chosen: are_known()
    plan = plan or {step.NAME: step.check(args) for step in (text_padding, text_quant)}
    steps = {n: v for n, v in plan.items() if v.is_on and n.startswith("text_")}
    sources = artifacts.sources_of_run(steps)
    return early | {
        "component": "text",
        "texts": texts,
        "max_sequence_length": args.max_sequence_length,
        "num_images_per_prompt": args.num_images_per_prompt,
        "weights": args.checkpoint.identity(args.cache_dir),
        "seed": args.seed if args.random_weights else None,  # of the weights themselves
        "steps": {name: verdict.settings for name, verdict in steps.items()},
        "code": artifacts.code_digest([*sources, *CODE]),
    }


class Remembered:
    """The texts of one call, and those of their embeddings that are stored.

    found: text encodings that were there when this was made, of as many as `wanted`
    """

    def __init__(self, args, root: Path) -> None:
        """Look every text of the call up, digests checked."""
        self.args, self.root = args, root
        texts = [args.prompt, guidance.call(args).get("negative_prompt")]
        self.identities = {tuple(text): identity_of(args, text) for text in texts if text}
        self.known = {}
        for texts, identity in self.identities.items():
            files, _ = artifacts.read(root, identity, ENDING)
            if files:
                self.known[texts] = self._tensors(files[ENDING])
        self.wanted, self.found = len(self.identities), len(self.known)

    @property
    def unneeded(self) -> tuple[str, ...]:
        """Name the components that this call can do without; random ones cost no reading."""
        whole = self.found == self.wanted and not self.args.random_weights
        return ENCODERS if whole else ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Name what steps may change of the pipeline: what is there."""
        return tuple(part for part in PARTS if part != "text" or not self.unneeded)

    @staticmethod
    def _tensors(content: bytes) -> tuple:
        from safetensors.torch import load

        tensors = load(content)
        return tuple(tensors[name] for name in NAMES)

    def install(self, pipeline) -> None:
        """Let encode_prompt take what is known, and store what it has to compute.

        Before optimize(): steps that ask for fewer tokens wrap this. Embeddings that the caller
        hands over pass through, and so do texts that are not the call's.
        """
        encode = pipeline.encode_prompt

        def remembering(prompt=None, prompt_2=None, *, device=None, **named):
            given = any(named.get(name) is not None for name in NAMES[:2])
            texts = () if given or prompt is None else tuple(prompt)
            if texts not in self.identities or prompt_2 not in (None, prompt):
                return encode(prompt, prompt_2, device=device, **named)
            if texts not in self.known:
                self.known[texts] = encode(prompt, prompt_2, device=device, **named)
                self._store(texts)
            return tuple(tensor.to(device) for tensor in self.known[texts])

        pipeline.encode_prompt = remembering

    def _store(self, texts: tuple[str, ...]) -> None:
        from safetensors.torch import save

        tensors = zip(NAMES, self.known[texts], strict=True)
        content = save({name: tensor.contiguous().cpu() for name, tensor in tensors})
        identity = self.identities[texts]
        with artifacts.building(self.root, identity):
            artifacts.save(self.root, identity, {ENDING: content}, {})

    def line(self) -> str:
        """Say what became of it, for people."""
        what = "found" if self.found == self.wanted else "encoded and stored"
        return f"text        {what}{', no encoder loaded' if self.unneeded else ''}: {self.root}"
