"""Token mixing without parameters: cut every token into T slices and transpose the T x T blocks.

Source: RankMixer (arXiv 2507.15551), token mixing with as many heads as tokens; its way back is
the reverting of TokenMixer-Large (arXiv 2602.06563).
"""

import jax


def check(where: str, tokens: int, width: int) -> None:
    """Raises ValueError unless every token can be cut into T slices; names the nearest widths."""
    if width % tokens:
        raise ValueError(
            f"{where}: width={width} is no multiple of tokens={tokens}; mixing cuts every "
            f"token into T slices. Nearest widths: {width - width % tokens or tokens} and "
            f"{width + -width % tokens}"
        )


def mix(x_tnd: jax.Array) -> jax.Array:
    """New token h = slice h of every old token, concatenated: [T, N, D] -> [T, N, D].

    A transpose of T x T blocks, and so its own inverse.
    """
    return revert(x_tnd, x_tnd.shape[-1])


def revert(x_tnw: jax.Array, width: int) -> jax.Array:
    """From the mixed layout back: the first W columns [T, N, W] -> the tokens that they make.

    Column block h of the mixed tokens is token h: W = h D / T columns give the first h tokens,
    [h, N, D], D = width; W = D gives all of them, and then this is `mix`.
    """
    T, N, _ = x_tnw.shape
    return x_tnw.reshape(T, N, -1, width // T).swapaxes(0, 2).reshape(-1, N, width)
