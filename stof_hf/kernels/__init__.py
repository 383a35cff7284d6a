"""How csrc is compiled: at first use, ahead of time, or into a wheel."""
