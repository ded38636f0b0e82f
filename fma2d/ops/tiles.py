from dataclasses import dataclass
@dataclass(frozen=True)
class Tile:
    block_m: int
    num_warps: int = 4
    num_stages: int = 1
def launch(kernel, device, head_dim, dtype, run):
    run(Tile(1<<16))
