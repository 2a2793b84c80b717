"""A real Triton Inference Server over tiny-dev: equality, batches, streams, faults, load."""

import base64
import io
import json
import os
import queue
import re
import signal
import threading
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_errors import wait_for

from tests.triton_server import ANSWER_S, NEEDS_ENV, Served

pytestmark = NEEDS_ENV
MAX_IN_FLIGHT = 16
TEXT = 32  # tokens: the rest of 512 would be padding, and time
CALLS = [  # prompt, height, width, steps, guidance: two sizes with the same number of tokens
    ("a red circle on a blue background", 128, 128, 4, 3.5),
    ("a large white heart at the top left", 96, 64, 3, 2.0),
    ("a green star on a black background", 64, 96, 5, 5.0),
    ("a yellow ring", 96, 64, 4, 1.0),
]


def _fields(number: int) -> dict:
    prompt, height, width, steps, guidance = CALLS[number % len(CALLS)]
    return {
        "prompt": prompt,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "max_sequence_length": TEXT,
        "seed": number % 8,
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = Served(
        tmp_path_factory.mktemp("served"),
        *("--ckpt", "tiny-dev", "--batch-sizes", "1,2,4", "--watch", "1"),
        *("--max-in-flight", str(MAX_IN_FLIGHT)),
    )
    try:
        server.wait()
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="module")
def expected():
    """Give FluxPipeline's own pictures of the eight requests."""
    import torch

    from triton_models import parts
    from utils.pipeline_utils import load_pipeline, optimize

    args = parts.settings(["--ckpt", "tiny-dev", "--device", "cpu"])
    pipeline = optimize(load_pipeline(args), args)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the server's models
    pictures = []
    for number in range(8):
        fields = _fields(number)
        generator = torch.Generator("cpu").manual_seed(fields.pop("seed"))
        pictures.append(np.asarray(pipeline(**fields, generator=generator).images[0]))
    torch.set_num_threads(threads)
    return pictures


@pytest.fixture
def client(served):
    with served.client() as found:
        yield found


def test_a_picture_is_flux_pipelines_own_to_the_bit(client, expected):
    for number in range(8):
        found = np.asarray(client.generate(**_fields(number))[0])
        assert np.array_equal(found, expected[number]), number


def test_a_batch_is_its_single_images(client, expected):
    fields = _fields(0) | {"num_images_per_prompt": 2}
    fields["prompt"] = [fields["prompt"], CALLS[1][0]]
    found = [np.asarray(image, int) for image in client.generate(**fields)]
    assert len(found) == 4 and np.abs(found[0] - expected[0]).mean() < 1
    assert np.abs(found[0] - found[1]).mean() > 0.5 and np.abs(found[1] - found[2]).mean() > 10


def test_steps_come_before_the_image(client):
    steps = []
    image = client.generate(on_step=lambda *step: steps.append(step), **_fields(2))[0]
    assert steps == [(k, 5) for k in range(1, 6)] and image.size == (96, 64)


def test_plain_http_answers_once_in_base64(served, expected):
    fields = _fields(0)
    body = json.dumps(fields | {"prompt": [fields["prompt"]], "format": "base64"}).encode()
    answer = json.loads(served.post("/v2/models/bls_orchestrator/generate", body))
    with Image.open(io.BytesIO(base64.b64decode(answer["images"]))) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), expected[0])


def test_raw_pixels(client, expected):
    (result,) = client.responses(client.inputs(_fields(0) | {"format": "raw"}))
    assert np.array_equal(result.as_numpy("pixels")[0], expected[0])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, "prompt 0: empty"),
        ({"height": 100}, "height: found 100, not divisible by 16 (nearest: 96)"),
        ({"num_inference_steps": 0}, "num_inference_steps: found 0"),
        ({"guidance_scale": -1.0}, "guidance_scale: found -1"),
        ({"seed": -5}, "seed: found -5"),
        ({"prompt": "a" * 9000}, "prompt 0: found 9000 characters, expected at most 8192"),
        ({"height": 4096, "width": 4096}, "found 4096x4096 pixels, expected at most 4194304"),
        ({"num_images_per_prompt": 9}, "num_images_per_prompt: found 9, expected 1 to 8"),
    ],
)
def test_a_wrong_field_is_an_invalid_argument(client, fields, words):
    from triton_models.client import ServerError

    with pytest.raises(ServerError) as caught:
        client.generate(**_fields(0) | fields)
    assert caught.value.code == "INVALID_ARGUMENT" and words in str(caught.value)


