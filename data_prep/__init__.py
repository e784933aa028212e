import pera_jax  # noqa: F401  first of all: it lets Ctrl-C end a command while the rest is imported
