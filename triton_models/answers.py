"""How the two text encoders and the decoder answer a list of requests: by kind, in whole batches.

Triton batches what has the same shapes, but 64x96 and 96x64 have the same number of tokens: what a
request means is looked at here. A request that is wrong, or whose batch fails, gets its error; the
others get their answers.
"""

from collections.abc import Callable, Iterable

from triton_models.parts import Inputs, failure, outgoing
from triton_models.requests import MAX_PROMPT_CHARACTERS, MAX_SEQUENCE_LENGTH


def in_batches(rows: list[int], sizes: Iterable[int]) -> list[list[int]]:
    """Split items of so many rows into groups whose sums are batch sizes, in order.

    An item that fits no size stands alone.
    """
    groups, at, sizes = [], 0, sorted(sizes)
    while at < len(rows):
        fitting = [end for end in range(at + 1, len(rows) + 1) if sum(rows[at:end]) in sizes] or [
            at + 1
        ]
        groups.append(list(range(at, fitting[-1])))
        at = fitting[-1]
    return groups


def answer(
    requests: list,
    kind_of: Callable[[Inputs], tuple],
    rows_of: Callable[[Inputs], int],
    work: Callable[[tuple, list[Inputs]], list[dict]],
    sizes: Iterable[int],
) -> list:
    """Answer every request: `work(kind, group)` gives one dict of named tensors for each."""
    import triton_python_backend_utils as pb_utils

    answers: list = [None] * len(requests)
    kinds: dict[tuple, list[tuple[int, Inputs]]] = {}
    for place, request in enumerate(requests):
        try:
            inputs = Inputs(request)
            kinds.setdefault(kind_of(inputs), []).append((place, inputs))
        except Exception as error:
            answers[place] = pb_utils.InferenceResponse([], failure(error, "INVALID_ARGUMENT"))
    for kind, members in kinds.items():
        for group in in_batches([rows_of(inputs) for _, inputs in members], sizes):
            some = [members[i] for i in group]
            try:
                found = work(kind, [inputs for _, inputs in some])
            except Exception as error:
                for place, _ in some:
                    answers[place] = pb_utils.InferenceResponse([], failure(error))
                continue
            for (place, _), tensors in zip(some, found, strict=True):
                outputs = [outgoing(name, tensor) for name, tensor in tensors.items()]
                answers[place] = pb_utils.InferenceResponse(outputs)
    return answers


def answer_texts(requests: list, output: str, encode: Callable, sizes: Iterable[int]) -> list:
    """Answer requests for embeddings: `encode(prompts, length)` gives one row for each prompt."""

    def prompts_of(inputs: Inputs) -> list[str]:
        return [prompt.decode("utf-8") for prompt in inputs.values("prompt")]

    def work(kind: tuple, group: list[Inputs]) -> list[dict]:
        prompts = [prompts_of(inputs) for inputs in group]
        rows = encode([prompt for some in prompts for prompt in some], *kind)
        return [{output: part} for part in rows.split([len(some) for some in prompts])]

    def kind_of(inputs: Inputs) -> tuple:
        for prompt in prompts_of(inputs):  # here an encoding error is that request's own
            if len(prompt) > MAX_PROMPT_CHARACTERS:
                raise ValueError(
                    f"prompt: found {len(prompt)} characters, expected at most "
                    f"{MAX_PROMPT_CHARACTERS}"
                )
        length = inputs.value("max_sequence_length", 0)
        if not 0 <= length <= MAX_SEQUENCE_LENGTH:
            raise ValueError(
                f"max_sequence_length: found {length}, expected at most {MAX_SEQUENCE_LENGTH}"
            )
        return (length,)

    return answer(requests, kind_of, lambda inputs: len(inputs.values("prompt")), work, sizes)
