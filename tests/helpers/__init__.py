"""What tests share: pipelines, adapters and controls of diffusers, tiny and random; captures without a GPU; patches."""
