"""examples/train_ip_adapter.py: what it learns, what a kill leaves, what two processes compute, what it says of mistakes."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

pytest.importorskip("accelerate")

import train_ip_adapter
from accelerate.state import AcceleratorState, GradientState
from ip_adapter_training import adapter, arguments, checkpoints, data, validation
from ip_adapter_training.metrics import Metrics

from ipa_kernels.testing import tiny_pipelines

from ..helpers.steady import NEVER

SCRIPT = Path(train_ip_adapter.__file__)
STEPS = 200
PROMPT = "a ball"

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def no_trace() -> Iterator[None]:
    """What accelerate keeps in the process and in its environment is gone after each test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Balls in six colours, each with its caption in a text file."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, colour in enumerate(("red", "green", "blue", "yellow", "purple", "orange")):
        image = Image.new("RGB", (40 + 4 * i, 40), "white")
        ImageDraw.Draw(image).ellipse((4, 4, 36, 36), fill=colour)
        image.save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} ball")
    return folder


def command(pictures: Path, output: Path, *more: str) -> list[str]:
    """The arguments that all runs here share; what comes later counts."""
    common = ["--tiny", "sdxl", "--data", str(pictures), "--output", str(output), "--impl", "eager", "--cpu"]
    return [*common, "--batch-size", "2", "--learning-rate", "1e-3", "--steps", "8", "--validation-samples", "8", *more]


def train(pictures: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    """Run the script in this process; its metrics."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    train_ip_adapter.main(command(pictures, output, *more))
    return metrics(output)


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


def environment() -> dict[str, str]:
    quiet = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    root = SCRIPT.parents[1]
    return os.environ | quiet | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{SCRIPT.parent}"}


def launched(arguments: list[str]) -> str:
    """What a launcher and its processes print; none of them outlives the test."""
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=NEVER)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        pytest.fail(f"still running: {printed}")
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def stock(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained with diffusers' own attention; pictures and validation loss every 50 steps."""
    output = tmp_path_factory.mktemp("stock")
    options = ["--stock", "--steps", str(STEPS), "--validate-every", "50", "--checkpoint-every", str(STEPS)]
    options += ["--validation-prompt", PROMPT, "--validation-inference-steps", "3"]
    train(pictures, output, *options, "--validation-image", str(pictures / "red.png"))
    return output


def test_ours_learns_as_stock_does(stock: Path, pictures: Path, tmp_path: Path) -> None:
    options = ["--accelerated", "--steps", str(STEPS), "--validate-every", "50"]
    ours, theirs = train(pictures, tmp_path, *options, "--checkpoint-every", str(STEPS)), metrics(stock)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert losses(ours) == losses(theirs), "eager attention on a CPU is stock's, bit for bit"
    for rows in (ours, theirs):
        validated = [row["validation_loss"] for row in rows if "validation_loss" in row]
        assert len(validated) == 4
        assert validated == sorted(validated, reverse=True), "the loss over fixed noise goes down"
        # each step has noise of its own: by 40 steps each, the means are known to half a percent
        assert sum(losses(rows)[-40:]) < 0.98 * sum(losses(rows)[:40])


@pytest.mark.slow
def test_the_kernel_learns_as_stock_does(stock: Path, pictures: Path, tmp_path: Path) -> None:
    """In Triton's interpreter, where a step takes seconds; impl="triton" raises where the kernel would not run."""
    ours = train(pictures, tmp_path, "--accelerated", "--impl", "triton", "--steps", str(STEPS))
    # Adam makes much of small differences: its first steps are as long for any gradient
    assert losses(ours) == pytest.approx(losses(metrics(stock)), rel=1e-5)
    assert sum(losses(ours)[-40:]) < 0.98 * sum(losses(ours)[:40])


def test_the_adapter_makes_the_same_picture_in_a_stock_pipeline(stock: Path, pictures: Path) -> None:
    sheet = Image.open(stock / "validation" / f"step-{STEPS:08d}.png")
    trained = sheet.crop((0, sheet.height // 2, sheet.width, sheet.height))

    def generate(pipe: Any) -> Image.Image:
        (picture,) = validation.pictures(pipe, [pictures / "red.png"], PROMPT, 3, trained.width, seed=0)
        return picture

    pipe = tiny_pipelines.stable_diffusion_xl(encoders=True)
    pipe.load_ip_adapter(str(stock), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None)
    assert generate(pipe).tobytes() == trained.tobytes()
    pipe.set_ip_adapter_scale(0.0)
    assert generate(pipe).tobytes() != trained.tobytes(), "the adapter has no say in the picture"


def test_a_kill_while_a_checkpoint_is_written_loses_the_unfinished_steps_alone(
    stock: Path, pictures: Path, tmp_path: Path
) -> None:
    # the second checkpoint stops in the middle of its largest file, and waits there to be killed
    stop = """
import io, sys, torch, train_ip_adapter
save, count = torch.save, 0
def slow(state, file):
    global count
    count += 1
    if count == 1:
        return save(state, file)
    buffer = io.BytesIO()
    save(state, buffer)
    with file.open("wb") as half:
        half.write(buffer.getvalue()[: buffer.tell() // 2])
    print("in the middle", flush=True)
    sys.stdin.read()
torch.save = slow
train_ip_adapter.main(sys.argv[1:])
"""
    options = command(pictures, tmp_path, "--checkpoint-every", "4", "--steps", "16", "--resume")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", stop, *options], **pipes, text=True, env=environment())
    assert process.stdin is not None
    assert process.stdout is not None
    assert any("in the middle" in line for line in process.stdout), "the process ended before its second checkpoint"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdin.close()
    process.stdout.close()
    assert [path.name for path in checkpoints.finished(tmp_path)] == ["checkpoint-00000004"]
    assert list(tmp_path.glob(".unfinished-*/state.pt")), "nothing was half written"
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 9))

    resumed = train(pictures, tmp_path, "--checkpoint-every", "4", "--steps", "16", "--resume")
    assert [row["step"] for row in resumed] == list(range(1, 17))
    assert losses(resumed) == losses(metrics(stock))[:16], "not the losses of a run that nobody killed"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"checkpoint-{step:08d}" for step in (8, 12, 16)), "ip_adapter.safetensors", "metrics.jsonl"]


