"""One file per model family. With `integration`, the only rooms that know diffusers."""