def test_an_unknown_field_is_refused_by_triton(client):
    from triton_models.client import ServerError

    unknown = client.grpc.InferInput("lora_path", [1], "BYTES")
    unknown.set_data_from_numpy(np.array([b"/etc/passwd"], dtype=np.object_))
    with pytest.raises(ServerError, match="unexpected inference input 'lora_path'"):
        list(client.responses([*client.inputs(_fields(0)), unknown]))


def test_an_unknown_field_of_plain_http_is_refused(served):
    """Triton makes a parameter of it, which a model may overlook."""
    body = json.dumps({"prompt": ["a"], "negative_prompt": "b"}).encode()
    with pytest.raises(urllib.error.HTTPError) as caught:
        served.post("/v2/models/bls_orchestrator/generate", body)
    assert caught.value.code == 400
    assert "INVALID_ARGUMENT: negative_prompt: unknown field" in caught.value.read().decode()


def test_models_called_directly_have_bounds_too(client):
    from tritonclient.utils import InferenceServerException

    texts = client.grpc.InferInput("prompt", [1, 1], "BYTES")
    texts.set_data_from_numpy(np.array([[b"a"]], dtype=np.object_))
    length = client.grpc.InferInput("max_sequence_length", [1, 1], "INT32")
    length.set_data_from_numpy(np.array([[10**9]], dtype=np.int32))
    with pytest.raises(InferenceServerException, match="found 1000000000, expected at most 512"):
        client.connection.infer("t5_encoder", [texts, length])


def test_a_cancellation_names_a_job_and_a_question_of_health_a_model(client):
    """Jobs without a name would all be stopped; a mistyped model would be as healthy as can be."""
    from tritonclient.utils import InferenceServerException

    cancel = client.grpc.InferInput("cancel", [1, 1], "BOOL")
    cancel.set_data_from_numpy(np.array([[True]]))
    found: queue.SimpleQueue = queue.SimpleQueue()
    client.connection.start_stream(lambda result, error: found.put(error))
    client.connection.async_stream_infer("dit_transformer", [cancel])
    assert "job: found nothing, expected the name" in found.get(timeout=600).message()
    client.connection.stop_stream()
    model = client.grpc.InferInput("model", [1], "BYTES")
    model.set_data_from_numpy(np.array([b"dit"], dtype=np.object_))
    with pytest.raises(InferenceServerException, match="model: found 'dit', expected one of clip_"):
        client.connection.infer("deep_health", [model])


