"""The two tokenizers, built from the words of the captions.

CLIP's is byte-level BPE whose merges are learnt here, so any text has ids. T5's is a unigram
model over whole words in three cases (transformers rebuilds it from its vocabulary alone, so a
lower-casing normaliser would be lost on reload) and single ASCII characters; others are <unk>.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable

from transformers import CLIPTokenizer, T5TokenizerFast

from .edits import instruction, sample_edit
from .scenes import COLOURS, SHAPES, SIZES, caption, sample_scene

CLIP_LENGTH, T5_LENGTH = 77, 512
EXTRA_WORDS = ("big", "tiny", "photo", "drawing", "shape", "colour", "upper", "lower", "no", "two")


def caption_words() -> Counter:
    """Count the words of many captions, always the same ones."""
    rng = random.Random(0)
    texts = (caption(sample_scene(rng), rng) for _ in range(5000))
    return _count(texts, (*COLOURS, *SHAPES, *SIZES, *EXTRA_WORDS))


def edit_words() -> Counter:
    """Count the words of captions and of many instructions, always the same ones."""
    rng = random.Random(0)
    edits = (sample_edit(rng) for _ in range(5000))
    return caption_words() + _count((instruction(edit, rng) for edit in edits), ())


def _count(texts: Iterable[str], at_least_once: Iterable[str]) -> Counter:
    words = Counter({word: 1 for word in at_least_once})
    for text in texts:
        words.update(text.lower().replace(",", " ").replace(".", " ").split())
    return words


def byte_alphabet() -> list[str]:
    """List the printable characters that stand for the bytes 0..255 in byte-level BPE."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in kept else next(spare)) for byte in range(256)]


def learn_merges(words: Counter) -> list[tuple[str, str]]:
    """Learn byte-pair merges until every word is one token; ties go to the smaller pair.

    Source: Sennrich et al. 2016, arXiv:1508.07909
    """
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(words)}
    merges = []
    while True:
        pairs: Counter = Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in pieces.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1


def build_clip_tokenizer(words: Counter) -> CLIPTokenizer:
    """Build the lower-casing byte-level tokenizer for 77 tokens."""
    letters = byte_alphabet()
    merges = learn_merges(words)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)]
    tokens = [*list(dict.fromkeys(tokens)), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def build_t5_tokenizer(words: Counter) -> T5TokenizerFast:
    """Build the unigram tokenizer for up to 512 tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import Unigram

    cased = dict.fromkeys(
        f(w) for w in sorted(words) for f in (str.lower, str.capitalize, str.upper)
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [("▁" + word, -2.0) for word in cased]
    pieces += [(chr(code), -8.0) for code in range(33, 127)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=T5_LENGTH)
