"""What every room of kvpaging shares: ids, errors, configuration, the clock."""