@pytest.mark.slow
def test_a_kill_at_any_call_that_changes_the_disk_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """A process writes checkpoints and metrics and is killed at its first such call; another at its second; and so on."""

    def steps(folder: Path) -> None:
        for step in range(1, 5):
            Metrics(folder / "metrics.jsonl").append([{"step": step}])

            def contents(place: Path, step: int = step) -> None:
                (place / "a").write_text(f"{step}" * 10_000)
                (place / "b").write_text(f"{step}")

            checkpoints.write(folder, step, contents, keep=2)

    kills = 0
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        folder.mkdir()
        child = os.fork()
        if not child:
            _kill_at(moment, lambda folder=folder: steps(folder))
        _, status = os.waitpid(child, 0)
        kept = checkpoints.finished(folder)
        for checkpoint in kept:
            step = str(int(checkpoint.name.removeprefix("checkpoint-")))
            assert (checkpoint / "a").read_text() == step * 10_000
            assert (checkpoint / "b").read_text() == step
        last = int(kept[-1].name.removeprefix("checkpoint-")) if kept else 0
        assert len(kept) >= min(last, 2), f"killed at call {moment}: fewer than it keeps"
        if (folder / "metrics.jsonl").exists():
            assert len(metrics(folder)) >= last, "a checkpoint without the metrics before it"
            Metrics(folder / "metrics.jsonl").forget_after(last)
            assert [row["step"] for row in metrics(folder)] == list(range(1, last + 1))
        checkpoints.tidy(folder)
        assert {path.name for path in folder.iterdir()} <= {path.name for path in kept} | {"metrics.jsonl"}
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
    assert kills > 40
    assert last == 4


