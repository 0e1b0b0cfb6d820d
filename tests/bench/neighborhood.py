"""Benchmark: time and memory of neighbourhood attention, tiled and by gathering all neighbours.

python -m tests.bench.neighborhood                         # maps of DiNAT-L at 640 x 640
python -m tests.bench.neighborhood --map 64,64,1 --gather  # one map, both forms
python -m tests.bench.neighborhood --gather --repeats 0    # memory only, as the compiler plans it
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from oneformer_jax.kernels.bench.records import median_milliseconds
from oneformer_jax.kernels.neighborhood_attention import neighborhood_attention

WIDTH = 32  # of a head
# height, width, heads, dilation: the first blocks of each stage of DiNAT-L on 640 x 640 pixels,
# padded to kernel_size * dilation where smaller
MAPS = [
    (160, 160, 6, 1),
    (220, 220, 6, 20),
    (80, 80, 12, 1),
    (80, 80, 12, 5),
    (110, 110, 12, 10),
    (40, 40, 24, 1),
    (40, 40, 24, 3),
    (55, 55, 24, 5),
    (20, 20, 48, 1),
    (22, 22, 48, 2),
]


def gather_attention(query, key, value, rpb, *, kernel_size, dilation):
    """The rule as it reads: kernel_size² keys and values for each pixel."""

    def neighbours(length):
        position = np.arange(length)
        count = -((position % dilation - length) // dilation)
        start = np.clip(position // dilation - kernel_size // 2, 0, count - kernel_size)
        steps = start[:, None] + np.arange(kernel_size)
        return (
            steps * dilation + position[:, None] % dilation,
            steps - position[:, None] // dilation + kernel_size - 1,
        )

    (rows, down), (columns, right) = map(neighbours, query.shape[1:3])

    def gather(x):  # [B, H, W, N, D] to [B, H, W, N, k * k, D]
        x = x[:, rows[:, None, :, None], columns[None, :, None, :]]
        return jnp.moveaxis(x.reshape(*x.shape[:3], -1, *x.shape[5:]), 3, 4)

    logits = jnp.einsum("bhwnd,bhwnkd->bhwnk", query, gather(key), preferred_element_type="float32")
    bias = rpb[:, down[:, None, :, None], right[None, :, None, :]]
    bias = jnp.moveaxis(bias.reshape(*bias.shape[:3], -1), 0, 2)
    attention = jax.nn.softmax(logits * query.shape[-1] ** -0.5 + bias)
    return jnp.einsum("bhwnk,bhwnkd->bhwnd", attention.astype(value.dtype), gather(value))


def measure(attention, shape, dtype, kernel_size, dilation, repeats) -> list[tuple[float, float]]:
    """(median ms, temporary memory over the map's) of the result, then of the gradients."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, shape, dtype) for key in keys[:3]]
    arrays.append(jax.random.normal(keys[3], (shape[3], *(2 * kernel_size - 1,) * 2)))

    def forward(*arrays):
        return attention(*arrays, kernel_size=kernel_size, dilation=dilation)

    def gradients(*arrays):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(forward(*a).astype("float32"))), range(4))(
            *arrays
        )

    results = []
    for function in (forward, gradients):
        run = jax.jit(function).lower(*arrays).compile()
        took = np.nan
        if repeats:
            took = median_milliseconds(lambda: jax.block_until_ready(run(*arrays)), repeats)  # noqa: B023
        memory = run.memory_analysis().temp_size_in_bytes / arrays[0].nbytes
        results.append((took, memory))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--map", help="height,width,dilation of one map of 6 heads")
    parser.add_argument("--kernel", type=int, default=11)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gather", action="store_true", help="the gathering form too")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    maps = MAPS
    if options.map:
        height, width, dilation = map(int, options.map.split(","))
        maps = [(height, width, 6, dilation)]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options}")
    print(f"{'map':<14}{'heads':>6}{'dilation':>9}  {'form':<8}{'forward':>20}{'gradients':>20}")
    forms = {"tiles": neighborhood_attention} | (
        {"gather": gather_attention} if options.gather else {}
    )
    for height, width, heads, dilation in maps:
        shape = (options.batch, height, width, heads, WIDTH)
        for name, form in forms.items():
            found = measure(form, shape, options.dtype, options.kernel, dilation, options.repeats)
            cells = "".join(f"{ms:>9.1f} ms{memory:>5.1f} x" for ms, memory in found)
            line = f"{height}x{width}"
            print(f"{line:<14}{heads:>6}{dilation:>9}  {name:<8}{cells}", flush=True)


if __name__ == "__main__":
    main()
