"""The two INT8 operations and their implementations. Plain torch and Triton; nothing of ComfyUI."""
