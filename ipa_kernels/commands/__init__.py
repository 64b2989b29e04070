"""What `ipa-kernels COMMAND` does: one file per command with `Options` and `run(options)`, which returns the exit status."""
