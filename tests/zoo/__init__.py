"""Every kind of pipeline, adapter and control that a UNet's IP-Adapters have in diffusers, tiny and random, built in code."""
