"""What a command takes where an option is not given. Needs nothing but Python."""

PROMPT = "a lighthouse by the sea at sunset"
SCALE = 0.8
IMAGE_ENCODER = "image_encoder"
