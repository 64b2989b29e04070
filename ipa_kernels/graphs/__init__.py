"""CUDA graphs of a whole UNet step."""
