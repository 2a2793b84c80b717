"""The real server in every mode, with both checkpoints and dtypes. Slow: a server each."""

import os
import re
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_errors import wait_for

from tests.triton_server import ENV, NEEDS_ENV, Served
from triton_models.parts import HEALTH, MODELS, ROOT

pytestmark = [pytest.mark.slow, NEEDS_ENV]
PLAIN = ("--disable_fused_projections", "--disable_channels_last")  # what a CPU has on
TEXT = 32
CALLS = [  # prompt, height, width, steps; two sizes of as many tokens
    ("a red circle on a blue background", 128, 128, 4),
    ("a green star on a black background", 64, 96, 3),
    ("a large white heart at the top left", 96, 64, 2),
]


def _fields(number: int, steps: int = 0) -> dict:
    prompt, height, width, own = CALLS[number % len(CALLS)]
    names = ("prompt", "height", "width", "num_inference_steps", "max_sequence_length", "seed")
    return dict(zip(names, (prompt, height, width, steps or own, TEXT, number), strict=True))


def _pixels(client, **fields) -> np.ndarray:
    return np.asarray(client.generate(**fields)[0], int)


def _pictures(*flags: str) -> list[np.ndarray]:
    """Give plain FluxPipeline's own pictures, no step applied."""
    import torch

    from triton_models import parts
    from utils.pipeline_utils import load_pipeline

    pipeline = load_pipeline(parts.settings([*flags, "--device", "cpu"]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the server's models
    found = []
    for number in range(len(CALLS)):
        fields = _fields(number)
        generator = torch.Generator("cpu").manual_seed(fields.pop("seed"))
        found.append(np.asarray(pipeline(**fields, generator=generator).images[0], int))
    torch.set_num_threads(threads)
    return found


def _served(folder, *flags: str) -> Served:
    server = Served(folder, *flags, "--watch", "1", "--max_sequence_length", str(TEXT))
    try:
        server.wait()
    except BaseException:
        server.stop()
        raise
    return server


@pytest.mark.parametrize("dtype", [(), ("--disable_bf16",)], ids=["bf16", "fp32"])
@pytest.mark.parametrize("ckpt", ["tiny-schnell", "tiny-dev"])
def test_pictures_are_plain_flux_pipelines(tmp_path, ckpt, dtype):
    """To the bit one at a time; together within a level in fp32, a level on average in bf16."""
    flags = ("--ckpt", ckpt, *dtype)
    expected, together = _pictures(*flags), {}
    server = _served(tmp_path, *flags, *PLAIN)
    try:
        with server.client() as client:
            for number, picture in enumerate(expected):
                assert np.array_equal(_pixels(client, **_fields(number)), picture), number

        def ask(number: int) -> None:
            with server.client() as client:
                together[number] = _pixels(client, **_fields(number % 3) | {"seed": number % 3})

        before = server.counters()
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        grown = {n: v - before[n] for n, v in server.counters().items() if n in before}
        assert grown["flux_batch_rows_sum"] > 1.2 * grown["flux_batch_rows_count"]
        for number in range(12):
            distance = np.abs(together[number] - expected[number % 3])
            assert distance.max() <= 1 if dtype else distance.mean() < 1, (number, distance.max())
    finally:
        assert server.stop() == 0


def test_compiled_blocks_serve_every_size(tmp_path):
    """Within a level of the eager picture, on average."""
    flags = ("--ckpt", "tiny-dev")
    mode = ("--compile_export_mode", "compile", "--compile_scope", "blocks")
    expected = _pictures(*flags)
    store = ("--cache-dir", str(tmp_path / "store"))
    server = _served(tmp_path, *flags, *mode, *store, "--batch-sizes", "1,2")
    try:
        with server.client(timeout_s=600) as client:  # each size is compiled first
            for number, picture in enumerate(expected):
                assert np.abs(_pixels(client, **_fields(number)) - picture).mean() < 1, number
    finally:
        assert server.stop() == 0
    assert list((tmp_path / "store").iterdir())  # kept for the next start


def test_packages_of_the_scripts_are_served(tmp_path):
    """What gen_image.py exported, the server runs; it may build nothing (--use-cached-model).

    With the server's interpreter and number of threads: a package belongs to what built it.
    """
    from triton_models.client import ServerError

    flags = ["--ckpt", "tiny-dev", "--compile_export_mode", "export_aoti"]
    flags += ["--cache-dir", str(tmp_path / "store")]
    script = [
        str(ENV / "bin" / "python3"),
        "gen_image.py",
        *flags,
        "--max_sequence_length",
        str(TEXT),
    ]
    script += ["--num_inference_steps", "1", "--output-file", str(tmp_path / "image.png")]
    subprocess.run(script, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    stored = sorted((tmp_path / "store").glob("*.pt2"))
    server = _served(tmp_path, *flags, "--use-cached-model", "--batch-sizes", "1")
    try:
        with server.client() as client:
            expected = _pictures("--ckpt", "tiny-dev")
            assert np.abs(_pixels(client, **_fields(0)) - expected[0]).mean() < 1
            with pytest.raises(ServerError, match="--use-cached-model") as caught:
                client.generate(**_fields(1))  # a size that has none fails by itself
            assert caught.value.code == "INTERNAL"
            assert np.abs(_pixels(client, **_fields(0)) - expected[0]).mean() < 1
    finally:
        assert server.stop() == 0
    assert stored and sorted((tmp_path / "store").glob("*.pt2")) == stored


def test_thousands_of_steps_told_to_many_clients_leave_the_server_whole(tmp_path):
    """Triton's stub damaged its heap, or locked itself up, within some ten or a hundred rounds."""
    server, rounds, clients, steps = _served(tmp_path, "--ckpt", "tiny-dev"), 40, 16, 100
    small = {"prompt": "a", "height": 16, "width": 16, "num_inference_steps": steps}

    def ask(number: int) -> list[int]:
        told: list[int] = []
        with server.client() as client:
            assert len(client.generate(on_step=lambda step, _: told.append(step), **small)) == 1
        return told

    stubs = [server.stubs(model) for model in (*MODELS, HEALTH)]
    try:
        with ThreadPoolExecutor(clients) as threads:
            for told in threads.map(ask, range(rounds * clients)):
                assert told == list(range(1, steps + 1))
        assert [server.stubs(model) for model in (*MODELS, HEALTH)] == stubs
        assert "loaded again" not in server.words.read_text()
    finally:
        assert server.stop() == 0


def test_every_model_that_dies_is_loaded_again(tmp_path):
    """The orchestrator and the health model itself too."""
    server = _served(tmp_path, "--ckpt", "tiny-schnell")
    try:
        with server.client() as client:
            picture = _pixels(client, **_fields(0))
            for model in (*MODELS, HEALTH):
                (stub,) = server.stubs(model)
                os.kill(stub, signal.SIGKILL)
                said = re.compile(f"{model}.*loaded again")
                wait_for(lambda said=said: said.search(server.words.read_text()))
                assert np.array_equal(_pixels(client, **_fields(0)), picture), model
    finally:
        assert server.stop() == 0
