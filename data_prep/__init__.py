from pera_jax.common import interrupts

interrupts.guard_imports()
