"""Policy: who runs, with how many tokens, on which pages. No tensors, no text, no clock calls."""
