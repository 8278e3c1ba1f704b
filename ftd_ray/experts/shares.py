"""How many experts share a GPU. Without Ray, for plans."""

from ftd.errors import UserError

GPU_HEADROOM = 0.92
"""Share of a GPU's memory that experts together may fill."""
EXPERTS_PER_GPU = 8
"""At most, however small they are: more only wait for each other."""


def gpu_share(need: int, total: int) -> float:
    """The share of a GPU of ``total`` bytes for an expert of ``need``: as many as fit, evenly."""
    fitting = int(total * GPU_HEADROOM) // max(1, need)
    if fitting < 1:
        raise UserError(
            f"an expert takes {need / 1e9:.1f} GB of GPU memory, and the GPU has "
            f"{total / 1e9:.1f} GB. Lower experts.batch_size or the network's width."
        )
    return 1 / min(fitting, EXPERTS_PER_GPU)
