"""Decoders whose programs compile in half the time; what they compute is the same."""

import jax

from tests.train import tiny


def quick(decoder):
    """The decoder, its two programs compiled with the least effort."""
    prefill, advance = decoder.prefill.__wrapped__, decoder.advance.__wrapped__
    decoder.prefill = jax.jit(prefill, static_argnames="filled", compiler_options=tiny.QUICK)
    decoder.advance = jax.jit(advance, donate_argnames="state", compiler_options=tiny.QUICK)
    return decoder
