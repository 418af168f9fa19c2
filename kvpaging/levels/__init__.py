"""Where pages lie below the device: host memory, disk, a server that speaks the Redis protocol.

Bytes by key, behind one interface (`level.Level`). No tensors, no policy, no page ids.
"""
