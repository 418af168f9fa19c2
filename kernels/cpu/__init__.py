"""Operations for CPUs in C++, behind ctypes. See `native_ops` and the sources beside it."""
