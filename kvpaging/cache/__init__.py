"""Pages: who owns them, what they hold, which may be reused. No tensors."""