def _kill_at(moment: int, work: Any) -> None:
    """Do the work, and be killed just before the call of this number that changes what is on the disk."""
    calls = itertools.count()

    def watch(event: str, details: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.unlink", "shutil.rmtree")
        if (writes or (event == "open" and "tmp" in str(details[0]))) and next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(watch)
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(pictures: Path, stock: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launched([*launch, str(SCRIPT), *command(pictures, tmp_path)])
    together, alone = losses(metrics(tmp_path)), losses(metrics(stock))[:8]
    assert together != alone, "two processes sum in another order: were there two?"
    # a first step of Adam turns the rounding of a gradient near 0 into a step of the learning rate
    assert together[0] == pytest.approx(alone[0], rel=1e-6)
    assert together == pytest.approx(alone, rel=2e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_shards_compute_what_one_process_does(pictures: Path, stock: Path, tmp_path: Path) -> None:
    """FSDP, forced on CPUs: sharded, resumed as one process, validated with pictures, in bfloat16 with checkpointing."""
    config = ["--config_file", str(SCRIPT.with_name("fsdp.yaml")), "--num_processes", "2", "--main_process_port", "0"]
    driver = Path(__file__).with_name("fsdp_on_cpu.py")
    launch = [sys.executable, "-m", "accelerate.commands.launch", *config, str(driver)]

    def run(output: Path, *more: str) -> list[float]:
        printed = launched([*launch, *command(pictures, output, *more)])
        shards = [int(count) for count in re.findall(r"shards: (\d+)", printed)]
        assert len(shards) == 2
        assert min(shards) > 100, "nothing was sharded"
        return losses(metrics(output))

    one = losses(metrics(stock))[:8]
    reference = ["--validation-image", str(pictures / "red.png"), "--validation-inference-steps", "2"]
    sharded = run(tmp_path / "a", "--mixed-precision", "no", "--checkpoint-every", "4", *reference)
    assert sharded == pytest.approx(one, rel=2e-4)
    assert (tmp_path / "a" / "validation" / "step-00000008.png").is_file()
    (tmp_path / "a" / "checkpoint-00000008").rename(tmp_path / "a" / ".removed-checkpoint-00000008")
    assert losses(train(pictures, tmp_path / "a", "--resume")) == pytest.approx(one, rel=2e-4)
    half = run(tmp_path / "b", "--gradient-checkpointing")
    assert half == pytest.approx(one, rel=1e-2)


@pytest.mark.slow
def test_accumulated_parts_are_the_batch(pictures: Path, stock: Path, tmp_path: Path) -> None:
    parts = losses(train(pictures, tmp_path, "--gradient-accumulation-steps", "2"))
    assert parts == pytest.approx(losses(metrics(stock))[:8], rel=2e-4)


@pytest.mark.slow
def test_memory_savers_and_precisions(pictures: Path, stock: Path, tmp_path: Path) -> None:
    checkpointed = train(pictures, tmp_path / "a", "--gradient-checkpointing", "--workers", "1")
    assert losses(checkpointed) == losses(metrics(stock))[:8], "recomputed activations are the same"
    half = train(pictures, tmp_path / "b", "--mixed-precision", "bf16", "--gradient-checkpointing")
    assert losses(half) == pytest.approx(losses(metrics(stock))[:8], rel=1e-2)
    assert losses(half) != losses(checkpointed)
    assert {tensor.dtype for tensor in load_file(tmp_path / "b" / "ip_adapter.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_the_first_adapter_survives_its_file(model: str, kind: str, tmp_path: Path) -> None:
    def build() -> Any:
        return (
            tiny_pipelines.stable_diffusion(encoders=True)
            if model == "sd15"
            else tiny_pipelines.stable_diffusion_xl(encoders=True)
        )

    pipe = build()
    parameters = adapter.install(pipe, adapter.initial(pipe.unet, kind, pipe.image_encoder, tokens=6))
    assert all(parameter.requires_grad == (name in parameters) for name, parameter in pipe.unet.named_parameters())
    for name in ("down_blocks.1", "up_blocks.0"):
        attention = pipe.unet.get_submodule(f"{name}.attentions.0.transformer_blocks.0.attn2")
        assert torch.equal(attention.processor.to_k_ip[0].weight, attention.to_k.weight), "as in the paper"
        assert torch.equal(attention.processor.to_v_ip[0].weight, attention.to_v.weight)
    with torch.no_grad():
        for i, parameter in enumerate(parameters.values()):
            parameter += 0.01 * i  # no two alike
    file = tmp_path / "adapter.safetensors"
    adapter.save(adapter.to_checkpoint(pipe.unet, parameters), file)
    other = adapter.install(build(), file)
    assert other.keys() == parameters.keys()
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in other.items())


@pytest.mark.slow
def test_a_run_from_another_adapter_with_an_average(pictures: Path, stock: Path, tmp_path: Path) -> None:
    begin = stock / "ip_adapter.safetensors"
    options = ["--init-adapter", str(begin), "--ema-decay", "0.9", "--checkpoint-every", "4"]
    options += ["--schedule", "cosine", "--warmup-steps", "2"]
    rows = train(pictures, tmp_path / "a", *options)
    assert rows[0]["loss"] < metrics(stock)[0]["loss"], "began from nothing"
    rates = [row["learning_rate"] for row in rows]
    assert rates[:3] == [5e-4, 1e-3, 1e-3]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    first, last, average = (load_file(path) for path in (begin, *sorted((tmp_path / "a").glob("*.safetensors"))))
    for name in last:
        assert (average[name] - first[name]).norm() < (last[name] - first[name]).norm(), "an average lags"
    (tmp_path / "a" / "checkpoint-00000008").rename(tmp_path / "a" / ".removed-checkpoint-00000008")
    before = (tmp_path / "a" / "ip_adapter_ema.safetensors").read_bytes()
    assert train(pictures, tmp_path / "a", *options, "--resume") == rows
    assert (tmp_path / "a" / "ip_adapter_ema.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("own_encoder", [True, False])
def test_a_model_from_a_folder(own_encoder: bool, pictures: Path, stock: Path, tmp_path: Path) -> None:
    """The losses of the model that was saved there, with the image encoder in it or in a folder of its own."""
    pipe = tiny_pipelines.stable_diffusion_xl(encoders=True)
    if not own_encoder:
        pipe.image_encoder.save_pretrained(tmp_path / "encoder")
        pipe.register_modules(image_encoder=None, feature_extractor=None)
    pipe.save_pretrained(tmp_path / "model")
    given = [option for option in command(pictures, tmp_path / "out") if option not in ("--tiny", "sdxl")]
    given += ["--model", str(tmp_path / "model"), "--image-encoder", str(tmp_path / "encoder")]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    train_ip_adapter.main([*given, "--image-encoder-subfolder", ""])
    found, expected = losses(metrics(tmp_path / "out")), losses(metrics(stock))[:8]
    assert found[0] == expected[0]
    # weights that are mapped from a file lie on other addresses, by which products choose their instructions
    assert found == pytest.approx(expected, rel=2e-4)


def test_a_batch_is_the_same_however_it_is_shared() -> None:
    whole = [n for part in data.ShareOfBatches(3, 5, 8, 8) for n in part]
    assert whole == list(range(24, 40))
    for processes, share in ((1, 2), (2, 4), (2, 2), (4, 2), (8, 1)):
        samplers = [data.ShareOfBatches(3, 5, 8, share, processes, process) for process in range(processes)]
        assert {len(sampler) for sampler in samplers} == {16 // (share * processes)}
        assert [n for parts in zip(*samplers, strict=True) for part in parts for n in part] == whole


def test_everything_random_follows_from_the_seed_and_the_number(pictures: Path) -> None:
    folder = data.read_folder(pictures, 32)
    pipe = tiny_pipelines.stable_diffusion(encoders=True)
    shares = (0.1, 0.2, 0.3)

    def examples(seed: int, **options: Any) -> data.Examples:
        recipe = data.Recipe(seed, 32, (4, 16, 16), 1000, pipe.feature_extractor, shares, **options)
        return data.Examples(folder, recipe)

    one, other = examples(0)[17], examples(0)[17]
    assert all(torch.equal(one[k], other[k]) if isinstance(one[k], torch.Tensor) else one[k] == other[k] for k in one)
    for different in (examples(0)[18], examples(1)[17], examples(0, stream="validation")[17]):
        assert not torch.equal(one["noise"], different["noise"])
    for epoch in (0, 1):
        numbers = range(6 * epoch, 6 * epoch + 6)
        assert {examples(0)[n]["caption"] for n in numbers} == set(folder.captions), "each picture once in an epoch"
    drawn = [examples(0)[n] for n in range(600)]
    drops = [(example["drop_image"], example["drop_text"]) for example in drawn]
    for share, what in zip(shares, ((True, False), (False, True), (True, True)), strict=True):
        assert abs(drops.count(what) / 600 - share) < 0.05, what
    assert len({int(example["timestep"]) for example in drawn}) > 400


def test_crops_and_what_sdxl_is_told_of_them(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (32, 0, 64, 32))
    pixels, ids = data._crop(image, 32, (0.5, 0.5), flip=False)
    assert ids.tolist() == [32, 64, 0, 16, 32, 32]
    assert pixels[:, :, :14].max() < -0.9 < 0.9 < pixels[:, :, 18:].min()
    right, _ = data._crop(image, 32, (1.0, 0.0), flip=False)
    assert right.min() > 0.9
    mirrored, ids = data._crop(image, 32, (1.0, 0.0), flip=True)
    assert torch.equal(mirrored, right.flip(2))
    assert ids.tolist() == [32, 64, 0, 0, 32, 32], "where it lies in the mirrored picture"


def test_captions_of_a_metadata_file(pictures: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": f"{name}.png", "text": name.upper()}) for name in ("blue", "red")]
    for name in ("blue", "red"):
        (tmp_path / f"{name}.png").write_bytes((pictures / f"{name}.png").read_bytes())
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    folder = data.read_folder(tmp_path, 32)
    assert folder.captions == ["BLUE", "RED"]
    assert folder[1][0].size == (40, 40)
    (tmp_path / "metadata.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    assert data.read_folder(tmp_path, 32).fingerprint != folder.fingerprint


MISTAKES = {
    "no folder": (["--data", "/nowhere"], "--data /nowhere: no such folder"),
    "empty": (["--data", "{empty}"], r"--data \S+: no pictures in it \(.bmp, .jpeg"),
    "captions": (["--data", "{uncaptioned}"], r"2 pictures \(a.png, b.png\) without a caption: each needs a .txt file"),
    "metadata": (["--data", "{metadata}"], r'metadata.jsonl, line 2: expected {"file_name": ..., "text": ...}'),
    "missing": (["--data", "{missing}"], r"metadata.jsonl: 1 picture \(gone.png\) not there"),
    "broken": (["--data", "{broken}"], r"x.png: no picture that can be read"),
    "small": (["--resolution", "44"], r"6 pictures \(blue.png, .*, ...\) smaller than --resolution 44"),
    "odd": (["--resolution", "31"], "--resolution 31: not a multiple of 2"),
    "batch": (["--gradient-accumulation-steps", "3"], "--batch-size 2: .* not a multiple of 3: 1 processes with 3"),
    "fp16": (["--mixed-precision", "fp16"], "--mixed-precision fp16: needs a GPU"),
    "model": (["--model", "/nowhere"], "--model /nowhere: "),
    "picture": (["--validation-image", "{broken}/x.png"], "x.png: no picture that can be read"),
    "adapter": (["--init-adapter", "{broken}/x.bin"], "--init-adapter .*x.bin: "),
    "kind": (["--init-adapter", "{broken}/full.bin"], "full.bin: a IPAdapterFullImageProjection; base and plus"),
    "encoder": (["--init-adapter", "{broken}/wide.bin"], "wide.bin: made for embeddings of 48 channels, .* gives 32"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_are_named(mistake: str, pictures: Path, tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("empty", "uncaptioned", "metadata", "missing", "broken")}
    for place in places.values():
        place.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(places["uncaptioned"] / f"{name}.png")
    (places["metadata"] / "metadata.jsonl").write_text('\n{"file_name": "x.png"}\n')
    (places["missing"] / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n')
    (places["broken"] / "x.png").write_text("no picture")
    (places["broken"] / "x.txt").write_text("x")
    unet = tiny_pipelines.stable_diffusion_xl().unet
    wide = tiny_pipelines.base_adapter(unet, image_dim=48)
    torch.save(wide, places["broken"] / "wide.bin")
    square, line = torch.zeros(64, 64), torch.zeros(64)
    full = {f"proj.{i}.weight": square for i in (0, 2)} | {f"proj.{i}.bias": line for i in (0, 2)}
    full |= {"proj.3.weight": line, "proj.3.bias": line}
    torch.save(wide | {"image_proj": full}, places["broken"] / "full.bin")
    options, message = MISTAKES[mistake]
    given = command(pictures, tmp_path / "out", *(option.format(**places) for option in options))
    if "--model" in given:
        given = [option for option in given if option not in ("--tiny", "sdxl")]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        train_ip_adapter.main(given)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_the_run(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = train_ip_adapter.Run.loss

    def diverges(run: Any, batch: dict[str, Any]) -> torch.Tensor:
        return loss(run, batch) * (float("nan") if run.step == 4 else 1)

    monkeypatch.setattr(train_ip_adapter.Run, "loss", diverges)
    with pytest.raises(SystemExit, match="the loss is not finite at step 5"):
        train(pictures, tmp_path, "--checkpoint-every", "3")
    assert [path.name for path in checkpoints.finished(tmp_path)] == ["checkpoint-00000003"]


def test_a_run_goes_on_with_what_it_began_with(pictures: Path, stock: Path) -> None:
    with pytest.raises(SystemExit, match=rf"has checkpoints: --resume goes on from checkpoint-{STEPS:08d}"):
        train(pictures, stock)
    with pytest.raises(SystemExit) as raised:
        train(pictures, stock, "--resume", "--seed", "1", "--learning-rate", "1e-4", "--steps", str(STEPS))
    lines = str(raised.value).splitlines()[1:]
    assert lines == ["  learning-rate: 0.001 then, 0.0001 now", "  seed: 0 then, 1 now"]
    with pytest.raises(SystemExit, match=rf"--steps 8: .* is at step {STEPS} already"):
        train(pictures, stock, "--resume")
    caption = pictures / "red.txt"
    before = caption.read_text()
    try:
        caption.write_text("a cube")
        with pytest.raises(SystemExit, match="contents of data"):
            train(pictures, stock, "--resume", "--steps", str(STEPS))
    finally:
        caption.write_text(before)


def test_several_processes_that_accelerate_does_not_see(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    AcceleratorState._reset_state(reset_partial_state=True)
    given = [option for option in command(pictures, tmp_path / "out") if option != "--cpu"]
    with pytest.raises(SystemExit, match="accelerate sees one"):
        train_ip_adapter.main(given)


@pytest.mark.parametrize(("setting", "message"), [("FSDP", "accelerate ignores it on CPUs"), ("DEEPSPEED", "engine owns")])
def test_launch_settings_that_cannot_be_honoured(
    setting: str, message: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{setting}", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match=message):
        train_ip_adapter.main(command(pictures, tmp_path / "out"))


def test_the_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments.parse(["--help"], str(train_ip_adapter.__doc__))
    printed = capsys.readouterr().out
    assert "arXiv:2308.06721" in printed
    assert re.search(r"--batch-size BATCH_SIZE\s+examples of one optimizer step, over all processes", printed)
