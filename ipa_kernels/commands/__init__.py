"""What `ipa-kernels COMMAND` does: one module per command with `Options` and `run(options)`, which returns the exit status."""