def test_only_the_one_who_started_it_loads_models(served, client):
    """A load request may carry a model's code."""
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match="restricted"):
        client.load("t5_encoder")
    for path in ("repository/models/t5_encoder/load", "systemsharedmemory/region/a/register"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            served.post(f"/v2/{path}", b"{}")
        assert caught.value.code == 403


def test_overhead_is_measured_on_equal_pictures(served, client):
    """A round of the paired measurement; it refuses to compare different pictures itself."""
    import torch

    from triton_models import overhead, parts
    from utils.errors import UserError

    args = parts.settings("--ckpt tiny-dev --device cpu --height 16 --width 16")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the server's models
    server, here = overhead.served(client, served.metrics), overhead.in_process(args)
    sides = {"server": server, "here": here}
    shape = {"height": 16, "width": 16, "max_sequence_length": 512}
    found = overhead.measure(sides, shape, 1, [1, 2])
    assert found.shape == (1, 2, 2, 2) and (found[..., 0] > found[..., 1]).all()
    assert (found[..., 1] > 0).all() and overhead.summary(found, [1, 2])["rounds"] == 1
    with pytest.raises(UserError, match="another than the pipeline's here"):
        overhead.measure(sides, shape | {"guidance_scale": 9.0}, 1, [1, 2])
    torch.set_num_threads(threads)


def test_a_hundred_requests_of_twelve_clients(served, expected):
    """Nothing lost, nothing mixed; steps of different requests share forwards."""
    before, wrong, numbers = served.counters(), [], list(range(100))

    def ask() -> None:
        with served.client() as client:
            while numbers:
                try:
                    number = numbers.pop()
                except IndexError:
                    return
                found = np.asarray(client.generate(**_fields(number))[0], int)
                distances = [
                    np.abs(found - picture).mean() if found.shape == picture.shape else np.inf
                    for picture in expected
                ]
                if np.argmin(distances) != number % 8 or min(distances) > 1:
                    wrong.append((number, distances))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = served.counters()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert not wrong and grown['flux_requests_total{outcome="ok"}'] == 100
    assert grown["flux_images_total"] == 100
    assert grown["flux_steps_total"] == sum(_fields(n)["num_inference_steps"] for n in range(100))
    stages = ("prompt_encoding", "denoising", "decoding", "postprocessing")
    assert all(grown[f'flux_stage_seconds_total{{stage="{stage}"}}'] > 0 for stage in stages)
    # twelve clients, one transformer: most of the time is waiting
    assert grown["flux_queue_seconds_total"] > grown["flux_forward_seconds_total"] > 0
    assert grown["flux_batch_rows_sum"] / grown["flux_batch_rows_count"] > 1.2


def _ended(served: Served, outcome: str) -> float:
    return served.counters().get(f'flux_requests_total{{outcome="{outcome}"}}', 0)


def test_a_client_that_leaves_stops_its_request(served, client):
    fields = _fields(0) | {"num_inference_steps": 100, "progress": True}
    before, answers = _ended(served, "cancelled"), client.responses(client.inputs(fields))
    next(answers)
    answers.close()
    wait_for(lambda: _ended(served, "cancelled") > before)
    assert client.generate(**_fields(1))


def test_overload_is_refused_at_once(served):
    """While as many as may be in flight have taken a step and not the last."""
    from triton_models.client import ServerError

    fields, answered, refused = _fields(0) | {"num_inference_steps": 40}, [], []
    connected = threading.Barrier(MAX_IN_FLIGHT + 8, timeout=ANSWER_S)
    full, places = threading.Barrier(MAX_IN_FLIGHT + 1, timeout=ANSWER_S), threading.Event()

    def take_a_place() -> None:
        with served.client() as client:
            assert client.is_ready()
            connected.wait()
            first = iter([full.wait])
            answered.append(client.generate(on_step=lambda *_: next(first, int)(), **fields))

    def find_none() -> None:
        with served.client() as client:
            assert client.is_ready()
            connected.wait()
            places.wait(ANSWER_S)
            try:
                refused.append(len(client.generate(**fields)))
            except ServerError as error:
                refused.append((error.code, "retry in" in str(error)))

    with ThreadPoolExecutor(MAX_IN_FLIGHT + 8) as threads:
        work = [threads.submit(take_a_place) for _ in range(MAX_IN_FLIGHT)]
        work += [threads.submit(find_none) for _ in range(8)]
        full.wait()
        places.set()
        for one in work:
            one.result()
    assert len(answered) == MAX_IN_FLIGHT and all(len(images) == 1 for images in answered)
    assert set(refused) - {1} == {("UNAVAILABLE", True)}, refused


def test_a_killed_model_is_noticed_and_loaded_again(served, client, expected):
    """Triton itself never ends the requests that were in it."""
    from triton_models.client import ServerError

    fields = _fields(0) | {"num_inference_steps": 100, "progress": True}
    answers = client.responses(client.inputs(fields))
    next(answers)
    (stub,) = served.stubs("dit_transformer")
    os.kill(stub, signal.SIGKILL)
    with served.client() as other, pytest.raises(ServerError) as caught:
        other.generate(**_fields(0))
    assert caught.value.code == "INTERNAL"
    with pytest.raises(ServerError, match="the transformer has lost the job") as caught:
        list(answers)
    assert caught.value.code == "INTERNAL"
    wait_for(lambda: re.search("dit_transformer.*loaded again", served.words.read_text()))
    assert np.array_equal(np.asarray(client.generate(**_fields(0))[0]), expected[0])


def test_it_stops_and_leaves_nothing(served):
    """Last: the server is gone afterwards."""
    region = f"flux-{served.process.pid}-"
    assert any(file.name.startswith(region) for file in Path("/dev/shm").iterdir())
    assert served.stop() == 0, served.words.read_text()
    assert not any(file.name.startswith(region) for file in Path("/dev/shm").iterdir())
    wait_for(lambda: not served.stubs("dit_transformer"))  # killed ones take a moment
    assert not list(served.temporary.glob("flux-triton-*"))
