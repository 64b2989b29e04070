"""The kernels and their launch table: triton only, no validation, no allocation policy."""
