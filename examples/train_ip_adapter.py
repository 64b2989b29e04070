"""Train an IP-Adapter for Stable Diffusion 1.5, 2.1 or XL.

    accelerate launch examples/train_ip_adapter.py --model MODEL --data PICTURES --output OUTPUT

The UNet, the text encoders, the VAE and the image encoder are frozen. What is trained is the projection of the image embedding
to image tokens and, in each cross-attention, the keys and values of these tokens (arXiv:2308.06721). The result is
OUTPUT/ip_adapter.safetensors, which `pipe.load_ip_adapter` reads.

A run is a function of its arguments: which examples a step sees, their noise, timesteps and drops follow from the seed and the
number of the step, whatever the number of processes. After a kill the same command with --resume goes on from the last
checkpoint with the losses that it would have had.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from ip_adapter_training import adapter, arguments, checkpoints, data, launch, models, validation
from ip_adapter_training.arguments import UsageError
from ip_adapter_training.metrics import Metrics
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.utils.data import DataLoader
from tqdm import tqdm

import ipa_kernels

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
LOAD = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


class Run:
    """A training run: models, optimizer, data, and the step that they are at."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        launch.refuse_deepspeed()
        self.accelerator = accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            cpu=options.cpu,
        )
        launch.check(accelerator, options)
        options.mixed_precision = accelerator.mixed_precision
        self.share = arguments.share_of(options, accelerator.num_processes)
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

        self.pipe = pipe = models.load(options)
        self.unet = pipe.unet
        # nothing but the first weights of the projection is drawn from the global generator
        set_seed(options.seed)
        first = options.init_adapter or adapter.initial(self.unet, options.adapter, pipe.image_encoder, options.tokens)
        self.parameters = adapter.install(pipe, first)
        models.place(pipe, list(self.parameters.values()), accelerator.device, self.dtype)
        self.noise = DDPMScheduler.from_config(pipe.scheduler.config)
        self.is_plus = "encoder_hid_proj.image_projection_layers.0.latents" in self.parameters
        self.conditions = models.Conditions(pipe, accelerator.device, self.dtype, self.is_plus)
        if options.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if options.accelerated:
            self.report = ipa_kernels.enable(self.unet, impl=options.impl)

        self.read_data()
        for picture in options.validation_image:
            # now, not when it is needed
            data.read_picture(picture)
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=options.learning_rate, weight_decay=options.weight_decay)
        self.model, self.optimizer = accelerator.prepare(self.unet, optimizer)
        # FSDP puts others in their place
        self.parameters = {name: tensor for name, tensor in self.unet.named_parameters() if tensor.requires_grad}
        self.average = (
            {name: parameter.detach().clone() for name, parameter in self.parameters.items()} if options.ema_decay else None
        )
        self.step = 0
        self.unwritten: list[dict[str, Any]] = []
        self.metrics = Metrics(options.output / "metrics.jsonl")

    def read_data(self) -> None:
        """The records, and how examples of training and validation are made of them."""
        options, pipe = self.options, self.pipe
        factor = pipe.vae_scale_factor
        side = options.resolution or self.unet.config.sample_size * factor
        if side % factor:
            raise UsageError(f"--resolution {side}: not a multiple of {factor}, the VAE's factor")
        if options.data is not None:
            self.records: data.Records = data.read_folder(options.data, side)
        else:
            self.records = data.HubDataset(options.dataset, options.image_column, options.caption_column, side)
        channels = self.unet.config.in_channels
        self.resolution = side
        common = {
            "seed": options.seed,
            "resolution": side,
            "latent_shape": (channels, side // factor, side // factor),
            "timesteps": self.noise.config.num_train_timesteps,
            "to_embedder": pipe.feature_extractor,
        }
        drops = (options.drop_image, options.drop_text, options.drop_both)
        recipe = data.Recipe(**common, drops=drops, random_crop=options.random_crop, random_flip=options.random_flip)
        self.examples = data.Examples(self.records, recipe)
        self.validation_examples = data.Examples(self.records, data.Recipe(**common, stream="validation"))

    def batches(self) -> Iterator[dict[str, Any]]:
        """This process's shares of the batches, from the current step to the last."""
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        sampler = data.ShareOfBatches(self.step, self.options.steps, self.options.batch_size, self.share, processes, process)
        workers = {"num_workers": self.options.workers, "persistent_workers": self.options.workers > 0}
        # a generator of its own: the loader would draw from the global one
        yield from DataLoader(self.examples, batch_sampler=sampler, generator=torch.Generator(), **workers)

    def train(self) -> None:
        """Go on to the last step."""
        options, accelerator = self.options, self.accelerator
        batches = self.batches()
        bar = tqdm(initial=self.step, total=options.steps, disable=not accelerator.is_local_main_process, unit="step")
        while self.step < options.steps:
            rate = learning_rate(self.step, options)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = []
            for _ in range(options.gradient_accumulation_steps):
                with accelerator.accumulate(self.model):
                    loss = self.loss(next(batches))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.parameters.values(), options.max_grad_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                losses.append(loss.detach())
            self.step += 1
            self.update_average()
            self.unwritten.append({"step": self.step, "loss": torch.stack(losses).mean(), "learning_rate": rate})
            bar.update()
            self.report_and_save(bar)
        bar.close()

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The mean squared error of the predicted noise (or velocity) of a batch."""
        device = self.accelerator.device
        latents = self.conditions.latents(batch)
        noise, timesteps = batch["noise"].to(device), batch["timestep"].to(device)
        noisy = self.noise.add_noise(latents, noise, timesteps)
        kind = self.noise.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise UsageError(f"the model predicts {kind!r}; known are 'epsilon' and 'v_prediction'")
        target = noise if kind == "epsilon" else self.noise.get_velocity(latents, noise, timesteps)
        predicted = self.model(noisy.to(self.dtype), timesteps, return_dict=False, **self.conditions(batch))[0]
        return F.mse_loss(predicted.float(), target.float())

    def report_and_save(self, bar: Any) -> None:
        """What is due after a step: losses, a checkpoint, validation."""
        options, last = self.options, self.step == self.options.steps
        validate = last or self.step % options.validate_every == 0
        save = last or self.step % options.checkpoint_every == 0
        if validate and options.validation_samples:
            self.unwritten[-1]["validation_loss"] = self.validation_loss()
        if validate or save or self.step % options.log_every == 0:
            self.write_metrics(bar)
        # before the checkpoint: a run that goes on from it does not come here again
        if validate and options.validation_image:
            made = validation.pictures(
                self.pipe,
                options.validation_image,
                options.validation_prompt,
                options.validation_inference_steps,
                self.resolution,
                options.seed,
            )
            if self.accelerator.is_main_process:
                file = options.output / "validation" / f"step-{self.step:08d}.png"
                validation.save_pictures(options.validation_image, made, file)
        if save:
            self.save()

    @torch.no_grad()
    def validation_loss(self) -> Tensor:
        """The loss over examples, noise and timesteps that are always the same; pictures of the training set, none dropped."""
        losses = []
        for first in range(0, self.options.validation_samples, self.share):
            numbers = range(first, min(first + self.share, self.options.validation_samples))
            batch = torch.utils.data.default_collate([self.validation_examples[n] for n in numbers])
            losses.append(self.loss(batch) * len(numbers))
        return torch.stack(losses).sum() / self.options.validation_samples

    def write_metrics(self, bar: Any) -> None:
        """Append the losses since the last time to metrics.jsonl, and look at them: NaN ends the run."""
        rows, self.unwritten = self.unwritten, []
        means = self.accelerator.reduce(torch.stack([row["loss"] for row in rows]), "mean").tolist()
        for row, mean in zip(rows, means, strict=True):
            row["loss"] = mean
            if "validation_loss" in row:
                row["validation_loss"] = row["validation_loss"].item()
        if self.accelerator.is_main_process:
            self.metrics.append(rows)
        bar.set_postfix(loss=f"{sum(means) / len(means):.4f}")
        if self.accelerator.scaler is None and not all(map(math.isfinite, means)):
            step = next(row["step"] for row in rows if not math.isfinite(row["loss"]))
            raise UsageError(f"the loss is not finite at step {step}: lower --learning-rate, or --mixed-precision no")

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average a little towards the weights."""
        if self.average is None:
            return
        # an average that begins at random weights would keep them for 1 / (1 - decay) steps
        decay = min(self.options.ema_decay, (1 + self.step) / (10 + self.step))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1 - decay)

    def save(self) -> None:
        """Write a checkpoint; every process takes part, the first one writes."""
        weights, optimizer = get_state_dict(self.model, self.optimizer.optimizer, options=FULL)
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "arguments": arguments.remembered(self.options, self.records.fingerprint),
                "weights": weights,
                "optimizer": optimizer,
                "average": self.average,
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            }

            def contents(place: Path) -> None:
                torch.save(state, place / "state.pt")
                for name, made in self.adapters(weights).items():
                    adapter.save(made, place / name)

            checkpoints.write(self.options.output, self.step, contents, self.options.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Write the adapter beside the checkpoints."""
        weights = get_model_state_dict(self.model, options=FULL)
        if self.accelerator.is_main_process:
            for name, made in self.adapters(weights).items():
                checkpoints.write_file(self.options.output / name, partial(adapter.save, made))
        self.accelerator.wait_for_everyone()

    def adapters(self, weights: dict[str, Any]) -> dict[str, adapter.Checkpoint]:
        """The files for `load_ip_adapter`: the adapter and, where there is one, its moving average."""
        made = {"ip_adapter.safetensors": adapter.to_checkpoint(self.unet, weights)}
        if self.average is not None:
            made["ip_adapter_ema.safetensors"] = adapter.to_checkpoint(self.unet, self.average)
        return made

    def resume(self) -> None:
        """Go back to the last complete checkpoint, if there is one."""
        options = self.options
        found = checkpoints.finished(options.output)
        if found and not options.resume:
            raise UsageError(f"--output {options.output} has checkpoints: --resume goes on from {found[-1].name}")
        if self.accelerator.is_main_process:
            options.output.mkdir(parents=True, exist_ok=True)
            checkpoints.tidy(options.output)
        if found:
            state = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)
            arguments.check_same(state["arguments"], arguments.remembered(options, self.records.fingerprint), found[-1])
            if state["step"] > options.steps:
                raise UsageError(f"--steps {options.steps}: {found[-1]} is at step {state['step']} already")
            set_state_dict(
                self.model,
                self.optimizer.optimizer,
                model_state_dict=state["weights"],
                optim_state_dict=state["optimizer"],
                options=LOAD,
            )
            if self.average is not None:
                for name, tensor in state["average"].items():
                    self.average[name].copy_(tensor)
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step = state["step"]
        if self.accelerator.is_main_process:
            self.metrics.forget_after(self.step)
        self.accelerator.wait_for_everyone()


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """A function of the step alone, so that there is no scheduler whose state could be lost."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.learning_rate
    progress = (step - options.warmup_steps) / (options.steps - options.warmup_steps)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def main(argv: list[str] | None = None) -> None:
    """Train; a mistake of the user's ends it with one line."""
    try:
        options = arguments.parse(argv, str(__doc__))
        run = Run(options)
        run.resume()
        if run.accelerator.is_main_process:
            count = sum(parameter.numel() for parameter in run.parameters.values())
            print(f"{len(run.records)} pictures, {count:,} parameters, steps {run.step} to {options.steps}")
            if options.accelerated:
                print(run.report)
        run.train()
        run.finish()
        run.accelerator.end_training()
    except UsageError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
