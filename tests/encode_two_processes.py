"""Each process encodes its part of a data set; run by tests/test_scale.py under accelerate launch."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

import composable_ebm as ceb


class Halved(ceb.Codec):
    """Every second pixel."""

    image_shape, event_shape = (1, 8, 8), (1, 4, 4)

    def encode(self, images):
        return images[..., ::2, ::2]

    def decode(self, latents):
        return latents.repeat_interleave(2, 2).repeat_interleave(2, 3)


def pictures(count):
    return torch.arange(count * 64.0).reshape(count, 1, 8, 8) / (count * 64)


if __name__ == "__main__":
    out, count, shard = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    state = PartialState(cpu=True)
    codec, images = Halved(), pictures(count)
    for start in range(state.process_index * shard, count, state.num_processes * shard):
        latents = codec.latents(images[start : start + shard]).half()
        save_file(
            {"latents": latents}, out / f"latents-{start // shard:05d}-by-{state.process_index}.safetensors"
        )
    state.wait_for_everyone()
    state.destroy_process_group()
