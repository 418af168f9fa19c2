"""The step loop, the messages between the two processes, and their statistics."""
