"""The parts of `train_ip_adapter.py`: arguments, data, models, the adapter's file format, checkpoints, validation."""
