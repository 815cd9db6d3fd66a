"""Smaller batches where memory runs out."""

from collections.abc import Callable
from typing import TypeVar

from moe_lens.data import Shard
from moe_lens.errors import InputError

T = TypeVar("T")


class Halving:
    """The number of tokens that are read at once: halved where memory runs out, and not raised again.

    As accelerate's `find_executable_batch_size`, of which it uses the parts; that collects garbage before every call,
    which takes longer than a small shard does.

    Args:
        batch_tokens: To begin with.
    """

    def __init__(self, batch_tokens: int):
        self.batch_tokens = batch_tokens

    def run(self, read: Callable[[int, Shard], T], shard: Shard) -> T:
        """Call a function with the number of tokens and a shard, again with half as many while memory runs out.

        Raises:
            InputError: Memory does not suffice for a single window.
        """
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        while True:
            try:
                return read(self.batch_tokens, shard)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            clear_device_cache(garbage_collection=True)
            longest = max(len(window.ids) for window in shard.windows)
            if self.batch_tokens <= longest:  # a window stands alone already
                raise InputError(
                    f"out of memory with a single window of {longest} tokens; ask for shorter windows, or another dtype"
                )
            self.batch_tokens //= 2
