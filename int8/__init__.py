"""INT8 (W8A8) quantization: weights per output row, activations per token, int32 accumulation."""
